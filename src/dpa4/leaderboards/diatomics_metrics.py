"""Metrics of energy and force curves of diatomic molecules, as pure functions of arrays.

Sources: Matbench Discovery (repository of July 2026) and, for ``conservation_deviation``, MLIP Arena.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ase import units
from numpy.typing import ArrayLike, NDArray

from dpa4.leaderboards.metrics import ratio

Array = NDArray[np.float64]

# Arguments of the metrics: r (R,) are ascending distances in Angstrom, e (R,) energies in eV, f (R,) the force on the
# first atom along the axis towards the second, in eV/Angstrom: f = +dE/dr, positive where the atoms attract.


def tortuosity(e: ArrayLike) -> float:
    """Total variation of the energy, relative to that of the direct way down to the minimum and up again.

    1 for a curve without bumps, NaN for a constant energy.
    """
    energy = np.asarray(e, dtype=float)
    lowest = energy.min()
    return ratio(np.abs(np.diff(energy)).sum(), energy[0] - lowest + energy[-1] - lowest)


def _turns(values: ArrayLike, threshold: float) -> tuple[Array, NDArray[np.bool_]]:
    """Find the steps between neighbouring values that reach the threshold, and the sign changes between steps.

    Returns:
        Steps (K,), and sign changes (K - 1,).
    """
    steps = np.diff(np.asarray(values, dtype=float))
    steps = steps[(np.abs(steps) >= threshold) & (steps != 0)]
    return steps, np.diff(np.sign(steps)) != 0


def energy_diff_flips(e: ArrayLike) -> int:
    """Number of turns of the energy from falling to rising or back; steps below 1 meV are ignored."""
    return int(_turns(e, 1e-3)[1].sum())


def _jump(values: ArrayLike, threshold: float) -> float:
    """Sum of the steps before and after each turn."""
    steps, turns = _turns(values, threshold)
    return float(np.abs(steps[:-1][turns]).sum() + np.abs(steps[1:][turns]).sum())


def energy_jump(e: ArrayLike) -> float:
    """Sum of the steps of the energy before and after each turn, in eV; steps below 1 meV are ignored."""
    return _jump(e, 1e-3)


def force_flips(f: ArrayLike) -> int:
    """Number of sign changes of the force; forces below 0.01 eV/Angstrom are ignored. A single bond has one."""
    force = np.asarray(f, dtype=float)
    return int((np.diff(np.sign(force[np.abs(force) >= 1e-2])) != 0).sum())


def force_jump(f: ArrayLike) -> float:
    """Sum of the steps of the force before and after each turn, in eV/Angstrom."""
    return _jump(f, 0.0)


def force_total_variation(f: ArrayLike) -> float:
    """Total variation: sum of the absolute steps of the force, in eV/Angstrom."""
    return float(np.abs(np.diff(np.asarray(f, dtype=float))).sum())


def smoothness(r: ArrayLike, e: ArrayLike) -> float:
    """Root mean square second derivative of the energy, in eV/Angstrom^2; lower is smoother.

    The derivative is computed by finite differences.
    """
    distance = np.asarray(r, dtype=float)
    curvature = np.gradient(np.gradient(np.asarray(e, dtype=float), distance), distance)
    return float(np.sqrt(np.square(curvature).mean()))


def conservation_deviation(r: ArrayLike, e: ArrayLike, f: ArrayLike) -> float:
    """Mean absolute difference of the force from the finite-difference slope of the energy, in eV/Angstrom.

    Zero for conservative forces, up to the error of the finite differences.
    """
    slope = np.gradient(np.asarray(e, dtype=float), np.asarray(r, dtype=float))
    return float(np.abs(np.asarray(f, dtype=float) - slope).mean())


@dataclass(frozen=True)
class Curve:
    """Energies and forces of a diatomic molecule at ascending distances."""

    distances: Array  # (R,) Angstrom
    energies: Array  # (R,) eV
    forces: Array  # (R,) on the first atom along the axis towards the second, eV/Angstrom

    def __post_init__(self) -> None:
        """Check lengths and order."""
        lengths = {len(self.distances), len(self.energies), len(self.forces)}
        if len(lengths) != 1 or len(self.distances) < 2:
            raise ValueError("a curve needs at least two distances, each with an energy and a force")
        if not (np.diff(self.distances) > 0).all():
            raise ValueError("the distances of a curve must ascend")

    def within(self, window: tuple[float, float]) -> "Curve":
        """Part of the curve with distances in a window, ends included."""
        inside = (self.distances >= window[0]) & (self.distances <= window[1])
        return Curve(self.distances[inside], self.energies[inside], self.forces[inside])


GRID = 200  # points at which two curves are compared
WALL_ENERGIES = (1, 5, 10, 20, 50, 100)  # eV above the minimum
MIN_WELL = 0.05  # eV; a reference with a shallower well has no bond to compare


def curve_metrics(curve: Curve) -> dict[str, float]:
    """Metrics that need no reference, under their names in the leaderboard's file."""
    r, e, f = curve.distances, curve.energies, curve.forces
    return {
        "tortuosity": tortuosity(e),
        "energy_diff_flips": energy_diff_flips(e),
        "energy_jump": energy_jump(e),
        "force_flips": force_flips(f),
        "force_total_variation": force_total_variation(f),
        "force_jump": force_jump(f),
        "smoothness": smoothness(r, e),
        "conservation_deviation": conservation_deviation(r, e, f),
    }


