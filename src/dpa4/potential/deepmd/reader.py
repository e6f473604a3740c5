"""Reading deepmd-kit checkpoints of DPA4 models (docs/models.md, "Checkpoints of deepmd-kit").

Only tensors and plain containers are read, never code. Features without a counterpart in this package are folded into
weights and reference energies (docs/adr/0006 and 0024).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa4.model import ModelConfig
from dpa4.model.config import float32
from dpa4.model.shapes import shapes_of
from dpa4.parsing import first_line, shown
from dpa4.potential.deepmd.bridging import concise_form
from dpa4.potential.deepmd.folding import (
    energy_of_zero_descriptor,
    fold_lora,
    fold_task_embedding,
    hidden_widths,
)
from dpa4.potential.deepmd.layouts import STATISTICS, Branch, is_derived, read_branch, with_averages
from dpa4.potential.deepmd.names import deepmd_name
from dpa4.potential.deepmd.option_types import check_plain, is_list, is_whole, unsupported
from dpa4.potential.deepmd.options import config_from_deepmd, precision_of
from dpa4.potential.deepmd.vacuum import has_atom_energies, has_vacuum_reference, isolated_atom_energies
from dpa4.potential.model_file import is_training_state, missing_text, training_state_text
from dpa4.potential.pytorch_file import load_pytorch
from dpa4.potential.verification import (
    check_number_of_layers,
    check_reference_energies,
    check_values,
    listed,
)
from dpa4.system import user_path

NEWEST_FORMAT = 1.3  # newest readable format of the descriptor
NEWEST_BRIDGED_FORMAT = 1.2  # the same for models with bridging, whose formulas changed afterwards


@dataclass(frozen=True)
class DeepmdModel:
    """One model of a deepmd-kit checkpoint, reduced to the data that energies depend on."""

    config: ModelConfig
    weights: dict[str, Tensor]  # state dict of the network
    reference_energies: Tensor  # (T,) float64, eV
    dtype: torch.dtype  # type in which deepmd-kit would run the network
    version: float  # format version of the descriptor
    runtime: str  # runtime of deepmd-kit that wrote the file, "pt" or "pt_expt"
    provenance: dict[str, str]


def read_deepmd(path: str | Path, branch: str | None = None, *, ema: bool = False) -> DeepmdModel:
    """Read one model of a deepmd-kit checkpoint.

    Args:
        path: File written by one of deepmd-kit's PyTorch runtimes (``.pt``).
        branch: Name or alias of a branch of a multitask model; required if there are several.
        ema: Read the averages of the weights from the entry ``ema`` instead of the weights of the last step.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is not a DPA4 checkpoint, uses an unsupported option or a newer format;
            also if the branch is unknown, or missing where there are several, or averages are asked for and
            missing.
    """
    path = user_path(path)
    if not path.is_file():
        raise FileNotFoundError(missing_text(path))
    outer = load_pytorch(path)
    if not isinstance(outer, Mapping):
        raise ValueError(
            f"cannot read {path}: it holds a {type(outer).__name__}, not a deepmd-kit checkpoint"
        )
    if is_training_state(outer):
        raise ValueError(training_state_text(path))
    try:
        return _parse(outer, branch, ema, path)
    except KeyError as error:
        raise ValueError(f"cannot read {path}: it has no entry {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    except (TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"cannot read {path}: its options or tensors have other types or shapes than deepmd-kit writes "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _parse(outer: Mapping[str, Any], branch: str | None, ema: bool, path: Path) -> DeepmdModel:
    state = outer["model"] if isinstance(outer.get("model"), Mapping) else outer
    extra = state.get("_extra_state")
    if not isinstance(extra, Mapping) or not isinstance(extra.get("model_params"), Mapping):
        raise ValueError("it is not a deepmd-kit checkpoint: its _extra_state has no model_params")
    check_plain(extra["model_params"])
    params, name = select_branch(extra["model_params"], branch)
    params = concise_form(params)
    several = "model_dict" in extra["model_params"]
    found, averages = _weights_to_read(outer, state, name, several, ema)
    tensors = found.tensors
    _check_tensors(tensors, path.stat().st_size)
    version = _version(tensors)
    config = _config(params, version)
    check_number_of_layers(config, len(tensors))
    types = len(config.elements)
    energies = _pop(tensors, "out_bias", (1, types, 1)).double()[0, :, 0]
    energies = energies + _pop(tensors, "fitting_net.bias_atom_e", (types, 1)).double()[:, 0]
    fold_lora(tensors)
    shift = fold_task_embedding(tensors, config.channels)
    if params["fitting_net"].get("dim_case_embd", 0) > 0:
        config = config.model_copy(update={"fitting": hidden_widths(tensors)})
    weights = _own_names(tensors, config)
    check_values(weights.items())
    if has_vacuum_reference(params):  # the shift cancels in this difference, and in the next
        energies = energies - isolated_atom_energies(config, weights)
    elif has_atom_energies(params["fitting_net"]):
        energies = energies - energy_of_zero_descriptor(tensors)
    else:
        energies = energies + shift
    check_reference_energies(energies, config.elements)
    dtype = torch.float64 if precision_of(params) == 64 else torch.float32
    provenance = _provenance(extra, name if several else None, averages or _averages_in_file(outer, path))
    if has_vacuum_reference(params):
        provenance["isolated atoms"] = (
            "their network energy is subtracted from the reference energies (vacuum_ref)"
        )
    return DeepmdModel(config, weights, energies, dtype, version, found.runtime, provenance)


def _config(params: Mapping[str, Any], version: float) -> ModelConfig:
    """Configuration of a model.

    Raises:
        ValueError: If an option is not supported, or the model has the bridging of a newer format.
    """
    config = config_from_deepmd(params, version)
    if version > NEWEST_BRIDGED_FORMAT + 1e-9 and config.bridging is not None:
        raise ValueError(
            f"its descriptor has format {version:g} and its model ZBL bridging; models with bridging are read up to "
            f"format {NEWEST_BRIDGED_FORMAT}, others up to {NEWEST_FORMAT}"
        )
    # deepmd-kit holds the cutoff of the edge weight in float32. The own field is set only if that changes it.
    return config.model_copy(update={"float32_cutoff": float32(config.cutoff) != config.cutoff})


def _weights_to_read(
    outer: Mapping[str, Any], state: Mapping[str, Any], name: str, several: bool, ema: bool
) -> tuple[Branch, str | None]:
    """Tensors of a branch and, if these are the averages, their description.

    Raises:
        ValueError: If averages are asked for and the file has none.
    """
    found = read_branch(state, name)
    if not ema:
        return found, None
    if "ema" not in outer:
        raise ValueError(
            "it has no entry ema with averaged weights; leave out --ema (Python: ema=True). Separate files with _ema "
            "in their names hold averages as ordinary weights"
        )
    return with_averages(found, outer["ema"], state, name if several else None)


def _averages_in_file(outer: Mapping[str, Any], path: Path) -> str | None:
    """Remark on averaged weights in a file whose ordinary weights are read; None if nothing is known of averages."""
    if "ema" in outer:
        return (
            "not imported; the checkpoint also holds an EMA of the weights, which dpa4 convert --ema imports"
        )
    if re.search(r"_ema(?![a-z])", path.name):
        return "imported; by its name, the file holds an EMA as its ordinary weights"
    return None


def _provenance(extra: Mapping[str, Any], branch: str | None, averages: str | None) -> dict[str, str]:
    provenance = {} if branch is None else {"branch": branch}
    if averages is not None:
        provenance["averaged weights"] = averages
    infos = extra.get("train_infos")
    if isinstance(infos, Mapping) and is_whole(step := infos.get("step")):
        provenance["training steps"] = f"{step + 1:d}"
    return provenance


def _check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors with more values than a file of ``size`` bytes stores, and weights that are not finite."""
    if (bytes_in_all := sum(value.numel() * value.element_size() for value in tensors.values())) > size:
        raise ValueError(f"its tensors have {bytes_in_all:,} bytes, more than the file")
    check_values((key, v) for key, v in tensors.items() if key not in STATISTICS and not is_derived(key))


