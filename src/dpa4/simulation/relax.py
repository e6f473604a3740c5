"""Relaxation of positions and, optionally, of the cell with ASE's optimizers."""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from ase.spacegroup.symmetrize import symmetrize_rank2

from dpa4.data import write_structures
from dpa4.interfaces.ase import fingerprint_of_calculator, labelled
from dpa4.messages import not_allowed
from dpa4.output import CsvLog, already_there, check_start, cut_back, flush_to_disk, save_figure
from dpa4.parsing import first_line
from dpa4.progress import ProgressBar
from dpa4.simulation.figures import draw_relaxations
from dpa4.simulation.runs.store import Record, Records
from dpa4.system import require, stop_requests, user_path

CellChange = Literal["fixed", "full", "volume", "shape", "xy", "z"]

OPTIMIZERS = {"fire": FIRE, "bfgs": BFGS, "lbfgs": LBFGS}
# Options of ASE's FrechetCellFilter; a mask selects the strains xx, yy, zz, yz, xz, xy.
CELLS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "full": {},
    "volume": {"hydrostatic_strain": True},
    "shape": {"constant_volume": True},
    "xy": {"mask": [True, True, False, False, False, True]},
    "z": {"mask": [False, False, True, False, False, False]},
}

FMAX = 0.02  # eV/Angstrom


@dataclass(frozen=True)
class Relaxation:
    """Result of a relaxation.

    Attributes:
        converged: True if the forces (and the virial, if the cell changes) are below fmax.
        interrupted: True after Ctrl-C.
        steps: Number of steps of the optimizer.
        initial_energy: Energy of the initial structure, in eV.
        energy: Energy of the final structure, in eV.
        max_force: Largest force on an atom, in eV/Angstrom.
        volume: Volume of the cell, in Angstrom^3. None unless the structure is periodic along all three axes.
        pressure: -trace(stress) / 3, in GPa. None if there is no stress.
        failure: Reason why `relax_all` could not relax the structure; energies and force are then NaN. Else empty.
    """

    converged: bool
    interrupted: bool
    steps: int
    initial_energy: float
    energy: float
    max_force: float
    volume: float | None
    pressure: float | None
    failure: str = ""


NOT_RELAXED = Relaxation(False, False, 0, math.nan, math.nan, math.nan, None, None)
NUMBER = "relax_structure"  # key in the info of a relaxed structure, for its number
COLUMNS = ("structure", "formula", *(field.name for field in fields(Relaxation)))
STEP_COLUMNS = ("structure", "step", "atoms", "energy", "max_force")
STORED = tuple(field.name for field in fields(Relaxation) if field.name != "failure")


