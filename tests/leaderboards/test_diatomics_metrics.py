"""Metrics of diatomic molecules: small curves worked by hand."""

import numpy as np
import pytest
from ase.calculators.lj import LennardJones

from dpa4.leaderboards.diatomics import homonuclear_curve
from dpa4.leaderboards.diatomics_metrics import (
    Curve,
    combined_diatomics_score,
    conservation_deviation,
    energy_diff_flips,
    energy_jump,
    force_flips,
    force_jump,
    force_total_variation,
    reference_metrics,
    smoothness,
    tortuosity,
    wall_error,
)


def test_turns_of_a_curve_by_hand():
    e = [3.0, 0.0, 2.0, 1.0, 2.0]
    assert tortuosity(e) == 7 / 5  # 3 + 2 + 1 + 1 over (3 - 0) + (2 - 0)
    assert energy_diff_flips(e) == 3  # down, up, down, up
    assert energy_jump(e) == 10  # (3 + 2) + (2 + 1) + (1 + 1)
    assert energy_diff_flips([1.0, 0.5, 0.5005, 0.2]) == 0  # a rise of 0.5 meV is ignored
    f = [-5.0, -1.0, 0.005, 2.0, -1.0, -0.002]
    assert force_flips(f) == 2  # - - (0) + - (0)
    assert force_jump([-5.0, -1.0, 2.0, -1.0]) == 6  # steps 4, 3, -3: one turn
    assert force_total_variation([-5.0, -1.0, 2.0, -1.0]) == 10
    assert np.isnan(tortuosity([1.0, 1.0]))


def test_smoothness_and_conservation_of_a_parabola():
    r = np.linspace(1, 3, 2001)
    assert smoothness(r, r**2) == pytest.approx(2, abs=2e-3)  # the ends affect only two of 2001 points
    # differences are exact for a parabola but at the two ends, where they are wrong by the spacing 0.001
    assert conservation_deviation(r, r**2, 2 * r) == pytest.approx(2 * 0.001 / 2001, rel=1e-6)
    assert conservation_deviation(r, r**2, 2 * r + 0.5) == pytest.approx(0.5, abs=1e-5)  # the ends again


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
    assert wall_error(curve, reference) == pytest.approx(np.mean(walls), abs=1e-3)  # linear between points
    assert wall_error(reference, reference) == 0
    same = reference_metrics(reference, reference, 1.008)
    assert all(value == 0 for value in same.values())
    shifted = reference_metrics(Curve(r, reference.energies + 3, reference.forces + 0.3), reference, 1.008)
    assert shifted["pbe_energy_mae"] == pytest.approx(0, abs=1e-12)
    assert shifted["pbe_force_mae"] == pytest.approx(0.1)  # one of three components is wrong


def test_energies_and_forces_are_compared_with_the_last_energy_as_zero():
    r = np.linspace(1, 3, 30)
    found = reference_metrics(Curve(r, 2 * r, np.full(30, 2.0)), Curve(r, r + 7, np.ones(30)), 1.0)
    # 2 (r - 3) and r - 3: the mean of 3 - r from 1 to 3; one of three components of the force is 1 off
    assert found["pbe_energy_mae"] == pytest.approx(1)
    assert found["pbe_force_mae"] == pytest.approx(1 / 3)


def test_shallow_references_have_no_bond():
    r = np.linspace(1, 3, 50)
    flat = Curve(r, 0.04 * (r - 2) ** 2, 0.08 * (r - 2))
    found = reference_metrics(flat, flat, 4.0)
    assert np.isnan([found[n] for n in found if n.endswith("error")]).all()
    assert np.isnan(wall_error(flat, flat))  # it rises by no more than 0.04 eV


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
    # the sign: attraction pulls the first atom towards the second, and f = dE/dr up to the differences: steps h of
    # 0.01 Angstrom and d3E/dr3 up to 700 eV/Angstrom^3 make h^2 / 6 * 700 = 0.012 at the first point, less elsewhere
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
