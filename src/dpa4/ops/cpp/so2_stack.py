"""C++ kernels of the stages of `dpa4.ops.so2_stack` for a CPU: all layers of a few edges at a time."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpa4.ops.cpp.build import call, pointers
from dpa4.ops.layout import EdgeLayout


class _Stack(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("focuses", "edges", "layers", "lmax", "mmax", "channels", "threads")
        ),
        ("matrices", ctypes.c_void_p),
        ("gates", ctypes.c_void_p),
    ]


# Each fills the results of the stage of the same name, see `dpa4.ops.so2_stack`.


def value(out: list[Tensor], x: Tensor, *shared: Any) -> None:
    """``out``: y, us and, where it is kept, the input of the last layer."""
    *weights, _ = shared
    gated = len(weights[1])
    _call("value", x, weights, [x, out[0], out[1 : gated + 1], _one(out[gated + 1 :])])


def vjp(out: list[Tensor], a: Tensor, us: list[Tensor], *shared: Any) -> None:
    """``out``: gradient of x, and those kept."""
    *weights, _ = shared
    _call("vjp", a, weights, [a, us, out[0], out[1:]])


def tangent(out: list[Tensor], d: Tensor, us: list[Tensor], *weights: Any) -> None:
    """``out``: change of y, vs and the change of the input of the last layer."""
    gated = len(us)
    _call("tangent", d, weights, [d, us, out[0], out[1 : gated + 1], _one(out[gated + 1 :])])


def joint(out: list[Tensor], b: Tensor, *arguments: Any) -> None:
    """``out``: gradients of x and, where xs are given, of matrices and gates."""
    lists, weights = arguments[:5], arguments[5:]
    matrices = len(weights[0])
    _call("joint", b, weights, [b, *lists, out[0], out[1 : matrices + 1], out[matrices + 1 :]])


def _one(tensors: list[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _call(
    stage: str, x: Tensor, weights: Sequence[Any], arguments: Sequence[Tensor | list[Tensor] | None]
) -> None:
    matrices, gates, _, lmax, mmax = weights
    focuses, edges, width = x.shape
    # What is named here lives until the program returns, copies and lists of addresses, too.
    of_matrices, of_gates, *held = (_contiguous(a) for a in (matrices, gates, *arguments))
    sizes = (focuses, edges, len(gates) + 1, lmax, mmax, width // EdgeLayout(lmax, mmax).total)
    addresses = [pointers(of_matrices), pointers(of_gates)]
    stack = _Stack(*sizes, torch.get_num_threads(), *addresses)
    call("so2_stack.cpp", f"so2_{stage}", x.dtype, stack, held)


def _contiguous(a: Any) -> Any:
    if isinstance(a, list):
        return [t.contiguous() for t in a]
    return a if a is None else a.contiguous()
