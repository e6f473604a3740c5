"""Messages: warnings at the user's own line, names that were probably meant, lack of memory on one line."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import typer
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import write
from rich.console import Console
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.cli.options import user_errors
from dpa4.data import read_frames
from dpa4.data.coverage import Coverage
from dpa4.interfaces import DPA4Calculator
from dpa4.messages import warn
from dpa4.potential import Potential, save_potential
from dpa4.simulation import relax, run_md
from dpa4.training import RunConfig, evaluate, load_run_config, train
from helpers import molecule as random_molecule
from helpers import random_potential

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "dpa4"


def narrow_model():
    """Tiny potential of H, C and O whose training data had no oxygen, and no short C-H distance."""
    potential = random_potential(n_blocks=1, lmax=1)
    potential.coverage = Coverage(potential.config.cutoff, ("H", "C"), {("H", "C"): 3.0, ("H", "H"): 0.5})
    return potential


def test_warnings_through_ase_point_to_the_line_that_asks():
    atoms = molecule("CH3OH")
    atoms.calc = DPA4Calculator(narrow_model(), device="cpu")
    with pytest.warns(RuntimeWarning) as caught:
        atoms.get_potential_energy()
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and "training data" in texts[0] and "closer than any H-C pair" in texts[1], texts
    assert {w.filename for w in caught} == {__file__}


def test_a_warning_is_shown_once_per_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("the same line")
        warn("the same line")
    assert len(caught) == 2 and {w.filename for w in caught} == {__file__}


def test_a_program_and_the_command_show_no_line_of_the_package(tmp_path, monkeypatch):
    save_potential(narrow_model(), tmp_path / "model.safetensors")
    molecule("CH3OH").write(tmp_path / "start.xyz")
    program = """
        import ase.io
        from dpa4 import DPA4Calculator
        atoms = ase.io.read("start.xyz")
        atoms.calc = DPA4Calculator("model.safetensors", device="cpu")
        print(atoms.get_forces().shape)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program), encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    monkeypatch.chdir(tmp_path)
    command = ["relax", "model.safetensors", "start.xyz", "--steps", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    for text, beginning in ((found.stderr, "program.py:6: RuntimeWarning: "), (result.output, "warning: ")):
        lines = [line for line in text.splitlines() if "training data" in line]
        assert len(lines) == 2 and all(beginning in line for line in lines), text
        assert "dpa4/interfaces" not in text and "ase/" not in text, text


@pytest.mark.parametrize(
    ("command", "message"),
    {
        "md a b --steps 1 --ensemble npl": "'npl' is not one of 'nve', 'langevin', 'nvt', 'npt'; did you mean npt?.",
        "md a b --steps 1 --cell Fulll": "did you mean full?.",
        "relax a b --optimizer lbgfs": "did you mean lbfgs?.",
        "md a b --steps 1 --dtype float46": "did you mean float64?.",
        "screen a b --precision hihg": "did you mean high?.",
        "md a b --steps 1 --ensemble xyz": "'npt'.",
    }.items(),
)
def test_choices_that_were_probably_meant(command, message):
    result = CliRunner().invoke(app, command.split())
    text = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and message in text and "Value error" not in text, text


def test_choices_in_python_that_were_probably_meant(tmp_path):
    atoms = molecule("H2O")
    with pytest.raises(ValueError, match="ensemble must be one of .*, got 'NTV'; did you mean nvt\\?"):
        run_md(atoms, EMT(), tmp_path, steps=1, ensemble="NTV")
    with pytest.raises(ValueError, match="optimizer must be one of .*, got 'bgfs'; did you mean bfgs\\?"):
        relax(atoms, EMT(), optimizer="bgfs")


# --- lack of memory

LACK = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 139 GiB of which ..."


def lacking(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(LACK)


def test_lack_of_memory_in_dynamics(tmp_path, monkeypatch):
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "model.safetensors")
    molecule("CH3OH").write(tmp_path / "start.xyz")
    monkeypatch.setattr(Potential, "forward", lacking)
    files = [str(tmp_path / name) for name in ("model.safetensors", "start.xyz")]
    result = CliRunner().invoke(app, ["md", *files, "--steps", "1", "--output", str(tmp_path / "md")])
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert (
        result.exit_code == 1
        and "energy and forces of 6 atoms and 30 edges do not fit into the memory" in line
    )
    assert "smaller structure" in line and "Tried to allocate" not in result.output


def test_lack_of_memory_in_a_batch(monkeypatch):
    pytest.importorskip("torch_sim")
    from torch_sim import initialize_state

    from dpa4.interfaces.torchsim import DPA4Model

    model = DPA4Model(random_potential(n_blocks=1, lmax=1), device="cpu")
    state = initialize_state([molecule("CH3OH"), molecule("H2O")], model.device, model.dtype)
    monkeypatch.setattr(Potential, "forward", lacking)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"2 structures with 9 atoms and .*fewer structures at once"
    ):
        model(state)


def test_lack_of_memory_in_training_and_evaluation(tmp_path, monkeypatch):
    options = run_options(tmp_path)
    monkeypatch.setattr("dpa4.training.trainer.training_step", lacking)
    text = r"the gradients of a batch of \d structures with .* do not fit .*lower training.batch_size"
    with pytest.raises(torch.OutOfMemoryError, match=text):
        train(options, console=Console(quiet=True))
    monkeypatch.setattr(Potential, "forward", lacking)
    with pytest.raises(torch.OutOfMemoryError, match="predictions for 6 structures with .*--max-atoms"):
        evaluate(random_potential(n_blocks=1, lmax=1), read_frames(tmp_path / "train.xyz"))


def test_lack_of_memory_elsewhere_is_one_line(capsys):
    with pytest.raises(typer.Exit), user_errors():
        lacking()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: CUDA out of memory; compute less at once"), line


def run_options(folder: Path) -> RunConfig:
    """Options of a short run on six small molecules."""
    frames = []
    for seed in range(6):
        atoms = random_molecule(seed, 5)
        atoms.info["REF_energy"] = 0.1 * seed
        atoms.arrays["REF_forces"] = -atoms.positions
        frames.append(atoms)
    write(folder / "train.xyz", frames)
    (folder / "run.yaml").write_text(
        f"output: {folder / 'run'}\ndevice: cpu\n"
        "model: {channels: 8, lmax: 1, n_blocks: 1, mixing_layers: 1, cutoff: 4}\n"
        f"data: {{train: {folder / 'train.xyz'}, validation_fraction: 0.3}}\n"
        "training: {steps: 4, batch_size: 2, validation_interval: 2}\n"
    )
    return load_run_config(folder / "run.yaml")


def test_no_module_warns_in_another_way():
    found = [p for p in PACKAGE.rglob("*.py") if "warnings.warn(" in p.read_text(encoding="utf-8")]
    assert found == []
