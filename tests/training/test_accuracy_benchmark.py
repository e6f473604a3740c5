"""`benchmarks/accuracy.py`: recipes are valid run files, interrupted sets continue, parts of files are exact."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpa4.data import read_frames

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(accuracy, argon_file, tmp_path) -> Path:
    """Folder of data sets, all of which are the same twenty structures of argon."""
    folder = tmp_path / "data"
    for kind in accuracy.DATA_SETS.values():
        for name in (kind.train, *kind.more, *kind.tests.values()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(argon_file.read_bytes())
    return folder


def test_every_recipe_is_a_valid_run_file(accuracy, tmp_path):
    for recipe in accuracy.RECIPES:
        job = accuracy.Job("acac", recipe, 3, 40, ("model.lmax=2",))
        config = accuracy.configuration(job, tmp_path / "train.xyz", tmp_path / "run")
        assert (config.training.steps, config.training.seed) == (40, 3)
        assert config.model.build(("H", "O")).lmax == 2
        assert config.training.adam_for_basis == recipe.endswith("adam-for-basis")


def test_experiments_name_recipes_and_data_sets(accuracy):
    for sets, recipes in accuracy.EXPERIMENTS.values():
        assert set(sets) <= set(accuracy.DATA_SETS) and set(recipes) <= set(accuracy.RECIPES)


def test_parts_of_a_file(accuracy, data, tmp_path, monkeypatch):
    source = data / "acac/train_300K.xyz"
    texts = accuracy.frames_of(source)
    assert "".join(texts).encode() == source.read_bytes()
    total = len(texts)
    monkeypatch.setitem(
        accuracy.DATA_SETS, "3bpa", accuracy.DATA_SETS["3bpa"]._replace(structures=3, held_out=2)
    )
    train_file, tests = accuracy.files_of("3bpa", data, tmp_path / "run")
    frames = read_frames(data / "3bpa/train_300K.xyz")
    chosen = [i * (total - 2) // 3 for i in range(3)]
    assert [f.energy for f in read_frames(train_file)] == [frames[i].energy for i in chosen]
    assert [f.energy for f in read_frames(tests["held out"])] == [f.energy for f in frames[-2:]]


def test_every_tenth_structure_of_each_file_is_tested(accuracy, data, tmp_path):
    train_file, tests = accuracy.files_of("inorganic", data, tmp_path / "run")
    assert list(tests) == ["alkali", "held out"] and accuracy.DATA_SETS["inorganic"].num_tests == 2
    first, second = (accuracy.frames_of(data / f"inorganic/{n}.xyz") for n in ("mptrj-random-1k", "mpf-TP"))
    assert accuracy.frames_of(tests["held out"]) == [*first[9::10], *second[9::10]]
    kept = [frame for frames in (first, second) for i, frame in enumerate(frames) if i % 10 != 9]
    assert accuracy.frames_of(train_file) == kept


@pytest.mark.slow
def test_rungs_of_the_ladder_differ_in_what_they_are_named_after(accuracy, tmp_path):
    def options(recipe):
        job = accuracy.Job("inorganic", recipe, 0, 40)
        config = accuracy.configuration(job, tmp_path / "train.xyz", tmp_path / "run")
        return config.model.build(("H", "O")).model_dump() | config.training.model_dump()

    first, *others = accuracy.EXPERIMENTS["ladder"][1]
    assert first == "ladder" and len(others) == 11
    changed = {
        name: {key: value for key, value in options(name).items() if value != options(first)[key]}
        for name in others
    }
    assert changed["ladder-sum"] == {"n_atten_head": 0} and changed["ladder-cosine"] == {"schedule": "cosine"}
    assert all(changed.values()) and max(map(len, changed.values())) == 2


def test_table_relative_to_the_first_recipe(accuracy):
    def row(recipe, seed, forces, seconds):
        errors = {"energy per atom (meV/atom) mae": 2.0, "forces (meV/Å) mae": forces, "seconds": seconds}
        return {
            "data": "acac",
            "test": "300K",
            "steps": 3,
            "extra": [],
            "recipe": recipe,
            "seed": seed,
        } | errors

    rows = [row("a", 0, 10.0, 4.0), row("a", 1, 20.0, 4.0), row("b", 0, 9.0, 8.0), row("b", 1, 16.0, 8.0)]
    rows += [row("b", 2, 1.0, 1.0)]  # without a counterpart
    lines = accuracy.relative_table(rows, ["a", "b"]).splitlines()[2:]
    assert lines == [
        "| acac | 300K | 3 |  | a | 2 | 2 | 15 ± 5 |  | 4 |",
        "| acac | 300K | 3 |  | b | 2 | 1 | 0.85 ± 0.05 |  | 2 |",
    ]


TINY = (
    "model.preset=nano",
    "model.channels=8",
    "model.n_blocks=1",
    "training.compile=false",
    "training.ema_decay=null",
)


@pytest.fixture
def in_this_process(accuracy, monkeypatch):
    """Run trainings in this process instead of subprocesses, and stop new ones after a step; return their lengths."""
    train, train_on, steps = accuracy.train, accuracy.trainer.Trainer._train_on, []

    def stop_after_one_step(self, batch):
        train_on(self, batch)
        if not self.resumed:
            os.kill(os.getpid(), signal.SIGTERM)

    def recorded(config, *, resume):
        best = train(config, resume=resume)
        steps.append(accuracy.load_state(config.output / "last.pt")["step"])
        return best

    class Process:
        def __init__(self, job, data, runs):
            self.returncode = 0
            try:
                accuracy.run_job(job, data, runs / job.name)
            except SystemExit as end:
                self.returncode = end.code

        def poll(self):
            return self.returncode

    monkeypatch.setattr(accuracy.trainer.Trainer, "_train_on", stop_after_one_step)
    monkeypatch.setattr(accuracy, "train", recorded)
    monkeypatch.setattr(accuracy, "_start", Process)
    monkeypatch.setattr(accuracy.time, "sleep", lambda seconds: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield steps
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("no_figures")
def test_stopped_trainings_continue_and_finished_ones_are_skipped(
    accuracy, data, tmp_path, in_this_process, capsys
):
    job, output = accuracy.Job("acac", "adam-for-basis", 0, 3, TINY), tmp_path / "out"
    assert accuracy.run_all([job], data, output, 1, None) == 1
    assert accuracy.rows_of(output / "results.jsonl") == []
    assert accuracy.run_all([job], data, output, 1, None) == 0
    assert accuracy.run_all([job], data, output, 1, None) == 0
    assert in_this_process == [1, 3]
    printed = capsys.readouterr().out
    assert f"{job.name} stopped" in printed and "1 trainings, 1 finished before" in printed
    rows = accuracy.rows_of(output / "results.jsonl")
    assert [row["test"] for row in rows] == ["300K", "600K"]
    for row in rows:
        assert row["energy (meV) rmse"] >= row["energy (meV) mae"] > 0
        assert row["forces (meV/Å) rmse"] >= row["forces (meV/Å) mae"] > 0
        assert (row["seed"], row["steps"], row["extra"]) == (0, 3, list(TINY))
        assert row["parameters"] > 0 and row["seconds"] > 0
        assert "training.adam_for_basis=true" in row["options"]
    other = [row | {"seed": 1, "forces (meV/Å) rmse": row["forces (meV/Å) rmse"] + 2} for row in rows]
    lines = accuracy.table([*rows, *other]).splitlines()
    assert len(lines) == 4 and all("| 2 |" in line and "± 1 " in line for line in lines[2:])


@pytest.mark.slow
def test_list_of_an_experiment():
    command = [sys.executable, str(SCRIPT), "nowhere", "anchor", "--seeds", "0", "--list"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "rmd17-aspirin-50_default_6000steps_seed0" in found and len(found) == len(set(found))
