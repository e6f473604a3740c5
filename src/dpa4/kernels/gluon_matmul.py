"""Gluon twin of `dpa4.kernels.triton_matmul` for products with many rows on Hopper GPUs; see `gluon_tiles`.

A program keeps the pieces of up to 128 columns of w in shared memory and walks over blocks of rows of x.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dpa4.kernels.gluon_tiles import (
    EDGES,
    SHARED_MEMORY,
    WARPS,
    by_name,
    by_place,
    keep_weights,
    memory_layout,
    multiprocessors,
    result_layout,
    split_product,
    two_halves,
)
from dpa4.kernels.triton_matmul import split_weight

BLOCK_K = 64
"""Terms that are added within the tensor cores, which truncate; sums of blocks are rounded."""

MIN_ROWS = 8192
"""With fewer rows, bringing the weights on chip takes too large a part of the time."""


def fits(y: Tensor, x: Tensor, w: Tensor) -> bool:
    """Whether there is a kernel for these sizes and strides: (F, E, N), (F, E, K), (F, K, N)."""
    inner, columns = w.shape[-2:]
    on_chip = 4 * inner * _block_n(columns)
    aligned = all(
        t.stride(-1) == 1 and t.stride(0) % 4 == t.stride(1) % 4 == t.data_ptr() % 16 == 0 for t in (x, y)
    )
    return (
        x.shape[1] >= MIN_ROWS
        and aligned
        and inner % BLOCK_K == columns % 64 == 0
        and on_chip <= SHARED_MEMORY
    )


def matmul_into(y: Tensor, x: Tensor, w: Tensor, add: Tensor | None) -> None:
    """Write x w + add to y, which has the strides of ``add``, as `triton_matmul.matmul_into` does.

    Entries of ``add`` are at most 1e18, and columns of w of entries below 1e-15 lose digits.
    """
    (n_batch, rows, inner), columns = x.shape, w.shape[-1]
    pieces, scale = split_weight(w, named=True)
    blocks_n = triton.cdiv(columns, _block_n(columns))
    shares = max(multiprocessors(x.device) // (blocks_n * n_batch), 1)
    _matmul[(blocks_n * min(shares, triton.cdiv(rows, EDGES)), n_batch)](
        x, pieces, scale, y, y if add is None else add,
        rows, x.stride(0), x.stride(1), y.stride(0), y.stride(1), n_batch,
        INNER=inner, COLUMNS=columns, ADD=add is not None,
        BLOCK_E=EDGES, BLOCK_N=_block_n(columns), BLOCK_K=BLOCK_K, num_warps=WARPS,
    )  # fmt: skip


def _block_n(columns: int) -> int:
    return min(columns, 128)


@gluon.jit
def _matmul(
    x, pieces, scale, y, add, rows, stride_f, stride_e, stride_yf, stride_ye, n_batch,
    INNER: gl.constexpr, COLUMNS: gl.constexpr, ADD: gl.constexpr,
    BLOCK_E: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Program (block of columns and share of the rows, batch)."""
    blocks_n: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    blocks_k: gl.constexpr = INNER // BLOCK_K
    read: gl.constexpr = memory_layout(BLOCK_E, BLOCK_K)
    written: gl.constexpr = memory_layout(BLOCK_E, BLOCK_N)
    batch = gl.program_id(1).to(gl.int64)
    column = gl.program_id(0) % blocks_n * BLOCK_N
    pieces += (batch * COLUMNS + column) * INNER
    w = keep_weights(
        pieces, COLUMNS - column, BLOCK_K, INNER, n_batch * COLUMNS * INNER, blocks_k, BLOCK_N, BLOCK_K
    )

    e = gl.arange(0, BLOCK_E, gl.SliceLayout(1, read))
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, read))
    x += batch * stride_f + e[:, None] * stride_e + k[None, :]
    e_out = gl.arange(0, BLOCK_E, gl.SliceLayout(1, written))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, written))
    at = batch * stride_yf + e_out[:, None] * stride_ye + n[None, :]
    down = gl.load(scale + batch * COLUMNS + n, mask=n < COLUMNS, other=1.0)[None, :]
    up = ((254 << 23) - down.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)

    step = gl.num_programs(0) // blocks_n * BLOCK_E
    start = gl.program_id(0) // blocks_n * BLOCK_E
    tile = gl.load(x + start.to(gl.int64) * stride_e, mask=(start + e < rows)[:, None], other=0.0)
    for first in range(start, rows, step):
        here = at + first.to(gl.int64) * stride_ye  # type: ignore[attr-defined]
        inside = (first + e_out < rows)[:, None] & (n < COLUMNS)[None, :]
        acc = gl.zeros([BLOCK_E, BLOCK_N], gl.float32, result_layout(BLOCK_N, num_warps))
        if ADD:  # on its way during the first product
            acc = by_name(gl.load(add + here, mask=inside, other=0.0) * up)
        for i in range(blocks_k):
            operand = two_halves(by_name(tile), BLOCK_N)
            last = i == blocks_k - 1  # the next block of x is on its way during this product
            row = gl.where(last, first + step, first)
            next_k = gl.where(last, 0, (i + 1) * BLOCK_K)
            tile = gl.load(
                x + (row.to(gl.int64) * stride_e + next_k), mask=(row + e < rows)[:, None], other=0.0
            )
            acc += split_product(operand, w, i)
        gl.store(y + here, by_place(acc) * down, mask=inside)
