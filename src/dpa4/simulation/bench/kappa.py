"""Lattice thermal conductivities, a task of Matbench Discovery: phono3py, Wigner transport, SRME."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from numpy.typing import NDArray

from dpa4.simulation.bench import files
from dpa4.simulation.bench.discovery import read_structures
from dpa4.simulation.bench.metrics import FAILED_SRME, mean_with_failures, sre, srme
from dpa4.simulation.calculator import identify_calculator
from dpa4.simulation.records import (
    Interrupted,
    Progressed,
    Record,
    Records,
    read_settings,
    run_items,
    write_csv,
    write_json,
)
from dpa4.system import new_figure, require, save_figure

Array = NDArray[np.float64]

TEMPERATURE = 300.0  # K
SYMPREC = 1e-5  # of the space groups and of phono3py
RELAX_SYMPREC = 1e-2  # of the symmetry that the relaxation keeps
BOUNDARY_MFP = 1e6  # micrometres
GAMMA_THRESHOLD = -0.01  # THz; acoustic frequencies at q = 0 may be as low as that
COLUMNS = ("material_id", "formula", "kappa", "kappa_dft", "SRME", "SRE", "reason")


@dataclass(frozen=True)
class ReferenceKappa:
    """Conductivity of a crystal by DFT."""

    kappa: float  # mean of the diagonal, W/(m K)
    mode_kappa: Array  # (Q, S) contributions of the modes to it, with the weights of the q-points
    q_points: Array | None  # (Q, 3)


@dataclass(frozen=True)
class KappaScore:
    """Metrics of the leaderboard, means over all materials of the reference."""

    kappa_SRME: float
    kappa_SRE: float
    materials: int
    failed: int  # that count as 2: no result, imaginary frequencies or a symmetry that broke
    missing: int  # of these, not computed yet


def relax_symmetric(
    atoms: Atoms, calculator: Calculator, *, fmax: float, steps: int, stopped: Sequence[int] = ()
) -> int:
    """Relax positions and cell in place with FIRE while the symmetry is kept and the cell does not tilt.

    Args:
        atoms: Start; ends as the relaxed structure.
        calculator: ASE calculator.
        fmax: Largest force, eV/Angstrom.
        steps: Most steps.
        stopped: A list that is not empty after Ctrl-C.

    Returns:
        Number of steps.

    Raises:
        Interrupted: After Ctrl-C.
    """
    atoms.calc = calculator
    atoms.set_constraint(FixSymmetry(atoms, symprec=RELAX_SYMPREC))
    engine = FIRE(FrechetCellFilter(atoms, mask=[True, True, True, False, False, False]), logfile=None)
    for _ in engine.irun(fmax=fmax, steps=steps):
        if stopped:
            raise Interrupted
    atoms.set_constraint()
    atoms.calc = None
    return engine.get_number_of_steps()


def conductivity(
    atoms: Atoms,
    calculator: Calculator,
    *,
    fc2_supercell: NDArray[np.int64],
    fc3_supercell: NDArray[np.int64],
    mesh: Sequence[int],
    displacement: float = 0.03,
    stopped: Sequence[int] = (),
) -> Record:
    """Conductivity at 300 K by phono3py: Wigner transport in the relaxation time approximation.

    Force constants of second and third order come from finite displacements; isotopes scatter. The transport is
    "SMM19" of phono3py 4. Of the contribution of a pair of bands, each gets a share as in Matbench Discovery:

        kappa_s = sum_s' 2 kappa_{s's} C_s' / (C_s + C_s'), with the heat capacities C of the modes.

    Args:
        atoms: Relaxed crystal.
        calculator: ASE calculator.
        fc2_supercell: (3,) or (3, 3) supercell for the second order.
        fc3_supercell: The same for the third order.
        mesh: Numbers of q-points.
        displacement: In Angstrom.
        stopped: A list that is not empty after Ctrl-C.

    Returns:
        ``has_imag_ph_modes``. Unless that is true, in W/(m K) and as xx, yy, zz, yz, xz, xy: ``kappa_tot_rta``
        (1, 6), its parts ``kappa_p_rta`` within bands and ``kappa_c`` between them, and ``mode_kappa_tot_rta``
        (1, Q, S, 6) with the ``mode_weights`` (Q,) of the ``q_points`` (Q, 3) in it; ``ph_freqs`` (Q, S) in THz.

    Raises:
        ImportError: If phono3py is not installed.
        Interrupted: After Ctrl-C.
    """
    phonons = _phono3py(atoms, fc2_supercell, fc3_supercell, mesh, displacement)
    phonons.phonon_forces = _forces(phonons.phonon_supercells_with_displacements, calculator, stopped)
    phonons.produce_fc2()
    phonons.symmetrize_fc2()
    phonons.init_phph_interaction()
    phonons.run_phonon_solver()
    if imaginary(phonons.get_phonon_data()[0]):
        return {"has_imag_ph_modes": True}
    phonons.forces = _forces(phonons.supercells_with_displacements, calculator, stopped)
    phonons.produce_fc3()
    phonons.symmetrize_fc3()
    phonons.init_phph_interaction()
    phonons.run_thermal_conductivity(
        temperatures=[TEMPERATURE], is_isotope=True, transport_type="SMM19", boundary_mfp=BOUNDARY_MFP
    )
    found = phonons.thermal_conductivity
    return {
        "has_imag_ph_modes": False,
        "kappa_tot_rta": found.kappa[0],
        "kappa_p_rta": found.kappa_intra[0],
        "kappa_c": found.kappa_inter[0],
        "mode_kappa_tot_rta": shares(found.mode_kappa_matrix[0], found.mode_heat_capacities),
        "mode_weights": found.grid_weights,
        "q_points": found.qpoints,
        "ph_freqs": found.frequencies,
    }


def imaginary(frequencies: Array) -> bool:
    """Whether a mode is imaginary.

    Args:
        frequencies: (Q, S) in THz, ascending with the bands, negative where imaginary, q = 0 first. Of its three
            acoustic modes down to -0.01 THz are forgiven.
    """
    if np.isnan(frequencies).any():
        return True
    limit = np.zeros_like(frequencies)
    limit[0, :3] = GAMMA_THRESHOLD
    return bool((frequencies < limit).any())


def shares(pairs: Array, heat_capacity: Array) -> Array:
    """Contributions of modes from those of pairs, see ``conductivity``; their sum stays the same.

    Args:
        pairs: (T, Q, S, S, 6) of pairs of bands, symmetric in these.
        heat_capacity: (T, Q, S) of the modes.

    Returns:
        (T, Q, S, 6)
    """
    both = heat_capacity[..., :, None] + heat_capacity[..., None, :]
    fraction = np.divide(2 * heat_capacity[..., :, None], both, out=np.zeros_like(both), where=both > 0)
    return np.einsum("tqsuc,tqsu->tquc", pairs, fraction)


def read_reference(path: Path) -> dict[str, ReferenceKappa]:
    """Conductivities of DFT at 300 K by the name of the material.

    Reads the file of Matbench Discovery and that of arXiv:2408.00755: a table as JSON, by columns or by rows.

    Raises:
        ValueError: If a column is missing.
    """
    table = files.read_json(path)
    if isinstance(table, dict):
        table = [
            {name: column.get(row) for name, column in table.items()} for row in next(iter(table.values()))
        ]
    return {
        str(_column(row, path, "material_id", "mp_id")): ReferenceKappa(
            kappa=float(np.ravel(_column(row, path, "kappa_tot_avg", "kappa_TOT_ave"))[0]),
            mode_kappa=np.array(_column(row, path, "mode_kappa_tot_avg", "mode_kappa_TOT_ave"), dtype=float)[
                0
            ],
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
) -> Progressed:
    """Conductivities of the crystals of a file.

    Keeps the result of every crystal in ``output``/results.jsonl as it comes; the same call goes on after an
    interruption and tries failed crystals again.

    Args:
        structures: Extended XYZ with ``material_id`` or ``mp_id``, ``fc2_supercell``, ``fc3_supercell`` and
            ``q_point_mesh`` or ``q_mesh`` of every crystal.
        calculator: ASE calculator.
        output: Folder, made if absent.
        fmax: Of the relaxation, eV/Angstrom.
        steps: Most steps of the relaxation.
        displacement: Of atoms, in Angstrom.
        model: Name of the model, if it is none of dpa4; a folder of results of another model is refused.
        progress: Show a progress bar on a terminal.

    Raises:
        ImportError: If phono3py or spglib is not installed.
        ValueError: If an argument is not allowed, the file lacks an entry, or the folder holds results of
            other settings.
    """
    for module in ("phono3py", "spglib"):
        require(module, "bench")
    for name, value in (("fmax", fmax), ("displacement", displacement)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    settings = {
        "task": "kappa", "model": model, **identify_calculator(calculator),
        "max_force": float(fmax), "max_steps": steps,
        "displacement_distance": float(displacement),
    }  # fmt: skip
    total, images = read_structures(structures)
    crystals = [_crystal(number, atoms, structures) for number, (_, atoms) in enumerate(images)]

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

    with Records(Path(output), settings) as records:
        return run_items(crystals, total, compute, records, title="conductivities", progress=progress)


def space_group(atoms: Atoms) -> int:
    """Number of the space group."""
    dataset = require("spglib", "bench").get_symmetry_dataset(
        (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers), symprec=SYMPREC
    )
    if dataset is None:
        raise ValueError("no space group was found")
    return int(dataset.number)


def score_kappa(output: str | Path, reference: Mapping[str, ReferenceKappa]) -> KappaScore:
    """Compare the conductivities of a folder with those of DFT.

    Writes kappa.csv, summary.json and kappa.png into it.

    Args:
        output: Folder of ``run_kappa``.
        reference: All materials that count; one without a result is a failure.

    Raises:
        ValueError: If modes are not those of the reference, so that they cannot be compared.
    """
    folder = Path(output)
    with Records(folder, read_settings(folder)) as records:
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
    )
    write_csv(folder / "kappa.csv", COLUMNS, rows)
    write_json(folder / "summary.json", asdict(score))
    _plot(rows, folder / "kappa.png")
    return score


def _compare(name: str, dft: ReferenceKappa, record: Record | None) -> Record:
    """A line of kappa.csv."""
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
    else:
        kappa = float(np.mean(record["kappa_tot_rta"][0][:3]))
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
    """Where the q-points of the reference are in our list, up to reciprocal lattice vectors."""
    difference = q_points[:, None] - reference[None]
    same = (np.abs(difference - difference.round()) < 1e-4).all(axis=-1)
    if not ((same.sum(axis=0) == 1).all() and (same.sum(axis=1) == 1).all()):
        raise ValueError(
            f"the q-points of {name} are not those of the reference; they depend on the mesh and, maybe, on the "
            "version of phono3py"
        )
    return same.argmax(axis=0)


def _crystal(number: int, atoms: Atoms, path: Path) -> tuple[str, tuple[Atoms, dict[str, Any]]]:
    """Name, structure and settings of phono3py from a structure of the file."""

    def entry(*names: str) -> Any:
        return _column(atoms.info, f"{path}, structure {number},", *names)

    cells = {
        "fc2_supercell": np.array(entry("fc2_supercell"), dtype=int),
        "fc3_supercell": np.array(entry("fc3_supercell"), dtype=int),
        "mesh": np.array(entry("q_point_mesh", "q_mesh"), dtype=int).ravel().tolist(),
    }
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    return str(entry("material_id", "mp_id")), (bare, cells)


def _column(row: Mapping[str, Any], origin: Path | str, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{origin} lacks {' or '.join(names)}; it has {', '.join(map(str, row))}")


def _phono3py(
    atoms: Atoms,
    fc2_supercell: NDArray[np.int64],
    fc3_supercell: NDArray[np.int64],
    mesh: Sequence[int],
    displacement: float,
) -> Any:
    """The object of phono3py with its displacements."""
    phonopy_atoms = require("phonopy.structure.atoms", "bench").PhonopyAtoms
    phono3py = require("phono3py", "bench").Phono3py
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the primitive cell is found automatically, which is wanted
        phonons = phono3py(
            phonopy_atoms(
                symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array, positions=atoms.positions
            ),
            supercell_matrix=fc3_supercell,
            phonon_supercell_matrix=fc2_supercell,
            primitive_matrix="auto",
            symprec=SYMPREC,
        )
    phonons.mesh_numbers = list(mesh)
    phonons.generate_displacements(distance=displacement)
    return phonons


def _forces(supercells: Sequence[Any], calculator: Calculator, stopped: Sequence[int]) -> Array:
    """(D, N, 3) forces in displaced supercells, eV/Angstrom."""
    forces = []
    for cell in supercells:
        if stopped:
            raise Interrupted
        atoms = Atoms(cell.symbols, cell.positions, cell=cell.cell, pbc=True)
        atoms.calc = calculator
        forces.append(atoms.get_forces())
    return np.array(forces)


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
