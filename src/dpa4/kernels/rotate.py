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

from dpa4.kernels import segments
from dpa4.kernels.incidence import Incidence

CHUNK = 1024
"""Edges whose nodes are copied at a time on a CPU: the copies stay in its cache."""


def edge_matmul(a: Tensor, x: Tensor, incidence: Incidence) -> Tensor:
    """Each edge's matrix applied to its node: (E, H, M, K), (N, K, H c) -> (E, M, H c)."""
    return _EdgeMatmul.apply(a, x, *incidence)


def scatter_matmul(a: Tensor, g: Tensor, incidence: Incidence) -> Tensor:
    """Transposed matrices applied to the edges, summed per node: (E, H, M, K), (E, M, H c) -> (N, K, H c)."""
    return _ScatterMatmul.apply(a, g, *incidence)


def edge_outer(g: Tensor, x: Tensor, incidence: Incidence, heads: int) -> Tensor:
    """Edge times node, contracted over each head's channels: (E, M, H c), (N, K, H c) -> (E, H, M, K)."""
    return _EdgeOuter.apply(g, x, *incidence, heads)


class _EdgeMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
    ) -> Tensor:
        # Contiguous here rather than in the kernel: a compiler then writes the operands that way at once.
        a, x = a.contiguous(), x.contiguous()
        ctx.save_for_backward(a, x, index, order, offsets)
        return torch.ops.dpa4.edge_matmul(a, x, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, x, *incidence = ctx.saved_tensors
        da = _EdgeOuter.apply(g, x, *incidence, a.shape[1]) if ctx.needs_input_grad[0] else None
        dx = _ScatterMatmul.apply(a, g, *incidence) if ctx.needs_input_grad[1] else None
        return da, dx, None, None, None


class _ScatterMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
    ) -> Tensor:
        a, g = a.contiguous(), g.contiguous()
        ctx.save_for_backward(a, g, index, order, offsets)
        return torch.ops.dpa4.scatter_matmul(a, g, index, order, offsets)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        a, g, *incidence = ctx.saved_tensors
        da = _EdgeOuter.apply(g, x, *incidence, a.shape[1]) if ctx.needs_input_grad[0] else None
        dg = _EdgeMatmul.apply(a, x, *incidence) if ctx.needs_input_grad[1] else None
        return da, dg, None, None, None


class _EdgeOuter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor, heads: int
    ) -> Tensor:
        g, x = g.contiguous(), x.contiguous()
        ctx.save_for_backward(g, x, index, order, offsets)
        return torch.ops.dpa4.edge_outer(g, x, index, heads)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        g, x, *incidence = ctx.saved_tensors
        dg = _EdgeMatmul.apply(a, x, *incidence) if ctx.needs_input_grad[0] else None
        dx = _ScatterMatmul.apply(a, g, *incidence) if ctx.needs_input_grad[1] else None
        return dg, dx, None, None, None, None


# Plain twins.


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
    out = _fake_edge_matmul(a, x, index)
    with torch.autocast(a.device.type, enabled=False):
        for s in _chunks(len(a)):
            out[s] = _join(_wide(a[s]) @ _split(x[index[s]], a.shape[1]))
    return out


def _scatter_matmul(a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor) -> Tensor:
    out = torch.zeros_like(_wide(_fake_scatter_matmul(a, g, index, order, offsets)))
    with torch.autocast(a.device.type, enabled=False):
        for s in _chunks(len(a)):
            out.index_add_(0, index[s], _join(_wide(a[s]).mT @ _split(g[s], a.shape[1])))
    return out.to(a.dtype)


def _edge_outer(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    out = _fake_edge_outer(g, x, index, heads)
    with torch.autocast(g.device.type, enabled=False):
        for s in _chunks(len(g)):
            out[s] = _split(g[s], heads) @ _split(x[index[s]], heads).mT
    return out


# On a GPU: kernels where they exist, else the same formulas on all edges at once.


def supported(x: Tensor) -> bool:
    """Whether there are GPU kernels for a tensor's dtype."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _edge_matmul_cuda(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    if not supported(a):
        return _join(a @ _split(x[index], a.shape[1])).contiguous()
    from dpa4.kernels import triton_rotate  # a machine without a GPU may have no Triton

    return triton_rotate.edge_matmul(a, x, index)


def _scatter_matmul_cuda(
    a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    if not supported(a):
        return segments._cuda(_join(a.mT @ _split(g, a.shape[1])), index, order, offsets)
    from dpa4.kernels import triton_rotate

    return triton_rotate.scatter_matmul(a, g, order, offsets)


def _edge_outer_cuda(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    if not supported(g):
        return _split(g, heads) @ _split(x[index], heads).mT
    from dpa4.kernels import triton_rotate

    return triton_rotate.edge_outer(g, x, index, heads)


# Shapes.


def _fake_edge_matmul(a: Tensor, x: Tensor, index: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[2], x.shape[2])


def _fake_scatter_matmul(
    a: Tensor, g: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, a.shape[3], g.shape[2])


def _fake_edge_outer(g: Tensor, x: Tensor, index: Tensor, heads: int) -> Tensor:
    return g.new_empty(g.shape[0], heads, g.shape[1], x.shape[1])


_library = torch.library.Library("dpa4", "FRAGMENT")
for _schema, _cpu, _cuda, _fake in (
    ("edge_matmul(Tensor a, Tensor x, Tensor index) -> Tensor", _edge_matmul, _edge_matmul_cuda, _fake_edge_matmul),
    (
        "scatter_matmul(Tensor a, Tensor g, Tensor index, Tensor? order, Tensor offsets) -> Tensor",
        _scatter_matmul,
        _scatter_matmul_cuda,
        _fake_scatter_matmul,
    ),
    (
        "edge_outer(Tensor g, Tensor x, Tensor index, int heads) -> Tensor",
        _edge_outer,
        _edge_outer_cuda,
        _fake_edge_outer,
    ),
):  # fmt: skip
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"dpa4::{_name}", _fake, lib=_library)
