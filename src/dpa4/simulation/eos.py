"""Energy of a crystal as a function of volume, and the Birch-Murnaghan equation of state."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.eos import EquationOfState as Fit
from ase.eos import birchmurnaghan
from numpy.typing import NDArray

from dpa4.data import with_results, write_structures
from dpa4.interfaces.ase import deviations_of
from dpa4.output import atomic_write, new_figure, save_figure, write_csv, write_json
from dpa4.simulation.crystal_calculation import Calculation, relax_part, structure, structure_record
from dpa4.simulation.runs.store import Record
from dpa4.system import user_path

COLUMNS = ("volume_A3", "energy_eV", "pressure_GPa", "a_A", "b_A", "c_A")
FILES = ("eos.csv", "eos.json", "eos.png", "eos.xyz")


@dataclass(frozen=True)
class EquationOfState:
    """Third-order Birch-Murnaghan equation of state; energy and volume are per cell.

    Attributes:
        volume: Volume of minimum energy, in Angstrom^3.
        energy: Energy at this volume, in eV.
        bulk_modulus: Bulk modulus at this volume, in GPa.
        bulk_modulus_derivative: Derivative of the bulk modulus with respect to pressure, dimensionless.
        lengths: Lengths of the cell vectors at this volume, in Angstrom.
        rms: Root mean square deviation of the energies from the curve, in meV/atom.
    """

    volume: float
    energy: float
    bulk_modulus: float
    bulk_modulus_derivative: float
    lengths: tuple[float, float, float]
    rms: float


def equation_of_state(
    atoms: Atoms,
    calculator: Calculator,
    output: str | Path,
    *,
    points: int = 11,
    span: float = 0.1,
    shape: bool = False,
    relax_first: bool = True,
    fmax: float = 1e-4,
    steps: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> EquationOfState:
    """Fit the equation of state of a crystal to its energies at several volumes.

    Positions are relaxed at every volume. Files written to ``output``:

    * eos.csv: volume, energy, pressure from the stress, and lengths of the cell vectors.
    * eos.json: the fields of ``EquationOfState``.
    * eos.png: energies and pressures with the fitted curve. The pressures do not enter the fit, so they check it.
    * eos.xyz: relaxed structures with their energies.

    Ctrl-C stops the calculation. A later call with ``resume`` continues after the last finished volume.

    Args:
        atoms: Crystal, periodic along all three axes and without constraints. Not modified.
        calculator: ASE calculator with stress.
        output: Output folder, created if absent.
        points: Number of volumes, at least 5.
        span: Range of the volumes: from 1 - span to 1 + span times the initial volume, in equal steps.
        shape: Also relax the shape of the cell at every volume; needed unless symmetry determines the shape.
        relax_first: Relax positions and cell first; the relaxed volume is then the initial volume.
        fmax: Convergence threshold of all relaxations, in eV/Angstrom; see ``relax``.
        steps: Maximum number of steps of each relaxation.
        resume: Continue the calculation in ``output``.
        overwrite: Replace the calculation in ``output``.
        progress: Show the progress.

    Returns:
        Parameters of the equation of state.

    Raises:
        FileExistsError: If ``output`` holds a calculation and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is no calculation to resume.
        RuntimeError: If a relaxation does not converge, or the energies have no minimum among the volumes.
        Stopped: After Ctrl-C (``dpa4.simulation.Stopped``).
        ValueError: If an argument is not allowed, or the calculation to resume has other arguments, another structure
            or another model.

    Example:
        Bulk modulus of a crystal:

            calculator = DPA4Calculator("run/best.safetensors", dtype="float64")
            print(equation_of_state(atoms, calculator, "eos").bulk_modulus)  # GPa
    """
    if points < 5:
        raise ValueError(f"points must be at least 5, one more than the curve has parameters, got {points}")
    if not 0 < span < 1:
        raise ValueError(f"span must be a fraction of the volume between 0 and 1, got {span}")
    folder = user_path(output)
    settings = {"points": points, "span": span, "shape": shape, "relax_first": relax_first, "fmax": fmax}
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
    start = run.relaxed(atoms, fmax=fmax, steps=steps) if relax_first else atoms.copy()

    def compute(factor: float) -> Record:
        strained = start.copy()
        strained.set_cell(start.cell.array * factor ** (1 / 3), scale_atoms=True)
        result = relax_part(strained, calculator, fmax=fmax, steps=steps, cell="shape" if shape else "fixed")
        deviation = {name: v for name, v in deviations_of(calculator).items() if name == "energy_std"}
        return structure_record(strained) | asdict(result) | deviation

    factors = np.linspace(1 - span, 1 + span, points)
    parts = [(f"{factor:.4f}", float(factor)) for factor in factors]
    records = run.run("volumes", parts, compute, "volume")
    return _finish(folder, records, start)


def fit_equation_of_state(
    volumes: NDArray[np.float64], energies: NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """Fit the third-order Birch-Murnaghan equation to P energies.

    Args:
        volumes: Volumes (P,) in Angstrom^3, ascending.
        energies: Energies (P,) in eV.

    Returns:
        Volume of minimum energy (Angstrom^3), energy (eV), bulk modulus (GPa) and its derivative with respect to
        pressure, all at this volume.

    Raises:
        RuntimeError: If the energies have no minimum among the volumes.
    """
    between = 0 < np.argmin(energies) < len(energies) - 1
    fit = Fit(volumes, energies, eos="birchmurnaghan")
    if between:
        fit.fit(warn=False)
    if not between or not volumes[0] < fit.v0 < volumes[-1]:
        raise RuntimeError(
            f"the energies have no minimum between {volumes[0]:.2f} and {volumes[-1]:.2f} Angstrom^3; relax first, "
            "or start from another volume"
        )
    energy, modulus, derivative, volume = fit.eos_parameters
    return float(volume), float(energy), float(modulus / units.GPa), float(derivative)


def birch_murnaghan_pressure(
    volumes: NDArray[np.float64], volume: float, modulus: float, derivative: float
) -> NDArray[np.float64]:
    """Evaluate the pressure of the third-order Birch-Murnaghan equation.

    Args:
        volumes: Volumes (P,), in any unit.
        volume: Volume at zero pressure, in the same unit.
        modulus: Bulk modulus at zero pressure.
        derivative: Derivative of the bulk modulus with respect to pressure.

    Returns:
        Pressures (P,), in the unit of the bulk modulus.
    """
    x = (volume / volumes) ** (1 / 3)
    return 1.5 * modulus * (x**7 - x**5) * (1 + 0.75 * (derivative - 4) * (x**2 - 1))


def _finish(folder: Path, records: list[Record], start: Atoms) -> EquationOfState:
    """Fit the curve to the finished volumes and write the files."""
    volumes, energies, pressures = (
        np.array([record[name] for record in records]) for name in ("volume", "energy", "pressure")
    )
    lengths = np.linalg.norm([record["cell"] for record in records], axis=2)  # (P, 3)
    rows = np.column_stack([volumes, energies, pressures, lengths]).tolist()
    write_csv(folder / "eos.csv", COLUMNS, [dict(zip(COLUMNS, row, strict=True)) for row in rows])
    frames = [with_results(structure(record, start), energy=record["energy"]) for record in records]
    for frame, record in zip(frames, records, strict=True):
        frame.info |= {name: record[name] for name in ("energy_std",) if name in record}  # of a committee
    with atomic_write(folder / "eos.xyz") as temporary:
        write_structures(temporary, frames)
    volume, energy, modulus, derivative = fit_equation_of_state(volumes, energies)
    fitted = birchmurnaghan(volumes, energy, modulus * units.GPa, derivative, volume)
    # Lengths over the cube root of the volume vary slowly, and not at all at constant shape: interpolate these.
    relative = [np.interp(volume, volumes, column / np.cbrt(volumes)) for column in lengths.T]
    a, b, c = (float(length * np.cbrt(volume)) for length in relative)
    rms = 1000 * float(np.sqrt(np.mean((fitted - energies) ** 2))) / len(start)
    result = EquationOfState(volume, energy, modulus, derivative, (a, b, c), rms)
    write_json(folder / "eos.json", asdict(result))
    _plot(folder / "eos.png", volumes, energies, pressures, result, len(start))
    return result


def _plot(
    path: Path,
    volumes: NDArray[np.float64],
    energies: NDArray[np.float64],
    pressures: NDArray[np.float64],
    result: EquationOfState,
    num_atoms: int,
) -> None:
    curve = np.linspace(volumes[0], volumes[-1], 201)
    shape = (result.bulk_modulus, result.bulk_modulus_derivative)
    energy = birchmurnaghan(curve, 0.0, shape[0] * units.GPa, shape[1], result.volume)
    panels = [
        ("energy (meV/atom)", 1000 * (energies - result.energy) / num_atoms, 1000 * energy / num_atoms),
        ("pressure (GPa)", pressures, birch_murnaghan_pressure(curve, result.volume, *shape)),
    ]
    figure = new_figure(7, 5)
    axes = figure.subplots(2, 1, sharex=True)
    for axis, (label, values, line) in zip(axes, panels, strict=True):
        axis.plot(curve / num_atoms, line, linewidth=1, label="Birch-Murnaghan")
        axis.plot(volumes / num_atoms, values, "o", markersize=4, label="computed")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("volume (Å³/atom)")
    save_figure(figure, path)
