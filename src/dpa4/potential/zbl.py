"""Ziegler-Biersack-Littmark nuclear repulsion (model-3 section 10.1)."""

import torch
from torch import Tensor

from dpa4.model.radial import envelope

COULOMB = 14.3996  # e^2 / (4 pi epsilon_0), eV Angstrom
BOHR = 0.5291772109  # Angstrom
AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.028171)
EXPONENTS = (3.1998, 0.94229, 0.4029, 0.20162)


def zbl_pair_energy(length: Tensor, z_i: Tensor, z_j: Tensor) -> Tensor:
    """Universal screened repulsion of nuclei.

    Args:
        length: Distances, (E,), in Angstrom.
        z_i: Atomic numbers of one end, (E,).
        z_j: Atomic numbers of the other end, (E,).

    Returns:
        (E,), in eV.
    """
    z_i, z_j = z_i.to(length.dtype), z_j.to(length.dtype)
    length = length.clamp(min=1e-10)
    x = length * (z_i**0.23 + z_j**0.23) / (0.88534 * BOHR)
    screening = sum(
        (a * torch.exp(-b * x) for a, b in zip(AMPLITUDES, EXPONENTS, strict=True)), torch.zeros_like(x)
    )
    return COULOMB * z_i * z_j / length * screening


def zbl_edge_energy(vectors: Tensor, z_i: Tensor, z_j: Tensor, cutoff: float, exponent: int | None) -> Tensor:
    """Half the pair energy for each directed edge (E, 3), so that a pair counts once.

    ``exponent`` is that of the cutoff envelope; None cuts off abruptly, as the reference does.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1)
    energy = 0.5 * zbl_pair_energy(length, z_i, z_j)
    return energy if exponent is None else energy * envelope(length, cutoff, exponent)
