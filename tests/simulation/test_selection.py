"""Selection of structures to label: order, limits, files, errors."""

import csv

import numpy as np
import pytest
from ase.io import read

from dpa4.simulation import select
from dpa4.simulation.selection import farthest_points
from helpers import molecule, random_potential

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def committee():
    return [random_potential(seed, n_blocks=1) for seed in (0, 1)]


@pytest.fixture
def candidates():
    """Displaced copies of two molecules, the last one a copy of the first."""
    rng = np.random.default_rng(0)
    images = []
    for k in range(12):
        atoms = molecule(k % 2, 6)
        atoms.positions += 0.01 * k * rng.normal(size=(6, 3))
        atoms.info |= {"REF_energy": 1.0, "note": k}
        images.append(atoms)
    return [*images, images[0].copy()]


def test_without_weights_the_farthest_points_are_selected():
    line = np.array([[0.0], [1.0], [2.0], [10.0], [10.1]])
    chosen, distances = farthest_points(line, np.array([1.0, 1.0, 1.0, 1.0, 1.01]), 3)
    assert chosen == [4, 0, 2]  # the largest weight; the farthest from it; between them
    assert distances == [np.inf, pytest.approx(10.1), pytest.approx(2.0)]


def test_weights_and_known_points_change_the_order():
    line = np.array([[0.0], [1.0], [2.0], [10.0]])
    assert farthest_points(line, np.array([1.0, 1.0, 9.0, 1.0]), 1, np.array([[0.5]]))[0] == [2]
    assert farthest_points(line, np.array([1.0, 1.0, 1.0, 1.0]), 1, np.array([[9.0]]))[0] == [0]
    assert farthest_points(line, np.array([1.0, 1.0, 0.0, 1.0]), 4)[0] == [0, 3, 1]  # never weight 0


def test_copies_are_selected_once():
    points = np.array([[0.0], [0.0], [1.0]])
    assert sorted(farthest_points(points, np.ones(3), 3)[0]) in ([0, 2], [1, 2])


def test_selected_structures_and_table(committee, candidates, tmp_path):
    found = select(candidates, committee, tmp_path, number=4, sources=[f"md.xyz {i}" for i in range(13)])
    written = read(tmp_path / "selected.xyz", ":")
    assert len(written) == 4 and found.candidates == 13
    assert found.chosen[0] == int(found.deviations.argmax())
    for index, atoms in zip(found.chosen, written, strict=True):
        np.testing.assert_allclose(atoms.positions, candidates[index].positions, atol=1e-7)
        assert atoms.info["selected_from"] == f"md.xyz {index}"
        assert atoms.info["max_force_std"] == pytest.approx(found.deviations[index])
        largest = np.linalg.norm(atoms.arrays["forces_std"], axis=1).max()
        assert largest == pytest.approx(found.deviations[index], rel=1e-4)
        assert atoms.calc is None and "REF_energy" not in atoms.info  # nothing to mistake for a label
    with (tmp_path / "selection.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [
        int(row["structure"]) for row in sorted(rows, key=lambda r: int(r["rank"] or 99))[:4]
    ] == found.chosen
    assert sum(row["rank"] != "" for row in rows) == 4


def test_limits_of_the_deviation(committee, candidates, tmp_path):
    everything = select(candidates, committee, tmp_path, number=13)
    middle = float(np.median(everything.deviations))
    low = select(candidates, committee, tmp_path, number=13, below=middle)
    high = select(candidates, committee, tmp_path, number=13, above=middle)
    assert max(everything.deviations[low.chosen]) <= middle <= min(everything.deviations[high.chosen])
    assert len(low.chosen) + len(high.chosen) >= 12  # the copy is left out
    with pytest.raises(ValueError, match=r"none of 13 structures has a deviation between 1e\+06 and inf"):
        select(candidates, committee, tmp_path, number=1, above=1e6)


def test_structures_like_known_ones_come_last(committee, candidates, tmp_path):
    found = select(candidates, committee[:1], tmp_path, number=6, known=candidates[::2])
    assert {index % 2 for index in found.chosen} == {1}  # of the other molecule
    assert found.deviations is None and np.isfinite(found.distances).all()


def test_wrong_arguments_are_refused(committee, candidates, tmp_path):
    for wrong, match in (
        ({"number": 0}, "number must be at least 1"),
        ({"number": 1, "above": 2.0, "below": 1.0}, "above = 2.0 must be .* less than below = 1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            select(candidates, committee, tmp_path, **wrong)
    with pytest.raises(ValueError, match="there is one model"):
        select(candidates, committee[:1], tmp_path, number=1, above=0.1)
    with pytest.raises(ValueError, match="no structures"):
        select([], committee, tmp_path, number=1)


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize("of_committee", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_figure_with_and_without_deviations(committee, candidates, tmp_path, of_committee):
    models = committee if of_committee else committee[:1]
    select(candidates[:3], models, tmp_path, number=2, known=candidates[3:5])
    assert (tmp_path / "selection.png").stat().st_size > 5000
