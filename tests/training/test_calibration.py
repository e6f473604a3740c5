"""Calibration of committees: the numbers, the files, and the predictions they are made of."""

import json

import numpy as np
import pytest

from dpa4.data import frame_from_atoms
from dpa4.data.dataset import build_graph
from dpa4.training import evaluate
from dpa4.training.calibration import Calibration, calibration_lines, calibrations, write_calibration
from dpa4.training.evaluation import batches_for, predict, predict_committee
from helpers import crystal, molecule, random_potential

pytestmark = pytest.mark.usefixtures("no_figures")


def labelled(count: int) -> list:
    frames = []
    for seed in range(count):
        atoms = crystal(seed) if seed % 2 else molecule(seed, 5)
        atoms.info["REF_energy"] = float(seed)
        atoms.arrays["REF_forces"] = atoms.positions
        frames.append(frame_from_atoms(atoms))
    return frames


@pytest.fixture(scope="module")
def committee():
    return [
        random_potential(seed, n_blocks=1, cutoff=cutoff) for seed, cutoff in ((0, 4.0), (1, 3.5), (2, 4.0))
    ]


def test_factor_and_rank_correlation_of_known_errors():
    rng = np.random.default_rng(0)
    deviations = rng.uniform(0.1, 1, 2000)
    errors = np.abs(3 * deviations * rng.normal(size=2000))
    assert Calibration("forces", "eV/Å", deviations, errors).factor == pytest.approx(3, rel=0.1)
    exact = Calibration("forces", "eV/Å", deviations, deviations**2)
    assert exact.correlation == pytest.approx(1)
    assert Calibration("forces", "eV/Å", deviations, -deviations).correlation == pytest.approx(-1)
    assert np.isnan(Calibration("forces", "eV/Å", deviations, np.ones(2000)).correlation)
    assert "error 0.78 x deviation, rank correlation 1.00 (2000 values)" in exact.text


def test_predictions_are_mean_and_deviation_of_the_members(committee):
    frames = labelled(4)
    found = predict_committee(committee, batches_for(committee, frames, 20).batches(0))
    members = [predict(p, batches_for([p], frames, 20).batches(0)) for p in committee]
    for own, *others in zip(found, *members, strict=True):
        for name in ("energy", "forces", "virial"):
            values = np.array([getattr(other, name) for other in others])
            np.testing.assert_allclose(getattr(own, name), values.mean(axis=0), atol=1e-10)
            np.testing.assert_allclose(getattr(own.deviation, name), values.std(axis=0), atol=1e-10)


def test_neighbours_are_searched_once_for_all_members(committee, monkeypatch):
    searched = []
    monkeypatch.setattr("dpa4.data.dataset.build_graph", lambda *a: searched.append(1) or build_graph(*a))
    frames = labelled(3)
    predict_committee(committee, batches_for(committee, frames, 20).batches(0))
    assert len(searched) == 3


def test_calibration_compares_deviations_with_the_errors_of_the_mean(committee):
    frames = labelled(4)
    predictions = predict_committee(committee, batches_for(committee, frames, 20).batches(0))
    forces, energy = calibrations(frames, predictions)
    errors = np.concatenate(
        [np.linalg.norm(p.forces - f.forces, axis=1) for f, p in zip(frames, predictions, strict=True)]
    )
    spread = np.concatenate([np.linalg.norm(p.deviation.forces, axis=1) for p in predictions])
    np.testing.assert_allclose(forces.errors, errors)
    np.testing.assert_allclose(forces.deviations, spread)
    assert energy.errors[1] == pytest.approx(abs(predictions[1].energy - 1.0) / 6)
    assert energy.deviations[1] == pytest.approx(predictions[1].deviation.energy / 6)


def test_evaluation_of_a_committee_writes_deviations_and_calibration(committee, tmp_path):
    from ase.io import read

    frames = labelled(4)
    table = evaluate(committee, frames, output=tmp_path)
    written = read(tmp_path / "predictions.xyz", ":")
    predictions = predict_committee(committee, batches_for(committee, frames, 2000).batches(0))
    for atoms, own in zip(written, predictions, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(own.energy)
        assert atoms.info["energy_std"] == pytest.approx(own.deviation.energy)
        np.testing.assert_allclose(atoms.arrays["forces_std"], own.deviation.forces, atol=1e-8)
        largest = np.linalg.norm(own.deviation.forces, axis=1).max()
        assert atoms.info["max_force_std"] == pytest.approx(largest)
        assert ("stress_std" in atoms.info) == bool(atoms.pbc.all())
    rows = json.loads((tmp_path / "calibration.json").read_text())
    assert [row["quantity"] for row in rows] == ["forces", "energy per atom"]
    assert rows[0]["factor"] == pytest.approx(rows[0]["rms_error"] / rows[0]["rms_deviation"])
    assert 3 * rows[0]["rms_error"] ** 2 == pytest.approx(9 * (table.row("forces").rmse / 1e3) ** 2)
    assert (tmp_path / "calibration.png").exists()
    evaluate(committee[0], frames, output=tmp_path)  # of one model, which has no deviation
    assert not (tmp_path / "calibration.json").exists() and not (tmp_path / "calibration.png").exists()


@pytest.mark.usefixtures("figures")
def test_figure(tmp_path):
    deviations = np.random.default_rng(0).uniform(0.001, 1, 200)
    found = [Calibration("forces", "eV/Å", deviations, 2 * deviations), Calibration("energy per atom", "eV/atom",
             deviations[:3], np.zeros(3))]  # fmt: skip
    write_calibration(found, tmp_path)
    assert (tmp_path / "calibration.png").stat().st_size > 10000


def test_members_that_are_the_same_model(tmp_path):
    """Zero deviations have neither factor nor correlation; such members occur if their start stays the best model."""
    errors = np.array([0.1, 0.2, 0.3])
    write_calibration([Calibration("forces", "eV/Å", np.zeros(3), errors)], tmp_path)
    assert (tmp_path / "calibration.png").is_file()
    assert "Infinity" not in (tmp_path / "calibration.json").read_text()
    assert calibration_lines(tmp_path) == [
        "forces: error not defined x deviation, rank correlation not defined (3 values, too few to rely on)"
    ]


def test_nothing_is_written_without_labels(tmp_path):
    write_calibration([], tmp_path)
    assert not list(tmp_path.iterdir())
