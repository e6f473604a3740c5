"""Other layouts of a deepmd-kit checkpoint, made from one in the ordinary layout; energies to compare."""

import copy
import re

import torch

from helpers import graph_of, molecule

_LINEAR = r"(.*\.(?:env_seed_embedding\.\w+|radial_embedding\.net\.\d+|charge_spin_embedding\.mix_layer))"


def as_pt_expt(state: dict) -> dict:
    """State dictionary with the names and extra entries of deepmd-kit's second PyTorch runtime."""
    renamed = {}
    for name, value in state.items():
        ordinary = re.sub(rf"{_LINEAR}\.matrix$", r"\1.w", name)
        ordinary = re.sub(rf"{_LINEAR}\.bias$", r"\1.b", ordinary)
        if ".filter_layers.networks.0." in name:
            leaf = name.split(".filter_layers.networks.0.")[1].replace(".linear.", ".")
            leaf = re.sub(r"\.matrix$", ".w", leaf)
            leaf = re.sub(r"\.bias$", ".b", leaf)
            start = name.split("filter_layers.")[0]
            for copies in ("networks", "_networks", "_module_networks"):
                renamed[f"{start}nets.{copies}.0.{leaf}"] = value
        elif name.endswith("min_nbor_dist"):
            renamed[name.replace("min_nbor_dist", "_min_nbor_dist")] = value
        elif not name.endswith("dens_force_rmsd"):
            renamed[ordinary] = value
    atomic = "model.Default.atomic_model."
    number = torch.zeros(3)
    for name in (
        "descriptor.graph_lower_disabled",
        "descriptor.emask.type_mask",
        "fitting_net.emask.type_mask",
        "descriptor.wigner_calc.full_gather_idx",
        "descriptor.wigner_calc._l2_monomial_coeff",
        "descriptor.gie.l1_local_index",
        "descriptor.blocks.0.ffns.0.act.projector.to_grid_mat",
        "descriptor.blocks.0.ffns.0.act.projector.from_grid_mat",
        "descriptor.output_ffn.act.projector.frame_values",
        "descriptor.blocks.0.so2_conv.message_node_grid_product.frame_expand.degree_index",
        "descriptor.blocks.0.so2_conv.message_node_grid_product.frame_contract.degree_index",
        "descriptor.blocks.0.so2_conv.degree_index_full",
    ):
        renamed[atomic + name] = number
    return renamed


def composed_form(params: dict) -> dict:
    """Options of a model with ZBL bridging, written as a sum of the network and the repulsion."""
    network = {
        key: value for key, value in params.items() if not key.startswith("bridging_") and key != "info"
    }
    radii = {f"r_{side}": params[f"bridging_r_{side}"] for side in ("inner", "outer")}
    repulsion = {"type": "inner_potential", "mode": "ZBL"} | radii
    common = {key: params[key] for key in ("type_map", "info")}
    return {"type": "linear_ener", "weights": "sum", "models": [network, repulsion]} | common


def as_june_2026(state: dict) -> dict:
    """State dictionary with the extra entries and option names of June 2026."""
    changed = copy.deepcopy(state)
    descriptor = changed["_extra_state"]["model_params"]["descriptor"]
    descriptor["so2_layers"] = descriptor.pop("mixing_layers")
    for option in ("readout_layers", "edge_cartesian", "node_cartesian"):
        descriptor.pop(option)
    prefix = "model.Default.atomic_model.descriptor."
    changed[f"{prefix}_empty_tensor"] = torch.zeros(0, dtype=torch.float64)
    for name in ("coeff_index_m", "degree_index_m", "rotate_inv_rescale_full"):
        changed[f"{prefix}blocks.0.so2_conv.{name}"] = torch.ones(7)
    return changed


def parameter_names(state: dict) -> list[str]:
    """Names of the parameters of an ordinary state dictionary, buffers left out."""
    derived = (
        r".*\.(version_tensor|mean|stddev|expand_index|balance_weight|m0_idx|(pos|neg)_indices|kernel_\w+)"
    )
    buffers = r".*\.(min_nbor_dist|out_bias|out_std|dens_force_rmsd|bias_atom_e|case_embd)|.*\.(wigner_calc|gie)\..*"
    other = re.compile(f"{derived}|{buffers}|_extra_state")
    return [name for name in state if not other.fullmatch(name)]


def energies_of(potential) -> torch.Tensor:
    """Energies of the atoms of a molecule."""
    return potential(graph_of(molecule())).atomic_energies
