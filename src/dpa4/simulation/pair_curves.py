"""Pair curves: energy, force and curvature of two isolated atoms as functions of their distance.

Pair curves show how a model behaves where training data are scarce: at short range, and between elements that were
never neighbours. They are unrelated to the dimer method, which searches for saddle points.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from ase.data import atomic_numbers
from numpy.typing import NDArray

from dpa4.data.coverage import ElementPair
from dpa4.graph import Graph
from dpa4.output import new_figure, save_figure, write_csv, write_json
from dpa4.potential import Potential, expand_energy, fingerprint_of
from dpa4.progress import ProgressBar
from dpa4.simulation.clusters import cluster_graph
from dpa4.simulation.runs.store import Records
from dpa4.system import own_settings, stop_requests, user_path

COMPUTED = ("energy", "force", "curvature")
COLUMNS = ("pair", "distance_A", "energy_eV", "force_eV_per_A", "curvature_eV_per_A2")
FORCE_FLOOR = 0.01  # eV/Angstrom; smaller forces count as zero
WALL = 1.0  # eV; least energy of a repulsive wall at the shortest distance
SPIKE = 0.1  # eV; largest excess variation without a flag
# Largest mismatch of energy and force without a flag: eV, plus a fraction of the change of energy.
JUMP, JUMP_SHARE = 0.005, 0.02
PHYSICAL = 12.0  # eV; largest energy in figures, above and below the separated atoms (carbon monoxide: 11.2)
ADVICE = {
    "not finite": "The model computes no number there. Do not use it; look for weights that are not finite with dpa4 "
    "check.",
    "no wall": "Atoms may fall into each other. Train with model.bridging: auto (the default), which adds the "
    "repulsion of nuclei, or add structures with close contacts to the training data.",
    "several wells": "Usual if the training data contain the elements in molecules and crystals only. If two such "
    "atoms meet alone in your simulations (reactions, gases, sputtering), add isolated pairs and stretched bonds to "
    "the training data.",
    "spike": "The energy has a barrier that a bond of two atoms lacks. The same remedy as for several wells; inside "
    "molecules, add structures with this pair at the distance of the barrier.",
    "jump": "Energy and force contradict each other, so dynamics heats up or cools down. Compute the pair again with "
    "--dtype float64. If the flag disappears, it was rounding; if it stays, run no dynamics with the model.",
}
PER_PAGE = 12  # pairs per figure
CPU_EDGES, GPU_EDGES = 256, 8192  # per batch; larger batches exceed the caches of a CPU

Array = NDArray[np.float64]


class Curve(Protocol):
    """Energy, force and curvature of atoms along a line, with a name; fields as in ``PairCurve``."""

    @property
    def name(self) -> str: ...
    @property
    def distance(self) -> Array: ...
    @property
    def energy(self) -> Array: ...
    @property
    def force(self) -> Array: ...
    @property
    def curvature(self) -> Array: ...


@dataclass(frozen=True)
class PairCurve:
    """Energy, force and curvature of two isolated atoms at n distances.

    Attributes:
        pair: Chemical symbols of the atoms.
        distance: Distances (n,), in Angstrom, ascending.
        energy: Energies (n,) relative to the separated atoms, in eV.
        force: Forces -dE/dr (n,), in eV/Angstrom; positive forces are repulsive.
        curvature: Second derivatives d2E/dr2 (n,), in eV/Angstrom^2.
    """

    pair: ElementPair
    distance: Array
    energy: Array
    force: Array
    curvature: Array

    @property
    def name(self) -> str:
        """Name of the pair, such as "Si-O"."""
        return "-".join(self.pair)


@dataclass(frozen=True)
class Diagnosis:
    """Measures of the shape of a pair curve, which should be a repulsive wall with at most one well.

    All numbers are None if the curve is not finite.

    Attributes:
        pair: Name of the pair, such as "Si-O".
        minimum: Distance of lowest energy, in Angstrom.
        depth: Depth of the minimum below the separated atoms, in eV.
        force_flips: Number of sign changes of the force, ignoring forces below 0.01 eV/Angstrom; 1 for a single well.
        excess_variation: Sum of |dE| between neighbouring points minus that of a single well, in eV.
        largest_jump: Largest difference between the change of energy and minus the integral of the force over one
            step, in eV.
        flags: Names of the problems found: "not finite"; "no wall" (at the shortest distance the force is not
            repulsive or the energy is below 1 eV); "several wells" (more than one sign change of the force); "spike"
            (excess variation above 0.1 eV); "jump" (energy and force disagree by more than 5 meV plus 2 % of the
            change of energy).
    """

    pair: str
    minimum: float | None
    depth: float | None
    force_flips: int | None
    excess_variation: float | None
    largest_jump: float | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class PairScan:
    """Pair curves of several pairs and their diagnoses.

    Attributes:
        curves: Pair curves, in the order of the pairs.
        diagnoses: Diagnosis of each curve.
        finished: False after an interruption.
    """

    curves: list[PairCurve]
    diagnoses: list[Diagnosis]
    finished: bool

    @property
    def flagged(self) -> list[Diagnosis]:
        """Diagnoses with at least one flag."""
        return [d for d in self.diagnoses if d.flags]


def element_pairs(potential: Potential) -> list[ElementPair]:
    """List every pair of elements of a potential, except excluded pairs."""
    excluded = {frozenset(pair) for pair in potential.config.excluded_pairs}
    pairs = combinations_with_replacement(potential.elements, 2)
    return [pair for pair in pairs if frozenset(pair) not in excluded]


def parse_pairs(text: str) -> list[ElementPair]:
    """Parse pairs of elements from text such as "Si-O,O-O".

    Raises:
        ValueError: If an entry is not two elements joined by a hyphen.
    """
    pairs = []
    for entry in text.split(","):
        first, _, second = entry.strip().partition("-")
        if unknown := [e for e in (first, second) if e not in atomic_numbers or e == "X"]:
            raise ValueError(
                f"pairs are written as Si-O,O-O; {unknown[0]!r} in {entry.strip()!r} is not an element"
            )
        pairs.append((first, second))
    return pairs


def pair_curves(
    potential: Potential,
    pairs: Sequence[ElementPair] | None = None,
    *,
    start: float = 0.2,
    step: float = 0.02,
) -> Iterator[PairCurve]:
    """Compute energy, force and curvature of isolated pairs of atoms.

    Force and curvature are exact derivatives of the energy, by automatic differentiation. Batches may contain several
    pairs and are halved if they exceed the memory of a GPU. A model conditioned on charge and spin gets its default
    values, or, without a default, a neutral pair with the lowest multiplicity that its number of electrons allows.

    Args:
        potential: Potential, not compiled, on the device for the computation.
        pairs: Pairs of elements; None selects all pairs of the potential.
        start: Shortest distance, in Angstrom. The longest distance is the cutoff.
        step: Largest spacing of the distances, in Angstrom. The actual spacing is slightly smaller, so that the last
            point is at the cutoff.

    Returns:
        Iterator over the curves, one per pair, in order.

    Raises:
        ValueError: If an element is not in the potential, a pair is excluded from it, or ``start`` or ``step`` does
            not fit below the cutoff.
    """
    distances = _distances(potential, pairs, start, step)
    return _curves(potential, element_pairs(potential) if pairs is None else pairs, distances)


def diagnose(curve: Curve) -> Diagnosis:
    """Measure the shape of a pair curve and flag problems."""
    r, e, f, k = curve.distance, curve.energy, curve.force, curve.curvature
    if not (np.isfinite(e).all() and np.isfinite(f).all() and np.isfinite(k).all()):
        return Diagnosis(curve.name, None, None, None, None, None, ("not finite",))
    directions = np.sign(f[np.abs(f) > FORCE_FLOOR])
    flips = int((directions[1:] != directions[:-1]).sum())
    lowest, change = int(e.argmin()), np.diff(e)
    excess = float(np.abs(change).sum() - (e[0] - e[lowest]) - (e[-1] - e[lowest]))
    jumps, allowed = mismatch(r, e, f, k)
    flags = {
        "no wall": f[0] < FORCE_FLOOR or e[0] < WALL,
        "several wells": flips > 1,
        "spike": excess > SPIKE,
        "jump": bool((jumps > allowed).any()),
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


def mismatch(distance: Array, energy: Array, force: Array, curvature: Array) -> tuple[Array, Array]:
    """Mismatch of energy and force in every step of a curve, and its tolerance; both (n - 1,) in eV."""
    change, h = np.diff(energy), np.diff(distance)
    # Trapezoidal rule with end correction. It is exact for cubic forces, so a steep wall does not count as a jump.
    integral = h * (force[1:] + force[:-1]) / 2 + h**2 * (curvature[1:] - curvature[:-1]) / 12
    return np.abs(change + integral), JUMP + JUMP_SHARE * np.abs(change)


def scan_pairs(
    potential: Potential,
    output: str | Path,
    pairs: Sequence[ElementPair] | None = None,
    *,
    start: float = 0.2,
    step: float = 0.02,
    progress: bool = True,
) -> PairScan:
    """Compute pair curves, diagnose them and write tables and figures.

    Force and curvature are exact derivatives of the energy. Files written to ``output``, which replace earlier ones:

    * pairs.csv: one row per pair and distance.
    * pairs.json: the fields of ``Diagnosis`` for each pair.
    * pairs-01.png, ...: figures of 12 pairs each. The titles of flagged pairs are red.
    * pairs.jsonl and settings.json: finished curves, model and distances.

    Ctrl-C ends the scan after the current pair, and the files are written. A later call with the same model and
    distances reuses the curves in the folder; its pairs may differ.

    Args:
        potential: Potential, not compiled, on the device for the computation.
        output: Output folder, created if absent.
        pairs: Pairs of elements; None selects all pairs of the potential.
        start: Shortest distance, in Angstrom. The longest distance is the cutoff.
        step: Largest spacing of the distances, in Angstrom. The actual spacing is slightly smaller, so that the last
            point is at the cutoff.
        progress: Show the progress.

    Returns:
        Curves and diagnoses.

    Raises:
        BlockingIOError: If another process is working in ``output``.
        ValueError: If an element is not in the potential, a pair is excluded from it, ``start`` or ``step`` does not
            fit below the cutoff, or the folder holds curves of another model or of other distances.

    Example:
        Pairs with problems:

            scan = scan_pairs(load_potential("run/best.safetensors"), "pairs", [("Si", "O"), ("O", "O")])
            for diagnosis in scan.flagged:
                print(diagnosis.pair, diagnosis.flags)
    """
    distances = _distances(potential, pairs, start, step)
    requested = {"-".join(pair): pair for pair in (element_pairs(potential) if pairs is None else pairs)}
    # "dimer" was the name of the command; folders of earlier versions have it.
    settings = {"task": "dimer", **fingerprint_of(potential), "start": float(start), "step": float(step)}
    folder = user_path(output)
    with Records(folder, settings, "pairs") as records, stop_requests() as stopped:
        missing = [pair for name, pair in requested.items() if name not in records.done]
        with ProgressBar("pair", len(requested), len(requested) - len(missing), progress) as bar:
            for curve in _curves(potential, missing, distances):
                records.append({"id": curve.name} | {name: getattr(curve, name) for name in COMPUTED})
                bar.update(bar.task_ids[0], advance=1, status=curve.name)
                if stopped:
                    break
        kept = [(pair, records[name]) for name, pair in requested.items() if name in records.done]
    curves = [
        PairCurve(pair, distances, *(np.array(record[name]) for name in COMPUTED)) for pair, record in kept
    ]
    scan = PairScan(curves, [diagnose(curve) for curve in curves], len(curves) == len(requested))
    write_csv(folder / "pairs.csv", COLUMNS, _rows(curves))
    content = {"finished": scan.finished, "pairs": [asdict(d) for d in scan.diagnoses]}
    write_json(folder / "pairs.json", content)
    for old in folder.glob("pairs-*.png"):
        old.unlink()
    pages = range(0, len(curves), PER_PAGE)
    with ProgressBar("figure", len(pages), show=progress and len(pages) > 1) as bar:
        for number, first in enumerate(pages, start=1):
            figure = draw_pairs(curves[first : first + PER_PAGE], scan.diagnoses[first : first + PER_PAGE])
            save_figure(figure, folder / f"pairs-{number:02d}.png", dpi=110)
            bar.advance(bar.task_ids[0])
    return scan


def draw_pairs(curves: Sequence[PairCurve], diagnoses: Iterable[Diagnosis]) -> Any:
    """Draw energy, force and curvature of up to 12 pairs as a matplotlib figure, where the energy is physical."""
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(3.2 * columns, 3.6 * rows)
    grid = figure.add_gridspec(rows, columns)
    for number, (curve, diagnosis) in enumerate(zip(curves, diagnoses, strict=True)):
        panel = grid[divmod(number, columns)].subgridspec(3, 1, height_ratios=[2, 1, 1])
        axes: Any = panel.subplots(sharex=True)
        shown = _physical(curve)
        lines = (("E (eV)", curve.energy), ("F (eV/Å)", curve.force), ("k (eV/Å²)", curve.curvature))
        for axis, (label, values) in zip(axes, lines, strict=True):
            axis.axhline(0, color="0.6", linewidth=0.8)
            axis.plot(curve.distance, values, linewidth=1.2)
            visible = values[shown & np.isfinite(values)]
            if values is curve.energy and (values < -PHYSICAL).any():  # a hole, which has to be seen
                visible = np.append(visible, -PHYSICAL)
            if visible.size:
                margin = 0.08 * max(float(np.ptp(visible)), 1e-2)
                axis.set_ylim(visible.min() - margin, visible.max() + margin)
            axis.set_ylabel(label, fontsize=7)
            axis.tick_params(labelsize=7)
            # A common factor or offset of the numbers would be written over the panel above.
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
        axes[-1].set_xlabel("distance (Å)", fontsize=7)
        title = ": ".join(filter(None, (curve.name, ", ".join(diagnosis.flags))))
        axes[0].set_title(title, fontsize=8, color="tab:red" if diagnosis.flags else "black")
    return figure


def _physical(curve: PairCurve) -> NDArray[np.bool_]:
    """Select the points (n,) to show.

    These are points with an energy of at most twice the depth of the well, or 3 eV if that is more, above the
    separated atoms, and of at most ``PHYSICAL`` above and below them: no bond of two atoms is as strong.
    """
    finite = curve.energy[np.isfinite(curve.energy)]
    depth = -float(finite.min(initial=0.0))
    return (curve.energy <= min(max(3.0, 2 * depth), PHYSICAL)) & (curve.energy >= -PHYSICAL)


def _rows(curves: Iterable[PairCurve]) -> Iterator[dict[str, str]]:
    """Yield the rows of pairs.csv."""
    for curve in curves:
        columns = (curve.distance, curve.energy, curve.force, curve.curvature)
        for values in zip(*columns, strict=True):
            yield dict(zip(COLUMNS, (curve.name, *(f"{x:.9g}" for x in values)), strict=True))


def _distances(potential: Potential, pairs: Iterable[ElementPair] | None, start: float, step: float) -> Array:
    """Check the arguments and return the distances of every curve, in Angstrom.

    Raises:
        ValueError: If an argument is not allowed.
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
                f"the model has no pair {'-'.join(pair)}; its elements are {', '.join(potential.elements)}"
            )
    return np.linspace(start, cutoff, round(np.ceil((cutoff - start) / step - 1e-9)) + 1)


