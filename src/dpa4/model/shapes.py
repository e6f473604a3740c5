"""Shapes and number of the parameters of a network, found without allocating them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpa4.model.config import ModelConfig
from dpa4.model.constants import without_constants
from dpa4.model.network import DPA4

MAX_PARAMETERS = 1_000_000_000
"""Over three times the largest preset; its training state alone would have 16 GB."""


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of the parameters of a network by name, as in its state dict. No memory is allocated for them."""
    with without_constants(), _ParametersOnMeta():
        return {name: parameter.shape for name, parameter in DPA4(config).state_dict().items()}


class ParameterCount(NamedTuple):
    """Number of parameters of a network."""

    total: int
    trainable: int  # without fixed frequencies or centres of the radial basis


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a network. No memory is allocated for them."""
    with without_constants(), _ParametersOnMeta():
        parameters = list(DPA4(config).parameters())
    return ParameterCount(
        sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    )


def check_size(config: ModelConfig) -> None:
    """Refuse a network with more than ``MAX_PARAMETERS`` parameters before it is built.

    Raises:
        ValueError: If the network is too large.
    """
    count = count_parameters(config).total
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"the model has {count:,} parameters, at most {MAX_PARAMETERS:,} are supported; lower model.channels = "
            f"{config.channels}, model.lmax = {config.degrees[0]} or the number of blocks and layers"
        )


class _ParametersOnMeta(TorchFunctionMode):
    """Creates parameters on the device "meta".

    Parameters start as tensors of the default type. All other tensors of a network name their type, and stay on the
    CPU. Drawing, scaling and joining of parameters are replaced: PyTorch imports its compiler for them, in a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and "dtype" not in kwargs:
            return torch.empty(*(args[:1] if func is torch.full else args), device="meta")
        if func in _WITH_SAME_SHAPE and args[0].is_meta:
            return args[0]
        if func is torch.cat and args[0][0].is_meta:
            return _joined(*args, **kwargs)
        return func(*args, **kwargs)


_FACTORIES = (torch.empty, torch.full, torch.ones, torch.randn, torch.zeros)
_WITH_SAME_SHAPE = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.normal_, Tensor.uniform_)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(shape, device="meta")
