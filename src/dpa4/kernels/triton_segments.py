"""Triton kernel of the segment sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _segment_sum(
    out,
    x,
    order,
    offsets,
    width: tl.constexpr,
    SORTED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < width
    start = tl.load(offsets + node)
    count = (tl.load(offsets + node + 1) - start).to(tl.int32)
    total = tl.zeros((BLOCK_E, BLOCK_C), dtype=ACCUMULATOR)
    for first in range(0, count, BLOCK_E):
        position = first + tl.arange(0, BLOCK_E)
        edge = start + position
        if not SORTED:
            edge = tl.load(order + edge, mask=position < count, other=0)
        mask = (position < count)[:, None] & valid[None, :]
        total += tl.load(x + edge[:, None] * width + columns[None, :], mask=mask, other=0.0).to(ACCUMULATOR)
    tl.store(out + node * width + columns, tl.sum(total, axis=0), mask=valid)


def segment_sum(x: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """`dpa4.kernels.segments.segment_sum` without the derivative; one program per node and block of columns."""
    x = x.contiguous()
    num_nodes = offsets.shape[0] - 1
    out = x.new_empty(num_nodes, *x.shape[1:])
    if x.numel() == 0 or num_nodes == 0:
        return out.zero_()
    width = out.numel() // num_nodes
    block_c = min(triton.next_power_of_2(width), 128)
    block_e = max(4, min(32, 1024 // block_c))
    with torch.cuda.device_of(x):
        _segment_sum[(num_nodes, triton.cdiv(width, block_c))](
            out,
            x,
            order,
            offsets,
            width,
            SORTED=order is None,
            ACCUMULATOR=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_E=block_e,
            BLOCK_C=block_c,
            num_warps=max(1, block_e * block_c // 256),
        )
    return out