def reference_metrics(curve: Curve, reference: Curve, mass: float) -> dict[str, float]:
    r"""Errors of a curve relative to a DFT curve, under their names in the leaderboard's file.

    Energies and forces are interpolated linearly at 200 equally spaced points where the two curves overlap; energies
    are relative to the last of these points. The force error is a mean over the Cartesian components of both atoms,
    of which two in three are zero. Bond length and curvature come from a parabola through the five points around the
    minimum. The depth of the well is the energy of the last point above the minimum. The errors of bond length, depth
    and vibrational frequency are NaN if the well of the reference is shallower than 0.05 eV.

    Args:
        curve: Predicted curve.
        reference: DFT curve.
        mass: Mass of an atom, in u.

    Raises:
        ValueError: If the curves do not overlap.
    """
    low = max(curve.distances[0], reference.distances[0])
    high = min(curve.distances[-1], reference.distances[-1])
    if not low < high:
        raise ValueError(
            f"the curves do not overlap: {curve.distances[0]:.3f} to {curve.distances[-1]:.3f} and "
            f"{reference.distances[0]:.3f} to {reference.distances[-1]:.3f} Angstrom"
        )
    grid = np.linspace(low, high, GRID)
    energies = [np.interp(grid, c.distances, c.energies) for c in (curve, reference)]
    forces = [np.interp(grid, c.distances, c.forces) for c in (curve, reference)]
    metrics = {
        "pbe_energy_mae": float(
            np.abs((energies[0] - energies[0][-1]) - (energies[1] - energies[1][-1])).mean()
        ),
        "pbe_force_mae": float(np.abs(forces[0] - forces[1]).mean() / 3),
    }
    bond, depth, wavenumber = _well(reference, mass)
    own_bond, own_depth, own_wavenumber = _well(curve, mass)
    bound = depth >= MIN_WELL
    metrics["pbe_bond_length_error"] = abs(own_bond - bond) if bound else np.nan
    metrics["pbe_well_depth_error"] = abs(own_depth - depth) if bound else np.nan
    metrics["pbe_vib_freq_error"] = abs(own_wavenumber - wavenumber) if bound else np.nan
    return metrics


def wall_error(curve: Curve, reference: Curve) -> float:
    """Mean error of the position of the repulsive wall, ``pbe_wall_dist_mae``, in Angstrom.

    The position is compared at energies of 1, 5, 10, 20, 50 and 100 eV above the minimum, as far as the reference
    reaches. If the curve does not reach one of these energies, the error there is the distance in the reference. NaN
    if the reference does not rise by 1 eV.
    """
    errors = []
    for height in WALL_ENERGIES:
        wall, expected = _wall(curve, height), _wall(reference, height)
        if np.isfinite(expected):
            errors.append(abs(wall - expected) if np.isfinite(wall) else expected)
    return float(np.mean(errors)) if errors else float("nan")


