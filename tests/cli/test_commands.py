"""The commands, end to end on a tiny model and a few structures."""

import json
import os
import pkgutil
import re
import runpy
import shutil
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
import typer
from ase.build import bulk
from ase.io import read, write
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import dpa4
from deepmd_files import parameter_names
from dpa4.cli import app
from dpa4.cli.options import user_errors
from dpa4.potential import load_potential
from dpa4.potential.deepmd.writer import deepmd_state
from dpa4.simulation import DPA4Calculator
from dpa4.training import RunConfig
from helpers import crystal, molecule, random_potential, shared

TINY = ["model.channels=8", "model.lmax=1", "model.n_blocks=1", "model.mixing_layers=1", "model.cutoff=4"]


def run(*arguments: object, ok: bool = True) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def labelled(n: int) -> list:
    """Clusters with the energy and forces of springs to the origin."""
    frames = []
    for seed in range(n):
        atoms = molecule(seed, 5)
        atoms.info["REF_energy"] = 0.5 * float((atoms.positions**2).sum())
        atoms.arrays["REF_forces"] = -atoms.positions
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write(folder / "train.xyz", labelled(12))
    config = folder / "run.yaml"
    text = run("init", config, "--train", folder / "train.xyz").replace("\n", "")
    assert f"next: dpa4 train {config} --dry-run  # " in text and text.endswith(f"then dpa4 train {config}")
    settings = [*TINY, "training.steps=6", "training.batch_size=4", f"output={folder / 'run'}", "device=cpu"]
    output = run("train", config, *(x for s in settings for x in ("--set", s)))
    assert "best" in output and "[green]" not in output
    assert f"next: dpa4 eval {folder / 'run' / 'best.safetensors'} TEST.xyz" in output.replace("\n", "")
    assert f"next: dpa4 report {folder / 'run'}  # " in output.replace("\n", "")
    return folder


def test_training_leaves_models_tables_and_plots(trained):
    names = {p.name for p in (trained / "run").iterdir()}
    assert {
        "best.safetensors",
        "last.safetensors",
        "last.pt",
        "train.csv",
        "valid.csv",
        "learning_curve.png",
    } <= names


def test_a_used_output_folder_is_refused(trained):
    output = f"output={trained / 'run'}"
    assert "--resume" in run("train", trained / "run.yaml", "--set", output, ok=False)


def test_eval_writes_table_plots_and_predictions(trained):
    model = trained / "run" / "best.safetensors"
    output = run("eval", model, trained / "train.xyz", "-o", trained / "eval", "--device", "cpu")
    assert "meV/atom" in output and "meV/Å" in output
    names = {p.name for p in (trained / "eval").iterdir()}
    assert any(n.endswith(".png") for n in names) and any(n.endswith(".csv") for n in names)
    predictions = trained / "eval" / "predictions.xyz"
    atoms = read(predictions, "0")
    assert np.isfinite(atoms.get_forces()).all() and "REF_energy" in atoms.info


def test_eval_with_named_labels(trained):
    atoms = molecule(3, 5)
    atoms.info["dft"] = -1.0
    write(trained / "named.xyz", atoms)
    model = trained / "run" / "best.safetensors"
    arguments = ("eval", model, trained / "named.xyz", "-o", trained / "named", "--device", "cpu")
    assert "meV/atom" in run(*arguments, "--key", "energy=dft")
    assert "--key must be LABEL=NAME" in run(*arguments, "--overwrite", "--key", "enrgy=dft", ok=False)


def test_info_md_and_relax(trained):
    model = trained / "run" / "best.safetensors"
    assert "trainable parameters" in run("info", model)
    write(trained / "start.xyz", molecule(3, 5))
    options = ("--steps", 20, "--timestep", 0.1, "--interval", 5, "--device", "cpu")
    output = run("md", model, trained / "start.xyz", "-o", trained / "md", *options)
    assert "energy drift" in output
    assert len(read(trained / "md" / "trajectory.xyz", ":")) == 5  # the start and every fifth step
    output = run(
        "relax", model, trained / "start.xyz", "-o", trained / "relax", "--steps", 3, "--device", "cpu"
    )
    assert "of 1 structures converged" in output


