"""Diatomics task of Matbench Discovery: curves of homonuclear diatomic molecules and their metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_masses, atomic_numbers, chemical_symbols, covalent_radii, vdw_alvarez
from numpy.typing import NDArray

from dpa4.interfaces.ase import fingerprint_of_calculator
from dpa4.leaderboards import files
from dpa4.leaderboards.diatomics_metrics import (
    Curve,
    combined_diatomics_score,
    curve_metrics,
    energy_diff_flips,
    energy_jump,
    reference_metrics,
    wall_error,
)
from dpa4.output import new_figure, save_figure, write_csv, write_json
from dpa4.simulation.runs.store import Record, Records, RunState, read_settings, run_items
from dpa4.system import user_path

DISTANCES = np.geomspace(0.1, 6.0, 119)  # Angstrom
HEAVIEST = 92
UNSCORED = frozenset({"Po", "At", "Rn", "Fr", "Ra"})  # not in the Materials Project
SCORED = tuple(s for s in chemical_symbols[1 : HEAVIEST + 1] if s not in UNSCORED)  # 87
# Start of a window, in covalent radii: of most metrics, and of the wall, which starts where the DFT curves do.
INNER, INNER_WALL = 0.9, 0.8
LEAST_POINTS = 5
ROUGH_JUMP, ROUGH_FLIPS = 1.5, 3  # eV, turns; a reference that reaches both is not used


@dataclass(frozen=True)
class DiatomicsScore:
    """Means over the scored elements; metrics without a value for any element are absent."""

    metrics: dict[str, float]
    run_time_sec: float
    coverage: float  # fraction of the 87 scored elements that have a curve
    CDS: float  # NaN without a reference
    failed: dict[str, str]  # element -> reason


def homonuclear_curve(
    element: str, calculator: Calculator, distances: NDArray[np.float64] = DISTANCES
) -> Record:
    """Energies and forces of two isolated atoms at given distances along x.

    Args:
        element: Chemical symbol.
        calculator: ASE calculator.
        distances: (R,) ascending, in Angstrom.

    Returns:
        ``distances`` (R,), ``energies`` (R,) in eV and ``forces`` (R, 2, 3) in eV/Angstrom. Points that are not
        finite are omitted if they lie outside the window of the wall, see ``evaluation_window``.

    Raises:
        ValueError: If a point within the window of the wall is not finite.
    """
    energies, forces = [], []
    for distance in distances:
        atoms = Atoms([element, element], positions=[[0, 0, 0], [distance, 0, 0]])
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    energy, force = np.array(energies), np.array(forces)
    finite = np.isfinite(energy) & np.isfinite(force).all(axis=(1, 2))
    low, high = evaluation_window(element, distances[-1], INNER_WALL)
    scored = (distances >= low) & (distances <= high)
    if not finite[scored].all():
        raise ValueError(
            f"energy or forces are not finite at {distances[scored & ~finite].round(3).tolist()} Angstrom"
        )
    return {"distances": distances[finite], "energies": energy[finite], "forces": force[finite]}


def evaluation_window(element: str, largest: float, inner: float = INNER) -> tuple[float, float]:
    """Range of the scored distances, in Angstrom: 0.9 covalent radii to 3.1 van der Waals radii (Alvarez).

    No model has training data at shorter distances, and the wall would dominate every metric. Only the position of
    the wall is scored from 0.8 covalent radii.

    Args:
        element: Chemical symbol.
        largest: Upper limit of the range, in Angstrom.
        inner: Lower end, in covalent radii.
    """
    number = atomic_numbers[element]
    low = inner * covalent_radii[number] - 1e-12  # DFT curves begin at 0.8 covalent radii, up to rounding
    outer = vdw_alvarez.vdw_radii[number]
    return low, min(3.1 * outer, largest) if np.isfinite(outer) else largest


def run_diatomics(
    elements: Sequence[str],
    calculator: Calculator,
    output: str | Path,
    *,
    model: str = "",
    progress: bool = True,
) -> RunState:
    """Compute the curves of elements at 119 distances from 0.1 to 6 Angstrom.

    Every curve is saved in ``output``/results.jsonl at once. After an interruption, the same call continues the run.

    Args:
        elements: Chemical symbols.
        calculator: ASE calculator.
        output: Output folder, created if absent.
        model: Name of a model that is not from dpa4; results of another model in the folder are refused.
        progress: Show a progress bar on a terminal.

    Returns:
        Numbers of finished and failed elements.

    Raises:
        ValueError: If a symbol is not an element from H to U, or the folder holds results of other settings.
    """
    if wrong := [e for e in elements if not 0 < atomic_numbers.get(e, 0) <= HEAVIEST]:
        raise ValueError(f"{wrong[0]!r} is not an element from H to U")
    fingerprint = {"model": model, **fingerprint_of_calculator(calculator)}
    settings = {"task": "diatomics", **fingerprint, "distances": DISTANCES.tolist()}
    with Records(user_path(output), settings) as records:
        return run_items(
            ((e, e) for e in elements),
            len(elements),
            lambda element, _: homonuclear_curve(element, calculator),
            records,
            title="diatomics",
            progress=progress,
        )


def score_diatomics(output: str | Path, reference: Mapping[str, Curve] | None = None) -> DiatomicsScore:
    """Compute the metrics of the curves in a folder.

    Writes curves.csv, metrics.csv, summary.json and diatomics.png into the folder.

    Args:
        output: Folder of ``run_diatomics``.
        reference: DFT curves by element; None omits the metrics that need them.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a curve has fewer than five points in its window.
    """
    folder = user_path(output)
    with Records(folder, read_settings(folder)) as kept:
        records = list(kept)
    curves = {r["id"]: _curve(r) for r in records if "error" not in r}
    failed = {r["id"]: r["error"] for r in records if "error" in r}
    table = {}
    for element, curve in curves.items():
        if element in SCORED:
            table[element] = element_metrics(element, curve, (reference or {}).get(element))
    names = dict.fromkeys(name for metrics in table.values() for name in metrics)
    means = {n: _finite_mean([m[n] for m in table.values() if n in m]) for n in names}
    means = {name: value for name, value in means.items() if np.isfinite(value)}
    seconds = sum(r["seconds"] for r in records)
    coverage = len(table) / len(SCORED)
    score = combined_diatomics_score(means | {"run_time_sec": seconds}, coverage)
    result = DiatomicsScore(means, seconds, coverage, score, failed)
    _write(folder, curves, table, list(names), result)
    _plot(curves, reference or {}, folder / "diatomics.png")
    return result


def element_metrics(element: str, curve: Curve, reference: Curve | None = None) -> dict[str, float]:
    """Metrics of a curve within its window, including the errors relative to a smooth DFT curve.

    A reference whose jumps add up to 1.5 eV or more, with three or more turns, is not used.

    Raises:
        ValueError: If fewer than five points lie in the window.
    """
    window = evaluation_window(element, curve.distances[-1])
    inside = curve.within(window)
    if len(inside.distances) < LEAST_POINTS:
        raise ValueError(
            f"{element} has {len(inside.distances)} points in its window; {LEAST_POINTS} are needed"
        )
    metrics = curve_metrics(inside)
    if reference is None or _rough(element, reference):
        return metrics
    mass = float(atomic_masses[atomic_numbers[element]])
    whole = evaluation_window(element, curve.distances[-1], INNER_WALL)
    wall = wall_error(curve.within(whole), reference.within(whole))
    return metrics | reference_metrics(inside, reference.within(window), mass) | {"pbe_wall_dist_mae": wall}


def _rough(element: str, reference: Curve) -> bool:
    """Return whether a reference jumps between electronic states."""
    energies = reference.within(evaluation_window(element, reference.distances[-1])).energies
    return energy_jump(energies) >= ROUGH_JUMP and energy_diff_flips(energies) >= ROUGH_FLIPS


def read_reference(path: Path, functional: str = "PBE") -> dict[str, Curve]:
    """Read the DFT curves, by element.

    Raises:
        ValueError: If the file is not JSON or lacks the functional.
    """
    table = files.read_json(path)
    if functional not in table:
        raise ValueError(f"{path} has no curves of {functional}; it has {', '.join(table)}")
    return {pair.partition("-")[0]: _curve(curve) for pair, curve in table[functional].items()}


def _curve(record: Mapping[str, list]) -> Curve:
    """Convert a record of a file to a curve; forces are NaN if the record has none."""
    distances = np.array(record["distances"], dtype=float)
    order = np.argsort(distances)
    forces = np.full((len(order), 2, 3), np.nan)
    if record.get("forces"):
        forces = np.array(record["forces"], dtype=float)
    return Curve(distances[order], np.array(record["energies"], dtype=float)[order], forces[order, 0, 0])


def _finite_mean(values: Sequence[float]) -> float:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else float("nan")


def _write(
    folder: Path,
    curves: Mapping[str, Curve],
    table: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    score: DiatomicsScore,
) -> None:
    points = [
        {"element": element, "distance": r, "energy": e, "force": f}
        for element, c in curves.items()
        for r, e, f in zip(c.distances, c.energies, c.forces, strict=True)
    ]
    write_csv(folder / "curves.csv", ("element", "distance", "energy", "force"), points)
    write_csv(
        folder / "metrics.csv", ("element", *names), [{"element": e} | dict(m) for e, m in table.items()]
    )
    write_json(folder / "summary.json", asdict(score))


def _plot(curves: Mapping[str, Curve], reference: Mapping[str, Curve], path: Path) -> None:
    width = min(10, max(1, len(curves)))
    height = max(1, -(-len(curves) // width))
    figure = new_figure(1.6 * width + 1, 1.4 * height + 0.6)
    axes = figure.subplots(height, width, squeeze=False).ravel()
    for axis, (element, curve) in zip(axes, curves.items(), strict=False):
        inside = curve.within(evaluation_window(element, curve.distances[-1]))
        shift = inside.energies[-1]
        axis.plot(inside.distances, inside.energies - shift, linewidth=1)
        lowest = float((inside.energies - shift).min())
        if element in reference:
            dft = reference[element].within(evaluation_window(element, reference[element].distances[-1]))
            axis.plot(dft.distances, dft.energies - dft.energies[-1], "--", color="0.4", linewidth=1)
            lowest = min(lowest, float((dft.energies - dft.energies[-1]).min()))
        axis.set_ylim(1.2 * lowest - 0.1, -1.5 * lowest + 0.5)
        axis.set_title(element, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.grid(alpha=0.3)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    figure.supxlabel("distance (Å)", fontsize=8)
    figure.supylabel("energy (eV)", fontsize=8)
    save_figure(figure, path)
