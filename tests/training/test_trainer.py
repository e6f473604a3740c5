"""Training runs: files and messages, exact resume after any interruption, refusals."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from dpa4 import output
from dpa4.data import read_frames
from dpa4.model import DPA4
from dpa4.model.presets import preset
from dpa4.output import CsvLog, read_csv
from dpa4.potential.checkpoint import load_potential
from dpa4.training import logs, plots
from dpa4.training import trainer as trainer_module
from dpa4.training.evaluation import ErrorRow, ErrorTable, evaluate
from dpa4.training.options import RunConfig
from dpa4.training.prepare import batch_budget, changed_options
from dpa4.training.run import check_unused, train
from dpa4.training.run_data import split
from dpa4.training.state import load_state, save_state
from dpa4.training.trainer import Trainer
from training_runs import MODEL, SILENT, Killed, argon, assert_same_run, kill_at, options, run

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def copied_run(finished_run, tmp_path) -> Path:
    """Copy of a finished run whose files may change."""
    return Path(shutil.copytree(finished_run.folder, tmp_path / "run"))


# --- the run and its files


def test_files_of_a_run(finished_run):
    folder = finished_run.folder
    names = {path.name for path in folder.iterdir()}
    models, logs = {"best.safetensors", "last.safetensors", "last.pt"}, {"train.csv", "valid.csv"}
    assert names == models | logs | {"learning_curve.png", "run.yaml"}
    train_rows, valid_rows = read_csv(folder / "train.csv"), read_csv(folder / "valid.csv")
    assert [int(r["step"]) for r in train_rows] == [2, 4, 6, 8, 10, 12, 13]
    assert [int(r["step"]) for r in valid_rows] == [5, 10, 13]
    assert all(float(r["virial_mae"]) > 0 for r in valid_rows)
    assert load_state(folder / "last.pt")["step"] == 13
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_model_reproduces_its_validation_errors(finished_run, argon_file):
    best = min(read_csv(finished_run.folder / "valid.csv"), key=lambda r: float(r["score"]))
    assert best["best"] == "1"
    _, validation = split(read_frames(argon_file), 0.2, 0)
    table = evaluate(load_potential(finished_run.best), validation)
    assert table.row("forces").mae == pytest.approx(float(best["forces_mae"]), rel=1e-5)
    assert table.row("energy per atom").rmse == pytest.approx(float(best["energy_rmse"]), rel=1e-4)
    score = 20 * table.row("energy per atom").mae + 20 * table.row("forces").mae
    score += 5 * table.row("virial per atom").mae
    assert score / 1e3 == pytest.approx(float(best["score"]), rel=1e-4)


def test_training_errors_have_the_definition_of_validation_errors(argon_file, tmp_path):
    """MAE per component, in the same units: of one step with all data, and of the model before it on these data."""
    data = ase.io.read(argon_file, ":")
    data[0].calc = SinglePointCalculator(data[0], energy=data[0].get_potential_energy())  # without forces
    data[2].info["config_weight"] = 3.0  # weights count in the loss only
    ase.io.write(tmp_path / "data.xyz", data)
    values = options(tmp_path / "data.xyz", tmp_path / "run", steps=2, batch_size=20, log_interval=1)
    shutil.copy(tmp_path / "data.xyz", tmp_path / "same.xyz")
    values["data"] |= {"validation": str(tmp_path / "same.xyz")}
    values["training"] |= {"validation_interval": 1, "ema_decay": None, "precision": "high"}
    train(RunConfig.model_validate(values), console=SILENT)
    rows, valid = (read_csv(tmp_path / "run" / name) for name in ("train.csv", "valid.csv"))
    for name in ("energy", "forces", "virial"):
        assert float(rows[1][f"{name}_mae"]) == pytest.approx(float(valid[0][f"{name}_mae"]), rel=1e-4)
    for name in ("energy", "forces"):  # the terms of the loss are others
        assert float(rows[1][f"{name}_mae"]) != pytest.approx(1e3 * float(rows[1][name]), rel=0.05)


def test_a_run_of_an_earlier_version_resumes_without_training_errors(argon_file, tmp_path, finished_run):
    """Its table lacks their columns, its state their sums."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    rows = [
        {k: v for k, v in row.items() if k not in logs.TRAIN_ERRORS} for row in read_csv(folder / "train.csv")
    ]
    output.write_csv(folder / "train.csv", list(rows[0]), rows)
    state = load_state(folder / "last.pt")
    del state["errors"]
    save_state(state, folder / "last.pt")
    run(argon_file, folder, resume=True, steps=15)
    found = read_csv(folder / "train.csv")
    assert [r["step"] for r in found] == ["2", "4", "6", "8", "10", "12", "13", "14", "15"]
    assert [r["loss"] for r in found[:7]] == [r["loss"] for r in rows]
    assert [bool(r["forces_mae"]) for r in found] == [False] * 7 + [True] * 2
    assert sum(bool(plots._points(found, name)) for name in logs.TRAIN_ERRORS) == 3


