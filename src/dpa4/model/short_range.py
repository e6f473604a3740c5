"""Short range of a potential: Ziegler-Biersack-Littmark (ZBL) repulsion of nuclei where data end.

See docs/theory.md, "ZBL bridging". `short_range` builds the module that a configuration asks for. Every module
maps the edge vectors to the vectors that the network sees and to the analytic energy of every centre.
"""

from collections.abc import Mapping
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from torch import Tensor, nn

from dpa4.model.config import ModelConfig, PairBridging, pair_names
from dpa4.model.edges import smooth_step, softened_length
from dpa4.model.radial import envelope
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import segment_sum

COULOMB = 14.3996  # e^2 / (4 pi epsilon_0), eV Angstrom
BOHR = 0.5291772109  # Angstrom
# Universal screening function: the sum of AMPLITUDES * exp(-EXPONENTS * x) at the reduced distance x.
AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.028171)
EXPONENTS = (3.1998, 0.94229, 0.4029, 0.20162)

OUTER = 0.9
"""Upper end of the window of a pair, relative to the shortest distance in the training data.

The margin is for structures that are a little hotter than the data: C-H bonds in a trajectory of 1,200 K are
compressed to 0.9 of the shortest ones at 300 K.
"""

FROZEN = 0.7
"""Distance below which the network sees a fixed length, relative to the upper end of the window."""

FULL, FULL_FAR = 0.5, 0.7
"""Distance below which the repulsion is complete, relative to the upper end of the window.

Within the sum of the covalent radii, a repulsion that sets in faster would be steeper than that of bare nuclei. Pairs
whose window ends farther out, such as H-H in molecules, have a weak repulsion there, which must set in early.
"""

UNSEEN = 0.75
"""Upper end of the window of a pair without data, relative to the sum of the covalent radii."""

LOWEST = 0.5
"""Lowest upper end of a window relative to the sum of the covalent radii, however close the atoms in the data are."""


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
    return COULOMB * z_i * z_j / length * universal_screening(x)


def universal_screening(x: Tensor) -> Tensor:
    """Screening of the Coulomb energy at reduced distances x, of any shape."""
    terms = (a * torch.exp(-b * x) for a, b in zip(AMPLITUDES, EXPONENTS, strict=True))
    return sum(terms, torch.zeros_like(x))


def pair_bridging(
    shortest: Mapping[tuple[str, str], float], elements: tuple[str, ...], cutoff: float
) -> PairBridging:
    """Choose the window of every pair of elements from the distances in the training data.

    A window ends at `OUTER` times the shortest distance of the pair in the data, so the potential is the network
    alone wherever there are data. Without data it ends at `UNSEEN` times the sum of the covalent radii. No window
    ends below `LOWEST` times that sum: a single structure with two atoms that nearly coincide must not open a hole.

    Args:
        shortest: Shortest distance of each pair of elements in the training data, in Angstrom.
        elements: Chemical symbols of the elements of the model.
        cutoff: Cutoff of the model, in Angstrom.
    """
    outer, full = {}, {}
    for name, (a, b) in pair_names(elements).items():
        radii = float(covalent_radii[atomic_numbers[a]] + covalent_radii[atomic_numbers[b]])
        found = shortest.get((a, b), shortest.get((b, a)))
        end = UNSEEN * radii if found is None else max(OUTER * found, LOWEST * radii)
        outer[name] = round(min(end, OUTER * cutoff), 6)
        full[name] = round((FULL if outer[name] < radii else FULL_FAR) * outer[name], 6)
    return PairBridging(outer=outer, frozen=FROZEN, full=full)


