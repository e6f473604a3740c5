"""Matrix product of float32 accuracy that uses tensor cores where there are any.

float32 units of a GPU are several times slower than its tensor cores, which multiply shorter numbers. On CUDA the
operands are split into sums of short numbers on chip, so that the result is as accurate as float32 (see
`dpa4.kernels.triton_matmul`). Elsewhere it is the ordinary product.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

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


def order_matmul(
    x: Tensor, matrices: Sequence[Tensor], add: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """x times a block-diagonal matrix, plus ``add``; of the same accuracy as `precise_matmul`, not differentiable.

    Args:
        x: (F, E, W), contiguous.
        matrices: The blocks, (F, K_m, K_m), of together W columns, with any strides.
        add: (F, E, W), contiguous.
        overwrite: The result may take the place of ``add``.

    Returns:
        (F, E, W), contiguous.
    """
    split = x.is_cuda and x.dtype == torch.float32
    if add is not None and overwrite:
        y = add
    elif add is not None and not split:
        # At once: the library would copy each block of columns for itself, which takes twice as long.
        y = add.clone()
    else:
        y = torch.empty_like(x)
    for run, w in zip(columns_of(matrices), matrices, strict=True):
        if split:
            _split_into(y[..., run], x[..., run], w, None if add is None else add[..., run])
        else:
            _library_into(y[..., run], x[..., run], w, add is not None)
    return y


def columns_of(matrices: Sequence[Tensor]) -> list[slice]:
    """Columns of each block of a block-diagonal matrix."""
    ends = list(accumulate(w.shape[-1] for w in matrices))
    return [slice(end - w.shape[-1], end) for end, w in zip(ends, matrices, strict=True)]


def _split_into(y: Tensor, x: Tensor, w: Tensor, add: Tensor | None) -> None:
    """Product of float32 accuracy in the place of y, (F, E, N), on CUDA."""
    from dpa4.kernels import triton_matmul  # triton is needed on CUDA only

    with torch.cuda.device(x.device):  # Triton launches on the current device
        if on_hopper(x.device):
            from dpa4.kernels import gluon_matmul

            if gluon_matmul.fits(y, x, w):
                return gluon_matmul.matmul_into(y, x, w, add)
        triton_matmul.matmul_into(y, x, w, add)


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
    _split_into(*((y, x, w) if x.dim() == 3 else (y[None], x[None], w[None])), None)
    return y


def _fake(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[-1]))


_library.impl("precise_matmul", _cpu, "CPU")
_library.impl("precise_matmul", _cuda, "CUDA")
torch.library.register_fake("dpa4::precise_matmul", _fake, lib=_library)
