"""Resumable calculations for one crystal: each finished part is saved at once and reused by a later call."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from dpa4.data.charge_spin import NAMES
from dpa4.interfaces.ase import fingerprint_of_calculator
from dpa4.output import OutputFolder, already_there, check_start, remove_files
from dpa4.simulation.relax import Relaxation, relax
from dpa4.simulation.runs.store import SETTINGS, ItemInterrupted, Record, Records, run_items

T = TypeVar("T")


class Stopped(RuntimeError):
    """Calculation stopped by Ctrl-C; its finished parts are in the output folder, and ``resume`` continues."""


class Calculation:
    """Calculation for one crystal, whose finished parts are saved in a folder.

    Args:
        folder: Output folder, created if absent.
        atoms: Initial crystal.
        calculator: ASE calculator. On ``resume`` it is recognised by the fingerprint of its model or, without a
            fingerprint, by the energy of the initial crystal.
        settings: Everything the parts depend on.
        resume: Reuse the parts in the folder.
        overwrite: Replace the calculation in the folder.
        results: Names of the files with the final results, which ``overwrite`` removes.
        progress: Show the progress.

    Raises:
        FileExistsError: If the folder holds a calculation and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If ``resume`` is set and the folder holds no calculation.
        ValueError: If the structure is not periodic along all three axes, or has constraints.
    """

    def __init__(
        self,
        folder: Path,
        atoms: Atoms,
        calculator: Calculator,
        settings: Record,
        *,
        resume: bool,
        overwrite: bool,
        progress: bool,
        results: Sequence[str],
    ):
        check_start(resume, overwrite)
        if not atoms.pbc.all():
            raise ValueError(
                f"the structure must be periodic along all three axes, but its pbc is {atoms.pbc.tolist()}"
            )
        if atoms.constraints:
            name = type(atoms.constraints[0]).__name__
            raise ValueError(f"the crystal must have no constraints, but has {name}; remove it")
        known = (folder / SETTINGS).exists()
        if known and not (resume or overwrite):
            raise already_there(folder, "a calculation")
        if resume and not known:
            raise FileNotFoundError(f"there is no calculation to resume in {folder}; start it without resume")
        fingerprint: Record = dict(fingerprint_of_calculator(calculator))
        if not fingerprint:  # rounded, because a calculation may be resumed on another machine
            fingerprint = {"energy_eV": round(float(calculator.get_potential_energy(atoms.copy())), 4)}
        if overwrite:
            with OutputFolder(folder):
                remove_files(folder, SETTINGS, "*.jsonl", *results)
        self.settings = settings | {"structure": _identity(atoms)} | fingerprint
        self.folder, self.calculator, self.progress = folder, calculator, progress

    def run(
        self, kind: str, parts: Sequence[tuple[str, T]], compute: Callable[[T], Record], title: str
    ) -> list[Record]:
        """Compute the parts that are not in the folder, and return the results of all parts in their order.

        Args:
            kind: Name of the file with the results, without its ending.
            parts: Name and input of each part.
            compute: Returns the result of a part, which is saved as JSON.
            title: Text beside the progress bar.

        Raises:
            BlockingIOError: If another process is working in the folder.
            RuntimeError: If a part failed; raised once all other parts are done.
            Stopped: After Ctrl-C.
            ValueError: If the folder holds results of other settings.
        """
        with Records(self.folder, self.settings, kind) as records:
            state = run_items(
                parts,
                len(parts),
                lambda part, _: compute(part),
                records,
                title=title,
                progress=self.progress,
            )
            if state.interrupted:
                raise Stopped(f"stopped; {kind}: {state.done} of {len(parts)} done; resume to continue")
            found = [records[name] for name, _ in parts]
        for record in found:
            if "error" in record:
                raise RuntimeError(f"{record['id']}: {record['error']}")
        return found

    def relaxed(self, atoms: Atoms, *, fmax: float, steps: int, symprec: float | None = None) -> Atoms:
        """Relax positions and cell of a copy of a crystal, as the first part of the calculation.

        Args:
            atoms: Crystal. Not modified.
            fmax: Convergence threshold, in eV/Angstrom; see ``relax``.
            steps: Maximum number of steps.
            symprec: Symmetry tolerance, in Angstrom; the symmetry is then preserved. None relaxes without symmetry.

        Raises:
            RuntimeError: If the relaxation does not converge.
            Stopped: After Ctrl-C.
        """
        options: dict[str, Any] = {} if symprec is None else {"symmetry": True, "symprec": symprec}

        def compute(start: Atoms) -> Record:
            copy = start.copy()
            result = relax_part(copy, self.calculator, fmax=fmax, steps=steps, cell="full", **options)
            return structure_record(copy) | asdict(result)

        (record,) = self.run("start", [("start", atoms)], compute, "relaxing")
        return structure(record, atoms)


def relax_part(
    atoms: Atoms, calculator: Calculator, *, fmax: float, steps: int, **options: Any
) -> Relaxation:
    """Relax a structure in place with BFGS, as part of a calculation.

    Raises:
        ItemInterrupted: After Ctrl-C.
        RuntimeError: If the relaxation does not converge.
    """
    result = relax(atoms, calculator, fmax=fmax, steps=steps, optimizer="bfgs", **options)
    if result.interrupted:
        raise ItemInterrupted
    if not result.converged:
        raise RuntimeError(
            f"not relaxed to fmax = {fmax} eV/Angstrom in {steps} steps, the largest force is "
            f"{result.max_force:.2g}; resume with more steps, or use a larger fmax and another folder"
        )
    return result


def structure_record(atoms: Atoms) -> Record:
    """Record of the cell and positions of a structure, for JSON."""
    return {"cell": atoms.cell.array.tolist(), "positions": atoms.positions.tolist()}


def structure(record: Record, like: Atoms) -> Atoms:
    """Copy of the structure ``like`` with the cell and positions of a record."""
    atoms = like.copy()
    atoms.set_cell(record["cell"])
    atoms.set_positions(record["positions"])
    return atoms


def _identity(atoms: Atoms) -> str:
    """Formula, and digest of elements, cell, positions, charge and spin."""
    numbers = np.concatenate([atoms.cell.array, atoms.positions]).round(6) + 0.0  # no -0
    state = f"{atoms.numbers.tolist()} {atoms.info.get('charge')} {atoms.info.get('spin')}"
    others = {name: str(atoms.info[name]) for name in NAMES if name in atoms.info.keys() - {"charge", "spin"}}
    state += f" {others}" if others else ""
    digest = hashlib.sha256(state.encode() + numbers.tobytes()).hexdigest()
    return f"{atoms.get_chemical_formula()} {digest[:12]}"
