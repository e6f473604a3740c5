r"""Bilinear maps of few terms, on a CPU: the three functions of one trilinear form.

.. math:: T(a, b, g) = \sum_n \sum_t s_t\, \langle a_{n, i_t}\, b_{n, j_t},\, g_{n, k_t} \rangle

with a (n, A, c), b (n, B, c) and g (n, G, c), entry by entry in the last axis. The map of a and b is the derivative
of T by g. Its own derivatives are those by a and b, so one operator with its indices exchanged serves to any order.

Elsewhere than on a CPU a compiler merges the plain formulas that such maps stand for, or products with matrices are
faster.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dpa4.ops import available
from dpa4.ops.cpp import sparse_product as cpp
from dpa4.ops.registration import register
from dpa4.ops.second_order import needs_gradient


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


def sparse_product(
    a: Tensor, b: Tensor, terms: Terms, size: int, dense: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Evaluate the map: (n, A, c), (n, B, c) -> (n, size, c).

    Args:
        a: First factor.
        b: Second factor.
        terms: Non-zero coefficients of the map.
        size: Rows of the result.
        dense: The same map in plain operations, for tensors without a kernel: on a GPU a compiler fuses them, or
            products with matrices are faster.
    """
    return either(lambda: apply_terms(a, b, terms, size), lambda: dense(a, b), a.shape[-1], a, b)


def either(sparse: Callable[[], Tensor], dense: Callable[[], Tensor], width: int, *factors: Tensor) -> Tensor:
    """Return ``sparse()`` if there is a kernel for sparse products of the factors, and ``dense()`` otherwise.

    Both compute the same. Use it where the dense form differs in more than the product, else `sparse_product`.

    Args:
        sparse: Form that calls `sparse_product` or `apply_terms`.
        dense: Form in plain operations.
        width: Length of the last axis of the factors of the sparse form.
        *factors: Tensors whose device and dtype decide.
    """
    return sparse() if available.cpp_sparse_product(width, *factors) else dense()


def apply_terms(a: Tensor, b: Tensor, terms: Terms, size: int) -> Tensor:
    """Evaluate the map by its terms on any device: (n, A, c), (n, B, c) -> (n, size, c)."""
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
        of_a, of_b = needs_gradient(ctx, 2)
        da = _Bilinear.apply(g, b, *terms, (result, second, first), a.shape[1]) if of_a else None
        db = _Bilinear.apply(a, g, *terms, (first, result, second), b.shape[1]) if of_b else None
        return da, db, None, None, None, None


def _bilinear(
    a: Tensor, b: Tensor, index: Tensor, scale: Tensor, first: int, second: int, result: int, size: int
) -> Tensor:
    out = _new(a, b, index, scale, first, second, result, size)
    scale = scale.to(a.dtype)
    if not available.cpp_sparse_product(
        a.shape[2], a
    ):  # traced where there were kernels, run where there are none
        products = a[:, index[first]] * b[:, index[second]] * scale[:, None]
        return out.zero_().index_add_(1, index[result], products)
    return cpp.sparse_product(a, b, [index[role] for role in (first, second, result)], scale, out)


def _new(
    a: Tensor, b: Tensor, index: Tensor, scale: Tensor, first: int, second: int, result: int, size: int
) -> Tensor:
    return a.new_empty(a.shape[0], size, a.shape[2])


register(
    "bilinear(Tensor a, Tensor b, Tensor index, Tensor scale, int first, int second, int result, SymInt size) "
    "-> Tensor",
    _new,
    {"CPU": _bilinear},
)
