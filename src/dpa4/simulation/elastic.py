"""Elastic tensor of a crystal from the stresses of small strains, and the moduli of a polycrystal."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.stress import voigt_6_to_full_3x3_strain
from numpy.typing import NDArray

from dpa4.simulation.runs.parts import Calculation, relaxation
from dpa4.simulation.runs.store import Record, write_csv, write_json
from dpa4.system import new_figure, save_figure

VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")
FRACTIONS = (-1.0, -0.5, 0.5, 1.0)  # of the largest strain


@dataclass(frozen=True)
class Moduli:
    """Moduli in GPa of a polycrystal without texture: bounds of Voigt and Reuss, and their mean after Hill."""

    bulk_voigt: float
    bulk_reuss: float
    bulk: float  # Hill
    shear_voigt: float
    shear_reuss: float
    shear: float  # Hill
    young: float  # of the Hill values
    poisson: float  # of the Hill values
    anisotropy: float  # universal index: 5 G_V / G_R + B_V / B_R - 6, zero for an isotropic crystal


@dataclass(frozen=True)
class Elasticity:
    """Elastic tensor of a crystal."""

    stiffness: NDArray[np.float64]  # (6, 6) GPa, in the order xx, yy, zz, yz, xz, xy; symmetric
    asymmetry: (
        float  # GPa; largest difference between the two values of an element, of which the mean is taken
    )
    stress: NDArray[np.float64]  # (6,) GPa; of the crystal without strain
    stable: bool  # all eigenvalues of the stiffness are positive (Born)
    moduli: Moduli | None  # None unless stable


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
    progress: bool = True,
) -> Elasticity:
    """Strain a crystal along each of the six components, relax the positions, and fit Hooke's law to the stresses.

    Each component takes four strains, -1, -1/2, 1/2 and 1 times ``strain``, so that terms of second order drop out
    of the slopes. Writes into the folder ``output``: elastic.csv (the tensor), stresses.csv, elastic.json and
    elastic.png. Ctrl-C ends with the strain at hand; with ``resume`` a later call goes on.

    Args:
        atoms: Crystal; left as it is. The axes of the tensor are x, y and z of its coordinates.
        calculator: ASE calculator with stress.
        output: Folder, made if absent.
        strain: The largest; of shear the angle, 2 eps_xy.
        relax_first: Relax positions and cell at the start. The constants mean what they should only where the
            crystal is free of stress.
        fmax: Of all relaxations, in eV/Angstrom; see ``relax``.
        steps: Most steps of each relaxation.
        resume: Take over the strains an earlier call has finished.
        progress: Show progress bars on a terminal.

    Raises:
        FileExistsError: If ``output`` holds a calculation and ``resume`` is not set.
        FileNotFoundError: If there is no calculation to resume.
        RuntimeError: If a relaxation does not converge.
        Stopped: After Ctrl-C.
        ValueError: If an argument is not allowed, or the calculation to resume had others.
    """
    if not 0 < strain <= 0.1:
        raise ValueError(f"strain must be positive and at most 0.1, got {strain}")
    folder = Path(output)
    settings = {"strain": strain, "relax_first": relax_first, "fmax": fmax}
    run = Calculation(folder, atoms, calculator, settings, resume=resume, progress=progress)
    start = run.relaxed(atoms, fmax=fmax, steps=steps) if relax_first else atoms.copy()

    def compute(voigt: list[float]) -> Record:
        strained = start.copy()
        deformation = voigt_6_to_full_3x3_strain(voigt)  # with the identity added
        strained.set_cell(start.cell.array @ deformation, scale_atoms=True)
        relaxation(strained, calculator, fmax=fmax, steps=steps)
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
    """Hooke's law, stress = stress at rest + stiffness @ strain, by least squares.

    Args:
        strains: (P, 6) Voigt strains, those of shear as angles; at least one of them is zero.
        stresses: (P, 6) in GPa.
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
    """Moduli of a polycrystal from a positive definite stiffness (6, 6), in its unit."""
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
    """Stresses against strains with the fit: curved lines mean that the strain is too large."""
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
