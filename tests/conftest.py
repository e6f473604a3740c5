"""One thread per test process: the suite runs in two processes, and threads that wait for each other are slow."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# Before NumPy, SciPy and PyTorch read them, and for the processes that tests start. With a second thread of BLAS on a
# busy machine, ASE's filter for cells, which solves systems of three equations, takes ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

# Shells start programs in the background with this signal ignored, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing that was compiled or traced before this session is found; its processes share what they make."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiler"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No test before has left traces or code in the folder, which is returned."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def no_other_processes(monkeypatch):
    """Code is compiled in the process of the test, however many processors there are."""
    monkeypatch.setattr("dpa4.execution.precompile._affordable", lambda device: 0)


class NotCompiled:
    """Stands for what the compiler makes of a function; it is not kept in files."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *flat: torch.Tensor):
        return self.function(*flat)

    def save(self, path: str, format: str):
        raise RuntimeError("not compiled")


@pytest.fixture
def compile_as(monkeypatch) -> Callable:
    """Call it with what to make of the graphs that were to be compiled, which takes minutes; returns their list."""

    def replace(function_of: Callable = lambda graph: graph) -> list[torch.fx.GraphModule]:
        graphs: list[torch.fx.GraphModule] = []

        def compile(graph, examples, **_):
            graphs.append(graph)
            return NotCompiled(function_of(graph))

        monkeypatch.setattr(torch._inductor, "standalone_compile", compile)
        return graphs

    return replace


@pytest.fixture
def compilations(compile_as) -> list[torch.fx.GraphModule]:
    """Graphs that were to be compiled; they are run as they are."""
    return compile_as()


@pytest.fixture(scope="session")
def argon_file(tmp_path_factory) -> Path:
    """Thirteen labelled structures."""
    import ase.io

    from training_runs import argon

    path = tmp_path_factory.mktemp("data") / "argon.xyz"
    ase.io.write(path, argon(13))
    return path


@pytest.fixture(scope="session")
def finished_run(argon_file, tmp_path_factory):
    """A training run that nothing interrupted, to look at and to compare with; copy it to change its files."""
    from training_runs import FinishedRun, run

    folder = tmp_path_factory.mktemp("run") / "whole"
    return FinishedRun(folder, *run(argon_file, folder))


@pytest.fixture
def figures():
    """For a test that looks at figures in a file that uses `no_figures`."""


@pytest.fixture
def no_figures(monkeypatch, request):
    """Figures are not drawn, which would be half of the time of a small run; their files are empty."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch())
