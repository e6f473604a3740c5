"""The fit of reference energies: least squares that a few wrong energies cannot move."""

import numpy as np
import pytest

from dpa4.data import Frame, reference_energies
from dpa4.data.composition_fit import fit_composition
from helpers import SHARED

COUNTS = np.random.default_rng(0).integers(0, 5, (40, 3)).astype(float) + [1, 0, 0]
TRUE = np.array([-13.6, -1029.0, -2041.0])


def energies(seed: int = 1, noise: float = 0.5):
    return COUNTS @ TRUE + noise * COUNTS.sum(axis=1) * np.random.default_rng(seed).normal(size=len(COUNTS))


@pytest.mark.parametrize("counts", [COUNTS, COUNTS[:2], COUNTS[:1], COUNTS[:, [0, 0, 1]]], ids=str)
def test_clean_energies_are_fitted_by_ordinary_least_squares(counts):
    labels = energies()[: len(counts)]
    fit = fit_composition(counts, labels)
    assert np.array_equal(fit.energies, np.linalg.lstsq(counts, labels, rcond=None)[0])
    assert not fit.outliers.any()


@pytest.mark.parametrize("error", [60.0, -1e3, 1e4, 1e8])
@pytest.mark.parametrize("wrong", [[5], [0, 7, 21, 30, 39]])
def test_wrong_energies_do_not_move_the_fit(error, wrong):
    labels = energies()
    labels[wrong] += error * COUNTS[wrong].sum(axis=1)
    fit = fit_composition(COUNTS, labels)
    assert np.flatnonzero(fit.outliers).tolist() == wrong
    rest = np.setdiff1d(np.arange(40), wrong)
    assert np.array_equal(fit.energies, np.linalg.lstsq(COUNTS[rest], energies()[rest], rcond=None)[0])
    assert fit.deviations[wrong] == pytest.approx(error, abs=5)


def test_one_composition_and_an_element_that_occurs_only_in_an_outlier():
    counts = np.tile([[4.0, 2.0]], (9, 1))
    labels = np.full(9, -100.0)
    labels[3] = 1e4
    fit = fit_composition(counts, labels)
    assert fit.energies == pytest.approx([-20, -10])  # minimum norm
    assert np.flatnonzero(fit.outliers).tolist() == [3]
    counts = np.c_[counts, np.zeros(9)]
    counts[3, 2] = 1.0  # no other structure has the element, so the energy cannot be judged
    fit = fit_composition(counts, labels)
    assert not fit.outliers.any() and counts @ fit.energies == pytest.approx(labels)


def test_structures_that_are_left_out_are_named():
    frames = [
        Frame(np.repeat([1, 6, 8], row.astype(int)), np.zeros((int(row.sum()), 3)), np.eye(3),
              np.ones(3, dtype=bool), energy=value, origin=f"a.xyz, frame {k}")
        for k, (row, value) in enumerate(zip(COUNTS, energies(), strict=True))
    ]  # fmt: skip
    clean = reference_energies("least_squares", frames, ["H", "C", "O"])
    frames[5] = Frame(**{n: getattr(frames[5], n) for n in Frame.__slots__} | {"energy": 1e4})
    with pytest.warns(
        UserWarning, match=r"leaves out 1 of 40 energies .* that of a.xyz, frame 5 \(\+\d+ eV/atom\);"
    ):
        found = reference_energies("least_squares", frames, ["H", "C", "O"])
    assert list(found.values()) == pytest.approx(list(clean.values()), abs=0.5)


@pytest.mark.parametrize("file", ["inorganic/mptrj-random-1k.xyz", "inorganic/mpf-TP.xyz"])
@pytest.mark.slow
def test_compounds_of_eighty_elements_have_no_outliers(file):
    from dpa4.data import read_frames
    from dpa4.data.composition_fit import element_counts

    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip("needs the shared data")
    frames = read_frames(path)
    labels = np.array([f.energy for f in frames])
    fit = fit_composition(element_counts(frames), labels)
    assert not fit.outliers.any()
