"""Kernels in C++: the compiler and its cache, threads, and non-finite numbers."""

import logging
import os
import threading
import time
from pathlib import Path

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
    forget()
    yield
    forget()


def forget():
    available.cpp_compiled.cache_clear(), cpp.forget()


def test_without_a_compiler_plain_operations_run(monkeypatch, anew):
    graph, potential = graph_of(molecule()), random_potential(channels=16)
    expected = potential(graph)
    forget()
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(cpp, "_architecture", lambda: "x86-64-v3")
    assert available.cpp_missing() == "no C++ compiler (c++, g++ or clang++) was found"
    assert not available.cpp(16, torch.zeros(1))
    assert_close(potential(graph).energy, expected.energy)
    assert_close(potential(graph).forces, expected.forces)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Function that puts a shell script in the place of the compiler; it is not called with --version."""

    def write(script: str):
        path = tmp_path / "c++"
        path.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo mine && exit\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("shutil.which", lambda name: str(path))

    return write


def run_at_once(work, count=4):
    """Results of a function in several threads that start at the same time."""
    start, found = threading.Barrier(count), []

    def run():
        start.wait()
        found.append(work())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@needs_cpp
def test_a_compiler_that_fails_is_told_of_once_and_done_without(compiler, anew, empty_cache, caplog):
    compiler("echo no such option >&2; exit 1")
    with caplog.at_level(logging.WARNING):
        assert run_at_once(lambda: available.cpp(16, torch.zeros(1))) == [False] * 4
    (record,) = caplog.records
    assert "could not be compiled, slower operations run: no such option" in record.getMessage()


@needs_cpp
def test_a_compiler_that_hangs_is_killed_with_its_children(compiler, anew, empty_cache, caplog, monkeypatch):
    monkeypatch.setattr(cpp, "TIME_LIMIT", 0.3)
    compiler(f"sleep 100 & echo $! > {empty_cache}/child; wait")
    start = time.monotonic()
    assert not available.cpp(16, torch.zeros(1))
    assert time.monotonic() - start < 10
    assert "timed out after 0.3 seconds" in caplog.text
    child = Path("/proc", (empty_cache / "child").read_text().strip())
    assert not child.exists() or "\nState:\tZ" in (child / "status").read_text()


@needs_cpp
def test_a_library_without_the_functions_is_not_loaded(compiler, anew, empty_cache, caplog):
    compiler('for last; do :; done; echo other > "$last"')
    assert not available.cpp(16, torch.zeros(1))
    assert "has written a library without the functions of edges.cpp" in caplog.text


@pytest.fixture
def small_source(monkeypatch, tmp_path, anew, empty_cache):
    """Folder of the sources, with a library that is compiled at once; the kernels it replaces are not called."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text('extern "C" void small_float() {}\nextern "C" void small_double() {}\n')
    (folder / "small_matmul.h").write_text("")
    monkeypatch.setattr(cpp, "_FOLDER", folder)
    monkeypatch.setattr(cpp, "_SOURCES", {"small.cpp": ("small",)})
    return folder


def libraries(folder):
    return {f: f.stat().st_mtime_ns for f in folder.glob("*.so")}


@needs_cpp
def test_compiled_code_is_cached(small_source, empty_cache):
    assert available.cpp(16, torch.zeros(1))
    kept = libraries(empty_cache)
    assert {f.name.split("-")[0] for f in kept} == {"small"}
    forget()
    assert available.cpp(16, torch.zeros(1))
    assert libraries(empty_cache) == kept
    forget()
    (small_source / "small_matmul.h").write_text("// another program\n")
    assert available.cpp(16, torch.zeros(1))
    assert len(libraries(empty_cache)) == 2


