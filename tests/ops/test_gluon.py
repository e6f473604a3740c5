"""Kernels in Gluon for Hopper GPUs: order of the weights, compilation without a GPU, results on one."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpa4.kernels import gate, matmul
from dpa4.kernels.gate import Rows
from dpa4.kernels.hopper import on_hopper
from dpa4.kernels.matmul import Weight, order_matmul, ready, split
from operator_table import BACKENDS, OPERATORS, needs_hopper, results

needs_gluon = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or importlib.util.find_spec("triton.experimental.gluon") is None,
    reason="needs a Triton with Gluon",
)

TOLERANCE = 1e-6
"""Relative to |x| @ |w| or the largest entry: pieces hold 22 bits, sums of 400 float32 terms add 2e-7."""


def name_of(column: np.ndarray) -> np.ndarray:
    """Name of a column in memory, by definition: 16 b + 8 j + 2 t + i for column 16 b + 4 t + 2 j + i."""
    b, t, j, i = column // 16, column % 16 // 4, column % 4 // 2, column % 2
    return 16 * b + 8 * j + 2 * t + i


def check_weights_by_name() -> None:
    """Two matrices split in one launch, one of them plus the identity; pieces by name are a permutation."""
    rng = torch.Generator().manual_seed(0)
    w, square = torch.randn(2, 64, 96, generator=rng), torch.randn(2, 33, 33, generator=rng)
    w[:, :, 3] = 0
    w[:, :, 4] *= 1e-25
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "is_hopper", lambda device: True)
        flat = torch.ops.dpa4.split_weights([w, square.mT], [False, True])
    (plain, named), scale, (more,), more_scale = flat  # nothing is by name in a matrix of 33 rows
    expected = torch.empty_like(plain)
    n, k = name_of(np.arange(96)), name_of(np.arange(64))
    expected[:, :, torch.from_numpy(n)[:, None], torch.from_numpy(k)] = plain
    assert torch.equal(named, expected)
    for halves, factor, whole in ((plain, scale, w), (more, more_scale, square.mT + torch.eye(33))):
        restored = (halves[0].double() + halves[1].double()) * factor[..., None].double()
        # Pieces hold 22 bits; the identity is added in float32.
        assert torch.allclose(restored.mT, whole.double(), rtol=3e-7, atol=1e-7 * (whole is not w) + 1e-32)


@needs_gluon
def test_weights_by_name(interpreter):
    interpreter(check_weights_by_name)


def test_tracing_sees_the_shapes_of_pieces_by_name(monkeypatch):
    monkeypatch.setattr(matmul, "is_hopper", lambda device: True)
    with FakeTensorMode():
        weights = [torch.empty(3, 32, 48), torch.empty(1, 33, 33)]
        named, scale, usual, _ = torch.ops.dpa4.split_weights(weights, [False, True])
    assert named.shape == (2, 2, 3, 48, 32) and named.dtype == torch.float16
    assert scale.shape == (3, 48) and scale.dtype == torch.float32
    assert usual.shape == (1, 2, 1, 33, 33)


def check_pieces_of_gates(size: str) -> None:
    """Only these kernels, which cannot be interpreted, use pieces of gates; other kernels ignore them."""
    operator = OPERATORS["so2_stack"]
    ((inputs, others),) = operator.cases(operator.sizes[size])
    inputs = [t.float() for t in inputs]
    with BACKENDS["triton"](), pytest.MonkeyPatch.context() as patch:
        found = [results(operator, operator.function, inputs, others, 2)]
        patch.setattr(matmul, "is_hopper", lambda device: True)
        found.append(results(operator, operator.function, inputs, others, 2))
    for one, other in zip(*([*values, *derivatives] for values, derivatives in found), strict=True):
        assert torch.equal(one, other)


@needs_gluon
@pytest.mark.parametrize(
    "size", ["small", *(pytest.param(n, marks=pytest.mark.slow) for n in ("degree 2", "order 2, four foci"))]
)
def test_other_kernels_ignore_pieces_of_gates(interpreter, size):
    interpreter(check_pieces_of_gates, size)


def compile_kernels() -> None:
    """Compile every kernel for compute capability 9.0, which takes no GPU, for sizes of published models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile
    from triton.experimental.gluon._runtime import GluonASTSource

    from dpa4.kernels import gluon_gate, gluon_matmul
    from dpa4.kernels.gluon_tiles import EDGES, SHARED_MEMORY, WARPS

    def compiled(kernel, blocks: int = 0, **constants):
        names = kernel.arg_names
        types = {"pieces": "*fp16", "n_batch": "i32", "rows": "i32", "num_edges": "i32", "n_focus": "i32"}
        types |= {"halves": ("*fp16",) * blocks, "scales": ("*fp32",) * blocks}
        types |= {n: "i32" for n in names if n.startswith("stride")} | dict.fromkeys(constants, "constexpr")
        signature = {n: types.get(n, "*fp32") for n in names}
        values = {(names.index(n),): v for n, v in constants.items()}
        aligned = {}
        for i, kind in enumerate(signature.values()):
            places = [(i,)] if isinstance(kind, str) else [(i, j) for j in range(len(kind))]
            if "*" in kind[0]:
                aligned |= {place: [["tt.divisibility", 16]] for place in places}
        source = GluonASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        options = {"num_warps": WARPS}
        result = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert "wgmma" in result.asm["ptx"] and result.metadata.shared <= SHARED_MEMORY
        print(kernel.__name__)

    # Two orders in one launch, which share the memory on chip, and single matrices.
    for sizes, starts, add in (
        (((256, 256), (384, 384)), (0, 48, 132), True),
        (((256, 320),), (0, 132), False),
        (((64, 64),), (0, 132), False),
    ):
        shares = (24, 28)[: len(sizes)]
        plan = {"SIZES": sizes, "SHARES": shares, "STARTS": starts, "ADD": add, "BLOCK_E": EDGES}
        compiled(gluon_matmul._matmul, len(sizes), BLOCK_N=128, BLOCK_K=64, num_warps=WARPS, **plan)
    for lmax, c in ((3, 64), (2, 32)):
        sizes = {"LMAX": lmax, "MMAX": 1, "C": c, "WIDTH": Rows(lmax, 1).total * c, "E": EDGES}
        compiled(gluon_gate._gate_value, N=c, num_warps=WARPS, **sizes)
        compiled(gluon_gate._gate_vjp, N=c, num_warps=WARPS, P=True, **sizes)
        compiled(gluon_gate._gate_tangent, N=32, num_warps=WARPS, **sizes)


