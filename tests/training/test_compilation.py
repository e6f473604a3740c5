"""Compiled and replayed training without a compiler or a GPU: the self-check, and recovery from failures."""

import io
import re
import shutil
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console
from safetensors.torch import load_file

from dpa4.execution import trial
from dpa4.output import read_csv
from dpa4.tracing.region import Region
from dpa4.training import compilation
from dpa4.training import trainer as trainer_module
from dpa4.training.options import RunConfig
from dpa4.training.prepare import prepare
from dpa4.training.replayed_step import ReplayedStep
from dpa4.training.run import train
from dpa4.training.trainer import Trainer
from training_runs import SILENT, Killed, assert_same_run, kill_at, options, run

pytestmark = pytest.mark.usefixtures("no_figures")


class Stand(Region):
    """Stub for a compiled part that compiles nothing."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def compile_as(monkeypatch, make_read_out) -> None:
    """Replace compilation: it takes no time, and the compiled read-out is ``make_read_out(model)``."""

    def compile_potential(potential, report):
        report("read-out", 1000.0)
        potential.model.read_out = Stand(make_read_out(potential.model))

    monkeypatch.setattr(compilation, "compile_potential", compile_potential)


def faithful(model):
    return type(model).read_out.__get__(model)


def wrong_derivative(model):
    """Read-out with the right energy, and forces that are too small."""
    return lambda x: faithful(model)(0.9 * x + 0.1 * x.detach())


def wrong_parameter_gradients(model):
    """Read-out with the right energy and forces, but no gradient for its weights."""
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
    argon_file, tmp_path, monkeypatch, finished_run, precision
):
    """Weights, random numbers, order of the data and averages equal those of a run without the check."""
    compile_as(monkeypatch, faithful)
    _, text = run(argon_file, tmp_path / "run", compile=True, precision=precision)
    allowed = {"high": "2e-04", "fast": "1e-01"}[precision]
    assert (
        "compiled 1 stages in 1000 s; deviation from eager mode on the first batch: energy 0e+00, forces 0e+00, "
        f"parameter gradients 0e+00 (allowed {allowed})"
    ) in text
    found = "deviation from eager mode in evaluation on the first batch: energy 0e+00, forces 0e+00 (allowed 2e-04)"
    assert text.count(found) == 1
    assert "Compilation failed" not in text
    if precision == "fast":
        run(argon_file, tmp_path / "eager", precision=precision)
    expected = finished_run.folder if precision == "high" else tmp_path / "eager"
    assert_same_run(expected, tmp_path / "run")
    rows = read_csv(tmp_path / "run" / "train.csv")
    assert all(0 < float(row["seconds"]) < 500 for row in rows)


def test_the_check_leaves_the_trainer_as_it_was(argon_file, tmp_path, monkeypatch):
    compile_as(monkeypatch, faithful)
    config = RunConfig.model_validate(options(argon_file, tmp_path / "run", compile=True))
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


def test_compiled_and_eager_parts_of_a_run_can_be_resumed(argon_file, tmp_path, monkeypatch, finished_run):
    compile_as(monkeypatch, faithful)
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            run(argon_file, tmp_path / "run", compile=True)
    run(argon_file, tmp_path / "run", resume=True, compile=True)
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_nothing_is_compiled_where_nothing_is_left_to_do(argon_file, tmp_path, monkeypatch, finished_run):
    shutil.copytree(finished_run.folder, tmp_path / "run")
    compile_as(monkeypatch, no_compiler)
    _, text = run(argon_file, tmp_path / "run", resume=True, compile=True)
    assert "Compilation failed" not in text


DEVIATES = "DeviationError: relative deviations from eager mode in "
CAUSES = {
    wrong_derivative: DEVIATES + r"training: .*forces 0\.1.*rounding[\s│]+explains at[\s│]+most 0\.0002",
    wrong_parameter_gradients: DEVIATES + "training: parameter gradients",
    wrong_in_evaluation: DEVIATES + "evaluation: energy",
    not_a_number: DEVIATES + "training: energy nan",
    no_compiler: r"RuntimeError: Compiler: g\+\+ is not found\.[\s│]*Searched in \[bold\]",
}


def assert_failure_is_told(text: str, make_read_out) -> None:
    assert "Compilation failed" in text and "Training continues in eager mode" in text
    assert re.search(CAUSES[make_read_out], text), text
    assert ("deviation from eager mode on the first batch" in text) is (make_read_out is wrong_in_evaluation)
    assert "deviation from eager mode in evaluation" not in text


@pytest.mark.parametrize("make_read_out", CAUSES, ids=lambda function: function.__name__)
def test_a_failed_check_is_loud_and_leaves_eager_mode(argon_file, tmp_path, monkeypatch, make_read_out):
    compile_as(monkeypatch, make_read_out)
    config = RunConfig.model_validate(options(argon_file, tmp_path / "run", compile=True))
    console = Console(file=io.StringIO(), record=True, width=200)
    trainer = Trainer(config, prepare(config, SILENT), console)
    before = {name: t.clone() for name, t in trainer.potential.state_dict().items()}
    random_state = torch.get_rng_state()
    trainer._compile()
    with trainer._evaluated_weights():
        trainer.compiled.check_evaluation(trainer.preparation.validation)
    assert_failure_is_told(console.export_text(), make_read_out)
    assert not trainer.compiled.active and "read_out" not in vars(trainer.potential.model)
    after = trainer.potential.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random_state) and trainer.potential.training


@pytest.mark.parametrize("make_read_out", [wrong_in_evaluation, no_compiler], ids=lambda f: f.__name__)
def test_training_goes_on_eagerly_after_a_failed_check(
    argon_file, tmp_path, monkeypatch, finished_run, make_read_out
):
    compile_as(monkeypatch, make_read_out)
    _, text = run(argon_file, tmp_path / "run", compile=True)
    assert_failure_is_told(text, make_read_out)
    assert_same_run(finished_run.folder, tmp_path / "run")


@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_a_part_that_fails_later_does_not_end_the_run(argon_file, tmp_path, monkeypatch, finished_run, phase):
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
    _, text = run(argon_file, tmp_path / "run", compile=True)
    assert text.count("RuntimeError: no code for this size") == 1
    assert calls[-1] is (phase == "training")
    assert_same_run(finished_run.folder, tmp_path / "run")


def test_code_that_is_made_later_is_reported_and_not_timed(argon_file, tmp_path, monkeypatch):
    def compile_potential(potential, report):
        def read_out(x):
            if len(calls) == 8:  # in one of the last steps
                report("late", 300.0)
            calls.append(x)
            return faithful(potential.model)(x)

        potential.model.read_out = Stand(read_out)

    calls = []
    monkeypatch.setattr(compilation, "compile_potential", compile_potential)
    _, text = run(argon_file, tmp_path / "run", compile=True, steps=8, validation_interval=8, log_interval=1)
    assert "compiled late in 300 s" in text
    seconds = [float(row["seconds"]) for row in read_csv(tmp_path / "run" / "train.csv")]
    assert 0 < seconds[0] < 100 and -300 < seconds[-1] < -200


def test_errors_that_are_not_the_compilers_are_raised(argon_file, tmp_path, monkeypatch):
    """Out-of-memory errors are raised at once, errors of eager mode after a second try."""
    compile_as(monkeypatch, faithful)

    def broken(*_):
        raise error

    monkeypatch.setattr(trainer_module, "training_step", broken)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="^out of memory: the gradients of a batch"):
        run(argon_file, tmp_path / "memory", compile=True)
    error = ValueError("wrong data")
    with pytest.raises(ValueError, match="wrong data"):
        run(argon_file, tmp_path / "data", compile=True)


@pytest.mark.parametrize("fits", [0, 1])
def test_a_batch_that_is_too_large_for_eager_mode_is_checked_in_part(argon_file, tmp_path, monkeypatch, fits):
    original = trial.compare_with_eager

    def compare(potential, graph):
        if graph.num_structures > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(potential, graph)

    monkeypatch.setattr(trial, "compare_with_eager", compare)
    compile_as(monkeypatch, faithful)
    _, text = run(argon_file, tmp_path / "run", compile=True, steps=1)
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


def test_the_first_batch_that_is_compiled_is_taken(argon_file, tmp_path, monkeypatch):
    config = RunConfig.model_validate(options(argon_file, tmp_path / "run"))
    preparation = prepare(config, SILENT)
    order, chosen = preparation.train.indices(0), []
    expected = preparation.train.dataset.batch(order[2]).graph
    monkeypatch.setattr(
        compilation, "can_be_compiled", lambda graph: torch.equal(graph.shift, expected.shift)
    )
    monkeypatch.setattr(
        compilation.CompiledTraining, "_self_check", lambda self, _, b, training: chosen.append(b) or ""
    )
    compile_as(monkeypatch, faithful)
    update = Trainer(config, preparation, SILENT).update
    compilation.CompiledTraining(preparation.potential, None, update, SILENT).start(preparation.train)
    assert chosen == [order[2]]


@pytest.mark.parametrize(
    ("option", "device", "compiled"),
    [(None, "cpu", 0), (None, "cuda", 1), (True, "cpu", 1), (False, "cpu", 0), (False, "cuda", 0)],
)
def test_what_is_compiled(argon_file, tmp_path, monkeypatch, option, device, compiled):
    starts = []
    monkeypatch.setattr(compilation.CompiledTraining, "start", lambda self, _: starts.append(1))
    config = RunConfig.model_validate(options(argon_file, tmp_path / "run", compile=option))
    trainer = Trainer(config, prepare(config, SILENT), SILENT)
    trainer.device = torch.device(device)
    trainer._compile()
    assert len(starts) == compiled


def replay_as(monkeypatch, record) -> list[ReplayedStep]:
    """Replay steps on a CPU; ``record(step, batch)`` returns the step recorded for the size of the batch."""
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


def test_steps_are_replayed_once_their_size_has_come_twice(argon_file, tmp_path, monkeypatch, finished_run):
    calls = []

    def record(step, batch):
        step(batch)  # a recording leaves gradients of its own, too
        return lambda other: calls.append(other.graph.num_atoms) or step(other)

    made = replay_as(monkeypatch, record)
    _, text = run(argon_file, tmp_path / "run", compile=True)
    assert "failed" not in text
    assert sum(made[0].seen.values()) == 13  # each step counts once
    assert len(calls) == sum(n - 1 for n in made[0].seen.values()) > 3
    assert_similar_run(finished_run.folder, tmp_path / "run")


def test_recording_that_fails_is_said_once_and_training_goes_on(
    argon_file, tmp_path, monkeypatch, finished_run
):
    tries = []

    def record(step, batch):
        step(batch)
        tries.append(batch)
        raise RuntimeError("operation not permitted when stream is capturing")

    replay_as(monkeypatch, record)
    _, text = run(argon_file, tmp_path / "run", compile=True)
    assert len(tries) == 1 and text.count("Replay of training steps failed") == 1
    assert "RecordingError: RuntimeError: operation not permitted when stream is capturing" in text
    assert "Training continues with compiled steps that are not replayed" in text
    assert "Compilation failed" not in text
    assert_similar_run(finished_run.folder, tmp_path / "run")


@pytest.mark.parametrize("where", ["steps", "validation"])
def test_recordings_are_given_up_for_memory(argon_file, tmp_path, monkeypatch, finished_run, where):
    """Recordings are dropped once; at the next failure there are none left to drop."""
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
    _, text = run(argon_file, tmp_path / "run", compile=True)
    assert text.count("OutOfMemoryError: CUDA out of memory") == 1
    assert text.count("Replay of training steps failed") == 1
    assert_similar_run(finished_run.folder, tmp_path / "run")
    calls.clear()
    failures = {2, 3}
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run(argon_file, tmp_path / "other", compile=True)


def test_without_compiled_code_nothing_is_replayed(argon_file, tmp_path, monkeypatch):
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
    _, text = run(argon_file, tmp_path / "run", compile=True, steps=4)
    assert "Compilation failed" in text and "Replay" not in text
    assert sum(made[0].seen.values()) == 1


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["hybrid_muon", "adamw"])
def test_replayed_training_on_the_gpu_equals_eager_training(argon_file, tmp_path, monkeypatch, optimizer):
    made = []
    original = compilation.ReplayedStep

    def replayed(*arguments):
        made.append(original(*arguments))
        return made[0]

    monkeypatch.setattr(compilation, "ReplayedStep", replayed)
    texts = []
    for compile in (True, False):
        values = options(argon_file, tmp_path / str(compile), optimizer=optimizer, compile=compile)
        console = Console(file=io.StringIO(), record=True, width=200)
        train(RunConfig.model_validate(values | {"device": "cuda"}), console=console)
        texts.append(console.export_text())
    assert "failed" not in texts[0] and "deviation from eager mode" in texts[0]
    assert made[0].recordings and sum(made[0].seen.values()) == 13
    assert_similar_run(tmp_path / "False", tmp_path / "True")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_training_equals_eager_training(argon_file, tmp_path):
    _, text = run(argon_file, tmp_path / "compiled", compile=True, steps=5)
    found = re.search(r"compiled (\d+) stages in", text)
    assert found and int(found.group(1)) > 10 and "Compilation failed" not in text
    run(argon_file, tmp_path / "eager", steps=5)
    assert_similar_run(tmp_path / "compiled", tmp_path / "eager")
    compiled, eager = (load_file(tmp_path / name / "last.safetensors") for name in ("compiled", "eager"))
    assert compiled.keys() == eager.keys()
