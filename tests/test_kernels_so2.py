"""The stack of SO(2) layers as one operator per stage: the layers it stands for, at every size and in Triton.

Run as a program, this file checks the Triton kernels in Triton's interpreter, which must be chosen before Triton
is imported: a test starts it in a process of its own.
"""

import importlib.util
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dpa4.model.so2 import FusedSO2Stack, SO2Stack, so2_layers
from dpa4.ops import gate
from dpa4.ops import split_matmul as matmul
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.split_matmul import ready, split
from dpa4.ops.weights import Weight
from helpers import assert_close, run_in_the_interpreter

SIZES = {  # (lmax, mmax, c, F, layers, E)
    "degree 0": (0, 0, 3, 1, 2, 5),
    "degree 1, as nano": (1, 1, 32, 1, 3, 7),
    "degree 2": (2, 1, 32, 1, 3, 9),
    "degree 3, as paper-air": (3, 1, 64, 1, 4, 33),
    "degree 4": (4, 1, 16, 1, 2, 9),
    "degree 5, two foci": (5, 1, 8, 2, 2, 17),
    "order 2, four foci": (3, 2, 5, 4, 3, 6),
    "order 0": (2, 0, 6, 1, 3, 4),
    "one layer": (2, 1, 4, 2, 1, 5),
    "no edges": (2, 1, 4, 1, 3, 0),
    "one edge": (2, 1, 4, 1, 3, 1),
}
FEW = ("degree 0", "degree 2", "order 2, four foci", "order 0", "one layer", "no edges")
"""Sizes for the interpreter, which takes seconds for each; the others are for a slow test."""


def stacks(size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[SO2Stack, FusedSO2Stack]:
    """The layers one by one and in one operator, with the same weights."""
    lmax, mmax, c, n_focus, layers, _ = size
    torch.manual_seed(0)
    plain = SO2Stack(lmax, mmax, c, n_focus, layers, bias=False, layer_scale=False)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p) * p.shape[0] ** -0.5)
    fused = FusedSO2Stack(lmax, mmax, c, n_focus, layers)
    fused.load_state_dict(plain.state_dict())
    return plain.to(dtype), fused.to(dtype)


def features(size: tuple[int, ...], seed: int = 0) -> Tensor:
    lmax, mmax, c, n_focus, _, num_edges = size
    generator = torch.Generator().manual_seed(seed)
    shape = (n_focus, num_edges, EdgeLayout(lmax, mmax).total * c)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def derivatives(
    stack: SO2Stack, x: Tensor, g: Tensor, energy: float = 1.0, forces: float = 1.0
) -> list[Tensor]:
    """Result, its derivative, and the gradients of a loss of both, as in training on forces."""
    x = x.detach().requires_grad_()
    y = stack(x.sin() + x, None)
    value = (y * g).sum() / g.shape[-1] + 0.1 * y.square().sum() / g.shape[-1]
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    loss = energy * value.square() + forces * first.square().sum()
    wanted = [p for p in stack.parameters() if p.numel()]
    return [y, first, *torch.autograd.grad(loss, [x, *wanted], materialize_grads=True)]


def compared(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest deviation, relative to the largest entry of each."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        if other.numel():
            one, other = one.detach().cpu().double(), other.detach().cpu().double()
            worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)))
    return worst


def test_rows_run_over_orders_and_degrees():
    assert EdgeLayout(3, 1).total == 10
    assert EdgeLayout(3, 2).orders() == [(0, 4), (4, 6), (10, 4)]
    runs = EdgeLayout(2, 1).runs(7 * 3)
    assert runs == [
        (slice(0, 9), slice(0, 9)),
        (slice(9, 15), slice(3, 9)),
        (slice(15, 21), slice(3, 9)),
    ]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_one_operator_is_the_layers_one_by_one(size):
    plain, fused = stacks(size)
    x, g = features(size), features(size, 1)
    assert_close(fused(x, None), plain(x, None))
    assert compared(derivatives(fused, x, g), derivatives(plain, x, g)) < 1e-11  # sums in another order


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_of_the_inputs_one_is_kept(size):
    _, fused = stacks(size)
    x = features(size)
    matrices, gates = weights_of(fused, x)
    kept = torch.ops.dpa4.so2_value(x, matrices, gates, [], *size[:2], True)
    assert len(kept) == 1 + len(gates) + min(len(gates), 1)  # y, the products, and that input


