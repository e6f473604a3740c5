"""C++ kernels of `dpa4.ops.edge_products` for CPUs.

Arguments are those of the functions there; all tensors are contiguous. Each kernel writes to ``out`` and returns it.
"""

import ctypes

import torch
from torch import Tensor

from dpa4.ops.cpp.build import call


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("edges", "nodes", "heads", "rows", "coefficients", "channels", "threads")
    ]


def edge_matmul(a: Tensor, x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    _call("edge_matmul", _sizes(a, x, len(x)), a, x, index, out)
    return out


def scatter_matmul(a: Tensor, g: Tensor, order: Tensor | None, offsets: Tensor, out: Tensor) -> Tensor:
    _call("scatter_matmul", _sizes(a, g, len(out)), a, g, order, offsets, out)
    return out


def edge_outer(g: Tensor, x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    _call("edge_outer", _sizes(out, x, len(x)), g, x, index, out)
    return out


def _sizes(a: Tensor, features: Tensor, nodes: int) -> _Sizes:
    edges, heads, rows, coefficients = a.shape
    return _Sizes(
        edges, nodes, heads, rows, coefficients, features.shape[2] // heads, torch.get_num_threads()
    )


def _call(name: str, sizes: _Sizes, first: Tensor, *others: Tensor | None) -> None:
    call("edges.cpp", name, first.dtype, sizes, (first, *others))
