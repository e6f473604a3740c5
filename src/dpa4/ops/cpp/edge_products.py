"""C++ kernels of `dpa4.ops.edge_products` for CPUs.

Arguments are those of the functions there; all tensors are contiguous. Each kernel writes to ``out`` and returns it.
"""

import ctypes

import torch
from torch import Tensor

from dpa4.ops.cpp.build import call
from dpa4.ops.operands import Operand


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("edges", "nodes", "heads", "rows", "coefficients", "channels", "threads")
    ]


def edge_matmul(a: Tensor, x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    shapes = _Shapes(a, x, len(x))
    matrices, nodes, edges = shapes.matrices("a", a), shapes.nodes("x", x), shapes.edges("out", out)
    call("edges.cpp", "edge_matmul", a.dtype, shapes.sizes(), [matrices, nodes, shapes.index(index), edges])
    return out


def scatter_matmul(a: Tensor, g: Tensor, order: Tensor | None, offsets: Tensor, out: Tensor) -> Tensor:
    shapes = _Shapes(a, g, len(out))
    matrices, edges, nodes = shapes.matrices("a", a), shapes.edges("g", g), shapes.nodes("out", out)
    ends = [None if order is None else shapes.index(order), shapes.offsets(offsets)]
    call("edges.cpp", "scatter_matmul", a.dtype, shapes.sizes(), [matrices, edges, *ends, nodes])
    return out


def edge_outer(g: Tensor, x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    shapes = _Shapes(out, x, len(x))
    edges, nodes, matrices = shapes.edges("g", g), shapes.nodes("x", x), shapes.matrices("out", out)
    call("edges.cpp", "edge_outer", g.dtype, shapes.sizes(), [edges, nodes, shapes.index(index), matrices])
    return out


class _Shapes:
    """Shapes of all operands, from matrices (E, H, M, K) and features of nodes or edges (..., H c)."""

    def __init__(self, matrices: Tensor, features: Tensor, num_nodes: int):
        self.of_matrices, self.dtype = matrices.shape, matrices.dtype
        self.num_edges, self.heads, self.rows, self.coefficients = self.of_matrices
        self.num_nodes, self.channels = num_nodes, features.shape[2] // self.heads
        self.width = self.channels * self.heads

    def sizes(self) -> _Sizes:
        inner = self.heads, self.rows, self.coefficients, self.channels
        return _Sizes(self.num_edges, self.num_nodes, *inner, torch.get_num_threads())

    def matrices(self, name: str, t: Tensor) -> Operand:
        return Operand(name, t, self.of_matrices, self.dtype)

    def edges(self, name: str, t: Tensor) -> Operand:
        return Operand(name, t, (self.num_edges, self.rows, self.width), self.dtype)

    def nodes(self, name: str, t: Tensor) -> Operand:
        return Operand(name, t, (self.num_nodes, self.coefficients, self.width), self.dtype)

    def index(self, t: Tensor) -> Operand:
        return Operand("the index of the edges", t, (self.num_edges,), torch.int64)

    def offsets(self, t: Tensor) -> Operand:
        return Operand("the offsets of the nodes", t, (self.num_nodes + 1,), torch.int64)
