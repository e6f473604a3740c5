"""Triton kernels of `dpa4.ops.split_matmul`: products of float32 matrices on tensor cores, as accurate as float32.

Tensor cores multiply numbers with short significands and add in float32. Every operand is therefore split into a sum
of float16 parts, high and low, and the products of parts that matter are added: low * low is left out (Ootomo and
Yokota, arXiv:2203.03341). Two float16 parts hold 22 bits. Scaling by powers of two keeps them in the narrow range of
float16: one power per column of w, and one per row and block of the inner axis of x, which saves a first pass over
the row. Tensor cores truncate where float32 units round, so the products of the blocks are added in ordinary float32
arithmetic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpa4.ops.operands import Operand, check
from dpa4.ops.weights import SplitWeight


class Tile(NamedTuple):
    """Work of one program: rows and columns of its tile of y, length of a block of the inner axis, warps, stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def default_tile(columns: int) -> Tile:
    """Tile for y with this number of columns, small enough for several programs on one multiprocessor."""
    return Tile(64, 128, 32, 4, 3) if columns > 64 else Tile(128, 64, 32, 4, 3)


def matmul(x: Tensor, w: Tensor, tile: Tile | None = None) -> Tensor:
    """Multiply float32 matrices with any strides.

    Args:
        x: Left operand, (E, K) or (F, E, K).
        w: Right operand, (K, N) or (F, K, N), with the same number of axes.
        tile: Work of one program; the default depends on N.

    Returns:
        Product, (E, N) or (F, E, N), contiguous. An infinity in x or w gives NaN.
    """
    y = x.new_empty((*x.shape[:-1], w.shape[-1]))
    x_FEK, w_FKN, y_FEN = (x, w, y) if x.dim() == 3 else (x[None], w[None], y[None])
    weight = SplitWeight(*torch.ops.dpa4.split_weights([w_FKN], [False]))
    matmul_into(y_FEN, x_FEK, weight, None, tile)
    return y


def matmul_into(
    y: Tensor, x: Tensor, weight: SplitWeight, add: Tensor | None, tile: Tile | None = None
) -> None:
    """Write x w + add to y (F, E, N), which has contiguous rows and the strides of ``add``; see `matmul`.

    If x has n times as many columns as w has rows, each of these n blocks of columns is multiplied by w, and y has n
    blocks, too.
    """
    if y.numel() == 0:
        return
    if x.stride(-1) != 1:
        x = x.contiguous()
    (n_batch, rows, width), (columns, inner) = x.shape, weight.halves.shape[-2:]
    copies = width // inner if inner and width % inner == 0 else 1
    _check(y, x, weight, add, copies)
    tile = default_tile(columns) if tile is None else tile
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), n_batch * copies)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _matmul[grid](
            x, weight.halves, weight.scale, y, y if add is None else add,
            rows, x.stride(0), x.stride(1), y.stride(0), y.stride(1), n_batch,
            INNER=inner, COLUMNS=columns, COPIES=copies, ADD=add is not None,
            BLOCK_E=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _check(y: Tensor, x: Tensor, weight: SplitWeight, add: Tensor | None, copies: int) -> None:
    """Compare the operands of `matmul_into` with what the kernel expects, see `dpa4.ops.operands.check`."""
    (n_batch, rows, width), columns = x.shape, weight.halves.shape[2]
    shape = 2, n_batch, columns if y.shape[-1] == copies * columns else y.shape[-1], width // copies
    halves = Operand("the parts of w", weight.halves, shape, torch.float16)
    check(
        "matmul",
        x.device,
        [halves, Operand("the scale of w", weight.scale, (n_batch, columns), torch.float32)],
    )
    for name, t in (("x", x), ("y", y), ("add", y if add is None else add)):
        like = x if name == "x" else y
        if (t.dtype, t.shape[:2], t.stride()) != (torch.float32, (n_batch, rows), like.stride()):
            raise ValueError(
                f"matmul needs {name} as float32 rows {(n_batch, rows)} with strides {like.stride()}, got "
                f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}"
            )


