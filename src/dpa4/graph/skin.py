"""Verlet skin: a neighbour search beyond the cutoff, which is repeated only after atoms have moved."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpa4.graph.graph import Graph
from dpa4.graph.lattice import check_cutoff
from dpa4.graph.neighbors import build_graph, within_cutoff
from dpa4.system import own_settings

SKIN = 0.5  # Angstrom
ROUNDING = 1e-9  # Angstrom, far above rounding errors of the bound; with a smaller skin every step searches


class SkinnedNeighbors:
    """Neighbour search for a moving structure; the edges and their order are those of ``build_graph``.

    A search stores the edges up to cutoff + skin, and each step selects those within the cutoff. Let F be the
    deformation of the cell since the search, s its smallest singular value, and u the largest distance of an
    atom from the position to which F and a common translation carry it. A pair that was farther apart than
    cutoff + skin is now farther apart than s (cutoff + skin) - 2 u. The search is repeated when this bound
    falls below the cutoff, or when the number of atoms, the elements or the periodicity change. In a constant
    cell, this means that an atom has moved by half the skin. Wrapping an atom to the other side of the cell
    counts as a move.
    """

    def __init__(self, cutoff: float, skin: float = SKIN, device: torch.device | str = "cpu"):
        """Set the lengths; the first search happens at the first call of ``graph``.

        Args:
            cutoff: Cutoff radius, in Angstrom.
            skin: Length added to the cutoff in a search, in Angstrom; with 0 every step searches.
            device: Device of the graphs.

        Raises:
            ValueError: If the cutoff is not positive, or the skin negative or not finite.
        """
        check_cutoff(cutoff)
        if not 0 <= skin < np.inf:
            raise ValueError(f"the skin must be a distance >= 0 in Angstrom, got {skin}")
        self.cutoff, self.skin, self.device = cutoff, skin, torch.device(device)
        self.searches = 0  # number of searches so far
        self._last: _Search | None = None

    @own_settings
    def graph(
        self,
        atomic_numbers: Any,
        positions: Any,
        cell: Any,
        pbc: Any,
        charge_spin: tuple[int, int] = (0, 1),
    ) -> Graph:
        """Build the graph of the current structure; arguments and errors are those of ``build_graph``.

        Displacements are computed on the device of the positions.
        """
        numbers, places = _tensor(atomic_numbers, torch.int64), _tensor(positions, torch.float64)
        lattice, periodic = _array(cell, np.float64), _array(pbc, bool)
        last = self._last
        if last is None or not last.holds(numbers, places, lattice, periodic, self.cutoff, self.skin):
            self._last = None  # if the new structure is rejected, no stale list remains
            radius = self.cutoff + self.skin
            wide = build_graph(numbers, places, lattice, periodic, radius, charge_spin, self.device)
            self._last = _Search(numbers, places, lattice, periodic, charge_spin, wide)
            self.searches += 1
        else:
            wide = last.graph._replace(positions=places.to(self.device))
            if not np.array_equal(lattice, last.cell):
                wide = wide._replace(cell=torch.from_numpy(lattice)[None].to(self.device))
            if charge_spin != last.charge_spin:
                wide = wide._replace(charge_spin=torch.tensor([charge_spin], device=self.device))
        return within_cutoff(wide, self.cutoff)


@dataclass(frozen=True)
class _Search:
    """Structure at the time of a search, and its graph up to cutoff + skin."""

    numbers: Tensor
    positions: Tensor
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    charge_spin: tuple[int, int]
    graph: Graph

    def holds(
        self, numbers: Tensor, positions: Tensor, cell: NDArray, pbc: NDArray, cutoff: float, skin: float
    ) -> bool:
        """Return whether the stored edges contain all pairs within the cutoff; False for invalid structures."""
        if (numbers.device, positions.device) != (self.numbers.device, self.positions.device):
            return False
        if positions.shape != self.positions.shape or not torch.equal(numbers, self.numbers):
            return False
        if cell.shape != self.cell.shape or not np.isfinite(cell).all() or not np.array_equal(pbc, self.pbc):
            return False
        if len(numbers) == 0:
            return True
        carried, stretch = self.positions, 1.0
        if not np.array_equal(cell, self.cell):
            deformation = _deformation(
                np.where(pbc[:, None], self.cell, 0.0), np.where(pbc[:, None], cell, 0.0)
            )
            stretch = float(np.linalg.svd(deformation, compute_uv=False)[-1])
            carried = carried @ torch.from_numpy(deformation).to(carried.device)
        moved = positions - carried
        moved -= moved.mean(0)
        farthest = float(moved.square().sum(1).amax().sqrt())
        return stretch * (cutoff + skin) - 2 * farthest >= cutoff + ROUNDING  # False for nan


def _deformation(old: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deformation F (3, 3) with old F = new; the identity on directions orthogonal to the rows of old."""
    return np.eye(3) + np.linalg.pinv(old) @ (new - old)


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """Copy to a tensor on the device of the values."""
    if isinstance(values, Tensor):
        return values.to(dtype, copy=True)
    return torch.from_numpy(np.array(values, dtype=np.int64 if dtype == torch.int64 else np.float64))


def _array(values: Any, dtype: type) -> NDArray:
    """Copy to an array on the host."""
    return np.array(values.cpu().numpy() if isinstance(values, Tensor) else values, dtype=dtype)
