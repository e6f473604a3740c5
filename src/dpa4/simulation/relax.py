"""Relaxation of structures, with or without the cell, by ASE's optimizers."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import BFGS, FIRE, LBFGS
from rich.progress import track

from dpa4.simulation.calculator import labelled
from dpa4.system import stop_requests

OPTIMIZERS = {"fire": FIRE, "bfgs": BFGS, "lbfgs": LBFGS}


@dataclass(frozen=True)
class Relaxation:
    """Outcome of a relaxation."""

    converged: bool
    interrupted: bool  # by Ctrl-C
    steps: int
    initial_energy: float  # eV
    energy: float  # eV
    max_force: float  # largest force on an atom, eV/Angstrom


def relax(
    atoms: Atoms,
    calculator: Calculator,
    *,
    fmax: float = 0.02,
    steps: int = 500,
    optimizer: Literal["fire", "bfgs", "lbfgs"] = "fire",
    cell: bool = False,
    trajectory: str | Path | None = None,
) -> Relaxation:
    """Relax a structure in place; constraints hold, and momenta stay as they are.

    Ctrl-C finishes the step and returns what has been reached.

    Args:
        atoms: Start; ends as the relaxed structure with the calculator attached.
        calculator: ASE calculator.
        fmax: Converged when no atom feels a larger force, in eV/Angstrom. With ``cell``, forces count in the
            starting cell's frame, and the rows of the virial per atom (eV) must be below it too.
        steps: Most steps of the optimizer.
        optimizer: "fire" (robust), "bfgs" (few steps, small structures) or "lbfgs".
        cell: Relax the cell too, by its Frechet derivative at zero pressure.
        trajectory: Extended XYZ file for the structure of every step.

    Raises:
        ValueError: If an argument is not allowed, or ``cell`` is asked for a structure that is not periodic
            along all three axes.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if not 0 < fmax < np.inf:
        raise ValueError(f"fmax must be a positive force in eV/Angstrom, got {fmax}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if cell and not atoms.pbc.all():
        raise ValueError(
            f"cell = True needs a cell periodic along all three axes, but pbc is {atoms.pbc.tolist()}"
        )
    if trajectory is not None:
        Path(trajectory).unlink(missing_ok=True)
    atoms.calc = calculator
    initial_energy = float(atoms.get_potential_energy())
    target: Any = FrechetCellFilter(atoms) if cell else atoms
    engine = OPTIMIZERS[optimizer](target, logfile=None)
    converged = False
    with stop_requests() as stopped:
        for below in engine.irun(fmax=fmax, steps=steps):
            converged = bool(below)
            if trajectory is not None:
                write(trajectory, labelled(atoms), format="extxyz", append=True)
            if stopped:
                break
    return Relaxation(
        converged=converged,
        interrupted=bool(stopped),
        steps=engine.get_number_of_steps(),
        initial_energy=initial_energy,
        energy=float(atoms.get_potential_energy()),
        max_force=float(np.linalg.norm(atoms.get_forces(), axis=1).max(initial=0.0)),
    )


def relax_all(
    structures: Sequence[Atoms],
    calculator: Calculator,
    output: str | Path,
    *,
    progress: bool = True,
    **options: Any,
) -> list[Relaxation]:
    """Relax structures in place, one after another.

    Writes into the folder ``output``, replacing earlier files: relaxed.xyz, with energies and forces, and
    relax.csv, a row per structure. Ctrl-C ends with the structure at hand; the list holds
    those that were begun.

    Args:
        structures: The starts.
        calculator: ASE calculator.
        output: Folder, made if absent.
        progress: Show a progress bar.
        **options: As ``relax`` takes them, for every structure.

    Raises:
        ValueError: As ``relax``, with the number of the structure.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    relaxed = folder / "relaxed.xyz"
    relaxed.unlink(missing_ok=True)
    results: list[Relaxation] = []
    with (folder / "relax.csv").open("w", newline="", encoding="utf-8") as file:
        columns = [field.name for field in fields(Relaxation)]
        table = csv.DictWriter(file, ("structure", "formula", *columns))
        table.writeheader()
        for number, atoms in enumerate(track(structures, "relaxing", disable=not progress)):
            try:
                result = relax(atoms, calculator, **options)
            except ValueError as error:
                raise ValueError(f"structure {number}: {error}") from error
            results.append(result)
            table.writerow({"structure": number, "formula": atoms.get_chemical_formula()} | asdict(result))
            file.flush()
            write(relaxed, labelled(atoms), format="extxyz", append=True)
            if result.interrupted:
                break
    return results
