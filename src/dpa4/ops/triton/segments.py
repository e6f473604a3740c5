"""Triton kernels of `dpa4.ops.segments`: the sum and the maximum over the edges of each node."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpa4.ops.operands import Operand, check


@triton.jit
def _reduce(
    out,
    x,
    start_of_all,
    order,
    offsets,
    width: tl.constexpr,
    SORTED: tl.constexpr,
    MAXIMUM: tl.constexpr,
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
    if MAXIMUM:
        total += tl.load(start_of_all + columns, mask=valid, other=0.0).to(ACCUMULATOR)[None, :]
    for first in range(0, count, BLOCK_E):
        position = first + tl.arange(0, BLOCK_E)
        edge = start + position
        if not SORTED:
            edge = tl.load(order + edge, mask=position < count, other=0)
        mask = (position < count)[:, None] & valid[None, :]
        at = x + edge[:, None] * width + columns[None, :]
        if MAXIMUM:
            entries = tl.load(at, mask=mask, other=-float("inf")).to(ACCUMULATOR)
            total = tl.maximum(total, entries)
        else:
            total += tl.load(at, mask=mask, other=0.0).to(ACCUMULATOR)
    found = tl.max(total, axis=0) if MAXIMUM else tl.sum(total, axis=0)
    tl.store(out + node * width + columns, found, mask=valid)


def segment_sum(x: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Compute `dpa4.ops.segments.segment_sum`; ``order`` and ``offsets`` as in `dpa4.ops.incidence.Incidence`."""
    return _reduced(x, None, order, offsets)


def segment_max(x: Tensor, start: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Compute `dpa4.ops.segments.segment_max`."""
    return _reduced(x, start, order, offsets)


def _reduced(x: Tensor, start: Tensor | None, order: Tensor | None, offsets: Tensor) -> Tensor:
    """Sum, or maximum if there is a start; one program per node and block of columns."""
    x = x.contiguous()
    num_nodes = offsets.shape[0] - 1
    out = x.new_empty(num_nodes, *x.shape[1:])
    operands = [
        Operand("offsets", offsets, (num_nodes + 1,), torch.int64),
        *([] if order is None else [Operand("order", order, (len(x),), torch.int64)]),
        *([] if start is None else [Operand("start", start, x.shape[1:], x.dtype)]),
    ]
    check("segment_sum" if start is None else "segment_max", x.device, operands)
    if x.numel() == 0 or num_nodes == 0:
        return out.zero_() if start is None else out.copy_(start)
    width = out.numel() // num_nodes
    block_c = min(triton.next_power_of_2(width), 128)
    block_e = max(4, min(32, 1024 // block_c))
    with torch.cuda.device_of(x):
        _reduce[(num_nodes, triton.cdiv(width, block_c))](
            out,
            x,
            x if start is None else start,
            order,
            offsets,
            width,
            SORTED=order is None,
            MAXIMUM=start is not None,
            ACCUMULATOR=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_E=block_e,
            BLOCK_C=block_c,
            num_warps=max(1, block_e * block_c // 256),
        )
    return out