def relax(
    atoms: Atoms,
    calculator: Calculator,
    *,
    fmax: float = FMAX,
    steps: int = 500,
    optimizer: Literal["fire", "bfgs", "lbfgs"] = "fire",
    cell: CellChange = "fixed",
    pressure: float = 0.0,
    symmetry: bool = False,
    symprec: float = 0.01,
    trajectory: str | Path | None = None,
    watch: Callable[[str], None] | None = None,
) -> Relaxation:
    """Relax a structure in place.

    Constraints are respected, and momenta do not change. Ctrl-C ends the relaxation after the current step and leaves
    the structure as it is then.

    Args:
        atoms: Initial structure; becomes the relaxed structure, with the calculator attached.
        calculator: ASE calculator.
        fmax: Convergence threshold for the largest force on an atom, in eV/Angstrom. If the cell changes, forces are
            measured in the frame of the initial cell. The rows of the virial per atom (in eV), minus the contribution
            of the pressure, must then be below fmax as well.
        steps: Maximum number of optimizer steps.
        optimizer: "fire" (robust), "bfgs" (few steps, for small structures) or "lbfgs".
        cell: Cell degrees of freedom to relax, with ASE's Frechet cell filter: none ("fixed"); all lengths and
            angles ("full"); the volume at constant shape ("volume"); the shape at constant volume ("shape"); lengths
            and angle in the xy plane, for layers ("xy"); or the length along z, for films on a substrate ("z").
        pressure: External pressure, in GPa. Needs a choice of ``cell`` that changes the volume.
        symmetry: Preserve the space group found by spglib. The initial structure is symmetrized first.
        symprec: Symmetry tolerance: largest distance of an atom from its symmetric position, in Angstrom.
        trajectory: Extended XYZ file to which the structure of every step is written.
        watch: Function called with a line of text after every step.

    Returns:
        Energies, largest force, volume and pressure, and whether the relaxation converged.

    Raises:
        ImportError: If ``symmetry`` is set and spglib is not installed.
        ValueError: If an argument is not allowed, the structure is empty, or the cell is to change and the structure
            is not periodic along all three axes.

    Example:
        Relaxation of positions and cell at 5 GPa:

            result = relax(atoms, DPA4Calculator("run/best.safetensors"), fmax=0.01, cell="full", pressure=5.0)
            print(result.converged, result.energy)  # eV
    """
    if len(atoms) == 0:
        raise ValueError("the structure has no atoms")
    _check_options(fmax, steps, optimizer, cell, pressure, symmetry, symprec)
    check_periodicity(atoms, cell)
    if trajectory is not None:
        trajectory = user_path(trajectory)
        trajectory.unlink(missing_ok=True)
    constraints = atoms.constraints
    if symmetry:
        _keep_symmetry(atoms, cell, symprec)
    atoms.calc = calculator
    initial_energy = float(atoms.get_potential_energy())
    target: Any = atoms
    if cell != "fixed":
        target = FrechetCellFilter(atoms, scalar_pressure=pressure * units.GPa, **CELLS[cell])
    engine = OPTIMIZERS[optimizer](target, logfile=None)
    converged = False
    try:
        with stop_requests() as stopped:
            for below in engine.irun(fmax=fmax, steps=steps):
                converged = bool(below)
                if trajectory is not None:
                    write_structures(trajectory, labelled(atoms), append=True)
                if watch is not None:
                    watch(f"step {engine.get_number_of_steps()}  {_max_force(atoms):.4f} eV/Å")
                if stopped:
                    break
        max_force = _max_force(atoms)
    finally:
        atoms.set_constraint(constraints)
    periodic = bool(atoms.pbc.all())
    with_stress = periodic and "stress" in calculator.implemented_properties
    return Relaxation(
        converged=converged,
        interrupted=bool(stopped),
        steps=engine.get_number_of_steps(),
        initial_energy=initial_energy,
        energy=float(atoms.get_potential_energy()),
        max_force=max_force,
        volume=float(atoms.get_volume()) if periodic else None,
        pressure=float(-atoms.get_stress()[:3].mean() / units.GPa) if with_stress else None,
    )