def split_into(results: Sequence[SplitWeight], weights: Sequence[Tensor], plus_one: Sequence[bool]) -> None:
    """Split matrices in one launch; a launch takes a few microseconds, mostly latency.

    Args:
        results: Uninitialised results, one per matrix.
        weights: Matrices (F, K, N), float32, with any strides.
        plus_one: For each matrix, whether the identity is added to it before.
    """
    starts, blocks, n_batch = [0], [], len(weights[0])
    for _, inner, columns in (w.shape for w in weights):
        block_k = triton.next_power_of_2(max(inner, 1))
        blocks.append((block_k, max(8192 // block_k, 1)))  # whole columns, at most 8,192 entries in registers
        starts.append(starts[-1] + triton.cdiv(columns, blocks[-1][1]))
    with torch.cuda.device_of(weights[0]):
        _split_weights[(starts[-1], n_batch)](
            tuple(weights), tuple(w.stride() for w in weights),
            tuple(r.halves for r in results), tuple(r.scale for r in results), n_batch,
            STARTS=tuple(starts), BLOCKS=tuple(blocks), SIZES=tuple(tuple(w.shape[1:]) for w in weights),
            PLUS_ONE=tuple(plus_one), num_warps=4,
        )  # fmt: skip


@triton.jit
def _power_of_two(largest):
    """Powers of two (up, down), inverse to each other, such that largest * up is in [2^14, 2^15), or below if tiny.

    float16 ends at 2^16, so small entries keep as many bits as possible.
    """
    # Exponent field of float32, biased by 127; 268 = 127 + 127 + 14.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _two_halves(x):
    """Float16 parts such that x = high + low."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _split_weights(
    weights, strides, halves, scales, n_batch,
    STARTS: tl.constexpr, BLOCKS: tl.constexpr, SIZES: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """Split all matrices; programs are numbered by (block of columns of any matrix, batch)."""
    program = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        if (program >= STARTS[i]) & (program < STARTS[i + 1]):
            _split_weight(
                weights[i], strides[i], halves[i], scales[i], (program - STARTS[i]) * BLOCKS[i][1], n_batch,
                SIZES[i][0], SIZES[i][1], PLUS_ONE[i], BLOCKS[i][0], BLOCKS[i][1],
            )  # fmt: skip


@triton.jit
def _split_weight(
    w, strides, halves, scale, first, n_batch,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, PLUS_ONE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Split BLOCK_N columns of a matrix from ``first`` on."""
    batch = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[:, None]
    n = first + tl.arange(0, BLOCK_N)
    mask = (k < INNER) & (n[None, :] < COLUMNS)
    at = w + batch * strides[0] + k * strides[1] + n[None, :] * strides[2]
    tile = tl.load(at, mask=mask, other=0.0)
    if PLUS_ONE:
        tile += (k == n[None, :]).to(tl.float32)
    out = halves + batch * INNER * COLUMNS
    step = n_batch * INNER * COLUMNS  # from the high part to the low part
    up, down = _power_of_two(tl.max(tl.abs(tile), axis=0))
    high, low = _two_halves(tile * up[None, :])
    place = n[None, :] * INNER + k
    tl.store(out + place, high, mask=mask)
    tl.store(out + step + place, low, mask=mask)
    tl.store(scale + batch * COLUMNS + n, down, mask=n < COLUMNS)


@triton.jit
def _matmul(
    x, halves, scale, y, add, rows, stride_f, stride_e, stride_yf, stride_ye, n_batch,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, COPIES: tl.constexpr, ADD: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply; programs are numbered by (block of rows, block of columns) and (batch, copy of the matrix).

    Programs of one block of rows follow one another, so all but the first read x from the cache.
    """
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    batch = (tl.program_id(1) // COPIES).to(tl.int64)
    copy = tl.program_id(1) % COPIES
    first = (tl.program_id(0) // column_blocks) * BLOCK_E
    e = tl.arange(0, BLOCK_E)
    n = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (first + e < rows)[:, None]
    # The origin of the tile in 64 bits, offsets inside it in 32.
    x += batch * stride_f + first.to(tl.int64) * stride_e + e[:, None] * stride_e + copy * INNER
    halves += batch * INNER * COLUMNS
    step = n_batch * INNER * COLUMNS  # from the high part to the low part

    # y^T = w^T x^T is computed. The second operand of Hopper's tensor cores always lies in shared memory, so the
    # products of one block need not wait for each other if the operand computed here, x, is the second one.
    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        mask_x = inside & (start + k < INNER)[None, :]
        tile = tl.load(x + (start + k)[None, :], mask=mask_x, other=0.0)
        at = halves + n[:, None] * INNER + (start + k)[None, :]
        mask_w = (n < COLUMNS)[:, None] & (start + k < INNER)[None, :]
        w_high = tl.load(at, mask=mask_w, other=0.0)
        w_low = tl.load(at + step, mask=mask_w, other=0.0)
        up, down = _power_of_two(tl.max(tl.abs(tile), axis=1))
        high, low = _two_halves(tile * up[:, None])
        block = tl.dot(w_low, tl.trans(high))
        block = tl.dot(w_high, tl.trans(low), block)
        block = tl.dot(w_high, tl.trans(high), block)
        acc += block * down[None, :]

    acc = acc * tl.load(scale + batch * COLUMNS + n, mask=n < COLUMNS, other=0.0)[:, None]
    out = tl.trans(acc)
    at = (
        batch * stride_yf
        + first.to(tl.int64) * stride_ye
        + e[:, None] * stride_ye
        + copy * COLUMNS
        + n[None, :]
    )
    if ADD:
        out += tl.load(add + at, mask=inside & (n < COLUMNS)[None, :], other=0.0)
    tl.store(y + at, out, mask=inside & (n < COLUMNS)[None, :])
