r"""Products of the features of both nodes of every edge: two functions of one trilinear form.

.. math:: T(x, y, g) = \sum_e \sum_h g_{eh} \, \langle x_{m(e),h},\; y_{n(e),h} \rangle

with node tensors x (M, H c) and y (N, H c), numbers g (E, H) on edges, and m(e) and n(e) the nodes of edge e in two
`Incidence`; head h owns the h-th run of c channels. The derivative of T by g is `pair_dot`, those by x and y are
`pair_sum`, so the derivatives of each are the two, to any order. On a CPU a kernel computes them without tensors of
channels on edges; a compiler merges the plain formula.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from dpa4.kernels import cpp
from dpa4.kernels.incidence import Incidence
from dpa4.kernels.segments import gather
from dpa4.kernels.wanted import wanted


def pair_dot(x: Tensor, y: Tensor, x_end: Incidence, y_end: Incidence, heads: int) -> Tensor:
    """Products of both nodes of every edge, summed over each head's channels: (M, H c), (N, H c) -> (E, H)."""
    if _takes(heads, x, y):
        return _PairDot.apply(x.contiguous(), y.contiguous(), *x_end, *y_end, heads)
    return _by_head(gather(x, x_end) * gather(y, y_end), heads).sum(-1)


def pair_sum(g: Tensor, y: Tensor, x_end: Incidence, y_end: Incidence) -> Tensor:
    """Sum of g times one node over the edges of the other: (E, H), (N, H c) -> (M, H c); where there is a kernel."""
    return _PairSum.apply(g.contiguous(), y.contiguous(), *x_end, *y_end)


class _PairDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *others: Any) -> Tensor:
        *ends, heads = others
        ctx.save_for_backward(x, y, *ends)
        return torch.ops.dpa4.pair_dot(x, y, ends[0], ends[3], heads)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *ends = ctx.saved_tensors
        x_end, y_end = Incidence(*ends[:3]), Incidence(*ends[3:])
        of_x, of_y = wanted(ctx, 2)
        dx = pair_sum(g, y, x_end, y_end) if of_x else None
        dy = pair_sum(g, x, y_end, x_end) if of_y else None
        return dx, dy, *[None] * 7


class _PairSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, *ends: Any) -> Tensor:
        ctx.save_for_backward(g, y, *ends)
        return torch.ops.dpa4.pair_sum(g, y, ends[3], *ends[:3])

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        g, y, *ends = ctx.saved_tensors
        x_end, y_end = Incidence(*ends[:3]), Incidence(*ends[3:])
        of_g, of_y = wanted(ctx, 2)
        dg = pair_dot(x, y, x_end, y_end, g.shape[1]) if of_g else None
        dy = pair_sum(g, x, y_end, x_end) if of_y else None
        return dg, dy, *[None] * 6


def _takes(heads: int, *tensors: Tensor) -> bool:
    return tensors[0].shape[1] // heads % cpp.LANES == 0 and cpp.takes(*tensors)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(..., H c) -> (..., H, c)."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads))


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("edges", "nodes", "heads", "channels", "threads")]


# The operators, and what tracing sees of them. Traced where there are kernels, they may run where there are none.


def _pair_dot(x: Tensor, y: Tensor, x_index: Tensor, y_index: Tensor, heads: int) -> Tensor:
    if not _takes(heads, x, y):
        return _by_head(x.index_select(0, x_index) * y.index_select(0, y_index), heads).sum(-1)
    out = _new_pair_dot(x, y, x_index, y_index, heads)
    sizes = _Sizes(len(out), 0, heads, x.shape[1] // heads, torch.get_num_threads())
    cpp.call("edges.cpp", "pair_dot", x.dtype, sizes, [x, y, x_index, y_index, out])
    return out


def _pair_sum(
    g: Tensor, y: Tensor, y_index: Tensor, x_index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    out, heads = _new_pair_sum(g, y, y_index, x_index, order, offsets), g.shape[1]
    if not _takes(heads, y, g):
        parts = _by_head(y.index_select(0, y_index), heads) * g[..., None]
        return out.zero_().index_add_(0, x_index, parts.flatten(1))
    sizes = _Sizes(len(g), len(out), heads, y.shape[1] // heads, torch.get_num_threads())
    cpp.call("edges.cpp", "pair_sum", y.dtype, sizes, [g, y, y_index, order, offsets, out])
    return out


def _new_pair_dot(x: Tensor, y: Tensor, x_index: Tensor, y_index: Tensor, heads: int) -> Tensor:
    return x.new_empty(x_index.shape[0], heads)


def _new_pair_sum(
    g: Tensor, y: Tensor, y_index: Tensor, x_index: Tensor, order: Tensor | None, offsets: Tensor
) -> Tensor:
    return y.new_empty(offsets.shape[0] - 1, y.shape[1])


_library = torch.library.Library("dpa4", "FRAGMENT")
for _schema, _kernel, _new in (
    ("pair_dot(Tensor x, Tensor y, Tensor x_index, Tensor y_index, int heads) -> Tensor", _pair_dot, _new_pair_dot),
    ("pair_sum(Tensor g, Tensor y, Tensor y_index, Tensor x_index, Tensor? order, Tensor offsets) -> Tensor",
     _pair_sum, _new_pair_sum),
):  # fmt: skip
    _name = _library.define(_schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"dpa4::{_name}", _new, lib=_library)
