"""Elastic tensor of a crystal from stresses at small strains, and the moduli of a polycrystal."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.stress import voigt_6_to_full_3x3_strain
from numpy.typing import NDArray

from dpa4.output import new_figure, save_figure, write_csv, write_json
from dpa4.simulation.crystal_calculation import Calculation, relax_part
from dpa4.simulation.runs.store import Record
from dpa4.system import user_path

VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")
FRACTIONS = (-1.0, -0.5, 0.5, 1.0)  # in units of the largest strain
FILES = ("elastic.csv", "elastic.json", "elastic.png", "stresses.csv")


@dataclass(frozen=True)
class Moduli:
    """Elastic moduli of a polycrystal without texture.

    Attributes:
        bulk_voigt: Voigt bound of the bulk modulus, B_V, in GPa.
        bulk_reuss: Reuss bound of the bulk modulus, B_R, in GPa.
        bulk: Hill bulk modulus, the mean of both bounds, in GPa.
        shear_voigt: Voigt bound of the shear modulus, G_V, in GPa.
        shear_reuss: Reuss bound of the shear modulus, G_R, in GPa.
        shear: Hill shear modulus, the mean of both bounds, in GPa.
        young: Young's modulus from the Hill values, in GPa.
        poisson: Poisson's ratio from the Hill values.
        anisotropy: Universal anisotropy index, 5 G_V / G_R + B_V / B_R - 6; zero for an isotropic crystal.
    """

    bulk_voigt: float
    bulk_reuss: float
    bulk: float
    shear_voigt: float
    shear_reuss: float
    shear: float
    young: float
    poisson: float
    anisotropy: float


FILES = ("elastic.csv", "elastic.json", "elastic.png", "stresses.csv")


@dataclass(frozen=True)
class Elasticity:
    """Elastic tensor of a crystal, in Voigt order xx, yy, zz, yz, xz, xy.

    Attributes:
        stiffness: Elastic tensor (6, 6) in GPa, symmetric.
        asymmetry: Largest difference between the elements ij and ji of the fitted tensor, in GPa. The stiffness has
            their means.
        stress: Stress (6,) of the crystal without strain, in GPa.
        stable: True if all eigenvalues of the stiffness are positive (Born stability criterion).
        moduli: Moduli of a polycrystal; None unless the crystal is stable.
    """

    stiffness: NDArray[np.float64]
    asymmetry: float
    stress: NDArray[np.float64]
    stable: bool
    moduli: Moduli | None


def elastic_tensor(
    atoms: Atoms,
    calculator: Calculator,
    output: str | Path,
    *,
    strain: float = 0.01,
    relax_first: bool = True,
    fmax: float = 1e-4,
    steps: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Elasticity:
    """Compute the elastic tensor of a crystal from the stresses of strained cells.

    Each of the six strain components is applied with -1, -1/2, 1/2 and 1 times ``strain``, so that second-order terms
    cancel in the slopes. Positions are relaxed at every strain. Hooke's law is fitted to the stresses. Files
    written to ``output``:

    * elastic.csv: the elastic tensor, in GPa.
    * stresses.csv: strains and stresses.
    * elastic.json: the fields of ``Elasticity``.
    * elastic.png: stresses against strains with the fit. Points off the lines indicate that the strain is too large
      or the relaxation incomplete.

    Ctrl-C stops the calculation. A later call with ``resume`` continues after the last finished strain.

    Args:
        atoms: Crystal, periodic along all three axes and without constraints. Not modified. The axes of the tensor
            are the Cartesian axes of the coordinates.
        calculator: ASE calculator with stress.
        output: Output folder, created if absent.
        strain: Largest strain, at most 0.1. For shear components, this is the shear angle (2 eps_xy).
        relax_first: Relax positions and cell first. Elastic constants are well defined only for a crystal free of
            stress.
        fmax: Convergence threshold of all relaxations, in eV/Angstrom; see ``relax``.
        steps: Maximum number of steps of each relaxation.
        resume: Continue the calculation in ``output``.
        overwrite: Replace the calculation in ``output``.
        progress: Show the progress.

    Returns:
        Elastic tensor, stability and moduli.

    Raises:
        FileExistsError: If ``output`` holds a calculation and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is no calculation to resume.
        RuntimeError: If a relaxation does not converge.
        Stopped: After Ctrl-C (``dpa4.simulation.Stopped``).
        ValueError: If an argument is not allowed, or the calculation to resume has other arguments, another structure
            or another model.

    Example:
        Elastic constants of a crystal:

            calculator = DPA4Calculator("run/best.safetensors", dtype="float64")
            print(elastic_tensor(atoms, calculator, "elastic").stiffness)  # (6, 6) GPa
    """
    if not 0 < strain <= 0.1:
        raise ValueError(f"strain must be positive and at most 0.1, got {strain}")
    folder = user_path(output)
    settings = {"strain": strain, "relax_first": relax_first, "fmax": fmax}
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

    def compute(voigt: list[float]) -> Record:
        strained = start.copy()
        deformation = voigt_6_to_full_3x3_strain(voigt)  # includes the identity
        strained.set_cell(start.cell.array @ deformation, scale_atoms=True)
        relax_part(strained, calculator, fmax=fmax, steps=steps)
        return {"strain": voigt, "stress_GPa": (strained.get_stress() / units.GPa).tolist()}

    parts = [("none", [0.0] * 6)]
    for number, component in enumerate(VOIGT):
        for fraction in FRACTIONS:
            voigt = [0.0] * 6
            voigt[number] = fraction * strain
            parts.append((f"{component} {voigt[number]:+.4f}", voigt))
    records = run.run("strains", parts, compute, "strain")
    strains = np.array([record["strain"] for record in records])
    stresses = np.array([record["stress_GPa"] for record in records])
    result = elasticity(strains, stresses)
    _write(folder, strains, stresses, result)
    return result


def elasticity(strains: NDArray[np.float64], stresses: NDArray[np.float64]) -> Elasticity:
    """Fit Hooke's law, stress = stress at zero strain + stiffness @ strain, by least squares.

    Args:
        strains: Voigt strains (P, 6), with shear strains as angles. At least one row is zero.
        stresses: Stresses (P, 6), in GPa.

    Returns:
        Elastic tensor, stability and moduli.
    """
    design = np.column_stack([strains, np.ones(len(strains))])
    solution = np.linalg.lstsq(design, stresses, rcond=None)[0]
    raw = solution[:6].T
    stiffness = (raw + raw.T) / 2
    stable = bool(np.linalg.eigvalsh(stiffness).min() > 0)
    return Elasticity(
        stiffness=stiffness,
        asymmetry=float(np.abs(raw - raw.T).max()),
        stress=stresses[~strains.any(axis=1)].mean(axis=0),
        stable=stable,
        moduli=moduli(stiffness) if stable else None,
    )


def moduli(stiffness: NDArray[np.float64]) -> Moduli:
    """Compute the moduli of a polycrystal without texture.

    Args:
        stiffness: Elastic tensor (6, 6) in Voigt order, positive definite.

    Returns:
        Moduli, in the unit of the stiffness.
    """
    compliance = np.linalg.inv(stiffness)
    c, s = stiffness, compliance
    bulk_voigt = c[:3, :3].sum() / 9
    bulk_reuss = 1 / s[:3, :3].sum()
    across = c[0, 1] + c[0, 2] + c[1, 2]
    shear_voigt = (np.trace(c[:3, :3]) - across + 3 * np.trace(c[3:, 3:])) / 15
    across = s[0, 1] + s[0, 2] + s[1, 2]
    shear_reuss = 15 / (4 * np.trace(s[:3, :3]) - 4 * across + 3 * np.trace(s[3:, 3:]))
    bulk, shear = (bulk_voigt + bulk_reuss) / 2, (shear_voigt + shear_reuss) / 2
    values = {
        "bulk_voigt": bulk_voigt,
        "bulk_reuss": bulk_reuss,
        "bulk": bulk,
        "shear_voigt": shear_voigt,
        "shear_reuss": shear_reuss,
        "shear": shear,
        "young": 9 * bulk * shear / (3 * bulk + shear),
        "poisson": (3 * bulk - 2 * shear) / (6 * bulk + 2 * shear),
        "anisotropy": 5 * shear_voigt / shear_reuss + bulk_voigt / bulk_reuss - 6,
    }
    return Moduli(**{name: float(value) for name, value in values.items()})


def _write(
    folder: Path, strains: NDArray[np.float64], stresses: NDArray[np.float64], result: Elasticity
) -> None:
    columns = ("GPa", *VOIGT)
    rows: list[dict[str, Any]] = [
        dict(zip(columns, (name, *row), strict=True))
        for name, row in zip(VOIGT, result.stiffness.tolist(), strict=True)
    ]
    write_csv(folder / "elastic.csv", columns, rows)
    names = [*(f"strain_{name}" for name in VOIGT), *(f"stress_{name}_GPa" for name in VOIGT)]
    table = np.column_stack([strains, stresses]).tolist()
    write_csv(folder / "stresses.csv", names, [dict(zip(names, row, strict=True)) for row in table])
    write_json(folder / "elastic.json", asdict(result))
    _plot(folder / "elastic.png", strains, stresses, result)


def _plot(
    path: Path, strains: NDArray[np.float64], stresses: NDArray[np.float64], result: Elasticity
) -> None:
    """Plot stresses against strains with the fit; curved lines mean that the strain is too large."""
    figure = new_figure(10, 6)
    panels = figure.subplots(2, 3, sharex=True).flat
    for number, (axis, component) in enumerate(zip(panels, VOIGT, strict=True)):
        own = (strains[:, number] != 0) | ~strains.any(axis=1)
        order = np.argsort(strains[own, number])
        x, y = strains[own, number][order], stresses[own][order]
        for other, name in enumerate(VOIGT):
            (line,) = axis.plot(100 * x, y[:, other], "o", markersize=3, label=name)
            fit = result.stress[other] + result.stiffness[other, number] * x
            axis.plot(100 * x, fit, linewidth=1, color=line.get_color())
        axis.set_title(f"strain {component}")
        axis.grid(alpha=0.3)
    figure.supxlabel("strain (%)")
    figure.supylabel("stress (GPa)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), title="stress", loc="outside right center")
    save_figure(figure, path)
