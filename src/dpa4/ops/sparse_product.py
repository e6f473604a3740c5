r"""Sparse bilinear maps: products given by a list of terms, with derivatives of any order.

.. math:: T(a, b, g) = \sum_n \sum_t s_t\, \langle a_{n, i_t}\, b_{n, j_t},\, g_{n, k_t} \rangle

with a (n, A, c), b (n, B, c) and g (n, G, c), multiplied entry by entry along the last axis. The map of a and b is
the derivative of this trilinear form T with respect to g. The derivatives of the map are the derivatives of T with
respect to a and b: the same operator with permuted indices. One operator therefore serves all orders of
differentiation.

The operator exists for CPUs only. On a GPU a compiler fuses the plain formulas of such maps, or dense matrix products
are faster.
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
    """Terms of a sparse bilinear map: the entries that are multiplied, and their coefficients."""

    indices: Tensor  # i, j and k of every term: rows of a, b and the result, (3, T) int32
    scale: Tensor  # coefficient s of every term, (T,)

    @classmethod
    def of(cls, coefficients: Tensor) -> Self:
        """Build from a dense tensor (G, A, B) float64; entries below 1e-12 are rounding errors and dropped."""
        coefficients = torch.where(coefficients.abs() < 1e-12, 0, coefficients)
        result, first, second = coefficients.nonzero(as_tuple=True)
        return cls(torch.stack([first, second, result]).int(), coefficients[result, first, second])

    @classmethod
    def of_products(
        cls, formula: Callable[[Tensor, Sequence[Tensor]], Tensor], left: int, rights: Sequence[torch.Size]
    ) -> Self:
        """Build from a formula in which each entry of the result is a single product of an entry of a and one of b.

        The formula is applied to tensors whose entries are numbered 1, 2, ...: dividing the result by the coefficient
        gives the number of the entry that was multiplied.

        Args:
            formula: Function in plain operations that maps a, (E, A), and several b, (E, ...), to a tensor (E, ...).
            left: Number of entries A.
            rights: Shape of each b, without the axis of the edges.
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


def sparse_product(a: Tensor, b: Tensor, terms: Terms, size: int) -> Tensor:
    """Evaluate the map by its terms, on a CPU with or without the kernel: (n, A, c), (n, B, c) -> (n, size, c)."""
    return _Bilinear.apply(a, b, *terms, (0, 1, 2), size)


def sparse_or_dense(
    sparse: Callable[[], Tensor], dense: Callable[[], Tensor], width: int, *factors: Tensor
) -> Tensor:
    """Return ``sparse()`` if there is a kernel for sparse products of the factors, and ``dense()`` otherwise.

    Networks describe both forms of a product and leave the choice to this function. Both compute the same result.

    Args:
        sparse: Function that calls `sparse_product`.
        dense: Function in plain operations.
        width: Length of the last axis of the factors in the sparse form.
        *factors: Tensors whose device and dtype must be supported.
    """
    return sparse() if available.cpp_sparse_product(width, *factors) else dense()


class _Bilinear(torch.autograd.Function):
    """The map; ``roles`` are the rows of the indices that belong to a, to b and to the result."""

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
    # Code may be traced where the kernel is available, and run where it is not.
    if not available.cpp_sparse_product(a.shape[2], a):
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
