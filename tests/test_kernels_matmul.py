"""Matrix products on tensor cores: accuracy in Triton's interpreter, derivatives of the operator."""

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dpa4.ops import split_matmul as matmul
from dpa4.ops.split_matmul import precise_matmul

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = (32, 32, 16, 4, 1)
"""Tile of several blocks along every axis of small matrices."""

TOLERANCE = 1e-6
"""Error relative to |x| @ |w|. Splitting costs at most 3 * 2^-22 = 0.7e-6; sums of 100 float32 terms add 1e-7."""


@pytest.fixture(scope="module")
def interpreter():
    """A process in which Triton interprets kernels; the choice is made once, when triton is imported."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts the process, which inherits the variable
        yield lambda *args: pool.submit(interpreted, *args).result()


def interpreted(x: np.ndarray, w: np.ndarray, tile: tuple | None, order: tuple) -> np.ndarray:
    """Product by the interpreted kernel; ``order`` permutes the axes of x first, which changes strides only."""
    from dpa4.ops.triton import split_matmul as kernel

    tile = None if tile is None else kernel.Tile(*tile)
    y = kernel.matmul(torch.from_numpy(x).permute(order), torch.from_numpy(w), tile)
    assert y.is_contiguous()
    return y.numpy()


def operands(x_shape, w_shape, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal(x_shape, dtype=np.float32),
        rng.standard_normal(w_shape, dtype=np.float32),
    )


def relative_error(y, x, w):
    x, w = x.astype(np.float64), w.astype(np.float64)
    assert y.shape == (x @ w).shape
    return (np.abs(y - x @ w) / np.maximum(np.abs(x) @ np.abs(w), 1e-300)).max(initial=0.0)


@needs_triton
@pytest.mark.parametrize(("e", "k", "n"), [(70, 48, 80), (33, 35, 19), (1, 16, 1), (5, 1, 3)])
def test_any_size(interpreter, e, k, n):
    x, w = operands((e, k), (k, n))
    assert relative_error(interpreter(x, w, SMALL, (0, 1)), x, w) < TOLERANCE


@needs_triton
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_batches_and_strides(interpreter, order):
    x, w = operands([(3, 40, 32)[order.index(axis)] for axis in range(3)], (3, 32, 20))
    y = interpreter(x, w, SMALL, order)
    assert relative_error(y, x.transpose(order), w) < TOLERANCE


@needs_triton
@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (2, 0, 32)])
def test_no_rows_or_no_terms(interpreter, shape):
    x, w = operands(shape, (*shape[:-2], shape[-1], 16))
    y = interpreter(x, w, SMALL, tuple(range(x.ndim)))
    assert y.shape == (*shape[:-1], 16) and not y.any()


@needs_triton
@pytest.mark.parametrize("k", [32, 192, 96])
def test_default_tiles(interpreter, k):
    x, w = operands((130, k), (k, k))
    assert relative_error(interpreter(x, w, None, (0, 1)), x, w) < TOLERANCE


@needs_triton
def test_badly_scaled_rows_and_columns(interpreter):
    """Rows and columns from 1e-14 to 1e14, far outside of float16, and entries that differ by 1e3 within a row."""
    x, w = operands((64, 64), (64, 48))
    x *= np.float32(10) ** np.linspace(-14, 14, 64, dtype=np.float32)[:, None]
    x *= np.float32(10) ** -np.linspace(0, 3, 64, dtype=np.float32)
    w *= np.float32(10) ** np.linspace(14, -14, 48, dtype=np.float32)
    assert relative_error(interpreter(x, w, SMALL, (0, 1)), x, w) < TOLERANCE


@needs_triton
def test_entries_far_below_the_largest(interpreter):
    """Terms x_k w_k of one size from factors 1e-8 to 1: what float16 loses is small beside the largest factors."""
    x, w = operands((40, 64), (64, 32))
    factor = np.float32(10) ** np.linspace(-8, 0, 64, dtype=np.float32)
    x, w = x * factor, w / factor[:, None] * np.float32(1e-8)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    bound = TOLERANCE * (np.abs(x) @ np.abs(w))
    bound += 1e-11 * 64 * np.abs(x).max(1, keepdims=True) * np.abs(w).max(0, keepdims=True)
    assert (np.abs(interpreter(x, w, SMALL, (0, 1)) - exact) <= bound).all()


@needs_triton
def test_zeros_stay_zero_and_what_is_not_finite_is_seen(interpreter):
    x, w = operands((6, 32), (32, 16))
    x[0], w[:, 0] = 0, 0
    x[2, 3], x[3, 3], x[4, 3] = np.nan, np.inf, 1e-42
    y = interpreter(x, w, SMALL, (0, 1))
    assert not y[0].any() and not y[[1, 4, 5], 0].any()
    assert not np.isfinite(y[[2, 3], 1:]).any() and np.isfinite(y[[0, 1, 4, 5]]).all()


@pytest.mark.parametrize("shapes", [((5, 3), (3, 4)), ((2, 5, 3), (2, 3, 4)), ((2, 0, 3), (2, 3, 4))])
def test_derivatives(shapes):
    """Central differences of doubles through the Function that float32 uses."""
    from dpa4.ops.split_matmul import _PreciseMatmul

    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, dtype=torch.float64, generator=rng, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(_PreciseMatmul.apply, (x, w))
    assert torch.autograd.gradgradcheck(_PreciseMatmul.apply, (x, w))


def force_loss(x, w):
    """Gradients with respect to x and w of a loss on dE/dx."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    energy = precise_matmul(precise_matmul(x, w).tanh(), w.mT).sin().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return torch.autograd.grad(force.square().sum() + energy, (x, w))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_second_derivatives_in_float32(batch):
    x, w = map(torch.from_numpy, operands((*batch, 7, 6), (*batch, 6, 5)))
    for single, double in zip(force_loss(x, w), force_loss(x.double(), w.double()), strict=True):
        # A dozen operations on numbers of order ten with unit roundoff 6e-8.
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_traced_with_symbolic_sizes():
    """One graph, with the operator in it, serves every number of rows."""
    x, w = map(torch.from_numpy, operands((7, 6), (6, 5)))
    graph = make_fx(force_loss, tracing_mode="symbolic")(x, w)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.dpa4.precise_matmul.default) >= 5
    other = torch.from_numpy(operands((11, 6), ())[0])
    for traced, eager in zip(graph(other, w), force_loss(other, w), strict=True):
        torch.testing.assert_close(traced, eager)


