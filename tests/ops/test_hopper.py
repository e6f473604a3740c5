"""Kernels in CUDA C++ for whole stacks of SO(2) layers: order of weights and of saved tensors, trial, accuracy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dpa4.model.so2 import FusedSO2Stack
from dpa4.ops import available
from dpa4.ops.hopper import build as cuda
from dpa4.ops.hopper import so2_stack, trial
from dpa4.ops.hopper.so2_stack import CHANNELS, EDGES, LAYOUT
from dpa4.ops.layout import EdgeLayout
from operator_table import deviation, needs_hopper

WIDTH = LAYOUT.total * CHANNELS
TOLERANCE = 2e-6
"""Relative to the largest entry: split numbers hold 22 bits, and up to five layers add their rounding."""


def stack_of(layers: int) -> FusedSO2Stack:
    torch.manual_seed(0)
    stack = FusedSO2Stack(LAYOUT.lmax, LAYOUT.mmax, CHANNELS, 1, layers)
    with torch.no_grad():
        for p in stack.parameters():
            p.copy_(torch.randn_like(p) * p.shape[0] ** -0.5)
    return stack


def weights_of(stack: FusedSO2Stack) -> tuple[list[Tensor], list[Tensor]]:
    matrices = [w.detach().contiguous() for linear in stack.linears for w in linear.matrices()]
    return matrices, [g.weight(matrices[0]).detach().contiguous() for g in list(stack.gates)[:-1]]


class Reader:
    """Reader of a stream of weights in the order of the kernel."""

    def __init__(self, stream: Tensor):
        self.rest = stream.double().numpy()

    def tile(self, columns: int) -> np.ndarray:
        """Read 32 rows and some columns of weights, both parts added: rows of 64 bytes, swizzled."""
        size = 2 * columns * 32
        part, self.rest = self.rest[:size].reshape(2, columns, 4, 8).sum(0), self.rest[size:]
        n, chunk = np.arange(columns)[:, None], np.arange(4)[None]
        return part[n, chunk ^ (n // 2 % 4)].reshape(columns, 32).T

    def tiles(self, rows: int, columns: int) -> np.ndarray:
        return np.concatenate([self.tile(columns) for _ in range(rows // 32)])


def channel(group: int, n: int) -> int:
    """Channel of column n of a product with the 32 channels of a group.

    Thread q = n % 8 // 2 of a quad has channels 4 q + 0..3 of both runs of 16.
    """
    run, pair, quad, i = n // 16, n // 8 % 2, n % 8 // 2, n % 2
    return 32 * group + 16 * run + 4 * quad + 2 * pair + i


def matrices_from(reader: Reader, group: int, zero: np.ndarray, one: np.ndarray) -> None:
    """Read the weights of a product into columns of the matrices of order 0 and of order 1, [[U, V], [-V, U]]."""
    for block in range(0, 192, 64):
        for half in (0, 1):  # U, V
            for run in (0, 1):
                tile = reader.tiles(64, 48)
                for column in range(48):
                    at = 64 * (column // 16) + channel(group, 16 * run + column % 16)
                    one[block : block + 64, 192 * half + at] = tile[:, column]
                    sign = -1 if half else 1
                    one[192 + block : 192 + block + 64, 192 * (1 - half) + at] = sign * tile[:, column]
    for block in range(0, 256, 64):
        for half in (0, 1):
            tile = reader.tiles(64, 64)
            for column in range(64):
                at = 64 * (2 * half + column // 32) + channel(group, column % 32)
                zero[block : block + 64, at] = tile[:, column]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_streams_hold_the_weights_in_the_order_in_which_they_are_used(layers, backward):
    matrices, gates = weights_of(stack_of(layers))
    (streams, scales), last = so2_stack.pack(matrices, gates, backward), layers - 1
    found = [[np.zeros((256, 256)), np.zeros((384, 384)), np.zeros((64, 192))] for _ in range(layers)]
    transposed = [np.zeros((192, 64)) for _ in range(layers)]
    for group in (0, 1):
        reader = Reader(streams[group])
        for t in range(last, -1, -1) if backward else range(layers):
            zero, one, gate = found[t]
            if not backward:
                matrices_from(reader, group, zero, one)
            if t < last:
                n = [channel(group, k) for k in range(32)]
                for degree in range(3):
                    gate[:, 64 * degree + np.array(n)] = reader.tiles(64, 32)
                if backward:
                    transposed[t][:, n] = reader.tiles(192, 32)
            if backward:
                matrices_from(reader, group, zero, one)
        assert reader.rest.size == 0
    for t in range(layers):
        expected = [w[0].double().numpy() for w in matrices[2 * t : 2 * t + 2]]
        if t == last:
            expected = [w + np.eye(len(w)) for w in expected]
        expected = [w.T if backward else w for w in expected]
        expected += [gates[t][0].double().numpy()] if t < last else []
        for k, w in enumerate(expected):
            # Two parts of 11 bits; entries far below the largest one lose bits of their own.
            np.testing.assert_allclose(found[t][k] * float(scales[t, k]), w, rtol=3e-7, atol=1e-10)
        if backward and t < last:
            assert np.array_equal(transposed[t], found[t][2].T)


def test_tracing_sees_the_shapes_of_the_streams():
    matrices, gates = weights_of(stack_of(3))
    before = [w.clone() for w in matrices]
    for backward in (False, True):
        real, new = (f(matrices, gates, backward) for f in (so2_stack.pack, so2_stack._new_pack))
        assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in new]
    assert all(torch.equal(*pair) for pair in zip(matrices, before, strict=True))


@pytest.mark.parametrize("edges", [1, 64, 100])
def test_saved_products_can_be_put_into_rows(edges):
    """Products are saved in the layout of a tensor core's result, in the order in which a thread writes them."""
    kept = torch.full((edges + so2_stack.PADDING, WIDTH), -1.0)
    order = [0, 1, 4, 7, 2, 5, 8, 3, 6, 9]  # blocks, degree by degree
    flat, expected = kept.view(-1), torch.arange(edges * WIDTH).view(edges, WIDTH).float()
    for edge in range(edges):
        tile, row = divmod(edge, EDGES)
        warp, half, lane_row = row // 16, row // 8 % 2, row % 8
        for place, block in enumerate(order):
            for c in range(CHANNELS):
                group, run, quad, i = c // 32, c // 16 % 2, c % 16 // 4, c % 4
                thread = warp * 32 + lane_row * 4 + quad
                at = ((tile * 2 + group) * 10 + place) * 2048 + ((2 * half + run) * 128 + thread) * 4 + i
                flat[at] = expected[edge, block * CHANNELS + c]
    assert torch.equal(so2_stack.in_rows(kept, edges)[0], expected)


