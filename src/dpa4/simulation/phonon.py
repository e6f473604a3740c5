"""Phonons of a crystal by finite displacements with phonopy: bands, density of states, thermal properties."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from numpy.typing import NDArray

from dpa4.data.charge_spin import charge_and_spin
from dpa4.graph.lattice import right_handed
from dpa4.interfaces.loading import reads_charge_spin
from dpa4.output import atomic_write, new_figure, save_figure, write_csv, write_json
from dpa4.simulation.crystal_calculation import Calculation
from dpa4.simulation.runs.store import Record
from dpa4.system import require, user_path

IMAGINARY = -0.05  # THz; lower frequencies exceed the numerical noise of acoustic modes at Gamma
BAND_POINTS = 101  # per line of the path
DOS = ("frequency_THz", "dos_per_THz")
FILES = (
    "phonon.json", "phonon.png", "thermal.csv", "thermal.png", "dos.csv", "band.yaml", "phonopy_params.yaml"
)  # fmt: skip
THERMAL = ("temperature_K", "free_energy_kJ_mol", "entropy_J_K_mol", "heat_capacity_J_K_mol")


@dataclass(frozen=True)
class Phonons:
    """Summary of a phonon calculation; thermal properties are per mole of primitive cells.

    Attributes:
        atoms_of_primitive_cell: Number of atoms in the primitive cell.
        supercell: Multiples of the vectors of the input cell.
        displacements: Number of displaced supercells.
        residual_force: Largest force on an atom before displacement, in eV/Angstrom. It is subtracted from the forces
            of the displaced supercells.
        min_frequency: Lowest frequency on bands and mesh, in THz; negative for imaginary modes.
        max_frequency: Highest frequency on bands and mesh, in THz.
        imaginary: True if ``min_frequency`` is below -0.05 THz: the crystal is unstable, or the supercell is too
            small.
        zero_point_energy: Zero-point energy in kJ/mol, without imaginary modes.
        heat_capacity: Heat capacity at constant volume and 300 K, in J/(K mol). None if 300 K is not among the
            temperatures.
    """

    atoms_of_primitive_cell: int
    supercell: tuple[int, int, int]
    displacements: int
    residual_force: float
    min_frequency: float
    max_frequency: float
    imaginary: bool
    zero_point_energy: float
    heat_capacity: float | None


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
    overwrite: bool = False,
    progress: bool = True,
) -> Phonons:
    """Compute harmonic phonons of a crystal from finite displacements of atoms in a supercell.

    Symmetry reduces the number of displacements. The forces of the undisplaced supercell are subtracted from those of
    the displaced ones. The force constants are symmetrized and obey the acoustic sum rule. The non-analytical
    correction for long-range electrostatics is not applied, so polar crystals show no LO-TO splitting at Gamma.

    Files written to ``output``:

    * phonopy_params.yaml: displacements, forces and force constants, for phonopy.
    * band.yaml and phonon.png: bands and density of states.
    * dos.csv: density of states per primitive cell, in 1/THz.
    * thermal.csv and thermal.png: free energy, entropy and heat capacity.
    * phonon.json: the fields of ``Phonons``.

    Ctrl-C stops the calculation. A later call with ``resume`` reuses the forces computed so far, even with another
    ``mesh`` or ``max_temperature``.

    Args:
        atoms: Crystal, periodic along all three axes and without constraints. Not modified.
        calculator: ASE calculator. float64 is recommended.
        output: Output folder, created if absent.
        supercell: Multiples of the three cell vectors. None selects the smallest multiples that satisfy
            ``min_length``.
        min_length: Smallest distance between opposite faces of the supercell, in Angstrom.
        displacement: Length of the displacements, in Angstrom.
        mesh: Density of the q-point mesh for density of states and thermal properties, as a length in Angstrom. The
            number of points along a reciprocal vector is this length times the length of the vector (in 1/Angstrom,
            without 2 pi).
        max_temperature: Highest temperature of the thermal properties, in K; they start at 0 K in steps of 10 K.
        symprec: Symmetry tolerance: largest distance of an atom from its symmetric position, in Angstrom.
        relax_first: Relax positions and cell first, preserving the symmetry.
        fmax: Convergence threshold of this relaxation, in eV/Angstrom; see ``relax``.
        steps: Maximum number of steps of this relaxation.
        resume: Continue the calculation in ``output``.
        overwrite: Replace the calculation in ``output``.
        progress: Show the progress.

    Returns:
        Range of frequencies, stability, zero-point energy and heat capacity.

    Raises:
        FileExistsError: If ``output`` holds a calculation and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is no calculation to resume.
        ImportError: If phonopy or seekpath is not installed.
        RuntimeError: If the relaxation does not converge.
        Stopped: After Ctrl-C (``dpa4.simulation.Stopped``).
        ValueError: If an argument is not allowed, the crystal has charge or spin and the model reads them, or the
            calculation to resume has other arguments, another structure or another model.

    Example:
        Highest frequency in a 4 x 4 x 4 supercell:

            calculator = DPA4Calculator("run/best.safetensors", dtype="float64")
            print(phonons(atoms, calculator, "phonon", supercell=(4, 4, 4)).max_frequency)  # THz
    """
    for module in ("phonopy", "seekpath"):
        require(module, "phonon")
    positive = {"min_length": min_length, "displacement": displacement, "mesh": mesh, "symprec": symprec}
    _check(atoms, supercell, conditioned=reads_charge_spin(calculator), **positive)
    if not 0 <= max_temperature < np.inf:
        raise ValueError(f"max_temperature must be at least 0 K, got {max_temperature}")
    multiples = tuple(supercell) if supercell is not None else supercell_of_length(atoms, min_length)
    folder = user_path(output)
    settings = {
        "supercell": list(multiples), "displacement": displacement, "symprec": symprec, "relax_first": relax_first,
        "fmax": fmax,
    }  # fmt: skip
    run = Calculation(
        folder,
        atoms,
        calculator,
        settings,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        results=FILES,
    )
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
    """Find the smallest multiples of the cell vectors for a supercell of a given width.

    Args:
        atoms: Crystal.
        min_length: Smallest distance between opposite faces of the supercell, in Angstrom.

    Returns:
        Multiples of the three cell vectors.
    """
    distances = 1 / np.linalg.norm(atoms.cell.reciprocal(), axis=1)
    a, b, c = np.ceil(min_length / distances - 1e-6).astype(int).tolist()
    return max(a, 1), max(b, 1), max(c, 1)


def _check(atoms: Atoms, supercell: Sequence[int] | None, *, conditioned: bool, **positive: float) -> None:
    for name, value in positive.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    if supercell is not None and (len(supercell) != 3 or min(supercell) < 1):
        raise ValueError(f"supercell must be three positive multiples, got {tuple(supercell)}")
    if conditioned and charge_and_spin(atoms.info, (0, 1)) != (0, 1):
        raise ValueError(
            "phonons need an uncharged crystal with spin 1, because charge and spin of a supercell are not defined; "
            "remove charge and spin from atoms.info"
        )


def _phonopy(atoms: Atoms, multiples: Sequence[int], displacement: float, symprec: float) -> Any:
    """Create the Phonopy object and its displacements; phonopy needs right-handed cells."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms
    from phonopy.structure.cells import guess_primitive_matrix

    atoms = atoms.copy()
    atoms.set_cell(right_handed(atoms.cell.array))
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
    """Compute properties from the force constants, write the files and return the summary."""
    from phonopy.phonon.band_structure import get_band_qpoints_by_seekpath

    bands, labels, connections = get_band_qpoints_by_seekpath(phonon.primitive, BAND_POINTS)
    phonon.run_band_structure(bands, path_connections=connections, labels=labels)
    phonon.run_mesh(mesh)
    phonon.run_total_dos()
    # The acoustic modes at Gamma, which are below 0.01 THz, would have an unbounded entropy.
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
    save_figure(figure, path, svg=True)


def _ticks(
    distances: list[NDArray[np.float64]], labels: list[str], connections: list[bool]
) -> tuple[list[float], list[str]]:
    """Positions and labels of the ticks of the band plot, at the ends of the lines of the path.

    Where the path jumps to another point, the label joins the names of both points.

    Args:
        distances: Distances along the path, for each line.
        labels: Names of the points. A point where the path jumps is followed by the point that it jumps to.
        connections: For each line, True if the path continues without a jump.
    """
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
    save_figure(figure, path, svg=True)