@pytest.mark.parametrize(("energy", "forces"), [(1.0, 0.0), (0.0, 1.0)])
def test_losses_of_one_kind(energy, forces):
    size = SIZES["order 2, four foci"]
    plain, fused = stacks(size)
    x, g = features(size), features(size, 1)
    expected = derivatives(plain, x, g, energy, forces)
    assert compared(derivatives(fused, x, g, energy, forces), expected) < 1e-11


def test_gradients_without_a_first_derivative():
    size = SIZES["degree 2"]
    results = []
    for stack in stacks(size):
        stack(features(size), None).square().sum().backward()
        results.append([p.grad for p in stack.parameters()])
    assert compared(results[1], results[0]) < 1e-11


def test_evaluation_has_one_derivative_and_no_gradients_of_weights():
    size = SIZES["degree 2"]
    plain, fused = (stack.eval() for stack in stacks(size))
    results = []
    for stack in (plain, fused):
        x = features(size).requires_grad_()
        results.append(torch.autograd.grad(stack(x, None).square().sum(), x)[0])
    assert_close(*results)
    with pytest.raises(RuntimeError, match="evaluation mode, which has none; call potential.train()"):
        fused(features(size), None).sum().backward()


def test_no_layers_change_nothing():
    x = torch.randn(1, 5, 7 * 3)
    assert torch.equal(so2_layers(2, 1, 3, 1, 0, False, False)(x, None), x)


def test_low_precision_keeps_the_type():
    size = SIZES["degree 3, as paper-air"]
    plain, fused = stacks(size, torch.float32)
    x = features(size).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x, None)
        expected = stacks(size)[0](x.double(), None)
    assert y.dtype == torch.bfloat16
    assert compared([y], [expected]) < 0.05  # 8 bits, four layers


