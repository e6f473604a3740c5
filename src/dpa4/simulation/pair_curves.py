"""Pair curves: energy, force and curvature of two atoms alone against their distance.

They show what a model does where data are few: at short range and between elements that never met. (Nothing to do
with the dimer method, which looks for saddle points.)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from numpy.typing import NDArray

from dpa4.graph import Graph
from dpa4.potential import Potential, expand_energy, identify
from dpa4.simulation.runs.progress import progress_bar
from dpa4.simulation.runs.store import Records, write_csv, write_json
from dpa4.system import save_figure, stop_requests

COMPUTED = ("energy", "force", "curvature")
COLUMNS = ("pair", "distance_A", "energy_eV", "force_eV_per_A", "curvature_eV_per_A2")
FORCE_FLOOR = 0.01  # eV/Angstrom; a smaller force has no direction
WALL = 1.0  # eV that atoms at the shortest distance have at least
SPIKE = 0.1  # eV of ups and downs beyond those of a single well
JUMP, JUMP_SHARE = 0.005, 0.02  # eV, and share of the change of energy, that force and energy may disagree by
PER_PAGE = 12  # pairs of a figure
CPU_EDGES, GPU_EDGES = 256, 8192  # of a batch; on a CPU more do not fit into its caches

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

    Force and curvature are derivatives of the energy by automatic differentiation. On a GPU a batch holds several
    pairs, and becomes smaller where it does not fit into memory. A model with charge and spin is given its default,
    or else the neutral pair with the lowest multiplicity its number of electrons allows.

    Args:
        potential: The potential, not compiled, on the device to compute on.
        pairs: Elements; every pair of the potential by default.
        start: Shortest distance, in Angstrom; the longest is the cutoff.
        step: Between distances, in Angstrom; made a little smaller so that the last one is the cutoff.

    Raises:
        ValueError: If an element is not in the potential, the potential leaves a pair out, or start or step do not
            fit below the cutoff.
    """
    distances = _distances(potential, pairs, start, step)
    return _curves(potential, element_pairs(potential) if pairs is None else pairs, distances)


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
    """Compute pair curves and write them.

    Every curve is kept at once in ``output``/pairs.jsonl. Ctrl-C ends after the pair at hand; what is there is
    written, and the same call goes on, also for other pairs.

    Writes into the folder ``output``, replacing earlier files: pairs.csv (a row per distance), pairs.json (a
    ``Diagnosis`` per pair) and figures pairs-01.png, ... of 12 pairs each, flagged ones with a red title.

    Args:
        potential: As ``pair_curves``, which takes all other arguments, too.
        output: Folder, made if absent.
        pairs: Elements; every pair of the potential by default.
        start: Shortest distance, in Angstrom.
        step: Between distances, in Angstrom.
        progress: Show progress bars on a terminal.

    Raises:
        ValueError: As ``pair_curves``; or if the folder holds curves of another model or of other distances.
    """
    distances = _distances(potential, pairs, start, step)
    wanted = {"-".join(pair): pair for pair in (element_pairs(potential) if pairs is None else pairs)}
    settings = {"task": "dimer", **identify(potential), "start": float(start), "step": float(step)}
    folder = Path(output)
    with Records(folder, settings, "pairs") as records, stop_requests() as stopped:
        missing = [pair for name, pair in wanted.items() if name not in records.done]
        with progress_bar("pair", len(wanted), len(wanted) - len(missing), progress) as bar:
            for curve in _curves(potential, missing, distances):
                records.append({"id": curve.name} | {name: getattr(curve, name) for name in COMPUTED})
                bar.update(bar.task_ids[0], advance=1, status=curve.name)
                if stopped:
                    break
        kept = [(pair, records[name]) for name, pair in wanted.items() if name in records.done]
    curves = [
        PairCurve(pair, distances, *(np.array(record[name]) for name in COMPUTED)) for pair, record in kept
    ]
    scan = PairScan(curves, [diagnose(curve) for curve in curves], len(curves) == len(wanted))
    write_csv(folder / "pairs.csv", COLUMNS, _rows(curves))
    content = {"finished": scan.finished, "pairs": [asdict(d) for d in scan.diagnoses]}
    write_json(folder / "pairs.json", content)
    for old in folder.glob("pairs-*.png"):
        old.unlink()
    pages = range(0, len(curves), PER_PAGE)
    with progress_bar("figure", len(pages), show=progress and len(pages) > 1) as bar:
        for number, first in enumerate(pages, start=1):
            figure = draw_pairs(curves[first : first + PER_PAGE], scan.diagnoses[first : first + PER_PAGE])
            save_figure(figure, folder / f"pairs-{number:02d}.png", dpi=110)
            bar.advance(bar.task_ids[0])
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