@needs_gluon
def test_kernels_compile_without_a_gpu():
    """In a process of its own, since this one may have been told to interpret kernels."""
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 9


def split_ready(x: torch.Tensor, weights: list[Weight]) -> list[Weight]:
    return ready(x, weights, [], split(x, weights))[0]


@pytest.mark.gpu
@needs_hopper
def test_they_are_used():
    assert on_hopper(torch.device("cuda", 0))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("sizes", [(256, 384), (320, 64), (128, 192), (96, 128)])
@pytest.mark.parametrize("n_batch", [1, 2])
@pytest.mark.parametrize("edges", [8192, 20_001])
def test_products(sizes, n_batch, edges):
    """Products alone, with an added tensor, in place and residual; transposed weights, rows of different scale."""
    from dpa4.kernels import gluon_matmul

    rng = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=rng)

    x, added = normal(n_batch, edges, sum(sizes)), normal(n_batch, edges, sum(sizes))
    x *= torch.logspace(-6, 6, edges, device="cuda")[:, None]
    matrices = [normal(n_batch, k, k).mT for k in sizes]
    for m in matrices:
        m[..., 5] = 0
    weights = split_ready(x, [Weight(m) for m in matrices])
    assert [gluon_matmul.fits(x, w.pieces) for w in weights] == [k % 64 == 0 for k in sizes]
    pairs = list(zip(x.split(sizes, -1), matrices, strict=True))
    exact = torch.cat([t.double() @ m.double() for t, m in pairs], -1)
    size = torch.cat([t.abs().double() @ m.abs().double() for t, m in pairs], -1)
    assert (order_matmul(x, weights) - exact).abs().le(TOLERANCE * size + 1e-30).all()
    total = order_matmul(x, weights, add=added)
    assert (total - (exact + added)).abs().le(TOLERANCE * (size + added.abs())).all()
    assert torch.equal(order_matmul(x, weights, add=added.clone(), overwrite=True), total)
    weights = split_ready(x, [Weight(m, residual=True) for m in matrices])
    # What float16 loses of entries far below the largest of their row; see `precise_matmul`.
    floor = 1e-11 * sum(sizes) * x.abs().amax(-1, keepdim=True)
    assert (order_matmul(x, weights) - (exact + x)).abs().le(TOLERANCE * (size + x.abs()) + floor).all()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("lmax", [1, 3, 4])
@pytest.mark.parametrize(("c", "n_focus"), [(64, 1), (32, 2)])
@pytest.mark.parametrize("edges", [1, 130, 40_000])
def test_gates(lmax, c, n_focus, edges):
    from dpa4.kernels import gluon_gate

    rng, rows = torch.Generator("cuda").manual_seed(0), Rows(lmax, 1)
    d, v, u = (torch.randn(n_focus, edges, rows.total * c, device="cuda", generator=rng) for _ in range(3))
    u = u * torch.logspace(-3, 1, edges, device="cuda")[:, None]
    w = 0.3 * torch.randn(n_focus, c, lmax * c, device="cuda", generator=rng)
    _, (of_gates,) = ready(u, [], [w], split(u, [], [w]))
    assert of_gates.pieces is not None
    doubles, exactly = [t.double() for t in (d, v, u)], Weight(w.double())
    found = [gluon_gate.value(d, u, of_gates, rows), gluon_gate.tangent(d, v, u, of_gates, rows)]
    exact = [gate.value(*doubles[::2], exactly, rows), gate.tangent(*doubles, exactly, rows)]
    found += gluon_gate.vjp(d, u, of_gates, rows, sums=True)
    exact += gate.vjp(*doubles[::2], exactly, rows, sums=True)
    for t, e in zip(found, exact, strict=True):
        # The slope of a sigmoid amplifies the rounding of its argument, which reaches some tens.
        assert (t - e).abs().max() < 10 * TOLERANCE * e.abs().max()
    du, nothing = gluon_gate.vjp(d, u, of_gates, rows, sums=False)
    assert nothing is None and torch.equal(du, found[2])


if __name__ == "__main__":
    compile_kernels()
