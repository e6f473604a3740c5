"""Metrics of the benchmarks: small cases worked by hand, and numbers that were published together."""

import numpy as np
import pytest
from ase.calculators.lj import LennardJones

from dpa4.simulation.bench.diatomics import homonuclear_curve
from dpa4.simulation.bench.kappa import imaginary, shares
from dpa4.simulation.bench.metrics import (
    Curve,
    combined_diatomics_score,
    combined_performance_score,
    conservation_deviation,
    discovery_metrics,
    energy_diff_flips,
    energy_jump,
    force_flips,
    force_jump,
    force_total_variation,
    log_mean,
    mean_rmsd,
    mean_with_failures,
    reference_metrics,
    smoothness,
    sre,
    srme,
    stability_metrics,
    tortuosity,
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
    assert srme(np.zeros((2, 2)), dft, 2, 0, 3) == 2  # nothing right is as bad as a failure
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


def test_turns_of_a_curve_by_hand():
    e = [3.0, 0.0, 2.0, 1.0, 2.0]
    assert tortuosity(e) == 7 / 5  # 3 + 2 + 1 + 1 over (3 - 0) + (2 - 0)
    assert energy_diff_flips(e) == 3  # down, up, down, up
    assert energy_jump(e) == 10  # (3 + 2) + (2 + 1) + (1 + 1)
    assert energy_diff_flips([1.0, 0.5, 0.5005, 0.2]) == 0  # 0.5 meV upwards is passed over
    f = [-5.0, -1.0, 0.005, 2.0, -1.0, -0.002]
    assert force_flips(f) == 2  # - - (0) + - (0)
    assert force_jump([-5.0, -1.0, 2.0, -1.0]) == 6  # steps 4, 3, -3: one turn
    assert force_total_variation([-5.0, -1.0, 2.0, -1.0]) == 10
    assert np.isnan(tortuosity([1.0, 1.0]))


def test_smoothness_and_conservation_of_a_parabola():
    r = np.linspace(1, 3, 2001)
    assert smoothness(r, r**2) == pytest.approx(2, abs=2e-3)  # only two of 2001 points feel the ends
    # differences are exact for a parabola but at the two ends, where they are wrong by the spacing 0.001
    assert conservation_deviation(r, r**2, 2 * r) == pytest.approx(2 * 0.001 / 2001, rel=1e-6)
    assert conservation_deviation(r, r**2, 2 * r + 0.5) == pytest.approx(0.5, abs=1e-5)


def test_errors_with_respect_to_a_reference_by_hand():
    r = np.linspace(0.4, 2.4, 401)
    curve, reference = (Curve(r, k * (r - r0) ** 2, 2 * k * (r - r0)) for k, r0 in ((10, 1.5), (40, 1.4)))
    found = reference_metrics(curve, reference, 1.008)
    assert found["pbe_bond_length_error"] == pytest.approx(0.1)
    # depths 10 * 0.9^2 = 8.1 and 40 * 1^2 = 40
    assert found["pbe_well_depth_error"] == pytest.approx(31.9)
    # wavenumber sqrt(20 eV/A^2 / 0.504 u) / (2 pi c) = 3285.0 / cm, and twice that of four times the curvature
    assert found["pbe_vib_freq_error"] == pytest.approx(3285.0, abs=0.1)
    # walls at 1.4 - sqrt(E / 40) and 1.5 - sqrt(E / 10) for E = 1, 5, 10, 20 (the reference reaches 40);
    # the curve reaches 10 * 1.1^2 = 12.1, so that 20 costs all of 1.4 - sqrt(1 / 2)
    walls = [abs(1.5 - (E / 10) ** 0.5 - 1.4 + (E / 40) ** 0.5) for E in (1, 5, 10)] + [1.4 - 0.5**0.5]
    assert found["pbe_wall_dist_mae"] == pytest.approx(np.mean(walls), abs=1e-3)  # linear between points
    same = reference_metrics(reference, reference, 1.008)
    assert all(value == 0 for value in same.values())
    shifted = reference_metrics(Curve(r, reference.energies + 3, reference.forces + 0.3), reference, 1.008)
    assert shifted["pbe_energy_mae"] == pytest.approx(0, abs=1e-12)
    assert shifted["pbe_force_mae"] == pytest.approx(0.1)  # of the three components one is wrong


def test_shallow_references_have_no_bond():
    r = np.linspace(1, 3, 50)
    flat = Curve(r, 0.04 * (r - 2) ** 2, 0.08 * (r - 2))
    found = reference_metrics(flat, flat, 4.0)
    assert np.isnan([found[n] for n in found if n.endswith("error")]).all()
    assert np.isnan(found["pbe_wall_dist_mae"])  # it rises by no more than 0.04 eV


def test_curves_must_ascend_and_overlap():
    with pytest.raises(ValueError, match="must ascend"):
        Curve(np.array([2.0, 1.0]), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="at least two distances"):
        Curve(np.array([2.0]), np.zeros(1), np.zeros(1))
    near, far = (Curve(np.array([x, x + 1]), np.zeros(2), np.zeros(2)) for x in (1.0, 5.0))
    with pytest.raises(ValueError, match="do not overlap"):
        reference_metrics(near, far, 1.0)


def test_lennard_jones_is_perfect():
    found = homonuclear_curve("Ar", LennardJones(sigma=3.4, epsilon=0.5, rc=100), np.linspace(3, 6, 300))
    force = found["forces"][:, 0, 0]
    assert tortuosity(found["energies"]) == pytest.approx(1)
    assert (energy_diff_flips(found["energies"]), force_flips(force)) == (1, 1)
    # the sign: attraction pulls the first atom towards the second, and f = dE/dr up to the differences
    assert force[-1] > 0 > force[0]
    assert conservation_deviation(found["distances"], found["energies"], force) < 0.01


def test_diatomics_score_by_hand():
    best = dict.fromkeys(("pbe_energy_mae", "pbe_force_mae", "pbe_wall_dist_mae"), 0.0)
    best |= {"pbe_bond_length_error": 0, "pbe_well_depth_error": 0, "energy_jump": 0, "force_flips": 1}
    best |= {"tortuosity": 1, "run_time_sec": 50}
    assert combined_diatomics_score(best, 1.0) == pytest.approx(1)
    assert combined_diatomics_score(best, 0.5) == pytest.approx(0.5)
    # energy error 2 of 4 eV costs 4/9 * 5/9 / 2; sqrt(50 * 5000) = 500 s costs half of 1/9
    worse = best | {"pbe_energy_mae": 2, "run_time_sec": 500}
    assert combined_diatomics_score(worse, 1.0) == pytest.approx(1 - 10 / 81 - 1 / 18)
    assert np.isnan(combined_diatomics_score({"tortuosity": 1}, 1.0))


def test_log_mean():
    assert log_mean([1, 100]) == pytest.approx(10)
    assert log_mean([2, 4, 8]) == pytest.approx(4)
    with pytest.raises(ValueError, match=r"positive values, got \[1.0, 0.0\]"):
        log_mean([1, 0])


def test_pairs_of_bands_are_shared_by_their_heat_capacities():
    pairs = np.array([[4.0, 2.0], [2.0, 6.0]])[None, None, :, :, None] * np.ones(6)
    found = shares(pairs, np.array([[[1.0, 3.0]]]))
    # 4 + 2 * 2 * 3 / (1 + 3) and 6 + 2 * 2 * 1 / (1 + 3)
    np.testing.assert_allclose(found[0, 0, :, 0], [7, 7])
    assert found.shape == (1, 1, 2, 6)
    np.testing.assert_allclose(shares(pairs, np.zeros((1, 1, 2))), 0)


def test_imaginary_frequencies():
    fine = np.array([[-0.009, 0.0, 0.0, 2.0], [1.0, 1.0, 2.0, 3.0]])
    assert not imaginary(fine)
    assert imaginary(fine - [[0.002, 0, 0, 0], [0, 0, 0, 0]])  # below -0.01 THz at q = 0
    assert imaginary(fine - [[0, 0, 0, 2.001], [0, 0, 0, 0]])  # an optical mode at q = 0
    assert imaginary(fine - [[0, 0, 0, 0], [1.001, 0, 0, 0]])  # elsewhere nothing is forgiven
    assert imaginary(np.full((2, 4), np.nan))
