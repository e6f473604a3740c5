"""Reading deepmd-kit checkpoints of DPA4 models (docs/models.md, "Checkpoints of deepmd-kit").

Only tensors and plain containers are read, never code. Three features have no counterpart in this package and are
folded into weights and reference energies (docs/adr/0006): LoRA deltas, the task embedding of a multitask model, and
the energy zero of ``atom_ener``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dpa4.model import ModelConfig
from dpa4.model.config import float32
from dpa4.model.shapes import shapes_of
from dpa4.parsing import first_line, shown
from dpa4.potential.deepmd.names import deepmd_name
from dpa4.potential.deepmd.options import check_plain, config_from_deepmd, precision_of
from dpa4.potential.pytorch_file import load_pytorch
from dpa4.potential.verification import (
    check_number_of_layers,
    check_reference_energies,
    check_stored,
    check_values,
    listed,
)
from dpa4.system import user_path

NEWEST_FORMAT = 1.2  # newest readable format of the descriptor, written by deepmd-kit 3.2.0

_NETWORK = "fitting_net.filter_layers.networks.0."
_DERIVED = re.compile(  # index tables and constants that follow from the options
    r"descriptor\.(version_tensor|mean|stddev|wigner_calc\..*|gie\..*)"
    r"|.*\.(expand_index|balance_weight|m0_idx|pos_indices|neg_indices|kernel_compact_index|kernel_dense_index)"
)
_STATISTICS = ("out_std", "dens_force_rmsd")  # not used by energy models


@dataclass(frozen=True)
class DeepmdModel:
    """One model of a deepmd-kit checkpoint, reduced to the data that energies depend on."""

    config: ModelConfig
    weights: dict[str, Tensor]  # state dict of the network
    reference_energies: Tensor  # (T,) float64, eV
    dtype: torch.dtype  # type in which deepmd-kit would run the network
    version: float  # format version of the descriptor
    provenance: dict[str, str]


def read_deepmd(path: str | Path, branch: str | None = None) -> DeepmdModel:
    """Read one model of a deepmd-kit checkpoint.

    Args:
        path: File written by deepmd-kit's PyTorch backend (``.pt``).
        branch: Name or alias of a branch of a multitask model; required if there are several.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is not a DPA4 checkpoint, uses an unsupported option or a format newer
            than 1.2; also if the branch is unknown, or missing where there are several.
    """
    path = user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    outer = load_pytorch(path)
    if not isinstance(outer, Mapping):
        raise ValueError(
            f"cannot read {path}: it holds a {type(outer).__name__}, not a deepmd-kit checkpoint"
        )
    try:
        return _parse(outer, branch, path.stat().st_size)
    except KeyError as error:
        raise ValueError(f"cannot read {path}: it has no entry {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"cannot read {path}: its options or tensors have other types or shapes than deepmd-kit writes "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _parse(outer: Mapping[str, Any], branch: str | None, size: int) -> DeepmdModel:
    state = outer["model"] if isinstance(outer.get("model"), Mapping) else outer
    extra = state.get("_extra_state")
    if not isinstance(extra, Mapping) or not isinstance(extra.get("model_params"), Mapping):
        raise ValueError("it is not a deepmd-kit checkpoint: its _extra_state has no model_params")
    check_plain(extra["model_params"])
    params, name = select_branch(extra["model_params"], branch)
    tensors = _tensors_of(state, name, size)
    version = _version(tensors)
    if version > NEWEST_FORMAT + 1e-9:
        raise ValueError(
            f"its descriptor has format {version:g}; this version of dpa4 reads formats up to {NEWEST_FORMAT}. "
            "Update dpa4"
        )
    config = config_from_deepmd(params, version)
    # deepmd-kit holds the cutoff of the edge weight in float32. The own field is set only if that changes it.
    config = config.model_copy(update={"float32_cutoff": float32(config.cutoff) != config.cutoff})
    check_number_of_layers(config, len(tensors))
    types = len(config.elements)
    energies = _pop(tensors, "out_bias", (1, types, 1)).double()[0, :, 0]
    energies = energies + _pop(tensors, "fitting_net.bias_atom_e", (types, 1)).double()[:, 0]
    fold_lora(tensors)
    shift = fold_task_embedding(tensors, config.channels)
    if any(value is not None for value in params["fitting_net"].get("atom_ener") or ()):
        energies = energies - energy_of_zero_descriptor(tensors)  # the shift cancels in this difference
    else:
        energies = energies + shift
    if params["fitting_net"].get("dim_case_embd", 0):
        config = config.model_copy(update={"fitting": hidden_widths(tensors)})
    weights = _own_names(tensors, config)
    check_values(weights.items())
    check_reference_energies(energies, config.elements)
    provenance = {}
    if "model_dict" in extra["model_params"]:
        provenance["branch"] = name
    if "ema" in outer:
        provenance["averaged weights"] = (
            "the checkpoint also holds an EMA of the weights, which is not imported"
        )
    infos = extra.get("train_infos")
    if isinstance(infos, Mapping) and isinstance(step := infos.get("step"), int):
        provenance["training steps"] = f"{step + 1:d}"
    dtype = torch.float64 if precision_of(params) == 64 else torch.float32
    return DeepmdModel(config, weights, energies, dtype, version, provenance)


def _version(tensors: Mapping[str, Tensor]) -> float:
    """Format version of the descriptor.

    Raises:
        ValueError: If the file has another value than a number.
    """
    stored = tensors.get("descriptor.version_tensor")
    if stored is None:
        return 1.0
    if stored.numel() != 1 or not math.isfinite(version := float(stored)):
        raise ValueError(
            f"its descriptor has the format {shown(stored.flatten()[:3].tolist())}, not a number"
        )
    return version


def _pop(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Remove and return a tensor.

    Raises:
        KeyError: If it is missing.
        ValueError: If it has another shape.
    """
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its options require {shape}")
    return tensor


