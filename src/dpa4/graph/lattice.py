"""What every neighbour search requires of positions and cells, and the geometry of the periodic axes."""

import numpy as np
import torch
from ase.geometry import complete_cell
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

MIN_HEIGHT = 0.1  # Angstrom: an atom cannot have its own periodic image this near


def check_cutoff(cutoff: float) -> None:
    """Error unless the cutoff is a positive length."""
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"the cutoff must be a positive length in Angstrom, got {cutoff}")


def check_positions(positions: Tensor) -> None:
    """Error unless positions are finite and of the shape (N, 3)."""
    if positions.dim() != 2 or positions.shape[1] != 3:
        raise ValueError(f"positions must have the shape (atoms, 3), got {tuple(positions.shape)}")
    finite = torch.isfinite(positions).all(1)
    if not finite.all():
        atom = int((~finite).nonzero()[0])
        raise ValueError(f"the position of atom {atom} is not finite: {positions[atom].tolist()}")


def periodic_lattice(cell: ArrayLike, pbc: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Cell vectors with zero rows for axes that are not periodic (3, 3), and the periodicity (3,)."""
    cell, periodic = np.asarray(cell, dtype=np.float64), np.asarray(pbc, dtype=bool)
    if cell.shape != (3, 3) or periodic.shape != (3,):
        raise ValueError(f"cell must be (3, 3) and pbc (3,), got {cell.shape} and {periodic.shape}")
    if not np.isfinite(cell).all():
        raise ValueError(f"the cell is not finite: {cell.tolist()}")
    return np.where(periodic[:, None], cell, 0.0), periodic


def completed(
    lattice: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Complete the periodic rows by orthogonal unit vectors; also the distances of opposite faces (3,)."""
    full, heights = lattice, np.linalg.norm(lattice, axis=1)
    if np.linalg.matrix_rank(lattice) == pbc.sum():
        full = complete_cell(lattice)
        heights = 1 / np.linalg.norm(np.linalg.inv(full), axis=0)
    elif (heights[pbc] > 0).all():
        heights = np.zeros(3)
    if (heights[pbc] < MIN_HEIGHT).any():
        axis = int(np.flatnonzero(pbc & (heights < MIN_HEIGHT))[0])
        raise ValueError(
            f"axis {axis} is periodic but its cell vector {lattice[axis].tolist()} is zero or nearly in the "
            f"plane of the others (faces {heights[axis]:.3g} Angstrom apart); correct the cell, reduce it "
            "(ase.geometry.minkowski_reduce) or make the axis non-periodic"
        )
    return full, heights
