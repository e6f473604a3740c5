"""Triton kernels of `dpa4.ops.edge_products`.

The matrices are far smaller than the tiles of tensor cores, so all kernels are bound by memory bandwidth. Each
program computes one small padded product, and the node tensor is read through the cache. Heads, rows and channels are
compile-time constants; the numbers of edges and nodes are not. float32 operands are multiplied as three TF32
products, which keeps float32 accuracy. Letters follow `dpa4.ops.edge_products`: H heads, M rows and K columns of a
matrix, C channels per head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpa4.ops.operands import Operand, check

SMALLEST = 16
"""Smallest side of a tile of tensor cores."""


@triton.jit
def _edge_matmul(
    out,
    a,
    x,
    index,
    H: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # (edge, head), flattened
    edge, head = pair // H, pair % H
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    a += pair * (M * K)
    x += tl.load(index + edge) * (K * H * C) + head * C
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in tl.static_range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        matrix = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        rows = tl.load(
            x + k[:, None] * (H * C) + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0
        )
        total = tl.dot(matrix, rows, total, input_precision=PRECISION)
    out += edge * (M * H * C) + head * C
    tl.store(out + m[:, None] * (H * C) + c[None, :], total, mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def _edge_outer(
    out,
    g,
    x,
    index,
    H: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)  # (edge, head), flattened
    edge, head = pair // H, pair % H
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    g += edge * (M * H * C) + head * C
    x += tl.load(index + edge) * (K * H * C) + head * C
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first in tl.static_range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        left = tl.load(
            g + m[:, None] * (H * C) + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0
        )
        right = tl.load(
            x + k[:, None] * (H * C) + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0
        )
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    out += pair * (M * K)
    tl.store(out + m[:, None] * K + k[None, :], total, mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit
def _scatter_matmul(
    out,
    a,
    g,
    order,
    offsets,
    H: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    node, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.load(offsets + node)
    count = (tl.load(offsets + node + 1) - start).to(tl.int32) * M  # rows (edge, m), one long contraction
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    for first in range(0, count, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        m = row % M
        edge = start + row // M
        if not SORTED:
            edge = tl.load(order + edge, mask=row < count, other=0)
        left = tl.load(
            a + (((edge * H + head) * M + m) * K)[:, None] + k[None, :],
            mask=(row < count)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        right = tl.load(
            g + ((edge * M + m) * (H * C) + head * C)[:, None] + c[None, :],
            mask=(row < count)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    out += node * (K * H * C) + head * C
    tl.store(out + k[:, None] * (H * C) + c[None, :], total, mask=(k < K)[:, None] & (c < C)[None, :])


def edge_matmul(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Compute `dpa4.ops.edge_products.edge_matmul`; a program is one warp for one edge and head."""
    a, x = a.contiguous(), x.contiguous()
    E, H, M, K = a.shape
    C = x.shape[2] // H
    out = a.new_empty(E, M, H * C)
    operands = [Operand("x", x, (len(x), K, H * C), a.dtype), Operand("index", index, (E,), torch.int64)]
    check("edge_matmul", a.device, operands)
    block_m, block_k, block_c = _tile(M, 16), _tile(K, 32), _tile(C, 64)
    if out.numel() > 0:
        with torch.cuda.device_of(a):
            _edge_matmul[(E * H, triton.cdiv(M, block_m), triton.cdiv(C, block_c))](
                out, a, x, index, H, M, K, C, block_m, block_k, block_c, _precision(a), num_warps=1
            )
    return out


def edge_outer(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    """Compute `dpa4.ops.edge_products.edge_outer`; a program is one warp for one edge and head."""
    g, x = g.contiguous(), x.contiguous()
    E, M = g.shape[:2]
    K, H, C = x.shape[1], heads, x.shape[2] // heads
    out = g.new_empty(E, H, M, K)
    operands = [
        Operand("g", g, (E, M, H * C), g.dtype),
        Operand("x", x, (len(x), K, H * C), g.dtype),
        Operand("index", index, (E,), torch.int64),
    ]
    check("edge_outer", g.device, operands)
    block_m, block_k, block_c = _tile(M, 16), _tile(K, 32), _tile(C, 64)
    if out.numel() > 0:
        with torch.cuda.device_of(g):
            _edge_outer[(E * H, triton.cdiv(M, block_m), triton.cdiv(K, block_k))](
                out, g, x, index, H, M, K, C, block_m, block_k, block_c, _precision(g), num_warps=1
            )
    return out


def scatter_matmul(a: Tensor, g: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Compute `dpa4.ops.edge_products.scatter_matmul`.

    A program adds the edges of one node, for one head and a block of channels, so no atomics are needed.
    """
    a, g = a.contiguous(), g.contiguous()
    H, M, K = a.shape[1:]
    N, C = offsets.shape[0] - 1, g.shape[2] // H
    out = a.new_empty(N, K, H * C)
    operands = [
        Operand("g", g, (len(a), M, H * C), a.dtype),
        Operand("offsets", offsets, (N + 1,), torch.int64),
        *([] if order is None else [Operand("order", order, (len(a),), torch.int64)]),
    ]
    check("scatter_matmul", a.device, operands)
    block_r, block_k, block_c = 128 // a.itemsize, _tile(K, 32), _tile(C, 64)
    if a.numel() == 0:
        return out.zero_()
    if out.numel() > 0:
        with torch.cuda.device_of(a):
            _scatter_matmul[(N * H, triton.cdiv(K, block_k), triton.cdiv(C, block_c))](
                out, a, g, order, offsets, H, M, K, C, order is None, block_r, block_k, block_c, _precision(a),
                num_warps=4, num_stages=3,
            )  # fmt: skip
    return out


def _tile(size: int, largest: int) -> int:
    """Side of a tile for an axis of this size."""
    return max(SMALLEST, min(largest, triton.next_power_of_2(size)))


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"  # "tf32" has no effect on 16-bit operands
