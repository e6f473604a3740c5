"""Refusals and warnings about the data before a run starts."""

import io
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

from dpa4.potential import model_card, save_potential
from dpa4.training.options import RunConfig
from dpa4.training.prepare import Preparation, prepare
from training_runs import MODEL

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
    folder: Path, train: list[Atoms], validation: list[Atoms] | None = None, **data
) -> tuple[Preparation, str]:
    ase.io.write(folder / "train.xyz", train, format="extxyz")
    data |= {"train": str(folder / "train.xyz")}
    if validation is not None:
        ase.io.write(folder / "val.xyz", validation, format="extxyz")
        data["validation"] = str(folder / "val.xyz")
    console = Console(file=io.StringIO(), width=1000)
    config = RunConfig.model_validate(
        {"model": MODEL, "data": data, "output": str(folder / "run"), "device": "cpu"}
    )
    preparation = prepare(config, console)
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
