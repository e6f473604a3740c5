"""Energy of isolated atoms, the energy zero of models with ``vacuum_ref`` (docs/adr/0024)."""

from collections.abc import Mapping

import torch
from ase.data import atomic_numbers
from torch import Tensor

from dpa4.model import DPA4, ModelConfig
from dpa4.ops.incidence import Incidence

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
