"""Kernels in Triton: accuracy of products of split numbers, and machines without Triton."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpa4.ops.split_matmul import precise_matmul
from operator_table import BACKENDS, needs_gpu, needs_triton
from parity import assert_float32, case_of, collection

NARROW = sorted(
    name for name in collection() if name.startswith("E_") and collection()[name]["n_params"] < 500_000
)

TOLERANCE = 1e-6
"""Error relative to |x| @ |w|. Splitting costs at most 3 * 2^-22 = 0.7e-6; sums of 100 float32 terms add 1e-7."""


def interpreted(x: np.ndarray, w: np.ndarray, small_tiles: bool = True, axes: tuple = ()) -> np.ndarray:
    """Product by the interpreted kernel; ``axes`` are those of x in the order in which they lie in memory."""
    from dpa4.ops.triton import split_matmul as triton_matmul

    tile = triton_matmul.Tile(32, 32, 16, 4, 1) if small_tiles else None  # several blocks along every axis
    x = torch.from_numpy(x)
    if axes:
        x = x.permute(axes).contiguous().permute(*np.argsort(axes))
    y = triton_matmul.matmul(x, torch.from_numpy(w), tile)
    assert y.is_contiguous()
    return y.numpy()


def operands(x_shape, w_shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(x_shape, dtype=np.float32), rng.standard_normal(w_shape, dtype=np.float32)


def relative_error(y, x, w):
    x, w = x.astype(np.float64), w.astype(np.float64)
    assert y.shape == (x @ w).shape
    return (np.abs(y - x @ w) / np.maximum(np.abs(x) @ np.abs(w), 1e-300)).max(initial=0.0)


@needs_triton
@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0)])
def test_order_of_axes_in_memory(interpreter, axes):
    x, w = operands((3, 40, 32), (3, 32, 20))
    assert relative_error(interpreter(interpreted, x, w, True, axes), x, w) < TOLERANCE


@needs_triton
@pytest.mark.parametrize("k", [32, 192, 96])
def test_default_tiles(interpreter, k):
    x, w = operands((130, k), (k, k))
    assert relative_error(interpreter(interpreted, x, w, False), x, w) < TOLERANCE


@needs_triton
def test_badly_scaled_rows_and_columns(interpreter):
    """Rows and columns from 1e-14 to 1e14, far outside of float16, and entries that differ by 1e3 within a row."""
    x, w = operands((64, 64), (64, 48))
    x *= np.float32(10) ** np.linspace(-14, 14, 64, dtype=np.float32)[:, None]
    x *= np.float32(10) ** -np.linspace(0, 3, 64, dtype=np.float32)
    w *= np.float32(10) ** np.linspace(14, -14, 48, dtype=np.float32)
    assert relative_error(interpreter(interpreted, x, w), x, w) < TOLERANCE


@needs_triton
def test_entries_far_below_the_largest(interpreter):
    """Terms x_k w_k of one size from factors 1e-8 to 1: float16 loses little beside the largest factors."""
    x, w = operands((40, 64), (64, 32))
    factor = np.float32(10) ** np.linspace(-8, 0, 64, dtype=np.float32)
    x, w = x * factor, w / factor[:, None] * np.float32(1e-8)
    exact = x.astype(np.float64) @ w.astype(np.float64)
    bound = TOLERANCE * (np.abs(x) @ np.abs(w))
    bound += 1e-11 * 64 * np.abs(x).max(1, keepdims=True) * np.abs(w).max(0, keepdims=True)
    assert (np.abs(interpreter(interpreted, x, w) - exact) <= bound).all()


@needs_triton
def test_zeros_stay_zero_and_what_is_not_finite_is_seen(interpreter):
    x, w = operands((6, 32), (32, 16))
    x[0], w[:, 0] = 0, 0
    x[2, 3], x[3, 3], x[4, 3] = np.nan, np.inf, 1e-42
    y = interpreter(interpreted, x, w)
    assert not y[0].any() and not y[[1, 4, 5], 0].any()
    assert not np.isfinite(y[[2, 3], 1:]).any() and np.isfinite(y[[0, 1, 4, 5]]).all()


def check_registration_of_split_weights() -> None:
    with BACKENDS["triton"]():
        w = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
        torch.library.opcheck(
            torch.ops.dpa4.split_weights.default,
            ([w, w.mT], [False, True]),
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_triton
def test_the_operator_that_splits_is_registered_consistently(interpreter):
    interpreter(check_registration_of_split_weights)


def test_a_cpu_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from dpa4.ops.incidence import Incidence
from dpa4.ops.edge_products import edge_matmul, edge_outer, scatter_matmul
end = Incidence.of(torch.tensor([1, 0]), 2)
y = edge_matmul(torch.ones(2, 1, 3, 4), torch.ones(2, 4, 5), end)
edge_outer(y, scatter_matmul(torch.ones(2, 1, 3, 4), y, end), end, 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("e", "k", "n"), [(1000, 256, 256), (515, 384, 384), (77, 40, 24), (300, 96, 128)])
def test_badly_scaled_rows_on_a_device(e, k, n):
    from dpa4.ops.triton import split_matmul as triton_matmul

    x, w = operands((2, e, k), (2, k, n))
    x *= np.float32(10) ** np.linspace(-4, 4, e, dtype=np.float32)[:, None]
    y = triton_matmul.matmul(torch.from_numpy(x).cuda(), torch.from_numpy(w).cuda()).cpu().numpy()
    assert relative_error(y, x, w) < TOLERANCE


@pytest.mark.gpu
@needs_gpu
def test_products_of_one_sign_on_a_device():
    """Truncation errors add up in products of one sign; strided batches."""
    x, w = (np.abs(t) for t in operands((700, 2, 768), (2, 768, 192)))
    y = precise_matmul(torch.from_numpy(x).cuda().transpose(0, 1), torch.from_numpy(w).cuda())
    assert relative_error(y.cpu().numpy(), x.transpose(1, 0, 2), w) < TOLERANCE


def refused(name: str, *arguments) -> str:
    """Message with which a launcher refuses its operands."""
    from dpa4.ops.triton import edge_products, segments

    module = segments if name.startswith("segment") else edge_products
    try:
        getattr(module, name)(*arguments)
    except ValueError as error:
        return str(error)
    return ""


@needs_triton
def test_operands_are_checked_before_a_launch(interpreter):
    """The kernels receive bare addresses, and sizes from the shape of some of the operands."""
    a, x, g = torch.randn(5, 2, 3, 4), torch.randn(4, 4, 32), torch.randn(5, 3, 32)
    index, offsets = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 1, 3, 5, 5])
    good = {
        "edge_matmul": (a, x, index),
        "scatter_matmul": (a, g, index, offsets),
        "edge_outer": (g, x, index, 2),
        "segment_sum": (g, index, offsets),
        "segment_max": (g, g[0], index, offsets),
    }
    for name, arguments in good.items():
        assert interpreter(refused, name, *arguments) == ""
        for i, t in enumerate(arguments):
            if isinstance(t, torch.Tensor) and i:
                for wrong in (t[None], t.half() if t.is_floating_point() else t.int()):
                    own = *arguments[:i], wrong, *arguments[i + 1 :]
                    assert f"{name} needs" in interpreter(refused, name, *own), (name, i)


def check_model(name: str) -> set[str]:
    """Compare a model with the reference on a structure of few edges; return the kernels that were interpreted."""
    case = case_of(name)
    few = replace(case, structures={"disconnected": case.structures["disconnected"]})
    with BACKENDS["triton"]() as launched:
        assert_float32(few)
    return launched


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", NARROW or [pytest.param("", marks=pytest.mark.skip("no reference collection"))]
)
def test_models_with_switches_of_generation_3(interpreter, name):
    """All kernels of a model take part; larger models would take minutes."""
    assert interpreter(check_model, name) >= {
        "_edge_matmul",
        "_scatter_matmul",
        "_gate_value",
        "_gate_vjp",
        "_matmul",
    }
