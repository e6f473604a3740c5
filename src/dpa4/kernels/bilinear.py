r"""Bilinear maps of few terms, on a CPU: the three functions of one trilinear form.

.. math:: T(a, b, g) = \sum_n \sum_t s_t\, \langle a_{n, i_t}\, b_{n, j_t},\, g_{n, k_t} \rangle

with a (n, A, c), b (n, B, c) and g (n, G, c), entry by entry in the last axis. The map of a and b is the derivative
of T by g. Its own derivatives are those by a and b, so one operator with its indices exchanged serves to any order.

Elsewhere than on a CPU a compiler merges the plain formulas that such maps stand for, or products with matrices are
faster.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dpa4.kernels import cpp
from dpa4.kernels.wanted import wanted


class Terms(NamedTuple):
    """Which entries are multiplied."""

    indices: Tensor  # i, j and k of every term, (3, T) int32
    scale: Tensor  # s, (T,)

    @classmethod
    def of(cls, coefficients: Tensor) -> Self:
        """From a dense tensor (G, A, B) float64; entries below 1e-12 are zeros with rounding errors."""
        coefficients = torch.where(coefficients.abs() < 1e-12, 0, coefficients)
        result, first, second = coefficients.nonzero(as_tuple=True)
        return cls(torch.stack([first, second, result]).int(), coefficients[result, first, second])

    @classmethod
    def of_products(
        cls, formula: Callable[[Tensor, Sequence[Tensor]], Tensor], left: int, rights: Sequence[torch.Size]
    ) -> Self:
        """Those of a formula each entry of whose result is one product, found by applying it to numbered entries.

        Args:
            formula: A tensor (E, ...) of a (E, A) and several b (E, ...), in plain operations.
            left: A.
            rights: Shape of every b, without the axis of the edges.
        """
        sizes = [shape.numel() for shape in rights]

        def applied(a: Tensor, b: Tensor) -> Tensor:
            parts = [part.unflatten(1, shape) for part, shape in zip(b.split(sizes, 1), rights, strict=True)]
            return formula(a, parts).flatten()

        def numbers(n: int) -> Tensor:
            return torch.arange(1, n + 1, dtype=torch.float64)[None]

        ones = [torch.ones_like(numbers(n)) for n in (left, sum(sizes))]
        scale = applied(*ones)
        (place,) = scale.nonzero(as_tuple=True)
        scale = scale[place]
        found = [applied(numbers(left), ones[1]), applied(ones[0], numbers(sum(sizes)))]
        index = [(f[place] / scale - 1).round() for f in found]
        return cls(torch.stack([*index, place.double()]).int(), scale)


def takes(width: int, *tensors: Tensor) -> bool:
    """Whether there are kernels for tensors with so many entries in the last axis."""
    return (width == 1 or width % cpp.LANES == 0) and cpp.takes(*tensors)


def bilinear(a: Tensor, b: Tensor, terms: Terms, size: int) -> Tensor:
    """The map: (n, A, c), (n, B, c) -> (n, size, c), of tensors that `takes` allows."""
    return _Bilinear.apply(a, b, *terms, (0, 1, 2), size)


class _Bilinear(torch.autograd.Function):
    """``roles``: which indices of the terms are those of a, of b and of the result."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, index: Tensor, scale: Tensor, roles: tuple[int, int, int], size: int
    ) -> Tensor:
        ctx.save_for_backward(a, b, index, scale)
        ctx.roles = roles
        return torch.ops.dpa4.bilinear(a.contiguous(), b.contiguous(), index, scale, *roles, size)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (a, b, *terms), (first, second, result) = ctx.saved_tensors, ctx.roles
        of_a, of_b = wanted(ctx, 2)
        da = _Bilinear.apply(g, b, *terms, (result, second, first), a.shape[1]) if of_a else None
        db = _Bilinear.apply(a, g, *terms, (first, result, second), b.shape[1]) if of_b else None
        return da, db, None, None, None, None


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("items", "a", "b", "result", "width", "terms", "threads")]


def _bilinear(
    a: Tensor, b: Tensor, index: Tensor, scale: Tensor, first: int, second: int, result: int, size: int
) -> Tensor:
    out = _new(a, b, index, scale, first, second, result, size)
    scale = scale.to(a.dtype)
    if not takes(a.shape[2], a):  # traced where there were kernels, run where there are none
        products = a[:, index[first]] * b[:, index[second]] * scale[:, None]
        return out.zero_().index_add_(1, index[result], products)
    sizes = _Sizes(*a.shape[:2], b.shape[1], size, a.shape[2], len(scale), torch.get_num_threads())
    roles = (index[role] for role in (first, second, result))
    cpp.call("edges.cpp", "bilinear", a.dtype, sizes, [*roles, scale, a, b, out])
    return out


def _new(
    a: Tensor, b: Tensor, index: Tensor, scale: Tensor, first: int, second: int, result: int, size: int
) -> Tensor:
    return a.new_empty(a.shape[0], size, a.shape[2])


_library = torch.library.Library("dpa4", "FRAGMENT")
_name = _library.define(
    "bilinear(Tensor a, Tensor b, Tensor index, Tensor scale, int first, int second, int result, SymInt size) "
    "-> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.impl(_name, _bilinear, "CPU")
torch.library.register_fake(f"dpa4::{_name}", _new, lib=_library)
