"""Matrix product of float32 accuracy that uses tensor cores where there are any.

float32 units of a GPU are several times slower than its tensor cores, which multiply shorter numbers. On CUDA the
operands are split into sums of short numbers, so that the result is as accurate as float32 (see
`dpa4.ops.triton.split_matmul`): features on chip, weights by an operator of its own (`split`), so that whoever traces
these products sees what depends on weights alone. Elsewhere it is the ordinary product.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dpa4.ops import available
from dpa4.ops.registration import register
from dpa4.ops.second_order import needs_gradient
from dpa4.ops.weights import SplitWeight, Weight


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


def split(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """Split weights for products with features like x into the parts that `ready` expects, one weight after another.

    None where the products are ordinary ones.
    """
    if not available.split_product(x) or not weights:
        return []
    pieces: list[Tensor] = torch.ops.dpa4.split_weights(
        [w.matrix for w in weights], [w.residual for w in weights]
    )
    return pieces


def ready(x: Tensor, weights: Sequence[Weight], pieces: Sequence[Tensor]) -> list[Weight]:
    """Weights as `order_matmul` takes them for features of the kind of x.

    Args:
        x: (F, E, W), with any strides.
        weights: Of the products.
        pieces: Of the weights, made by `split`.
    """
    if not pieces and x.dtype in (torch.float32, torch.float64):
        # Shorter numbers would lose too much of a sum with 1.
        weights = [Weight(_plus_one(w.matrix)) if w.residual else w for w in weights]
    if not pieces:
        return list(weights)
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [w._replace(parts=SplitWeight(*pair)) for w, pair in zip(weights, pairs, strict=True)]


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
    if blocks := [w.parts for w in weights if w.parts is not None]:
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


def _plus_one(w: Tensor) -> Tensor:
    return w + torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)


def _split_into(y: Tensor, x: Tensor, blocks: Sequence[SplitWeight], add: Tensor | None) -> None:
    """Product with a block-diagonal matrix of pieces in the place of y, which has the strides of ``add``."""
    if len(blocks) > 1:
        parts_x, parts_y = ([b.halves.shape[axis] for b in blocks] for axis in (-1, -2))
        parts_add = [None] * len(blocks) if add is None else add.split(parts_y, -1)
        for b, *part in zip(blocks, y.split(parts_y, -1), x.split(parts_x, -1), parts_add, strict=True):
            _split_into(part[0], part[1], [b], part[2])
        return
    from dpa4.ops.triton import split_matmul as kernels

    kernels.matmul_into(y, x, blocks[0], add)


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
        pieces = split(x, [Weight(w if w.dim() == 3 else w[None])])
        product: Tensor = torch.ops.dpa4.precise_matmul(x, w, pieces)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        need_x, need_w = needs_gradient(ctx, 2)
        return precise_matmul(grad, w.mT) if need_x else None, x.mT @ grad if need_w else None


# The operators. What tracing sees are results without values.


def _product(x: Tensor, w: Tensor, pieces: list[Tensor]) -> Tensor:
    if not pieces:
        return torch.matmul(x, w).contiguous()
    y = x.new_empty((*x.shape[:-1], w.shape[-1]))
    x_FEK, y_FEN = (x, y) if x.dim() == 3 else (x[None], y[None])
    _split_into(y_FEN, x_FEK, [SplitWeight(*pieces)], None)
    return y


def _new_product(x: Tensor, w: Tensor, pieces: list[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[-1]))


def _split_weights(weights: list[Tensor], plus_one: list[bool]) -> list[Tensor]:
    from dpa4.ops.triton import split_matmul as kernels  # triton is needed on CUDA only

    made = _new_pieces(weights, plus_one)
    pairs = [SplitWeight(*pair) for pair in zip(made[::2], made[1::2], strict=True)]
    kernels.split_into(pairs, weights, plus_one)
    return made


def _new_pieces(weights: list[Tensor], plus_one: list[bool]) -> list[Tensor]:
    made = []
    for w in weights:
        n_batch, inner, columns = w.shape
        made.append(w.new_empty((2, n_batch, columns, inner), dtype=torch.float16))
        made.append(w.new_empty((n_batch, columns)))
    return made


register(
    "precise_matmul(Tensor x, Tensor w, Tensor[] pieces) -> Tensor",
    _new_product,
    {"CompositeExplicitAutograd": _product},
)
register(
    "split_weights(Tensor[] weights, bool[] plus_one) -> Tensor[]",
    _new_pieces,
    {"CompositeExplicitAutograd": _split_weights},
)
