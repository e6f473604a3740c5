"""`benchmarks/beside_mace.py`: epochs and errors from the files that MACE writes, and one table for both programs."""

import importlib
from pathlib import Path

import ase.io
import pytest

from dpa4.data import read_frames

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def beside_mace(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("beside_mace")


def test_seconds_of_epochs_leave_out_the_time_between_two_runs(beside_mace):
    log = """2026-12-01 02:50:20.500 INFO: Started training, reporting errors on validation set
2026-12-01 02:50:21.000 INFO: Initial: head: Default, loss=1
2026-12-01 02:50:28.000 INFO: Epoch 0: head: Default, loss=1
2026-12-01 02:50:30.000 INFO: ===========RESULTS===========
2026-12-01 03:50:00.000 INFO: Started training, reporting errors on validation set
2026-12-01 03:50:05.500 INFO: Epoch 1: head: Default, loss=1
"""
    assert beside_mace.seconds_of_epochs(log) == [7.0, 5.5]


def test_second_stage_is_the_last_quarter(beside_mace):
    options = beside_mace.schedule(200)
    assert {"--max_num_epochs=200", "--start_swa=150", "--scheduler_patience=5"} <= set(options)
    assert "--scheduler_patience=50" in beside_mace.schedule(4000)


def test_errors_of_predictions(beside_mace, argon_file, tmp_path):
    images = ase.io.read(argon_file, ":")
    for atoms, frame in zip(images, read_frames(argon_file), strict=True):
        atoms.calc = None
        atoms.info["MACE_energy"] = frame.energy + 0.25
        atoms.arrays["MACE_forces"] = frame.forces - 0.5
    ase.io.write(tmp_path / "predictions.xyz", images)
    errors = beside_mace.errors_of_predictions(argon_file, tmp_path / "predictions.xyz")
    assert errors["energy (meV) rmse"] == pytest.approx(250, abs=0.01)
    assert errors["forces (meV/Å) mae"] == pytest.approx(500, abs=0.01)
    assert not any("stress" in name for name in errors)


def test_table_of_both_programs(beside_mace):
    row = {"data": "acac", "test": "300K", "recipe": "default", "extra": [], "steps": 40, "seconds": 9.0}
    lines = beside_mace.beside([row, row | {"recipe": "mace", "minutes": 4.0, "steps": 77}]).splitlines()
    assert any("| 40 | default |" in line for line in lines[2:])
    assert any("| 4 min | mace |" in line for line in lines[2:])
