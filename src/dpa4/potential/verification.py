"""Checks of the content of a checkpoint before a network is built from it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dpa4.model import ModelConfig
from dpa4.model.shapes import shapes_of
from dpa4.parsing import shown

WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types in which weights may be stored."""

MAX_WEIGHT = 1e8
"""Largest weight. Weights of trained models are below 1000; products of a few larger ones overflow."""

MAX_REFERENCE_ENERGY = 1e8
"""Largest reference energy, in eV. The total energy of oganesson with all electrons is 1.5e6 eV."""


def check_number_of_layers(config: ModelConfig, num_tensors: int) -> None:
    """Refuse a configuration with more layers than a file has tensors; `weight_problems` builds every layer.

    Raises:
        ValueError: If there are more.
    """
    blocks = len(config.degrees)
    layers = blocks * (1 + config.mixing_layers + config.ffn_blocks) + config.readout_layers
    if layers > num_tensors:
        raise ValueError(
            f"its weights do not fit its configuration: {blocks} blocks with mixing_layers = {config.mixing_layers} "
            f"and ffn_blocks = {config.ffn_blocks} need at least {layers} tensors, the file has {num_tensors}"
        )


def weight_problems(config: ModelConfig, found: Mapping[str, Sequence[int]]) -> list[str]:
    """Differences between the shapes of stored weights and those that a configuration requires.

    Args:
        config: The configuration.
        found: Shapes of the weights, by the names of the network's state dict.
    """
    return differences(shapes_of(config), found)


def differences(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """Describe missing and unknown names, and names with another shape."""
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is unknown" for key in found if key not in expected]
    return problems + [
        f"{key} has shape {tuple(found[key])} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]


def listed(problems: Sequence[str], count: int = 5) -> str:
    """Join the first problems to one line and count the others."""
    more = f" and {len(problems) - count} more" if len(problems) > count else ""
    return ", ".join(problems[:count]) + more


def check_values(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check the type of weights, and that they are finite and not absurdly large.

    Raises:
        ValueError: With the name of the first weight that is not a plain tensor of floating-point numbers, or has
            NaN, infinity or a value above ``MAX_WEIGHT`` among its values.
    """
    for name, tensor in tensors:
        check_stored(name, tensor)
        if tensor.dtype not in WEIGHT_TYPES:
            raise ValueError(
                f"{name} has values of type {_type_name(tensor.dtype)}; weights must be "
                f"{', '.join(map(_type_name, WEIGHT_TYPES))}"
            )
        if tensor.numel() == 0 or bool(tensor.abs().max() <= MAX_WEIGHT):
            continue
        broken = int((~tensor.isfinite()).sum())
        problem = (
            f"is not finite: {broken} of its {tensor.numel()} values are NaN or infinite"
            if broken
            else f"has a value of {float(tensor.abs().max()):.3g}; allowed are weights up to {MAX_WEIGHT:g}"
        )
        raise ValueError(
            f"{name} {problem}. The file is damaged, or its training diverged; use an earlier model file"
        )


def check_stored(name: str, tensor: Tensor) -> None:
    """Check that a tensor is an ordinary one, all of whose values are stored.

    A few bytes can describe a tensor of any size: without storage, or with strides of zero.

    Raises:
        ValueError: If it is not.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"{name} is a tensor of an unusual kind; only dense tensors are read")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but the file stores "
            f"{tensor.untyped_storage().nbytes()} bytes for it"
        )


def check_reference_energies(energies: Tensor, elements: Sequence[str]) -> None:
    """Check the reference energies of a checkpoint, one per element in eV.

    Raises:
        ValueError: If there is not one for each element, or one is not a finite, plausible number.
    """
    check_stored("reference_energies", energies)
    if tuple(energies.shape) != (len(elements),):
        raise ValueError(
            "its weights do not fit its configuration: reference_energies has shape "
            f"{tuple(energies.shape)} instead of {(len(elements),)}"
        )
    if energies.dtype not in (torch.float64, torch.float32):
        raise ValueError(f"reference_energies has values of type {_type_name(energies.dtype)}, not float64")
    for element, energy in zip(elements, energies.tolist(), strict=True):
        if not abs(energy) <= MAX_REFERENCE_ENERGY:
            raise ValueError(
                f"the reference energy of {element} is {energy:g} eV; allowed are finite numbers up to "
                f"{MAX_REFERENCE_ENERGY:g} eV"
            )


def check_provenance(provenance: object) -> dict[str, str]:
    """Check the provenance of a checkpoint, texts by label.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(provenance, dict):
        raise ValueError(f"its entry provenance is {shown(provenance)}, not a map of texts")
    for label, value in provenance.items():
        if not isinstance(value, str):
            raise ValueError(f"its entry provenance has {shown(value)} for {shown(label)}, not a text")
    return provenance


def digest_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the content of a checkpoint: the texts of its metadata, and names, types, shapes and values.

    Args:
        metadata: Metadata without the digest.
        tensors: Tensors on the CPU.
    """
    digest = hashlib.sha256()
    for key, value in sorted(metadata.items()):
        digest.update(json.dumps([key, value]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, _type_name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
