"""Matrix product of float32 accuracy that uses tensor cores where there are any.

float32 units of a GPU are several times slower than its tensor cores, which multiply shorter numbers. On CUDA the
operands are split into sums of short numbers on chip, so that the result is as accurate as float32 (see
`dpa4.kernels.triton_matmul`). Elsewhere it is the ordinary product.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpa4.kernels.hopper import on_hopper

_library = torch.library.Library("dpa4", "FRAGMENT")
_library.define("precise_matmul(Tensor x, Tensor w) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def precise_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x @ w, differentiable any number of times; dL/dx is again such a product, dL/dw an ordinary one.

    In float32 the error is below 1e-6 sum_k |x_k w_k| plus 1e-11 K max|x| max|w| over the row of x and the column of
    w, on every device, for magnitudes between 1e-30 and 1e30. Other types, and mixed precision by autocast, get the
    ordinary product.

    Args:
        x: (E, K) or (F, E, K), with any strides; fastest where the last axis is contiguous.
        w: (K, N) or (F, K, N), with as many axes as x.

    Returns:
        (E, N) or (F, E, N).

    Raises:
        ValueError: If the shapes do not fit.
    """
    if (
        x.dim() != w.dim()
        or x.dim() not in (2, 3)
        or x.shape[:-2] != w.shape[:-2]
        or x.shape[-1] != w.shape[-2]
    ):
        raise ValueError(
            f"x and w must be (E, K) and (K, N) or (F, E, K) and (F, K, N), "
            f"got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    if x.dtype != torch.float32 or w.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return x @ w
    product: Tensor = _PreciseMatmul.apply(x, w)
    return product


class Pieces(NamedTuple):
    """A matrix of weights (F, K, N) in pieces, see `dpa4.kernels.triton_matmul`."""

    halves: Tensor  # high and low, (2, F, N, K) float16
    scale: Tensor  # powers of two that go with their products, (F, N)
    named: bool  # for the kernels in Gluon: rows and columns of the pieces are ordered as there


class Weight(NamedTuple):
    """A matrix of weights as products take it, made by `ready`."""

    matrix: Tensor  # (F, K, N), with any strides
    residual: bool = False  # x is added to the product with x
    pieces: Pieces | None = None  # where the product is one of pieces; a residual is part of them


def ready(
    x: Tensor, weights: Sequence[Weight], gates: Sequence[Tensor] = ()
) -> tuple[list[Weight], list[Weight]]:
    """Weights as products with features of the kind of x take them.

    Args:
        x: (F, E, W), with any strides.
        weights: For `order_matmul`.
        gates: For `dpa4.kernels.gate`, (F, C, lmax C).
    """
    of_gates = [Weight(g) for g in gates]
    if not _is_split(x):
        if x.dtype in (torch.float32, torch.float64):  # shorter numbers would lose too much of a sum with 1
            weights = [Weight(_plus_one(w.matrix)) if w.residual else w for w in weights]
        return list(weights), of_gates
    from dpa4.kernels import triton_matmul  # triton is needed on CUDA only

    with torch.cuda.device(x.device):  # Triton launches on the current device
        hopper = on_hopper(x.device)
        if hopper:
            from dpa4.kernels import gluon_gate, gluon_matmul

            split_gates = [gluon_gate.takes(g) for g in gates]
            named = [gluon_matmul.fits(x, w.matrix) for w in weights]
        else:
            split_gates, named = [False] * len(gates), [False] * len(weights)
        whole = [triton_matmul.Whole(w.matrix, n, w.residual) for w, n in zip(weights, named, strict=True)]
        whole += [triton_matmul.Whole(g, True, False) for g, s in zip(gates, split_gates, strict=True) if s]
        pieces = iter(triton_matmul.split_weights(whole) if whole else [])
    return (
        [w._replace(pieces=next(pieces)) for w in weights],
        [w._replace(pieces=next(pieces)) if s else w for w, s in zip(of_gates, split_gates, strict=True)],
    )


def order_matmul(
    x: Tensor, weights: Sequence[Weight], add: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """x times a block-diagonal matrix, plus ``add``; of the same accuracy as `precise_matmul`, not differentiable.

    Args:
        x: (F, E, W), contiguous.
        weights: The blocks, (F, K_m, K_m), of together W columns.
        add: (F, E, W), contiguous; none with residual weights.
        overwrite: The result may take the place of ``add``.

    Returns:
        (F, E, W), contiguous.
    """
    if add is not None and overwrite:
        y = add
    else:
        y = torch.empty_like(x)
    if blocks := [w.pieces for w in weights if w.pieces is not None]:
        with torch.cuda.device(x.device):
            _split_into(y, x, blocks, add)
        return y
    if weights[0].residual:
        add = x
    if add is not None and y is not add:
        # At once: the library would copy each block of columns for itself, which takes twice as long.
        y.copy_(add)
    for run, w in zip(columns_of(weights), weights, strict=True):
        _library_into(y[..., run], x[..., run], w.matrix, add is not None)
    return y


def columns_of(weights: Sequence[Weight]) -> list[slice]:
    """Columns of each block of a block-diagonal matrix."""
    ends = list(accumulate(w.matrix.shape[-1] for w in weights))
    return [slice(end - w.matrix.shape[-1], end) for end, w in zip(ends, weights, strict=True)]


def _is_split(x: Tensor) -> bool:
    """Whether products with x are those of pieces."""
    return x.is_cuda and x.dtype == torch.float32


def _plus_one(w: Tensor) -> Tensor:
    return w + torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)


def _split_into(y: Tensor, x: Tensor, blocks: Sequence[Pieces], add: Tensor | None) -> None:
    """Product with a block-diagonal matrix of pieces in the place of y, which has the strides of ``add``."""
    if all(b.named for b in blocks):
        from dpa4.kernels import gluon_matmul

        return gluon_matmul.matmul_into(y, x, blocks, add)
    if len(blocks) > 1:
        parts_x, parts_y = ([b.halves.shape[axis] for b in blocks] for axis in (3, 2))
        parts_add = [None] * len(blocks) if add is None else add.split(parts_y, -1)
        for b, *part in zip(blocks, y.split(parts_y, -1), x.split(parts_x, -1), parts_add, strict=True):
            _split_into(part[0], part[1], [b], part[2])
        return
    from dpa4.kernels import triton_matmul

    triton_matmul.matmul_into(y, x, blocks[0], add)


def _library_into(y: Tensor, x: Tensor, w: Tensor, add: bool) -> None:
    """Product of the library in the place of y, or added to it."""
    if len(x) > 1:
        y.baddbmm_(x, w) if add else torch.bmm(x, w, out=y)
    elif add:
        y[0].addmm_(x[0], w[0])
    else:
        torch.mm(x[0], w[0], out=y[0])


class _PreciseMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        product: Tensor = torch.ops.dpa4.precise_matmul(x, w)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        return precise_matmul(grad, w.mT) if need_x else None, x.mT @ grad if need_w else None


def _cpu(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(x, w).contiguous()


def _cuda(x: Tensor, w: Tensor) -> Tensor:
    y = x.new_empty((*x.shape[:-1], w.shape[-1]))
    x_FEK, w_FKN, y_FEN = (x, w, y) if x.dim() == 3 else (x[None], w[None], y[None])
    (weight,), _ = ready(x_FEK, [Weight(w_FKN)])
    assert weight.pieces is not None
    with torch.cuda.device(x.device):
        _split_into(y_FEN, x_FEK, [weight.pieces], None)
    return y


def _fake(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[-1]))


_library.impl("precise_matmul", _cpu, "CPU")
_library.impl("precise_matmul", _cuda, "CUDA")
torch.library.register_fake("dpa4::precise_matmul", _fake, lib=_library)
