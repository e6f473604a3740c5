import csv
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from safetensors.torch import load_file

from dpa4.data import read_frames
from dpa4.output import CsvLog, read_csv
from dpa4.potential.checkpoint import load_potential
from dpa4.tracing.region import Region
from dpa4.training import compilation
from dpa4.training import trainer as trainer_module
from dpa4.training.evaluation import evaluate
from dpa4.training.options import RunConfig
from dpa4.training.prepare import batch_budget, changed_options, prepare, split
from dpa4.training.replayed_step import ReplayedStep
from dpa4.training.state import load_state, save_state
from dpa4.training.trainer import Trainer, train

SILENT = Console(quiet=True)
MODEL = {"preset": "nano", "channels": 8, "cutoff": 4.0, "n_radial": 6, "mixing_layers": 1, "n_blocks": 1}


def argon(count: int, seed: int = 0) -> list[Atoms]:
    """Lennard-Jones clusters (energy, forces) and strained crystals (stress too), far from all equal."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        if i % 2:
            atoms = bulk("Ar", "fcc", a=3.4 + 0.3 * rng.random(), cubic=True)
        else:
            grid = np.array([[x, y, 0.0] for x in (0, 2.5) for y in (0, 2.5)])
            atoms = Atoms("Ar4", positions=grid)
        atoms.rattle(0.1, rng=rng)
        atoms.calc = LennardJones(sigma=2.3, epsilon=0.2, rc=6.0, ro=4.0, smooth=True)
        atoms.get_potential_energy()
        atoms.info["config_type"] = "crystal" if i % 2 else "cluster"
        images.append(atoms)
    return images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "argon.xyz"
    ase.io.write(path, argon(13))
    return path


def options(data: Path, output: Path, **training) -> dict:
    defaults = {
        "steps": 13,
        "batch_size": 3,
        "validation_interval": 5,
        "log_interval": 2,
        "learning_rate": 2e-3,
    }
    return {
        "model": MODEL,
        "data": {"train": str(data), "validation_fraction": 0.2},
        "training": defaults | training,
        "output": str(output),
        "device": "cpu",
    }


def run(data, output, resume=False, **training) -> tuple[Path, str]:
    console = Console(file=io.StringIO(), record=True, width=200)
    config = RunConfig.model_validate(options(data, output, **training))
    best = train(config, resume=resume, console=console)
    return best, console.export_text()


def assert_same_run(one: Path, two: Path) -> None:
    """Models, and logs without their times, are equal bit for bit."""
    for name in ("best.safetensors", "last.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)
    for name in ("train.csv", "valid.csv"):
        a, b = read_csv(one / name), read_csv(two / name)
        assert [{k: v for k, v in row.items() if k != "seconds"} for row in a] == [
            {k: v for k, v in row.items() if k != "seconds"} for row in b
        ]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    run(data, folder)
    return folder


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing of the trainer handles it."""


def kill_at(monkeypatch, step: int) -> None:
    """Make the trainer die in the step after ``step`` finished ones."""
    original = Trainer._train_on

    def deadly(self, batch):
        if self.step == step:
            raise Killed
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_on", deadly)


# --- the run and its files


def test_files_of_a_run(uninterrupted, data):
    names = {path.name for path in uninterrupted.iterdir()}
    models, logs = {"best.safetensors", "last.safetensors", "last.pt"}, {"train.csv", "valid.csv"}
    assert names == models | logs | {"learning_curve.png", "run.yaml"}
    train_rows, valid_rows = read_csv(uninterrupted / "train.csv"), read_csv(uninterrupted / "valid.csv")
    assert [int(r["step"]) for r in train_rows] == [2, 4, 6, 8, 10, 12, 13]
    assert [int(r["step"]) for r in valid_rows] == [5, 10, 13]
    assert all(float(r["virial_mae"]) > 0 for r in valid_rows)
    assert load_state(uninterrupted / "last.pt")["step"] == 13


