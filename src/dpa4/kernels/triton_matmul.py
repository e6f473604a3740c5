"""Triton kernels of `dpa4.kernels.matmul`: products of float32 matrices on tensor cores, as accurate as float32.

Tensor cores multiply short significands and add in float32. Every operand is therefore split into a sum of short
pieces, and the products of pieces that matter are added (Ootomo and Yokota, arXiv:2203.03341). Two pieces of float16
hold 22 bits; a power of two per row of x and per column of w keeps them inside the narrow range of float16. Tensor
cores truncate where float32 units round, so what reaches far is better added outside of them.

Importing this module imports triton.
"""

from typing import Literal, NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

Scheme = Literal["fp16x3", "fp16x3_blocks", "fp16x3_single", "tf32x3", "bf16x6"]
"""How operands are split and products are added.

* ``fp16x3``: high and low products in accumulators of their own; the scale of a row of x is found by a first pass.
* ``fp16x3_blocks``: the products of a block of the inner axis are added outside of the tensor core, where each block
  of x has its own scale, so there is no first pass.
* ``fp16x3_single``: like ``fp16x3`` with one accumulator for everything; larger tiles fit, truncation weighs more.
* ``tf32x3``: Triton's own splitting into TF32.
* ``bf16x6``: three pieces of bfloat16, which need no scale; six products.
"""
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_PIECES = {"tf32x3": (1, torch.float32), "bf16x6": (3, torch.bfloat16)}


