"""Every command that takes a model takes several, or says why not."""

import warnings

import numpy as np
import pytest
import typer.main
from ase.io import read, write
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.data import read_frames
from dpa4.output import read_csv
from dpa4.potential import save_potential
from dpa4.simulation import DPA4Calculator
from helpers import crystal, molecule, random_potential

pytestmark = pytest.mark.usefixtures("no_figures")

REFUSING = {
    "finetune",
    "embed",
    "pairs",
    "dimer",
    "check",
    "info",
    "convert",
    "discovery",
    "kappa",
    "diatomics",
    "spice",
    "yaml",
}


def commands(group=None) -> dict:
    """Every command with a model, by name."""
    found = {}
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            found |= commands(command)
        elif {"model", "source"} & {parameter.name for parameter in command.params}:
            found[name] = command
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, and a folder of a committee with the same ones."""
    folder = tmp_path_factory.mktemp("models")
    files = []
    for number in range(2):
        own = folder / "committee" / f"member-{number}"
        own.mkdir(parents=True)
        save_potential(random_potential(number, n_blocks=1, lmax=1), own / "best.safetensors")
        files.append(own / "best.safetensors")
    return files


def run(*arguments: object, ok: bool = True) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert (result.exit_code == 0) == ok, result.output
    return " ".join(result.output.replace("│", " ").split())


def options(models) -> list:
    return [part for model in models for part in ("--model", model)]


def test_every_command_takes_several_models_or_refuses_them():
    found = commands()
    assert REFUSING <= set(found) and len(found) > len(REFUSING) + 7
    for name, command in found.items():
        takes = any("--model" in parameter.opts for parameter in command.params)
        assert takes != hasattr(command.callback, "refuses_committee"), name
        assert takes == (name not in REFUSING), name


@pytest.mark.parametrize("name", sorted(REFUSING - {"discovery", "kappa", "diatomics", "spice", "yaml"}))
def test_a_refusal_has_a_reason(name, models, tmp_path):
    shown = run(name, models[0], "x.xyz", "--model", models[1], ok=False)
    assert f"{name} needs one model, as its first argument: " in shown


def test_folder_of_a_committee_is_refused_where_one_model_is_needed(models, tmp_path):
    write(tmp_path / "start.xyz", molecule(0, 4))
    shown = run("embed", models[0].parents[1], tmp_path / "start.xyz", ok=False)
    assert "is a committee of 2 models; the command needs one of them, such as" in shown


def test_a_model_as_argument_and_others_as_options_are_refused(models):
    shown = run("relax", models[0], "x.xyz", "--model", models[1], ok=False)
    assert "give each model with --model" in shown


def test_dynamics_by_options_or_by_the_folder_of_a_committee(models, tmp_path):
    write(tmp_path / "start.xyz", molecule(0, 5))
    rest = [tmp_path / "start.xyz", "--steps", 4, "--interval", 2]
    shown = run("md", *rest, *options(models), "-o", tmp_path / "a", "--save-above", 1e-6)
    run("md", models[0].parents[1], *rest, "-o", tmp_path / "b")
    a, b = (read_csv(tmp_path / name / "thermo.csv") for name in "ab")
    assert a == b and float(a[0]["max_force_std_eV_A"]) > 0
    assert "3 uncertain frames are in" in shown
    shown = run(
        "md", *rest, f"--model={models[0]}", "--model", models[1], "-o", tmp_path / "c", "--stop-above", 1e-6
    )
    assert "above --stop-above 1e-06" in shown and "stopped after 1 steps" in shown
    shown = run("md", models[0], *rest, "-o", tmp_path / "d", "--stop-above", 1, ok=False)
    assert "there is one model; give several" in shown


def test_files_of_other_commands_have_the_deviations(models, tmp_path):
    write(tmp_path / "crystal.xyz", crystal())
    moved = crystal()
    moved.positions[0] += (0.2, 0.1, 0.1)
    write(tmp_path / "moved.xyz", moved)
    run("relax", tmp_path / "crystal.xyz", *options(models), "--steps", 1, "-o", tmp_path / "relax")
    run("neb", tmp_path / "crystal.xyz", tmp_path / "moved.xyz", *options(models), "--steps", 0, "--images", 1,
        "-o", tmp_path / "neb")  # fmt: skip
    for file in ("relax/relaxed.xyz", "neb/path.xyz"):
        for atoms in read(tmp_path / file, ":"):
            plain = atoms.copy()
            plain.calc = DPA4Calculator(models, device="cpu")
            plain.get_potential_energy()
            assert atoms.info["energy_std"] == pytest.approx(plain.calc.results["energy_std"], abs=1e-5), file
            expected = plain.calc.results["forces_std"]
            np.testing.assert_allclose(atoms.arrays["forces_std"], expected, atol=1e-4, err_msg=file)


def test_deviations_are_not_read_as_labels(models, tmp_path):
    atoms = molecule(0, 5)
    atoms.info["REF_energy"] = 1.5
    write(tmp_path / "labelled.xyz", atoms)
    shown = run("eval", tmp_path / "labelled.xyz", *options(models), "-o", tmp_path / "eval")
    assert "deviation of the committee, energy per atom: error" in shown
    assert "rank correlation not defined (1 values, too few to rely on)" in shown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (frame,) = read_frames(tmp_path / "eval" / "predictions.xyz")
    assert frame.energy == 1.5 and frame.forces is None and frame.virial is None


def test_screening_has_the_deviations(models, tmp_path):
    pytest.importorskip("torch_sim")
    write(tmp_path / "crystals.xyz", [crystal(), crystal(1)])
    run(
        "screen",
        tmp_path / "crystals.xyz",
        *options(models),
        "--steps",
        5,
        "--cell",
        "full",
        "-o",
        tmp_path / "out",
    )
    for atoms in read(tmp_path / "out" / "relaxed.xyz", ":"):
        plain = atoms.copy()
        plain.calc = DPA4Calculator(models, device="cpu")
        plain.get_potential_energy()
        for name in ("energy_std", "stress_std"):
            np.testing.assert_allclose(atoms.info[name], plain.calc.results[name], rtol=1e-3, atol=1e-6)
        assert atoms.info["screen_status"] in ("converged", "unconverged")


def test_selection_of_the_example_in_the_documentation(models, tmp_path):
    images = [molecule(seed, 5) for seed in range(6)]
    write(tmp_path / "traj.xyz", images)
    shown = run("select", tmp_path / "traj.xyz", *options(models), "-n", 3, "-o", tmp_path / "select")
    assert "3 of 6 candidates are in" in shown and "largest force deviations" in shown
    assert len(read(tmp_path / "select" / "selected.xyz", ":")) == 3
    shown = run("select", tmp_path / "traj.xyz", "--model", models[0], "-n", 9, "-o", tmp_path / "one",
                "--known", tmp_path / "traj.xyz")  # fmt: skip
    assert "selected by diversity alone" in shown and "0 instead of 9" in shown


def test_training_options_of_committees_belong_together(tmp_path):
    (tmp_path / "run.yaml").write_text("data:\n  train: train.xyz\n")
    shown = run("train", tmp_path / "run.yaml", "--at-once", 2, ok=False)
    assert "give --committee as well" in shown
