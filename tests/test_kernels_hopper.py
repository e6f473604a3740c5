"""Kernels in Gluon for Hopper GPUs: order of the weights, compilation without a GPU, results on one."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dpa4.kernels import gate
from dpa4.kernels.gate import Rows
from dpa4.kernels.hopper import on_hopper
from dpa4.kernels.matmul import order_matmul
from helpers import run_in_the_interpreter

needs_gluon = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or importlib.util.find_spec("triton.experimental.gluon") is None,
    reason="needs a Triton with Gluon",
)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

TOLERANCE = 1e-6
"""Relative to |x| @ |w| or the largest entry: pieces hold 22 bits, sums of 400 float32 terms add 2e-7."""


def name_of(column: np.ndarray) -> np.ndarray:
    """By the definition: 16 b + 4 t + 2 j + i in memory is 16 b + 8 j + 2 t + i by name."""
    b, t, j, i = column // 16, column % 16 // 4, column % 4 // 2, column % 2
    return 16 * b + 8 * j + 2 * t + i


def check_weights_by_name() -> None:
    """Pieces by name are those in the usual order, permuted, and tiny columns keep their scale in bounds."""
    from dpa4.kernels.triton_matmul import split_weight

    w = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0))
    w[:, :, 3] = 0
    w[:, :, 4] *= 1e-25
    plain, scale = split_weight(w)
    named, named_scale = split_weight(w, named=True)
    expected = torch.empty_like(plain)
    n, k = name_of(np.arange(96)), name_of(np.arange(64))
    expected[:, :, torch.from_numpy(n)[:, None], torch.from_numpy(k)] = plain
    usual = [c for c in range(96) if c not in (3, 4)]
    assert torch.equal(named[:, :, n[usual]], expected[:, :, n[usual]])
    assert torch.equal(named_scale[:, usual], scale[:, usual])
    assert named_scale.min() >= 2.0**-64 and torch.isfinite(1 / named_scale).all()
    assert not named[:, :, n[3]].any()
    restored = (named[0].double() + named[1].double())[:, n] * named_scale[..., None].double()
    assert torch.allclose(restored[..., k].mT, w.double(), rtol=3e-7, atol=1e-20)
    print("equal")


@needs_gluon
def test_weights_by_name():
    assert run_in_the_interpreter(__file__, "names").split() == ["equal"]


def compile_kernels() -> None:
    """Compile every kernel for compute capability 9.0, which takes no GPU, for sizes of published models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile
    from triton.experimental.gluon._runtime import GluonASTSource

    from dpa4.kernels import gluon_gate, gluon_matmul
    from dpa4.kernels.gluon_tiles import EDGES, SHARED_MEMORY, WARPS

    def compiled(kernel, warps: int, **constants):
        names = kernel.arg_names
        types = {"pieces": "*fp16", "n_batch": "i32", "rows": "i32", "num_edges": "i32", "n_focus": "i32"}
        types |= {n: "i32" for n in names if n.startswith("stride")} | dict.fromkeys(constants, "constexpr")
        signature = {n: types.get(n, "*fp32") for n in names}
        values = {(names.index(n),): v for n, v in constants.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
        }
        source = GluonASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        result = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert "wgmma" in result.asm["ptx"] and result.metadata.shared <= SHARED_MEMORY
        print(kernel.__name__)

    for inner, columns, add in ((384, 384, True), (256, 320, False), (64, 64, False)):
        sizes = {"INNER": inner, "COLUMNS": columns, "ADD": add, "BLOCK_N": min(columns, 128)}
        compiled(gluon_matmul._matmul, WARPS, BLOCK_E=EDGES, BLOCK_K=64, num_warps=WARPS, **sizes)
    for lmax, c in ((3, 64), (2, 32)):
        sizes = {"LMAX": lmax, "MMAX": 1, "C": c, "WIDTH": Rows(lmax, 1).total * c, "E": EDGES}
        compiled(gluon_gate._gate_value, WARPS, N=c, num_warps=WARPS, **sizes)
        compiled(gluon_gate._gate_vjp, WARPS, N=c, num_warps=WARPS, P=True, **sizes)
        compiled(gluon_gate._gate_tangent, WARPS, N=32, num_warps=WARPS, **sizes)


@needs_gluon
def test_kernels_compile_without_a_gpu():
    command = [sys.executable, __file__, "compile"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 9


@pytest.mark.gpu
@needs_hopper
def test_they_are_used():
    assert on_hopper(torch.device("cuda", 0))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("sizes", [(256, 384), (320, 64), (128, 192)])
@pytest.mark.parametrize("n_batch", [1, 2])
@pytest.mark.parametrize("edges", [8192, 20_001])
def test_products(sizes, n_batch, edges):
    """With and without an added tensor, in place, with transposed weights, rows of very different size."""
    from dpa4.kernels import gluon_matmul

    rng = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=rng)

    x, added = normal(n_batch, edges, sum(sizes)), normal(n_batch, edges, sum(sizes))
    x *= torch.logspace(-6, 6, edges, device="cuda")[:, None]
    matrices = [normal(n_batch, k, k).mT for k in sizes]
    for m in matrices:
        m[..., 5] = 0
        assert gluon_matmul.fits(x[..., : m.shape[-1]], x[..., : m.shape[-1]], m)
    exact = torch.cat(
        [t.double() @ m.double() for t, m in zip(x.split(sizes, -1), matrices, strict=True)], -1
    )
    size = torch.cat(
        [t.abs().double() @ m.abs().double() for t, m in zip(x.split(sizes, -1), matrices, strict=True)], -1
    )
    assert (order_matmul(x, matrices) - exact).abs().le(TOLERANCE * size + 1e-30).all()
    total = order_matmul(x, matrices, add=added)
    assert (total - (exact + added)).abs().le(TOLERANCE * (size + added.abs())).all()
    assert torch.equal(order_matmul(x, matrices, add=added.clone(), overwrite=True), total)


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
    assert gluon_gate.fits(u, w, rows)
    doubles = [t.double() for t in (d, v, u, w)]
    found = [gluon_gate.value(d, u, w, rows), gluon_gate.tangent(d, v, u, w, rows)]
    exact = [gate.value(*doubles[::2], doubles[3], rows), gate.tangent(*doubles, rows)]
    found += gluon_gate.vjp(d, u, w, rows, sums=True)
    exact += gate.vjp(*doubles[::2], doubles[3], rows, sums=True)
    for t, e in zip(found, exact, strict=True):
        # The slope of a sigmoid amplifies the rounding of its argument, which reaches some tens.
        assert (t - e).abs().max() < 10 * TOLERANCE * e.abs().max()
    du, nothing = gluon_gate.vjp(d, u, w, rows, sums=False)
    assert nothing is None and torch.equal(du, found[2])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"names": check_weights_by_name, "compile": compile_kernels}[sys.argv[1]]()
