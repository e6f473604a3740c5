"""Minimum energy paths and barriers with ASE's climbing-image nudged elastic band (NEB) method."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.geometry import find_mic
from ase.mep import NEB, idpp_interpolate
from ase.optimize import FIRE
from ase.utils.forcecurve import fit_raw
from numpy.typing import NDArray

from dpa4.data import read_images, with_results, write_structures
from dpa4.interfaces.ase import deviations_of, has_deviations
from dpa4.output import (
    CsvLog,
    OutputFolder,
    already_there,
    atomic_write,
    check_start,
    new_figure,
    remove_files,
    rows_until,
    save_figure,
)
from dpa4.potential.committee import add_deviations
from dpa4.progress import ProgressBar
from dpa4.simulation.relax import relax
from dpa4.system import stop_requests, user_path

COLUMNS = ("step", "climbing", "max_force_eV_per_A", "barrier_eV", "highest_image")
BEFORE_CLIMBING = 4.0  # in units of fmax: largest force at which the highest image starts to climb
PATH = "path.xyz"
SAME = 0.01  # Angstrom; ends are the same structure if no atom moves farther


@dataclass(frozen=True)
class Barrier:
    """Result of a nudged elastic band calculation.

    Energies are those of the images; nothing is interpolated between images.

    Attributes:
        converged: True if the largest NEB force is below fmax while the highest image climbs.
        interrupted: True after Ctrl-C.
        steps: Number of steps, including steps before ``resume``.
        barrier: Energy of the highest image relative to the start, in eV.
        reverse_barrier: Energy of the highest image relative to the end, in eV.
        reaction_energy: Energy of the end relative to the start, in eV.
        highest_image: Index of the highest image; 0 is the start. If it is an end, there is no barrier.
        max_force: Largest NEB force on an atom, in eV/Angstrom.
    """

    converged: bool
    interrupted: bool
    steps: int
    barrier: float
    reverse_barrier: float
    reaction_energy: float
    highest_image: int
    max_force: float


def run_neb(
    start: Atoms,
    end: Atoms,
    calculator: Calculator,
    output: str | Path,
    *,
    images: int = 7,
    fmax: float = 0.05,
    steps: int = 500,
    spring: float = 0.1,
    relax_ends: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Barrier:
    """Find the minimum energy path between two structures and its energy barrier.

    The initial path interpolates pair distances (IDPP), and each atom moves to the nearest periodic image of its
    final position. FIRE relaxes the path with improved tangents, first without climbing, then with the highest image
    climbing to the saddle point. Isolated structures without constraints neither move nor rotate as a whole.

    Files written to ``output``:

    * path.xyz: images with energy, forces and ``path``, the distance along the path in Angstrom; written after every
      step.
    * neb.csv: largest force, barrier and highest image; one row per step.
    * path.csv and path.png: energy along the path; written at the end.

    Ctrl-C ends the calculation after the current step. A later call with ``resume`` continues from path.xyz.

    Args:
        start: Initial minimum. Its constraints apply to all images. Not modified.
        end: Final minimum, with the same atoms in the same order and the same cell. Not modified.
        calculator: ASE calculator, shared by all images.
        output: Output folder, created if absent.
        images: Number of images between start and end.
        fmax: Convergence threshold for the largest NEB force on an atom, in eV/Angstrom.
        steps: Maximum number of steps, including steps before ``resume``.
        spring: Force constant of the springs between images, in eV/Angstrom^2. It controls their spacing and hardly
            affects the path.
        relax_ends: Relax start and end first, to half of fmax.
        resume: Continue the run in ``output``.
        overwrite: Replace the path in ``output``.
        progress: Show the progress.

    Returns:
        Forward and reverse barrier, reaction energy and convergence.

    Raises:
        BlockingIOError: If another process is working in ``output``.
        FileExistsError: If ``output`` already holds a path and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is no path to resume.
        KeyboardInterrupt: After Ctrl-C during the relaxation of the ends, when there is no path to save yet.
        RuntimeError: If the relaxation of an end does not converge.
        ValueError: If an argument is not allowed; if start and end have different atoms, cells or periodicity, or are
            the same structure; or if the path to resume has other atoms or another number of images.

    Example:
        Barrier between two structures:

            calculator = DPA4Calculator("run/best.safetensors")
            start, end = ase.io.read("start.xyz"), ase.io.read("end.xyz")
            result = run_neb(start, end, calculator, "neb", images=5, relax_ends=True)
            print(result.barrier, result.reverse_barrier)  # eV
    """
    _check(start, end, images, fmax, steps, spring)
    check_start(resume, overwrite)
    folder = user_path(output)
    file = folder / PATH
    known = _read_path(file, start, images) if resume else None
    if file.exists() and not (resume or overwrite):
        raise already_there(folder, file.name)
    with OutputFolder(folder):
        if known is None:
            ends = _ends(start, end)
            if relax_ends:
                for name, atoms in zip(("start", "end"), ends, strict=True):
                    _relax(name, atoms, calculator, fmax / 2, steps)
            known = _interpolated(*ends, images)
            remove_files(folder, PATH, "path.csv", "path.png")
        return _relax_band(_Band(known, calculator, spring), folder, fmax, steps, resume, progress)


def _relax_band(
    band: "_Band", folder: Path, fmax: float, steps: int, resume: bool, progress: bool
) -> Barrier:
    """Relax a band with FIRE, first without and then with a climbing image, and write all files."""
    log_file = folder / "neb.csv"
    rows = rows_until(log_file, COLUMNS, sys.maxsize) if resume else []
    done = int(rows[-1]["step"]) if rows else 0
    band.climb = bool(rows) and rows[-1]["climbing"] == "1"
    log = CsvLog(log_file, COLUMNS, done - 1 if rows else None)  # the last row is written again
    converged = False
    try:
        with stop_requests() as stopped, ProgressBar("step", steps, done, progress) as bar:
            while True:
                phase = FIRE(band, logfile=None)
                limit = fmax if band.climb else BEFORE_CLIMBING * fmax
                for below in phase.irun(fmax=limit, steps=max(steps - done, 0)):
                    step = done + phase.get_number_of_steps()
                    converged = bool(below) and band.climb
                    row = band.row(step)
                    log.write(row)
                    band.save(folder / PATH)
                    status = f"barrier {row['barrier_eV']:.4f} eV  force {row['max_force_eV_per_A']:.3f} eV/Å"
                    bar.update(bar.task_ids[0], completed=step, status=status)
                    if stopped:
                        break
                done = step
                if band.climb or stopped or not below:
                    break
                band.climb = True
    finally:
        log.close()
    if band.is_committee:
        band.save(folder / PATH, deviations=True)
    return _finish(band, folder, converged, bool(stopped), done)


class _Constant(Calculator):
    """Calculator with the energy and forces of an end, which stay the same when ASE rotates or translates the end."""

    implemented_properties = ["energy", "free_energy", "forces"]

    def __init__(self, energy: float, forces: NDArray[np.float64]):
        super().__init__()
        self.fixed = {"energy": energy, "free_energy": energy, "forces": forces}

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results = dict(self.fixed)


class _Band(NEB):
    """Elastic band that evaluates each image once per step, with one calculator for all images."""

    def __init__(self, images: Sequence[Atoms], calculator: Calculator, spring: float):
        for atoms in (images[0], images[-1]):
            atoms.calc = calculator
            atoms.calc = _Constant(
                float(atoms.get_potential_energy()), atoms.get_forces(apply_constraint=False)
            )
        for atoms in images[1:-1]:
            atoms.calc = calculator
        self._calculator = calculator
        super().__init__(
            list(images),
            k=spring,
            method="improvedtangent",
            allow_shared_calculator=True,
            remove_rotation_and_translation=_is_free(images[0]),
        )
        self._known: tuple[NDArray[np.float64], bool, NDArray[np.float64]] | None = None

    def get_forces(self) -> NDArray[np.float64]:
        """Return the NEB forces, cached for the current positions.

        ASE's optimizer requests them twice per step, and a shared calculator remembers the last image only.
        """
        known = self._known
        if known is None or known[1] != self.climb or not np.array_equal(known[0], self.get_positions()):
            forces = super().get_forces()
            self._known = known = self.get_positions(), self.climb, forces
        return known[2].copy()

    def frames(self, deviations: bool = False) -> list[Atoms]:
        """Copies of the images with their energies, forces and distances along the band.

        With ``deviations`` they have the standard deviations of a committee, which takes one more evaluation of each.
        """
        self.get_forces()
        frames = []
        ends = {
            0: self.images[0].calc.fixed["forces"],
            self.nimages - 1: self.images[-1].calc.fixed["forces"],
        }
        for number, (atoms, at) in enumerate(zip(self.images, self.path(), strict=True)):
            forces = ends.get(number, self.real_forces[number])
            frame = with_results(atoms, energy=float(self.energies[number]), forces=forces)
            frame.info |= {"image": number, "path": float(at)}
            if deviations:
                self._calculator.get_forces(atoms)
                add_deviations(frame, **deviations_of(self._calculator))
            frames.append(frame)
        return frames

    @property
    def is_committee(self) -> bool:
        """True if the calculator has standard deviations."""
        return has_deviations(self._calculator)

    def path(self) -> NDArray[np.float64]:
        """Distance of each image from the start, along straight lines between images, (images + 2,) in Angstrom."""
        steps = [b.positions - a.positions for a, b in zip(self.images, self.images[1:], strict=False)]
        return np.concatenate([[0.0], np.cumsum([np.linalg.norm(step) for step in steps])])

    def row(self, step: int) -> dict[str, Any]:
        """Row of neb.csv for the current state."""
        force = float(np.linalg.norm(self.get_forces(), axis=1).max())
        highest = int(self.energies.argmax())
        values = (step, int(self.climb), force, float(self.energies[highest] - self.energies[0]), highest)
        return dict(zip(COLUMNS, values, strict=True))

    def save(self, file: Path, deviations: bool = False) -> None:
        """Write the images to path.xyz, see `frames`."""
        with atomic_write(file) as temporary:
            write_structures(temporary, self.frames(deviations))


def _check(start: Atoms, end: Atoms, images: int, fmax: float, steps: int, spring: float) -> None:
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    for name, value, unit in (("fmax", fmax, "eV/Angstrom"), ("spring", spring, "eV/Angstrom^2")):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive (in {unit}), got {value}")
    if not np.array_equal(start.numbers, end.numbers):
        raise ValueError(
            f"start ({start.get_chemical_formula()}) and end ({end.get_chemical_formula()}) must have the same atoms "
            "in the same order"
        )
    if not np.array_equal(start.pbc, end.pbc):
        raise ValueError(
            f"start has pbc {start.pbc.tolist()}, but end has {end.pbc.tolist()}; give both the same periodicity"
        )
    difference = np.abs(start.cell.array - end.cell.array)[start.pbc].max(initial=0.0)
    if difference > 1e-8:  # the tolerance of ASE
        raise ValueError(
            f"the cells of start and end differ by up to {difference:.2g} Angstrom; give them the same cell"
        )


def _ends(start: Atoms, end: Atoms) -> tuple[Atoms, Atoms]:
    """Copy start and end.

    Both copies have the constraints of the start. Each atom of the end is replaced by its periodic image nearest to
    the atom of the start.
    """
    first, last = start.copy(), end.copy()
    last.set_constraint()
    last.positions = first.positions + find_mic(last.positions - first.positions, first.cell, first.pbc)[0]
    last.set_constraint(first.constraints)
    return first, last


def _relax(name: str, atoms: Atoms, calculator: Calculator, fmax: float, steps: int) -> None:
    result = relax(atoms, calculator, fmax=fmax, steps=steps)
    if result.interrupted:
        raise KeyboardInterrupt
    if not result.converged:
        raise RuntimeError(
            f"{name} is not relaxed to {fmax:g} eV/Angstrom after {steps} steps (largest force "
            f"{result.max_force:.3f}); relax the structure first, or allow more steps"
        )


def _interpolated(first: Atoms, last: Atoms, images: int) -> list[Atoms]:
    if np.linalg.norm(last.positions - first.positions, axis=1).max(initial=0.0) < SAME:
        raise ValueError("start and end are the same structure, so there is no path between them")
    path = [first, *(first.copy() for _ in range(images)), last]
    band = NEB(path, method="improvedtangent", remove_rotation_and_translation=_is_free(first))
    band.interpolate(mic=False, apply_constraint=True)  # _ends has chosen the nearest images
    idpp_interpolate(band, traj=None, log=None, mic=True)
    return path


def _is_free(atoms: Atoms) -> bool:
    """Return whether a structure can move and rotate as a whole: isolated and without constraints."""
    return not atoms.pbc.any() and not atoms.constraints


def _read_path(file: Path, start: Atoms, images: int) -> list[Atoms]:
    """Read the images of an earlier run and give them the constraints of the start.

    Raises:
        FileNotFoundError: If there is no path.
        ValueError: If the file cannot be read, or the path has other atoms or another number of images.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no path to resume: {file} does not exist")
    path = read_images(file)
    if len(path) != images + 2:
        raise ValueError(
            f"images = {images}, but the path to resume has {len(path) - 2} between its ends; use this number"
        )
    if any(not np.array_equal(atoms.numbers, start.numbers) for atoms in path):
        raise ValueError(
            f"the atoms of start are not those of the path to resume in {file}; give the same ones in the same order"
        )
    for atoms in path:
        atoms.calc = None
        atoms.set_constraint(start.constraints)
    return path