def _wall(curve: Curve, height: float) -> float:
    """Distance at which the repulsive side reaches a height above the minimum, in Angstrom; NaN if it does not."""
    lowest = int(np.argmin(curve.energies))
    rise = np.maximum.accumulate(curve.energies[lowest::-1] - curve.energies[lowest])
    if lowest == 0 or rise[-1] < height:
        return np.nan
    # Where the wall falls back, the first distance counts.
    heights, first = np.unique(rise, return_index=True)
    return float(np.interp(height, heights, curve.distances[lowest::-1][first]))


def _well(curve: Curve, mass: float) -> tuple[float, float, float]:
    """Bond length (Angstrom), depth (eV) and wavenumber (1/cm; NaN if the fitted parabola opens downwards)."""
    r, e = curve.distances, curve.energies
    lowest = int(np.argmin(e))
    depth = float(e[-1] - e[lowest])
    start = min(max(0, lowest - 2), max(0, len(r) - 5))
    near, energy = r[start : start + 5], e[start : start + 5]
    if len(near) < 3:
        return float(r[lowest]), depth, np.nan
    square, linear, _ = np.polyfit(near, energy, 2)
    if square <= 0:
        return float(r[lowest]), depth, np.nan
    vertex = -linear / (2 * square)
    frequency = np.sqrt(2 * square / (mass / 2)) * units._hbar * units.J * units.s  # eV; ASE's unit of time
    bond = vertex if near[0] <= vertex <= near[-1] else r[lowest]
    return float(bond), depth, float(frequency / units.invcm)


# Score of the diatomics task: pillar -> (weight, {metric: (weight within the pillar, floor, baseline)}).
CDS_PILLARS: dict[str, tuple[float, dict[str, tuple[float, float, float]]]] = {
    "accuracy": (4 / 9, {"pbe_energy_mae": (5 / 9, 0, 4), "pbe_force_mae": (4 / 9, 0, 5)}),
    "geometry": (
        2 / 9,
        {
            "pbe_wall_dist_mae": (1 / 2, 0, 0.5),
            "pbe_bond_length_error": (1 / 3, 0, 0.8),
            "pbe_well_depth_error": (1 / 6, 0, 3.5),
        },
    ),
    "physicality": (
        2 / 9,
        {"energy_jump": (2 / 5, 0, 3), "force_flips": (2 / 5, 1, 3.5), "tortuosity": (1 / 5, 1, 2)},
    ),
    "speed": (1 / 9, {"run_time_sec": (1, 50, 5000)}),
}


def combined_diatomics_score(values: Mapping[str, float], coverage: float) -> float:
    r"""Combined diatomics score (CDS) of the leaderboard: weighted mean of scores times coverage.

    The score of a metric is :math:`\operatorname{clip}_{[0, 1]}(1 - (x - \text{floor}) /
    (\text{baseline} - \text{floor}))`; for the run time, all three are replaced by their logarithms. Weights:
    accuracy 4/9, geometry 2/9, physicality 2/9, speed 1/9.

    Args:
        values: Mean of each metric over the elements, and ``run_time_sec``.
        coverage: Fraction of the 87 scored elements that have a curve.

    Returns:
        Score between 0 and 1; NaN if a value is missing.
    """
    score = 0.0
    for name, (weight, parts) in CDS_PILLARS.items():
        for metric, (part, floor, baseline) in parts.items():
            value = values.get(metric, np.nan)
            if name == "speed":
                value, floor, baseline = (
                    float(np.log(x)) if x > 0 else np.nan for x in (value, floor, baseline)
                )
            score += weight * part * float(np.clip(1 - (value - floor) / (baseline - floor), 0, 1))
    return score * coverage