def test_convert_says_which_weights_it_imported(tmp_path):
    state = deepmd_state(random_potential())
    means = {name.removeprefix("model.Default."): 0.5 * state[name] for name in parameter_names(state)}
    torch.save({"model": state, "ema": {"decay": 0.99, "model": means}}, tmp_path / "model.pt")
    torch.save({"model": state}, tmp_path / "plain.pt")
    one_line = run("convert", tmp_path / "model.pt", tmp_path / "a.safetensors").replace("\n", " ")
    assert "averaged weights: not imported; the checkpoint also holds an EMA of the weights" in one_line
    one_line = run("convert", tmp_path / "model.pt", tmp_path / "b.safetensors", "--ema").replace("\n", " ")
    assert "averaged weights: EMA of the weights, decay 0.99, imported" in one_line
    weights = load_potential(tmp_path / "b.safetensors").model.types.table
    table = "model.Default.atomic_model.descriptor.type_embedding.adam_type_embedding"
    assert torch.equal(weights, 0.5 * state[table])
    assert "averaged" not in run("convert", tmp_path / "plain.pt", tmp_path / "c.safetensors")
    output = run("convert", tmp_path / "plain.pt", tmp_path / "d.safetensors", "--ema", ok=False)
    assert "it has no entry ema" in output.replace("\n", " ") and not (tmp_path / "d.safetensors").exists()


def test_convert_to_deepmd_and_back_keeps_the_energy(trained):
    model, there, back = trained / "run" / "best.safetensors", trained / "m.pt", trained / "m.safetensors"
    assert "--drop-bridging" in run("convert", model, there, ok=False) and not there.exists()
    run("convert", model, there, "--drop-bridging")
    run("convert", there, back)
    energies = []
    for path in (model, there, back):
        atoms = molecule(3, 5)
        atoms.calc = DPA4Calculator(path, device="cpu")
        energies.append(atoms.get_potential_energy())
    assert energies[0] == energies[1] == energies[2]
    assert "--overwrite" in run("convert", model, there, ok=False)


def test_presets_in_commands(tmp_path):
    assert "2,762,885" in run("info", "paper-air")
    assert "281,122,208" in run("info", "DPA4-Ultra-v20260911")
    run("init", tmp_path / "run.yaml", "--preset", "dpa4-neo-v20260911")
    assert "  preset: dpa4-neo-v20260911\n" in (tmp_path / "run.yaml").read_text()
    assert "exists as dpa4-max-v20260901" in run("info", "dpa4-max-v20260820", ok=False).replace("\n", " ")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("info", "paper-ari"), "paper-air"),
        (("eval", "absent.pt", "x.xyz"), "there is no model file absent.pt"),
        (("train", "absent.yaml"), "absent.yaml"),
    ],
)
def test_mistakes_give_one_line_and_status_one(arguments, message):
    output = run(*arguments, ok=False)
    assert message in output and "Traceback" not in output


@pytest.mark.parametrize("command", ["md", "relax", "embed", "eos", "neb"])
def test_files_without_structures(trained, command):
    model, options = trained / "run" / "best.safetensors", ("--steps", 1) if command == "md" else ()
    (trained / "empty.xyz").touch()
    for file, message in (
        (trained / "absent.xyz", "there is no file"),
        (model, "best.safetensors cannot be read by ASE: UnknownFileTypeError"),
        (trained / "run.yaml", "run.yaml cannot be read by ASE"),
        (trained / "empty.xyz", "empty.xyz"),
    ):
        structures = (file, file) if command == "neb" else (file,)
        output = run(command, model, *structures, "-o", trained / "none.npz", *options, ok=False)
        assert message in output.replace("\n", "") and "Traceback" not in output
    assert not (trained / "none.npz").exists()


def test_warnings_are_one_line(trained):
    close = molecule(3, 5)
    close.positions[1] = close.positions[0] + (0, 0, 0.3)
    write(trained / "close.xyz", close)
    shown = warnings.showwarning
    command = ("relax", trained / "run" / "best.safetensors", trained / "close.xyz", "-o", trained / "close")
    lines = run(*command, "--steps", 1, "--device", "cpu").splitlines()
    (warned,) = [line for line in lines if "extrapolates" in line]
    assert warned.startswith("warning: atoms 0 and 1 are 0.300 Angstrom apart")
    assert not any("calculator.py" in line for line in lines) and warnings.showwarning is shown


# --- habits


