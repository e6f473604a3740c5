"""Compilation in several processes: they make the code that this process then finds, and nothing else changes."""

import os
import subprocess
import sys

import pytest
import torch

from dpa4.potential import precompile as module
from dpa4.potential.compiled import compare_with_eager, compile_potential, regions
from dpa4.potential.precompile import Mode, precompile
from helpers import graph_of, molecule, random_potential

MODES = [Mode(training=True), Mode(training=False)]


def stages(potential) -> list:
    codes = {r.code for r in regions(potential)}
    return [stage for code in codes for stage in code.stages() if not stage.empty]


@pytest.fixture
def compilations(monkeypatch) -> list:
    """Graphs that were to be compiled; they are run as they are."""
    graphs: list = []

    def run_as_it_is(graph, examples, **_):
        graphs.append(str(graph.code))
        return lambda *flat: graph(*flat)

    monkeypatch.setattr(torch._inductor, "standalone_compile", run_as_it_is)
    return graphs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def untraced(monkeypatch):
    """Tracing takes seconds, and some tests do not need it."""
    monkeypatch.setattr(module, "_outline", lambda *_: [])


def test_tracing_ahead_is_what_calls_trace_later(compilations):
    """All stages of all modes are there before anything is called, and calls give what they did."""
    potential = random_potential(n_blocks=1, charge_spin=True)
    compile_potential(potential)
    # Six parts of four stages, one of them empty; or of two, and one of constants, which the geometry has not.
    for mode, expected in zip(MODES, (23, 17), strict=True):
        assert len(module._outline(potential, mode)) == expected
    # Nothing is left without values by a second time, either.
    assert module._outline(potential, MODES[1]) == []
    assert compilations == [] and len(stages(potential)) == 40
    graph = graph_of(molecule())
    for mode in MODES:
        found = compare_with_eager(potential.train(mode.training), graph)
        assert max(found.values()) < 1e-11  # float64
    assert len(compilations) == len(stages(potential)) == 40


def test_tracing_leaves_the_potential_as_it_was(compilations):
    potential, reports = random_potential(n_blocks=1).train(), []
    potential.model.block_autocast = torch.bfloat16
    compile_potential(potential, lambda name, seconds: reports.append(name), max_kept=7)
    module._outline(potential, MODES[1])
    assert potential.training and potential.model.block_autocast is torch.bfloat16
    assert {r.max_kept for r in regions(potential) if r.keeps} == {7}
    assert all(p.grad is None for p in potential.parameters())
    assert reports == []  # what is traced ahead is not counted, what is made is
    potential(graph_of(molecule()))
    assert reports


@pytest.mark.parametrize("processes", [1, 2, 5, 50])
def test_work_is_shared_evenly(processes):
    lengths = [1073, 715, 696, 303, 796, 356, 351, 302, 734, 325, 311, 181, 209, 74, 78, 48, 142, 58, 67, 36]
    shares = [module._share(lengths, i, processes) for i in range(processes)]
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    # The rule of the largest piece first is at most 4/3 of what is possible (Graham 1969).
    assert max(loads) <= 4 / 3 * max(max(lengths), sum(lengths) / processes)
    assert all([lengths[i] for i in s] == sorted((lengths[i] for i in s), reverse=True) for s in shares)


def test_two_processes_make_every_piece_once(compilations):
    potential = random_potential(n_blocks=1)
    task = module._task(potential, MODES[1:])
    for share in ([0, 2], [1, 2]):
        module.compile_share(task | {"share": share})
    shared = sorted(compilations)
    compilations.clear()
    module.compile_share(task | {"share": [0, 1]})
    assert sorted(compilations) == shared and len(shared) == 17


def test_what_another_process_made_is_not_made_again(untraced, cache, monkeypatch):
    potential = random_potential(n_blocks=1)
    compile_potential(potential)
    started = []
    monkeypatch.setattr(module, "_command", lambda: started.append(1) or [sys.executable, "-c", "input()"])
    for processes, expected in ((0, 0), (1, 0), (2, 2), (2, 2)):
        precompile(potential, MODES, processes)
        assert len(started) == expected
    precompile(potential, MODES[:1], 2)  # another task
    assert len(started) == 4


def test_failing_processes_are_reported(untraced, cache, monkeypatch, caplog):
    potential = random_potential(n_blocks=1)
    compile_potential(potential)
    failing = [sys.executable, "-c", "raise SystemExit('no compiler here')"]
    monkeypatch.setattr(module, "_command", lambda: failing)
    for _ in range(2):  # nothing is marked as done
        precompile(potential, MODES[:1], 2)
        assert "no compiler here" in caplog.text
        caplog.clear()


def test_no_process_survives_an_interruption(cache, monkeypatch):
    potential = random_potential(n_blocks=1)
    compile_potential(potential)
    started = []
    original = subprocess.Popen

    def remember(*arguments, **options):
        started.append(original(*arguments, **options))
        return started[-1]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_command", lambda: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(subprocess, "Popen", remember)
    monkeypatch.setattr(module, "_outline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompile(potential, MODES, 2)
    assert len(started) == 2 and all(p.returncode is not None for p in started)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_compiler_finds_everything_in_its_cache(cache):
    """With the real compiler, in processes of their own: this one has other counters and another cache."""
    program = """
import torch
from torch._dynamo.utils import counters
from dpa4.potential.compiled import compare_with_eager, compile_potential
from dpa4.potential.precompile import Mode, precompile
from helpers import graph_of, molecule, random_potential

potential = random_potential(n_blocks=1, lmax=1).float().train()
compile_potential(potential)
precompile(potential, [Mode(training=True)], 2)
found = compare_with_eager(potential, graph_of(molecule()))
found = max(found.values()) < 1e-4
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"], found)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == ["23", "0", "True"]
