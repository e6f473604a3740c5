"""Writing a potential as a deepmd-kit checkpoint (docs/models.md, "Checkpoints of deepmd-kit")."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor

from dpa4.model.config import ModelConfig, auto_width
from dpa4.model.layers import balance_of, degree_of
from dpa4.ops.layout import EdgeLayout
from dpa4.output import write_torch
from dpa4.potential.deepmd.names import deepmd_name
from dpa4.potential.deepmd.options import config_to_deepmd
from dpa4.potential.potential import Potential
from dpa4.system import user_path

_MODEL = "model.Default."
_ATOMIC = f"{_MODEL}atomic_model."


def export_deepmd(potential: Potential, path: str | Path) -> None:
    """Write a checkpoint from which deepmd-kit 3.2.0 computes the same energies.

    Args:
        potential: The potential; its reference energies become the energy bias of each element.
        path: File to write, ending in ``.pt``.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        ValueError: If the name does not end in ``.pt``, or deepmd-kit has no model with the same results.
    """
    path = user_path(path)
    if path.suffix != ".pt":
        raise ValueError(f"deepmd-kit checkpoints end in .pt, got {path.name!r}")
    write_torch(path, {"model": deepmd_state(potential)})


def deepmd_state(potential: Potential) -> dict[str, Any]:
    """State dictionary of the equivalent deepmd-kit model, with its ``_extra_state``.

    Raises:
        ValueError: If deepmd-kit has no model with the same results.
    """
    config = potential.config
    dtype = potential.dtype
    params = config_to_deepmd(config, "float64" if dtype == torch.float64 else "float32")
    weights = deepmd_weights(potential.model.state_dict(), config)
    types = len(config.elements)
    state: dict[str, Any] = {
        f"{_MODEL}min_nbor_dist": torch.tensor(-1.0, dtype=torch.float64),
        f"{_ATOMIC}out_bias": potential.reference_energies.detach().cpu().double().reshape(1, types, 1),
        f"{_ATOMIC}out_std": torch.ones(1, types, 1, dtype=torch.float64),
        f"{_ATOMIC}dens_force_rmsd": torch.ones((), dtype=torch.float64),
        f"{_ATOMIC}fitting_net.bias_atom_e": torch.zeros(types, 1, dtype=torch.float64),
    }
    if config.bridging is not None:
        numbers = [float(atomic_numbers[element]) for element in config.elements]
        state[f"{_MODEL}inter_potential.atomic_numbers"] = torch.tensor(numbers, dtype=torch.float64)
    buffers = derived_buffers(config, dtype)
    state |= {f"{_ATOMIC}{key}": value.contiguous() for key, value in (weights | buffers).items()}
    state["_extra_state"] = {"model_params": params, "train_infos": {}}
    return state


def deepmd_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Parameters of the network with the names (below "atomic_model.") and the axes of size one of deepmd-kit."""
    renamed = {}
    for key, value in weights.items():
        name = deepmd_name(key, config)
        if config.symmetry == "O3":
            value = parameter_of_so3(key, value, config)
        if re.search(r"_(so2_norm|ffn_norms\.\d+)\.adam_scale$", name):
            value = value[:, None]
        elif re.search(r"_(so2_norm|ffn_norms\.\d+)\.bias$|\.adam_freqs$", name):
            value = value[None]
        renamed[name] = value.detach().cpu()
    return renamed