def test_they_are_not_used_on_a_cpu_nor_for_other_sizes():
    x = torch.zeros(1, 5, WIDTH)
    assert not available.whole_stack(x, 4, LAYOUT, separate=False)
    assert not available.whole_stack(x, 4, EdgeLayout(2, 1), separate=False)
    assert available.whole_stack_misfits(LAYOUT, 1, CHANNELS, 4, separate=False) == []
    assert available.whole_stack_misfits(LAYOUT, 1, CHANNELS, 4, separate=True) == ["symmetry SO3 (here O3)"]


def test_kernels_that_compute_wrongly_are_not_used(monkeypatch, caplog):
    """The trial runs on a small stack, with correct and with wrong layers in the place of the kernels."""
    device, seen, wrong = torch.device("cpu"), {}, 0.0

    def pack(matrices, gates, backward):
        seen[backward] = matrices, gates
        return []

    def value(x, weights, keep):
        y, *us = torch.ops.dpa4.so2_value(x, *seen[False], [], *LAYOUT, False)
        return [y * (1 + wrong), *us]

    def vjp(g, kept, weights):
        return torch.ops.dpa4.so2_vjp(g, kept, *seen[True], [], *LAYOUT, False)[0]

    monkeypatch.setattr(trial, "pack", pack)
    monkeypatch.setattr(trial, "value", value)
    monkeypatch.setattr(trial, "vjp", vjp)
    assert trial.whole_stacks_work.__wrapped__(device)
    wrong = 1e-3
    assert not trial.whole_stacks_work.__wrapped__(device)
    assert "results were wrong by 0.001" in caplog.text

    def missing(*_, **__):
        raise OSError("no nvrtc")

    monkeypatch.setattr(trial, "value", missing)
    assert not trial.whole_stacks_work.__wrapped__(device)
    assert "OSError: no nvrtc" in caplog.text


def test_machine_code_is_cached(monkeypatch, empty_cache, tmp_path):
    source, compiled = tmp_path / "kernel.cu", []
    monkeypatch.setattr(cuda, "compile_cuda", lambda text, name: compiled.append(text) or b"machine code")
    for text in (b"one", b"one", b"another"):
        source.write_bytes(text)
        assert cuda._code(source) == b"machine code"
    assert compiled == [b"one", b"another"]
    assert len(list(empty_cache.rglob("kernel-*.cubin"))) == 2


