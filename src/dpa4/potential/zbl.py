"""Ziegler-Biersack-Littmark (ZBL) repulsion of nuclei (docs/theory.md, "ZBL bridging")."""

import torch
from torch import Tensor, nn

from dpa4.model.radial import envelope
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import segment_sum

COULOMB = 14.3996  # e^2 / (4 pi epsilon_0), eV Angstrom
BOHR = 0.5291772109  # Angstrom
# Universal screening function: the sum of AMPLITUDES * exp(-EXPONENTS * x) at the reduced distance x.
AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.028171)
EXPONENTS = (3.1998, 0.94229, 0.4029, 0.20162)


def zbl_pair_energy(length: Tensor, z_i: Tensor, z_j: Tensor) -> Tensor:
    """Universal screened Coulomb repulsion of two nuclei.

    Args:
        length: Distances, (E,), in Angstrom.
        z_i: Atomic numbers of one end, (E,).
        z_j: Atomic numbers of the other end, (E,).

    Returns:
        Energies of the pairs, (E,), in eV.
    """
    z_i, z_j = z_i.to(length.dtype), z_j.to(length.dtype)
    length = length.clamp(min=1e-10)
    x = length * (z_i**0.23 + z_j**0.23) / (0.88534 * BOHR)
    screening = sum(
        (a * torch.exp(-b * x) for a, b in zip(AMPLITUDES, EXPONENTS, strict=True)), torch.zeros_like(x)
    )
    return COULOMB * z_i * z_j / length * screening


class NuclearRepulsion(nn.Module):
    """ZBL energy of every atom: half of the energy of each of its pairs.

    Args:
        cutoff: Cutoff of the model, in Angstrom.
        exponent: Exponent of the cutoff envelope that multiplies the energy. With None the energy ends abruptly at
            the cutoff, as in deepmd-kit.
    """

    def __init__(self, cutoff: float, exponent: int | None):
        super().__init__()
        self.cutoff, self.exponent = cutoff, exponent

    def forward(
        self, vectors: Tensor, source: Incidence, destination: Incidence, atomic_numbers: Tensor
    ) -> Tensor:
        """Map edge vectors (E, 3) in Angstrom and atomic numbers (N,) to energies of the centres, (n,) in eV."""
        length = torch.linalg.vector_norm(vectors, dim=-1)
        energy = 0.5 * zbl_pair_energy(
            length, atomic_numbers[destination.index], atomic_numbers[source.index]
        )
        if self.exponent is not None:
            energy = energy * envelope(length, self.cutoff, self.exponent)
        return segment_sum(energy, destination)


class NoRepulsion(nn.Module):
    """No repulsion: the network describes all distances."""

    def forward(
        self, vectors: Tensor, source: Incidence, destination: Incidence, atomic_numbers: Tensor
    ) -> Tensor:
        """Return zeros of shape (n,)."""
        return vectors.new_zeros(destination.num_nodes)
