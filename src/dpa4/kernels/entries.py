r"""Tensors on edges of which every entry is a product of two numbers of the edge and a constant, on a CPU.

.. math:: T(a, b, g) = \sum_e \sum_t s_t\, a_{e, i_t}\, b_{e, j_t}\, g_{e, k_t}

The tensor is the derivative of T by g. Its own derivatives are those by a and b, so one operator with its three lists
of indices exchanged serves to any order.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpa4.kernels import cpp

Formula = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""A tensor (E, ...) of a (E, A) and b, several tensors (E, ...)."""


class Terms(NamedTuple):
    """Which entries are products of what."""

    left: list[int]  # i_t
    right: list[int]  # j_t, among the entries of all b
    place: list[int]  # k_t
    scale: list[float]  # s_t

    @classmethod
    def of(cls, formula: Formula, left: int, rights: Sequence[torch.Size]) -> "Terms":
        """Those of a formula in plain operations, found by applying it to numbered entries.

        Args:
            formula: See above.
            left: A.
            rights: Shape of every b, without the axis of the edges.
        """
        sizes = [shape.numel() for shape in rights]

        def applied(a: Tensor, b: Tensor) -> Tensor:
            parts = [part.unflatten(1, shape) for part, shape in zip(b.split(sizes, 1), rights, strict=True)]
            return formula(a, parts).flatten()

        def ones(n: int) -> Tensor:
            return torch.ones(1, n, dtype=torch.float64)

        def numbers(n: int) -> Tensor:
            return torch.arange(1, n + 1, dtype=torch.float64)[None]

        scale = applied(ones(left), ones(sum(sizes)))
        (place,) = scale.nonzero(as_tuple=True)
        scale = scale[place]
        of_left = applied(numbers(left), ones(sum(sizes)))[place] / scale - 1
        of_right = applied(ones(left), numbers(sum(sizes)))[place] / scale - 1
        return cls(
            of_left.round().int().tolist(), of_right.round().int().tolist(), place.tolist(), scale.tolist()
        )


def entries(formula: Formula, terms: Terms, a: Tensor, b: Sequence[Tensor]) -> Tensor:
    """The formula's result: by a kernel on a CPU that has them; elsewhere a compiler merges plain operations."""
    if not cpp.takes(a, *b):
        return formula(a, b)
    shape = formula(a[:0], [t[:0] for t in b]).shape[1:]
    joined = torch.cat([t.flatten(1) for t in b], dim=1)
    return _Entries.apply(a, joined, *terms, shape.numel()).unflatten(1, shape)


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        left: list[int],
        right: list[int],
        place: list[int],
        scale: list[float],
        size: int,
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.terms = left, right, place, scale
        return torch.ops.dpa4.entries(a.contiguous(), b.contiguous(), left, right, place, scale, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (left, right, place, scale) = ctx.saved_tensors, ctx.terms
        wanted = ctx.needs_input_grad
        da = _Entries.apply(g, b, place, right, left, scale, a.shape[1]) if wanted[0] else None
        db = _Entries.apply(a, g, left, place, right, scale, b.shape[1]) if wanted[1] else None
        return da, db, None, None, None, None, None


def _entries(
    a: Tensor, b: Tensor, left: list[int], right: list[int], place: list[int], scale: list[float], size: int
) -> Tensor:
    out = _new(a, b, left, right, place, scale, size)
    widths = (ctypes.c_int64 * 6)(len(a), a.shape[1], b.shape[1], size, len(left), torch.get_num_threads())
    arrays = _indices(tuple(left)), _indices(tuple(right)), _indices(tuple(place)), _numbers(tuple(scale))
    call = cpp.function("rotate.cpp", "entries", a.dtype)
    call(widths, *arrays, *(cpp.pointer(t) for t in (a, b, out)))
    return out


@lru_cache(maxsize=256)
def _indices(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def _new(a: Tensor, b: Tensor, left: Any, right: Any, place: Any, scale: Any, size: int) -> Tensor:
    return a.new_empty(a.shape[0], size)


_library = torch.library.Library("dpa4", "FRAGMENT")
_name = _library.define(
    "entries(Tensor a, Tensor b, int[] left, int[] right, int[] place, float[] scale, SymInt size) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.impl(_name, _entries, "CPU")
torch.library.register_fake(f"dpa4::{_name}", _new, lib=_library)
