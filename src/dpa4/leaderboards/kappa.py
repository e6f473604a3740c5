"""Conductivity task of Matbench Discovery: lattice thermal conductivities of many crystals, and their errors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from numpy.typing import NDArray

from dpa4.data import read_atoms
from dpa4.interfaces.ase import fingerprint_of_calculator
from dpa4.leaderboards import files, protocol
from dpa4.leaderboards.conductivity import conductivity, relax_symmetric, space_group
from dpa4.leaderboards.metrics import FAILED_SRME, mean_with_failures, sre, srme
from dpa4.output import new_figure, save_figure, write_csv, write_json
from dpa4.simulation.runs.store import Record, Records, RunState, read_settings, run_items
from dpa4.system import require, user_path

Array = NDArray[np.float64]

COLUMNS = ("material_id", "formula", "kappa", "kappa_dft", "SRME", "SRE", "reason")


@dataclass(frozen=True)
class ReferenceKappa:
    """DFT conductivity of a crystal."""

    kappa: float  # mean of the diagonal, W/(m K)
    mode_kappa: Array  # (Q, S) contributions of the modes, multiplied by the weights of the q-points
    q_points: Array | None  # (Q, 3)


@dataclass(frozen=True)
class KappaScore:
    """Metrics of the leaderboard: means over all materials of the reference."""

    kappa_SRME: float
    kappa_SRE: float
    materials: int
    failed: int  # counted as 2: no result, imaginary frequencies or a changed space group
    missing: int  # not computed yet, included in failed
    differences: tuple[str, ...]  # between the settings and those of the leaderboard's runner


def read_reference(path: Path) -> dict[str, ReferenceKappa]:
    """Read the DFT conductivities at 300 K, by the name of the material.

    Both the file of Matbench Discovery and that of arXiv:2408.00755 are supported: a JSON table, by columns or rows.

    Raises:
        ValueError: If the file is not JSON or lacks a column.
    """
    table = files.read_json(path)
    if isinstance(table, dict):
        table = [
            {name: column.get(row) for name, column in table.items()} for row in next(iter(table.values()))
        ]
    return {
        str(_column(row, path, "material_id", "mp_id")): ReferenceKappa(
            kappa=float(np.ravel(_column(row, path, "kappa_tot_avg", "kappa_TOT_ave"))[0]),
            mode_kappa=np.asarray(
                _column(row, path, "mode_kappa_tot_avg", "mode_kappa_TOT_ave")[0], dtype=float
            ),
            q_points=None if row.get("q_points") is None else np.array(row["q_points"], dtype=float),
        )
        for row in table
    }


def run_kappa(
    structures: Path,
    calculator: Calculator,
    output: str | Path,
    *,
    fmax: float = 1e-4,
    steps: int = 300,
    displacement: float = 0.03,
    model: str = "",
    progress: bool = True,
) -> RunState:
    """Compute the conductivities of the crystals of a file.

    Every result is saved in ``output``/results.jsonl at once. After an interruption, the same call continues the run
    and tries failed crystals again.

    Args:
        structures: Extended XYZ file. Every crystal has ``material_id`` or ``mp_id``, ``fc2_supercell``,
            ``fc3_supercell``, and ``q_point_mesh`` or ``q_mesh``.
        calculator: ASE calculator.
        output: Output folder, created if absent.
        fmax: Largest force of a relaxed crystal, in eV/Angstrom.
        steps: Maximum number of steps of a relaxation.
        displacement: Displacement of atoms for the force constants, in Angstrom.
        model: Name of a model that is not from dpa4; results of another model in the folder are refused.
        progress: Show a progress bar on a terminal.

    Returns:
        Numbers of finished and failed crystals.

    Raises:
        ImportError: If phono3py or spglib is not installed.
        ValueError: If an argument is not allowed, a crystal of the file lacks an entry, or the folder holds results
            of other settings.
    """
    for module in ("phono3py", "spglib"):
        require(module, "bench")
    for name, value in (("fmax", fmax), ("displacement", displacement)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    settings = {
        "task": "kappa", "model": model, **fingerprint_of_calculator(calculator),
        "force_max": float(fmax), "max_steps": steps,
        "displacement_distance": float(displacement),
    }  # fmt: skip
    crystals = [_crystal(origin, atoms) for origin, atoms in read_atoms(structures)]

    def compute(crystal: tuple[Atoms, dict[str, Any]], stopped: list[int]) -> Record:
        atoms, cells = crystal[0].copy(), crystal[1]
        before = space_group(atoms)
        taken = relax_symmetric(atoms, calculator, fmax=fmax, steps=steps, stopped=stopped)
        record: Record = {
            "formula": atoms.get_chemical_formula(),
            "init_spg_num": before,
            "final_spg_num": space_group(atoms),
            "steps": taken,
            "reached_max_steps": taken >= steps,
        }
        if record["init_spg_num"] != record["final_spg_num"]:
            return record
        return record | conductivity(atoms, calculator, **cells, displacement=displacement, stopped=stopped)

    with Records(user_path(output), settings) as records:
        return run_items(crystals, len(crystals), compute, records, title="conductivities", progress=progress)


def score_kappa(output: str | Path, reference: Mapping[str, ReferenceKappa]) -> KappaScore:
    """Compare the conductivities in a folder with DFT.

    Writes kappa.csv, summary.json and kappa.png into the folder.

    Args:
        output: Folder of ``run_kappa``.
        reference: DFT conductivities of all materials to score. A material without a result is a failure.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If the modes of a material differ from the reference and cannot be compared.
    """
    folder = user_path(output)
    settings = read_settings(folder)
    with Records(folder, settings) as records:
        rows = [
            _compare(name, dft, records[name] if name in records else None) for name, dft in reference.items()
        ]
        missing = sum(name not in records for name in reference)
    score = KappaScore(
        kappa_SRME=mean_with_failures([row["SRME"] for row in rows]),
        kappa_SRE=mean_with_failures([row["SRE"] for row in rows]),
        materials=len(rows),
        failed=sum(bool(row["reason"]) for row in rows),
        missing=missing,
        differences=protocol.differences(settings, protocol.KAPPA),
    )
    write_csv(folder / "kappa.csv", COLUMNS, rows)
    write_json(folder / "summary.json", asdict(score))
    _plot(rows, folder / "kappa.png")
    return score


def _compare(name: str, dft: ReferenceKappa, record: Record | None) -> Record:
    """Row of kappa.csv."""
    row: Record = {"material_id": name, "kappa_dft": dft.kappa, "SRME": FAILED_SRME, "SRE": FAILED_SRME}
    row |= {"formula": (record or {}).get("formula"), "kappa": None, "reason": None}
    if record is None:
        row["reason"] = "not computed"
    elif "error" in record:
        row["reason"] = record["error"]
    elif record["init_spg_num"] != record["final_spg_num"]:
        row["reason"] = f"the space group changed from {record['init_spg_num']} to {record['final_spg_num']}"
    elif record["has_imag_ph_modes"]:
        row["reason"] = "imaginary frequencies"
    elif not (kappa := float(np.mean(record["kappa_tot_rta"][0][:3]))) >= 0:  # negative or NaN
        row["reason"] = f"the conductivity is {kappa} W/(m K)"
    else:
        modes = np.array(record["mode_kappa_tot_rta"])[0, ..., :3].mean(axis=-1)
        if dft.q_points is not None:
            modes = modes[_order(np.array(record["q_points"]), dft.q_points, name)]
        weight = float(np.sum(record["mode_weights"]))
        row |= {
            "kappa": kappa,
            "SRME": srme(modes, dft.mode_kappa, weight, kappa, dft.kappa),
            "SRE": sre(kappa, dft.kappa),
        }
    return row


def _order(q_points: Array, reference: Array, name: str) -> NDArray[np.int64]:
    """Index in ``q_points`` of each q-point of the reference; q-points are equal up to reciprocal lattice vectors."""
    difference = q_points[:, None] - reference[None]
    same = (np.abs(difference - difference.round()) < 1e-4).all(axis=-1)
    if not ((same.sum(axis=0) == 1).all() and (same.sum(axis=1) == 1).all()):
        raise ValueError(
            f"the q-points of {name} are not those of the reference; use the same mesh, and check the version of "
            "phono3py, which may matter as well"
        )
    return same.argmax(axis=0)


def _crystal(origin: str, atoms: Atoms) -> tuple[str, tuple[Atoms, dict[str, Any]]]:
    """Name of a crystal of the file, its structure and its settings for phono3py."""

    def entry(*names: str) -> Any:
        return _column(atoms.info, origin, *names)

    cells = {
        "fc2_supercell": np.array(entry("fc2_supercell"), dtype=int),
        "fc3_supercell": np.array(entry("fc3_supercell"), dtype=int),
        "mesh": np.array(entry("q_point_mesh", "q_mesh"), dtype=int).ravel().tolist(),
    }
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    return str(entry("material_id", "mp_id")), (bare, cells)


def _column(row: Mapping[str, Any], origin: Path | str, *names: str) -> Any:
    """Value of the first of these names that is in a row."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{origin} lacks {' or '.join(names)}; it has {', '.join(map(str, row))}")


def _plot(rows: Sequence[Record], path: Path) -> None:
    figure = new_figure(5, 5)
    axis = figure.subplots()
    points = [(row["kappa_dft"], row["kappa"]) for row in rows if row["kappa"]]
    if points:
        axis.loglog(*zip(*points, strict=True), ".")
        axis.axline((1, 1), (10, 10), color="0.5", linewidth=1)
    axis.set_xlabel("conductivity, DFT (W/(m K))")
    axis.set_ylabel("conductivity, predicted (W/(m K))")
    axis.grid(alpha=0.3)
    save_figure(figure, path)
