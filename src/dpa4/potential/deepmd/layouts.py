"""Layouts of deepmd-kit checkpoints: names of the tensors of a model, derived entries, averaged weights.

deepmd-kit has two PyTorch runtimes, "pt" and "pt_expt". Their models have the same options, but other names for some
parameters. Here the names of the first are the ordinary ones, to which those of the second are translated. Both store
tensors that follow from the options, each revision others.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpa4.parsing import shown
from dpa4.potential.deepmd.option_types import is_number
from dpa4.potential.verification import check_stored, listed

STATISTICS = ("out_std", "dens_force_rmsd")  # not used by energy models
_BUFFERS = ("out_bias", "fitting_net.bias_atom_e", "fitting_net.case_embd", *STATISTICS)

# Index tables and constants that follow from the options, and empty tensors, by their names below "atomic_model.".
_DERIVED = (
    r"descriptor\.(version_tensor|mean|stddev)",
    r"descriptor\.wigner_calc\.\w+",
    r"descriptor\.gie\.(non_scalar_row_index|zonal_m0_col_index_for_row|radial_slot_index_for_row|l1_local_index)",
    r".*\.(expand_index|balance_weight|m0_idx|pos_indices|neg_indices|kernel_compact_index|kernel_dense_index)",
    # June 2026, and the second runtime
    r"descriptor\.blocks\.\d+\.so2_conv\.(coeff_index_m|degree_index_m|degree_index_full|rotate_inv_rescale_full)",
    r"descriptor\._empty_tensor",
    # the second runtime
    r"descriptor\.graph_lower_disabled",
    r"(descriptor|fitting_net)\.emask\.type_mask",
    r"descriptor\..*\.projector\.(to_grid_mat|from_grid_mat|frame_values)",
    r"descriptor\..*\.(frame_expand|frame_contract)\.degree_index",
)
_DERIVED_PATTERN = re.compile("|".join(_DERIVED))
_BESIDE_MODEL = (
    "min_nbor_dist",
    "_min_nbor_dist",
    "inter_potential.atomic_numbers",
)  # statistics and derived

# Modules of linear layers, whose parameters have the names "matrix" and "bias" or, in pt_expt, "w" and "b".
_LINEAR = (
    r"descriptor\.env_seed_embedding\.\w+|descriptor\.radial_embedding\.net\.\d+"
    r"|descriptor\.charge_spin_embedding\.mix_layer"
)
_NETWORK = r"fitting_net\.filter_layers\.networks\.0\."
_PT_EXPT = re.compile(
    rf"(?P<linear>{_LINEAR})\.(?P<leaf>[wb])"
    r"|fitting_net\.nets\.(networks|_networks|_module_networks)\.0\.(?P<entry>.+)"
)
_PT = re.compile(rf"({_LINEAR})\.(matrix|bias)|{_NETWORK}.+")
_LEAVES = {"w": "matrix", "b": "bias"}


@dataclass(frozen=True)
class Branch:
    """Tensors of one model, by their ordinary names below "atomic_model."."""

    tensors: dict[str, Tensor]
    runtime: str  # "pt" or "pt_expt"


def is_derived(name: str) -> bool:
    """Return whether a tensor follows from the options of the model."""
    return _DERIVED_PATTERN.fullmatch(name) is not None


def read_branch(state: Mapping[str, Any], branch: str) -> Branch:
    """Tensors of a model of a state dictionary.

    Raises:
        ValueError: If an entry is no tensor of an energy model, is not stored entirely, or has the name of
            another runtime than the others.
    """
    tensors = {}
    for name, value in _below(state, f"model.{branch}."):
        if name in _BESIDE_MODEL:
            continue
        if name.startswith("atomic_model.dens_fitting_net."):
            raise ValueError(
                "dens_fitting_net (direct forces and denoising) is not supported; supported: energy models"
            )
        if not name.startswith("atomic_model.") or not isinstance(value, Tensor):
            raise ValueError(f"it has an unknown entry model.{branch}.{name}")
        check_stored(name.removeprefix("atomic_model."), value)
        tensors[name.removeprefix("atomic_model.")] = value.detach()
    return _with_ordinary_names(tensors)


def _below(entries: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(key, str) and key.startswith(prefix):
            yield key.removeprefix(prefix), value


def _with_ordinary_names(tensors: Mapping[str, Tensor]) -> Branch:
    """Translate the names of the second runtime.

    Raises:
        ValueError: If names of both runtimes occur, or copies of a tensor differ.
    """
    second = {name: match for name in tensors if (match := _PT_EXPT.fullmatch(name))}
    if not second:
        return Branch(dict(tensors), "pt")
    if first := [name for name in tensors if _PT.fullmatch(name)]:
        raise ValueError(
            f"it mixes the names of deepmd-kit's runtimes: {first[0]} belongs to pt, {next(iter(second))} to "
            "pt_expt; supported: files of one runtime"
        )
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        ordinary = _ordinary_name(second[name]) if name in second else name
        if ordinary in renamed and not _are_same(renamed[ordinary], value):
            raise ValueError(f"its copies of {ordinary} differ; one of them is {name}")
        renamed[ordinary] = value
    return Branch(renamed, "pt_expt")


def _are_same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _ordinary_name(match: re.Match[str]) -> str:
    if match["linear"]:
        return f"{match['linear']}.{_LEAVES[match['leaf']]}"
    module, _, leaf = match["entry"].rpartition(".")
    if leaf in _LEAVES and module.startswith("hidden_layers."):
        module = f"{module}.linear"
    return f"fitting_net.filter_layers.networks.0.{module}{'.' * bool(module)}{_LEAVES.get(leaf, leaf)}"


def with_averages(
    found: Branch, averages: object, state: Mapping[str, Any], branch: str | None
) -> tuple[Branch, str]:
    """Replace the parameters of a model by their exponential moving averages (EMA).

    Of a parameter that several branches share, the averages may hold one copy, under the name of one branch.

    Args:
        found: The model.
        averages: Entry ``ema`` of the checkpoint, with the averages of the parameters of all branches.
        state: State dictionary of the checkpoint.
        branch: Name of the model in a checkpoint of several, else None.

    Returns:
        The model with averaged parameters and its own buffers, and a description.

    Raises:
        ValueError: If the averages are not those of the parameters of the model.
    """
    stored = averages.get("model") if isinstance(averages, Mapping) else None
    if not isinstance(averages, Mapping) or not isinstance(stored, Mapping):
        raise ValueError(
            f"its entry ema is {shown(averages)}, not a map with the averages in its entry model"
        )
    means = _averages_of(stored, branch)
    parameters = [name for name in found.tensors if _is_parameter(name)]
    if missing := [name for name in parameters if name not in means]:
        means |= _shared_averages(missing, found, stored, state, branch)
    missing = [name for name in parameters if name not in means]
    unknown = [name for name in means if name not in parameters]
    if missing or unknown:
        problems = [f"lacks {name}" for name in missing] + [
            f"has the unknown entry {name}" for name in unknown
        ]
        raise ValueError(f"its entry ema does not fit its model: it {listed(problems)}")
    for name in parameters:
        if means[name].shape != found.tensors[name].shape:
            raise ValueError(
                f"its entry ema has {name} of shape {tuple(means[name].shape)}, its model of shape "
                f"{tuple(found.tensors[name].shape)}"
            )
    decay = averages.get("decay")
    text = f"decay {decay:g}" if is_number(decay) else "of unknown decay"
    return Branch(
        found.tensors | means, found.runtime
    ), f"EMA of the weights, {text}, imported from the entry ema"


def _is_parameter(name: str) -> bool:
    return not is_derived(name) and name not in _BUFFERS and not name.endswith(".lora_scaling")


def _averages_of(stored: Mapping[str, Any], branch: str | None) -> dict[str, Tensor]:
    prefix = "atomic_model." if branch is None else f"{branch}.atomic_model."
    tensors = {}
    for name, value in _below(stored, prefix):
        if not isinstance(value, Tensor):
            raise ValueError(f"its entry ema has {shown(value)} for {prefix}{name}, not a tensor")
        check_stored(f"ema.{name}", value)
        tensors[name] = value.detach()
    return _with_ordinary_names(tensors).tensors


def _shared_averages(
    names: list[str], found: Branch, stored: Mapping[str, Any], state: Mapping[str, Any], branch: str | None
) -> dict[str, Tensor]:
    """Averages of parameters that have the same values in another branch, whose averages are stored."""
    if branch is None:
        return {}
    means: dict[str, Tensor] = {}
    others = {key.split(".")[1] for key in state if isinstance(key, str) and key.startswith("model.")}
    for other in sorted(others - {branch}):
        candidates = _averages_of(stored, other)
        tensors = read_branch(state, other).tensors if candidates else {}
        means |= {
            name: candidates[name]
            for name in names
            if name in candidates and name in tensors and _are_same(tensors[name], found.tensors[name])
        }
    return means