def test_operator_conforms():
    """Schema, fake tensors and dispatch, as torch checks them; also with x whose strides are those of (E, F, K)."""
    x, w = map(torch.from_numpy, operands((2, 7, 6), (2, 6, 5)))
    for left in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.dpa4.precise_matmul.default, (left, w, []), test_utils=checks)


@pytest.mark.parametrize("hopper", [False, True])
def test_splitting_is_an_operator_of_its_own(monkeypatch, hopper):
    """A tracer sees which shapes pieces have, and that those of w.mT, which derivatives take, depend on w alone."""
    monkeypatch.setattr(matmul, "_is_split", lambda x: True)
    monkeypatch.setattr(matmul, "is_hopper", lambda device: hopper)
    with FakeTensorMode():
        x, w = torch.empty(7, 32), torch.empty(32, 48)
        graph = make_fx(force_loss)(x, w).graph
    products = [n for n in graph.nodes if n.target is torch.ops.dpa4.precise_matmul.default]
    assert len(products) >= 5
    for n in products:
        inner, columns = n.args[1].meta["val"].shape
        halves, scale = (p.meta["val"] for p in n.args[2])
        assert halves.shape == (1 + hopper, 2, 1, columns, inner) and halves.dtype == torch.float16
        assert scale.shape == (1, columns) and scale.dtype == torch.float32
    splits = [n for n in graph.nodes if n.target is torch.ops.dpa4.split_weights.default]
    of_w = {n for n in graph.nodes if n.op == "placeholder"} - {next(iter(graph.nodes))}
    for n in graph.nodes:
        if n.all_input_nodes and of_w.issuperset(n.all_input_nodes):
            of_w.add(n)
    assert splits and of_w.issuperset(splits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_get_the_ordinary_product(dtype):
    x, w = (torch.from_numpy(t).to(dtype) for t in operands((7, 6), (6, 5)))
    assert torch.equal(precise_matmul(x, w), x @ w)


def test_autocast_gets_the_ordinary_product():
    x, w = map(torch.from_numpy, operands((7, 6), (6, 5)))
    with torch.autocast("cpu", torch.bfloat16):
        assert precise_matmul(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((5, 3), (4, 3)),
        ((2, 5, 3), (3, 4)),
        ((2, 5, 3), (1, 3, 4)),
        ((3,), (3,)),
        ((1, 1, 5, 3), (1, 1, 3, 4)),
    ],
)
def test_shapes_that_do_not_fit(x, w):
    with pytest.raises(ValueError, match="x and w must be"):
        precise_matmul(torch.zeros(x), torch.zeros(w))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("e", "k", "n"), [(1000, 256, 256), (515, 384, 384), (77, 40, 24), (300, 96, 128)])
def test_sizes_on_the_device(e, k, n):
    from dpa4.ops.triton import split_matmul as kernel

    x, w = operands((2, e, k), (2, k, n))
    x *= np.float32(10) ** np.linspace(-4, 4, e, dtype=np.float32)[:, None]
    y = kernel.matmul(torch.from_numpy(x).cuda(), torch.from_numpy(w).cuda()).cpu().numpy()
    assert relative_error(y, x, w) < TOLERANCE


@pytest.mark.gpu
@needs_gpu
def test_operator_on_the_device():
    """Strided batches, products of one sign (where truncation adds up), and second derivatives."""
    x, w = (np.abs(t) for t in operands((700, 2, 768), (2, 768, 192)))
    y = precise_matmul(torch.from_numpy(x).cuda().transpose(0, 1), torch.from_numpy(w).cuda())
    assert relative_error(y.cpu().numpy(), x.transpose(1, 0, 2), w) < TOLERANCE

    x, w = (torch.from_numpy(t).cuda() for t in operands((2, 70, 64), (2, 64, 48)))
    for single, double in zip(force_loss(x, w), force_loss(x.double(), w.double()), strict=True):
        # A dozen operations with unit roundoff 6e-8 and sums of 64 terms: float32 on a CPU deviates by 8e-6.
        torch.testing.assert_close(single.double(), double, rtol=0, atol=3e-5 * float(double.abs().max()))