def _finish(band: _Band, folder: Path, converged: bool, interrupted: bool, steps: int) -> Barrier:
    """Write path.csv and path.png for the current band, and summarise the result."""
    frames, row = band.frames(), band.row(steps)
    energies = np.array([frame.get_potential_energy() for frame in frames])
    forces = [frame.get_forces() for frame in frames]
    fit = fit_raw(energies, forces, [frame.positions.copy() for frame in frames])
    with atomic_write(folder / "path.csv") as temporary:
        columns = np.column_stack([np.arange(len(energies)), fit.path, fit.energies])
        header = "image,path_A,energy_eV"
        np.savetxt(temporary, columns, fmt=("%d", "%.6f", "%.9g"), delimiter=",", header=header, comments="")
    highest = row["highest_image"]
    _plot(fit, highest, folder / "path.png")
    top = energies[highest]
    return Barrier(
        converged=converged,
        interrupted=interrupted,
        steps=steps,
        barrier=float(top - energies[0]),
        reverse_barrier=float(top - energies[-1]),
        reaction_energy=float(energies[-1] - energies[0]),
        highest_image=highest,
        max_force=row["max_force_eV_per_A"],
    )


def _plot(fit: Any, highest: int, path: Path) -> None:
    figure = new_figure(6, 4)
    axis = figure.subplots()
    axis.plot(fit.fit_path, fit.fit_energies, linewidth=1, color="0.5")
    axis.plot(fit.path, fit.energies, "o", markersize=5)
    axis.annotate(
        f"{fit.energies[highest]:.3f} eV", (fit.path[highest], fit.energies[highest]),
        textcoords="offset points", xytext=(0, 12), ha="center",
    )  # fmt: skip
    axis.margins(y=0.15)
    axis.set_xlabel("distance along the path (Å)")
    axis.set_ylabel("energy above the start (eV)")
    axis.grid(alpha=0.3)
    save_figure(figure, path)
