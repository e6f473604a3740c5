"""Metrics of the curves of diatomic molecules, as pure functions of arrays.

They follow Matbench Discovery (repository of July 2026) and, for ``conservation_deviation``, MLIP Arena.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ase import units
from numpy.typing import ArrayLike, NDArray

from dpa4.leaderboards.metrics import ratio

Array = NDArray[np.float64]

# r (R,) are ascending distances in Angstrom, e (R,) energies in eV, f (R,) the force on
# the first atom along the axis towards the second, in eV/Angstrom: f = +dE/dr, positive where the atoms attract.


def tortuosity(e: ArrayLike) -> float:
    """Path of the energy over its least path from the first point to the minimum to the last; 1 without bumps.

    NaN for a constant energy.
    """
    energy = np.asarray(e, dtype=float)
    lowest = energy.min()
    return ratio(np.abs(np.diff(energy)).sum(), energy[0] - lowest + energy[-1] - lowest)


def _turns(values: ArrayLike, threshold: float) -> tuple[Array, NDArray[np.bool_]]:
    """Differences of neighbours that are not below the threshold, and whether the sign changes after each."""
    steps = np.diff(np.asarray(values, dtype=float))
    steps = steps[(np.abs(steps) >= threshold) & (steps != 0)]
    return steps, np.diff(np.sign(steps)) != 0


def energy_diff_flips(e: ArrayLike) -> int:
    """How often the energy turns from falling to rising or back; steps below 1 meV are passed over."""
    return int(_turns(e, 1e-3)[1].sum())


def _jump(values: ArrayLike, threshold: float) -> float:
    steps, turns = _turns(values, threshold)
    return float(np.abs(steps[:-1][turns]).sum() + np.abs(steps[1:][turns]).sum())


def energy_jump(e: ArrayLike) -> float:
    """Sum of the two steps of the energy at each of its turns, in eV; steps below 1 meV are passed over."""
    return _jump(e, 1e-3)


def force_flips(f: ArrayLike) -> int:
    """How often the force changes its sign; forces below 0.01 eV/Angstrom are passed over. A bond has one flip."""
    force = np.asarray(f, dtype=float)
    return int((np.diff(np.sign(force[np.abs(force) >= 1e-2])) != 0).sum())


def force_jump(f: ArrayLike) -> float:
    """Sum of the two steps of the force at each of its turns, in eV/Angstrom."""
    return _jump(f, 0.0)


def force_total_variation(f: ArrayLike) -> float:
    """Sum of the steps of the force, in eV/Angstrom."""
    return float(np.abs(np.diff(np.asarray(f, dtype=float))).sum())


def smoothness(r: ArrayLike, e: ArrayLike) -> float:
    """Root mean square of the second derivative of the energy by differences, in eV/Angstrom^2; lower is smoother."""
    distance = np.asarray(r, dtype=float)
    curvature = np.gradient(np.gradient(np.asarray(e, dtype=float), distance), distance)
    return float(np.sqrt(np.square(curvature).mean()))


def conservation_deviation(r: ArrayLike, e: ArrayLike, f: ArrayLike) -> float:
    """Mean distance of the force from the derivative of the energy by differences, in eV/Angstrom.

    Zero for forces that are a derivative, up to the error of the differences.
    """
    slope = np.gradient(np.asarray(e, dtype=float), np.asarray(r, dtype=float))
    return float(np.abs(np.asarray(f, dtype=float) - slope).mean())


@dataclass(frozen=True)
class Curve:
    """A diatomic molecule at ascending distances."""

    distances: Array  # (R,) Angstrom
    energies: Array  # (R,) eV
    forces: Array  # (R,) on the first atom along the axis towards the second, eV/Angstrom

    def __post_init__(self) -> None:
        """Refuse what is not a curve."""
        lengths = {len(self.distances), len(self.energies), len(self.forces)}
        if len(lengths) != 1 or len(self.distances) < 2:
            raise ValueError("a curve needs at least two distances, each with an energy and a force")
        if not (np.diff(self.distances) > 0).all():
            raise ValueError("the distances of a curve must ascend")

    def within(self, window: tuple[float, float]) -> "Curve":
        """The part of the curve whose distances lie in a window."""
        inside = (self.distances >= window[0]) & (self.distances <= window[1])
        return Curve(self.distances[inside], self.energies[inside], self.forces[inside])


GRID = 200  # points on which two curves are compared
WALL_ENERGIES = (1, 5, 10, 20, 50, 100)  # eV above the minimum
MIN_WELL = 0.05  # eV; no bond is looked for in a reference whose well is shallower


def curve_metrics(curve: Curve) -> dict[str, float]:
    """Metrics that need no reference, by their names in the leaderboard's file."""
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
    r"""Errors of a curve with respect to one of DFT, by their names in the leaderboard's file.

    Energies and forces are compared on 200 points, equally spaced where the two curves overlap, by linear
    interpolation; energies are zero at the last of them. The force error is a mean over the Cartesian components
    of both atoms, of which one in three is not zero. Bond length and curvature are those of a parabola through the
    five points about the minimum; the well is as deep as the last point lies above the minimum. These three are
    NaN for a reference whose well is shallower than 0.05 eV.

    Args:
        curve: The prediction.
        reference: The curve of DFT.
        mass: Of an atom, in u.
    """
    low = max(curve.distances[0], reference.distances[0])
    high = min(curve.distances[-1], reference.distances[-1])
    if not low < high:
        raise ValueError(f"the curves do not overlap: {curve.distances[0]:.3f} to {curve.distances[-1]:.3f} and "
                         f"{reference.distances[0]:.3f} to {reference.distances[-1]:.3f} Angstrom")  # fmt: skip
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
    """Error of the distance of the repulsive wall, ``pbe_wall_dist_mae``, in Angstrom.

    The wall is where the energy on the repulsive side of the minimum is 1, 5, 10, 20, 50 and 100 eV above it, as far
    as the reference reaches. A wall that the curve does not reach costs its distance in the reference. NaN if the
    reference does not rise by 1 eV.
    """
    errors = []
    for height in WALL_ENERGIES:
        wall, expected = _wall(curve, height), _wall(reference, height)
        if np.isfinite(expected):
            errors.append(abs(wall - expected) if np.isfinite(wall) else expected)
    return float(np.mean(errors)) if errors else float("nan")


