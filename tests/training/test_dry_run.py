"""Dry runs: what they print, that they leave nothing behind, and that their estimate is that of the run."""

import io

import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.lj import LennardJones
from rich.console import Console
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.output import read_csv
from dpa4.training import dry_run, train
from dpa4.training.dry_run import DryRun, duration
from dpa4.training.options import RunConfig
from dpa4.training.trainer import Trainer
from training_runs import SILENT, argon, options


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ase.io.write("train.xyz", argon(15))
    return tmp_path / "train.xyz"


def config(data, **training) -> RunConfig:
    return RunConfig.model_validate(options(data, "run", **training))


def files(folder) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_counts_and_batches(data, monkeypatch):
    """Ten steps, of which the first is the largest batch of the epoch, and no validation that is saved."""
    images = argon(15)
    images[7] = images[7].repeat((2, 1, 1))
    images[7].calc = LennardJones(sigma=2.3, epsilon=0.2, rc=6.0, ro=4.0, smooth=True)
    images[7].get_potential_energy()
    ase.io.write(data, images)
    sizes, original = [], Trainer._train_on

    def recorded(self, batch):
        sizes.append(len(batch.max_force[batch.max_force == 0]))  # without the fragments that bound forces
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_on", recorded)
    before = files(data.parent)
    found = dry_run(config(data, steps=1000, validation_interval=300), SILENT)
    assert files(data.parent) == before
    assert len(sizes) == 10 and sizes[0] == max(sizes) == found.largest_batch == 16
    assert (found.steps, found.steps_per_epoch, found.epochs) == (1000, 4, 250)
    assert (found.timed, found.validations, found.compilation) == (7, 4, 0)
    assert found.seconds == pytest.approx(1000 * found.seconds_per_step + 4 * found.seconds_per_validation)
    assert 2**27 < found.memory < 2**35  # of a process with PyTorch


def test_fewer_steps_than_ten(data):
    found = dry_run(config(data, steps=1), SILENT)
    assert (found.steps, found.timed) == (1, 1)
    assert found.seconds_per_step > 0


def test_without_validation_data(data):
    given = options(data, "run", steps=5)
    given["data"]["validation_fraction"] = 0
    found = dry_run(RunConfig.model_validate(given), SILENT)
    assert (found.validations, found.seconds_per_validation) == (0, 0)


def test_compilation_is_part_of_the_time(data, monkeypatch):
    """With a stand-in for compiled steps, which says that it has spent 30 seconds."""
    calls = []

    class Compiled:
        seconds = 0.0

        def __init__(self, potential, differentiate, weight_update, console):
            self.differentiate, self.weight_update = differentiate, weight_update

        def start(self, batches):
            Compiled.seconds = 30.0

        def step(self, batch):
            calls.append("step")
            return self.differentiate(batch)

        def update(self):
            self.weight_update.apply()

        def check_evaluation(self, batches):
            calls.append("evaluation")

        def run(self, work):
            return work()

    monkeypatch.setattr("dpa4.training.compilation.CompiledTraining", Compiled)
    found = dry_run(config(data, steps=20, validation_interval=20, compile=True), SILENT)
    assert calls == ["step"] * 10 + ["evaluation"]
    assert found.compilation == 30
    assert 30 < found.seconds < 60
    assert found.seconds_per_step > 0


@pytest.mark.slow
def test_estimate_is_the_time_of_the_run(data):
    settings = config(data, steps=120, validation_interval=120)
    found = dry_run(settings, SILENT)
    train(settings, console=SILENT)
    spent = float(read_csv(data.parent / "run/train.csv")[-1]["seconds"])
    assert 1 / 3 < found.steps * found.seconds_per_step / spent < 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(data):
    given = options(data, "run", steps=100)
    found = dry_run(RunConfig.model_validate(given | {"device": "cuda"}), SILENT)
    assert found.device.startswith("cuda") and found.compilation > 0
    assert 2**20 < found.memory < torch.cuda.get_device_properties(0).total_memory
    assert 0 < found.seconds_per_step < 1


def test_used_folder_and_faults_are_reported(data):
    (data.parent / "run").mkdir()
    (data.parent / "run/best.safetensors").touch()
    console = Console(file=io.StringIO(), record=True, width=200)
    dry_run(config(data, steps=3), console)
    assert "a run would not start: run already holds files" in console.export_text()
    images = argon(15)
    images[4].positions[1] = images[4].positions[0]
    ase.io.write(data, images)
    before = files(data.parent)
    with pytest.raises(ValueError, match="train.xyz, frame 4: .*coincide") as caught:
        dry_run(config(data), SILENT)
    assert "saved" not in str(caught.value) and files(data.parent) == before


def test_numbers_that_are_not_finite(data, monkeypatch):
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors: [t.new_tensor(np.nan) for t in tensors])
    with pytest.raises(
        FloatingPointError, match="^step 1 .* is not finite: .*gradient_norm nan. Look for"
    ) as caught:
        dry_run(config(data), SILENT)
    assert "saved" not in str(caught.value) and not (data.parent / "run").exists()


def test_command(data):
    result = CliRunner().invoke(app, ["init", "run.yaml"])
    tiny = ["model.channels=8", "model.lmax=1", "model.n_blocks=1", "model.mixing_layers=1", "model.cutoff=4"]
    settings = [f"--set={s}" for s in [*tiny, "training.steps=40", "training.batch_size=3", "device=cpu"]]
    result = CliRunner().invoke(app, ["train", "run.yaml", "--dry-run", *settings])
    assert result.exit_code == 0, result.output
    rows = ("steps", "epochs", "seconds per step", "validations", "estimated time", "peak memory")
    assert all(f"│ {row} " in result.output for row in rows) and "GiB" in result.output
    assert max(map(len, result.output.rpartition("Dry run")[2].partition("next: ")[0].splitlines())) <= 80
    assert "per epoch" not in result.output  # and nothing is said of validations to come
    again = [f"--set {s}" for s in [*tiny, "training.steps=40", "training.batch_size=3", "device=cpu"]]
    assert result.output.endswith(f"next: dpa4 train run.yaml {' '.join(again)}\n")
    assert not (data.parent / "run").exists()
    result = CliRunner().invoke(app, ["train", "run.yaml", "--dry-run", "--resume"])
    assert result.exit_code == 1 and "leave out --resume" in result.output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.012 s"),
        (7.83, "7.8 s"),
        (59.7, "60 s"),
        (61, "1 min"),
        (3560, "59 min"),
        (3600, "1 h 0 min"),
        (14700, "4 h 5 min"),
        (200000, "2 d 7 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_memory_of_a_gpu_and_of_an_unknown_system():
    found = DryRun(10, 5, 7, 0.1, 1, 1.0, 30.0, 2**31, 256, "cuda")
    text = Console(record=True, width=80, file=io.StringIO())
    text.print(found)
    shown = text.export_text()
    assert "2.00 GiB of the GPU, largest batch 256 atoms" in shown and "compilation" in shown
    text.print(DryRun(10, 5, 7, 0.1, 1, 1.0, 0.0, None, 256, "cpu"))
    assert "not known on this system" in text.export_text()
