"""Metrics of the leaderboards: small cases worked by hand, and published numbers that belong together."""

import numpy as np
import pytest

from dpa4.leaderboards.metrics import (
    combined_performance_score,
    discovery_metrics,
    mean_rmsd,
    mean_with_failures,
    sre,
    srme,
    stability_metrics,
)


def test_classification_by_hand():
    # stable by DFT: 1st, 2nd (exactly on the hull), 5th; called stable: 1st, 3rd; the 5th has no prediction
    found = stability_metrics([-0.1, 0.0, 0.2, 0.3, -0.05], [-0.2, 0.1, -0.1, 0.4, np.nan])
    assert (found.TP, found.FN, found.FP, found.TN, found.missing_preds) == (1, 2, 1, 1, 1)
    assert found.Precision == 1 / 2 and found.Recall == found.TPR == 1 / 3
    assert found.F1 == pytest.approx(0.4)  # 2 (1/2 1/3) / (1/2 + 1/3) = (1/3) / (5/6)
    assert found.DAF == pytest.approx(5 / 6)  # (1/2) / (3/5)
    assert (found.Accuracy, found.FPR, found.TNR) == (2 / 5, 1 / 2, 1 / 2)
    assert found.FNR == pytest.approx(2 / 3)
    assert found.MAE == pytest.approx(0.15)  # errors of the first four: -0.1, 0.1, -0.3, 0.1
    assert found.RMSE == pytest.approx(0.03**0.5)  # (0.01 + 0.01 + 0.09 + 0.01) / 4
    # mean of the four true values 0.1, squares about it 0.04 + 0.01 + 0.01 + 0.04 = 0.10; 1 - 0.12 / 0.10
    assert found.R2 == pytest.approx(-0.2)


def test_published_counts_give_the_published_ratios():
    """DPA-4.0.1-Pro on the whole WBM test set, from its file on the leaderboard."""
    counts = {(1, 1): 36943, (0, 1): 7227, (0, 0): 205644, (1, 0): 7149}  # (stable, called stable)
    true = np.concatenate([np.full(n, 0.5 - stable) for (stable, _), n in counts.items()])
    pred = np.concatenate([np.full(n, 0.5 - called) for (_, called), n in counts.items()])
    found = stability_metrics(true, pred)
    assert len(true) == 256963
    published = {"F1": 0.837, "DAF": 4.874, "Precision": 0.836, "Recall": 0.838, "Accuracy": 0.944}
    for name, value in published.items():
        assert round(getattr(found, name), 3) == value


def test_published_acceleration_refers_to_the_unrounded_prevalence_of_unique_prototypes():
    """The same model on the 215,488 unique prototypes and the 10,000 that it finds most stable."""
    # DAF 6.361 and precision 0.9724 of the 10,000; 33,374 of the unique prototypes are stable after rounding, 0.1549
    prevalence = 0.9724 / 6.361
    found = stability_metrics(
        np.repeat([-0.1, 0.1, 0.1, -0.1], [28569, 4751, 177363, 4805]),
        np.repeat([-0.1, -0.1, 0.1, 0.1], [28569, 4751, 177363, 4805]),
        prevalence,
    )
    assert found.TP + found.FP + found.TN + found.FN == 215488
    published = {"F1": 0.857, "DAF": 5.609, "Precision": 0.857, "Recall": 0.856, "Accuracy": 0.956}
    for name, value in published.items():
        assert round(getattr(found, name), 3) == value


def test_ratios_without_a_denominator_are_nan():
    found = stability_metrics([0.1, 0.2], [0.3, np.nan])
    assert np.isnan([found.Precision, found.Recall, found.F1, found.DAF]).all()
    assert found.Accuracy == 1 and found.TNR == 1
    nothing = stability_metrics([-0.1, 0.2], [np.nan, np.nan])
    assert nothing.Recall == 0 and np.isnan([nothing.MAE, nothing.RMSE, nothing.R2]).all()


