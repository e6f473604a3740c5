r"""Matrices on edges between node and edge tensors: the three functions of one trilinear form.

.. math:: T(a, x, g) = \sum_e \sum_h \langle a_{eh} \, x_{n(e),h},\; g_{eh} \rangle

with matrices a (E, H, M, K) on edges, a node tensor x (N, K, H c) and an edge tensor g (E, M, H c); n(e) is the node
of edge e in an `Incidence`, and head h owns the h-th run of c channels. Each function is the derivative of T with
respect to one argument, so the derivatives of each are the two others, to any order. No product of the size of
an edge tensor other than the result is kept.

The tensors of one call have one dtype, which is the result's; float16 and bfloat16 are accumulated in float32.
Two calls agree to the last bit.
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
from dpa4.ops.segments import segment_sum

CHUNK = 512
"""Edges whose nodes are copied at a time on a CPU: the copies stay in its cache."""


# Contiguous here rather than in a kernel, so that a compiler writes the operands that way at once; and before a
# derivative is recorded, since a copy made within would be a constant to its second derivative.


def edge_matmul(a: Tensor, x: Tensor, incidence: Incidence) -> Tensor:
    """Each edge's matrix applied to its node: (E, H, M, K), (N, K, H c) -> (E, M, H c)."""
    return _EdgeMatmul.apply(a.contiguous(), x.contiguous(), *incidence)


def scatter_matmul(a: Tensor, g: Tensor, incidence: Incidence) -> Tensor:
    """Transposed matrices applied to the edges, summed per node: (E, H, M, K), (E, M, H c) -> (N, K, H c)."""
    return _ScatterMatmul.apply(a.contiguous(), g.contiguous(), *incidence)


def edge_outer(g: Tensor, x: Tensor, incidence: Incidence, heads: int) -> Tensor:
    """Edge times node, contracted over each head's channels: (E, M, H c), (N, K, H c) -> (E, H, M, K)."""
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


# Results without values: what tracing sees, and what the twins fill.


def _new_edge_matmul(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[2], x.shape[2])


def _new_scatter_matmul(a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, a.shape[3], g.shape[2])


def _new_edge_outer(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    return g.new_empty(g.shape[0], heads, g.shape[1], x.shape[1])


# Plain twins, for a CPU.


def _chunks(num_edges: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, num_edges, CHUNK))


def _wide(x: Tensor) -> Tensor:
    """The tensor in the dtype in which its products are summed."""
    return x.float() if x.itemsize < 4 else x


def _split(x: Tensor, heads: int) -> Tensor:
    """(E, K, H c) -> (E, H, K, c)."""
    return _wide(x).unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """(E, H, K, c) -> (E, K, H c)."""
    return x.transpose(1, 2).flatten(2)


def _edge_matmul(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    out = _new_edge_matmul(a, x, index)
    if available.cpp(x.shape[2] // a.shape[1], a):
        return cpp.edge_matmul(a, x, index, out)
    with torch.autocast("cpu", enabled=False):  # the caller has chosen the dtype
        for s in _chunks(len(a)):
            out[s] = _join(_wide(a[s]) @ _split(x.index_select(0, index[s]), a.shape[1]))
    return out


def _scatter_matmul(a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    out = _new_scatter_matmul(a, g, index, order, offsets)
    if available.cpp(g.shape[2] // a.shape[1], a):
        return cpp.scatter_matmul(a, g, order, offsets, out)
    out = torch.zeros_like(_wide(out))
    with torch.autocast("cpu", enabled=False):
        for s in _chunks(len(a)):
            columns, rows = _wide(a[s]).mT, _split(g[s], a.shape[1])
            products = columns * rows if a.shape[2] == 1 else columns @ rows  # one term: much faster so
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


# On a GPU: Triton where its tensor cores can, else the same formulas on all edges at once.


def _edge_matmul_cuda(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    if not available.triton(a):
        return _join(a @ _split(x[index], a.shape[1])).contiguous()
    from dpa4.ops.triton import (
        edge_products as kernels,  # here, since a machine without a GPU may have no Triton
    )

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