def test_learning_curve(tmp_path):
    """Errors of both data sets in one panel, loss terms apart, plain numbers on the axes, a time axis."""
    rows = [
        {"step": 20 * k, "epoch": 0, "learning_rate": 0.01, "energy": 1 / k, "forces": 2 / k, "loss": 50 / k,
         "gradient_norm": 3.0, "seconds": 12.0 * k, "energy_mae": 900 / k, "forces_mae": 1500 / k}
        for k in range(1, 30)
    ]  # fmt: skip
    output.write_csv(tmp_path / "train.csv", logs.TRAIN_COLUMNS, rows)
    valid = [
        {
            "step": 100 * k,
            "epoch": 0,
            "score": 1 / k,
            "best": int(k < 5),
            "energy_mae": 700 / k,
            "forces_mae": 99.0,
        }
        for k in range(1, 6)
    ]
    output.write_csv(tmp_path / "valid.csv", logs.VALID_COLUMNS, valid)
    figure = plots.draw_learning_curve(tmp_path)
    energy, forces, loss, terms, *_ = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in energy.lines}
    assert lines["training"] == [[20 * k, 900 / k] for k in range(1, 30)]
    assert lines["validation"] == [[100 * k, 700 / k] for k in range(1, 6)]
    assert lines["chosen model: 175.0"] == [[400, 175]]
    assert "MAE (meV/atom)" in energy.get_title() and "MAE (meV/Å)" in forces.get_title()
    assert [line.get_ydata()[0] for line in loss.lines] == [50]
    assert {line.get_label() for line in terms.lines} == {"energy (eV/atom)", "forces (eV/Å)"}
    figure.draw_without_rendering()
    (time_axis,) = energy.child_axes
    assert time_axis.get_xlabel() == "training time (min)"
    assert time_axis.get_xlim() == pytest.approx((0, 5.8), abs=0.01)  # 29 * 12 s at the last step
    for axis in (energy, forces, loss, terms):
        ticks = [tick.get_text() for tick in axis.get_yticklabels()]
        assert len(ticks) > 1 and all(re.fullmatch(r"[\d.]+", text) for text in ticks)
    output.write_csv(tmp_path / "train.csv", logs.TRAIN_COLUMNS, [])
    output.write_csv(tmp_path / "valid.csv", logs.VALID_COLUMNS, [])
    plots.draw_learning_curve(tmp_path).draw_without_rendering()  # a run that ended before its first row


def test_what_is_printed(finished_run):
    text = finished_run.text
    assert finished_run.best == finished_run.folder / "best.safetensors"
    assert "training.virial_weight = 5, because there are stress or virial labels" in text
    assert "step       5  epoch    1.2  energy" in text and "step      13  epoch    3.2  energy" in text
    assert "parameters" in text and "elements Ar" in text and "reference energies (eV): Ar" in text
    assert "13 steps, 4 per epoch; MAE/RMSE of the validation data every 5 steps" in text
    assert "energy" in text and "meV/Å" in text and "best" in text


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adamw", "loss": "mse", "schedule": "cosine"},
        {"precision": "fast", "loss": "huber", "ema_decay": None},
        {"batch_size": None, "max_atoms": 12, "gradient_clip": None, "virial_weight": 0},
    ],
)
def test_variants_run_and_resume(argon_file, tmp_path, monkeypatch, training):
    training = training | {"steps": 4, "validation_interval": 2}
    run(argon_file, tmp_path / "whole", **training)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run(argon_file, tmp_path / "part", **training)
    run(argon_file, tmp_path / "part", resume=True, **training)
    assert_same_run(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize(("optimizer", "basis"), [("hybrid_muon", "gaussian"), ("adamw", "bessel")])
def test_a_fixed_basis_is_neither_trained_nor_averaged(argon_file, tmp_path, optimizer, basis):
    """Gradients, weight decay and the moving average leave it alone. A trained basis and other weights move."""

    def trained(basis: str) -> list[dict[str, torch.Tensor]]:
        folder = tmp_path / basis.replace("/", "-")
        settings = options(argon_file, folder, optimizer=optimizer, steps=3, ema_decay=0.5, weight_decay=10)
        settings["model"] = MODEL | {"basis": basis}
        train(RunConfig.model_validate(settings), console=SILENT)
        return [load_file(folder / f"{name}.safetensors") for name in ("best", "last")]

    name = "model.basis.frequencies"
    start = DPA4(preset("nano", ("Ar",), cutoff=4.0, n_radial=6, basis=basis)).basis.frequencies
    for free, fixed in zip(trained(basis), trained(f"{basis}/fix"), strict=True):
        assert not torch.equal(free[name], start)
        assert torch.equal(fixed[name], start)
        assert not torch.equal(fixed["model.radial.last.weight"], free["model.radial.last.weight"])


@pytest.mark.slow
def test_training_learns(argon_file, tmp_path):
    """Force errors fall far below those of predicting zero."""
    train_path = tmp_path / "train.xyz"
    ase.io.write(train_path, argon(80, seed=1))
    run(train_path, tmp_path / "run", steps=500, batch_size=8, validation_interval=100, learning_rate=5e-3)
    rows = read_csv(tmp_path / "run" / "valid.csv")
    _, validation = split(read_frames(train_path), 0.2, 0)
    zero = 1e3 * np.mean(np.abs(np.concatenate([f.forces.ravel() for f in validation])))
    assert float(rows[-1]["forces_mae"]) < 0.25 * zero
    assert float(rows[-1]["forces_mae"]) < 0.5 * float(rows[0]["forces_mae"])
    losses = [float(r["loss"]) for r in read_csv(tmp_path / "run" / "train.csv")]
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])


