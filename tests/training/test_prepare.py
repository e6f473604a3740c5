"""Refusals and warnings about the data before a run starts."""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

from dpa4.potential import model_card, save_potential
from dpa4.training.options import RunConfig
from dpa4.training.prepare import Preparation, prepare
from training_runs import MODEL, argon, options

FREE_ATOMS = {"H": -13.0, "C": -1030.0, "O": -2040.0, "Fe": -500.0}


def structure(formula: str, seed: int = 0, labels: tuple[str, ...] = ("energy", "forces")) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = Atoms(formula)
    atoms.positions = rng.normal(size=(len(atoms), 3)) + 2.0 * np.arange(len(atoms))[:, None]
    energy = sum(FREE_ATOMS[s] for s in atoms.symbols) - 4.0 + 0.1 * seed
    values = {"energy": energy, "forces": rng.normal(size=(len(atoms), 3))}
    if labels:
        atoms.calc = SinglePointCalculator(atoms, **{name: values[name] for name in labels})
    return atoms


def free_atom(element: str) -> Atoms:
    atoms = structure(element, labels=("energy",))
    atoms.calc.results["energy"] = FREE_ATOMS[element]
    return atoms


def prepared(
    folder: Path,
    train: list[Atoms],
    validation: list[Atoms] | list[str] | None = None,
    state: dict[str, Any] | None = None,
    model: dict[str, Any] = MODEL,
    **data,
) -> tuple[Preparation, str]:
    ase.io.write(folder / "train.xyz", train, format="extxyz")
    data |= {"train": str(folder / "train.xyz")}
    if validation and isinstance(validation[0], str):
        data["validation"] = validation
    elif validation is not None:
        ase.io.write(folder / "val.xyz", validation, format="extxyz")
        data["validation"] = str(folder / "val.xyz")
    console = Console(file=io.StringIO(), width=1000)
    config = RunConfig.model_validate(
        {"model": model, "data": data, "output": str(folder / "run"), "device": "cpu"}
    )
    preparation = prepare(config, console, state)
    return preparation, console.file.getvalue()


MOLECULES = [structure(formula, k) for k, formula in enumerate(["CH4", "CO2", "H2O", "C2H6", "CH4O", "CO"])]


@pytest.mark.parametrize(
    ("labels", "missing"), [((), "energy"), (("energy",), "forces"), (("forces",), "energy")]
)
def test_validation_data_without_a_weighted_label_are_refused(tmp_path, labels, missing):
    validation = [structure("CH4", k, labels) for k in range(3)]
    message = rf"training.{missing}_weight = 20, but no validation structure has a label for {missing} \(found energy"
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, MOLECULES, validation)
    prepared(tmp_path, MOLECULES, [*validation, structure("CO2")])  # one is enough


def test_elements_of_the_validation_data_only_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"element Fe of .*val.xyz, frame 1 is in the validation data, but in no"
    ):
        prepared(tmp_path, [*MOLECULES, free_atom("Fe")], [structure("CO"), structure("FeCO")])


def test_a_file_for_training_and_validation_is_refused(tmp_path):
    """Also by another path, within a folder, and of several."""
    prepared(tmp_path, MOLECULES)
    (tmp_path / "link.xyz").symlink_to(tmp_path / "train.xyz")
    for other in ("train.xyz", "link.xyz", "."):
        with pytest.raises(
            ValueError, match=r"\.xyz is in data\.train and in data\.validation; .*Name other files"
        ):
            prepared(tmp_path, MOLECULES, validation=[str(tmp_path / other)])


def test_the_same_structures_in_two_files_are_counted(tmp_path):
    moved = [atoms.copy() for atoms in MOLECULES[:3]]
    for atoms, original in zip(moved, MOLECULES, strict=False):
        atoms.calc = SinglePointCalculator(atoms, **original.calc.results)
    moved[0].positions[0, 0] += 1e-7  # rounding of another program
    moved[2].positions[0, 0] += 0.01
    _, text = prepared(tmp_path, MOLECULES, moved)
    assert "2 of 3 validation structures are in the training data, too" in text
    _, text = prepared(tmp_path, MOLECULES[3:], moved)
    assert "in the training data, too" not in text


def test_a_random_share_is_said_to_be_one(tmp_path):
    said = "The validation data are a random share of data.train"
    assert said in prepared(tmp_path, MOLECULES)[1]
    assert said not in prepared(tmp_path, MOLECULES, [structure("CH4", 9)])[1]
    assert said not in prepared(tmp_path, MOLECULES, validation_fraction=0)[1]


