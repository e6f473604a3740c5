"""Metrics of the published benchmarks, as pure functions of arrays.

Sources: Matbench Discovery (repository of July 2026; arXiv:2308.14920), arXiv:2408.00755 for the conductivity, and
the tables of SPICE-MACE-OFF for the logarithmic mean. NaN stands for a missing prediction. The metrics of diatomic
molecules are in ``curves``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MAX_FORMATION_ENERGY_ERROR = 5.0  # eV/atom; predictions farther from DFT count as missing
DECIMALS = 3  # of energies in eV/atom, before classification
RMSD_BASELINE = 0.15
UNMATCHED_RMSD = 1.0
FAILED_SRME = 2.0  # also the maximum: negative mode contributions could cause larger values
MOST_STABLE = 10_000


@dataclass(frozen=True)
class StabilityMetrics:
    """Classification of crystals as stable or unstable, and errors of the energies above the hull."""

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
    r"""Classify crystals as stable, :math:`E_\mathrm{hull} \le 0`, or unstable, and compare with DFT.

    .. math::
        P = \frac{TP}{TP + FP}, \quad R = \frac{TP}{TP + FN}, \quad F_1 = \frac{2 P R}{P + R}, \quad
        \mathrm{DAF} = \frac{P}{\text{prevalence}}

    A missing prediction counts as unstable and does not enter MAE, RMSE and R2. A ratio with denominator zero is NaN.

    Args:
        each_true: (M,) energies above the convex hull by DFT, eV/atom.
        each_pred: (M,) energies above the hull by the model, eV/atom; NaN for a missing prediction.
        prevalence: Fraction of stable crystals that a random choice would find; None computes it from ``each_true``.

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
    r"""Metrics of the leaderboard for all crystals, unique prototypes, and the 10,000 most stable prototypes.

    The hull is the DFT hull, so that :math:`E_\mathrm{hull}^\mathrm{pred} = E_\mathrm{hull} +
    E_f^\mathrm{pred} - E_f`. Predictions of :math:`E_f` more than 5 eV/atom from DFT count as missing; energies are
    rounded to three decimals before classification. The leaderboard shows F1 of the unique prototypes. DAF of the
    unique prototypes and of the 10,000 most stable ones (by prediction) refers to the prevalence among unique
    prototypes, computed from energies before rounding.

    Args:
        each_true: (M,) energies above the hull by DFT, eV/atom.
        e_form_true: (M,) formation energies by DFT, eV/atom.
        e_form_pred: (M,) predicted formation energies, eV/atom; NaN for a missing prediction.
        unique: (M,) True for a unique prototype.

    Returns:
        Metrics by subset: "full_test_set", "unique_prototypes" and, if there is a prediction, "most_stable_10k".

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
    """Mean root mean square distance to the DFT structures, dimensionless; NaN (no match) counts as 1.

    The distances come from pymatgen's ``StructureMatcher(stol=1.0, scale=False).get_rms_dist``, which divides them
    by (V/N)^(1/3). The leaderboard omits crystals without a relaxed structure. Passed as NaN, such crystals count
    as 1 here, which never improves the mean.

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
    r"""Symmetric relative mean error of a mode-resolved conductivity, between 0 and 2.

    .. math::
        \mathrm{SRME} = \frac{2}{\kappa + \kappa^\mathrm{DFT}}
        \frac{\sum_{qs} |\kappa_{qs} - \kappa^\mathrm{DFT}_{qs}|}{\sum_q w_q}

    Crystals without a usable conductivity (imaginary frequencies, changed space group, failed run) count as 2.
    Values above 2, which negative mode contributions can cause, are capped at 2.

    Args:
        mode_kappa: (Q, S) contributions of the modes, averaged over the directions and multiplied by the weights of
            their q-points, W/(m K).
        mode_kappa_true: (Q, S) contributions by DFT, W/(m K).
        weight: Sum of the weights of the q-points.
        kappa: Mean of the diagonal of the conductivity, W/(m K).
        kappa_true: Mean of the diagonal by DFT, W/(m K).

    Raises:
        ValueError: If the numbers of q-points and bands differ from the reference.
    """
    modes, reference = np.asarray(mode_kappa, dtype=float), np.asarray(mode_kappa_true, dtype=float)
    if modes.shape != reference.shape:
        raise ValueError(
            f"modes (q-points, bands) are {modes.shape}, those of the reference {reference.shape}; use the same mesh"
        )
    return min(FAILED_SRME, float(2 * np.abs(modes - reference).sum() / weight / (kappa + kappa_true)))


def sre(kappa: float, kappa_true: float) -> float:
    """Symmetric relative error 2 |k - k_DFT| / (k + k_DFT) of a conductivity."""
    return 2 * abs(kappa - kappa_true) / (kappa + kappa_true)


def mean_with_failures(errors: ArrayLike) -> float:
    """Mean of SRME or SRE over materials; NaN (a failure) counts as 2.

    Raises:
        ValueError: If there is no error.
    """
    values = np.asarray(errors, dtype=float)
    if not values.size:
        raise ValueError("there is no material to average over")
    return float(np.where(np.isnan(values), FAILED_SRME, values).mean())


def combined_performance_score(f1: float, kappa_srme: float, rmsd: float) -> float:
    r"""Combined performance score (CPS) of the leaderboard.

    .. math::
        \mathrm{CPS} = 0.5 F_1 + 0.4 \left(1 - \frac{\kappa_\mathrm{SRME}}{2}\right) + 0.1
        \operatorname{clip}_{[0, 1]}\left(1 - \frac{\mathrm{RMSD}}{0.15}\right)

    Args:
        f1: F1 of the unique prototypes.
        kappa_srme: Mean SRME of the 103 compounds.
        rmsd: Mean RMSD of the WBM test set.
    """
    return 0.5 * f1 + 0.4 * (1 - kappa_srme / 2) + 0.1 * float(np.clip(1 - rmsd / RMSD_BASELINE, 0, 1))


def log_mean(values: Sequence[float]) -> float:
    r"""Geometric mean :math:`\exp(\frac{1}{n} \sum_i \ln x_i)`, which combines the errors of subsets.

    Raises:
        ValueError: If there is no value, or one is not positive.
    """
    array = np.asarray(values, dtype=float)
    if not array.size or not (array > 0).all():
        raise ValueError(f"the logarithmic mean needs positive values, got {array.tolist()}")
    return float(np.exp(np.log(array).mean()))


def ratio(numerator: float, denominator: float) -> float:
    """Quotient; NaN if the denominator is zero."""
    return float(numerator / denominator) if denominator else float("nan")
