"""Gluon twin of `dpa4.kernels.triton_matmul` for products with many rows on Hopper GPUs; see `gluon_tiles`.

A program keeps the pieces of up to `BLOCK_N` columns of w in shared memory and walks over blocks of rows of x. The
blocks of a block-diagonal matrix share the multiprocessors.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
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
    line_layout,
    memory_layout,
    multiprocessors,
    result_layout,
    split_product,
    two_halves,
)
from dpa4.kernels.matmul import Pieces

BLOCK_K = 64
"""Terms that are added within the tensor cores, which truncate; sums of blocks are rounded."""

BLOCK_N = 128
"""Most columns that a program keeps on chip."""

MIN_ROWS = 8192
"""With fewer rows, bringing the weights on chip takes too large a part of the time."""

OUTPUT = 128
"""Terms of a product that take about as long as writing it."""


def fits(x: Tensor, w: Pieces) -> bool:
    """Whether there is a kernel for these sizes and strides of x (F, E, K), or columns of it, and w (F, K, N)."""
    columns, inner = w.halves.shape[-2:]
    aligned = x.stride(-1) == 1 and x.stride(0) % 4 == x.stride(1) % 4 == x.data_ptr() % 16 == 0
    on_chip = 4 * inner * _block_n(columns)
    return (
        x.shape[1] >= MIN_ROWS
        and aligned
        and inner % BLOCK_K == columns % 64 == 0
        and on_chip <= SHARED_MEMORY
    )


def matmul_into(y: Tensor, x: Tensor, blocks: Sequence[Pieces], add: Tensor | None) -> None:
    """Write x w + add to y, which has the strides of ``add``; w is a block-diagonal matrix."""
    n_batch, rows, _ = x.shape
    sizes = tuple((b.halves.shape[-1], b.halves.shape[-2]) for b in blocks)
    shares = _shares(sizes, multiprocessors(x.device) // n_batch)
    programs = [share * _blocks_n(columns) for share, (_, columns) in zip(shares, sizes, strict=True)]
    with torch.cuda.device_of(x):
        _matmul[(sum(programs), n_batch)](
            x, tuple(b.by_name for b in blocks), tuple(b.scale for b in blocks), y, y if add is None else add,
            rows, x.stride(0), x.stride(1), y.stride(0), y.stride(1), n_batch,
            SIZES=sizes, SHARES=shares, STARTS=(0, *accumulate(programs)), ADD=add is not None,
            BLOCK_E=EDGES, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=WARPS,
        )  # fmt: skip


def _block_n(columns: int) -> int:
    return min(columns, BLOCK_N)


def _blocks_n(columns: int) -> int:
    return -(-columns // _block_n(columns))


@cache
def _shares(sizes: tuple[tuple[int, int], ...], programs: int) -> tuple[int, ...]:
    """Into how many shares the rows are divided for each matrix (K, N), so that all take about as long."""
    blocks = [_blocks_n(columns) for _, columns in sizes]
    work = [n * (inner + OUTPUT) for n, (inner, _) in zip(blocks, sizes, strict=True)]
    return tuple(max(programs * w // (sum(work) * n), 1) for w, n in zip(work, blocks, strict=True))


@gluon.jit(do_not_specialize=["rows"])
def _matmul(
    x, halves, scales, y, add, rows, stride_f, stride_e, stride_yf, stride_ye, n_batch,
    SIZES: gl.constexpr, SHARES: gl.constexpr, STARTS: gl.constexpr, ADD: gl.constexpr,
    BLOCK_E: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Program (matrix, block of its columns and share of the rows; batch)."""
    program = gl.program_id(0)
    for i in gl.static_range(len(SIZES)):
        if (program >= STARTS[i]) & (program < STARTS[i + 1]):
            _walk(
                x, halves[i], scales[i], y, add, rows, stride_f, stride_e, stride_yf, stride_ye, n_batch,
                program - STARTS[i], SHARES[i], SIZES[i][0], SIZES[i][1], ADD,
                BLOCK_E, min(SIZES[i][1], BLOCK_N), BLOCK_K, num_warps,
            )  # fmt: skip
        x += SIZES[i][0]
        y += SIZES[i][1]
        add += SIZES[i][1]


@gluon.jit
def _walk(
    x, halves, scale, y, add, rows, stride_f, stride_e, stride_yf, stride_ye, n_batch,
    program, SHARE: gl.constexpr, INNER: gl.constexpr, COLUMNS: gl.constexpr, ADD: gl.constexpr,
    BLOCK_E: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A share of the rows times a block of columns of one matrix."""
    blocks_n: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    blocks_k: gl.constexpr = INNER // BLOCK_K
    read: gl.constexpr = line_layout(BLOCK_E, BLOCK_K)
    written: gl.constexpr = line_layout(BLOCK_E, BLOCK_N)
    batch = gl.program_id(1).to(gl.int64)
    column = program % blocks_n * BLOCK_N
    halves += (batch * COLUMNS + column) * INNER
    w = keep_weights(
        halves, COLUMNS - column, BLOCK_K, INNER, n_batch * COLUMNS * INNER, blocks_k, BLOCK_N, BLOCK_K
    )

    e = gl.arange(0, BLOCK_E, gl.SliceLayout(1, read))
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, read))
    x += batch * stride_f + e[:, None] * stride_e + k[None, :]
    e_out = gl.arange(0, BLOCK_E, gl.SliceLayout(1, written))
    n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, written))
    at = batch * stride_yf + e_out[:, None] * stride_ye + n[None, :]
    down = gl.load(scale + batch * COLUMNS + n, mask=n < COLUMNS, other=1.0)[None, :]

    step: gl.constexpr = SHARE * BLOCK_E
    start = program // blocks_n * BLOCK_E
    tile = gl.load(x + start.to(gl.int64) * stride_e, mask=(start + e < rows)[:, None], other=0.0)
    for first in range(start, rows, step):
        here = at + first.to(gl.int64) * stride_ye  # type: ignore[attr-defined]
        inside = (first + e_out < rows)[:, None] & (n < COLUMNS)[None, :]
        acc = gl.zeros([BLOCK_E, BLOCK_N], gl.float32, result_layout(BLOCK_N, num_warps))
        for i in range(blocks_k):
            operand = two_halves(by_name(gl.convert_layout(tile, memory_layout(BLOCK_E, BLOCK_K))), BLOCK_N)
            last = i == blocks_k - 1  # the next block of x is on its way during this product
            row = gl.where(last, first + step, first)
            next_k = gl.where(last, 0, (i + 1) * BLOCK_K)
            tile = gl.load(
                x + (row.to(gl.int64) * stride_e + next_k), mask=(row + e < rows)[:, None], other=0.0
            )
            acc += split_product(operand, w, i)
        out = gl.convert_layout(by_place(acc), written) * down
        if ADD:
            out += gl.load(add + here, mask=inside, other=0.0)
        gl.store(y + here, out, mask=inside)