def _wall(curve: Curve, height: float) -> float:
    """Distance at which the repulsive side has risen to a height above the minimum; NaN if it does not."""
    lowest = int(np.argmin(curve.energies))
    rise = np.maximum.accumulate(curve.energies[lowest::-1] - curve.energies[lowest])
    if lowest == 0 or rise[-1] < height:
        return np.nan
    heights, first = np.unique(rise, return_index=True)  # a wall that falls back keeps its first distance
    return float(np.interp(height, heights, curve.distances[lowest::-1][first]))


def _well(curve: Curve, mass: float) -> tuple[float, float, float]:
    """Bond length (Angstrom), depth (eV) and wavenumber (1/cm; NaN where the energy does not curve upwards)."""
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
    frequency = np.sqrt(2 * square / (mass / 2)) * units._hbar * units.J * units.s  # eV, by ASE's time unit
    bond = vertex if near[0] <= vertex <= near[-1] else r[lowest]
    return float(bond), depth, float(frequency / units.invcm)


# Score of the diatomics task: pillar -> (weight, its metrics: (weight, floor, baseline))
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
    r"""CDS of the leaderboard: a weighted mean of scores, times the fraction of the 87 elements that have a curve.

    The score of a metric is :math:`\operatorname{clip}_{[0, 1]}(1 - (x - \text{floor}) /
    (\text{baseline} - \text{floor}))`, that of the run time with logarithms. Weights: accuracy 4/9, geometry 2/9,
    physicality 2/9, speed 1/9.

    Args:
        values: Means over the elements by their names, and ``run_time_sec``.
        coverage: Fraction of the elements.

    Returns:
        NaN if a value is missing.
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