def test_the_program_compiles():
    """Compilation needs no GPU."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch has no compiler for CUDA")
    assert cuda.compile_cuda(so2_stack._SOURCE.read_bytes(), "so2_stack.cu")


def results(stack: FusedSO2Stack, x: Tensor, g: Tensor) -> list[Tensor]:
    """Features, and the gradient of their scalar product with g."""
    x = x.detach().requires_grad_()
    y = stack(x, None)
    return [y.detach(), *torch.autograd.grad(y, x, g)]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_accuracy(layers):
    """Large inputs; other sizes, and agreement to the last bit, are in the table of operators."""
    stack = stack_of(layers).cuda().eval()
    rng = torch.Generator("cuda").manual_seed(1)
    x, g = (torch.randn(1, 8447, WIDTH, device="cuda", generator=rng) for _ in range(2))
    assert available.whole_stack(x, layers, LAYOUT, separate=False)
    found = results(stack, x, g)
    for a, b in zip(found, results(stack.double(), x.double(), g.double()), strict=True):
        assert deviation(a, b) < TOLERANCE


@pytest.mark.gpu
@needs_hopper
def test_edges_of_very_different_size():
    """Every edge has the accuracy of its own largest entry; gradients may vanish."""
    stack = stack_of(4).cuda().eval()
    rng = torch.Generator("cuda").manual_seed(2)
    x, g = (torch.randn(1, 3000, WIDTH, device="cuda", generator=rng) for _ in range(2))
    x *= torch.logspace(-6, 1, 3000, device="cuda")[:, None]
    g *= torch.logspace(6, -6, 3000, device="cuda")[:, None]
    g[:, ::7] = 0
    x[:, ::11] = 0
    found = results(stack, x, g)
    expected = results(stack.double(), x.double(), g.double())
    for a, b in zip(found, expected, strict=True):
        error = (a.double() - b).abs().amax(-1)
        # Scalars of up to 10 with weights of 1 make gates of arguments of some tens, whose rounding they amplify.
        assert (error <= 10 * TOLERANCE * b.abs().amax(-1)).all()


@pytest.mark.gpu
@needs_hopper
def test_a_second_derivative_outside_of_training():
    stack = stack_of(3).cuda().eval()
    rng = torch.Generator("cuda").manual_seed(3)
    x, g, c = (torch.randn(1, 500, WIDTH, device="cuda", generator=rng) for _ in range(3))
    second = []
    for dtype in (torch.float32, torch.float64):
        z = x.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(stack.to(dtype)(z, None), z, g.to(dtype), create_graph=True)
        second += torch.autograd.grad(first, z, c.to(dtype))
    assert deviation(*second) < 1e-5  # of the other kernels, which training uses


@pytest.mark.parametrize("layers", [1, 3])
def test_operands_are_checked_before_a_launch(layers):
    """The kernels receive bare addresses. Tensors that the operators make pass; others are refused."""
    weights = {b: so2_stack.pack(*weights_of(stack_of(layers)), b) for b in (False, True)}
    x = torch.zeros(1, 70, WIDTH)
    for keep in (False, True):
        y, *kept = so2_stack._new_value(x, weights[False], keep)
        *us, maxima = kept or [y]
        so2_stack._check("so2_value", x, y, us, maxima, weights[False])
    forward = "so2_value", x, y, us, maxima, weights[False]
    backward = "so2_vjp", x, y, us, maxima, weights[True]
    so2_stack._check(*backward)
    for name, x, y, us, maxima, (streams, scales) in (forward, backward):
        wrong = [
            (x.double(), y, us, maxima, (streams, scales)),
            (x, y[:, 1:], us, maxima, (streams, scales)),
            (x, y, [*us, x], maxima, (streams, scales)),
            (x, y, us, maxima, (streams[:, 1:], scales)),
            (x, y, us, maxima, (streams.float(), scales)),
            (x, y, us, maxima, (streams, scales[1:])),
        ]
        if us:
            wrong += [(x, y, [u[:70] for u in us], maxima, (streams, scales))]
            wrong += [(x, y, us, maxima[:70], (streams, scales))]
        for operands in wrong:
            with pytest.raises(ValueError, match=f"{name} needs"):
                so2_stack._check(name, *operands)
