"""Preparation of a run: warnings about the data at its start."""

import io
import re

import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

from dpa4.training.options import RunConfig
from dpa4.training.prepare import prepare
from training_runs import argon, options


@pytest.fixture
def data(tmp_path):
    images = argon(20)
    for atoms in images:
        atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
    return images, tmp_path / "train.xyz"


def run(images, path, **model):
    ase.io.write(path, images)
    text = io.StringIO()
    config = options(path, path.parent / "out")
    config["model"] = config["model"] | model
    return prepare(RunConfig(**config), Console(file=text, width=200)), text.getvalue()


def test_implausible_labels_are_listed_and_no_frame_is_dropped(data):
    images, path = data
    clean, text = run(images, path)
    assert "Implausible" not in text
    images[6].calc.results["energy"] += 1e4
    images[6].calc.results["forces"] = np.full((4, 3), 1e5)
    with pytest.warns(UserWarning) as caught:
        found, text = run(images, path)
    warned = [str(w.message) for w in caught if "train.xyz, frame 6" in str(w.message)]
    assert len(warned) == 3 and "1 of 20 energies are not used to fit the reference energies" in warned[2]
    assert text.index("Data") < text.index("Implausible labels") < text.index("reference energies (eV)")
    assert "1e+05 eV/Å" in text and re.search(r"\+2[45]\d\d eV/atom", text)
    assert len(found.train.dataset) + len(found.validation.dataset) == 20
    energies = [p.potential.reference_energies.item() for p in (clean, found)]
    assert energies[0] == pytest.approx(energies[1], abs=0.1)


def test_charge_and_spin_are_checked_for_models_that_read_them(tmp_path):
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=-1.0, forces=np.zeros((3, 3)))
    images = [water.copy() for _ in range(4)]
    for atoms, charge in zip(images, (1, np.array([1]), 0.9999999999, 1), strict=True):
        atoms.calc = SinglePointCalculator(atoms, **water.calc.results)
        atoms.info |= {"total_charge": charge, "multiplicity": 2, "net_charge": 1}
    with pytest.warns(UserWarning, match=r"train.xyz: not used, although .*: net_charge; a total charge"):
        found, _ = run(images, tmp_path / "train.xyz", charge_spin=True, default_charge_spin=[0, 1])
    for part in (found.train, found.validation):
        assert {tuple(pair) for pair in part.dataset.charge_spin} == {(1, 2)}
    images[2].info["multiplicity"] = 2.013
    plain, _ = run(images, tmp_path / "train.xyz")
    assert plain.train.dataset.charge_spin is None
    with pytest.raises(
        ValueError, match=r"train.xyz, frame 2: multiplicity must be a whole number, .* got 2.013"
    ):
        run(images, tmp_path / "train.xyz", charge_spin=True, default_charge_spin=[0, 1])