@needs_cpp
@pytest.mark.parametrize("harm", ["cut", "emptied", "replaced", "writable by others", "of another user"])
def test_a_library_that_is_damaged_or_foreign_is_compiled_again(harm, small_source, empty_cache, caplog):
    """A process that loads a cut library ends with SIGBUS."""
    if harm == "of another user" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    assert available.cpp(16, torch.zeros(1))
    (file,) = libraries(empty_cache)
    content = file.read_bytes()
    if harm == "cut":
        os.truncate(file, len(content) // 2)
    elif harm == "emptied":
        os.truncate(file, 0)
    elif harm == "replaced":
        file.write_bytes(content + b"more")
    elif harm == "writable by others":
        file.chmod(0o666)
    else:
        os.chown(file, 65534, 65534)
    damaged = file.stat()
    forget()
    with caplog.at_level(logging.WARNING):
        assert available.cpp(16, torch.zeros(1))
    assert file.read_bytes() == content and file.stat().st_ino != damaged.st_ino
    assert file.stat().st_mode & 0o777 == 0o600 and file.stat().st_uid == os.geteuid()
    assert not caplog.records


@needs_cpp
def test_threads_compile_once(small_source, empty_cache, caplog, monkeypatch):
    runs, run = [], cpp._run
    monkeypatch.setattr(cpp, "_run", lambda command: runs.append(command) or run(command))
    assert run_at_once(lambda: available.cpp(16, torch.zeros(1))) == [True] * 4
    assert len(runs) == 3  # the version, the compiler and the linker
    assert not caplog.records


@needs_cpp
def test_operators_do_not_look_for_the_compiler_again(monkeypatch):
    """Looking for it in every call takes several per cent of a step."""
    assert available.cpp(16, torch.zeros(1))
    monkeypatch.setattr(available, "cpp_missing", lambda: pytest.fail("the compiler was looked for again"))
    assert available.cpp(16, torch.zeros(1))


def test_other_types_and_widths_run_plainly():
    assert not available.cpp(16, torch.zeros(1, dtype=torch.bfloat16))
    assert not available.cpp(24, torch.zeros(1))


def calls():
    """Arguments of every operator with a kernel, in float32; indices are valid with one row less."""
    torch.manual_seed(0)
    index, order = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([4, 2, 0, 1, 3])
    offsets = torch.tensor([0, 1, 3, 5, 5])
    a, x, g = torch.randn(5, 2, 3, 4), torch.randn(4, 4, 32), torch.randn(5, 3, 32)
    terms = torch.randint(0, 2, (3, 7), dtype=torch.int32)
    yield "edge_matmul", (a, x, index)
    yield "scatter_matmul", (a, g, torch.tensor([1, 2, 1, 2, 0]), order, offsets)
    yield "scatter_matmul", (a, g, index, None, offsets)
    yield "edge_outer", (g, x, index, 2)
    yield "bilinear", (torch.randn(5, 4, 16), torch.randn(5, 3, 16), terms, torch.randn(7), 0, 1, 2, 3)
    features = [torch.randn(1, 5, 4 * 16) for _ in range(12)]
    zero, one = torch.randn(1, 32, 32), torch.randn(2, 1, 16, 16)
    odd = torch.cat([torch.cat([one[0], one[1]], 2), torch.cat([-one[1], one[0]], 2)], 1)
    stack = [zero, odd] * 2, [torch.randn(1, 16, 16)], [], 1, 1
    y, u, z = torch.ops.dpa4.so2_value(features[0], *stack, True)
    yield "so2_value", (features[0], *stack, True)
    yield "so2_vjp", (features[1], [u], *stack, True)
    yield "so2_tangent", (features[2], [u], *stack)
    yield "so2_joint", (
        y, [features[0], z], [u], features[3:5], features[5:7], features[7:8], *stack,
    )  # fmt: skip
    separate = [zero, one[0]] * 2, *stack[1:]
    yield "so2_value", (features[0], *separate, True)
    yield "so2_joint", (y, [features[0], z], [u], features[3:5], features[5:7], features[7:8], *separate)


def variants(t: torch.Tensor):
    """Tensors of other dtypes, sizes and strides."""
    other = [torch.int32, torch.int64] if not t.is_floating_point() else [torch.float64, torch.bfloat16]
    yield from (t.to(dtype) for dtype in other if dtype != t.dtype)
    for axis, size in enumerate(t.shape):
        yield t.narrow(axis, 0, size - 1).contiguous()
        yield t.repeat_interleave(2, axis)[
            (slice(None),) * axis + (slice(None, None, 2),)
        ]  # the same entries
    yield t[None]


def changed(arguments: tuple):
    """Arguments with one tensor replaced by each of its variants, or missing from its list."""
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            yield from ((*arguments[:i], t, *arguments[i + 1 :]) for t in variants(argument))
        elif isinstance(argument, list):
            for k, t in enumerate(argument):
                lists = [[*argument[:k], v, *argument[k + 1 :]] for v in variants(t)]
                for own in (*lists, argument[:k] + argument[k + 1 :]):
                    yield *arguments[:i], own, *arguments[i + 1 :]


@needs_cpp
@pytest.mark.parametrize("number", range(11))
def test_wrong_operands_are_refused_and_all_others_agree_with_plain_operations(number, monkeypatch):
    """C++ receives bare addresses: a tensor of another dtype, size or layout would end the process or give noise."""
    (name, arguments) = [*calls()][number]
    run, refused = getattr(torch.ops.dpa4, name), 0
    for own in (arguments, *changed(arguments)):
        if name == "scatter_matmul" and own[2] is not arguments[2]:
            continue  # the kernel has no use for the index
        try:
            found = run(*own)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            refused += isinstance(error, ValueError) and "needs" in str(error)
            assert own is not arguments
            continue
        with monkeypatch.context() as plainly:
            plainly.setattr(available, "_on_cpu", lambda *_: False)
            expected = run(*own)
        if isinstance(
            found, list
        ):  # gradients of matrices, which come second, agree in their projection only
            found, expected = found[0], expected[0]
        assert deviation(found, expected) < 1e-4
    assert refused > 5