def test_the_best_model_reproduces_its_validation_errors(uninterrupted, data):
    best = min(read_csv(uninterrupted / "valid.csv"), key=lambda r: float(r["score"]))
    assert best["best"] == "1"
    _, validation = split(read_frames(data), 0.2, 0)
    table = evaluate(load_potential(uninterrupted / "best.safetensors"), validation)
    assert table.row("forces").mae == pytest.approx(float(best["forces_mae"]), rel=1e-5)
    assert table.row("energy per atom").rmse == pytest.approx(float(best["energy_rmse"]), rel=1e-4)
    score = 20 * table.row("energy per atom").mae + 20 * table.row("forces").mae
    score += 5 * table.row("virial per atom").mae
    assert score / 1e3 == pytest.approx(float(best["score"]), rel=1e-4)


def test_what_is_printed(data, tmp_path):
    best, text = run(data, tmp_path / "run", steps=2, validation_interval=1)
    assert best == tmp_path / "run" / "best.safetensors"
    assert "training.virial_weight = 5, because there are stress or virial labels" in text
    assert "parameters" in text and "elements Ar" in text and "reference energies (eV): Ar" in text
    assert "2 steps, 4 per epoch; MAE/RMSE of the validation data every 1 steps" in text
    assert "energy" in text and "meV/Å" in text and "best" in text


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adamw", "loss": "mse", "schedule": "cosine"},
        {"precision": "fast", "loss": "huber", "ema_decay": None},
        {"batch_size": None, "max_atoms": 12, "gradient_clip": None, "virial_weight": 0},
    ],
)
def test_variants_run_and_resume(data, tmp_path, monkeypatch, training):
    training = training | {"steps": 6, "validation_interval": 2}
    run(data, tmp_path / "whole", **training)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run(data, tmp_path / "part", **training)
    run(data, tmp_path / "part", resume=True, **training)
    assert_same_run(tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow
def test_training_learns(data, tmp_path):
    """Errors of forces fall far below those of predicting zero."""
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


def test_without_validation_the_last_model_is_the_best(data, tmp_path):
    values = options(data, tmp_path / "run", steps=3, validation_interval=2)
    values["data"]["validation_fraction"] = 0
    train(RunConfig.model_validate(values), console=SILENT)
    assert read_csv(tmp_path / "run" / "valid.csv") == []
    best, last = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_a_validation_file_is_used_whole(data, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", argon(3, seed=5))
    values = options(data, tmp_path / "run", steps=1)
    values["data"]["validation"] = str(tmp_path / "valid.xyz")
    train(RunConfig.model_validate(values), console=SILENT)
    table = evaluate(
        load_potential(tmp_path / "run" / "best.safetensors"), read_frames(tmp_path / "valid.xyz")
    )
    (row,) = read_csv(tmp_path / "run" / "valid.csv")
    assert table.row("forces").mae == pytest.approx(float(row["forces_mae"]), rel=1e-5)


def test_early_stop(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "error_table", lambda *_: trainer_module_table())
    _, text = run(data, tmp_path / "run", steps=40, validation_interval=2, patience=3)
    rows = read_csv(tmp_path / "run" / "valid.csv")
    assert [r["best"] for r in rows] == ["1", "0", "0", "0"]
    assert "stopped early after step 8: 3 validations without a better one" in text
    # resuming a run that stopped early stops again at once
    run(data, tmp_path / "run", resume=True, steps=40, validation_interval=2, patience=3)
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 8


def trainer_module_table():
    from dpa4.training.evaluation import ErrorRow, ErrorTable

    return ErrorTable((ErrorRow("all", "forces", "meV/Å", 3, 1.0, 1.0, 1.0),))


def test_tensorboard(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(data, tmp_path / "run", steps=4, validation_interval=2, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4]
    logged = [float(r["loss"]) for r in read_csv(tmp_path / "run" / "train.csv")]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(logged)
    assert [e.step for e in events.Scalars("validation/forces_mae")] == [2, 4]


def test_tensorboard_that_is_not_installed(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs TensorBoard .* pip install dpa4\[tensorboard\]"):
        run(data, tmp_path / "run", tensorboard=True)


# --- exact resume


@pytest.mark.parametrize("step", [1, 5, 8, 12])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    data, tmp_path, monkeypatch, uninterrupted, step
):
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            run(data, tmp_path / "run")
    if step < 5:  # no checkpoint yet
        with pytest.raises(FileNotFoundError, match=r"no training state .*last\.pt to resume from"):
            run(data, tmp_path / "run", resume=True)
        return
    run(data, tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_killed_in_the_middle_of_writing_a_checkpoint(data, tmp_path, monkeypatch, uninterrupted):
    original = torch.save
    writes = []

    def half(obj, path, *args, **kwargs):
        writes.append(path)
        original(obj, path, *args, **kwargs)
        if len(writes) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            run(data, tmp_path / "run")
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 5
    run(data, tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_sigterm_finishes_the_step_saves_and_returns(data, tmp_path, monkeypatch, uninterrupted):
    original = Trainer._train_on

    def signalled(self, batch):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on", signalled)
        _, text = run(data, tmp_path / "run")
    assert "stopped after step 7; continue with --resume" in text
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 7
    assert signal.getsignal(signal.SIGTERM) is before
    run(data, tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(data, tmp_path, uninterrupted):
    run(data, tmp_path / "run")
    run(data, tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from dpa4.training.run_file import load_run_config
from dpa4.training.trainer import train
train(load_run_config(sys.argv[1]), resume=sys.argv[2] == "resume")
"""


@pytest.mark.slow
def test_a_process_killed_at_random_moments_and_resumed(data, tmp_path):
    """SIGKILL at random times, also within writes: the end is that of a run that was left alone."""
    import yaml

    def start(name, mode):
        values = options(data, tmp_path / name, steps=60, validation_interval=1, log_interval=1)
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


# --- compilation


class Stand(Region):
    """Stands for a compiled part without compiling anything."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def compile_as(monkeypatch, make_read_out) -> None:
    """Let compilation take no time, and replace the read-out: ``make_read_out(model)`` is the compiled one."""

    def compile_potential(potential, report):
        report("read-out", 1000.0)
        potential.model.read_out = Stand(make_read_out(potential.model))

    monkeypatch.setattr(compilation, "compile_potential", compile_potential)


def faithful(model):
    return type(model).read_out.__get__(model)


def wrong_derivative(model):
    """The right energy, and forces that are too small."""
    return lambda x: faithful(model)(0.9 * x + 0.1 * x.detach())


def wrong_parameter_gradients(model):
    """The right energy and forces; the weights of the read-out get no gradient."""
    layer = model.readout[0]

    def read_out(x):
        detached = {name: p.detach() for name, p in layer.named_parameters()}
        x = x[:, : model.readout_size]
        return (x + torch.func.functional_call(layer, detached, x))[:, 0]

    return read_out


def wrong_in_evaluation(model):
    return lambda x: faithful(model)(x) * (1.0 if model.training else 1.01)


def not_a_number(model):
    return lambda x: faithful(model)(x) * float("nan")


def no_compiler(model):
    raise RuntimeError("Compiler: g++ is not found.\n\nSearched in [bold]\nx\ny\nand elsewhere")


@pytest.mark.parametrize("precision", ["high", "fast"])
def test_compiled_training_is_checked_and_changes_nothing_else(
    data, tmp_path, monkeypatch, uninterrupted, precision
):
    """Weights, random numbers, order of the data and averages are those of a run without the check."""
    compile_as(monkeypatch, faithful)
    _, text = run(data, tmp_path / "run", compile=True, precision=precision)
    allowed = {"high": "2e-04", "fast": "1e-01"}[precision]
    assert (
        "compiled 1 pieces in 1000 s; deviation from eager mode on the first batch: energy 0e+00, forces 0e+00, "
        f"parameter gradients 0e+00 (allowed {allowed})"
    ) in text
    found = "deviation from eager mode in evaluation on the first batch: energy 0e+00, forces 0e+00 (allowed 2e-04)"
    assert text.count(found) == 1
    assert "Compilation failed" not in text
    if precision == "fast":
        run(data, tmp_path / "eager", precision=precision)
    assert_same_run(uninterrupted if precision == "high" else tmp_path / "eager", tmp_path / "run")
    rows = read_csv(tmp_path / "run" / "train.csv")
    assert all(0 < float(row["seconds"]) < 500 for row in rows)


def test_the_check_leaves_the_trainer_as_it_was(data, tmp_path, monkeypatch):
    compile_as(monkeypatch, faithful)
    config = RunConfig.model_validate(options(data, tmp_path / "run", compile=True))
    trainer = Trainer(config, prepare(config, SILENT), SILENT)
    before = {name: t.clone() for name, t in trainer.potential.state_dict().items()}
    random_state = torch.get_rng_state()
    trainer._compile()
    assert trainer.compiled.active
    assert isinstance(trainer.potential.model.read_out, Stand)
    after = trainer.potential.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in trainer.potential.parameters())
    assert trainer.potential.training and not trainer.optimizer.state


def test_compiled_and_eager_parts_of_a_run_can_be_resumed(data, tmp_path, monkeypatch, uninterrupted):
    compile_as(monkeypatch, faithful)
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            run(data, tmp_path / "run", compile=True)
    run(data, tmp_path / "run", resume=True, compile=True)
    assert_same_run(uninterrupted, tmp_path / "run")
    # nothing is compiled where nothing is left to do
    compile_as(monkeypatch, no_compiler)
    _, text = run(data, tmp_path / "run", resume=True, compile=True)
    assert "Compilation failed" not in text


@pytest.mark.parametrize(
    ("make_read_out", "cause"),
    [
        (
            wrong_derivative,
            r"DeviationError: forces in training: relative deviation .* 0\.1, allowed 0\.0002",
        ),
        (wrong_parameter_gradients, r"DeviationError: parameter gradients in training: relative deviation"),
        (wrong_in_evaluation, r"DeviationError: energy in evaluation: relative deviation"),
        (not_a_number, r"DeviationError: energy in training: relative deviation from eager mode nan"),
        (no_compiler, r"RuntimeError: Compiler: g\+\+ is not found\.[\s│]*Searched in \[bold\]"),
    ],
)
def test_a_failed_check_is_loud_and_training_goes_on_eagerly(
    data, tmp_path, monkeypatch, uninterrupted, make_read_out, cause
):
    compile_as(monkeypatch, make_read_out)
    _, text = run(data, tmp_path / "run", compile=True)
    assert "Compilation failed" in text and "Training goes on in eager mode" in text
    assert re.search(cause, text), text
    assert ("deviation from eager mode on the first batch" in text) is (make_read_out is wrong_in_evaluation)
    assert "deviation from eager mode in evaluation" not in text
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_a_part_that_fails_later_does_not_end_the_run(data, tmp_path, monkeypatch, uninterrupted, phase):
    calls = []

    def make_read_out(model):
        def read_out(x):
            if compilation_is_over:
                calls.append(model.training)
                if calls.count(phase == "training") == 3:
                    raise RuntimeError("no code for this size")
            return faithful(model)(x)

        return read_out

    compilation_is_over = []
    original = compilation.CompiledTraining.check_evaluation

    def check_evaluation(self, batches):
        original(self, batches)
        if not compilation_is_over:
            compilation_is_over.append(True)

    monkeypatch.setattr(compilation.CompiledTraining, "check_evaluation", check_evaluation)
    compile_as(monkeypatch, make_read_out)
    _, text = run(data, tmp_path / "run", compile=True)
    assert text.count("RuntimeError: no code for this size") == 1
    assert calls[-1] is (phase == "training")
    assert_same_run(uninterrupted, tmp_path / "run")


def test_code_that_is_made_later_is_reported_and_not_timed(data, tmp_path, monkeypatch):
    def compile_potential(potential, report):
        def read_out(x):
            if len(calls) == 30:
                report("late", 300.0)
            calls.append(x)
            return faithful(potential.model)(x)

        potential.model.read_out = Stand(read_out)

    calls = []
    monkeypatch.setattr(compilation, "compile_potential", compile_potential)
    _, text = run(data, tmp_path / "run", compile=True, steps=40, validation_interval=40, log_interval=1)
    assert "compiled late in 300 s" in text
    seconds = [float(row["seconds"]) for row in read_csv(tmp_path / "run" / "train.csv")]
    assert 0 < seconds[0] < 100 and -300 < seconds[-1] < -200


def test_errors_that_are_not_the_compilers_are_raised(data, tmp_path, monkeypatch):
    """Out of memory: at once. Errors of eager mode, too: after a second try."""
    compile_as(monkeypatch, faithful)

    def broken(*_):
        raise error

    monkeypatch.setattr(trainer_module, "training_step", broken)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(data, tmp_path / "memory", compile=True)
    error = ValueError("wrong data")
    with pytest.raises(ValueError, match="wrong data"):
        run(data, tmp_path / "data", compile=True)


@pytest.mark.parametrize("fits", [0, 1])
def test_a_batch_that_is_too_large_for_eager_mode_is_checked_in_part(data, tmp_path, monkeypatch, fits):
    original = compilation.compare_with_eager

    def compare(potential, graph):
        if graph.num_structures > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(potential, graph)

    monkeypatch.setattr(compilation, "compare_with_eager", compare)
    compile_as(monkeypatch, faithful)
    _, text = run(data, tmp_path / "run", compile=True, steps=1)
    if fits:
        assert "deviation from eager mode on 1 structures of the first batch: energy 0e+00" in text
    else:
        assert "Compilation failed" in text and "OutOfMemoryError: CUDA out of memory" in text


def test_data_without_edges(tmp_path, monkeypatch):
    images = []
    for i in range(6):
        atoms = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 9.0 + i]])
        atoms.calc = SinglePointCalculator(atoms, energy=-0.1 * i, forces=np.zeros((2, 3)))
        images.append(atoms)
    ase.io.write(tmp_path / "far.xyz", images)
    compile_as(monkeypatch, faithful)
    _, text = run(tmp_path / "far.xyz", tmp_path / "run", compile=True, steps=2)
    assert (
        "on the first batch, which has no edges, so that derivatives were not compared: energy 0e+00" in text
    )


def test_the_first_batch_that_is_compiled_is_taken(data, tmp_path, monkeypatch):
    config = RunConfig.model_validate(options(data, tmp_path / "run"))
    preparation = prepare(config, SILENT)
    order, chosen = preparation.train.indices(0), []
    wanted = preparation.train.dataset.batch(order[2]).graph
    monkeypatch.setattr(compilation, "_is_compiled", lambda graph: torch.equal(graph.shift, wanted.shift))
    monkeypatch.setattr(
        compilation.CompiledTraining, "_self_check", lambda self, _, b, training: chosen.append(b) or ""
    )
    compile_as(monkeypatch, faithful)
    compilation.CompiledTraining(preparation.potential, None, SILENT).start(preparation.train)
    assert chosen == [order[2]]


@pytest.mark.parametrize(
    ("wanted", "device", "compiled"),
    [(None, "cpu", 0), (None, "cuda", 1), (True, "cpu", 1), (False, "cpu", 0), (False, "cuda", 0)],
)
def test_what_is_compiled(data, tmp_path, monkeypatch, wanted, device, compiled):
    starts = []
    monkeypatch.setattr(compilation.CompiledTraining, "start", lambda self, _: starts.append(1))
    config = RunConfig.model_validate(options(data, tmp_path / "run", compile=wanted))
    trainer = Trainer(config, prepare(config, SILENT), SILENT)
    trainer.device = torch.device(device)
    trainer._compile()
    assert len(starts) == compiled


def replay_as(monkeypatch, record) -> list[ReplayedStep]:
    """Replay steps on a CPU, too: ``record(step, batch)`` is the step recorded for the size of the batch."""
    made = []
    original = compilation.CompiledTraining.start

    def start(self, batches):
        original(self, batches)
        step = self.differentiate
        made.append(ReplayedStep(self.potential, step, lambda batch: record(step, batch)))
        self._step = made[-1]

    compile_as(monkeypatch, faithful)
    monkeypatch.setattr(compilation.CompiledTraining, "start", start)
    return made


def assert_similar_run(one: Path, two: Path) -> None:
    """Logs agree up to the rounding of float32 in sums of another order."""
    for name in ("train.csv", "valid.csv"):
        for a, b in zip(read_csv(one / name), read_csv(two / name), strict=True):
            for key in a.keys() - {"seconds"}:
                assert float(a[key]) == pytest.approx(float(b[key]), rel=2e-3), key


def test_steps_are_replayed_once_their_size_has_come_twice(data, tmp_path, monkeypatch, uninterrupted):
    calls = []

    def record(step, batch):
        step(batch)  # as recording leaves gradients of its own
        return lambda other: calls.append(other.graph.num_atoms) or step(other)

    made = replay_as(monkeypatch, record)
    _, text = run(data, tmp_path / "run", compile=True)
    assert "failed" not in text
    assert sum(made[0].seen.values()) == 13  # each step counts once
    assert len(calls) == sum(n - 1 for n in made[0].seen.values()) > 3
    assert_similar_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_recording_that_fails_is_said_once_and_training_goes_on(
    data, tmp_path, monkeypatch, uninterrupted, kind
):
    tries = []

    def record(step, batch):
        step(batch)
        tries.append(batch)
        raise kind("operation not permitted when stream is capturing")

    replay_as(monkeypatch, record)
    _, text = run(data, tmp_path / "run", compile=True)
    assert len(tries) == 1 and text.count("Replay of training steps failed") == 1
    assert f"RecordingError: {kind.__name__}: operation not permitted when stream is capturing" in text
    assert "Training goes on with compiled steps that are not replayed" in text
    assert "Compilation failed" not in text
    assert_similar_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("where", ["steps", "validation"])
def test_recordings_are_given_up_for_memory(data, tmp_path, monkeypatch, uninterrupted, where):
    """Once; the next time there is nothing left to give up."""
    replay_as(monkeypatch, lambda step, batch: step)
    name = {"steps": "training_step", "validation": "predict"}[where]
    original, calls = getattr(trainer_module, name), []

    def work(*arguments):
        calls.append(1)
        if len(calls) in failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(trainer_module, name, work)
    failures = {2}
    _, text = run(data, tmp_path / "run", compile=True)
    assert text.count("OutOfMemoryError: CUDA out of memory") == 1
    assert text.count("Replay of training steps failed") == 1
    assert_similar_run(uninterrupted, tmp_path / "run")
    calls.clear()
    failures = {2, 3}
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(data, tmp_path / "other", compile=True)


def test_without_compiled_code_nothing_is_replayed(data, tmp_path, monkeypatch):
    def record(step, batch):
        raise AssertionError

    made = replay_as(monkeypatch, record)
    original, calls = trainer_module.training_step, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no code for this size")
        return original(*arguments)

    monkeypatch.setattr(trainer_module, "training_step", broken)
    _, text = run(data, tmp_path / "run", compile=True)
    assert "Compilation failed" in text and "Replay" not in text
    assert sum(made[0].seen.values()) == 1


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["hybrid_muon", "adamw"])
def test_replayed_training_on_the_gpu_equals_eager_training(data, tmp_path, monkeypatch, optimizer):
    made = []
    original = compilation.ReplayedStep

    def replayed(*arguments):
        made.append(original(*arguments))
        return made[0]

    monkeypatch.setattr(compilation, "ReplayedStep", replayed)
    texts = []
    for compile in (True, False):
        values = options(data, tmp_path / str(compile), optimizer=optimizer, compile=compile)
        console = Console(file=io.StringIO(), record=True, width=200)
        train(RunConfig.model_validate(values | {"device": "cuda"}), console=console)
        texts.append(console.export_text())
    assert "failed" not in texts[0] and "deviation from eager mode" in texts[0]
    assert made[0].recordings and sum(made[0].seen.values()) == 13
    assert_similar_run(tmp_path / "False", tmp_path / "True")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_training_equals_eager_training(data, tmp_path):
    _, text = run(data, tmp_path / "compiled", compile=True, steps=5)
    found = re.search(r"compiled (\d+) pieces in", text)
    assert found and int(found.group(1)) > 10 and "Compilation failed" not in text
    run(data, tmp_path / "eager", steps=5)
    assert_similar_run(tmp_path / "compiled", tmp_path / "eager")
    compiled, eager = (load_file(tmp_path / name / "last.safetensors") for name in ("compiled", "eager"))
    assert compiled.keys() == eager.keys()


# --- refusals


def test_an_output_folder_with_files_is_not_overwritten(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("keep me")
    with pytest.raises(
        FileExistsError, match=r"is not empty; continue that run with --resume, or choose another"
    ):
        run(data, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_resume_refuses_another_model_and_names_other_changes(data, tmp_path):
    run(data, tmp_path / "run", steps=2, validation_interval=2)
    with pytest.raises(ValueError, match=r"cannot be resumed .* training\.optimizer: hybrid_muon -> adamw"):
        run(data, tmp_path / "run", resume=True, steps=4, optimizer="adamw")
    values = options(data, tmp_path / "run", steps=2)
    values["model"] = MODEL | {"lmax": 2}
    with pytest.raises(ValueError, match=r"cannot be resumed .* model\.lmax: None -> 2"):
        train(RunConfig.model_validate(values), resume=True, console=SILENT)
    _, text = run(data, tmp_path / "run", resume=True, steps=4, validation_interval=2)
    assert "changed since the checkpoint: training.steps: 2 -> 4" in text
    assert load_state(tmp_path / "run" / "last.pt")["step"] == 4


def test_numbers_that_are_not_finite_stop_the_run_and_lose_nothing(
    data, tmp_path, monkeypatch, uninterrupted
):
    original = trainer_module.training_step

    def broken(potential, batch, loss):
        value, terms = original(potential, batch, loss)
        broken.calls += 1
        return (value * float("nan") if broken.calls == 8 else value), terms

    broken.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "training_step", broken)
        with pytest.raises(
            FloatingPointError, match=r"step 8 \(epoch 1, batch 3\) is not finite: .*loss nan.*lower"
        ):
            run(data, tmp_path / "run")
    state = load_state(tmp_path / "run" / "last.pt")
    assert state["step"] == 7 and all(torch.isfinite(t).all() for t in state["potential"].values())
    run(data, tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_weighted_target_without_labels(data, tmp_path):
    images = argon(12)[::2]  # clusters, without stress
    path = tmp_path / "nostress.xyz"
    ase.io.write(path, images)
    with pytest.raises(
        ValueError, match=r"training\.virial_weight = 3, but no structure has a label for virial"
    ):
        run(path, tmp_path / "run", virial_weight=3)
    _, text = run(path, tmp_path / "run", steps=1)
    assert "training.virial_weight = 0, because there is no stress or virial label" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(data, tmp_path):
    values = options(data, tmp_path / "run") | {"device": "cuda"}
    with pytest.raises(
        RuntimeError, match="device = cuda, but no CUDA device is available; use device: cpu or auto"
    ):
        train(RunConfig.model_validate(values), console=SILENT)


def test_a_split_that_leaves_nothing(data):
    frames = read_frames(data)
    with pytest.raises(
        ValueError, match=r"data\.validation_fraction = 0\.5 of 1 structures leaves none to train on"
    ):
        split(frames[:1], 0.5, 0)


# --- parts


def test_split_is_a_partition_and_depends_on_the_seed(data):
    frames = read_frames(data)
    a, b = split(frames, 0.3, 0)
    assert len(b) == 4 and {id(f) for f in a} | {id(f) for f in b} == {id(f) for f in frames}
    assert [f.energy for f in split(frames, 0.3, 0)[1]] == [f.energy for f in b]
    assert [f.energy for f in split(frames, 0.3, 1)[1]] != [f.energy for f in b]
    assert split(frames, 0, 0)[1] == []


def test_batch_budgets(data, tmp_path):
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


def test_damaged_and_foreign_states(tmp_path):
    path = tmp_path / "last.pt"
    save_state({"step": 3, "x": torch.ones(2)}, path)
    assert load_state(path)["step"] == 3
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"last\.pt is damaged or not a training state"):
        load_state(path)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"training state of format None; this version reads format 1"):
        load_state(path)
    torch.save({"format": 2}, path)
    with pytest.raises(ValueError, match=r"training state of format 2; this version reads format 1"):
        load_state(path)