def test_bad_lists_are_refused():
    with pytest.raises(ValueError, match=r"same length >= 1, got shapes \(1,\) and \(2,\)"):
        stability_metrics([0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match="1 of the true energies above the hull are NaN"):
        stability_metrics([np.nan, 0.1], [0.1, 0.2])
    with pytest.raises(ValueError, match="no crystal is marked as a unique prototype"):
        discovery_metrics([0.1], [0.1], [0.1], [False])


def test_discovery_shifts_rounds_and_masks():
    hull = [0.0004, -0.1, 0.2, 0.1, -0.3]
    formation = [-1.0, -2.0, -1.0, -1.0, -1.0]
    #  as DFT; 0.2 too high; 0.3 too low; 6 eV off, hence missing; not unique
    predicted = [-1.0, -1.8, -1.3, 5.0, -1.0]
    found = discovery_metrics(hull, formation, predicted, [True, True, True, True, False])
    unique = found["unique_prototypes"]
    # 0.0004 is 0.000 after rounding, which is stable; predicted above the hull: 0.0, 0.1, -0.1, missing
    assert (unique.TP, unique.FN, unique.FP, unique.TN, unique.missing_preds) == (1, 1, 1, 1, 1)
    # without rounding one of the four unique prototypes is stable, and the precision is 1/2
    assert unique.DAF == pytest.approx((1 / 2) / (1 / 4))
    whole = found["full_test_set"]
    assert (whole.TP, whole.FN, whole.FP, whole.TN) == (2, 1, 1, 1)
    assert whole.DAF == pytest.approx((2 / 3) / (3 / 5))  # its own prevalence, rounded
    # fewer than 10,000: all unique ones with a prediction; DAF with the prevalence of unique prototypes
    best = found["most_stable_10k"]
    assert (best.TP, best.FN, best.FP, best.TN, best.missing_preds) == (1, 1, 1, 0, 0)
    assert best.DAF == pytest.approx((1 / 2) / (1 / 4))


def test_most_stable_are_ranked_by_distance_to_the_hull():
    rng = np.random.default_rng(0)
    hull, error = rng.uniform(-0.5, 0.5, 12000), rng.normal(0, 0.05, 12000)
    formation = rng.uniform(-3, 0, 12000)
    found = discovery_metrics(hull, formation, formation + error, np.ones(12000))["most_stable_10k"]
    chosen = np.argsort(hull.round(3) + (formation + error).round(3) - formation.round(3), kind="stable")[
        :10000
    ]
    assert found.TP + found.FP + found.TN + found.FN == 10000
    assert found.TP + found.FN == (hull.round(3)[chosen] <= 0).sum()


def test_rmsd_counts_missing_matches_as_one():
    assert mean_rmsd([0.1, np.nan, 0.4]) == pytest.approx(0.5)  # (0.1 + 1 + 0.4) / 3
    with pytest.raises(ValueError, match="no RMSD"):
        mean_rmsd([])


def test_srme_by_hand():
    modes, dft = [[1.0, 2.0], [3.0, 0.0]], [[2.0, 2.0], [1.0, 1.0]]
    # differences 1 + 0 + 2 + 1 = 4; weights 1 + 1; both conductivities are 6 / 2 = 3: errors do not cancel
    assert srme(modes, dft, 2, 3, 3) == pytest.approx(2 * (4 / 2) / (3 + 3))
    assert sre(3, 3) == 0
    assert srme(dft, dft, 2, 3, 3) == 0
    assert srme(np.zeros((2, 2)), dft, 2, 0, 3) == 2  # a prediction of zero is as bad as a failure
    # a negative mode: (3 + 2 + 1 + 4) / 2, times 2, over 0.5 + 3 is 2.9, capped at the value of a failure
    assert srme([[-1.0, 0.0], [0.0, 5.0]], dft, 2, 0.5, 3) == 2
    assert sre(1, 3) == 1  # 2 * 2 / 4
    assert mean_with_failures([0.25, np.nan, 0.75]) == 1  # (0.25 + 2 + 0.75) / 3
    with pytest.raises(ValueError, match=r"modes .* are \(2, 2\), those of the reference \(1, 2\)"):
        srme(modes, dft[:1], 2, 3, 3)


def test_cps_of_published_models():
    # 0.5 * 0.857 + 0.4 * (1 - 0.1057) + 0.1 * (1 - 0.458) = 0.4285 + 0.35772 + 0.0542
    assert combined_performance_score(0.857, 0.2114, 0.0687) == pytest.approx(0.84042)
    table = {  # F1, SRME, RMSD of the paper, which gives them and CPS to three decimals
        0.833: (0.859, 0.255, 0.069), 0.822: (0.851, 0.276, 0.072), 0.804: (0.828, 0.302, 0.075),
        0.781: (0.815, 0.367, 0.079), 0.830: (0.863, 0.275, 0.070), 0.797: (0.831, 0.340, 0.075),
    }  # fmt: skip
    for score, metrics in table.items():
        # half a unit of the last digit in each: 0.0005 (0.5 + 0.2 + 0.67) + 0.0005
        assert combined_performance_score(*metrics) == pytest.approx(score, abs=0.0012)
    assert combined_performance_score(0.8, 0.4, 0.3) == combined_performance_score(0.8, 0.4, 0.15)