def relax_all(
    structures: Sequence[Atoms],
    calculator: Calculator,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> list[Relaxation]:
    """Relax structures in place, one after another.

    A structure that cannot be evaluated, for example because the model lacks an element, does not affect the others.

    Files written to ``output``:

    * relaxed.xyz: final structures with energies, forces and, if periodic along all three axes, stress. The entry
      ``relax_structure`` of ``atoms.info`` is the number of the structure.
    * relax.csv: one row per structure with the fields of ``Relaxation``.
    * steps.csv and relax.png: energy and largest force of every step.
    * relax.jsonl and settings.json: finished structures, model and options, for ``resume``.

    Ctrl-C finishes the current step and stops.

    Args:
        structures: Initial structures; become the relaxed structures.
        calculator: ASE calculator.
        output: Output folder, created if absent.
        resume: Continue an earlier call with the same model, options and structures. Finished structures are not
            relaxed again, nor are those that could not be relaxed; an interrupted one continues from where it was.
        overwrite: Replace the results of an earlier call in ``output``.
        progress: Show the progress.
        **options: Options of ``relax`` but ``trajectory`` and ``watch``, applied to every structure.

    Returns:
        Results of all structures whose relaxation began, in order. After Ctrl-C the last result is marked as
        interrupted.

    Raises:
        BlockingIOError: If another process is working in ``output``.
        FileExistsError: If ``output`` already holds relaxations and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is nothing to resume.
        ImportError: If ``symmetry`` is set and spglib is not installed.
        TypeError: If there is no such option.
        ValueError: If an option is not allowed; or if model, options or structures differ from those of the call to
            resume, or a file of it is damaged.
    """
    check_start(resume, overwrite)
    if unknown := [name for name in options if name not in inspect.signature(_check_options).parameters]:
        allowed = ", ".join(inspect.signature(_check_options).parameters)
        raise TypeError(
            f"relax_all has no option {unknown[0]}; its options are {allowed}. Energy and force of every step are in "
            "steps.csv; structures of every step are written by relax, with trajectory"
        )
    _check_options(**options)
    folder = user_path(output)
    relaxed, finished = folder / "relaxed.xyz", folder / "relax.jsonl"
    if resume and not finished.is_file():
        raise FileNotFoundError(f"there is no relaxation to resume in {folder}: {finished} does not exist")
    if finished.is_file() and not (resume or overwrite):
        raise already_there(folder, finished.name)
    settings = {"task": "relax", **fingerprint_of_calculator(calculator), **options}
    with Records(folder, settings, "relax", anew=not resume) as records:
        results = _restored(structures, records, relaxed)
        done, total = len(results), len(structures)
        table = CsvLog(folder / "relax.csv", COLUMNS, done - 1 if resume else None)
        steps = CsvLog(folder / "steps.csv", STEP_COLUMNS, done - 1 if resume else None)
        with closing(table), closing(steps), ProgressBar("structure", total, done, progress) as bar:
            task = bar.task_ids[0]
            for number, atoms in enumerate(structures[done:], start=done):
                count = itertools.count()

                def watch(line: str, atoms: Atoms = atoms, number: int = number, count: Any = count) -> None:
                    bar.update(task, status=line)
                    energy = float(atoms.get_potential_energy())
                    values = (number, next(count), len(atoms), energy, _max_force(atoms))
                    steps.write(dict(zip(STEP_COLUMNS, values, strict=True)))

                result = _relaxed_if_possible(atoms, calculator, watch=watch, **options)
                results.append(result)
                if not result.failure:
                    final = labelled(atoms)
                    final.info = {NUMBER: number} | {k: v for k, v in final.info.items() if k != NUMBER}
                    write_structures(relaxed, final, append=True)
                    flush_to_disk(relaxed)
                row = {"structure": number, "formula": atoms.get_chemical_formula()} | asdict(result)
                table.write(row)
                records.append(_record(number, row, atoms, relaxed))
                if result.interrupted:
                    break
                bar.update(task, completed=number + 1)
    if results:
        save_figure(draw_relaxations(folder, options.get("fmax", FMAX)), folder / "relax.png")
    return results


def _check_options(
    fmax: float = FMAX,
    steps: int = 500,
    optimizer: str = "fire",
    cell: str = "fixed",
    pressure: float = 0.0,
    symmetry: bool = False,
    symprec: float = 0.01,
) -> None:
    """Check the options of `relax` that do not depend on the structure.

    Raises:
        ImportError: If ``symmetry`` is set and spglib is not installed.
        TypeError: If there is no such option.
        ValueError: If an option is not allowed.
    """
    if optimizer not in OPTIMIZERS:
        raise not_allowed("optimizer", optimizer, OPTIMIZERS)
    check_relaxation(fmax, steps, cell, pressure, tuple(CELLS))
    if symmetry:
        require("spglib", "symmetry")
        if not 0 < symprec < np.inf:
            raise ValueError(f"symprec must be a positive distance in Angstrom, got {symprec}")


def _relaxed_if_possible(atoms: Atoms, calculator: Calculator, **options: Any) -> Relaxation:
    """Relax a structure in place; errors of a single structure become part of the result.

    Raises:
        torch.AcceleratorError: If the GPU fails, which affects all further structures.
    """
    try:
        return relax(atoms, calculator, **options)
    except torch.AcceleratorError:
        raise
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return replace(NOT_RELAXED, failure=first_line(error))


def _record(number: int, row: Mapping[str, Any], atoms: Atoms, relaxed: Path) -> Record:
    """Record of a structure whose relaxation has begun; after a failure it has no numbers and counts as done."""
    size = relaxed.stat().st_size if relaxed.is_file() else 0
    record: Record = {"id": str(number), **row, "bytes": size}
    if row["failure"]:  # its energies and positions may be NaN
        return record | dict.fromkeys(("initial_energy", "energy", "max_force"))
    if row["interrupted"]:
        record["error"] = "interrupted"
    return record | {"cell": atoms.cell.array, "positions": atoms.positions}


def _result(record: Record) -> Relaxation:
    """Result in a record, the inverse of `_record`."""
    if failure := record.get("failure"):
        return replace(NOT_RELAXED, failure=failure)
    return Relaxation(**{name: record[name] for name in STORED})


def _restored(structures: Sequence[Atoms], records: Records, relaxed: Path) -> list[Relaxation]:
    """Restore structures and results of an earlier call.

    Each structure whose relaxation began, including an interrupted one, gets its last cell and positions.

    Returns:
        Results of the finished structures.

    Raises:
        ValueError: If the structures differ from those of the earlier call, or a record or the file of relaxed
            structures is damaged.
    """
    expected = [str(number) for number in range(len(records))]
    if list(records.names) != expected or records.done != set(expected[: len(records.done)]):
        raise ValueError(f"{records.path} is damaged: its structures are not 0, 1, ...; start without resume")
    for record, atoms in zip_longest(records, structures[: len(records)]):
        if atoms is None or record.get("formula") != atoms.get_chemical_formula():
            raise ValueError(
                f"the structures are not those of the relaxation to resume in {relaxed.parent}; give the same ones "
                "in the same order"
            )
        _check_record(record, len(atoms), records.path)
        if record.get("failure"):
            continue
        atoms.set_cell(record["cell"])
        atoms.set_positions(record["positions"], apply_constraint=False)
    done = [records[str(number)] for number in range(len(records.done))]
    cut_back(relaxed, done[-1]["bytes"] if done else 0, records.path)
    return [_result(record) for record in done]


def _check_record(record: Record, num_atoms: int, path: Path) -> None:
    """Check that a record can be what `relax_all` wrote.

    Raises:
        ValueError: If an entry is absent or has another type, shape or range.
    """
    failure = record.get("failure", "")
    shapes: dict[str, tuple[int, ...]] = {}
    if not failure:
        shapes = {"cell": (3, 3), "positions": (num_atoms, 3)}
        shapes |= dict.fromkeys(("initial_energy", "energy", "max_force"), ())
    for name, shape in shapes.items():
        try:
            value = np.array(record.get(name), dtype=np.float64)
        except (ValueError, TypeError):
            value = np.array(np.nan)
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(f"{path} is damaged ({name} of structure {record['id']}); start without resume")
    size = record.get("bytes")
    complete = isinstance(failure, str) and all(name in record for name in STORED)
    if not isinstance(size, int) or size < 0 or not complete:
        raise ValueError(f"{path} is damaged (structure {record['id']}); start without resume")


def _max_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max(initial=0.0))


