"""Neighbour lists: every pair of atoms within the cutoff, over all periodic images.

The search is vesin's; which pairs belong to the list is decided here, in float64, so that the list has the
edges of the definition 0 < |r_j + S cell - r_i| <= cutoff and no others.
"""

from typing import NamedTuple

import numpy as np
import torch
from ase.geometry import complete_cell
from numpy.typing import ArrayLike, NDArray
from vesin import NeighborList

from dpa4.graph.graph import Graph

MIN_DISTANCE = 1e-5  # Angstrom: closer atoms are one atom given twice
MIN_HEIGHT = 0.1  # Angstrom: an atom cannot have its own periodic image this near


class Neighbors(NamedTuple):
    """Directed edges of one structure, sorted by destination."""

    source: NDArray[np.int64]  # (E,) neighbour j
    destination: NDArray[np.int64]  # (E,) centre i
    shift: NDArray[np.int64]  # (E, 3) whole cell vectors added to the neighbour


def neighbor_list(positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float) -> Neighbors:
    """Find all directed pairs with a distance of at most the cutoff.

    Positions may lie outside the cell, the cell may be skewed or smaller than the cutoff (an atom then has
    its own images as neighbours), and any of its axes may be periodic.

    Args:
        positions: Atom positions (N, 3), in Angstrom.
        cell: Cell vectors as rows (3, 3), in Angstrom; rows of axes that are not periodic are not used.
        pbc: Periodicity of the three axes (3,).
        cutoff: Cutoff radius, in Angstrom; a pair at exactly this distance is kept.

    Raises:
        ValueError: If a shape is wrong, a number is not finite, the cutoff is not positive, a periodic cell
            vector is zero or nearly in the plane of the others, or two atoms coincide.
    """
    positions, cell, pbc = _checked(positions, cell, pbc)
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"the cutoff must be a positive length in Angstrom, got {cutoff}")
    if len(positions) == 0:
        return Neighbors(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64))

    lattice = np.where(pbc[:, None], cell, 0.0)
    full_cell, heights = _completed(lattice, pbc)
    compact, extents = _closed_gaps(positions, full_cell, pbc, 2 * cutoff)
    radius = _search_radius(np.where(pbc, heights, extents), cutoff * (1 + 1e-6))
    search = NeighborList(cutoff=radius, full_list=True, sorted=True, n_threads=1)
    i, j, shift = search.compute(compact, lattice, pbc, "ijS")
    vectors = positions[j] + shift @ lattice - positions[i]
    squared = np.einsum("ei,ei->e", vectors, vectors)
    _refuse_coincident(i, j, squared)
    keep = squared <= cutoff * cutoff
    return Neighbors(j[keep].astype(np.int64), i[keep].astype(np.int64), shift[keep].astype(np.int64))


def build_graph(
    atomic_numbers: ArrayLike,
    positions: ArrayLike,
    cell: ArrayLike,
    pbc: ArrayLike,
    cutoff: float,
    charge_spin: tuple[int, int] = (0, 1),
) -> Graph:
    """Build the graph of one structure on the CPU.

    Args:
        atomic_numbers: Nuclear charges (N,).
        positions: Atom positions (N, 3), in Angstrom.
        cell: Cell vectors as rows (3, 3), in Angstrom.
        pbc: Periodicity of the three axes (3,).
        cutoff: Cutoff radius, in Angstrom.
        charge_spin: Total charge in e and spin multiplicity 2S + 1.

    Raises:
        ValueError: As ``neighbor_list``, or if there is not one atomic number per position.
    """
    numbers = np.asarray(atomic_numbers, dtype=np.int64)
    positions = np.asarray(positions, dtype=np.float64)
    if numbers.shape != positions.shape[:1]:
        raise ValueError(f"atomic_numbers {numbers.shape} do not fit positions {positions.shape}")
    neighbors = neighbor_list(positions, cell, pbc, cutoff)
    return Graph(
        atomic_numbers=torch.tensor(numbers),
        positions=torch.tensor(positions),
        cell=torch.tensor(np.asarray(cell, dtype=np.float64))[None],
        structure=torch.zeros(len(numbers), dtype=torch.int64),
        source=torch.from_numpy(neighbors.source),
        destination=torch.from_numpy(neighbors.destination),
        shift=torch.from_numpy(neighbors.shift.astype(np.float64)),
        charge_spin=torch.tensor([charge_spin], dtype=torch.int64),
    )


