"""Stacks of SO(2) layers, an operator per stage: rows of the edge frame, saved tensors, modes, model class."""

import pytest
import torch

from dpa4.model.so2 import FusedSO2Stack, SO2Stack, so2_layers
from dpa4.model.switches import Symmetry
from dpa4.ops.layout import EdgeLayout
from helpers import assert_close
from operator_table import (
    OPERATORS,
    STACKS,
    degrees,
    deviation,
    normal,
    weights_of_stack,
)


def stacks(
    size: str, dtype: torch.dtype = torch.float64, symmetry: Symmetry = "SO3"
) -> tuple[SO2Stack, FusedSO2Stack]:
    """Layers one by one and in one operator, with the same weights."""
    lmax, mmax, c, n_focus, layers, _ = STACKS[size]
    torch.manual_seed(0)
    plain = SO2Stack(lmax, mmax, c, n_focus, layers, bias=False, layer_scale=False, symmetry=symmetry)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * p.shape[0] ** -0.5)
    fused = FusedSO2Stack(lmax, mmax, c, n_focus, layers, symmetry)
    fused.load_state_dict(plain.state_dict())
    return plain.to(dtype), fused.to(dtype)


def features(size: str) -> torch.Tensor:
    lmax, mmax, c, n_focus, _, num_edges = STACKS[size]
    return normal(n_focus, num_edges, EdgeLayout(lmax, mmax).total * c)


def test_rows_run_over_orders_and_degrees():
    assert EdgeLayout(3, 1).total == 10
    assert EdgeLayout(3, 2).orders() == [(0, 4), (4, 6), (10, 4)]
    assert degrees(EdgeLayout(2, 2)) == [0, 1, 2, 1, 2, 1, 2, 2, 2]
    runs = EdgeLayout(2, 1).runs(7 * 3)
    assert runs == [
        (slice(0, 9), slice(0, 9)),
        (slice(9, 15), slice(3, 9)),
        (slice(15, 21), slice(3, 9)),
    ]


@pytest.mark.parametrize("symmetry", ["SO3", "O3"])
@pytest.mark.parametrize("size", ["degree 0", "degree 2", "order 2, four foci", "one layer", "no edges"])
def test_one_operator_is_the_layers_one_by_one(size, symmetry):
    """Features, and gradients of all parameters."""
    plain, fused = stacks(size, symmetry=symmetry)
    x = features(size)
    assert_close(fused(x, None), plain(x, None))
    results = []
    for stack in (fused, plain):
        inputs = [x.requires_grad_(), *(p for p in stack.parameters() if p.numel())]
        y = stack(x, None)
        value = y.square().sum() / y.shape[-1]
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        loss = value.square() + first.square().sum()
        results.append([y, first, *torch.autograd.grad(loss, inputs, materialize_grads=True)])
    for one, other in zip(*results, strict=True):
        assert deviation(one, other) < 1e-12  # sums in another order


@pytest.mark.parametrize("size", ["degree 0", "degree 2", "order 2, four foci", "one layer", "as air"])
def test_of_the_inputs_one_is_kept(size):
    ((inputs, (rows, layers, _)),) = OPERATORS["so2_stack"].cases(STACKS[size])
    x, *flat = inputs
    matrices, gates = weights_of_stack(flat, rows, layers)
    matrices = [w for layer in matrices for w in layer]
    kept = torch.ops.dpa4.so2_value(x, matrices, gates, [], *rows, True)
    assert len(kept) == 1 + len(gates) + min(len(gates), 1)  # y, products, input of the last layer


def test_gradients_without_a_first_derivative():
    results = []
    for stack in stacks("degree 2"):
        stack(features("degree 2"), None).square().sum().backward()
        results.append([p.grad for p in stack.parameters()])
    for one, other in zip(*results, strict=True):
        assert deviation(one, other) < 1e-12


def test_evaluation_has_no_gradients_of_weights():
    plain, fused = (stack.eval() for stack in stacks("degree 2"))
    results = []
    for stack in (plain, fused):
        x = features("degree 2").requires_grad_()
        results.append(torch.autograd.grad(stack(x, None).square().sum(), x)[0])
    assert_close(*results)
    with pytest.raises(RuntimeError, match="evaluation mode, which has none; call potential.train()"):
        fused(features("degree 2"), None).sum().backward()


def test_no_layers_change_nothing():
    x = torch.randn(1, 5, 7 * 3)
    assert torch.equal(so2_layers(2, 1, 3, 1, 0, False, False)(x, None), x)


def test_low_precision_keeps_the_type():
    _, fused = stacks("as air", torch.float32)
    x = features("as air").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x, None)
        expected = stacks("as air")[0](x.double(), None)
    assert y.dtype == torch.bfloat16
    assert deviation(y, expected) < 0.05  # 8 bits, four layers
