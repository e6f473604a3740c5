"""Fixtures for all tests. Each test process has one thread: the suite runs in two processes on shared processors."""

import os
import shutil
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
    """Folder of traces and compiled code of this session, shared by its processes.

    At the start it holds the C++ kernels alone, which would take 20 seconds.
    """
    from dpa4 import code_cache
    from dpa4.ops import available

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiler"
    available.cpp_compiled()
    libraries = list(code_cache.folder().glob("*.so*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        for file in libraries:
            shutil.copy2(file, code_cache.folder() / file.name)
        yield code_cache.folder()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Cache without traces or code of earlier tests; returns its folder."""
    from dpa4 import code_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return code_cache.folder()


@pytest.fixture(autouse=True)
def no_other_processes(monkeypatch):
    """Compile in the process of the test, however many processors there are."""
    monkeypatch.setattr("dpa4.execution.precompile._affordable", lambda device: 0)


class NotCompiled:
    """Stub for a compiled function; it cannot be saved."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *flat: torch.Tensor):
        return self.function(*flat)

    def save(self, path: str, format: str):
        raise RuntimeError("not compiled")


@pytest.fixture
def compile_as(monkeypatch) -> Callable:
    """Function that replaces the compiler, which would take minutes, and returns the list of graphs it receives.

    Its argument maps each of these graphs to the function that runs in its place.
    """

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
    """Graphs that the compiler would receive; they run uncompiled."""
    return compile_as()


@pytest.fixture(scope="session")
def argon_file(tmp_path_factory) -> Path:
    """File with thirteen labelled structures."""
    import ase.io

    from training_runs import argon

    path = tmp_path_factory.mktemp("data") / "argon.xyz"
    ase.io.write(path, argon(13))
    return path


@pytest.fixture(scope="session")
def finished_run(argon_file, tmp_path_factory):
    """An uninterrupted training run, to inspect and to compare with; copy it before changing its files."""
    from training_runs import FinishedRun, run

    folder = tmp_path_factory.mktemp("run") / "whole"
    return FinishedRun(folder, *run(argon_file, folder))


@pytest.fixture
def figures():
    """Request that figures be drawn in a file whose tests use `no_figures`."""


@pytest.fixture
def no_figures(monkeypatch, request):
    """Write empty files instead of drawing figures, which would be half of the time of a small run."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(
            "matplotlib.figure.Figure.savefig",
            lambda self, file, **_: None if hasattr(file, "write") else Path(file).touch(),
        )
