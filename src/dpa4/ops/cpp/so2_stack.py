"""C++ kernels of the stages of `dpa4.ops.so2_stack` for CPUs; each takes a few edges through all layers at a time.

Every function writes the results of the stage of the same name to ``out``, a list of uninitialised tensors in the
order of the stage's results.
"""

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


def value(out: list[Tensor], x: Tensor, *shared: Any) -> None:
    *weights, _ = shared
    gated = len(weights[1])
    # out: y, the products of the gated layers and, if it is kept, the input of the last layer.
    _call("value", x, weights, [x, out[0], out[1 : gated + 1], _one(out[gated + 1 :])])


def vjp(out: list[Tensor], a: Tensor, us: list[Tensor], *shared: Any) -> None:
    *weights, _ = shared
    # out: the gradient of x, and those of the results of the gated layers if they are kept.
    _call("vjp", a, weights, [a, us, out[0], out[1:]])


def tangent(out: list[Tensor], d: Tensor, us: list[Tensor], *weights: Any) -> None:
    gated = len(us)
    # out: the change of y, those of the products, and that of the input of the last layer if there are gated layers.
    _call("tangent", d, weights, [d, us, out[0], out[1 : gated + 1], _one(out[gated + 1 :])])


def joint(out: list[Tensor], b: Tensor, *arguments: Any) -> None:
    lists, weights = arguments[:5], arguments[5:]  # xs, us, grads, ds, vs; then the weights
    matrices = len(weights[0])
    # out: the gradient of x and, if xs is not empty, those of matrices and gates.
    _call("joint", b, weights, [b, *lists, out[0], out[1 : matrices + 1], out[matrices + 1 :]])


def _one(tensors: list[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _call(
    stage: str, x: Tensor, weights: Sequence[Any], arguments: Sequence[Tensor | list[Tensor] | None]
) -> None:
    matrices, gates, _, lmax, mmax = weights
    focuses, edges, width = x.shape
    # C++ gets bare addresses, so copies and arrays of addresses must have names here that live until it returns.
    of_matrices, of_gates, *held = (_contiguous(a) for a in (matrices, gates, *arguments))
    sizes = (focuses, edges, len(gates) + 1, lmax, mmax, width // EdgeLayout(lmax, mmax).total)
    addresses = [pointers(of_matrices), pointers(of_gates)]
    stack = _Stack(*sizes, torch.get_num_threads(), *addresses)
    call("so2_stack.cpp", f"so2_{stage}", x.dtype, stack, held)


def _contiguous(a: Any) -> Any:
    if isinstance(a, list):
        return [t.contiguous() for t in a]
    return a if a is None else a.contiguous()
