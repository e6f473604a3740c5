"""Parts of deepmd-kit models without a counterpart here, folded into weights and energies (docs/adr/0006).

They are LoRA deltas, the task embedding of a multitask model, and the energy zero of ``atom_ener``. The tensors have
the names of deepmd-kit below "atomic_model.".
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

_NETWORK = "fitting_net.filter_layers.networks.0."


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
