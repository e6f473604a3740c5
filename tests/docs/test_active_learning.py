"""The example of active learning runs, on fewer structures and steps, and continues where it was."""

import importlib.util
import sys
from pathlib import Path

import pytest
from ase.io import read

from dpa4.output import read_csv
from training_runs import MODEL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch):
    """The script, with small numbers."""
    spec = importlib.util.spec_from_file_location("active_learning", ROOT / "examples" / "active_learning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"MODEL": MODEL, "MEMBERS": 2, "START": 8, "ADDED": 3, "MOLECULES": ("methanol", "ethanol")}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_the_loop(example, tmp_path, monkeypatch):
    pytest.importorskip("tblite")
    arguments = ["--output", str(tmp_path), "--rounds", "1", "--steps", "4", "--md-steps", "20"]
    monkeypatch.setattr(sys, "argv", ["active_learning.py", *arguments])
    example.main()
    rows = read_csv(tmp_path / "errors.csv")
    assert [(row["choice"], row["structures"]) for row in rows] == [
        ("start", "8"), ("deviation and diversity", "11"), ("random", "11"),
    ]  # fmt: skip
    added = read(tmp_path / "selected.xyz", ":")[8:]
    assert all(abs(atoms.get_forces()).max() < example.MAX_FORCE for atoms in added)
    chosen = read(tmp_path / "round-1" / "select" / "selected.xyz", ":")
    places = [atoms.positions.round(6).tobytes() for atoms in chosen]
    assert added and all(atoms.positions.round(6).tobytes() in places for atoms in added)
    assert (tmp_path / "errors.png").exists()
    example.main()  # everything is there already
    assert read_csv(tmp_path / "errors.csv") == rows


def test_labels_are_those_of_the_bundled_data(example):
    """As scripts/make_dataset.py has computed them."""
    pytest.importorskip("tblite")
    atoms = example.bundled("test.xyz", ("md-300K",))[0]
    found = example.label(atoms)
    assert found.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
    assert found.get_forces() == pytest.approx(atoms.get_forces(), abs=1e-4)