def _rows(curves: Iterable[PairCurve]) -> Iterator[dict[str, str]]:
    """Of the table."""
    for curve in curves:
        columns = (curve.distance, curve.energy, curve.force, curve.curvature)
        for values in zip(*columns, strict=True):
            yield dict(zip(COLUMNS, (curve.name, *(f"{x:.9g}" for x in values)), strict=True))


def _distances(potential: Potential, pairs: Iterable[Pair] | None, start: float, step: float) -> Array:
    """Distances of every curve, after a check of the arguments."""
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
    return np.linspace(start, cutoff, round(np.ceil((cutoff - start) / step - 1e-9)) + 1)


def _curves(potential: Potential, pairs: Sequence[Pair], distances: Array) -> Iterator[PairCurve]:
    """Curves one after another; a batch ends within a curve, or takes points of several."""
    size = (GPU_EDGES if potential.device.type == "cuda" else CPU_EDGES) // 2
    numbers = np.array([[atomic_numbers[element] for element in pair] for pair in pairs])
    count, begun = len(distances), 0
    values = np.empty((0, 3))  # of points whose curves are not complete
    for pair in pairs:
        while len(values) < count:
            which, place = np.divmod(np.arange(begun, min(begun + size, count * len(pairs))), count)
            try:
                found = _evaluate(potential, _dimers(potential, numbers[which], distances[place]))
            except torch.OutOfMemoryError:
                if len(which) == 1:
                    raise
                size = len(which) // 2
                continue
            values = np.concatenate([values, found])
            begun += len(found)
        (energy, force, curvature), values = values[:count].T, values[count:]
        yield PairCurve(pair, distances, energy - energy[-1], force, curvature)


def _dimers(potential: Potential, numbers: NDArray[np.int64], distances: Array) -> Graph:
    """Pairs of atoms (S, 2) along x at the distances (S,); at the cutoff they do not interact any more."""
    atoms = torch.from_numpy(numbers)
    positions = torch.zeros(2 * len(atoms), 3, dtype=torch.float64)
    positions[1::2, 0] = torch.from_numpy(distances)
    ends = torch.arange(2 * len(atoms)).view(-1, 2)[torch.from_numpy(distances < potential.config.cutoff)]
    multiplicity = 1 + atoms.sum(dim=1) % 2
    state = torch.stack([torch.zeros_like(multiplicity), multiplicity], dim=1)
    if potential.config.default_charge_spin:
        state[:] = torch.tensor(potential.config.default_charge_spin)
    return Graph(
        atomic_numbers=atoms.flatten(),
        positions=positions,
        cell=torch.zeros(len(atoms), 3, 3, dtype=torch.float64),
        structure=torch.arange(len(atoms)).repeat_interleave(2),
        source=ends.flip(1).flatten(),
        destination=ends.flatten(),
        shift=torch.zeros(ends.numel(), 3, dtype=torch.float64),
        charge_spin=state,
    ).to(potential.device)


def _evaluate(potential: Potential, graph: Graph) -> Array:
    """Energy, force and curvature (S, 3) of pairs of atoms along x."""
    outward = torch.zeros_like(graph.positions)
    outward[1::2, 0] = 1.0  # the second atom moves away, so the product is the second derivative by distance
    energy, forces, product = expand_energy(potential, graph, outward)
    return torch.stack([energy, forces[1::2, 0], product[1::2, 0]], dim=1).cpu().numpy()