def within_cutoff(graph: Graph, cutoff: float) -> Graph:
    """Keep the edges of a graph that are at most ``cutoff`` (Angstrom) long at its present positions.

    A graph built with cutoff + skin stays complete until an atom has moved by half the skin; until then this
    reduces it to the exact edges.
    """
    keep = graph.edge_vectors().square().sum(1) <= cutoff * cutoff
    return graph._replace(
        source=graph.source[keep], destination=graph.destination[keep], shift=graph.shift[keep]
    )


def _checked(
    positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Arrays of the right type and shape."""
    positions = np.ascontiguousarray(positions, dtype=np.float64)
    cell = np.ascontiguousarray(cell, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"positions must have the shape (atoms, 3), got {positions.shape}")
    if cell.shape != (3, 3) or periodic.shape != (3,):
        raise ValueError(f"cell must be (3, 3) and pbc (3,), got {cell.shape} and {periodic.shape}")
    if len(broken := np.flatnonzero(~np.isfinite(positions).all(1))):
        raise ValueError(f"the position of atom {broken[0]} is not finite: {positions[broken[0]]}")
    if not np.isfinite(cell).all():
        raise ValueError(f"the cell is not finite: {cell.tolist()}")
    return positions, cell, periodic


def _completed(
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


def _closed_gaps(
    positions: NDArray[np.float64], full_cell: NDArray[np.float64], pbc: NDArray[np.bool_], gap: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move fragments that are farther apart than ``gap`` along a non-periodic direction together to this gap.

    No pair within half the gap changes, but an atom that left a molecule and flew far away no longer blows up
    the cell list, which aborts the process at extreme extents (vesin 0.6.2).

    Returns:
        The positions (N, 3), and their extent along each axis that is not periodic (3,).
    """
    extents = np.zeros(3)
    for axis in np.flatnonzero(~pbc):  # these rows are orthogonal to all others, of unit length
        direction = full_cell[axis]
        height = positions @ direction
        order = np.argsort(height, kind="stable")
        steps = np.diff(height[order], prepend=height[order[0]])
        excess = np.empty_like(height)
        excess[order] = np.cumsum(np.maximum(steps - gap, 0.0))
        positions = positions - excess[:, None] * direction
        extents[axis] = np.ptp(height - excess)
    return positions, extents


def _search_radius(extents: NDArray[np.float64], radius: float) -> float:
    """Smallest radius of at least ``radius`` for which vesin's cell list works.

    Beyond 1e5 cells, vesin 0.6.2 coarsens all axes alike, down to none along a thin axis of a very large
    structure, and divides by zero. A larger radius gives fewer cells.
    """
    while True:
        cells = np.maximum(extents // radius, 1.0)
        if cells.min() >= 2 * np.cbrt(cells.prod() / 1e5) or cells.prod() < 5e4:
            return radius
        radius *= 1.2


def _refuse_coincident(i: NDArray, j: NDArray, squared: NDArray[np.float64]) -> None:
    """Error for two atoms at one place."""
    if len(same := np.flatnonzero(squared < MIN_DISTANCE**2)):
        a, b = sorted((int(i[same[0]]), int(j[same[0]])))
        distance = np.sqrt(squared[same[0]])
        raise ValueError(f"atoms {a} and {b} coincide (distance {distance:.1e} Angstrom); remove one of them")
