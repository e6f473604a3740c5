"""Molecular dynamics with ASE's integrators, with tables, plots and exact continuation after an interruption."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator

from dpa4.data import write_structures
from dpa4.interfaces.ase import fingerprint_of_calculator, has_deviations, labelled
from dpa4.messages import not_allowed
from dpa4.output import (
    CsvLog,
    OutputFolder,
    already_there,
    check_start,
    cut_back,
    flush_to_disk,
    read_csv,
    remove_files,
    rows_until,
    save_figure,
)
from dpa4.progress import ProgressBar
from dpa4.simulation.figures import (
    CONSERVED,
    DENSITY,
    DEVIATION,
    PRESSURE,
    VOLUME,
    draw_dynamics,
    energy_change,
    read_thermo,
)
from dpa4.simulation.integrators import bath_state, conserved_energy, make_integrator, set_bath_state
from dpa4.simulation.momenta import degrees_of_freedom, draw_momenta, internal_momenta, temperature
from dpa4.simulation.restart import (
    RESTART,
    THERMO,
    TRAJECTORY,
    Restart,
    check_system,
    damaged,
    read_restart,
    restore_random,
    system_of,
    write_restart,
)
from dpa4.simulation.runs.store import check_settings
from dpa4.simulation.uncertain_frames import UncertainFrames
from dpa4.system import stop_requests, user_path

Ensemble = Literal["nve", "langevin", "nvt", "npt"]
CellMotion = Literal["volume", "full"]

COLUMNS = ("step", "time_ps", "potential_eV", "kinetic_eV", "total_eV", "temperature_K")
RESTART_INTERVAL = 1000  # steps between restart files; written also at the end and on interruption
GRAMS_PER_CM3 = 1e27 * units._amu  # 1 u/Angstrom^3 in g/cm^3


@dataclass(frozen=True)
class DynamicsResult:
    """Summary of a molecular dynamics run, computed from all rows of its table thermo.csv.

    The conserved energy is the total energy in ensemble nve, and the energy of structure and baths in nvt and npt. In
    langevin no energy is conserved.

    Attributes:
        steps: Number of completed steps, including steps before ``resume``.
        finished: False after an interruption.
        temperature: Mean temperature, in K.
        drift: Slope of the conserved energy by least squares, in meV/atom/ps. None in langevin, and if the table has
            a single row.
        deviation: Largest deviation of the conserved energy from its initial value, in meV/atom. None in langevin.
        density: Mean density, in g/cm^3. None except in npt.
        max_force_std: Largest deviation of the force on an atom in any frame, in eV/Angstrom. None for one model.
        exceeded: Deviation above ``stop_above`` that ended the run, in eV/Angstrom. None if there was none.
        saved: Number of frames in uncertain.xyz.
    """

    steps: int
    finished: bool
    temperature: float
    drift: float | None
    deviation: float | None
    density: float | None
    max_force_std: float | None = None
    exceeded: float | None = None
    saved: int = 0


def run_md(
    atoms: Atoms,
    calculator: Calculator,
    output: str | Path,
    *,
    steps: int,
    ensemble: Ensemble = "nve",
    temperature: float = 300.0,
    timestep: float = 0.5,
    friction: float = 0.01,
    tdamp: float = 100.0,
    pressure: float = 0.0,
    pdamp: float = 1000.0,
    cell: CellMotion = "volume",
    interval: int = 10,
    seed: int = 0,
    save_above: float | None = None,
    stop_above: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> DynamicsResult:
    """Run molecular dynamics at constant energy, temperature or pressure.

    ``atoms`` is modified in place and becomes the last structure. Files written to ``output``:

    * trajectory.xyz: structures with energy, forces, momenta and, if periodic along all three axes, stress.
    * thermo.csv and thermo.png: energies, temperature, pressure and volume against time.
    * restart.json: state from which ``resume`` continues, written every 1000 steps and at the end.
    * uncertain.xyz: frames whose deviation is above ``save_above``, and the structure at which ``stop_above`` ended
      the run.

    With a committee, frames have the standard deviations of energy, forces and stress, and the table has the largest
    deviation of the force on an atom: the root mean square distance of the members' forces from their mean.

    Ctrl-C ends the run after the current step and saves its state. A run continued with ``resume`` yields the same
    numbers as an uninterrupted one, up to rounding if the calculator reuses a neighbour list from step to step. A
    finished run can be extended with ``resume`` and a larger ``steps``.

    Args:
        atoms: Initial structure. Its constraints are respected. Its momenta are used; if all are zero, momenta are
            drawn from the Maxwell-Boltzmann distribution. In nvt and npt, the motion of the centre of mass is removed
            and, for isolated structures, the rotation.
        calculator: ASE calculator.
        output: Output folder, created if absent.
        steps: Number of steps of the whole run, including steps before ``resume``.
        ensemble: "nve" (velocity Verlet); "langevin" (constant temperature, the centre of mass diffuses); "nvt"
            (Nose-Hoover chains); or "npt" (Martyna-Tobias-Klein equations), which needs periodicity along all three
            axes and a calculator with stress.
        temperature: Temperature of drawn momenta and of the thermostat, in K. Motion of the centre of mass and
            rotation of isolated structures do not count. In nve, a run from a relaxed structure equilibrates at about
            half of this temperature, because half of the kinetic energy turns into potential energy.
        timestep: Time step, in fs.
        friction: Friction of the Langevin bath, in 1/fs.
        tdamp: Time constant of the thermostat in nvt and npt, in fs.
        pressure: External pressure in npt, in GPa.
        pdamp: Time constant of the barostat in npt, in fs.
        cell: Degrees of freedom of the barostat in npt: "volume" preserves the shape of the cell, for liquids and
            cubic crystals; "full" changes all lengths and angles.
        interval: Number of steps between rows of the table and frames of the trajectory.
        seed: Seed of the random numbers.
        save_above: Deviation of a force, in eV/Angstrom, above which frames are also written to uncertain.xyz.
        stop_above: Deviation of a force, in eV/Angstrom, above which the run ends; compared in every step. Both need
            a committee.
        resume: Continue the run in ``output``.
        overwrite: Replace the run in ``output``.
        progress: Show the progress.

    Returns:
        Summary of the whole run, including steps before ``resume``.

    Raises:
        BlockingIOError: If another process is working in ``output``.
        FileExistsError: If ``output`` already holds a run and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is no run to resume.
        RuntimeError: If a step fails, usually because the time step is too long.
        ValueError: If an argument is not allowed, no atom can move, the ensemble cannot respect a constraint, the
            run to resume has another model, other settings or another structure (elements, masses, periodicity, box,
            constraints, charge, spin), or one of its files is damaged.

    Example:
        50 ps at 300 K:

            calculator = DPA4Calculator("run/best.safetensors", neighbor_skin=1.0)
            result = run_md(atoms, calculator, "md", steps=100_000, ensemble="langevin", temperature=300.0)
    """
    settings = {
        "ensemble": ensemble,
        "temperature": float(temperature),
        "timestep": float(timestep),
        "friction": float(friction),
        "tdamp": float(tdamp),
        "pressure": float(pressure),
        "pdamp": float(pdamp),
        "cell": cell,
        "interval": interval,
        "seed": seed,
    }
    _check_arguments(settings | {"steps": steps})
    check_start(resume, overwrite)
    folder = user_path(output)
    uncertain = UncertainFrames(folder, save_above, stop_above, has_deviations(calculator))
    state = read_restart(folder) if resume else None
    with OutputFolder(folder):
        if not (resume or overwrite):
            _check_unused(folder)
        run = _Run(
            atoms, calculator, folder, settings | fingerprint_of_calculator(calculator), state, uncertain
        )
        try:
            with stop_requests() as stopped, ProgressBar("step", steps, run.step, progress) as bar:
                while run.step < steps and not stopped and uncertain.exceeded is None:
                    run.advance()
                    bar.update(bar.task_ids[0], completed=run.step, status=run.status)
                run.save()
        finally:
            run.log.close()
        result = _finish(folder, run.step, run.step >= steps, len(atoms), settings)
        return replace(result, exceeded=uncertain.exceeded, saved=uncertain.count())


def _check_unused(folder: Path) -> None:
    """Check that a folder can receive a new run.

    Raises:
        FileExistsError: If the folder already holds a run. A run of an earlier version that was killed before its
            first restart file, with the initial structure at most, is none.
    """
    begun = len(read_csv(folder / THERMO)) > 1
    orphan = (folder / TRAJECTORY).exists() and not (folder / THERMO).exists()
    if begun or orphan or (folder / RESTART).exists():
        raise already_there(folder, "a run")


class _Run:
    """State and files of a molecular dynamics run."""

    def __init__(
        self,
        atoms: Atoms,
        calculator: Calculator,
        folder: Path,
        settings: dict[str, Any],
        state: Restart | None,
        uncertain: UncertainFrames,
    ):
        """Start a run or, with a state, continue one; no file is changed unless everything is in order."""
        self.atoms, self.folder, self.settings, self.uncertain = atoms, folder, settings, uncertain
        self.trajectory = folder / TRAJECTORY
        self.rng = np.random.default_rng(settings["seed"])
        self.step = 0
        self.seconds, self.begun = 0.0, time.monotonic()  # of earlier calls; start of this one
        self.status = ""
        self.ensemble = settings["ensemble"]
        self.is_committee = has_deviations(calculator)
        self.has_pressure = bool(atoms.pbc.all()) and "stress" in calculator.implemented_properties
        if self.ensemble == "npt" and not self.has_pressure:
            raise ValueError(
                "ensemble npt needs a cell periodic along all three axes and a calculator with stress; pbc is "
                f"{atoms.pbc.tolist()}"
            )
        if len(atoms) == 0 or degrees_of_freedom(atoms) == 0:
            raise ValueError(f"none of {len(atoms)} atoms can move; give atoms without constraints")
        self.system = system_of(atoms)  # of the start
        if state is None:
            self._start()
        else:
            self._load(state)
        atoms.calc = calculator
        atoms.get_forces()  # reveals an invalid structure before files are written
        self.integrator = make_integrator(atoms, settings, self.rng)
        begun = state is not None and state.trajectory_bytes > 0
        if state is not None:
            self._restore(state)
        else:
            self._write_state(0)  # before the files that it speaks of, so that a killed run can be resumed
        self.log = CsvLog(folder / THERMO, self._columns(), self.step if begun else None)
        if not begun:
            remove_files(folder, TRAJECTORY, "thermo.png")
            uncertain.start_anew()
            self._record()
            self.save()

    def advance(self) -> None:
        """Run one step, then write the table, trajectory and restart file if due."""
        try:
            self.integrator.step()
        except ValueError as error:  # for example positions that are not finite, or coincident atoms
            raise RuntimeError(
                f"step {self.step + 1} failed: {error}. Try a shorter timestep than "
                f"{self.settings['timestep']} fs; {self.trajectory} shows what happened before"
            ) from error
        self.step += 1
        if self.step % self.settings["interval"] == 0:
            self._record()
        self.uncertain.watch(self.atoms, self._frame)
        if self.step % RESTART_INTERVAL == 0:
            self.save()

    def save(self) -> None:
        """Write the restart file, once all data that it speaks of are on the disk."""
        flush_to_disk(self.trajectory)
        self.uncertain.flush_to_disk()
        self.log.flush_to_disk()
        self._write_state(self.trajectory.stat().st_size)

    def _write_state(self, trajectory_bytes: int) -> None:
        write_restart(
            self.folder,
            settings=self.settings,
            system=self.system,
            step=self.step,
            cell=self.atoms.cell.array.tolist(),
            positions=self.atoms.positions.tolist(),
            momenta=self.atoms.get_momenta().tolist(),
            random=self.rng.bit_generator.state,
            baths=bath_state(self.integrator),
            trajectory_bytes=trajectory_bytes,
            uncertain_bytes=self.uncertain.size,
            seconds=round(self.seconds + time.monotonic() - self.begun, 3),
        )

    def _columns(self) -> list[str]:
        """Columns of the table."""
        columns = [*COLUMNS]
        columns += [CONSERVED] if self.ensemble in ("nvt", "npt") else []
        columns += [PRESSURE] if self.has_pressure else []
        columns += [VOLUME, DENSITY] if self.ensemble == "npt" else []
        columns += [DEVIATION] if self.is_committee else []
        return columns

    def _start(self) -> None:
        """Prepare the momenta of a new run."""
        if not self.atoms.get_momenta().any():
            draw_momenta(self.atoms, self.settings["temperature"], self.rng)
        elif self.ensemble in ("nvt", "npt"):
            self.atoms.set_momenta(internal_momenta(self.atoms))

    def _load(self, state: Restart) -> None:
        """Restore structure and random numbers.

        Raises:
            ValueError: If settings or structure differ, or an entry of the state is not possible.
        """
        check_settings(self.settings, state.settings, self.folder)
        check_system(self.atoms, state, self.folder)
        self.system, self.step, self.seconds = state.system, state.step, state.seconds
        self.atoms.set_cell(state.cell)
        self.atoms.set_positions(state.positions, apply_constraint=False)
        self.atoms.set_momenta(state.momenta, apply_constraint=False)
        restore_random(self.rng, state, self.folder)

    def _restore(self, state: Restart) -> None:
        """Restore the baths, and cut table and trajectory back to the state; later frames are computed again.

        Raises:
            ValueError: If the baths are not those of the ensemble, or a row or a frame before the state is lost.
        """
        try:
            set_bath_state(self.integrator, state.baths)
        except ValueError as error:
            raise damaged(self.folder / RESTART, str(error)) from None
        if state.trajectory_bytes:
            table, interval = self.folder / THERMO, self.settings["interval"]
            found = [int(row["step"]) for row in rows_until(table, self._columns(), self.step)]
            expected = range(0, self.step + 1, interval)
            if len(found) != len(expected) or found != list(expected):
                raise damaged(
                    table, f"it has {len(found)} rows, not every {interval} steps up to {self.step}"
                )
        cut_back(self.trajectory, state.trajectory_bytes, self.folder / RESTART)
        cut_back(self.uncertain.path, state.uncertain_bytes, self.folder / RESTART)

    def _record(self) -> None:
        """Append a row to the table and a frame to the trajectory."""
        atoms, frame = self.atoms, self._frame()
        time = frame.info["time_ps"]
        potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
        values = (self.step, time, potential, kinetic, potential + kinetic, temperature(atoms))
        row: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
        if self.has_pressure:
            stress = atoms.get_stress(apply_constraint=False, include_ideal_gas=True)
            row[PRESSURE] = float(-stress[:3].mean() / units.GPa)
        if self.ensemble in ("nvt", "npt"):
            row[CONSERVED] = conserved_energy(self.integrator)
        if self.ensemble == "npt":
            row[VOLUME] = float(atoms.get_volume())
            row[DENSITY] = float(GRAMS_PER_CM3 * atoms.get_masses().sum() / row[VOLUME])
        if self.is_committee:
            row[DEVIATION] = frame.info["max_force_std"]
        self.log.write(row)
        write_structures(self.trajectory, frame, append=True)
        self.uncertain.save(frame)
        self.status = f"{time:.3f} ps  {row['temperature_K']:.0f} K  {row['total_eV']:.4f} eV"

    def _frame(self) -> Atoms:
        """Current structure with its results, step and time."""
        frame = labelled(self.atoms)
        time = round(self.step * self.settings["timestep"] / 1000, 9)
        frame.info |= {"step": self.step, "time_ps": time}
        return frame


def _check_arguments(settings: dict[str, Any]) -> None:
    for name, allowed in (("ensemble", get_args(Ensemble)), ("cell", get_args(CellMotion))):
        if settings[name] not in allowed:
            raise not_allowed(name, settings[name], allowed)
    for name, unit in (("timestep", "fs"), ("friction", "1/fs"), ("tdamp", "fs"), ("pdamp", "fs")):
        if not 0 < settings[name] < np.inf:
            raise ValueError(f"{name} must be positive (in {unit}), got {settings[name]}")
    if not 0 <= settings["temperature"] < np.inf:
        raise ValueError(f"temperature must be at least 0 K, got {settings['temperature']}")
    if settings["temperature"] == 0 and settings["ensemble"] in ("nvt", "npt"):
        raise ValueError(f"temperature must be above 0 K in ensemble {settings['ensemble']}; relax instead")
    if not np.isfinite(settings["pressure"]):
        raise ValueError(f"pressure must be a number in GPa, got {settings['pressure']}")
    if settings["pressure"] != 0 and settings["ensemble"] != "npt":
        raise ValueError(
            f"pressure = {settings['pressure']} GPa has no effect in ensemble {settings['ensemble']}; use npt"
        )
    for name in ("steps", "interval"):
        if settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")


def _finish(
    folder: Path, steps: int, finished: bool, num_atoms: int, settings: Mapping[str, Any]
) -> DynamicsResult:
    """Compute the summary and draw the figure of the whole run from its table."""
    table = read_thermo(folder)
    save_figure(draw_dynamics(table, num_atoms, settings), folder / "thermo.png")
    return summary(table, steps, finished, num_atoms, settings["ensemble"])


def summary(
    table: Mapping[str, np.ndarray], steps: int, finished: bool, num_atoms: int, ensemble: str
) -> DynamicsResult:
    """Summarize the table of a run.

    Args:
        table: Columns of thermo.csv.
        steps: Number of completed steps.
        finished: True unless the run was interrupted.
        num_atoms: Number of atoms.
        ensemble: Ensemble of the run.
    """
    change = energy_change(table, num_atoms)
    drift = deviation = None
    if ensemble != "langevin":
        deviation = float(np.abs(change).max())
        drift = float(np.polyfit(table["time_ps"], change, 1)[0]) if len(change) > 1 else None
    density = float(table[DENSITY].mean()) if DENSITY in table else None
    largest = float(table[DEVIATION].max()) if DEVIATION in table else None
    mean = float(table["temperature_K"].mean())
    return DynamicsResult(steps, finished, mean, drift, deviation, density, largest)