def _curves(potential: Potential, pairs: Sequence[ElementPair], distances: Array) -> Iterator[PairCurve]:
    """Yield the curves one after another.

    A batch may contain a part of a curve or the points of several curves. ``values`` holds the points of curves that
    are not complete yet.
    """
    size = (GPU_EDGES if potential.device.type == "cuda" else CPU_EDGES) // 2
    numbers = np.array([[atomic_numbers[element] for element in pair] for pair in pairs])
    count, begun = len(distances), 0
    values = np.empty((0, 3))
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
    """Build the graph of S isolated pairs of atoms along x, on the device of the potential.

    Args:
        potential: Source of cutoff, default charge and spin, and device.
        numbers: Atomic numbers (S, 2).
        distances: Distances (S,), in Angstrom.
    """
    positions = np.zeros((len(numbers), 2, 3))
    positions[:, 1, 0] = distances
    return cluster_graph(potential, numbers, positions)


@own_settings
def _evaluate(potential: Potential, graph: Graph) -> Array:
    """Energy, force and curvature (S, 3) of S pairs of atoms along x."""
    outward = torch.zeros_like(graph.positions)
    # Moving the second atom along x changes the distance: the Hessian-vector product is the second derivative.
    outward[1::2, 0] = 1.0
    energy, forces, product = expand_energy(potential, graph, outward)
    return torch.stack([energy, forces[1::2, 0], product[1::2, 0]], dim=1).cpu().numpy()