def test_free_atoms_are_counted_apart(tmp_path):
    one = [*MOLECULES, free_atom("H")]
    _, text = prepared(
        tmp_path, one, [structure("CH4", 9), free_atom("C")], reference_energies="least_squares"
    )
    row = next(line for line in text.splitlines() if "free atoms" in line)
    assert row.replace("│", " ").split() == ["free", "atoms", "2", "1/1.0/1", "H", "C", "energy", "2/2"]
    assert "free atoms are not trained on" in text
    assert "free atom" not in prepared(tmp_path, MOLECULES)[1]


def test_only_free_atoms(tmp_path):
    atoms = [free_atom(element) for element in FREE_ATOMS]
    message = r"all 4 structures of data.{} = .*{}.xyz are free atoms, which define reference energies but"
    with pytest.raises(ValueError, match=message.format("train", "train")):
        prepared(tmp_path, atoms)
    with pytest.raises(ValueError, match=message.format("validation", "val")):
        prepared(tmp_path, MOLECULES, atoms)


def test_elements_of_free_atoms_only_are_told(tmp_path):
    atoms = [free_atom(element) for element in FREE_ATOMS]
    _, text = prepared(tmp_path, [*atoms, *MOLECULES])
    assert "no structure to train on contains Fe" in text
    assert "arbitrary" not in text


def test_arbitrary_reference_energies_are_told_in_output_and_model_card(tmp_path):
    preparation, text = prepared(tmp_path, [structure("C5H8O2", k) for k in range(4)])
    assert "H -" in text and text.count("(arbitrary)") == 3
    assert (
        "the reference energies of H, C, O are arbitrary" in text
        and "Add a free atom of every element" in text
    )
    save_potential(preparation.potential, tmp_path / "model.safetensors", preparation.provenance)
    assert (
        "the reference energies of H, C, O are arbitrary" in model_card(tmp_path / "model.safetensors").text
    )
    preparation, text = prepared(tmp_path, MOLECULES, validation_fraction=0)
    assert "arbitrary" not in text and not any("arbitrary" in key for key in preparation.provenance)


def test_reference_energies_of_another_method_are_warned_of(tmp_path):
    given = {e: FREE_ATOMS[e] for e in ("H", "C", "O")}
    with pytest.warns(
        UserWarning, match=r"the energies are -\S+ eV/atom from the reference energies in the med"
    ):
        prepared(tmp_path, MOLECULES, reference_energies=given | {"O": -430.0, "C": -155.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(tmp_path, MOLECULES, reference_energies=given)


@pytest.fixture
def data(tmp_path):
    images = argon(20)
    for atoms in images:
        atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
    return images, tmp_path / "train.xyz"


def run_of(images, path, **model):
    ase.io.write(path, images)
    text = io.StringIO()
    config = options(path, path.parent / "out")
    config["model"] = config["model"] | model
    return prepare(RunConfig(**config), Console(file=text, width=200)), text.getvalue()


def test_implausible_labels_are_listed_and_no_frame_is_dropped(data):
    images, path = data
    clean, text = run_of(images, path)
    assert "Implausible" not in text
    images[6].calc.results["energy"] += 1e4
    images[6].calc.results["forces"] = np.full((4, 3), 1e5)
    with pytest.warns(UserWarning) as caught:
        found, text = run_of(images, path)
    warned = [str(w.message) for w in caught if "train.xyz, frame 6" in str(w.message)]
    assert (
        len(warned) == 3
        and "the fit of reference energies leaves out 1 of 20 energies far from the others" in warned[2]
    )
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
        found, _ = run_of(images, tmp_path / "train.xyz", charge_spin=True, default_charge_spin=[0, 1])
    for part in (found.train, found.validation):
        assert {tuple(pair) for pair in part.dataset.charge_spin} == {(1, 2)}
    images[2].info["multiplicity"] = 2.013
    plain, _ = run_of(images, tmp_path / "train.xyz")
    assert plain.train.dataset.charge_spin is None
    with pytest.raises(
        ValueError, match=r"train.xyz, frame 2: multiplicity must be a whole number, .* got 2.013"
    ):
        run_of(images, tmp_path / "train.xyz", charge_spin=True, default_charge_spin=[0, 1])


def test_the_log_says_the_symmetry(tmp_path):
    preparation, text = prepared(tmp_path, MOLECULES)
    assert preparation.potential.config.symmetry == "O3"
    assert "symmetry O3: energies of mirror images are equal\n" in text
    _, text = prepared(tmp_path, MOLECULES, model=MODEL | {"symmetry": "SO3"})
    assert "symmetry SO3: energies of mirror images may differ\n" in text


@pytest.mark.filterwarnings("ignore:the energies are")  # far from the reference energies of the state
def test_runs_of_earlier_versions_keep_the_symmetry_of_rotations(tmp_path):
    state = {"potential": {"reference_energies": torch.zeros(3, dtype=torch.float64)}}
    preparation, _ = prepared(tmp_path, MOLECULES, state=state)
    assert preparation.potential.config.symmetry == "SO3"
