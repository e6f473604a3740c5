"""Transfers between nodes and edges: `gather` and `segment_sum`, each the derivative of the other; `segment_max`.

Two operators for compiled code are here as well: `pick`, an index selection, and `materialized`, a fusion barrier.
"""

from typing import Any

import torch
from torch import Tensor

from dpa4.ops.incidence import Incidence
from dpa4.ops.registration import register


def gather(x: Tensor, incidence: Incidence) -> Tensor:
    """Copy the value of each edge's node: (N, ...) -> (E, ...)."""
    return _Gather.apply(x, *incidence)


def segment_sum(x: Tensor, incidence: Incidence) -> Tensor:
    """Sum over the edges of each node: (E, ...) -> (N, ...); zero for a node without edges.

    float16 and bfloat16 are accumulated in float32. Two calls with the same tensors agree to the last bit.
    """
    return _SegmentSum.apply(x, *incidence)


def segment_max(x: Tensor, start: Tensor, incidence: Incidence) -> Tensor:
    """Maximum over the edges of each node and ``start``: (E, ...), (...) -> (N, ...); not differentiable.

    Entries that are NaN may be ignored or propagated.
    """
    found: Tensor = torch.ops.dpa4.segment_max(x.contiguous(), start.contiguous(), *incidence)
    return found


def pick(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Compute ``x.index_select(dim, index)`` for a short axis with repeated entries, such as weights of degrees.

    Its backward sum is a custom operator because Inductor (torch 2.13, CPU) writes out of bounds when the operand is
    transposed.
    """
    return _Pick.apply(x, dim, index)


def materialized(x: Tensor) -> Tensor:
    """Return x behind a fusion barrier: it is written to memory once instead of being recomputed at every use."""
    return _Materialized.apply(x)


class _Materialized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.dpa4.materialized(x.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return materialized(grad)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.dim, ctx.size = dim, x.shape[dim]
        ctx.save_for_backward(index)
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _PickBackward.apply(grad, ctx.dim, *ctx.saved_tensors, ctx.size), None, None


class _PickBackward(torch.autograd.Function):
    """Sum of entries into the places they were picked from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(index)
        return torch.ops.dpa4.put_back(x.contiguous(), dim, index, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Pick.apply(grad, ctx.dim, *ctx.saved_tensors), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(index, order, offsets)
        return x.index_select(0, index)  # no custom operator, so that a compiler fuses it into its users

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _SegmentSum.apply(grad, *ctx.saved_tensors), None, None, None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(index, order, offsets)
        return torch.ops.dpa4.segment_sum(x.contiguous(), index, order, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Gather.apply(grad, *ctx.saved_tensors), None, None, None


# Implementations and uninitialised results.


def wide(x: Tensor) -> Tensor:
    """Convert to the dtype of accumulation, at least float32."""
    return x.float() if x.itemsize < 4 else x


def _segment_sum_cpu(x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    entries = wide(x)
    total = entries.new_zeros(offsets.shape[0] - 1, *x.shape[1:])
    return total.index_add(0, index, entries).to(x.dtype)


def _segment_sum_cuda(x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    # Imported here, since a machine without a GPU may have no Triton.
    from dpa4.ops.triton import segments as kernels

    return kernels.segment_sum(x, order, offsets)


def _new_segment_sum(x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, *x.shape[1:])


def _segment_max_cpu(
    x: Tensor, start: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    whole = start.expand(offsets.shape[0] - 1, *start.shape)
    index = index.view(-1, *[1] * start.dim()).expand_as(x)
    return whole.scatter_reduce(0, index, x, "amax", include_self=True)


def _segment_max_cuda(
    x: Tensor, start: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    from dpa4.ops.triton import segments as kernels

    return kernels.segment_max(x, start, order, offsets)


def _new_segment_max(
    x: Tensor, start: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    return _new_segment_sum(x, index, order, offsets)


def _put_back(x: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    return _new_put_back(x, dim, index, size).zero_().index_add_(dim, index, x)


def _new_put_back(x: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    return x.new_empty(*x.shape[:dim], size, *x.shape[dim + 1 :])


_INCIDENCE = "Tensor index, Tensor? order, Tensor offsets"
register(
    f"segment_sum(Tensor x, {_INCIDENCE}) -> Tensor",
    _new_segment_sum,
    {"CPU": _segment_sum_cpu, "CUDA": _segment_sum_cuda},
)
register(
    f"segment_max(Tensor x, Tensor start, {_INCIDENCE}) -> Tensor",
    _new_segment_max,
    {"CPU": _segment_max_cpu, "CUDA": _segment_max_cuda},
)
register(
    "materialized(Tensor x) -> Tensor",
    lambda x: x.new_empty(x.shape),
    {"CompositeExplicitAutograd": torch.clone},
)
register(
    "put_back(Tensor x, int dim, Tensor index, SymInt size) -> Tensor",
    _new_put_back,
    {"CompositeExplicitAutograd": _put_back},
)