class NetworkAlone(nn.Module):
    """No repulsion: the network describes all distances."""

    def forward(
        self, vectors: Tensor, source: Incidence, destination: Incidence, atomic_numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the vectors (E, 3) unchanged, and zeros of shape (n,)."""
        return vectors, vectors.new_zeros(destination.num_nodes)


class ZoneBridging(NetworkAlone):
    """Repulsion at all distances, with one zone for all pairs in which the network itself freezes.

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
    ) -> tuple[Tensor, Tensor]:
        """Return the vectors (E, 3) unchanged, and the energies of the centres, (n,) in eV."""
        length = torch.linalg.vector_norm(vectors, dim=-1)
        energy = 0.5 * zbl_pair_energy(
            length, atomic_numbers[destination.index], atomic_numbers[source.index]
        )
        if self.exponent is not None:
            energy = energy * envelope(length, self.cutoff, self.exponent)
        return vectors, segment_sum(energy, destination)


class PairRange(NetworkAlone):
    """A window per pair of elements: the network ends where the training data begin, and the repulsion takes over.

    Args:
        elements: Chemical symbols of the elements of the model.
        bridging: Windows of their pairs.
    """

    row: Tensor
    windows: Tensor

    def __init__(self, elements: tuple[str, ...], bridging: PairBridging):
        super().__init__()
        row = torch.zeros(len(chemical_symbols), dtype=torch.int64)
        row[[atomic_numbers[e] for e in elements]] = torch.arange(len(elements))
        self.register_buffer("row", row, persistent=False)
        self.register_buffer("windows", _windows(elements, bridging), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "PairRange":
        """Move to a device; the windows stay float64."""
        windows = self.windows
        super()._apply(fn, recurse)
        self.windows = windows.to(self.windows.device)
        return self

    def forward(
        self, vectors: Tensor, source: Incidence, destination: Incidence, atomic_numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the vectors (E, 3), frozen in their windows, and the energies of the centres, (n,) in eV."""
        row = self.row[atomic_numbers]
        pair = row[destination.index] * len(self.windows) + row[source.index]
        frozen, full, outer, amplitude, screening = self.windows.flatten(0, 1)[pair].unbind(-1)
        length = softened_length(vectors)
        width = outer - frozen
        t = ((length - frozen) / width).clamp(0, 1)
        # The slope of the length that the network sees is the smooth step; at t = 1 the length is the true one.
        seen = frozen + width * (0.5 + t**5 * (7 + t * (-14 + t * (10 - 2.5 * t))))
        seen = torch.where(t < 1, seen, length)
        t = ((length - full) / (outer - full)).clamp(0, 1)
        energy = amplitude / length * universal_screening(length * screening) * (1 - smooth_step(t))
        return vectors * (seen / length)[:, None], segment_sum(energy, destination)


def _windows(elements: tuple[str, ...], bridging: PairBridging) -> Tensor:
    """Constants of every ordered pair of elements, (T, T, 5) float64.

    These are the distances below which the length is fixed and the repulsion is complete and the upper end of the
    window, in Angstrom, half of the Coulomb energy of the bare nuclei at 1 Angstrom in eV, and the inverse screening
    length in 1/Angstrom.
    """
    z = torch.tensor([atomic_numbers[e] for e in elements], dtype=torch.float64)
    outer, full = (torch.empty(len(z), len(z), dtype=torch.float64) for _ in range(2))
    for name, (a, b) in pair_names(elements).items():
        i, j = elements.index(a), elements.index(b)
        outer[i, j] = outer[j, i] = bridging.outer[name]
        full[i, j] = full[j, i] = bridging.full[name]
    charge = z**0.23
    screening = (charge[:, None] + charge) / (0.88534 * BOHR)
    amplitude = 0.5 * COULOMB * z[:, None] * z
    return torch.stack([bridging.frozen * outer, full, outer, amplitude, screening], dim=-1)


def short_range(config: ModelConfig) -> NetworkAlone:
    """Build the short range that a configuration asks for."""
    if config.bridging is None:
        return NetworkAlone()
    if isinstance(config.bridging, PairBridging):
        return PairRange(config.elements, config.bridging)
    return ZoneBridging(config.cutoff, config.env_exp.weight if config.bridging.smooth_cutoff else None)