def select_branch(params: Mapping[str, Any], branch: str | None) -> tuple[Mapping[str, Any], str]:
    """Select the model section and the key of a branch, which is "Default" for single-task models.

    Raises:
        ValueError: If the branch does not exist, or none is chosen and there are several.
    """
    if "model_dict" not in params:
        if branch not in (None, "Default"):
            raise ValueError(
                f"it holds a single model, so there is no branch {branch!r}; leave the branch out"
            )
        return params, "Default"
    branches = params["model_dict"]
    if not isinstance(branches, Mapping) or not all(isinstance(s, Mapping) for s in branches.values()):
        raise ValueError(f"its model_dict is {shown(branches)}, not a map of models")
    names = {
        alias: name for name, section in branches.items() for alias in section.get("model_branch_alias") or []
    }
    names |= {name: name for name in branches}
    chosen = branch if branch is not None else next(iter(branches)) if len(branches) == 1 else "Default"
    if chosen not in names:
        problem = "it holds several models" if branch is None else f"it has no branch {branch!r}"
        raise ValueError(f"{problem}; choose one of the branches {', '.join(sorted(names))}")
    return branches[names[chosen]], names[chosen]


def _tensors_of(state: Mapping[str, Any], branch: str, size: int) -> dict[str, Tensor]:
    """Tensors of a branch, by their names below "atomic_model.".

    Raises:
        ValueError: If an entry is unknown, or a tensor cannot be used: weights that are not finite, or tensors with
            more values than a file of ``size`` bytes stores.
    """
    prefix = f"model.{branch}."
    own = {str(key)[len(prefix) :]: value for key, value in state.items() if str(key).startswith(prefix)}
    own.pop("min_nbor_dist", None)
    own.pop("inter_potential.atomic_numbers", None)
    tensors = {}
    for key, value in own.items():
        if key.startswith("atomic_model.dens_fitting_net."):
            raise ValueError(
                "dens_fitting_net (direct forces and denoising) is not supported; supported: energy models"
            )
        if not key.startswith("atomic_model.") or not isinstance(value, Tensor):
            raise ValueError(f"it has an unknown entry {prefix}{key}")
        tensors[key.removeprefix("atomic_model.")] = value
    for key, value in tensors.items():
        check_stored(key, value)
    if (bytes_in_all := sum(value.numel() * value.element_size() for value in tensors.values())) > size:
        raise ValueError(f"its tensors have {bytes_in_all:,} bytes, more than the file")
    used = {key: v for key, v in tensors.items() if key not in _STATISTICS and not _DERIVED.fullmatch(key)}
    check_values(used.items())
    return tensors


def _own_names(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """State dict of the network. Axes of size one, which deepmd-kit stores in a few places, are dropped.

    Raises:
        ValueError: If a tensor of the model is missing or has another shape, or one is left over.
    """
    shapes = shapes_of(config)
    names = {key: deepmd_name(key, config) for key in shapes}
    missing = [name for name in names.values() if name not in tensors]
    known = {*names.values(), *_STATISTICS}
    unknown = [key for key in tensors if key not in known and not _DERIVED.fullmatch(key)]
    if missing or unknown:
        found = [f"misses {name}" for name in missing] + [f"has the unknown entry {key}" for key in unknown]
        raise ValueError(f"it does not fit its options: it {listed(found)}")
    for key, name in names.items():
        if [n for n in tensors[name].shape if n > 1] != [n for n in shapes[key] if n > 1]:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, its options require {tuple(shapes[key])}"
            )
    return {key: tensors[name].reshape(shapes[key]) for key, name in names.items()}


