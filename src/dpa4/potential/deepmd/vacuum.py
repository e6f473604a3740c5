"""Energy of isolated atoms, the energy zero of models with ``vacuum_ref`` (docs/adr/0024)."""

from collections.abc import Mapping
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor

from dpa4.model import DPA4, ModelConfig
from dpa4.ops.incidence import Incidence
from dpa4.potential.deepmd.option_types import is_list, unsupported

# Unpaired electrons of the neutral atoms H to Og: ground-state configuration, open shells filled by Hund's rule.
_UNPAIRED = (
    "10"
    + "10123210" * 2
    + "101236543210123210"
    + "101256543010123210"
    + "10123456785432101234543210123210" * 2
)


def multiplicity(element: str) -> int:
    """Spin multiplicity of a free atom, the number of its unpaired electrons plus one."""
    return int(_UNPAIRED[atomic_numbers[element] - 1]) + 1


def isolated_atom_energies(config: ModelConfig, weights: Mapping[str, Tensor]) -> Tensor:
    """Output of the network for a neutral atom without neighbours, computed in float64.

    A model that is conditioned on charge and spin receives charge 0 and the multiplicity of the free atom.

    Args:
        config: The model.
        weights: State dict of the network.

    Returns:
        (T,) float64, in eV, without reference energies.
    """
    network = DPA4(config).double().eval()
    network.load_state_dict({name: value.double() for name, value in weights.items()})
    types = len(config.elements)
    none = torch.zeros(0, dtype=torch.int64)
    condition = torch.tensor([[0, multiplicity(element)] for element in config.elements])
    with torch.no_grad():
        return network(
            torch.arange(types),
            torch.zeros(0, 3, dtype=torch.float64),
            Incidence.of(none, types),
            Incidence.of_sorted(none, types),
            condition,
        )


def has_vacuum_reference(model_params: Mapping[str, Any]) -> bool:
    """Return whether the energy of an isolated atom is exactly its bias (``fitting_net.vacuum_ref``).

    deepmd-kit switches the option off unless ``preset_out_bias`` fixes the bias of the energy.

    Args:
        model_params: Model section in the concise form.

    Raises:
        ValueError: If the option is combined with ``atom_ener``, or the bias has an unknown form.
    """
    fitting = model_params["fitting_net"]
    if not fitting.get("vacuum_ref", False):
        return False
    fixed = model_params.get("preset_out_bias")
    fixed = fixed.get("energy") if isinstance(fixed, Mapping) else fixed
    if not isinstance(fixed, str | list | tuple | None):
        raise unsupported("preset_out_bias.energy", fixed, "a list of energies, or the name of a table")
    if fixed is None or (is_list(fixed) and all(value is None for value in fixed)):
        return False
    if has_atom_energies(fitting):
        raise unsupported("fitting_net.atom_ener", fitting["atom_ener"], "null together with vacuum_ref")
    return True


def has_atom_energies(fitting: Mapping[str, Any]) -> bool:
    """Return whether ``fitting_net.atom_ener`` fixes the energy of an element."""
    energies = fitting.get("atom_ener")
    return energies is not None and any(energy is not None for energy in energies)