def parameter_of_so3(key: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Parameter of the model of symmetry SO3 that has the same results as one of symmetry O3."""
    if ".stack.linears." in key and ".weight_m." in key:
        return _with_zero_blocks(value, config.n_focus)
    if match := re.search(r"\.(expand|contract|linear_in|linear_out)\.weight$|\.(linear_in)\.bias$", key):
        layer = match[1] or match[2]
        width = config.ffn_neurons or auto_width(config.channels)
        width = config.focus_width if layer in ("expand", "contract") else width
        axis = -2 if layer in ("contract", "linear_out") else -1
        return _with_zero_frames(value, axis, 2 if layer == "linear_in" else 1, width)
    return value


def _with_zero_frames(weight: Tensor, axis: int, fields: int, width: int) -> Tensor:
    """Insert zeros for the frames k = -1, -2, ... in the axis of a weight that holds fields, frames and channels."""
    even = weight.transpose(axis, -1).unflatten(-1, (fields, -1, width))
    frames = even.new_zeros(*even.shape[:-2], 2 * even.shape[-2] - 1, width)
    frames[..., ::2, :] = even
    return frames.flatten(-3).transpose(axis, -1)


def _with_zero_blocks(weight: Tensor, n_focus: int) -> Tensor:
    """Weight of an order above zero with blocks V of zeros, (n c, F n c) to (n c, F 2 n c); see `SO2Linear`."""
    u = weight.unflatten(1, (n_focus, -1))
    return torch.cat([u, torch.zeros_like(u)], dim=2).flatten(1)


def derived_buffers(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Index tables and constants that deepmd-kit stores although they follow from the options."""
    lmax = config.degrees[0]
    buffers = {
        "version_tensor": torch.tensor(1.0 if config.pre_release else 1.2, dtype=torch.float64),
        "mean": torch.zeros(0, dtype=dtype),
        "stddev": torch.zeros(0, dtype=dtype),
        "wigner_calc.l1_perm": torch.tensor([1, 2, 0]),
        "wigner_calc.l1_sign_outer": torch.outer(*[torch.tensor([-1.0, -1.0, 1.0], dtype=dtype)] * 2),
    }
    if config.use_env_seed and lmax > 0:
        degree = degree_of(lmax)[1:]
        buffers["gie.non_scalar_row_index"] = torch.arange(1, (lmax + 1) ** 2)
        buffers["gie.zonal_m0_col_index_for_row"] = degree * (degree + 1)
        buffers["gie.radial_slot_index_for_row"] = degree - 1
    for b, degree_b in enumerate(config.degrees):
        block = _block_buffers(config, degree_b, dtype)
        buffers |= {f"blocks.{b}.{key}": value for key, value in block.items()}
    readout_lmax = 0 if config.so3_readout == "none" else config.degrees[-1]
    layers = [f"readout_pre_layers.{k}." for k in range(config.readout_layers - 1)] + ["output_ffn."]
    for layer in layers:
        ffn = _ffn_buffers(readout_lmax, gated=config.so3_readout == "none")
        buffers |= {layer + key: value for key, value in ffn.items()}
    return {f"descriptor.{key}": value for key, value in buffers.items()}


def _block_buffers(config: ModelConfig, lmax: int, dtype: torch.dtype) -> dict[str, Tensor]:
    degree = degree_of(lmax)
    buffers = {f"so2_conv.{side}_focus_mix.expand_index": degree for side in ("pre", "post")}
    names = ["pre_so2_norm", "post_so2_norm"], ["pre_ffn_norms", "post_ffn_norms"]
    norms = [name for name, used in zip(names[0], config.sandwich_norm[:2], strict=True) if used]
    for i in range(config.ffn_blocks):
        norms += [
            f"{name}.{i}" for name, used in zip(names[1], config.sandwich_norm[2:], strict=True) if used
        ]
        ffn = _ffn_buffers(lmax, gated=config.ffn_on == "degrees")
        buffers |= {f"ffns.{i}.{key}": value for key, value in ffn.items()}
    for norm in norms:
        buffers |= {
            f"{norm}.expand_index": degree,
            f"{norm}.balance_weight": balance_of(lmax, config.channels).to(dtype),
        }

    layout = EdgeLayout(lmax, min(config.mmax, lmax))
    orders = order_positions(layout)
    negative = torch.cat([torch.tensor([], dtype=torch.int64), *(minus for minus, _ in orders[1:])])
    positive = torch.cat([torch.tensor([], dtype=torch.int64), *(plus for _, plus in orders[1:])])
    for t in range(config.mixing_layers):
        linear = f"so2_conv.so2_linears.{t}."
        buffers |= {f"{linear}m0_idx": orders[0][0], f"{linear}neg_indices": negative}
        buffers[f"{linear}pos_indices"] = positive
    edge_degree = torch.tensor(layout.degrees())
    for t in range(config.mixing_layers - 1):
        buffers[f"so2_conv.non_linearities.{t}.expand_index"] = edge_degree[edge_degree > 0] - 1
    if config.radial_so2_mode != "none":
        compact, dense = _kernel_indices(orders)
        buffers["so2_conv.radial_degree_mixer.kernel_compact_index"] = compact
        buffers["so2_conv.radial_degree_mixer.kernel_dense_index"] = dense
    return buffers


def _ffn_buffers(lmax: int, gated: bool) -> dict[str, Tensor]:
    degree = degree_of(lmax)
    buffers = {f"so3_linear_{i}.expand_index": degree for i in (1, 2)}
    return buffers | ({"act.expand_index": degree[degree > 0] - 1} if gated else {})


def order_positions(layout: EdgeLayout) -> list[tuple[Tensor, Tensor]]:
    """Positions of the coefficients of order -m and +m in the edge frame, for m = 0..mmax."""
    positions = []
    for m, (first, count) in enumerate(layout.orders()):
        rows = torch.arange(first, first + count)
        positions.append((rows, rows) if m == 0 else (rows[: count // 2], rows[count // 2 :]))
    return positions


def _kernel_indices(orders: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Indices of the compact degree kernel, and their positions in the dense (out, in) matrix of the edge frame."""
    size = int(orders[-1][1][-1]) + 1
    compact, dense, start = [], [], 0
    for m, runs in enumerate(orders):
        entries = start + torch.arange(len(runs[0]) ** 2)
        start += len(entries)
        for run in runs[: 1 if m == 0 else 2]:
            compact.append(entries)
            dense.append((run[None, :] * size + run[:, None]).flatten())
    return torch.cat(compact), torch.cat(dense)