def fold_lora(tensors: dict[str, Tensor]) -> None:
    """Add low-rank deltas to their weights and remove them, in place.

    The delta of a weight W[..., i, o] is s * sum_r A[..., r, i] * B[..., o, r], with the scaling s from the entry
    ``lora_scaling``, or 1 without that entry.
    """
    for key in [key for key in tensors if re.search(r"\.A_(by_l|m0|m\.\d+)$", key)]:
        module, suffix = key.rsplit(".A_", 1)
        weight = f"{module}.weight" + ("" if suffix == "by_l" else f"_{suffix}")
        partner = f"{module}.B_{suffix}"
        if missing := [name for name in (weight, partner) if name not in tensors]:
            raise ValueError(f"it has the LoRA entry {key} but lacks {', '.join(missing)}")
        scaling = tensors.get(f"{module}.lora_scaling", torch.ones(())).double()
        a, b, shape = tensors[key].shape, tensors[partner].shape, tensors[weight].shape
        if min(len(a), len(b)) < 2 or (*a[:-2], a[-1], b[-2]) != tuple(shape) or a[:-2] != b[:-2]:
            raise ValueError(f"the LoRA entries of {weight} do not fit its shape {tuple(shape)}")
        delta = torch.einsum("...ri,...or->...io", tensors.pop(key).double(), tensors.pop(partner).double())
        tensors[weight] = (tensors[weight].double() + scaling * delta).to(tensors[weight].dtype)
    for key in [key for key in tensors if key.endswith(".lora_scaling")]:
        del tensors[key]


def fold_task_embedding(tensors: dict[str, Tensor], channels: int) -> float:
    """Fold the embedding of a multitask branch into the weights and biases of the energy network.

    The embedding is constant within a branch. As an additional input, it adds to the biases of the first layer. As
    FiLM, it scales and shifts the input of every layer, x (1 + e^a tanh(gamma)) + e^b tanh(beta). Both change only
    weights and biases. The last layer has no bias; there the shift is the same energy for every atom. The folded
    tensors are float64.

    Args:
        tensors: Tensors of the branch, changed in place.
        channels: Channels of the descriptor, the first inputs of the energy network.

    Returns:
        Energy to add to every atom, in eV.
    """
    code = tensors.pop("fitting_net.case_embd", None)
    if code is None:
        return 0.0
    film = {
        key: tensors.pop(key).double() for key in list(tensors) if key.startswith(f"{_NETWORK}case_film.")
    }
    film = {key.removeprefix(f"{_NETWORK}case_film."): value for key, value in film.items()}
    layers = [f"{_NETWORK}hidden_layers.{k}.linear." for k in range(_num_hidden(tensors))]
    matrices = [f"{layer}matrix" for layer in layers] + [f"{_NETWORK}output_layer.matrix"]
    shifts = []
    for t, name in enumerate(matrices):
        matrix = tensors[name].double()
        if film:
            hidden = functional.silu(code.double() @ film["case_layer1.matrix"]) @ film["case_layer2.matrix"]
            gamma, beta = (hidden @ film[f"projectors.{t}"]).tanh().chunk(2)
            scale = 1 + film["adam_case_film_scale_strength_log"][t].exp() * gamma
            shifts.append(film["adam_case_film_shift_strength_log"][t].exp() * beta @ matrix)
            matrix = scale[:, None] * matrix
        else:
            width = channels if t == 0 else len(matrix)
            shifts.append(code.double() @ matrix[width:] if t == 0 else matrix.new_zeros(matrix.shape[1]))
            matrix = matrix[:width]
        tensors[name] = matrix
    for layer, shift in zip(layers, shifts, strict=False):
        tensors[f"{layer}bias"] = tensors[f"{layer}bias"].double() + shift
    return float(shifts[-1])


def hidden_widths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Hidden widths of the energy network. The matrix of a layer has twice its width, for value and gate."""
    return tuple(
        tensors[f"{_NETWORK}hidden_layers.{k}.linear.matrix"].shape[1] // 2
        for k in range(_num_hidden(tensors))
    )


def energy_of_zero_descriptor(tensors: Mapping[str, Tensor]) -> float:
    """Output of the energy network for a descriptor of zeros, the zero of energy with ``atom_ener``."""
    if _num_hidden(tensors) == 0:
        return 0.0
    x = torch.zeros(len(tensors[f"{_NETWORK}hidden_layers.0.linear.matrix"]), dtype=torch.float64)
    for k in range(_num_hidden(tensors)):
        layer = f"{_NETWORK}hidden_layers.{k}.linear."
        value, gate = (x @ tensors[f"{layer}matrix"].double() + tensors[f"{layer}bias"].double()).chunk(2)
        x = value * functional.silu(gate)
    return float(x @ tensors[f"{_NETWORK}output_layer.matrix"].double())


def _num_hidden(tensors: Mapping[str, Tensor]) -> int:
    return sum(key.startswith(f"{_NETWORK}hidden_layers.") and key.endswith(".matrix") for key in tensors)