def test_version_help_and_completion():
    assert run("--version") == f"dpa4 {dpa4.__version__}\n"
    for arguments in ((), ("md",), ("bench",), ("bench", "kappa")):
        assert run(*arguments, "-h") == run(*arguments, "--help")
    result = CliRunner().invoke(
        app,
        [],
        prog_name="dpa4",
        env={"_DPA4_COMPLETE": "complete_bash", "COMP_WORDS": "dpa4 re", "COMP_CWORD": "1"},
    )
    assert result.output.split() == ["relax", "report"]


def test_help_fits_into_80_columns_and_no_word_is_cut_off(monkeypatch):
    group = typer.main.get_command(app)
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in {"": group, **group.commands}.items():
        text = run(*name.split(), "-h")
        assert max(map(len, text.splitlines())) <= 80, text
        shown = "".join(text.split())
        for below in getattr(command, "commands", {}).values():
            first = re.split(r"\.\s", below.help)[0]
            assert below.hidden or "".join(first.split()).removesuffix(".") in shown, first
        for parameter in command.params:
            described = getattr(parameter, "help", None)
            assert not described or "".join(described.split()) in shown, (name, parameter.name)


def test_commands_that_continue_a_run_can_also_replace_it():
    group = typer.main.get_command(app)
    options = {name: {o for p in command.params for o in p.opts} for name, command in group.commands.items()}
    assert sum("--resume" in found for found in options.values()) >= 8
    assert {
        name for name, found in options.items() if "--resume" in found and "--overwrite" not in found
    } == set()


def test_the_package_is_a_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpa4", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dpa4", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out == f"dpa4 {dpa4.__version__}\n"


def test_errors_of_set_name_the_override(trained):
    output = run("train", trained / "run.yaml", "--set", "training.steps=many", ok=False)
    assert "override 'training.steps=many'" in output.replace("\n", " ")


