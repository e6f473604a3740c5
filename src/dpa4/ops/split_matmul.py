"""Matrix products of float32 accuracy on tensor cores.

The float32 units of a GPU are several times slower than its tensor cores, which multiply 16-bit numbers. On CUDA the
operands are split into sums of float16 numbers, so that the result is as accurate as float32 (see
`dpa4.ops.triton.split_matmul`). Features are split inside the kernel. Weights are split by a separate operator
(`split`), so that a trace shows that their parts depend on weights alone. On other devices the product is ordinary.
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
    """Multiply x @ w, differentiable any number of times; dL/dx is again such a product, dL/dw an ordinary one.

    In float32, on every device and for magnitudes between 1e-30 and 1e30, the error of an entry is below
    1e-6 sum_k |x_k w_k| + 1e-11 K max|x| max|w|, with the maxima over the row of x and the column of w. For other
    dtypes, and under autocast, the product is the ordinary one.

    Args:
        x: Left operand, (E, K) or (F, E, K), with any strides; fastest if the last axis is contiguous.
        w: Right operand, (K, N) or (F, K, N), with the same number of axes as x.

    Returns:
        Product, (E, N) or (F, E, N).

    Raises:
        ValueError: If the shapes do not match.
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
    """Split weights for products with features like x into the parts that `prepare` expects, two tensors per weight.

    The list is empty if products with x are ordinary ones.
    """
    if not available.split_product(x) or not weights:
        return []
    parts: list[Tensor] = torch.ops.dpa4.split_weights(
        [w.matrix for w in weights], [w.residual for w in weights]
    )
    return parts


def prepare(x: Tensor, weights: Sequence[Weight], parts: Sequence[Tensor]) -> list[Weight]:
    """Prepare weights for `order_matmul` with features like x.

    Args:
        x: Features, (F, E, W), with any strides.
        weights: Weights of the products.
        parts: Result of `split` for the same weights.
    """
    if not parts and x.dtype in (torch.float32, torch.float64):
        # In 16 bits the sum with the identity would round off too much of the weight.
        weights = [
            w._replace(matrix=_plus_one(w.matrix), residual=False) if w.residual else w for w in weights
        ]
    if not parts:
        return list(weights)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [w._replace(parts=SplitWeight(*pair)) for w, pair in zip(weights, pairs, strict=True)]


def order_matmul(
    x: Tensor, weights: Sequence[Weight], add: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """Multiply x by a block-diagonal matrix and add ``add``; as accurate as `precise_matmul`, not differentiable.

    Args:
        x: Features, (F, E, W), contiguous.
        weights: Blocks made by `prepare`, (F, K, K), with W columns in total, copies included.
        add: Term that is added, (F, E, W), contiguous; must be None with residual weights.
        overwrite: Whether the result may be written to the memory of ``add``.

    Returns:
        Result, (F, E, W), contiguous.
    """
    if add is not None and overwrite:
        y = add
    else:
        y = torch.empty_like(x)
    if parts := [w.parts for w in weights if w.parts is not None]:
        for run, part in zip(columns_of(weights), parts, strict=True):
            _split_into(y[..., run], x[..., run], part, None if add is None else add[..., run])
        return y
    if weights[0].residual:
        add = x
    if add is not None and y is not add:
        # All columns are copied at once: the library would copy each block separately, which takes twice as long.
        y.copy_(add)
    for run, w in zip(columns_of(weights), weights, strict=True):
        _library_into(y[..., run], x[..., run], w, add is not None)
    return y


def columns_of(weights: Sequence[Weight]) -> list[slice]:
    """Columns of each block of a block-diagonal matrix, those of all copies of a block together."""
    widths = [w.copies * w.matrix.shape[-1] for w in weights]
    return [slice(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]


def _plus_one(w: Tensor) -> Tensor:
    return w + torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)


def _split_into(y: Tensor, x: Tensor, parts: SplitWeight, add: Tensor | None) -> None:
    """Write the product with a split matrix, or with copies of it, to y, which has the strides of ``add``."""
    from dpa4.ops.triton import split_matmul as kernels

    kernels.matmul_into(y, x, parts, add)


def _library_into(y: Tensor, x: Tensor, w: Weight, add: bool) -> None:
    """Write the product to y, or add it to y, with the library of the device (cuBLAS, MKL)."""
    matrix = w.matrix
    if w.copies > 1 and len(x) == 1:  # the copies are a batch: one call
        y, x = (t[0].unflatten(-1, (w.copies, -1)).transpose(0, 1) for t in (y, x))
        matrix = matrix.expand(w.copies, -1, -1)
    elif w.copies > 1:
        for part_y, part_x in zip(y.chunk(w.copies, -1), x.chunk(w.copies, -1), strict=True):
            _library_into(part_y, part_x, Weight(matrix), add)
        return
    if len(x) > 1:
        y.baddbmm_(x, matrix) if add else torch.bmm(x, matrix, out=y)
    elif add:
        y[0].addmm_(x[0], matrix[0])
    else:
        torch.mm(x[0], matrix[0], out=y[0])


class _PreciseMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        parts = split(x, [Weight(w if w.dim() == 3 else w[None])])
        product: Tensor = torch.ops.dpa4.precise_matmul(x, w, parts)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        need_x, need_w = needs_gradient(ctx, 2)
        return precise_matmul(grad, w.mT) if need_x else None, x.mT @ grad if need_w else None


# The operators. Tracing calls the functions `_new_...`, which return uninitialised results.


def _product(x: Tensor, w: Tensor, parts: list[Tensor]) -> Tensor:
    if not parts:
        return torch.matmul(x, w).contiguous()
    y = x.new_empty((*x.shape[:-1], w.shape[-1]))
    x_FEK, y_FEN = (x, y) if x.dim() == 3 else (x[None], y[None])
    _split_into(y_FEN, x_FEK, SplitWeight(*parts), None)
    return y


def _new_product(x: Tensor, w: Tensor, parts: list[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[-1]))


def _split_weights(weights: list[Tensor], plus_one: list[bool]) -> list[Tensor]:
    from dpa4.ops.triton import split_matmul as kernels  # Triton is needed on CUDA only

    parts = _new_parts(weights, plus_one)
    pairs = [SplitWeight(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    kernels.split_into(pairs, weights, plus_one)
    return parts


def _new_parts(weights: list[Tensor], plus_one: list[bool]) -> list[Tensor]:
    parts = []
    for w in weights:
        n_batch, inner, columns = w.shape
        parts.append(w.new_empty((2, n_batch, columns, inner), dtype=torch.float16))
        parts.append(w.new_empty((n_batch, columns)))
    return parts


register(
    "precise_matmul(Tensor x, Tensor w, Tensor[] parts) -> Tensor",
    _new_product,
    {"CompositeExplicitAutograd": _product},
)
register(
    "split_weights(Tensor[] weights, bool[] plus_one) -> Tensor[]",
    _new_parts,
    {"CompositeExplicitAutograd": _split_weights},
)