def _version(tensors: Mapping[str, Tensor]) -> float:
    """Format version of the descriptor.

    Raises:
        ValueError: If the file has another value than a number, or a newer format.
    """
    stored = tensors.get("descriptor.version_tensor")
    if stored is None:
        return 1.0
    if stored.numel() != 1 or not math.isfinite(version := float(stored)):
        raise ValueError(
            f"its descriptor has the format {shown(stored.flatten()[:3].tolist())}, not a number"
        )
    if version > NEWEST_FORMAT + 1e-9:
        raise ValueError(
            f"its descriptor has format {version:g}; this version of dpa4 reads formats up to {NEWEST_FORMAT}. "
            "Update dpa4"
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
    names = {alias: name for name, section in branches.items() for alias in _aliases(name, section)}
    names |= {name: name for name in branches}
    chosen = branch if branch is not None else next(iter(branches)) if len(branches) == 1 else "Default"
    if chosen not in names:
        problem = "it holds several models" if branch is None else f"it has no branch {branch!r}"
        raise ValueError(f"{problem}; choose one of the branches {', '.join(sorted(names))}")
    return branches[names[chosen]], names[chosen]


def _aliases(branch: str, section: Mapping[str, Any]) -> list[str]:
    aliases = section.get("model_branch_alias")
    if aliases is None:
        return []
    if not is_list(aliases) or not all(isinstance(alias, str) for alias in aliases):
        raise unsupported(f"{branch}.model_branch_alias", aliases, "a list of names")
    return list(aliases)


def _own_names(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """State dict of the network. Axes of size one, which deepmd-kit stores in a few places, are dropped.

    Raises:
        ValueError: If a tensor of the model is missing or has another shape, or one is left over.
    """
    shapes = shapes_of(config)
    names = {key: deepmd_name(key, config) for key in shapes}
    missing = [name for name in names.values() if name not in tensors]
    known = {*names.values(), *STATISTICS}
    unknown = [key for key in tensors if key not in known and not is_derived(key)]
    if missing or unknown:
        found = [f"misses {name}" for name in missing] + [f"has the unknown entry {key}" for key in unknown]
        raise ValueError(f"it does not fit its options: it {listed(found)}")
    for key, name in names.items():
        if [n for n in tensors[name].shape if n > 1] != [n for n in shapes[key] if n > 1]:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, its options require {tuple(shapes[key])}"
            )
    return {key: tensors[name].reshape(shapes[key]) for key, name in names.items()}