@pytest.mark.parametrize(
    "command",
    ["train", "md", "neb", "relax", "eos", "screen", "init", "convert", "eval", "select", "embed", "data"],
)
def test_results_are_replaced_on_request_only(trained, tmp_path, command):
    if command == "screen":
        pytest.importorskip("torch_sim")
    model, output, cpu = trained / "run" / "best.safetensors", tmp_path / "out", ("--device", "cpu")
    first, last = molecule(0, 5), molecule(0, 5)
    last.positions[0] += 0.3
    for name, atoms in (("first.xyz", first), ("last.xyz", last), ("crystal.xyz", bulk("C", "fcc", a=4.0))):
        write(tmp_path / name, atoms)
    settings = [*TINY, "training.steps=2", f"output={output}", "device=cpu"]
    arguments: dict[str, tuple] = {
        "train": (trained / "run.yaml", *(x for s in settings for x in ("--set", s))),
        "md": (model, tmp_path / "first.xyz", "--steps", 2, "-o", output, *cpu),
        "neb": (model, tmp_path / "first.xyz", tmp_path / "last.xyz", "--steps", 1, "-o", output, *cpu),
        "relax": (model, tmp_path / "first.xyz", "--steps", 1, "-o", output, *cpu),
        "eos": (model, tmp_path / "crystal.xyz", "--no-relax", "--points", 5, "-o", output, *cpu),
        "screen": (model, tmp_path / "first.xyz", "--steps", 1, "-o", output, *cpu),
        "init": (output,),
        "convert": (model, output.with_suffix(".safetensors")),
        "eval": (model, trained / "train.xyz", "-o", output, *cpu),
        "select": (trained / "train.xyz", "--model", model, "-n", 2, "-o", output, *cpu),
        "embed": (model, tmp_path / "first.xyz", "-o", output.with_suffix(".npz"), *cpu),
        "data": ("collect", trained / "train.xyz", "-o", output),
    }
    call = (command, *arguments[command])
    ok = command != "eos"  # the curve of an untrained model may have no minimum
    run(*call, ok=ok)
    if output.is_dir():
        (output / "notes.txt").write_text("mine")
        before = {path.name: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    refusal = run(*call, ok=False).replace("\n", " ")
    assert re.search("already (exists|holds .*); .*replace it with --overwrite, or choose another", refusal)
    run(*call, "--overwrite", ok=ok)
    if output.is_dir():
        after = {path.name: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
        assert before.keys() == after.keys() and before["notes.txt"] == after["notes.txt"]
        assert all(after[name] > before[name] for name in before if name != "notes.txt")
    if command not in ("init", "convert", "eval", "select", "embed", "data"):
        assert "continue it with --resume, replace" in refusal
        message = run(*call, "--overwrite", "--resume", ok=False).replace("\n", " ")
        assert "resume continues the earlier run and overwrite replaces it" in message


def test_a_run_is_not_removed_by_one_that_cannot_start(trained, tmp_path):
    """The files go once data and options of the new run are found to be in order."""
    shutil.copytree(trained / "run", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    output = ("--set", f"output={tmp_path / 'run'}")
    run("train", trained / "run.yaml", *output, "--set", "data.train=absent.xyz", "--overwrite", ok=False)
    (tmp_path / "bad.xyz").write_text("1\n\nU 0 0 0\n")
    run("md", trained / "run" / "best.safetensors", tmp_path / "bad.xyz", "--steps", 1, "-o", tmp_path / "run",
        "--overwrite", ok=False)  # fmt: skip
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


# --- encodings


def test_output_in_any_encoding(trained):
    """A character may be lost, never the run."""
    model, folder = trained / "run" / "best.safetensors", trained / "encodings"
    settings = [*TINY, "training.steps=2", f"output={folder / 'run'}", "device=cpu"]
    for encoding, *command in (
        ("gbk", "info", model),
        ("ascii", "info", model),
        ("ascii", "train", trained / "run.yaml", *(x for s in settings for x in ("--set", s))),
        ("ascii", "eval", model, trained / "train.xyz", "-o", folder / "eval"),
    ):
        result = CliRunner(charset=encoding).invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, (command, result.output, result.exception)
    result = CliRunner(charset="ascii").invoke(app, ["info", "Å.pt"])
    assert result.exit_code == 1 and r"there is no model file \xc5.pt" in result.output
    assert "Å" in (folder / "eval" / "errors.csv").read_text(encoding="utf-8")


# --- signals


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("train", signal.SIGINT),
        *((command, signal.SIGTERM) for command in ("train", "md", "relax", "pairs", "neb", "eos", "screen")),
    ],
)
def test_a_run_ended_by_a_signal_says_so_in_its_status(trained, tmp_path, monkeypatch, command, number):
    model, structure = trained / "run" / "best.safetensors", tmp_path / "one.xyz"
    calls: list[int] = []

    def signalled(original):
        def call(*arguments, **options):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        return call

    first, last = crystal(0) if command == "eos" else molecule(0, 5), molecule(0, 5)
    last.positions[0] += 0.3
    write(structure, first)
    write(tmp_path / "two.xyz", last)
    settings = [
        *TINY,
        "training.steps=9",
        "training.batch_size=1",
        f"output={tmp_path / 'run'}",
        "device=cpu",
    ]
    arguments: dict[str, tuple] = {
        "train": (trained / "run.yaml", *(x for s in settings for x in ("--set", s))),
        "md": (model, structure, "--steps", 50, "--device", "cpu", "-o", tmp_path / "run"),
        "relax": (model, structure, "--fmax", 1e-9, "--device", "cpu", "-o", tmp_path / "run"),
        "pairs": (model, "--step", 1, "--device", "cpu", "-o", tmp_path / "run"),
        "neb": (
            model,
            structure,
            tmp_path / "two.xyz",
            "--fmax",
            1e-9,
            "--device",
            "cpu",
            "-o",
            tmp_path / "run",
        ),
        "eos": (model, structure, "--no-relax", "--device", "cpu", "-o", tmp_path / "run"),
    }
    if command == "screen":
        pytest.importorskip("torch_sim")
        arguments["screen"] = (model, structure, "--fmax", 1e-9, "--device", "cpu", "-o", tmp_path / "run")
    places = {
        "screen": "dpa4.interfaces.torchsim.DPA4Model.forward",
        "train": "dpa4.training.trainer.Trainer._train_on",
        "pairs": "dpa4.simulation.runs.store.Records.append",
    }
    place = places.get(command, "dpa4.interfaces.ase.DPA4Calculator.calculate")
    module, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(module)
    monkeypatch.setattr(owner, name, signalled(getattr(owner, name)))
    result = CliRunner().invoke(app, [command, *map(str, arguments[command])])
    assert result.exit_code == 128 + number, (result.output, result.exception)
    assert "continue" in result.output and "Traceback" not in result.output
    # the next command of the process is not ended by this signal
    assert CliRunner().invoke(app, ["info", str(model)]).exit_code == 0


# --- outputs


@pytest.mark.parametrize(
    "command", ["eval", "embed", "report", "convert", "pairs", "md", "relax", "neb", "eos", "train"]
)
def test_outputs_are_tried_before_the_work(trained, tmp_path, monkeypatch, command):
    model, data = trained / "run" / "best.safetensors", trained / "train.xyz"
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "run"
    arguments = {
        "eval": (model, data, "-o", inside),
        "embed": (model, data, "-o", inside.with_suffix(".npz")),
        "report": (trained / "run", "-o", inside.with_suffix(".html")),
        "convert": (model, inside.with_suffix(".pt")),
        "pairs": (model, "-o", inside),
        "md": (model, data, "--steps", 5, "-o", inside),
        "relax": (model, data, "-o", inside),
        "neb": (model, data, data, "-o", inside),
        "eos": (model, trained / "crystal.xyz", "-o", inside),
        "train": (trained / "run.yaml", "--set", f"output={inside}"),
    }[command]
    write(trained / "crystal.xyz", crystal(0))

    def worked(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr("dpa4.potential.Potential.forward", worked)
    monkeypatch.setattr("dpa4.potential.Potential.of_edges", worked)
    monkeypatch.setattr("dpa4.training.run.prepare", worked)
    monkeypatch.setattr("dpa4.potential.checkpoint.read_checkpoint", worked) if command == "convert" else None
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == 1, (result.output, result.exception)
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    assert line.startswith("error: cannot ") and str(tmp_path / "file") in line


@pytest.mark.parametrize(
    "command", ["info", "convert", "eval", "embed", "pairs", "md", "relax", "neb", "eos", "train"]
)
def test_every_command_refuses_a_damaged_file_in_one_line(trained, tmp_path, command):
    model, data = tmp_path / "model.safetensors", trained / "train.xyz"
    with safe_open(trained / "run" / "best.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    tensors["model.types.table"].view(-1)[0] = float("nan")
    save_file(tensors, model, metadata)
    write(tmp_path / "crystal.xyz", crystal(0))
    out = tmp_path / "out"
    arguments = {
        "info": (model,),
        "convert": (model, out.with_suffix(".pt")),
        "eval": (model, data, "-o", out),
        "embed": (model, data, "-o", out.with_suffix(".npz")),
        "pairs": (model, "-o", out),
        "md": (model, data, "--steps", 5, "-o", out),
        "relax": (model, data, "-o", out),
        "neb": (model, data, data, "-o", out),
        "eos": (model, tmp_path / "crystal.xyz", "-o", out),
        "train": (trained / "run.yaml", "--resume", "--set", f"output={out}"),
    }[command]
    message = "model.types.table is not finite"
    if command == "train":
        shutil.copytree(trained / "run", out)
        with (out / "last.pt").open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) // 2)
        message = "last.pt: it is damaged"
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == 1, (result.output, result.exception)
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    assert line.startswith("error: cannot read ") and message in line


def test_square_brackets_of_a_message_are_printed(tmp_path):
    """Names such as dpa4[aselmdb] and paths are not markup."""
    assert "absent[bold].pt" in run("eval", "absent[bold].pt", "x.xyz", ok=False)
    assert "[/tmp].pt" in run("eval", tmp_path / "[/tmp].pt", "x.xyz", ok=False)


def test_errors_of_pydantic_are_in_plain_words(capsys):
    with pytest.raises(typer.Exit), user_errors():
        RunConfig.model_validate({"data": {"train": "a.xyz"}, "device": "gpu"})
    assert capsys.readouterr().err.startswith("error: device: device = 'gpu': allowed are auto, cpu, cuda")


def test_unknown_option_suggests_the_right_one(trained):
    output = run("train", trained / "run.yaml", "--set", "training.lerning_rate=1", ok=False)
    assert "unknown option training.lerning_rate; did you mean 'learning_rate'?" in output


def test_published_checkpoint_through_the_calculator():
    """The checkpoint that ships with deepmd-kit, straight from its .pt, on 192 atoms of water."""
    path = shared("reference/fixtures/P_pretrained/model_f32.pt")
    with np.load(shared("reference/fixtures/P_pretrained/ref.npz")) as file:
        reference = {k.split("/")[1]: file[k] for k in file.files if k.startswith("water192/")}
    from ase import Atoms

    atoms = Atoms(reference["Z"], positions=reference["pos"], cell=reference["cell"].reshape(3, 3), pbc=True)
    atoms.calc = DPA4Calculator(path, device="cpu")
    # float32 rounding: 5e-7 eV per atom, 3e-5 eV/Angstrom
    assert atoms.get_potential_energy() == pytest.approx(
        float(np.ravel(reference["energy"])[0]), abs=5e-7 * 192
    )
    np.testing.assert_allclose(atoms.get_forces(), reference["forces"].reshape(-1, 3), atol=3e-5)
    stress = -reference["virial"].reshape(3, 3) / atoms.get_volume()
    np.testing.assert_allclose(atoms.get_stress(voigt=False), stress, atol=1e-6)


def test_run_file_is_recorded(trained):
    header = (trained / "run" / "last.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length])["__metadata__"]
    assert "provenance" in " ".join(metadata)


def test_the_home_folder_in_arguments_and_options(trained, monkeypatch, tmp_path):
    """A shell leaves ~ as it is in --output=~/x, --set and run files."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(trained / "run" / "best.safetensors", home / "m.safetensors")
    for name in ("train.xyz", "valid.xyz"):
        shutil.copy(trained / "train.xyz", home / name)
    cpu = ("--device", "cpu")
    run("eval", "~/m.safetensors", "~/train.xyz", "~/train.xyz", "--output=~/eval", *cpu)
    run("init", "~/run.yaml", "--train", "~/train.xyz")
    sets = [*TINY, "training.steps=2", "output=~/run", "data.validation=~/valid.xyz", "device=cpu"]
    run("train", "~/run.yaml", *(x for s in sets for x in ("--set", s)))
    message = run("bench", "spice", "~/m.safetensors", "--data=~/data", *cpu, ok=False)
    assert str(home / "data") in message.replace("\n", "")
    assert {p.name for p in home.iterdir()} >= {"eval", "run.yaml", "run"}
    assert (home / "run" / "best.safetensors").is_file()
    assert not list((tmp_path / "here").iterdir())


def test_ghost_atoms_and_huge_coordinates_are_named(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, config = trained / "run" / "best.safetensors", trained / "run.yaml"
    for symbol, place, message in (
        ("X", "3", "bad.xyz, frame 0: atom 1 is a ghost or dummy atom (X)"),
        (
            "H",
            "1e306",
            "bad.xyz, frame 0: the position of atom 1 is beyond 1e+08 Angstrom: [0.0, 0.0, 1e+306]",
        ),
    ):
        text = f"2\nProperties=species:S:1:pos:R:3 energy=-1\nH 0 0 0\n{symbol} 0 0 {place}\n"
        (tmp_path / "bad.xyz").write_text(text)
        for command in (
            ("train", config, "--set", "data.train=bad.xyz", "--set", f"output={tmp_path / 'run'}"),
            ("eval", model, "bad.xyz"),
            ("relax", model, "bad.xyz"),
            ("md", model, "bad.xyz", "--steps", 1),
        ):
            output = run(*command, ok=False).replace("\n", "")
            assert message in output and "Traceback" not in output and "pydantic" not in output
        output = run("screen", model, "bad.xyz", "-o", tmp_path / f"screen-{symbol}", "--device", "cpu")
        assert "1 refused" in output.replace("refused: 1", "1 refused"), output


def test_dynamics_of_heavy_water_has_its_masses(trained, tmp_path):
    (tmp_path / "hdo.xyz").write_text("3\n\nO 0 0 0\nD 0 0.8 0.6\nH 0 -0.8 0.6\n")
    model = trained / "run" / "best.safetensors"
    run("md", model, tmp_path / "hdo.xyz", "-o", tmp_path / "md", "--steps", 2, "--device", "cpu")
    atoms = read(tmp_path / "md" / "trajectory.xyz", "-1")
    np.testing.assert_allclose(atoms.get_masses(), [15.999, 2.014101778, 1.008], atol=1e-6)
