"""Weights of matrix products, whole and split into float16 parts."""

from typing import NamedTuple

from torch import Tensor


class SplitWeight(NamedTuple):
    """A matrix (F, K, N) in float16 parts, see `dpa4.ops.triton.split_matmul`."""

    halves: Tensor  # high and low parts, (2, F, N, K) float16
    scale: Tensor  # power of two that each column of the product is multiplied by, (F, N)


class Weight(NamedTuple):
    """A matrix as `dpa4.ops.split_matmul.order_matmul` expects it, see `dpa4.ops.split_matmul.ready`."""

    matrix: Tensor  # (F, K, N), with any strides
    residual: bool = False  # if true, x is added to the product with x
    parts: SplitWeight | None = (
        None  # set if the product uses split operands; a residual is then part of them
    )
