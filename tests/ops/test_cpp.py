"""Kernels in C++: the compiler and its cache, threads, and non-finite numbers."""

import logging

import pytest
import torch

from dpa4.model.presets import preset
from dpa4.ops import available
from dpa4.ops.cpp import build as cpp
from dpa4.potential import Potential
from helpers import assert_close, graph_of, molecule, random_potential
from operator_table import BACKENDS, OPERATORS, STACKS, deviation, differentiate, needs_cpp


@needs_cpp
def test_a_potential_runs_them():
    with BACKENDS["cpp"]() as launched:
        Potential(preset("mini", ("H", "C", "O")))(graph_of(molecule())).energy.sum().backward()
    assert {"so2_value", "edge_matmul", "edge_outer", "scatter_matmul", "bilinear"} <= launched


@needs_cpp
def test_gates_far_from_zero_and_not_numbers():
    """Sigmoids of large arguments are 0 and 1; a NaN stays in its edge."""
    operator = OPERATORS["so2_stack"]
    (((x, *weights), others),) = operator.cases(STACKS["as mini"])
    x[0, 3] *= 1e4
    x[0, 5] = torch.nan
    y = operator.function(*(t.float() for t in (x, *weights)), *others)
    expected = operator.formula(x, *weights, *others)
    assert y[0, 5].isnan().all()
    finite = [i for i in range(x.shape[1]) if i != 5]
    assert y[0, finite].isfinite().all()
    assert deviation(y[0, 3], expected[0, 3]) < 5e-6
    assert deviation(y[0, [0, 1]], expected[0, [0, 1]]) < 5e-6


@pytest.fixture
def threads():
    """Function that sets the number of threads, restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_cpp
def test_the_number_of_threads_does_not_matter(threads):
    operator, found = OPERATORS["so2_stack"], []
    ((inputs, others),) = operator.cases(STACKS["as mini"])
    for n in (1, 2):
        threads(n)
        found.append(operator.function(*(t.float() for t in inputs), *others))
    assert torch.equal(*found)


@needs_cpp
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients_of_weights_are_summed_over_threads(n, threads):
    """Gradients are summed over more edges than a single thread has."""
    operator = OPERATORS["so2_stack"]
    ((inputs, others),) = operator.cases((2, 1, 16, 2, 3, 1500))
    threads(n)
    with BACKENDS["cpp"]() as launched:
        found = differentiate(operator, operator.function, inputs, others)
    assert "so2_joint" in launched
    expected = differentiate(operator, operator.formula, inputs, others)
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert deviation(one, other) < 1e-13


@pytest.fixture
def anew():
    """Forget the search for the compiler before and after the test."""
    available.cpp_compiled.cache_clear(), cpp._library.cache_clear()
    yield
    available.cpp_compiled.cache_clear(), cpp._library.cache_clear()


def test_without_a_compiler_plain_operations_run(monkeypatch, anew):
    graph, potential = graph_of(molecule()), random_potential(channels=16)
    expected = potential(graph)
    available.cpp_compiled.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(cpp, "_architecture", lambda: "x86-64-v3")
    assert available.cpp_missing() == "no C++ compiler (c++, g++ or clang++) was found"
    assert not available.cpp(16, torch.zeros(1))
    assert_close(potential(graph).energy, expected.energy)
    assert_close(potential(graph).forces, expected.forces)


@needs_cpp
def test_a_compiler_that_fails_is_told_of_and_done_without(monkeypatch, anew, tmp_path, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo mine && exit\necho no such option >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(compiler))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with caplog.at_level(logging.WARNING):
        assert not available.cpp(16, torch.zeros(1))
    assert "could not be compiled, slower operations run: no such option" in caplog.text


@needs_cpp
def test_compiled_code_is_cached(monkeypatch, anew, tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text('extern "C" void small_float() {}\n')
    headers = [folder / header.name for header in cpp._FOLDER.glob("*.h")]
    for header in headers:
        header.write_text("")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(cpp, "_FOLDER", folder)
    monkeypatch.setattr(cpp, "_SOURCES", ("small.cpp",))

    def files():
        return {f: f.stat().st_mtime_ns for f in (tmp_path / "dpa4").iterdir()}

    assert available.cpp(16, torch.zeros(1))
    kept = files()
    assert {f.name.split("-")[0] for f in kept} == {"small"}
    available.cpp_compiled.cache_clear(), cpp._library.cache_clear()
    assert available.cpp(16, torch.zeros(1))
    assert files() == kept
    available.cpp_compiled.cache_clear(), cpp._library.cache_clear()
    headers[0].write_text("// another program\n")
    assert available.cpp(16, torch.zeros(1))
    assert len(files()) == 2


@needs_cpp
def test_operators_do_not_look_for_the_compiler_again(monkeypatch):
    """Looking for it in every call takes several per cent of a step."""
    assert available.cpp(16, torch.zeros(1))
    monkeypatch.setattr(available, "cpp_missing", lambda: pytest.fail("the compiler was looked for again"))
    assert available.cpp(16, torch.zeros(1))


def test_other_types_and_widths_run_plainly():
    assert not available.cpp(16, torch.zeros(1, dtype=torch.bfloat16))
    assert not available.cpp(24, torch.zeros(1))
