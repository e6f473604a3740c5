"""Definitions of the benchmarks' metrics, as pure functions of arrays.

They follow Matbench Discovery (repository of July 2026; arXiv:2308.14920), arXiv:2408.00755 for the
conductivity, and the tables of SPICE-MACE-OFF for the logarithmic mean. NaN stands for a prediction that is
missing. Those of diatomic molecules are in ``curves``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MAX_FORMATION_ENERGY_ERROR = 5.0  # eV/atom; predictions farther from DFT count as missing
DECIMALS = 3  # of energies in eV/atom before they are classified
RMSD_BASELINE = 0.15
UNMATCHED_RMSD = 1.0
FAILED_SRME = 2.0  # also the largest: negative contributions of modes could make more of it
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
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    present = ~np.isnan(pred)
    error = pred[present] - true[present]
    spread = np.square(true[present] - true[present].mean()).sum() if present.any() else 0.0
    return StabilityMetrics(
        F1=ratio(2 * precision * recall, precision + recall),
        DAF=ratio(precision, stable.mean() if prevalence is None else prevalence),
        Precision=precision,
        Recall=recall,
        Accuracy=(tp + tn) / len(true),
        TPR=recall,
        FPR=ratio(fp, fp + tn),
        TNR=ratio(tn, fp + tn),
        FNR=ratio(fn, tp + fn),
        TP=tp,
        FP=fp,
        TN=tn,
        FN=fn,
        MAE=float(np.abs(error).mean()) if error.size else np.nan,
        RMSE=float(np.sqrt(np.square(error).mean())) if error.size else np.nan,
        R2=1 - ratio(np.square(error).sum(), spread),
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
    divided by (V/N)^(1/3). The leaderboard leaves out crystals of which there is no relaxed structure; passed as
    NaN they count as 1, which is never better.

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
    on relaxation, or a failure; and where negative contributions of modes would make it larger.

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
    return min(FAILED_SRME, float(2 * np.abs(modes - reference).sum() / weight / (kappa + kappa_true)))


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


def log_mean(values: Sequence[float]) -> float:
    r"""Geometric mean :math:`\exp(\frac{1}{n} \sum_i \ln x_i)`, which is how errors of subsets are put together.

    Raises:
        ValueError: If there is no value, or one is not positive.
    """
    array = np.asarray(values, dtype=float)
    if not array.size or not (array > 0).all():
        raise ValueError(f"the logarithmic mean needs positive values, got {array.tolist()}")
    return float(np.exp(np.log(array).mean()))


def ratio(numerator: float, denominator: float) -> float:
    """The quotient, NaN if the denominator is zero."""
    return float(numerator / denominator) if denominator else float("nan")
