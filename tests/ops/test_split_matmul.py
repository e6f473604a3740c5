"""Matrix products of float32 accuracy: types, shapes, tracing, and weights split by an operator of its own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dpa4.ops import available
from dpa4.ops import split_matmul as matmul
from dpa4.ops.split_matmul import precise_matmul
from operator_table import deviation, normal

SINGLE = torch.float32


def force_loss(x, w):
    """Gradients with respect to x and w of a loss on dE/dx."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    energy = precise_matmul(precise_matmul(x, w).tanh(), w.mT).sin().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return torch.autograd.grad(force.square().sum() + energy, (x, w))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_second_derivatives_through_two_products(batch):
    x, w = normal(*batch, 7, 6), normal(*batch, 6, 5, seed=1)
    for single, double in zip(force_loss(x.float(), w.float()), force_loss(x, w), strict=True):
        # A dozen operations with unit roundoff 6e-8, some of them sines of numbers of order ten.
        assert deviation(single, double) < 1e-5


@pytest.mark.parametrize("shapes", [((5, 3), (3, 4)), ((2, 5, 3), (2, 3, 4)), ((2, 0, 3), (2, 3, 4))])
def test_derivatives_of_the_function_that_float32_uses(shapes):
    """Float64 inputs, for which `precise_matmul` itself is the ordinary product."""
    x, w = (normal(*s, seed=i).requires_grad_() for i, s in enumerate(shapes))
    assert torch.autograd.gradcheck(matmul._PreciseMatmul.apply, (x, w))
    assert torch.autograd.gradgradcheck(matmul._PreciseMatmul.apply, (x, w))


def test_one_trace_serves_all_numbers_of_rows():
    x, w = normal(7, 6, dtype=SINGLE), normal(6, 5, seed=1, dtype=SINGLE)
    graph = make_fx(force_loss, tracing_mode="symbolic")(x, w)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.dpa4.precise_matmul.default) >= 5
    other = normal(11, 6, seed=2, dtype=SINGLE)
    for traced, eager in zip(graph(other, w), force_loss(other, w), strict=True):
        torch.testing.assert_close(traced, eager)


def test_splitting_is_an_operator_of_its_own(monkeypatch):
    """The tracer sees the shapes of split weights. Splits of w.mT, which derivatives need, depend on w alone."""
    monkeypatch.setattr(available, "split_product", lambda x: True)
    with FakeTensorMode():
        x, w = torch.empty(7, 32), torch.empty(32, 48)
        graph = make_fx(force_loss)(x, w).graph
    products = [n for n in graph.nodes if n.target is torch.ops.dpa4.precise_matmul.default]
    assert len(products) >= 5
    for n in products:
        inner, columns = n.args[1].meta["val"].shape
        halves, scale = (p.meta["val"] for p in n.args[2])
        assert halves.shape == (2, 1, columns, inner) and halves.dtype == torch.float16
        assert scale.shape == (1, columns) and scale.dtype == torch.float32
    splits = [n for n in graph.nodes if n.target is torch.ops.dpa4.split_weights.default]
    of_w = {n for n in graph.nodes if n.op == "placeholder"} - {next(iter(graph.nodes))}
    for n in graph.nodes:
        if n.all_input_nodes and of_w.issuperset(n.all_input_nodes):
            of_w.add(n)
    assert splits and of_w.issuperset(splits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_get_the_ordinary_product(dtype):
    x, w = normal(7, 6, dtype=dtype), normal(6, 5, seed=1, dtype=dtype)
    assert torch.equal(precise_matmul(x, w), x @ w)


def test_autocast_gets_the_ordinary_product():
    with torch.autocast("cpu", torch.bfloat16):
        assert precise_matmul(normal(7, 6, dtype=SINGLE), normal(6, 5, dtype=SINGLE)).dtype == torch.bfloat16


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
