"""C++ kernels for a CPU: the plain operations they stand for, at every size, and what happens without a compiler."""

import logging

import pytest
import torch
from torch import Tensor

from dpa4.model.edges import LocalFrame
from dpa4.model.presets import preset
from dpa4.model.so2 import DegreeProduct
from dpa4.ops import edge_products as rotate
from dpa4.ops import pairs
from dpa4.ops import so2_stack as so2
from dpa4.ops.cpp import build as cpp
from dpa4.ops.incidence import Incidence
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.sparse_product import Terms, bilinear
from dpa4.potential import Potential
from helpers import assert_close, graph_of, molecule, random_potential

needs_kernels = pytest.mark.skipif(cpp.unavailable() is not None, reason=f"{cpp.unavailable()}")

TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}
"""Relative to the largest entry: sums of some hundred numbers in another order, through up to four layers."""

SIZES = {  # (lmax, mmax, c, F, layers, E)
    "degree 0": (0, 0, 16, 1, 2, 7),
    "as nano": (1, 1, 32, 1, 3, 50),
    "as mini": (2, 1, 32, 1, 3, 131),
    "as neo": (3, 1, 32, 2, 3, 97),
    "as air": (3, 1, 64, 1, 4, 49),
    "as pro": (5, 1, 64, 2, 2, 33),
    "order 2": (3, 2, 16, 1, 2, 13),
    "odd multiples of 16": (2, 2, 48, 3, 2, 12),
    "one layer": (2, 1, 32, 1, 1, 48),
    "one edge": (2, 1, 16, 1, 3, 1),
    "no edges": (2, 1, 32, 1, 3, 0),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
each_type = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plainly(monkeypatch, function, *arguments):
    """The result without kernels."""
    with monkeypatch.context() as context:
        context.setattr(cpp, "takes", lambda *tensors: False)
        return function(*arguments)


def assert_same(found, expected, dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == dtype
        if other.numel():
            assert (one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


def of_form(w: Tensor) -> Tensor:
    """The part [[U, V], [-V, U]] of a matrix, which commutes with rotations about the edge."""
    (a, b), (c, d) = (rows.chunk(2, dim=2) for rows in w.chunk(2, dim=1))
    u, v = (a + d) / 2, (b - c) / 2
    return torch.cat([torch.cat([u, v], dim=2), torch.cat([-v, u], dim=2)], dim=1)


def of_weights(gradients: list[Tensor], mmax: int, gated: int) -> list[Tensor]:
    """Results of the last stage: of gradients of matrices what matters to the weights that they are made of."""
    x, *others = gradients
    matrices, gates = others[: len(others) - gated], others[len(others) - gated :]
    return [x, *(of_form(w) if i % (mmax + 1) else w for i, w in enumerate(matrices)), *gates]


def stack_of(size, dtype: torch.dtype) -> tuple[tuple, tuple[int, int, int, int]]:
    """Weights and rows as the operators take them, and the sizes of a feature tensor, with the layers."""
    lmax, mmax, c, focuses, layers, edges = size
    rows = EdgeLayout(lmax, mmax)
    widths = [n * c for _, n in rows.orders()]
    matrices = [normal(focuses, n, n, seed=t) * n**-0.5 for t in range(layers) for n in widths]
    matrices = [of_form(w).to(dtype) if i % (mmax + 1) else w.to(dtype) for i, w in enumerate(matrices)]
    gates = [normal(focuses, c, lmax * c, seed=t, dtype=dtype) * c**-0.5 for t in range(layers - 1)]
    return (matrices, gates, [], lmax, mmax), (focuses, edges, rows.total * c, layers)


@needs_kernels
@each_size
@each_type
def test_stages_of_a_stack(size, dtype, monkeypatch):
    weights, (*shape, layers) = stack_of(size, dtype)
    x, a, d, b = (normal(*shape, seed=10 + i, dtype=dtype) for i in range(4))
    ops = torch.ops.dpa4

    def same(operator, *arguments) -> list[Tensor]:
        found, expected = operator(*arguments), plainly(monkeypatch, operator, *arguments)
        if operator == ops.so2_joint and len(expected) > 1:
            expected = of_weights(expected, size[1], layers - 1)
        assert_same(found, expected, dtype)
        return expected

    y, *kept = same(ops.so2_value, x, *weights, True)
    us, xs = kept[: layers - 1], [x, *kept[layers - 1 :]]
    same(ops.so2_value, x, *weights, False)
    _, *grads = same(ops.so2_vjp, a, us, *weights, True)
    same(ops.so2_vjp, a, us, *weights, False)
    _, *kept = same(ops.so2_tangent, d, us, *weights)
    vs, ds = kept[: layers - 1], [d, *kept[layers - 1 :]]
    same(ops.so2_joint, b, xs, us, [*grads, a], ds, vs, *weights)
    same(ops.so2_joint, b, xs, us, [], [], [], *weights)
    same(ops.so2_joint, b, [], us, [*grads, a], ds, vs, *weights)


@needs_kernels
def test_the_kernels_are_what_runs(monkeypatch):
    called = []
    function = cpp.function
    monkeypatch.setattr(cpp, "function", lambda s, name, t: called.append(name) or function(s, name, t))
    Potential(preset("mini", ("H", "C", "O")))(graph_of(molecule())).energy.sum().backward()
    assert {"so2_value", "edge_matmul", "edge_outer", "scatter_matmul", "bilinear"} <= set(called)


@needs_kernels
def test_gates_far_from_zero_and_not_numbers(monkeypatch):
    """Sigmoids of large arguments are 0 and 1; what is not a number stays in its edge."""
    (matrices, gates, *rest), (*shape, _) = stack_of(SIZES["as mini"], torch.float32)
    x = normal(*shape, dtype=torch.float32)
    x[0, 3] *= 1e4
    x[0, 5] = torch.nan
    y, *_ = torch.ops.dpa4.so2_value(x, matrices, gates, *rest, False)
    expected, *_ = plainly(monkeypatch, torch.ops.dpa4.so2_value, x, matrices, gates, *rest, False)
    assert y[0, 5].isnan().all()
    finite = [i for i in range(shape[1]) if i != 5]
    assert y[0, finite].isfinite().all()
    assert_same([y[0, 3]], [expected[0, 3]], torch.float32)
    assert_same([y[0, [0, 1]]], [expected[0, [0, 1]]], torch.float32)


@needs_kernels
def test_the_number_of_threads_does_not_matter():
    weights, (*shape, _) = stack_of(SIZES["as mini"], torch.float32)
    x = normal(*shape, dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.ops.dpa4.so2_value(x, *weights, False)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gradients_of_weights_are_summed_over_threads(threads, monkeypatch):
    """So many edges that several threads take part."""
    weights, (*shape, layers) = stack_of((2, 1, 16, 2, 3, 1500), torch.float64)
    tensors = [normal(*shape, seed=i) for i in range(12)]
    lists = tensors[1:3], tensors[3:5], tensors[5:8], tensors[8:10], tensors[10:12]
    expected = plainly(monkeypatch, torch.ops.dpa4.so2_joint, tensors[0], *lists, *weights)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = torch.ops.dpa4.so2_joint(tensors[0], *lists, *weights)
    finally:
        torch.set_num_threads(before)
    assert layers == 3 and len(found) == 1 + 3 * 2 + 2
    assert_same(found, of_weights(expected, 1, 2), torch.float64)


@needs_kernels
@pytest.mark.parametrize("is_sorted", [False, True])
@each_size
@each_type
def test_edges_and_nodes(size, dtype, is_sorted, monkeypatch):
    lmax, mmax, c, heads, _, edges = size
    rows, nodes, coefficients = EdgeLayout(lmax, mmax).total, 11, (lmax + 1) ** 2
    index = torch.randint(nodes, (edges,), generator=torch.Generator().manual_seed(0))  # some without an edge
    incidence = Incidence.of_sorted(index.sort()[0], nodes) if is_sorted else Incidence.of(index, nodes)
    a = normal(edges, heads, rows, coefficients, dtype=dtype)
    x = normal(nodes, coefficients, heads * c, seed=1, dtype=dtype)
    g = normal(edges, rows, heads * c, seed=2, dtype=dtype)

    def all_three() -> list[Tensor]:
        return [
            rotate.edge_matmul(a, x, incidence),
            rotate.scatter_matmul(a, g, incidence),
            rotate.edge_outer(g, x, incidence, heads),
        ]

    assert_same(all_three(), plainly(monkeypatch, all_three), dtype)


@needs_kernels
@pytest.mark.parametrize(("heads", "channels"), [(1, 32), (3, 16), (2, 8)])
@pytest.mark.parametrize("edges", [0, 1, 70])
@each_type
def test_products_of_pairs_and_their_derivatives(edges, heads, channels, dtype, monkeypatch):
    """Kernels, the plain formula, and what runs of the operators where there are no kernels."""
    one, two = torch.randint(11, (2, edges), generator=torch.Generator().manual_seed(0))
    ends = Incidence.of_sorted(one.sort()[0], 12), Incidence.of(two, 11)  # some nodes have no edge
    x, y = (normal(n, heads * channels, seed=n, dtype=dtype).requires_grad_() for n in (12, 11))

    def of_two() -> list[Tensor]:
        dots = pairs.pair_dot(x, y, *ends, heads)
        first = torch.autograd.grad(dots.square().sum(), [x, y], create_graph=True)
        second = torch.autograd.grad(sum(f.square().sum() for f in first), [x, y])
        return [dots, *first, *second]

    def of_the_operators() -> list[Tensor]:
        g = normal(edges, heads, dtype=dtype)
        index = [end.index for end in ends]
        return [
            torch.ops.dpa4.pair_dot(x, y, *index, heads),
            torch.ops.dpa4.pair_sum(g, y, index[1], *ends[0]),
            torch.ops.dpa4.pair_sum(g, x, index[0], *ends[1]),
        ]

    assert_same(of_two(), plainly(monkeypatch, of_two), dtype)
    assert_same(of_the_operators(), plainly(monkeypatch, of_the_operators), dtype)


@needs_kernels
@pytest.mark.parametrize("width", [1, 16, 96])
@pytest.mark.parametrize("items", [0, 1, 13])
@each_type
def test_bilinear_maps_and_their_derivatives(items, width, dtype):
    coefficients = normal(7, 4, 5) * (normal(7, 4, 5, seed=1) > 0.8)
    terms = Terms.of(coefficients)
    terms = terms._replace(scale=terms.scale.to(dtype))
    a, b = (normal(items, n, width, seed=n, dtype=dtype).requires_grad_() for n in (4, 5))

    def of_two(function):
        """Value, derivatives, and their derivatives."""
        y = function(a, b)
        first = torch.autograd.grad((y * y.cos()).sum(), [a, b], create_graph=True)
        second = torch.autograd.grad(sum(f.square().sum() for f in first), [a, b])
        return [y, *first, *second]

    dense = of_two(lambda a, b: torch.einsum("gij,nic,njc->ngc", coefficients.to(dtype), a, b))
    assert_same(of_two(lambda a, b: bilinear(a, b, terms, 7)), dense, dtype)


def test_terms_of_a_formula_are_found():
    def formula(a, b):
        return torch.stack([2 * a[:, 1] * b[0][:, 2], 0 * a[:, 0], -a[:, 0] * b[1][:, 0, 1]], dim=-1)

    terms = Terms.of_products(formula, 2, [torch.Size((3,)), torch.Size((1, 2))])
    assert terms.indices.tolist() == [[1, 0], [2, 4], [0, 2]]
    assert terms.scale.tolist() == [2, -1]


@needs_kernels
@pytest.mark.parametrize(("lmax", "mmax", "rank"), [(0, 0, None), (1, 1, 1), (2, 1, 1), (3, 2, 2), (5, 1, 2)])
def test_matrices_of_the_edges(lmax, mmax, rank, monkeypatch):
    product = DegreeProduct(lmax, mmax, 4, rank).double()
    frame = LocalFrame(lmax, mmax, heads=2).double()
    rows = [normal(9, min(m + 1, 2), (lmax + 1) ** 2 - m * m, seed=m) for m in range(mmax + 1)]
    entries, weight = len(product.columns.unique()), normal(9, 2, seed=6)
    kernel = normal(9, entries, seed=5)
    expected = product.matrices(kernel[:, product.columns], rows)
    assert_same([product.entries(kernel, rows)], [expected], torch.float64)
    found = frame.weighted_back(rows, weight)
    assert_same([found], [plainly(monkeypatch, frame.weighted_back, rows, weight)], torch.float64)


@needs_kernels
def test_operators_are_registered_consistently():
    terms = Terms.of(normal(3, 4, 5))
    a, b = normal(2, 4, 16), normal(2, 5, 16)
    torch.library.opcheck(torch.ops.dpa4.bilinear, (a, b, *terms, 0, 1, 2, 3))
    end = Incidence.of(torch.tensor([1, 0, 1]), 2)
    torch.library.opcheck(torch.ops.dpa4.pair_dot, (normal(2, 16), normal(2, 16), end.index, end.index, 1))
    torch.library.opcheck(torch.ops.dpa4.pair_sum, (normal(3, 1), normal(2, 16), end.index, *end))


@pytest.fixture
def anew():
    """What is known of the compiler is found out again, and forgotten afterwards."""
    cpp._compiled.cache_clear(), cpp._library.cache_clear()
    yield
    cpp._compiled.cache_clear(), cpp._library.cache_clear()


def test_without_a_compiler_plain_operations_run(monkeypatch, anew):
    graph, potential = graph_of(molecule()), random_potential(channels=16)
    expected = potential(graph)
    cpp._compiled.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(cpp, "_architecture", lambda: "x86-64-v3")
    assert cpp.unavailable() == "no C++ compiler (c++, g++ or clang++) was found"
    assert not cpp.takes(torch.zeros(1))
    assert_close(potential(graph).energy, expected.energy)
    assert_close(potential(graph).forces, expected.forces)


@needs_kernels
def test_a_compiler_that_fails_is_told_of_and_done_without(monkeypatch, anew, tmp_path, caplog):
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo mine && exit\necho no such option >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(compiler))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with caplog.at_level(logging.WARNING):
        assert not cpp.takes(torch.zeros(1))
    assert "could not be compiled, slower operations run: no such option" in caplog.text


@needs_kernels
def test_what_was_compiled_is_kept(monkeypatch, anew, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(cpp, "_SOURCES", ("edges.cpp",))
    assert cpp.takes(torch.zeros(1))
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "dpa4").iterdir()}
    assert {f.name.split("-")[0] for f in kept} == {"edges"}
    cpp._compiled.cache_clear(), cpp._library.cache_clear()
    assert cpp.takes(torch.zeros(1))
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "dpa4").iterdir()} == kept


def test_other_types_and_widths_run_plainly():
    assert not cpp.takes(torch.zeros(1, dtype=torch.bfloat16))
    assert so2.cpp_so2.takes(torch.zeros(1, 2, 7 * 24), EdgeLayout(2, 1)) is False


@needs_kernels
def test_a_traced_map_runs_without_kernels(monkeypatch):
    terms = Terms.of(normal(3, 4, 5))
    arguments = normal(2, 4, 16), normal(2, 5, 16), *terms, 0, 1, 2, 3
    found = torch.ops.dpa4.bilinear(*arguments)
    assert_same([found], [plainly(monkeypatch, torch.ops.dpa4.bilinear, *arguments)], torch.float64)
