"""C++ kernels of the stages of `dpa4.ops.so2_stack` for CPUs; each takes a few edges through all layers at a time.

Every function writes the results of the stage of the same name to ``out``, a list of uninitialised tensors in the
order of the stage's results.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpa4.ops.cpp.build import Argument, call, pointer
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.operands import Operand, check_count


class _Stack(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("focuses", "edges", "layers", "lmax", "mmax", "channels", "separate", "threads")
        ),
        ("matrices", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
    ]


def value(out: list[Tensor], x: Tensor, *shared: Any) -> None:
    *weights, _ = shared
    stack = _StackCall("so2_value", x, weights)
    gated = stack.gated
    # out: y, the products of the gated layers and, if it is kept, the input of the last layer.
    y, us, kept = out[0], out[1 : gated + 1], out[gated + 1 :]
    stack.run(
        stack.read("x", [x], 1)[0],
        stack.written("y", [y], 1)[0],
        stack.written("the products", us, gated),
        _first(stack.written("the input of the last layer", kept, 0, 1)),
    )


def vjp(out: list[Tensor], a: Tensor, us: list[Tensor], *shared: Any) -> None:
    *weights, _ = shared
    stack = _StackCall("so2_vjp", a, weights)
    # out: the gradient of x, and those of the results of the gated layers if they are kept.
    stack.run(
        stack.read("a", [a], 1)[0],
        stack.read("us", us, stack.gated),
        stack.written("the gradient of x", out[:1], 1)[0],
        stack.written("the gradients of the layers", out[1:], 0, stack.gated),
    )


def tangent(out: list[Tensor], d: Tensor, us: list[Tensor], *weights: Any) -> None:
    stack = _StackCall("so2_tangent", d, weights)
    gated = stack.gated
    # out: the change of y, those of the products, and that of the input of the last layer if there are gated layers.
    stack.run(
        stack.read("d", [d], 1)[0],
        stack.read("us", us, gated),
        stack.written("the change of y", out[:1], 1)[0],
        stack.written("the changes of the products", out[1 : gated + 1], gated),
        _first(stack.written("the change of the last input", out[gated + 1 :], int(gated > 0))),
    )


def joint(out: list[Tensor], b: Tensor, *arguments: Any) -> None:
    (xs, us, grads, ds, vs), weights = arguments[:5], arguments[5:]
    stack = _StackCall("so2_joint", b, weights)
    gated, ends = stack.gated, 1 + (stack.gated > 0)  # ends: the first and the last layer
    # out: the gradient of x and, if xs is not empty, those of matrices and gates.
    of_matrices, of_gates = out[1 : 1 + len(weights[0])], out[1 + len(weights[0]) :]
    stack.run(
        stack.read("b", [b], 1)[0],
        stack.read("xs", xs, 0, ends),
        stack.read("us", us, gated),
        stack.read("grads", grads, *((gated + 1,) if ds else (0,))),
        stack.read("ds", ds, 0, ends),
        stack.read("vs", vs, *((gated,) if ds else (0,))),
        stack.written("the gradient of x", out[:1], 1)[0],
        *(stack.weights(of_matrices, of_gates) if xs else (None, None)),
    )


def _first(operands: list[Operand]) -> Operand | None:
    return operands[0] if operands else None


class _StackCall:
    """Call of a stage on features x (F, E, W); describes the operands.

    Attributes:
        gated: Number of gated layers, all but the last.
        separate: Whether the matrices of orders above zero act on the rows of -m and of +m separately.
    """

    def __init__(self, stage: str, x: Tensor, weights: Sequence[Any]):
        matrices, gates, _, lmax, mmax = weights
        self.stage, self.dtype = stage, x.dtype
        self.gated, self.layout = len(gates), EdgeLayout(lmax, mmax)
        self.channels = x.shape[2] // self.layout.total
        self.shape = *x.shape[:2], self.channels * self.layout.total
        first = [w.shape[-1] for w in matrices[1:2] if mmax > 0]
        self.separate = [self.layout.copies(1, width, self.channels) for width in first if width] == [2]
        self.operands = self.weights([w.contiguous() for w in matrices], [w.contiguous() for w in gates])

    def run(self, *arguments: Argument) -> None:
        """Call the stage with its arguments after the weights."""
        focuses, edges, _ = self.shape
        sizes = focuses, edges, self.gated + 1, *self.layout, self.channels, self.separate
        stack = _Stack(
            *sizes, torch.get_num_threads(), *(pointer(self.stage, operands) for operands in self.operands)
        )
        call("so2_stack.cpp", self.stage, self.dtype, stack, arguments)

    def read(self, name: str, tensors: Sequence[Tensor], *counts: int) -> list[Operand]:
        """Edge features that the stage reads; their number must be one of ``counts``."""
        return self.written(name, [t.contiguous() for t in tensors], *counts)

    def written(self, name: str, tensors: Sequence[Tensor], *counts: int) -> list[Operand]:
        """Edge features that the stage writes; their number must be one of ``counts``."""
        check_count(self.stage, name, tensors, counts)
        return [Operand(name, t, self.shape, self.dtype) for t in tensors]

    def weights(
        self, matrices: Sequence[Tensor], gates: Sequence[Tensor]
    ) -> tuple[list[Operand], list[Operand]]:
        """Matrices of all layers and gates, or their gradients."""
        f, c, lmax = self.shape[0], self.channels, self.layout.lmax
        first, *others = (count * c for _, count in self.layout.orders())
        widths = [first, *(n // 2 if self.separate else n for n in others)] * (self.gated + 1)
        check_count(self.stage, "the matrices", matrices, [len(widths)])
        check_count(self.stage, "the gates", gates, [self.gated])
        return (
            [Operand("a matrix", w, (f, n, n), self.dtype) for w, n in zip(matrices, widths, strict=True)],
            [Operand("a gate", w, (f, c, lmax * c), self.dtype) for w in gates],
        )
