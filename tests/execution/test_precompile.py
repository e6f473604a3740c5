"""Compilation in worker processes: they compile the code that the main process then finds, nothing else changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpa4.execution import precompile as module
from dpa4.execution.check import compare_with_eager
from dpa4.execution.limits import KeepPolicy
from dpa4.execution.precompile import Mode, precompile
from dpa4.execution.regions import compile_potential, regions
from dpa4.tracing import workers as pool_module
from helpers import graph_of, molecule, random_potential, small_potential

MODES = [Mode(training=True), Mode(training=False)]


def outlined(potential, mode: Mode) -> list:
    """Non-empty stages that tracing ahead hands to the worker pool."""
    found: list = []

    class Workshop(module.WorkerPool):
        def start(self):
            pass

        def add(self, stages):
            found.extend(stages)

    module._outline(potential, mode, Workshop(0))
    return [stage for stage in found if not stage.empty]


@pytest.fixture(scope="session")
def traces(own_cache) -> Path:
    """Folder of the session, where `small_potential` has been traced."""
    potential = small_potential()
    compile_potential(potential)
    for mode in MODES:
        outlined(potential, mode)
    return own_cache


@pytest.fixture(autouse=True)
def cache(empty_cache, traces) -> Path:
    """Compiler cache with traces of `small_potential`, but without code."""
    for file in traces.glob("*/trace.json"):
        shutil.copytree(file.parent, empty_cache / file.parent.relative_to(traces), ignore=without_code)
    return empty_cache


def without_code(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("trace.json")}


@pytest.fixture
def stages() -> list[int]:
    """Number of stages of `small_potential` in each mode: six parts of four stages in training, else of three."""
    potential = small_potential()
    compile_potential(potential)
    numbers = [len(outlined(potential, mode)) for mode in MODES]
    assert 12 < numbers[1] <= 18 < numbers[0] <= 24  # some are empty
    return numbers


@pytest.mark.parametrize(
    ("make", "options"),
    [(small_potential, {}), pytest.param(random_potential, {"charge_spin": True}, marks=pytest.mark.slow)],
)
def test_tracing_ahead_is_what_calls_trace_later(compilations, make, options):
    """All stages of all modes are traced before any call, and calls trace no others."""
    potential = make(n_blocks=1, **options)
    compile_potential(potential)
    ahead = [stage for mode in MODES for stage in outlined(potential, mode)]
    # A second call has nothing left to trace, and no stage is left without values.
    assert outlined(potential, MODES[1]) == []
    assert compilations == []
    graph = graph_of(molecule())
    for mode in MODES:
        found = compare_with_eager(potential.train(mode.training), graph)
        assert max(found.values()) < 1e-11  # float64
    assert len(compilations) == len(ahead) > 0


@pytest.mark.slow
def test_tracing_leaves_the_potential_as_it_was(compilations):
    potential, reports = random_potential(n_blocks=1, lmax=1).train(), []
    potential.precision = "fast"
    compile_potential(potential, lambda name, seconds: reports.append(name), kept=KeepPolicy(7, 5))
    outlined(potential, MODES[1])
    assert potential.training and potential.model.block_autocast is torch.bfloat16
    assert {r.max_kept for r in regions(potential) if r.keeps} == {7}  # one block, which is the last
    assert all(p.grad is None for p in potential.parameters())
    assert reports == []  # only compilation is reported, not tracing ahead
    potential(graph_of(molecule()))
    assert reports


WORKER = """
import hashlib, json, sys
sys.stdin.readline()
for line in sys.stdin:
    recipe, file = json.loads(line)
    with open(file, "x") as made:  # fails if another one made it
        made.write(recipe[0])
    with open(file + ".sha256", "x") as made:
        made.write(hashlib.sha256(recipe[0].encode()).hexdigest())
    print("made", flush=True)
"""
"""Program of a worker process that does everything except compile."""


@pytest.fixture
def workers(monkeypatch) -> list:
    """Processes started so far, one entry each; they run `WORKER`."""
    started: list = []
    original = subprocess.Popen

    def remember(command, *arguments, **options):
        process = original(command, *arguments, **options)
        if command[0] == sys.executable:  # not a C++ compiler
            started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", remember)
    monkeypatch.setattr(pool_module, "_command", lambda: [sys.executable, "-c", WORKER])
    return started


def made(cache) -> int:
    return len([file for file in cache.glob("*/stage-*") if not file.suffix])


def test_processes_make_every_piece_once(cache, workers, caplog, stages):
    potential = small_potential()
    compile_potential(potential)
    precompile(potential, MODES, processes=3)
    assert len(workers) == 3 and made(cache) == sum(stages)
    assert not [r for r in caplog.records if r.name.startswith("dpa4")]
    assert all(process.returncode == 0 for process in workers)


def test_what_another_process_made_is_not_made_again(cache, workers, stages):
    for modes, started in ((MODES[:1], 2), (MODES[:1], 2), (MODES, 4), (MODES, 4)):
        potential = small_potential()
        compile_potential(potential)
        precompile(potential, modes, processes=2)
        assert len(workers) == started and made(cache) == sum(stages[: len(modes)])


@pytest.mark.parametrize("processes", [0, 1])
def test_one_process_is_no_help(cache, workers, processes):
    shutil.rmtree(cache)
    potential = small_potential()
    compile_potential(potential)
    precompile(potential, MODES, processes=processes)
    assert not workers and not cache.exists()


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_failing_processes_are_reported(workers, compilations, monkeypatch, caplog, stages, reads):
    failing = f"import sys; [sys.stdin.readline() for _ in range({reads})]; sys.exit('no compiler here')"
    monkeypatch.setattr(pool_module, "_command", lambda: [sys.executable, "-c", failing])
    potential = small_potential()
    compile_potential(potential)
    precompile(potential, MODES[1:], processes=2)
    assert "no compiler here" in caplog.text
    assert compare_with_eager(potential.eval(), graph_of(molecule()))["forces"] < 1e-11
    assert len(compilations) == stages[1]  # all compiled in this process


def test_no_process_survives_an_interruption(workers, monkeypatch):
    def interrupted(potential, mode, workshop):
        workshop.start()
        raise KeyboardInterrupt

    monkeypatch.setattr(
        pool_module, "_command", lambda: [sys.executable, "-c", "import time; time.sleep(600)"]
    )
    monkeypatch.setattr(module, "_outline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompile(small_potential(), MODES[1:], processes=2)
    assert len(workers) == 2 and all(p.returncode is not None for p in workers)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_this_process_has_nothing_to_compile_and_the_next_one_nothing_to_trace(cache):
    """Runs with the real compiler, in processes of their own whose caches are empty."""
    program = """
import sys
import torch
from dpa4.tracing import trace
from dpa4.execution.check import compare_with_eager
from dpa4.execution.regions import compile_potential
from dpa4.execution.precompile import Mode, precompile
from helpers import graph_of, molecule, random_potential

def not_to_be_called(*arguments, **options):
    raise AssertionError("is called")

if sys.argv[1] == "2":
    trace.make_fx = not_to_be_called
torch._inductor.standalone_compile = not_to_be_called
potential = random_potential(n_blocks=1, lmax=1).float().train()
compile_potential(potential)
precompile(potential, [Mode(training=True)], processes=2)
found = compare_with_eager(potential, graph_of(molecule()))
assert max(found.values()) < 1e-4, found
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    counts = []
    for run in ("1", "2"):
        subprocess.run([sys.executable, "-c", program, run], env=environment, check=True)
        counts.append(made(cache))
    assert 0 < counts[0] == counts[1] <= 24  # six parts of four stages at most
