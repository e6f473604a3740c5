"""C++ kernel of `dpa4.ops.sparse_product` for CPUs."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dpa4.ops.cpp.build import call
from dpa4.ops.operands import Operand


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("items", "a", "b", "result", "width", "terms", "threads")]


def sparse_product(a: Tensor, b: Tensor, indices: Sequence[Tensor], scale: Tensor, out: Tensor) -> Tensor:
    """Write the map of a and b to ``out``; all tensors are contiguous.

    Args:
        a: First factor, (n, A, c).
        b: Second factor, (n, B, c).
        indices: Rows of a, b and the result that each term combines, (T,) int32 each.
        scale: Coefficient of each term, (T,), in the dtype of the factors.
        out: Result, (n, G, c).
    """
    (items, of_a, width), of_b, of_result, terms = a.shape, b.shape[1], out.shape[1], len(scale)
    sizes = _Sizes(items, of_a, of_b, of_result, width, terms, torch.get_num_threads())
    arguments = [
        *(Operand("an index of the terms", index, (terms,), torch.int32) for index in indices),
        Operand("scale", scale, (terms,), a.dtype),
        Operand("a", a, (items, of_a, width), a.dtype),
        Operand("b", b, (items, of_b, width), a.dtype),
        Operand("out", out, (items, of_result, width), a.dtype),
    ]
    call("edges.cpp", "bilinear", a.dtype, sizes, arguments)
    return out
