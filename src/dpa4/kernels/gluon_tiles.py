"""What the kernels for Hopper GPUs share: tiles between memory and tensor cores, float32 in pieces, weights on chip.

They are written in Gluon, the language of Triton in which layouts are explicit, for float32. A tile of edge features
goes from memory straight into the registers of a tensor core's operand, and from those of its result back, without
shared memory in between, so that groups of four warps never wait for each other. Weights stay in shared memory while
a program walks over the edges.

A thread of a tensor core holds the columns 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16, t = 0..3, but memory is best
read in runs of four. Columns are therefore named after who holds them: 16 b + 4 t + 2 j + i in memory is
16 b + 8 j + 2 t + i by name. Operands and results are named in the same way, and `triton_matmul.split_into` stores
weights by name.

Importing this module imports triton.
"""

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

SHARED_MEMORY = 232_448
"""Bytes of shared memory that a program may have on compute capability 9.0."""

EDGES, WARPS = 128, 8
"""Edges that a program works on at a time, and its warps: 64 edges for every four."""

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are. Each runs one or two of the programs at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.constexpr_function
def memory_layout(rows: Any, columns: Any) -> Any:
    """Layout of a tile (rows, columns) as memory is read: runs of four columns, the rows of an operand."""
    registers = [[0, 1], [0, 2], [8, 0]] + [[0, 1 << b] for b in range(4, columns.bit_length() - 1)]
    warps = [[1 << b, 0] for b in range(4, rows.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, columns])


@gluon.constexpr_function
def line_layout(rows: Any, columns: Any) -> Any:
    """The same, but that a warp reads and writes whole lines of 128 bytes, and a thread holds other rows."""
    registers = [[0, 1], [0, 2], [8, 0], [4, 0]] + [[0, 1 << b] for b in range(5, columns.bit_length() - 1)]
    warps = [[1 << b, 0] for b in range(4, rows.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [0, 16]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, columns])


@gluon.constexpr_function
def result_layout(columns: Any, num_warps: Any) -> Any:
    """Layout of a product with so many columns."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def place_of(name):
    """Column of memory that a name stands for."""
    return name // 16 * 16 + name % 8 // 2 * 4 + name % 16 // 8 * 2 + name % 2


@gluon.jit
def by_name(tile):
    """Tile (E, N) in the `memory_layout` to columns by name, in the `result_layout`."""
    E: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    tile = tile.reshape([E, N // 16, 4, 2, 2]).permute([0, 1, 3, 2, 4]).reshape([E, N])
    return gl.convert_layout(tile, result_layout(N, gl.num_warps()), assert_trivial=True)


@gluon.jit
def by_place(tile):
    """Inverse of `by_name`."""
    E: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1]
    tile = tile.reshape([E, N // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([E, N])
    return gl.convert_layout(tile, memory_layout(E, N), assert_trivial=True)


@gluon.jit
def two_halves(tile, N: gl.constexpr):
    """(high, low, down) of a tile by name: float16 operands of a product of N columns, tile = (high + low) * down.

    down (E, 1) are powers of two; see `triton_matmul`.
    """
    largest = gl.max(gl.abs(tile), axis=1)
    exponent = gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 15)
    up = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    scaled = tile * up[:, None]
    high = scaled.to(gl.float16)
    low = (scaled - high.to(gl.float32)).to(gl.float16)
    result: gl.constexpr = result_layout(N, gl.num_warps())
    operand: gl.constexpr = gl.DotOperandLayout(0, result, k_width=2)
    high = gl.convert_layout(high, operand, assert_trivial=True)
    low = gl.convert_layout(low, operand, assert_trivial=True)
    down = gl.convert_layout(down, gl.SliceLayout(1, result), assert_trivial=True)
    return high, low, down[:, None]


@gluon.jit
def split_product(x, weights, block, TRANSPOSED: gl.constexpr = False):
    """`two_halves` (E, K) times a block of `keep_weights`, which is (N, K), without the product of the low pieces.

    (E, N); ``TRANSPOSED``: (E, N) times the block itself, (E, K).
    """
    high, low, down = x
    w_high = weights.index(2 * block)
    w_low = weights.index(2 * block + 1)
    if not TRANSPOSED:
        w_high = w_high.permute((1, 0))
        w_low = w_low.permute((1, 0))
    E: gl.constexpr = high.shape[0]
    N: gl.constexpr = w_high.shape[1]
    product = gl.zeros([E, N], gl.float32, result_layout(N, gl.num_warps()))
    product = warpgroup_mma(low, w_high, product, use_acc=False, is_async=True)
    product = warpgroup_mma(high, w_low, product, is_async=True)
    product = warpgroup_mma(high, w_high, product, is_async=True)
    return warpgroup_mma_wait(0, deps=[product]) * down


@gluon.jit
def keep_weights(
    blocks, rows, stride_b, stride_n, stride_p, B: gl.constexpr, N: gl.constexpr, K: gl.constexpr
):  # fmt: skip
    """Both pieces of B blocks of weights, each (N, K) in memory, on chip: piece p of block b at 2 b + p.

    Only so many rows are in memory; the others are zero.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * K, element_bitwidth=16, rank=2)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [gl.num_warps(), 1], [1, 0])
    kept = gl.allocate_shared_memory(gl.float16, [2 * B, N, K], shared)
    n = gl.arange(0, N, gl.SliceLayout(1, layout))
    k = gl.arange(0, K, gl.SliceLayout(0, layout))
    at = blocks + n[:, None] * stride_n + k[None, :]
    for p in gl.static_range(2):
        tiles = ()  # all on their way before the first is stored
        for b in gl.static_range(B):
            tile = gl.load(at + p * stride_p + b * stride_b, mask=(n < rows)[:, None], other=0.0)
            tiles = tiles + (tile,)  # type: ignore[assignment]
        for b in gl.static_range(B):
            kept.index(2 * b + p).store(tiles[b])
    fence_async_shared()
    _barrier()
    return kept
