"""Checks of positions, cells and cutoffs for neighbour searches, and completion of partly periodic cells."""

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Array = NDArray[np.float64]

MIN_HEIGHT = 0.1  # Angstrom; an atom cannot be this close to its own periodic image
# Largest coordinates and cell vectors, in Angstrom. vesin 0.6.2 counts cell vectors in 32 bits, so that beyond 2**31
# MIN_HEIGHT it finds too few neighbours of an atom outside its cell (measured: from 1e10 on in a cell of 7 Angstrom);
# at 1e306 it divides by zero, which ends the process. A search in a cell with one vector of 1e6 takes 0.1 s, with 1e7
# 5 s, with 1e8 it does not end.
MAX_COORDINATE = 1e8
MAX_CELL_VECTOR = 1e6


def check_cutoff(cutoff: float) -> None:
    """Raise a ValueError unless the cutoff is a positive, finite length in Angstrom."""
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"the cutoff must be a positive length in Angstrom, got {cutoff}")


def check_positions(positions: Tensor) -> None:
    """Raise a ValueError unless positions are finite, of shape (N, 3) and within ``MAX_COORDINATE`` of the origin."""
    if positions.dim() != 2 or positions.shape[1] != 3:
        raise ValueError(f"positions must have the shape (atoms, 3), got {tuple(positions.shape)}")
    inside = (positions.abs() <= MAX_COORDINATE).all(1)  # false for nan
    if not inside.all():
        atom = int((~inside).nonzero()[0])
        what = (
            f"is beyond {MAX_COORDINATE:g} Angstrom" if positions[atom].isfinite().all() else "is not finite"
        )
        raise ValueError(
            f"the position of atom {atom} {what}: {positions[atom].tolist()}; correct or remove it"
        )


def periodic_lattice(cell: ArrayLike, pbc: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """Zero the cell vectors of non-periodic axes.

    Args:
        cell: Cell vectors as rows (..., 3, 3), in Angstrom.
        pbc: Periodicity of the axes (..., 3).

    Returns:
        Cell vectors (..., 3, 3) float64 and periodicity (..., 3), as arrays.

    Raises:
        ValueError: If the shapes do not match, the cell is not finite, or a periodic cell vector is longer than
            ``MAX_CELL_VECTOR``.
    """
    cell, periodic = np.asarray(cell, dtype=np.float64), np.asarray(pbc, dtype=bool)
    if cell.shape != (*periodic.shape, 3) or periodic.shape[-1:] != (3,):
        raise ValueError(
            f"cell must have shape (3, 3) and pbc shape (3,), got {cell.shape} and {periodic.shape}"
        )
    if not np.isfinite(cell).all():
        bad = next(one for one in cell.reshape(-1, 3, 3) if not np.isfinite(one).all())
        raise ValueError(f"the cell is not finite: {bad.tolist()}")
    lattice = np.where(periodic[..., None], cell, 0.0)
    if (large := np.abs(lattice) > MAX_CELL_VECTOR).any():
        value = lattice[large][0]
        raise ValueError(
            f"a cell vector has the component {value:g}, beyond {MAX_CELL_VECTOR:g} Angstrom; correct it"
        )
    return lattice, periodic


def right_handed(cell: Array) -> Array:
    """Cell vectors (3, 3) of the same lattice in right-handed order: all three are reversed if they are left-handed.

    Some packages refuse left-handed cells, whose determinant is negative. Positions in Angstrom stay as they are.
    """
    return -cell if np.linalg.det(cell) < 0 else cell


def completed(lattice: Array, pbc: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Replace the cell vectors of non-periodic axes by orthogonal unit vectors.

    Args:
        lattice: Cell vectors as rows (..., 3, 3), in Angstrom; zero for non-periodic axes.
        pbc: Periodicity of the axes (..., 3).

    Returns:
        Cells (..., 3, 3), and the distances between opposite faces of the cells (..., 3), in Angstrom.

    Raises:
        ValueError: If a periodic cell vector is zero or nearly in the plane of the others.
    """
    rows, periodic = lattice.reshape(-1, 3, 3), pbc.reshape(-1, 3)
    lengths = np.linalg.norm(rows, axis=2)
    axes = periodic.sum(1)
    regular = np.linalg.matrix_rank(rows) == axes
    full = np.where((regular & (axes > 0))[:, None, None], rows, np.eye(3))
    for one in np.flatnonzero(regular & (axes > 0) & (axes < 3)):
        full[one] = complete_cell(rows[one])
    heights = np.where(regular[:, None], 1 / np.linalg.norm(np.linalg.inv(full), axis=1), 0.0)
    zero = np.any(periodic & (lengths == 0), axis=1, keepdims=True)
    heights = np.where(zero, lengths, heights)
    if (flat := periodic & (heights < MIN_HEIGHT)).any():
        one, axis = np.argwhere(flat)[0]
        raise ValueError(
            f"axis {axis} is periodic but its cell vector {rows[one, axis].tolist()} is zero or nearly in the "
            f"plane of the others (faces {heights[one, axis]:.3g} Angstrom apart); correct the cell, reduce it "
            "(ase.geometry.minkowski_reduce) or make the axis non-periodic"
        )
    return full.reshape(lattice.shape), heights.reshape(pbc.shape)
