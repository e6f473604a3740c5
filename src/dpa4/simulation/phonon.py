"""Phonons of a crystal by finite displacements, with phonopy: bands, density of states, thermal properties."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from numpy.typing import NDArray

from dpa4.simulation.runs.parts import Calculation
from dpa4.simulation.runs.store import Record, write_csv, write_json
from dpa4.system import atomic_write, new_figure, require, save_figure

IMAGINARY = -0.05  # THz; lower frequencies are more than numerical noise of the acoustic modes at Gamma
BAND_POINTS = 101  # along each line of the path
DOS = ("frequency_THz", "dos_per_THz")
THERMAL = ("temperature_K", "free_energy_kJ_mol", "entropy_J_K_mol", "heat_capacity_J_K_mol")


@dataclass(frozen=True)
class Phonons:
    """Summary; energies are of a mole of primitive cells."""

    atoms_of_primitive_cell: int
    supercell: tuple[int, int, int]  # multiples of the vectors of the cell that was given
    displacements: int
    residual_force: float  # largest force on an atom before displacement, eV/Angstrom; taken off all forces
    min_frequency: float  # THz, on bands and mesh; negative for imaginary
    max_frequency: float  # THz
    imaginary: bool  # min_frequency is below -0.05 THz: the crystal is not stable, or the supercell too small
    zero_point_energy: float  # kJ/mol, without imaginary modes
    heat_capacity: (
        float | None
    )  # at constant volume and 300 K, J/(K mol); None if 300 K is not among the temperatures


def phonons(
    atoms: Atoms,
    calculator: Calculator,
    output: str | Path,
    *,
    supercell: Sequence[int] | None = None,
    min_length: float = 12.0,
    displacement: float = 0.01,
    mesh: float = 100.0,
    max_temperature: float = 1000.0,
    symprec: float = 1e-3,
    relax_first: bool = True,
    fmax: float = 1e-4,
    steps: int = 500,
    resume: bool = False,
    progress: bool = True,
) -> Phonons:
    """Compute forces of displaced atoms in a supercell, and from them the phonons in the harmonic approximation.

    Symmetry decides which displacements are needed. The forces of the supercell without displacement are taken off.
    Force constants are made symmetric and obey the acoustic sum rule. There is no correction for the long range of
    charges, so optical branches of polar crystals do not split at Gamma.

    Writes into the folder ``output``: phonopy_params.yaml, which phonopy loads, band.yaml, dos.csv, thermal.csv,
    phonon.json, phonon.png (bands and density of states) and thermal.png. Ctrl-C ends with the displacement at hand;
    with ``resume`` a later call uses the forces that are there, also for another mesh or other temperatures.

    Args:
        atoms: Crystal; left as it is.
        calculator: ASE calculator; float64 is advisable.
        output: Folder, made if absent.
        supercell: Multiples of the three cell vectors; None takes the smallest that reach ``min_length``.
        min_length: Least distance between opposite faces of the supercell, in Angstrom.
        displacement: In Angstrom.
        mesh: Length that decides the number of wave vectors along each reciprocal vector, mesh times its length (of
            1/Angstrom, without 2 pi), for density of states and thermal properties.
        max_temperature: Of the thermal properties, which start at 0 in steps of 10 K.
        symprec: How far atoms may be from symmetric positions, in Angstrom.
        relax_first: Relax positions and cell at the start; the symmetry is kept.
        fmax: Of that relaxation, in eV/Angstrom; see ``relax``.
        steps: Most steps of that relaxation.
        resume: Take over the forces an earlier call has computed.
        progress: Show progress bars on a terminal.

    Raises:
        FileExistsError: If ``output`` holds a calculation and ``resume`` is not set.
        FileNotFoundError: If there is no calculation to resume.
        ImportError: If phonopy or seekpath is not installed.
        RuntimeError: If the relaxation does not converge.
        Stopped: After Ctrl-C.
        ValueError: If an argument is not allowed, or the calculation to resume had others.
    """
    for module in ("phonopy", "seekpath"):
        require(module, "phonon")
    _check(atoms, supercell, min_length=min_length, displacement=displacement, mesh=mesh, symprec=symprec)
    if not 0 <= max_temperature < np.inf:
        raise ValueError(f"max_temperature must be at least 0 K, got {max_temperature}")
    multiples = tuple(supercell) if supercell is not None else supercell_of_length(atoms, min_length)
    folder = Path(output)
    settings = {
        "supercell": list(multiples), "displacement": displacement, "symprec": symprec, "relax_first": relax_first,
        "fmax": fmax,
    }  # fmt: skip
    run = Calculation(folder, atoms, calculator, settings, resume=resume, progress=progress)
    start = run.relaxed(atoms, fmax=fmax, steps=steps, symprec=symprec) if relax_first else atoms.copy()
    phonon = _phonopy(start, multiples, displacement, symprec)

    def compute(cell: Atoms) -> Record:
        return {"forces": calculator.get_forces(cell).tolist()}

    cells = [phonon.supercell, *phonon.supercells_with_displacements]
    parts = [(str(number), _from_phonopy(cell)) for number, cell in enumerate(cells)]
    forces = np.array([record["forces"] for record in run.run("forces", parts, compute, "displacement")])
    phonon.forces = forces[1:] - forces[0]
    phonon.produce_force_constants(calculate_full_force_constants=False, show_drift=False)
    phonon.symmetrize_force_constants(show_drift=False)
    return _finish(folder, phonon, mesh, max_temperature, float(np.linalg.norm(forces[0], axis=1).max()))


def supercell_of_length(atoms: Atoms, min_length: float) -> tuple[int, int, int]:
    """Multiples of the cell vectors whose faces are at least ``min_length`` (Angstrom) apart."""
    distances = 1 / np.linalg.norm(atoms.cell.reciprocal(), axis=1)
    a, b, c = np.ceil(min_length / distances - 1e-6).astype(int).tolist()
    return max(a, 1), max(b, 1), max(c, 1)


def _check(atoms: Atoms, supercell: Sequence[int] | None, **positive: float) -> None:
    for name, value in positive.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    if supercell is not None and (len(supercell) != 3 or min(supercell) < 1):
        raise ValueError(f"supercell must be three positive multiples, got {tuple(supercell)}")
    if atoms.info.get("charge", 0) != 0 or atoms.info.get("spin", 1) != 1:
        raise ValueError(
            "phonons need an uncharged crystal with spin 1; a supercell has no charge or spin of its own"
        )


def _phonopy(atoms: Atoms, multiples: Sequence[int], displacement: float, symprec: float) -> Any:
    """Phonopy's object with displacements."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms
    from phonopy.structure.cells import guess_primitive_matrix

    cell = PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        cell=atoms.cell.array,
        scaled_positions=atoms.get_scaled_positions(),
        masses=atoms.get_masses(),
    )
    primitive = guess_primitive_matrix(cell, symprec=symprec)
    phonon = Phonopy(cell, np.diag(multiples), primitive_matrix=primitive, symprec=symprec)
    phonon.generate_displacements(distance=displacement)
    return phonon


