"""Definitions of the benchmarks' metrics, as pure functions of arrays.

They follow Matbench Discovery (repository of July 2026; arXiv:2308.14920), arXiv:2408.00755 for the
conductivity, MLIP Arena for curves of diatomic molecules, and the tables of SPICE-MACE-OFF for the
logarithmic mean. NaN stands for a prediction that is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import units
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MAX_FORMATION_ENERGY_ERROR = 5.0  # eV/atom; predictions farther from DFT count as missing
DECIMALS = 3  # of energies in eV/atom before they are classified
RMSD_BASELINE = 0.15
UNMATCHED_RMSD = 1.0
FAILED_SRME = 2.0
SUBSETS = ("full_test_set", "unique_prototypes", "most_stable_10k")
MOST_STABLE = 10_000


@dataclass(frozen=True)
class StabilityMetrics:
    """How well stable crystals are told from unstable ones, and errors of the distances to the hull."""

    F1: float
    DAF: float
    Precision: float
    Recall: float
    Accuracy: float
    TPR: float
    FPR: float
    TNR: float
    FNR: float
    TP: int
    FP: int
    TN: int
    FN: int
    MAE: float  # eV/atom
    RMSE: float  # eV/atom
    R2: float
    missing_preds: int


def stability_metrics(
    each_true: ArrayLike, each_pred: ArrayLike, prevalence: float | None = None
) -> StabilityMetrics:
    r"""Classification of crystals into stable ones, :math:`E_\mathrm{hull} \le 0`, and others.

    .. math::
        P = \frac{TP}{TP + FP}, \quad R = \frac{TP}{TP + FN}, \quad F_1 = \frac{2 P R}{P + R}, \quad
        \mathrm{DAF} = \frac{P}{\text{prevalence}}

    A missing prediction counts as unstable; MAE, RMSE and R2 leave it out. A ratio whose denominator is zero is
    NaN.

    Args:
        each_true: (M,) energies above the convex hull by DFT, eV/atom.
        each_pred: (M,) the same by the model; NaN where there is none.
        prevalence: Fraction of stable crystals that a random choice would find; None takes that of ``each_true``.

    Raises:
        ValueError: If the lengths differ, there is no crystal, or a true value is NaN.
    """
    true, pred = np.asarray(each_true, dtype=float), np.asarray(each_pred, dtype=float)
    if true.shape != pred.shape or true.ndim != 1 or not true.size:
        raise ValueError(f"need two lists of the same length >= 1, got shapes {true.shape} and {pred.shape}")
    if np.isnan(true).any():
        raise ValueError(f"{np.isnan(true).sum()} of the true energies above the hull are NaN")
    stable, called = true <= 0, pred <= 0  # a comparison with NaN is false
    tp, fn = int((stable & called).sum()), int((stable & ~called).sum())
    fp, tn = int((~stable & called).sum()), int((~stable & ~called).sum())
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    present = ~np.isnan(pred)
    error = pred[present] - true[present]
    spread = np.square(true[present] - true[present].mean()).sum() if present.any() else 0.0
    return StabilityMetrics(
        F1=_ratio(2 * precision * recall, precision + recall),
        DAF=_ratio(precision, stable.mean() if prevalence is None else prevalence),
        Precision=precision,
        Recall=recall,
        Accuracy=(tp + tn) / len(true),
        TPR=recall,
        FPR=_ratio(fp, fp + tn),
        TNR=_ratio(tn, fp + tn),
        FNR=_ratio(fn, tp + fn),
        TP=tp,
        FP=fp,
        TN=tn,
        FN=fn,
        MAE=float(np.abs(error).mean()) if error.size else np.nan,
        RMSE=float(np.sqrt(np.square(error).mean())) if error.size else np.nan,
        R2=1 - _ratio(np.square(error).sum(), spread),
        missing_preds=int((~present).sum()),
    )


def discovery_metrics(
    each_true: ArrayLike, e_form_true: ArrayLike, e_form_pred: ArrayLike, unique: ArrayLike
) -> dict[str, StabilityMetrics]:
    r"""Metrics of the leaderboard for all crystals, unique prototypes, and the 10,000 most stable of these.

    The hull is that of DFT, so that :math:`E_\mathrm{hull}^\mathrm{pred} = E_\mathrm{hull} +
    E_f^\mathrm{pred} - E_f`. Predictions of :math:`E_f` more than 5 eV/atom from DFT count as missing; energies are
    rounded to three decimals before they are classified. The leaderboard shows F1 of the unique prototypes. DAF of
    these and of the most stable 10,000 (by prediction) refers to the prevalence among unique prototypes, which is
    taken from energies that are not rounded.

    Args:
        each_true: (M,) energies above the hull by DFT, eV/atom.
        e_form_true: (M,) formation energies by DFT, eV/atom.
        e_form_pred: (M,) predicted formation energies, eV/atom; NaN where there is none.
        unique: (M,) whether the prototype is unique.

    Raises:
        ValueError: As ``stability_metrics``, or if no crystal is unique.
    """
    hull, formation = np.asarray(each_true, dtype=float), np.asarray(e_form_true, dtype=float)
    predicted, chosen = np.array(e_form_pred, dtype=float), np.asarray(unique, dtype=bool)
    if not chosen.any():
        raise ValueError("no crystal is marked as a unique prototype")
    prevalence = float((hull[chosen] <= 0).mean())
    predicted[np.abs(predicted - formation) > MAX_FORMATION_ENERGY_ERROR] = np.nan
    hull, formation, predicted = (values.round(DECIMALS) for values in (hull, formation, predicted))
    each_pred = hull + predicted - formation
    unique_indices = np.flatnonzero(chosen)
    ranked = unique_indices[np.argsort(each_pred[unique_indices], kind="stable")]  # NaN last
    most_stable = ranked[: min(MOST_STABLE, int(np.isfinite(each_pred[ranked]).sum()))]
    metrics = {
        "full_test_set": stability_metrics(hull, each_pred),
        "unique_prototypes": stability_metrics(hull[chosen], each_pred[chosen], prevalence),
    }
    if most_stable.size:
        metrics["most_stable_10k"] = stability_metrics(hull[most_stable], each_pred[most_stable], prevalence)
    return metrics


def mean_rmsd(rmsd: ArrayLike) -> float:
    """Mean of the root mean square distances to the DFT structures, without unit; NaN, no match, counts as 1.

    The distances are those of pymatgen's ``StructureMatcher(stol=1.0, scale=False).get_rms_dist``, which are
    divided by (V/N)^(1/3).

    Raises:
        ValueError: If there is no distance.
    """
    values = np.asarray(rmsd, dtype=float)
    if not values.size:
        raise ValueError("there is no RMSD to average")
    return float(np.where(np.isnan(values), UNMATCHED_RMSD, values).mean())


def srme(
    mode_kappa: ArrayLike, mode_kappa_true: ArrayLike, weight: float, kappa: float, kappa_true: float
) -> float:
    r"""Symmetric relative mean error of a conductivity, resolved by modes; between 0 and 2.

    .. math::
        \mathrm{SRME} = \frac{2}{\kappa + \kappa^\mathrm{DFT}}
        \frac{\sum_{qs} |\kappa_{qs} - \kappa^\mathrm{DFT}_{qs}|}{\sum_q w_q}

    It is 2, too, for a crystal whose conductivity there is not: imaginary frequencies, a space group that changed
    on relaxation, or a failure.

    Args:
        mode_kappa: (Q, S) contributions of the modes, means over the directions, with the weights of their q-points
            in them, W/(m K).
        mode_kappa_true: (Q, S) the same by DFT.
        weight: Sum of the weights of the q-points.
        kappa: Mean of the diagonal of the conductivity, W/(m K).
        kappa_true: The same by DFT.

    Raises:
        ValueError: If the modes are not those of the reference.
    """
    modes, reference = np.asarray(mode_kappa, dtype=float), np.asarray(mode_kappa_true, dtype=float)
    if modes.shape != reference.shape:
        raise ValueError(
            f"modes (q-points, bands) are {modes.shape}, those of the reference {reference.shape}"
        )
    return float(2 * np.abs(modes - reference).sum() / weight / (kappa + kappa_true))


def sre(kappa: float, kappa_true: float) -> float:
    """Symmetric relative error 2 |k - k_DFT| / (k + k_DFT) of a conductivity."""
    return 2 * abs(kappa - kappa_true) / (kappa + kappa_true)


def mean_with_failures(errors: ArrayLike) -> float:
    """Mean of SRME or SRE over materials, in which NaN, a failure, counts as 2.

    Raises:
        ValueError: If there is no error.
    """
    values = np.asarray(errors, dtype=float)
    if not values.size:
        raise ValueError("there is no material to average over")
    return float(np.where(np.isnan(values), FAILED_SRME, values).mean())


def combined_performance_score(f1: float, kappa_srme: float, rmsd: float) -> float:
    r"""CPS of the leaderboard.

    .. math::
        \mathrm{CPS} = 0.5 F_1 + 0.4 \left(1 - \frac{\kappa_\mathrm{SRME}}{2}\right) + 0.1
        \operatorname{clip}_{[0, 1]}\left(1 - \frac{\mathrm{RMSD}}{0.15}\right)

    Args:
        f1: Of the unique prototypes.
        kappa_srme: Mean over the 103 compounds.
        rmsd: Mean over the WBM test set.
    """
    return 0.5 * f1 + 0.4 * (1 - kappa_srme / 2) + 0.1 * float(np.clip(1 - rmsd / RMSD_BASELINE, 0, 1))


# Curves of diatomic molecules. r (R,) are ascending distances in Angstrom, e (R,) energies in eV, f (R,) the force on
# the first atom along the axis towards the second, in eV/Angstrom: f = +dE/dr, positive where the atoms attract.


def tortuosity(e: ArrayLike) -> float:
    """Path of the energy over its least path from the first point to the minimum to the last; 1 without bumps.

    NaN for a constant energy.
    """
    energy = np.asarray(e, dtype=float)
    lowest = energy.min()
    return _ratio(np.abs(np.diff(energy)).sum(), energy[0] - lowest + energy[-1] - lowest)


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
    of both atoms, of which one in three is not zero. The wall is where the energy on the repulsive side of the
    minimum is 1, 5, 10, 20, 50 and 100 eV above it, as far as the reference reaches; a wall that the curve does
    not reach costs its distance in the reference. Bond length and curvature are those of a parabola through the
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
    walls = [
        _wall_error(_wall(curve, height), found)
        for height in WALL_ENERGIES
        if np.isfinite(found := _wall(reference, height))
    ]
    metrics = {
        "pbe_energy_mae": float(
            np.abs((energies[0] - energies[0][-1]) - (energies[1] - energies[1][-1])).mean()
        ),
        "pbe_force_mae": float(np.abs(forces[0] - forces[1]).mean() / 3),
        "pbe_wall_dist_mae": float(np.mean(walls)) if walls else np.nan,
    }
    bond, depth, wavenumber = _well(reference, mass)
    own_bond, own_depth, own_wavenumber = _well(curve, mass)
    bound = depth >= MIN_WELL
    metrics["pbe_bond_length_error"] = abs(own_bond - bond) if bound else np.nan
    metrics["pbe_well_depth_error"] = abs(own_depth - depth) if bound else np.nan
    metrics["pbe_vib_freq_error"] = abs(own_wavenumber - wavenumber) if bound else np.nan
    return metrics


def _wall_error(wall: float, reference: float) -> float:
    return abs(wall - reference) if np.isfinite(wall) else reference


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


def log_mean(values: Sequence[float]) -> float:
    r"""Geometric mean :math:`\exp(\frac{1}{n} \sum_i \ln x_i)`, which is how errors of subsets are put together.

    Raises:
        ValueError: If there is no value, or one is not positive.
    """
    array = np.asarray(values, dtype=float)
    if not array.size or not (array > 0).all():
        raise ValueError(f"the logarithmic mean needs positive values, got {array.tolist()}")
    return float(np.exp(np.log(array).mean()))


def _ratio(numerator: float, denominator: float) -> float:
    """The quotient, NaN if the denominator is zero."""
    return float(numerator / denominator) if denominator else float("nan")
