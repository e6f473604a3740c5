r"""Products of a matrix per edge with node and edge tensors: three derivatives of one trilinear form.

.. math:: T(a, x, g) = \sum_e \sum_h \langle a_{eh} \, x_{n(e),h},\; g_{eh} \rangle

with matrices a (E, H, M, K) on edges, a node tensor x (N, K, H c) and an edge tensor g (E, M, H c); n(e) is the node
of edge e in an `Incidence`, and head h owns the h-th run of c channels. Each function is the derivative of T with
respect to one argument, so its own derivatives are the other two functions, to any order. No intermediate tensor of
the size of an edge tensor is stored.

The tensors of one call have the same dtype, which is that of the result; float16 and bfloat16 are accumulated in
float32. Two calls with the same tensors agree to the last bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpa4.ops import available
from dpa4.ops.cpp import edge_products as cpp
from dpa4.ops.incidence import Incidence
from dpa4.ops.registration import register
from dpa4.ops.second_order import needs_gradient
from dpa4.ops.segments import segment_sum, wide

CHUNK = 512
"""Edges processed together by the plain version: few enough that the copies of their nodes stay in the CPU cache."""


# `contiguous` is called here and not in the kernels for two reasons. Compiled code then writes the operands in
# contiguous form at once. And the call comes before the function is recorded by autograd: a copy made inside of
# `forward` would be a constant to the second derivative.


def edge_matmul(a: Tensor, x: Tensor, incidence: Incidence) -> Tensor:
    """Multiply each edge's matrix by its node's features: (E, H, M, K), (N, K, H c) -> (E, M, H c)."""
    return _EdgeMatmul.apply(a.contiguous(), x.contiguous(), *incidence)


def scatter_matmul(a: Tensor, g: Tensor, incidence: Incidence) -> Tensor:
    """Apply transposed matrices, summed over the edges of each node: (E, H, M, K), (E, M, H c) -> (N, K, H c)."""
    return _ScatterMatmul.apply(a.contiguous(), g.contiguous(), *incidence)


def edge_outer(g: Tensor, x: Tensor, incidence: Incidence, heads: int) -> Tensor:
    """Contract edge and node features over each head's channels: (E, M, H c), (N, K, H c) -> (E, H, M, K)."""
    return _EdgeOuter.apply(g.contiguous(), x.contiguous(), *incidence, heads)


class _EdgeMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(a, x, index, order, offsets)
        return torch.ops.dpa4.edge_matmul(a, x, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, x, *ends = ctx.saved_tensors
        incidence = Incidence(*ends)
        of_a, of_x = needs_gradient(ctx, 2)
        da = edge_outer(g, x, incidence, a.shape[1]) if of_a else None
        dx = scatter_matmul(a, g, incidence) if of_x else None
        return da, dx, None, None, None


class _ScatterMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(a, g, index, order, offsets)
        return torch.ops.dpa4.scatter_matmul(a, g, index, order, offsets)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        a, g, *ends = ctx.saved_tensors
        incidence = Incidence(*ends)
        of_a, of_g = needs_gradient(ctx, 2)
        da = edge_outer(g, x, incidence, a.shape[1]) if of_a else None
        dg = edge_matmul(a, x, incidence) if of_g else None
        return da, dg, None, None, None


class _EdgeOuter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, heads: int
    ) -> Tensor:
        ctx.save_for_backward(g, x, index, order, offsets)
        return torch.ops.dpa4.edge_outer(g, x, index, heads)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        g, x, *ends = ctx.saved_tensors
        incidence = Incidence(*ends)
        of_g, of_x = needs_gradient(ctx, 2)
        dg = edge_matmul(a, x, incidence) if of_g else None
        dx = scatter_matmul(a, g, incidence) if of_x else None
        return dg, dx, None, None, None, None


# Uninitialised results: tracing needs their shapes, and the kernels fill them.


def _new_edge_matmul(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[2], x.shape[2])


def _new_scatter_matmul(a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, a.shape[3], g.shape[2])


def _new_edge_outer(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    return g.new_empty(g.shape[0], heads, g.shape[1], x.shape[1])


# CPU: C++ kernels where they are available, else plain operations.


def _chunks(num_edges: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, num_edges, CHUNK))


def _split(x: Tensor, heads: int) -> Tensor:
    """Split channels into heads: (E, K, H c) -> (E, H, K, c)."""
    return wide(x).unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """Join the channels of all heads: (E, H, K, c) -> (E, K, H c)."""
    return x.transpose(1, 2).flatten(2)


def _edge_matmul(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    out = _new_edge_matmul(a, x, index)
    if available.cpp(x.shape[2] // a.shape[1], a):
        return cpp.edge_matmul(a, x, index, out)
    with torch.autocast("cpu", enabled=False):  # the dtype was chosen by the caller
        for s in _chunks(len(a)):
            out[s] = _join(wide(a[s]) @ _split(x.index_select(0, index[s]), a.shape[1]))
    return out


def _scatter_matmul(a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    out = _new_scatter_matmul(a, g, index, order, offsets)
    if available.cpp(g.shape[2] // a.shape[1], a):
        return cpp.scatter_matmul(a, g, order, offsets, out)
    out = torch.zeros_like(wide(out))
    with torch.autocast("cpu", enabled=False):
        for s in _chunks(len(a)):
            columns, rows = wide(a[s]).mT, _split(g[s], a.shape[1])
            # With one term per sum, broadcasting is much faster than a matrix product.
            products = columns * rows if a.shape[2] == 1 else columns @ rows
            out.index_add_(0, index[s], _join(products))
    return out.to(a.dtype)


def _edge_outer(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    out = _new_edge_outer(g, x, index, heads)
    if available.cpp(x.shape[2] // heads, g):
        return cpp.edge_outer(g, x, index, out)
    with torch.autocast("cpu", enabled=False):
        for s in _chunks(len(g)):
            out[s] = _split(g[s], heads) @ _split(x.index_select(0, index[s]), heads).mT
    return out


# GPU: Triton kernels where they support the dtype, else plain operations on all edges at once.


def _edge_matmul_cuda(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    if not available.triton(a):
        return _join(a @ _split(x[index], a.shape[1])).contiguous()
    # Imported here, since a machine without a GPU may have no Triton.
    from dpa4.ops.triton import edge_products as kernels

    return kernels.edge_matmul(a, x, index)


def _scatter_matmul_cuda(
    a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    if not available.triton(a):
        parts = _join(a.mT @ _split(g, a.shape[1]))
        return segment_sum(parts, Incidence(index, order, offsets))
    from dpa4.ops.triton import edge_products as kernels

    return kernels.scatter_matmul(a, g, order, offsets)


def _edge_outer_cuda(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    if not available.triton(g):
        return (_split(g, heads) @ _split(x[index], heads).mT).contiguous()
    from dpa4.ops.triton import edge_products as kernels

    return kernels.edge_outer(g, x, index, heads)


register(
    "edge_matmul(Tensor a, Tensor x, Tensor index) -> Tensor",
    _new_edge_matmul,
    {"CPU": _edge_matmul, "CUDA": _edge_matmul_cuda},
)
register(
    "scatter_matmul(Tensor a, Tensor g, Tensor index, Tensor? order, Tensor offsets) -> Tensor",
    _new_scatter_matmul,
    {"CPU": _scatter_matmul, "CUDA": _scatter_matmul_cuda},
)
register(
    "edge_outer(Tensor g, Tensor x, Tensor index, int heads) -> Tensor",
    _new_edge_outer,
    {"CPU": _edge_outer, "CUDA": _edge_outer_cuda},
)
