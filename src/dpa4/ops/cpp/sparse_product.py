"""C++ kernel of `dpa4.ops.sparse_product` for CPUs."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dpa4.ops.cpp.build import call


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
    sizes = _Sizes(*a.shape[:2], b.shape[1], out.shape[1], a.shape[2], len(scale), torch.get_num_threads())
    call("edges.cpp", "bilinear", a.dtype, sizes, [*indices, scale, a, b, out])
    return out