def _from_phonopy(cell: Any) -> Atoms:
    return Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)


def _finish(folder: Path, phonon: Any, mesh: float, max_temperature: float, residual: float) -> Phonons:
    """Properties, files and summary from the force constants."""
    from phonopy.phonon.band_structure import get_band_qpoints_by_seekpath

    bands, labels, connections = get_band_qpoints_by_seekpath(phonon.primitive, BAND_POINTS)
    phonon.run_band_structure(bands, path_connections=connections, labels=labels)
    phonon.run_mesh(mesh)
    phonon.run_total_dos()
    # Modes below 0.01 THz, the acoustic ones at Gamma, would have an entropy without bound.
    phonon.run_thermal_properties(t_max=max_temperature, t_step=10, cutoff_frequency=0.01)
    band, dos, thermal = phonon.band_structure, phonon.total_dos, phonon.thermal_properties
    for name, save in {
        "phonopy_params.yaml": lambda path: phonon.save(path, settings={"force_constants": True}),
        "band.yaml": lambda path: phonon.write_yaml_band_structure(filename=path),
    }.items():
        with atomic_write(folder / name) as temporary:
            save(temporary)
    _table(folder / "dos.csv", DOS, dos.frequency_points, dos.dos)
    values = (thermal.temperatures, thermal.free_energy, thermal.entropy, thermal.heat_capacity)
    _table(folder / "thermal.csv", THERMAL, *values)
    frequencies = np.concatenate([*band.frequencies, phonon.mesh.frequencies])
    room = np.isclose(thermal.temperatures, 300)
    result = Phonons(
        atoms_of_primitive_cell=len(phonon.primitive),
        supercell=tuple(np.diag(phonon.supercell_matrix).tolist()),
        displacements=len(phonon.supercells_with_displacements),
        residual_force=residual,
        min_frequency=float(frequencies.min()),
        max_frequency=float(frequencies.max()),
        imaginary=bool(frequencies.min() < IMAGINARY),
        zero_point_energy=float(thermal.free_energy[0]),
        heat_capacity=float(thermal.heat_capacity[room][0]) if room.any() else None,
    )
    write_json(folder / "phonon.json", asdict(result))
    _plot_bands(folder / "phonon.png", band, labels, connections, dos)
    _plot_thermal(folder / "thermal.png", thermal)
    return result


def _table(path: Path, columns: Sequence[str], *values: NDArray[np.float64]) -> None:
    rows = np.column_stack(values).tolist()
    write_csv(path, columns, [dict(zip(columns, row, strict=True)) for row in rows])


def _plot_bands(path: Path, band: Any, labels: list[str], connections: list[bool], dos: Any) -> None:
    figure = new_figure(9, 4.5)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    for distances, frequencies in zip(band.distances, band.frequencies, strict=True):
        left.plot(distances, frequencies, color="C0", linewidth=1)
    places, names = _ticks(band.distances, labels, connections)
    left.set_xticks(places, names)
    left.set_xlim(places[0], places[-1])
    left.set_ylabel("frequency (THz)")
    left.grid(axis="x", alpha=0.3)
    right.plot(dos.dos, dos.frequency_points, linewidth=1)
    right.set_xlabel("DOS (1/THz)")
    for axis in (left, right):
        axis.axhline(0, color="black", linewidth=0.5)  # imaginary modes lie below
    save_figure(figure, path)


def _ticks(
    distances: list[NDArray[np.float64]], labels: list[str], connections: list[bool]
) -> tuple[list[float], list[str]]:
    """Places and names of the points between the lines; where the path jumps, both names."""
    places, names = [float(distances[0][0])], [labels[0]]
    rest = iter(labels[1:])
    for line, connected in zip(distances, connections, strict=True):
        places.append(float(line[-1]))
        names.append(next(rest))
        if not connected and line is not distances[-1]:
            names[-1] += "|" + next(rest)
    return places, names


def _plot_thermal(path: Path, thermal: Any) -> None:
    panels = {
        "free energy\n(kJ/mol)": thermal.free_energy,
        "entropy\n(J/(K mol))": thermal.entropy,
        "heat capacity\n(J/(K mol))": thermal.heat_capacity,
    }
    figure = new_figure(7, 7)
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        axis.plot(thermal.temperatures, values, linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("temperature (K)")
    save_figure(figure, path)
