"""dpa4 finetune: the run file it writes is valid, suits the data, and trains."""

import pytest
from ase import Atoms
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.data import read_frames, write_structures
from dpa4.data.sampling import Sample
from dpa4.model.presets import preset
from dpa4.potential.checkpoint import save_potential
from dpa4.training import load_run_config
from dpa4.training.finetuning_recipe import RECIPES, finetuning_recipe
from dpa4.training.options import FINETUNING
from dpa4.training.recipes import summary_of
from helpers import molecule, random_potential

ELEMENTS = ("H", "C", "N", "O")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder with a model of four elements and structures of three of them; the working directory."""
    monkeypatch.chdir(tmp_path)
    model = random_potential(elements=ELEMENTS, n_blocks=1, lmax=1, mixing_layers=1).float()
    save_potential(model, "model.safetensors")
    for name, count in (("train.xyz", 12), ("valid.xyz", 2)):
        images = [molecule(seed, 5, "HCO") for seed in range(count)]
        for atoms in images:
            atoms.info["REF_energy"] = -1.0
            atoms.arrays["REF_forces"] = 0 * atoms.positions
        write_structures(name, images)
    return tmp_path


def silane() -> Atoms:
    atoms = molecule(0, 4, "HCO")
    atoms.symbols[0] = "Si"
    atoms.info["REF_energy"] = -1.0
    return atoms


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_file_it_writes_trains(folder):
    text = run("finetune", "model.safetensors", "--train", "train.xyz", "--drop-elements")
    assert "12" in text and "then dpa4 train finetune.yaml" in text
    config = load_run_config("finetune.yaml")
    assert config.model.start_from == "model.safetensors" and config.model.elements == ("H", "C", "O")
    assert config.model.model_fields_set == {"start_from", "start_branch", "start_ema", "elements"}
    assert config.training.learning_rate == FINETUNING["learning_rate"]
    assert (config.training.steps, config.training.batch_size) == (
        RECIPES[0].options["training.steps"][0],
        RECIPES[0].options["training.batch_size"][0],
    )
    assert config.data.validation_fraction == 0.2 and config.training.virial_weight == 0
    written = (folder / "finetune.yaml").read_text()
    assert "12 structures:" in written and "N of the start, which the data lack, dropped" in written
    assert "\n  preset:" not in written and "\n  symmetry:" not in written
    output = run("train", "finetune.yaml", "--set", "training.steps=1", "--set", "device=cpu")
    assert "fine-tuning of model.safetensors" in output and "start, on the training data" in output
    assert (folder / "finetuned" / "best.safetensors").is_file()


def test_validation_data_and_another_name(folder):
    data = ["--train", "train.xyz", "--validation", "valid.xyz"]
    run("finetune", "model.safetensors", *data, "-o", "other.yaml")
    config = load_run_config("other.yaml")
    assert [str(path) for path in config.data.validation] == ["valid.xyz"]
    assert config.model.elements == "auto"
    assert "N of the start, which the data lack, kept" in (folder / "other.yaml").read_text()
    text = run("finetune", "model.safetensors", *data, "-o", "other.yaml", code=1)
    assert "other.yaml" in text and "--overwrite" in text
    run("finetune", "model.safetensors", *data, "-o", "other.yaml", "--overwrite")


def test_an_element_that_the_start_lacks_is_refused_before_a_file_is_written(folder):
    write_structures("silicon.xyz", [silane()])
    text = run("finetune", "model.safetensors", "--train", "silicon.xyz", code=1)
    assert "element Si of silicon.xyz" in text and "fine-tuning cannot add elements" in text
    assert not (folder / "finetune.yaml").exists()


@pytest.mark.parametrize("structures", [1, 12, 300, 3_000, 60_000])
def test_more_structures_are_trained_longer(folder, structures):
    frames = read_frames("train.xyz")[: max(1, min(structures, 12))]
    summary = summary_of(Sample(frames, structures, structures <= 12), 4.0)
    choice = finetuning_recipe(
        summary, preset("nano", ELEMENTS), {"model.start_from": "m", "model.elements": "auto"}, "cpu"
    )
    recipe = next(r for r in RECIPES if r.below is None or structures < r.below)
    assert choice.options["training.steps"] == recipe.options["training.steps"][0]
    assert choice.options["training.batch_size"] <= structures
    assert (choice.options["data.validation_fraction"] > 0) == (structures > 1)
    assert choice.reasons.keys() <= choice.options.keys() | {"model.elements"} and choice.estimate is not None
    assert any("few" in warning for warning in choice.warnings) == (structures < 10)
