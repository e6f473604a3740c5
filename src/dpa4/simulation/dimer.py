"""Pair curves: energy, force and curvature of two atoms alone against their distance.

They show what a model does where data are few: at short range and between elements that never met. (Nothing to do
with the dimer method, which looks for saddle points.)
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from numpy.typing import NDArray
from rich.progress import track

from dpa4.graph import Graph, build_graph, collate
from dpa4.potential import Potential, hessian_vector_product
from dpa4.system import atomic_write, save_figure, stop_requests

COLUMNS = ("pair", "distance_A", "energy_eV", "force_eV_per_A", "curvature_eV_per_A2")
FORCE_FLOOR = 0.01  # eV/Angstrom; a smaller force has no direction
WALL = 1.0  # eV that atoms at the shortest distance have at least
SPIKE = 0.1  # eV of ups and downs beyond those of a single well
JUMP, JUMP_SHARE = 0.005, 0.02  # eV, and share of the change of energy, that force and energy may disagree by
PER_PAGE = 12  # pairs of a figure

Pair = tuple[str, str]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairCurve:
    """Two atoms alone in space, at n distances."""

    pair: Pair
    distance: Array  # (n,) Angstrom, ascending
    energy: Array  # (n,) eV, relative to the atoms far apart
    force: Array  # (n,) eV/Angstrom, -dE/dr; positive pushes them apart
    curvature: Array  # (n,) eV/Angstrom^2, d2E/dr2

    @property
    def name(self) -> str:
        """Such as "Si-O"."""
        return "-".join(self.pair)


@dataclass(frozen=True)
class Diagnosis:
    """Numbers that tell whether a pair curve is a wall with at most one well; None where it is not finite.

    The flags: "not finite"; "no wall", if at the shortest distance the force does not repel or the energy is below
    1 eV; "several wells", if the force changes sign more than once; "spike", if the excess variation is above 0.1 eV;
    "jump", if energy and force disagree by more than 5 meV plus 2 % of the change of the energy.
    """

    pair: str
    minimum: float | None  # distance of the lowest energy, Angstrom
    depth: float | None  # energy below that of the atoms far apart, eV
    force_flips: int | None  # changes of sign, forces below 0.01 eV/Angstrom left out; a well has one
    excess_variation: float | None  # sum of |dE| between neighbouring points, less that of a single well, eV
    largest_jump: float | None  # between change of energy and integral of the force, over one step, eV
    flags: tuple[str, ...]


@dataclass(frozen=True)
class PairScan:
    """Curves of several pairs and what is conspicuous about them."""

    curves: list[PairCurve]
    diagnoses: list[Diagnosis]
    finished: bool  # false after an interruption

    @property
    def flagged(self) -> list[Diagnosis]:
        """Diagnoses with a flag."""
        return [d for d in self.diagnoses if d.flags]


def element_pairs(potential: Potential) -> list[Pair]:
    """Every pair of elements of a potential, those it leaves out excepted."""
    excluded = {frozenset(pair) for pair in potential.config.excluded_pairs}
    pairs = combinations_with_replacement(potential.elements, 2)
    return [pair for pair in pairs if frozenset(pair) not in excluded]


def parse_pairs(text: str) -> list[Pair]:
    """Pairs from text such as "Si-O,O-O".

    Raises:
        ValueError: If an entry is not two elements joined by a hyphen.
    """
    pairs = []
    for entry in text.split(","):
        first, _, second = entry.strip().partition("-")
        if unknown := [e for e in (first, second) if e not in atomic_numbers or e == "X"]:
            raise ValueError(
                f"pairs are written as Si-O,O-O; in {entry.strip()!r} {unknown[0]!r} is no element"
            )
        pairs.append((first, second))
    return pairs


def pair_curves(
    potential: Potential, pairs: Sequence[Pair] | None = None, *, start: float = 0.2, step: float = 0.02
) -> Iterator[PairCurve]:
    """Energy, force and curvature of pairs of atoms, one pair after another.

    Force and curvature are derivatives of the energy by automatic differentiation. A model with charge and spin is
    given its default, or else the neutral pair with the lowest multiplicity its number of electrons allows.

    Args:
        potential: The potential, not compiled, on the device to compute on.
        pairs: Elements; every pair of the potential by default.
        start: Shortest distance, in Angstrom; the longest is the cutoff.
        step: Between distances, in Angstrom; made a little smaller so that the last one is the cutoff.

    Raises:
        ValueError: If an element is not in the potential, the potential leaves a pair out, or start or step do not
            fit below the cutoff.
    """
    cutoff, known = potential.config.cutoff, element_pairs(potential)
    if not 0 < start < cutoff:
        raise ValueError(
            f"start must be a distance between 0 and the cutoff, {cutoff:g} Angstrom, got {start}"
        )
    if not 0 < step <= cutoff - start:
        raise ValueError(f"step must be between 0 and {cutoff - start:g} Angstrom, got {step}")
    for pair in pairs or ():
        if pair not in known and pair[::-1] not in known:
            raise ValueError(
                f"the model describes no pair {'-'.join(pair)}; its elements are {', '.join(potential.elements)}"
            )
    distances = np.linspace(start, cutoff, round(np.ceil((cutoff - start) / step - 1e-9)) + 1)
    graph = _dimers(distances, cutoff).to(potential.reference_energies.device)
    return (_curve(potential, pair, distances, graph) for pair in (known if pairs is None else pairs))


def diagnose(curve: PairCurve) -> Diagnosis:
    """What is conspicuous about a curve."""
    r, e, f, k = curve.distance, curve.energy, curve.force, curve.curvature
    if not (np.isfinite(e).all() and np.isfinite(f).all() and np.isfinite(k).all()):
        return Diagnosis(curve.name, None, None, None, None, None, ("not finite",))
    directions = np.sign(f[np.abs(f) > FORCE_FLOOR])
    flips = int((directions[1:] != directions[:-1]).sum())
    lowest, change, h = int(e.argmin()), np.diff(e), np.diff(r)
    excess = float(np.abs(change).sum() - (e[0] - e[lowest]) - (e[-1] - e[lowest]))
    # Trapezoidal rule with end correction: exact for cubic forces, so that the steep wall is no jump.
    integral = h * (f[1:] + f[:-1]) / 2 + h**2 * (k[1:] - k[:-1]) / 12
    jumps = np.abs(change + integral)
    flags = {
        "no wall": f[0] < FORCE_FLOOR or e[0] < WALL,
        "several wells": flips > 1,
        "spike": excess > SPIKE,
        "jump": bool((jumps > JUMP + JUMP_SHARE * np.abs(change)).any()),
    }
    return Diagnosis(
        pair=curve.name,
        minimum=round(float(r[lowest]), 6),
        depth=-float(e[lowest]),
        force_flips=flips,
        excess_variation=max(excess, 0.0),
        largest_jump=float(jumps.max(initial=0.0)),
        flags=tuple(name for name, found in flags.items() if found),
    )


def scan_pairs(
    potential: Potential,
    output: str | Path,
    pairs: Sequence[Pair] | None = None,
    *,
    start: float = 0.2,
    step: float = 0.02,
    progress: bool = True,
) -> PairScan:
    """Compute pair curves and write them; Ctrl-C ends after the pair at hand, and what is there is written.

    Writes into the folder ``output``, replacing earlier files: pairs.csv (a row per distance), pairs.json (a
    ``Diagnosis`` per pair) and figures pairs-01.png, ... of 12 pairs each, flagged ones with a red title.

    Args:
        potential: As ``pair_curves``, which takes all other arguments, too.
        output: Folder, made if absent.
        pairs: Elements; every pair of the potential by default.
        start: Shortest distance, in Angstrom.
        step: Between distances, in Angstrom.
        progress: Show a progress bar.

    Raises:
        ValueError: As ``pair_curves``.
    """
    found = pair_curves(potential, pairs, start=start, step=step)
    total = len(element_pairs(potential) if pairs is None else pairs)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    curves = []
    with stop_requests() as stopped, (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for curve in track(found, "pair curves", total=total, disable=not progress):
            columns = (curve.distance, curve.energy, curve.force, curve.curvature)
            writer.writerows((curve.name, *(f"{x:.9g}" for x in row)) for row in zip(*columns, strict=True))
            file.flush()
            curves.append(curve)
            if stopped:
                break
    scan = PairScan(curves, [diagnose(curve) for curve in curves], len(curves) == total)
    content = {"finished": scan.finished, "pairs": [asdict(d) for d in scan.diagnoses]}
    with atomic_write(folder / "pairs.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    for old in folder.glob("pairs-*.png"):
        old.unlink()
    pages = track(range(0, len(curves), PER_PAGE), "drawing", disable=not progress or total <= PER_PAGE)
    for number, first in enumerate(pages, start=1):
        figure = draw_pairs(curves[first : first + PER_PAGE], scan.diagnoses[first : first + PER_PAGE])
        save_figure(figure, folder / f"pairs-{number:02d}.png", dpi=110)
    return scan


def draw_pairs(curves: Sequence[PairCurve], diagnoses: Iterable[Diagnosis]) -> Any:
    """A matplotlib figure with energy, force and curvature of up to 12 pairs; walls are cut off."""
    from matplotlib.figure import Figure  # takes a second to import

    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    width, height = 3.2 * columns, 3.6 * rows
    figure = Figure(figsize=(width, height))
    edges = {"left": 0.6 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
    grid = figure.add_gridspec(rows, columns, hspace=0.25, wspace=0.3, **edges)
    for number, (curve, diagnosis) in enumerate(zip(curves, diagnoses, strict=True)):
        panel = grid[divmod(number, columns)].subgridspec(3, 1, height_ratios=[2, 1, 1], hspace=0.1)
        axes: Any = panel.subplots(sharex=True)
        shown = _below_the_wall(curve)
        lines = (("E (eV)", curve.energy), ("F (eV/Å)", curve.force), ("k (eV/Å²)", curve.curvature))
        for axis, (label, values) in zip(axes, lines, strict=True):
            axis.axhline(0, color="0.6", linewidth=0.8)
            axis.plot(curve.distance, values, linewidth=1.2)
            visible = values[shown & np.isfinite(values)]
            if visible.size:
                margin = 0.08 * max(float(np.ptp(visible)), 1e-3)
                axis.set_ylim(visible.min() - margin, visible.max() + margin)
            axis.set_ylabel(label, fontsize=7)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        axes[-1].set_xlabel("distance (Å)", fontsize=7)
        title = ": ".join(filter(None, (curve.name, ", ".join(diagnosis.flags))))
        axes[0].set_title(title, fontsize=8, color="tab:red" if diagnosis.flags else "black")
    return figure


def _below_the_wall(curve: PairCurve) -> NDArray[np.bool_]:
    """Points worth showing: up to twice the depth of the well, and at least 3 eV, above the atoms far apart."""
    finite = curve.energy[np.isfinite(curve.energy)]
    depth = -float(finite.min(initial=0.0))
    return curve.energy <= max(3.0, 2 * depth)


def _dimers(distances: Array, cutoff: float) -> Graph:
    """Pairs of atoms at the distances, and a last one out of reach; elements are to be filled in."""
    cell, pbc = np.zeros((3, 3)), np.zeros(3, dtype=bool)
    places = ([[0.0, 0.0, 0.0], [r, 0.0, 0.0]] for r in (*distances, 2 * cutoff))
    return collate([build_graph([1, 1], xyz, cell, pbc, cutoff) for xyz in places])


def _curve(potential: Potential, pair: Pair, distances: Array, graph: Graph) -> PairCurve:
    numbers = [atomic_numbers[element] for element in pair]
    spin = 1 if sum(numbers) % 2 == 0 else 2
    state = torch.tensor([potential.config.default_charge_spin or (0, spin)]).to(graph.charge_spin)
    graph = graph._replace(
        atomic_numbers=torch.tensor(numbers).to(graph.atomic_numbers).repeat(graph.num_structures),
        charge_spin=state.expand(graph.num_structures, 2),
    )
    prediction = potential(graph)
    outward = torch.zeros_like(graph.positions)
    outward[1::2, 0] = 1.0  # the second atom moves away, so the product is the second derivative by distance
    curvature = hessian_vector_product(potential, graph, outward)[1::2, 0]
    energy = (prediction.energy[:-1] - prediction.energy[-1]).detach()
    values = (energy, prediction.forces[1:-2:2, 0].detach(), curvature[:-1])
    return PairCurve(pair, distances, *(v.cpu().numpy() for v in values))