class Tile(NamedTuple):
    """Work of one program: rows and columns of its part of y, length of a block of the inner axis."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def default_tile(columns: int) -> Tile:
    """Tile for so many columns of y: small enough for several programs at once on one multiprocessor."""
    return Tile(64, 128, 32, 4, 3) if columns > 64 else Tile(128, 64, 32, 4, 3)


def matmul(x: Tensor, w: Tensor, scheme: Scheme = "fp16x3_blocks", tile: Tile | None = None) -> Tensor:
    """x (E, K) or (F, E, K) times w (K, N) or (F, K, N), float32, with any strides.

    Args:
        x: Left operand.
        w: Right operand, with as many axes.
        scheme: How to split.
        tile: Work of one program; the default depends on N.

    Returns:
        (E, N) or (F, E, N), contiguous. An infinity in x or w gives NaN.
    """
    y = x.new_empty((*x.shape[:-1], w.shape[-1]))
    if y.numel() == 0:
        return y
    x_FEK, w_FKN = (x, w) if x.dim() == 3 else (x[None], w[None])
    if x_FEK.stride(-1) != 1:
        x_FEK = x_FEK.contiguous()
    (n_batch, rows, inner), columns = x_FEK.shape, w.shape[-1]
    tile = default_tile(columns) if tile is None else tile
    pieces, scale = split_weight(w_FKN, scheme)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), n_batch)
    _matmul[grid](
        x_FEK, pieces, scale, y, rows, x_FEK.stride(0), x_FEK.stride(1), n_batch,
        INNER=inner, COLUMNS=columns, SCHEME=scheme,
        BLOCK_E=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def split_weight(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Pieces (P, F, N, K) of w (F, K, N) and the powers of two (F, N) by which their products are multiplied."""
    n_pieces, dtype = _PIECES.get(scheme, (2, torch.float16))
    n_batch, inner, columns = w.shape
    pieces = w.new_empty((n_pieces, n_batch, columns, inner), dtype=dtype)
    scale = w.new_empty((n_batch, columns))
    block_k = triton.next_power_of_2(max(inner, 1))
    block_n = max(8192 // block_k, 1)  # a whole column at once, in few enough registers
    _split_weight[(triton.cdiv(columns, block_n), n_batch)](
        w, pieces, scale, *w.stride(), n_batch,
        INNER=inner, COLUMNS=columns, SCHEME=scheme, BLOCK_K=block_k, BLOCK_N=block_n,
        num_warps=4,
    )  # fmt: skip
    return pieces, scale


@triton.jit
def _power_of_two(largest):
    """Powers of two (up, down), inverse of each other: largest * up is in [2^14, 2^15), or below if it is tiny.

    float16 ends at 2^16, so this leaves the most room below.
    """
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _two_halves(x, LOW_SCALE: tl.constexpr):
    """float16 pieces with x = high + low / LOW_SCALE."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW_SCALE).to(tl.float16)


@triton.jit
def _three_bfloats(x):
    """bfloat16 pieces with x = high + middle + low."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split_weight(
    w, pieces, scale, stride_f, stride_k, stride_n, n_batch,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, SCHEME: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (column block, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (k < INNER) & (n[None, :] < COLUMNS)
    tile = tl.load(w + batch * stride_f + k * stride_k + n[None, :] * stride_n, mask=mask, other=0.0)
    out = pieces + batch * INNER * COLUMNS + n[None, :] * INNER + k
    step = n_batch * INNER * COLUMNS
    down = tl.full((BLOCK_N,), 1.0, tl.float32)
    if SCHEME == "tf32x3":
        tl.store(out, tile, mask=mask)
    elif SCHEME == "bf16x6":
        high, middle, low = _three_bfloats(tile)
        tl.store(out, high, mask=mask)
        tl.store(out + step, middle, mask=mask)
        tl.store(out + 2 * step, low, mask=mask)
    else:
        up, down = _power_of_two(tl.max(tl.abs(tile), axis=0))
        high, low = _two_halves(tile * up[None, :], 2048.0 if SCHEME == "fp16x3" else 1.0)
        tl.store(out, high, mask=mask)
        tl.store(out + step, low, mask=mask)
    tl.store(scale + batch * COLUMNS + n, down, mask=n < COLUMNS)


@triton.jit
def _matmul(
    x, pieces, scale, y, rows, stride_f, stride_e, n_batch,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, SCHEME: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (row block and column block, batch); column blocks run first, so x comes from the cache after that."""
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    batch = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) // column_blocks) * BLOCK_E
    e = tl.arange(0, BLOCK_E)
    n = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (first + e < rows)[:, None]
    # The origin of the tile in 64 bits, offsets inside it in 32.
    x += batch * stride_f + first.to(tl.int64) * stride_e + e[:, None] * stride_e
    pieces += batch * INNER * COLUMNS
    step = n_batch * INNER * COLUMNS

    down = tl.full((BLOCK_E,), 1.0, tl.float32)
    if SCHEME == "fp16x3" or SCHEME == "fp16x3_single":
        largest = tl.zeros((BLOCK_E, BLOCK_K), tl.float32)
        for start in tl.static_range(0, INNER, BLOCK_K):  # unrolled, so that loads do not wait for each other
            mask = inside & (start + k < INNER)[None, :]
            largest = tl.maximum(largest, tl.abs(tl.load(x + (start + k)[None, :], mask=mask, other=0.0)))
        up, down = _power_of_two(tl.max(largest, axis=1))

    # y^T = w^T x^T: of the operands of Hopper's tensor cores the second always lies in shared memory, so that the
    # products of one block need not wait for each other when it is the one computed here.
    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    small = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        mask_x = inside & (start + k < INNER)[None, :]
        tile = tl.load(x + (start + k)[None, :], mask=mask_x, other=0.0)
        at = pieces + n[:, None] * INNER + (start + k)[None, :]
        mask_w = (n < COLUMNS)[:, None] & (start + k < INNER)[None, :]
        w_high = tl.load(at, mask=mask_w, other=0.0)
        if SCHEME == "tf32x3":
            acc = tl.dot(w_high, tl.trans(tile), acc, input_precision="tf32x3")
        elif SCHEME == "bf16x6":
            high, middle, low = _three_bfloats(tile)
            w_middle = tl.load(at + step, mask=mask_w, other=0.0)
            w_low = tl.load(at + 2 * step, mask=mask_w, other=0.0)
            small = tl.dot(w_low, tl.trans(high), small)
            small = tl.dot(w_high, tl.trans(low), small)
            small = tl.dot(w_middle, tl.trans(middle), small)
            small = tl.dot(w_middle, tl.trans(high), small)
            small = tl.dot(w_high, tl.trans(middle), small)
            acc = tl.dot(w_high, tl.trans(high), acc)
        else:
            w_low = tl.load(at + step, mask=mask_w, other=0.0)
            if SCHEME == "fp16x3":
                high, low = _two_halves(tile * up[:, None], 2048.0)
                small = tl.dot(w_low, tl.trans(high), small)
                small = tl.dot(w_high, tl.trans(low), small)
                acc = tl.dot(w_high, tl.trans(high), acc)
            elif SCHEME == "fp16x3_single":
                high, low = _two_halves(tile * up[:, None], 1.0)
                acc = tl.dot(w_low, tl.trans(high), acc)
                acc = tl.dot(w_high, tl.trans(low), acc)
                acc = tl.dot(w_high, tl.trans(high), acc)
            else:
                block_up, block_down = _power_of_two(tl.max(tl.abs(tile), axis=1))
                high, low = _two_halves(tile * block_up[:, None], 1.0)
                block = tl.dot(w_low, tl.trans(high))
                block = tl.dot(w_high, tl.trans(low), block)
                block = tl.dot(w_high, tl.trans(high), block)
                acc += block * block_down[None, :]

    if SCHEME == "fp16x3":
        acc += small * (1.0 / 2048.0)
    elif SCHEME == "bf16x6":
        acc += small
    if SCHEME != "tf32x3" and SCHEME != "bf16x6":
        acc = acc * down[None, :] * tl.load(scale + batch * COLUMNS + n, mask=n < COLUMNS, other=0.0)[:, None]
    y += (batch * rows + first) * COLUMNS + e[:, None] * COLUMNS + n[None, :]
    tl.store(y, tl.trans(acc), mask=inside & (n < COLUMNS)[None, :])