def test_without_validation_the_last_model_is_the_best(argon_file, tmp_path):
    values = options(argon_file, tmp_path / "run", steps=3, validation_interval=2)
    values["data"]["validation_fraction"] = 0
    train(RunConfig.model_validate(values), console=SILENT)
    assert read_csv(tmp_path / "run" / "valid.csv") == []
    best, last = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_a_validation_file_is_used_whole(argon_file, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", argon(3, seed=5))
    values = options(argon_file, tmp_path / "run", steps=1)
    values["data"]["validation"] = str(tmp_path / "valid.xyz")
    train(RunConfig.model_validate(values), console=SILENT)
    table = evaluate(
        load_potential(tmp_path / "run" / "best.safetensors"), read_frames(tmp_path / "valid.xyz")
    )
    (row,) = read_csv(tmp_path / "run" / "valid.csv")
    assert table.row("forces").mae == pytest.approx(float(row["forces_mae"]), rel=1e-5)


def test_an_absent_error_is_not_zero(argon_file, tmp_path, monkeypatch):
    """Without one of its errors there is no score, and NaN is never the best; averages of the log leave it out."""
    table = ErrorTable((ErrorRow("all", "forces", "meV/Å", 3, 1.0, 1.0, 1.0),))
    monkeypatch.setattr(trainer_module, "error_table", lambda *_: table)
    folder = tmp_path / "run"
    run(argon_file, folder, steps=6, validation_interval=2, batch_size=1, log_interval=1, patience=3)
    assert [(r["score"], r["best"]) for r in read_csv(folder / "valid.csv")] == [("nan", "0")] * 3
    assert not (folder / "best.safetensors").exists()
    virial = [r["virial"] for r in read_csv(folder / "train.csv")]
    assert "" in virial and all(float(v) > 0 for v in virial if v)  # the clusters have no virial


def test_the_learning_rate_follows_the_number_of_steps(argon_file, tmp_path):
    _, text = run(argon_file, tmp_path / "auto", steps=2, learning_rate="auto", log_interval=1)
    assert "training.learning_rate = 0.01, because the run has 2 steps" in text
    assert float(read_csv(tmp_path / "auto" / "train.csv")[0]["learning_rate"]) == 1e-2
    assert "learning_rate: auto" in (tmp_path / "auto" / "run.yaml").read_text()
    _, text = run(argon_file, tmp_path / "low", steps=2, learning_rate=3e-3)
    assert "training.learning_rate = 0.003 is low for 2 steps" in text and "auto would be 0.01" in text
    _, text = run(argon_file, tmp_path / "high", steps=2, learning_rate=4e-3)
    assert "training.learning_rate" not in text


def test_early_stop(argon_file, tmp_path, monkeypatch):
    quantities = ("energy per atom", "forces", "virial per atom")
    table = ErrorTable(tuple(ErrorRow("all", name, "meV", 3, 1.0, 1.0, 1.0) for name in quantities))
    monkeypatch.setattr(trainer_module, "error_table", lambda *_: table)
    _, text = run(argon_file, tmp_path / "run", steps=40, validation_interval=2, patience=3)
    rows = read_csv(tmp_path / "run" / "valid.csv")
    assert [r["best"] for r in rows] == ["1", "0", "0", "0"]
    assert "stopped early after step 8: 3 validations without a better one" in text
    # a resumed run that had stopped early stops again at once
    _, text = run(argon_file, tmp_path / "run", resume=True, steps=40, validation_interval=2, patience=3)
    assert "nothing is left to do: 8 steps are done, and training.patience = 3 is exhausted" in text
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 8


def test_tensorboard(argon_file, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(argon_file, tmp_path / "run", steps=4, validation_interval=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4]
    logged = [float(r["loss"]) for r in read_csv(tmp_path / "run" / "train.csv")]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(logged)
    assert [e.step for e in events.Scalars("validation/forces_mae")] == [2, 4]


def test_tensorboard_that_is_not_installed(argon_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs TensorBoard .* pip install .*\[tensorboard\]'"):
        run(argon_file, tmp_path / "run", tensorboard=True)


# --- exact resume


@pytest.mark.parametrize("step", [1, 5, 12])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    argon_file, tmp_path, monkeypatch, finished_run, step
):
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run(argon_file, tmp_path / "run")
    run(argon_file, tmp_path / "run", resume=True)
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_killed_in_the_middle_of_writing_a_checkpoint(argon_file, tmp_path, monkeypatch, finished_run):
    original = output.flush_to_disk
    writes = []

    def half(path):
        original(path)
        if path.name.startswith(".last.pt"):
            writes.append(path)
            if len(writes) == 3:  # after those of steps 0 and 5
                path.write_bytes(path.read_bytes()[:1000])
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(output.files, "flush_to_disk", half)
        with pytest.raises(Killed):
            run(argon_file, tmp_path / "run")
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 5
    run(argon_file, tmp_path / "run", resume=True)
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_sigterm_finishes_the_step_saves_and_returns(argon_file, tmp_path, monkeypatch, finished_run):
    original = Trainer._train_on

    def signalled(self, batch):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on", signalled)
        _, text = run(argon_file, tmp_path / "run")
    assert "stopped after step 7; continue with --resume" in text
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 7
    assert signal.getsignal(signal.SIGTERM) is before
    run(argon_file, tmp_path / "run", resume=True)
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_what_a_run_killed_before_its_first_state_leaves_is_replaced(argon_file, tmp_path, finished_run):
    """Earlier versions wrote options and tables first."""
    (tmp_path / "run").mkdir()
    for name in ("run.yaml", "train.csv"):
        (tmp_path / "run" / name).touch()
    run(argon_file, tmp_path / "run")
    assert_same_run(finished_run.folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("files", "unused"),
    [
        ({}, True),
        ({".lock": ""}, True),
        ({"run.yaml": "", "train.csv": "step\n20\n", "valid.csv": "step\n"}, True),
        ({"run.yaml": "# my options"}, False),
        ({"run.yaml": "", "train.csv": "", "valid.csv": "step\n20\n"}, False),
        ({"run.yaml": "", "train.csv": "", "best.safetensors": ""}, False),
        ({".hidden": ""}, False),
    ],
)
def test_folders_that_a_run_may_use(tmp_path, files, unused):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with (
        nullcontext()
        if unused
        else pytest.raises(
            FileExistsError, match="already holds (a run|files); .*replace it with --overwrite"
        )
    ):
        check_unused(tmp_path)


def test_leftovers_of_killed_writes_are_removed_on_resume(argon_file, copied_run):
    for name in (".tmpa1B2c3", ".last.pt.123-456.tmp"):
        (copied_run / name).touch()
    run(argon_file, copied_run, resume=True)
    assert not list(copied_run.glob(".*"))


def test_a_full_disk_loses_nothing(argon_file, tmp_path, monkeypatch, finished_run):
    """The limit of the file size fails where a full disk would."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = Trainer._train_on

    def fill(self, batch):
        if self.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on", fill)
        try:
            with pytest.raises(OSError, match=r"^cannot write .*last\.safetensors: File too large$"):
                run(argon_file, tmp_path / "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 5
    run(argon_file, tmp_path / "run", resume=True)
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_a_folder_that_is_removed_during_the_run(argon_file, tmp_path, monkeypatch):
    original = Trainer._train_on

    def remove(self, batch):
        if self.step == 3:
            shutil.rmtree(tmp_path / "run")
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_on", remove)
    with pytest.raises(
        FileNotFoundError, match=r"^cannot write .*best.safetensors: there is no folder .*run"
    ):
        run(argon_file, tmp_path / "run")


def test_files_have_the_mode_of_the_umask(finished_run):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in finished_run.folder.iterdir()}
    before = os.umask(0)
    os.umask(before)
    assert set(modes.values()) == {0o666 & ~before}


def test_logs_are_on_the_disk_before_the_state(argon_file, tmp_path, monkeypatch):
    order = []
    for owner, name in ((trainer_module.RunLog, "flush_to_disk"), (trainer_module, "save_state")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, f=original: (order.append(n), f(*a)))
    run(argon_file, tmp_path / "run", steps=2)
    assert order == ["save_state", "flush_to_disk", "save_state"]


def test_a_second_run_in_the_folder_is_refused(argon_file, copied_run):
    before = {path.name: path.read_bytes() for path in copied_run.iterdir()}
    with output.OutputFolder(copied_run):
        for resume in (True, False):
            with pytest.raises(BlockingIOError, match="another process is working on .*run; wait until"):
                run(argon_file, copied_run, resume=resume)
    assert {path.name: path.read_bytes() for path in copied_run.iterdir()} == before


# --- other data


def resume_on(data: Path, folder: Path, new_data: bool = False, steps: int = 20, **data_options) -> str:
    """Resume a run with other data; return what is printed."""
    values = options(data, folder, steps=steps)
    values["data"] |= data_options
    console = Console(file=io.StringIO(), record=True, width=200)
    train(RunConfig.model_validate(values), resume=True, new_data=new_data, console=console)
    return console.export_text()


@pytest.mark.parametrize(
    ("change", "which"),
    [
        ("energies", "training and validation"),
        ("more", "training and validation"),
        ("split", "training and validation"),
        ("validation", "training and validation"),
        ("keys", "training and validation"),
    ],
)
def test_resume_refuses_other_data(argon_file, copied_run, tmp_path, change, which):
    images = ase.io.read(argon_file, ":")
    data = {}
    if change == "energies":
        for atoms in images:
            atoms.calc.results["energy"] += 1.0
    elif change == "more":
        images += argon(2, seed=1)
    elif change == "split":
        data = {"split_seed": 1}
    elif change == "validation":
        data = {"validation": str(argon_file)}
    else:
        for atoms in images:
            atoms.info["other_energy"] = atoms.calc.results["energy"] + 1.0
        data = {"keys": {"energy": "other_energy"}}
    ase.io.write(tmp_path / "other.xyz", images)
    before = {path.name: path.read_bytes() for path in copied_run.iterdir()}
    with pytest.raises(
        ValueError, match=rf"the {which} data are not those of .*last.pt; .*--resume --new-data"
    ):
        resume_on(tmp_path / "other.xyz", copied_run, **data)
    assert {path.name: path.read_bytes() for path in copied_run.iterdir()} == before


def test_the_same_data_in_another_file_go_on(argon_file, copied_run, tmp_path, finished_run):
    shutil.copy(argon_file, tmp_path / "moved.xyz")
    resume_on(tmp_path / "moved.xyz", copied_run, steps=13)
    assert_same_run(finished_run.folder, copied_run)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config", "{}", "its configuration is not valid"),
        ("config", 5, "its entry config is 5"),
        ("data", {}, "does not say training, validation of its data"),
        ("data", {"training": 1}, "must be texts"),
        ("history", [5], "its entry history has 5"),
        ("history", 5, "its entry history is 5"),
        ("provenance", {"training data": ""}, "does not say validation data of its data"),
        ("undetermined", [1], "must be texts"),
        ("first_epoch", -1, "its entry first_epoch is -1"),
        ("coverage", "x", "not a description of training data"),
    ],
)
def test_states_with_a_damaged_entry_about_their_data(finished_run, tmp_path, name, value, message):
    path = tmp_path / "last.pt"
    state = load_state(finished_run.folder / "last.pt")
    assert name in state
    save_state(state | {name: value}, path)
    with pytest.raises(ValueError, match=rf"^cannot resume from .*last.pt: .*{message}"):
        load_state(path)


@pytest.mark.filterwarnings("ignore:the energies are")  # far from those of the earlier data
def test_resume_on_new_data(copied_run, tmp_path):
    """Energies of the reference stay, the best score starts anew, coverage and provenance are the union."""
    far = Atoms("Ar2", [(0, 0, 0), (0, 0, 3.9)])
    far.calc = SinglePointCalculator(far, energy=200.0, forces=np.zeros((2, 3)))
    ase.io.write(tmp_path / "other.xyz", [far] * 8)
    before = load_potential(copied_run / "best.safetensors")
    text = resume_on(tmp_path / "other.xyz", copied_run, new_data=True)
    reference = float(before.reference_energies[0])
    assert f"reference energies (eV): Ar {reference:.4f}" in text
    assert "new training and validation data: the model keeps its elements and reference energies" in text
    after = load_potential(copied_run / "best.safetensors")
    assert float(after.reference_energies[0]) == reference
    rows = read_csv(copied_run / "valid.csv")
    first = next(row for row in rows if int(row["step"]) > 13)
    assert first["best"] == "1" and float(first["score"]) > max(float(row["score"]) for row in rows[:3])
    assert after.coverage.shortest == before.coverage.shortest  # 3.9 Angstrom is longer
    with safe_open(copied_run / "last.safetensors", framework="pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert re.fullmatch(
        r"10 structures of argon.xyz \(until step 13\); 6 structures of other.xyz",
        provenance["training data"],
    ), provenance["training data"]
    # from here on, the new data are the data of the run
    text = resume_on(tmp_path / "other.xyz", copied_run, steps=24)
    assert "new training" not in text
    assert load_state(copied_run / "last.pt")["step"] == 24
    assert load_potential(copied_run / "last.safetensors").coverage.shortest == before.coverage.shortest


def test_new_elements_and_new_data_without_resume(argon_file, copied_run, tmp_path):
    images = argon(6)
    images[0].symbols[0] = "Kr"
    images[0].calc = SinglePointCalculator(images[0], energy=0.0, forces=np.zeros((len(images[0]), 3)))
    ase.io.write(tmp_path / "other.xyz", images)
    with pytest.raises(ValueError, match="Kr"):
        resume_on(tmp_path / "other.xyz", copied_run, new_data=True)
    with pytest.raises(ValueError, match="new data are for a run to resume"):
        train(RunConfig.model_validate(options(argon_file, tmp_path / "new")), new_data=True, console=SILENT)


def test_a_run_on_new_data_that_is_killed_equals_an_uninterrupted_one(finished_run, tmp_path, monkeypatch):
    ase.io.write(tmp_path / "other.xyz", argon(9, seed=3))
    folders = [Path(shutil.copytree(finished_run.folder, tmp_path / name)) for name in ("whole", "part")]
    resume_on(tmp_path / "other.xyz", folders[0], new_data=True)
    with monkeypatch.context() as patch:
        kill_at(patch, 17)
        with pytest.raises(Killed):
            resume_on(tmp_path / "other.xyz", folders[1], new_data=True)
    resume_on(tmp_path / "other.xyz", folders[1])
    assert_same_run(*folders)


@pytest.mark.parametrize(
    "changes", [{}, {"steps": 5}, {"learning_rate": 1e-3}], ids=["same", "fewer", "rate"]
)
def test_resuming_a_run_without_steps_left_changes_no_file(argon_file, copied_run, finished_run, changes):
    before = {path.name: path.read_bytes() for path in copied_run.iterdir() if path.suffix != ".png"}
    best, text = run(argon_file, copied_run, resume=True, **changes)
    assert best == copied_run / "best.safetensors"
    assert "nothing is left to do: 13 steps are done" in text and "--set training.steps=N" in text
    assert before == {path.name: path.read_bytes() for path in copied_run.iterdir() if path.suffix != ".png"}
    run(argon_file, copied_run, resume=True, steps=14)  # as the message says
    assert load_state(copied_run / "last.pt")["step"] == 14
    assert "steps: 14" in (copied_run / "run.yaml").read_text()


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from dpa4.training.run_file import load_run_config
from dpa4.training.run import train
train(load_run_config(sys.argv[1]), resume=sys.argv[2] == "resume")
"""


@pytest.mark.slow
def test_a_process_killed_at_random_moments_and_resumed(argon_file, tmp_path):
    """SIGKILL at random times, also within writes: the result equals that of an undisturbed run."""
    import yaml

    def start(name, mode):
        values = options(argon_file, tmp_path / name, steps=60, validation_interval=1, log_interval=1)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-c", SCRIPT, str(path), mode]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole = start("whole", "new")
    assert whole.wait(timeout=200) == 0, whole.stderr.read()
    generator = random.Random(0)
    state, kills = tmp_path / "part" / "last.pt", 0
    process = start("part", "new")
    for _ in range(6):
        deadline = time.monotonic() + 60
        before = state.stat().st_mtime_ns if state.exists() else 0
        while (state.stat().st_mtime_ns if state.exists() else 0) == before and process.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint within a minute"
            time.sleep(0.005)
        time.sleep(0.4 * generator.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stderr.close()
        process = start("part", "resume")
    assert process.wait(timeout=200) == 0, process.stderr.read()
    assert kills >= 3, "the run was over before it was killed often enough"
    assert not list((tmp_path / "part").glob(".*"))
    assert_same_run(tmp_path / "whole", tmp_path / "part")


# --- refusals


def test_an_output_folder_with_files_is_not_overwritten(argon_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="already holds files; replace it with --overwrite, or choose"):
        run(argon_file, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_another_run_is_not_overwritten(argon_file, copied_run):
    with pytest.raises(
        FileExistsError, match="already holds a run; continue it with --resume, replace it with"
    ):
        run(argon_file, copied_run)


def test_resume_refuses_another_model_and_names_other_changes(argon_file, copied_run):
    with pytest.raises(ValueError, match=r"cannot be resumed .* training\.optimizer: hybrid_muon -> adamw"):
        run(argon_file, copied_run, resume=True, steps=14, optimizer="adamw")
    with pytest.raises(ValueError, match=r"cannot be resumed .* training\.adam_for_basis: False -> True"):
        run(argon_file, copied_run, resume=True, steps=14, adam_for_basis=True)
    values = options(argon_file, copied_run)
    values["model"] = MODEL | {"lmax": 2}
    with pytest.raises(ValueError, match=r"cannot be resumed .* model\.lmax: None -> 2"):
        train(RunConfig.model_validate(values), resume=True, console=SILENT)
    _, text = run(argon_file, copied_run, resume=True, steps=14)
    assert "changed since the checkpoint: training.steps: 13 -> 14" in text
    assert load_state(copied_run / "last.pt")["step"] == 14


def test_a_state_from_before_the_option_for_the_basis_goes_on_without_it(argon_file, copied_run):
    state = load_state(copied_run / "last.pt")
    text = state["options"].replace("  adam_for_basis: false\n", "")
    assert text != state["options"]
    save_state(state | {"options": text}, copied_run / "last.pt")
    with pytest.raises(ValueError, match=r"cannot be resumed .* training\.adam_for_basis: None -> True"):
        run(argon_file, copied_run, resume=True, adam_for_basis=True)
    _, printed = run(argon_file, copied_run, resume=True)
    assert "resumed after step 13" in printed and "adam_for_basis" not in printed


def test_a_state_with_numbers_of_steps_as_plain_integers_goes_on(
    argon_file, tmp_path, monkeypatch, finished_run
):
    """As earlier versions wrote it."""
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            run(argon_file, tmp_path / "run")
    state = load_state(tmp_path / "run" / "last.pt")
    for entry in state["optimizer"]["state"].values():
        if "step" in entry:
            entry["step"] = int(entry["step"])
    for group in state["optimizer"]["param_groups"]:
        del group["eps"]
    save_state(state, tmp_path / "run" / "last.pt")
    run(argon_file, tmp_path / "run", resume=True)
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_a_run_with_adam_for_the_basis_resumes_exactly(argon_file, tmp_path, monkeypatch):
    limits = {"steps": 4, "validation_interval": 2, "adam_for_basis": True}
    run(argon_file, tmp_path / "whole", **limits)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            run(argon_file, tmp_path / "part", **limits)
    run(argon_file, tmp_path / "part", resume=True, **limits)
    assert_same_run(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize(
    ("bad", "where", "launched"), [(7, "batch 3 of epoch 2", 8), (13, "batch 1 of epoch 4", 13)]
)
def test_numbers_that_are_not_finite_stop_the_run_and_lose_nothing(
    argon_file, tmp_path, monkeypatch, finished_run, bad, where, launched
):
    """In the middle of a run, where the next step is launched before it is known, and in the last step."""
    original = trainer_module.training_step

    def broken(potential, batch, loss):
        value, terms = original(potential, batch, loss)
        broken.calls += 1
        return (value * float("nan") if broken.calls == bad else value), terms

    broken.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "training_step", broken)
        with pytest.raises(
            FloatingPointError, match=rf"step {bad} \({where}\) is not finite: .*loss nan.*lower"
        ):
            run(argon_file, tmp_path / "run")
    state = load_state(tmp_path / "run" / "last.pt")
    assert broken.calls == launched
    assert state["step"] == bad - 1 and all(torch.isfinite(t).all() for t in state["potential"].values())
    run(argon_file, tmp_path / "run", resume=True)
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_a_weighted_target_without_labels(argon_file, tmp_path):
    images = argon(12)[::2]  # clusters, without stress
    path = tmp_path / "nostress.xyz"
    ase.io.write(path, images)
    with pytest.raises(
        ValueError, match=r"training\.virial_weight = 3, but no training structure has a label for virial"
    ):
        run(path, tmp_path / "run", virial_weight=3)
    _, text = run(path, tmp_path / "run", steps=1)
    assert "training.virial_weight = 0, because there is no stress or virial label" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(argon_file, tmp_path):
    values = options(argon_file, tmp_path / "run") | {"device": "cuda"}
    with pytest.raises(
        RuntimeError, match="device = cuda, but no CUDA device is available; use device: cpu or auto"
    ):
        train(RunConfig.model_validate(values), console=SILENT)


def test_a_split_that_leaves_nothing(argon_file):
    frames = read_frames(argon_file)
    with pytest.raises(
        ValueError, match=r"data\.validation_fraction = 0\.5 of 1 structure leaves none to train on"
    ):
        split(frames[:1], 0.5, 0)


# --- parts


def test_split_leaves_what_training_needs(argon_file):
    """One structure with an element or label of its own is trained on; both parts have every label if possible."""
    frames = read_frames(argon_file)
    clusters = [frame for frame in frames if frame.virial is None]
    crystals = [frame for frame in frames if frame.virial is not None]
    for seed in range(10):
        krypton = replace(clusters[0], atomic_numbers=clusters[0].atomic_numbers * 2)
        a, b = split([*clusters, krypton, *crystals[:2]], 0.2, seed, ["energy", "virial"])
        assert sum(frame is krypton for frame in a) == 1
        assert (
            sum(frame.virial is not None for frame in a) == sum(frame.virial is not None for frame in b) == 1
        )
    message = "cannot be split: training needs every structure with a label for virial"
    with pytest.raises(ValueError, match=message):
        split([*clusters, crystals[0]], 0.2, 0, ["energy", "virial"])
    elements = [replace(frame, atomic_numbers=frame.atomic_numbers + k) for k, frame in enumerate(clusters)]
    with pytest.raises(ValueError, match="cannot be split: training needs every structure, because"):
        split(elements, 0.2, 0)


def test_split_is_a_partition_and_depends_on_the_seed(argon_file):
    frames = read_frames(argon_file)
    a, b = split(frames, 0.3, 0)
    assert len(b) == 4 and {id(f) for f in a} | {id(f) for f in b} == {id(f) for f in frames}
    assert [f.energy for f in split(frames, 0.3, 0)[1]] == [f.energy for f in b]
    assert [f.energy for f in split(frames, 0.3, 1)[1]] != [f.energy for f in b]
    assert split(frames, 0, 0)[1] == []


def test_batch_budgets(argon_file, tmp_path):
    def budget(**training):
        return batch_budget(RunConfig.model_validate({"data": {"train": "x"}, "training": training}).training)

    assert budget() == {"batch_size": 8}
    assert budget(batch_size=3) == {"batch_size": 3}
    assert budget(max_atoms=30, max_edges=900) == {"max_atoms": 30, "max_edges": 900}


def test_changed_options():
    assert changed_options("a: {b: 1, c: 2}\nd: x", "a: {b: 1, c: 3}\ne: y") == [
        "a.c: 2 -> 3",
        "d: x -> None",
        "e: None -> y",
    ]


def test_csv_log_resumes_without_duplicates_or_broken_rows(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, ("step", "x", "y"))
    for step in (1, 2, 3):
        log.write({"step": step, "x": 0.5 * step})
    log.close()
    with path.open("a") as file:
        file.write("4,2.")  # cut off by a kill
    assert [r["step"] for r in read_csv(path)] == ["1", "2", "3"]
    log = CsvLog(path, ("step", "x", "y"), resume_step=2)
    log.write({"step": 3, "x": 9, "y": 1})
    log.close()
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "x", "y"],
            ["1", "0.5", ""],
            ["2", "1.0", ""],
            ["3", "9", "1"],
        ]
    CsvLog(path, ("step", "x", "y")).close()
    assert read_csv(path) == []


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer", {}),
        ("average", [torch.zeros(3)]),
        ("average", []),
        ("sums", torch.zeros(2)),
        ("random", {"cpu": torch.zeros(3)}),
    ],
)
def test_a_state_with_other_entries_is_refused(copied_run, argon_file, entry, value):
    state = copied_run / "last.pt"
    content = torch.load(state, weights_only=True)
    torch.save(content | {entry: value}, state)
    with pytest.raises(
        ValueError, match=r"last.pt is damaged or belongs to another run: its entries do not fit"
    ):
        run(argon_file, copied_run, resume=True)


def test_damaged_and_foreign_states(tmp_path):
    path = tmp_path / "last.pt"
    save_state({"step": 3, "x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"cannot resume from .*last\.pt: it has no entry epoch"):
        load_state(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        ValueError, match=r"cannot read .*last\.pt: it is damaged, incomplete or not a PyTorch"
    ):
        load_state(path)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"last\.pt is not a training state; resuming needs the last\.pt"):
        load_state(path)
    torch.save({"format": 2}, path)
    with pytest.raises(ValueError, match=r"training state of format 2; this version reads format 1"):
        load_state(path)


def test_runs_of_earlier_versions_are_resumed_without_the_option_symmetry(argon_file, copied_run):
    state = load_state(copied_run / "last.pt")
    earlier = yaml.safe_load(state["options"])
    assert earlier["model"].pop("symmetry") == "O3"
    save_state(state | {"options": yaml.safe_dump(earlier)}, copied_run / "last.pt")
    assert "resumed after step 13" in run(argon_file, copied_run, resume=True)[1]