def check_relaxation(fmax: float, steps: int, cell: str, pressure: float, cells: Sequence[str]) -> None:
    """Check the options of a relaxation that do not depend on the structure.

    Args:
        fmax: Threshold of forces, in eV/Angstrom.
        steps: Maximum number of steps.
        cell: Cell degrees of freedom to relax.
        pressure: External pressure, in GPa.
        cells: Allowed choices of ``cell``.

    Raises:
        ValueError: If an option is not allowed.
    """
    if not 0 < fmax < np.inf:
        raise ValueError(f"fmax must be a positive force in eV/Angstrom, got {fmax}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if cell not in cells:
        raise not_allowed("cell", cell, cells)
    if not np.isfinite(pressure):
        raise ValueError(f"pressure must be a number in GPa, got {pressure}")
    if pressure != 0 and cell in ("fixed", "shape"):
        raise ValueError(
            f"pressure = {pressure} GPa has no effect with cell = {cell}, which keeps the volume; use cell = full"
        )


def check_periodicity(atoms: Atoms, cell: str) -> None:
    """Check that a structure is periodic along all three axes if its cell is to change.

    Raises:
        ValueError: If the cell is to change and the structure is not periodic.
    """
    if cell != "fixed" and not atoms.pbc.all():
        raise ValueError(
            f"cell = {cell} needs a cell periodic along all three axes, but pbc is {atoms.pbc.tolist()}"
        )


def _keep_symmetry(atoms: Atoms, cell: str, symprec: float) -> None:
    """Symmetrize a structure and constrain it to its space group.

    Raises:
        ImportError: If spglib is not installed.
        ValueError: If the structure is not periodic or has other constraints, if ``symprec`` is not allowed, or if
            the choice of ``cell`` breaks the symmetry.
    """
    if not atoms.pbc.all():
        raise ValueError(
            f"symmetry needs a cell periodic along all three axes, but pbc is {atoms.pbc.tolist()}"
        )
    if atoms.constraints:
        raise ValueError(
            f"symmetry cannot be combined with {type(atoms.constraints[0]).__name__}; remove the constraint"
        )
    symmetric = FixSymmetry(atoms, symprec=symprec)
    if "mask" in CELLS[cell]:
        allowed = np.diag([1.0, 1.0, 0.0] if cell == "xy" else [0.0, 0.0, 1.0])
        inverse = atoms.cell.reciprocal().T
        if not np.allclose(
            symmetrize_rank2(atoms.cell.array, inverse, allowed, symmetric.rotations), allowed
        ):
            raise ValueError(
                f"cell = {cell} breaks the symmetry of the structure; use another cell or omit symmetry"
            )
    atoms.set_constraint(symmetric)
