"""Check of the operands of kernels, which get bare addresses and would read or write beyond small tensors."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Operand(NamedTuple):
    """Tensor with the shape and dtype that a kernel reads or writes; contiguous."""

    name: str
    tensor: Tensor
    shape: Sequence[int]
    dtype: torch.dtype


def check(kernel: str, device: torch.device, operands: Iterable[Operand]) -> None:
    """Compare operands with what a kernel expects. Values, such as indices, are not looked at.

    Args:
        kernel: Name of the kernel, for the message.
        device: Device of all operands.
        operands: Operands of the kernel.

    Raises:
        ValueError: If a tensor has another shape, dtype or device, or is not contiguous.
    """
    for name, t, shape, dtype in operands:
        if t.dtype != dtype or t.shape != shape or t.device != device or not t.is_contiguous():
            layout = "" if t.is_contiguous() else f" with strides {t.stride()}"
            raise ValueError(
                f"{kernel} needs {name} as a contiguous {_name(dtype)} tensor {tuple(shape)} on {device}, got "
                f"{_name(t.dtype)} {tuple(t.shape)} on {t.device}{layout}"
            )


def check_count(kernel: str, name: str, tensors: Sequence[Tensor], allowed: Sequence[int]) -> None:
    """Compare the length of a list of operands with those that a kernel expects.

    Raises:
        ValueError: If the list has another length.
    """
    if len(tensors) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{kernel} needs {expected} tensors as {name}, got {len(tensors)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