def weights_of(stack: FusedSO2Stack, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices and gates as the operators take them."""
    matrices = [w.detach().contiguous() for linear in stack.linears for w in linear.matrices()]
    return matrices, [g.weight(x).detach().contiguous() for g in list(stack.gates)[:-1]]


def test_operators_are_registered_consistently():
    size = SIZES["degree 2"]
    _, fused = stacks(size)
    x = features(size)
    matrices, gates = weights_of(fused, x)
    us = [x, x]
    ops = torch.ops.dpa4
    for keep in (False, True):
        torch.library.opcheck(ops.so2_value, (x, matrices, gates, [], 2, 1, keep))
        torch.library.opcheck(ops.so2_vjp, (x, us, matrices, gates, [], 2, 1, keep))
    torch.library.opcheck(ops.so2_tangent, (x, us, matrices, gates, [], 2, 1))
    lists = ([x, x], us, [x, x, x], [x, x], us)
    torch.library.opcheck(ops.so2_joint, (x, *lists, matrices, gates, [], 2, 1))


def stages_of_gates(size: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], EdgeLayout]:
    """Random edge tensors b, v, a, u, and weights of gates."""
    lmax, mmax, c, n_focus, *_ = size
    weight = 0.3 * torch.randn(n_focus, c, lmax * c, generator=torch.Generator().manual_seed(9))
    return [*(features(size, seed).to(dtype) for seed in range(4)), weight.to(dtype)], EdgeLayout(lmax, mmax)


def gates_of(module, b, v, a, u, weight, rows) -> list[Tensor]:
    """All functions of a module with gates."""
    _, (w,) = ready(u, [], [weight], split(u, [], [weight]))
    return [
        module.value(b, u, w, rows),
        *module.vjp(a, u, w, rows, True),
        module.tangent(b, v, u, w, rows),
        *module.joint(b, v, a, u, w, rows),
        *module.undo(b, a, v, u, w, rows, overwrite=False),
        module.undo(b, None, None, u, w, rows, overwrite=False)[0],
    ]


def check_in_the_interpreter(names: Sequence[str]) -> None:
    """Some sizes of every gate kernel against the plain twin in float64."""
    from dpa4.ops.triton import gate as triton_gate

    for name in names:
        size = SIZES[name]
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 4e-3)):
            tensors, rows = stages_of_gates(size, dtype)
            expected = gates_of(gate, *(t.double() for t in tensors), rows)
            found = gates_of(triton_gate, *tensors, rows)
            assert all(t.dtype == dtype for t in found)
            assert compared(found, expected) < tolerance, (name, dtype, compared(found, expected))
            b, v, a, u, w = tensors
            in_place = triton_gate.undo(b.clone(), a.clone(), v, u, Weight(w), rows, overwrite=True)
            assert all(torch.equal(*pair) for pair in zip(in_place, found[-3:-1], strict=True))
    print(len(names), "sizes")


def check_pieces_in_the_interpreter(names: Sequence[str]) -> None:
    """Stages that are handed the pieces of their weights, transposed or not, with those of gates or without."""
    matmul._is_split = lambda x: x.dtype == torch.float32
    for hopper in (False, True):  # its kernels cannot be interpreted, but pieces of gates are made
        matmul.is_hopper = lambda device, hopper=hopper: hopper
        for name in names:
            size = SIZES[name]
            x, g = features(size), features(size, 1)
            expected = derivatives(stacks(size)[0], x, g)
            found = derivatives(stacks(size, torch.float32)[1], x.float(), g.float())
            # Rounding of sums of up to 200 terms, amplified by up to three layers and two derivatives.
            assert compared(found, expected) < 1e-4, (name, compared(found, expected))
            x = x.requires_grad_()
            expected = torch.autograd.grad(stacks(size)[0](x, None).square().sum(), x)
            x = x.detach().float().requires_grad_()
            found = torch.autograd.grad(stacks(size, torch.float32)[1].eval()(x, None).square().sum(), x)
            assert compared([*found], [*expected]) < 1e-5, name
    print("equal")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("names", [FEW, pytest.param([*SIZES], marks=pytest.mark.slow)], ids=["few", "all"])
def test_triton_kernels_in_the_interpreter(names):
    assert run_in_the_interpreter(__file__, "gates", *names).split() == [str(len(names)), "sizes"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    "name",
    ["one layer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("degree 2", "order 2, four foci"))],
)
def test_products_of_pieces_in_the_interpreter(name):
    assert run_in_the_interpreter(__file__, "pieces", name).split() == ["equal"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [*SIZES.values(), (3, 1, 64, 1, 4, 5000)])
def test_on_a_device(size):
    x, g = features(size), features(size, 1)
    expected = derivatives(stacks(size)[0], x, g)
    # Rounding of products of up to 400 terms, amplified by up to four layers and two derivatives.
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        _, fused = stacks(size, dtype)
        found = derivatives(fused.cuda(), x.to("cuda", dtype), g.to("cuda", dtype))
        assert compared(found, expected) < tolerance, dtype
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 3e-2)):
        tensors, rows = stages_of_gates(size, dtype)
        found = gates_of(gate, *(t.cuda() for t in tensors), rows)
        assert compared(found, gates_of(gate, *(t.double() for t in tensors), rows)) < tolerance, dtype


if __name__ == "__main__":
    torch.set_num_threads(1)
    checks = {"gates": check_in_the_interpreter, "pieces": check_pieces_in_the_interpreter}
    checks[sys.argv[1]](sys.argv[2:])
