"""Weights of matrix products, in full precision or split into float16 parts."""

from typing import NamedTuple

from torch import Tensor


class SplitWeight(NamedTuple):
    """Matrix (F, K, N) as a sum of float16 parts times a power of two, see `dpa4.ops.triton.split_matmul`."""

    halves: Tensor  # high and low parts, (2, F, N, K) float16
    scale: Tensor  # power of two by which each column of the product is multiplied, (F, N) float32


class Weight(NamedTuple):
    """Matrix as `dpa4.ops.split_matmul.order_matmul` expects it; made by `dpa4.ops.split_matmul.prepare`."""

    matrix: Tensor  # (F, K, N), with any strides
    residual: bool = False  # if true, x is added to the product with x
    copies: int = 1  # number of adjacent blocks of columns of x that the matrix multiplies, each by itself
    # Set if the product uses split operands. The parts of a residual weight include the identity.
    parts: SplitWeight | None = None
