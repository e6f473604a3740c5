"""Recipes: chosen from the data, written with their reasons, and fit to train."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from rich.console import Console
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.data import read_frames, write_structures
from dpa4.data.frame import Frame
from dpa4.data.sampling import Sample, read_sample
from dpa4.training import load_run_config, recipe_for, recipe_text, summary_of
from dpa4.training.prepare import prepare
from dpa4.training.recipes import COSTS, RECIPES
from vasp_runs import write_run


def frame(
    atoms: Atoms, energy: float | None = -1.0, forces: bool = True, virial: bool = False, **more
) -> Frame:
    return Frame(
        np.asarray(atoms.numbers, np.int64),
        atoms.positions,
        atoms.cell.array,
        atoms.pbc,
        energy=energy,
        forces=np.zeros((len(atoms), 3)) if forces else None,
        virial=np.zeros((3, 3)) if virial else None,
        **more,
    )


def choice(*frames: Frame, structures: int | None = None, device: str = "cpu", preset: str | None = None):
    sample = Sample(list(frames), structures or len(frames), structures is None)
    return recipe_for(summary_of(sample), device, preset)


WATER, SILICON = molecule("H2O"), bulk("Si")


@pytest.mark.parametrize("device", RECIPES)
def test_more_structures_are_trained_longer_with_larger_batches_and_less_decay(device):
    small, middle, large = (
        choice(frame(WATER), structures=n, device=device).options for n in (999, 1_000, 50_000)
    )
    for name, sign in (("steps", 1), ("batch_size", 1), ("weight_decay", -1)):
        key = f"training.{name}"
        assert sign * small[key] < sign * middle[key] < sign * large[key]
    assert small["training.weight_decay"] == 0.1 and small["training.batch_size"] == 8


def test_every_recipe_has_an_estimate_reasons_and_a_valid_file(tmp_path):
    for device, recipes in RECIPES.items():
        assert recipes[-1].below is None
        for recipe in recipes:
            structures = (recipe.below or 10**6) - 1
            chosen = choice(frame(WATER), structures=structures, device=device)
            assert chosen.estimate is not None and (device, chosen.options["model.preset"]) in COSTS
            assert chosen.options.keys() == chosen.reasons.keys() and all(chosen.reasons.values())
            path = tmp_path / f"{device}-{structures}.yaml"
            text = recipe_text([tmp_path / "a.xyz"], chosen)
            path.write_text(text)
            config = load_run_config(path)
            assert config.training.steps == chosen.options["training.steps"]
            assert config.training.learning_rate == "auto"  # so that another number of steps may be set alone
            assert config.model.build(["H"]).cutoff == 5.0
            assert f"about {structures:,} structures:" in text and "# Estimate: about" in text


def test_the_estimate_grows_with_the_neighbours_and_the_steps():
    few = choice(frame(SILICON, virial=True)).estimate
    many = choice(frame(SILICON.repeat(3), virial=True)).estimate
    longer = choice(frame(SILICON, virial=True), structures=2_000).estimate
    assert many.seconds > few.seconds and many.bytes > few.bytes and longer.seconds > few.seconds


def test_cutoff_and_virial_follow_the_periodicity_and_the_labels():
    molecules, crystals = choice(frame(WATER)), choice(frame(SILICON, virial=True))
    mixed = choice(frame(WATER), frame(SILICON, virial=True))
    assert [c.options["model.cutoff"] for c in (molecules, crystals, mixed)] == [5.0, 6.0, 6.0]
    assert [c.options["training.virial_weight"] for c in (molecules, crystals, mixed)] == [0.0, 5.0, 5.0]
    assert "50% of the structures" in mixed.reasons["training.virial_weight"]


def test_missing_labels_have_no_weight():
    energies = choice(frame(WATER, forces=False))
    assert energies.options["training.forces_weight"] == 0 and energies.options["training.energy_weight"] > 0
    assert choice(frame(WATER, energy=None)).options["training.energy_weight"] == 0
    none = choice(frame(WATER, energy=None, forces=False))
    assert none.options["training.energy_weight"] > 0 and "data.keys" in none.warnings[0]


def test_free_atoms_are_the_reference_energies():
    atoms = [frame(Atoms(symbol)) for symbol in "HO"]
    given = choice(frame(WATER), *atoms)
    assert given.options["data.reference_energies"] == "isolated"
    assert not any("compositions" in text for text in given.warnings)
    fitted = choice(frame(WATER), atoms[0])
    assert fitted.options["data.reference_energies"] == "least_squares"
    assert any("do not determine the reference energies of H, O" in w for w in choice(frame(WATER)).warnings)
    with pytest.raises(ValueError, match="all 2 structures are free atoms"):
        choice(*atoms)


def test_one_structure_is_not_split_and_charges_are_mentioned():
    one = choice(frame(WATER, charge_spin={"charge": 1}))
    assert one.options["training.batch_size"] == 1 and one.options["data.validation_fraction"] == 0
    assert any("charge or spin" in text for text in one.warnings)


def test_a_network_that_is_asked_for_is_kept():
    own = choice(frame(WATER), preset="dpa4-neo-v20260911")
    assert own.options["model.preset"] == "dpa4-neo-v20260911" and "model.edge_norm" not in own.options
    assert own.estimate is None


def test_large_files_are_read_in_part_and_counted_by_their_size(tmp_path):
    structures = []
    for index in range(40):
        atoms = WATER.copy()
        atoms.info["REF_energy"] = -float(index % 7)
        structures.append(atoms)
    names = [tmp_path / f"{name}.xyz" for name in "ab"]
    for name in names:
        write_structures(name, structures)
    part = read_sample(names, max_structures=20)
    assert len(part.frames) == 20 and not part.complete and part.structures == pytest.approx(80, abs=4)
    assert len(read_sample(names, max_seconds=0).frames) >= 2
    whole = read_sample(names)
    assert whole.complete and whole.structures == len(whole.frames) == len(read_frames(names))
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(ValueError, match=r"empty\.xyz"):
        read_sample([tmp_path / "empty.xyz"])


def test_folders_of_calculations_get_a_recipe(tmp_path, monkeypatch):
    """The run file names the folder, not its files."""
    write_run(tmp_path / "runs" / "1", steps=3)
    write_run(tmp_path / "runs" / "2", steps=2, seed=5)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", "--train", "runs"])
    assert result.exit_code == 0, result.output
    assert "2 data files found" in result.output
    config = load_run_config("run.yaml")
    assert [str(path) for path in config.data.train] == ["runs"]
    assert config.model.model_extra["cutoff"] == 6.0 and config.training.virial_weight > 0


def test_a_recipe_prepares_a_run(tmp_path):
    structures = [WATER.copy() for _ in range(12)]
    for atoms in structures:
        atoms.rattle(0.05, seed=len(atoms))
        atoms.info["REF_energy"] = -1.0
        atoms.arrays["REF_forces"] = np.zeros((3, 3))
    write_structures(tmp_path / "train.xyz", structures)
    path = tmp_path / "run.yaml"
    sample = read_sample([tmp_path / "train.xyz"])
    path.write_text(recipe_text([str(tmp_path / "train.xyz")], recipe_for(summary_of(sample), "cpu")))
    ready = prepare(load_run_config(path, ["device=cpu"]), Console(quiet=True))
    assert ready.potential.config.cutoff == 5.0 and ready.potential.config.elements == ("H", "O")
