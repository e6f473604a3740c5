"""Neighbour lists and graphs: every pair of atoms within the cutoff, over all periodic images.

Candidate pairs come from vesin on a CPU and from a cell list in torch operations on accelerators. One formula
in float64 then selects the edges, so that both searches return the same ones, sorted by destination, source
and shift:

    0 < |r_j + S cell - r_i| <= cutoff
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from vesin import NeighborList

from dpa4.graph.cell_list import candidate_pairs
from dpa4.graph.graph import Graph
from dpa4.graph.lattice import check_cutoff, check_positions, completed, periodic_lattice
from dpa4.system import own_settings

MIN_DISTANCE = 1e-5  # Angstrom; closer atoms are the same atom entered twice
SEARCH_MARGIN = 1 + 1e-6  # enlarges the radius of a search, whose rounding differs from the formula here


class Neighbors(NamedTuple):
    """Directed edges of one structure, sorted by destination, source and shift."""

    source: NDArray[np.int64]  # (E,) neighbour j
    destination: NDArray[np.int64]  # (E,) centre i
    shift: NDArray[np.int64]  # (E, 3) whole cell vectors added to the neighbour


def neighbor_list(positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike, cutoff: float) -> Neighbors:
    """Find all directed pairs with a distance of at most the cutoff.

    Positions may lie outside the cell, the cell may be skewed or smaller than the cutoff (an atom then has
    its own images as neighbours), and any subset of the axes may be periodic.

    Args:
        positions: Atom positions (N, 3), in Angstrom.
        cell: Cell vectors as rows (3, 3), in Angstrom; rows of non-periodic axes are ignored.
        pbc: Periodicity of the three axes (3,).
        cutoff: Cutoff radius, in Angstrom; a pair at exactly this distance is included.

    Raises:
        ValueError: If a shape is wrong, a number is not finite, the cutoff is not positive, a periodic cell
            vector is zero or nearly in the plane of the others, or two atoms coincide.
    """
    positions = np.ascontiguousarray(positions, dtype=np.float64)
    check_positions(torch.from_numpy(positions))
    lattice, periodic = periodic_lattice(cell, pbc)
    check_cutoff(cutoff)
    if len(positions) == 0:
        return Neighbors(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64))

    full_cell, heights = completed(lattice, periodic)
    compact, extents = _closed_gaps(positions, full_cell, periodic, 2 * cutoff)
    radius = _search_radius(np.where(periodic, heights, extents), cutoff * SEARCH_MARGIN)
    search = NeighborList(cutoff=radius, full_list=True, sorted=False, n_threads=1)
    i, j, shift = search.compute(compact, lattice, periodic, "ijS")
    i, j, shift = i.astype(np.int64), j.astype(np.int64), shift.astype(np.int64)
    squared = _squared_lengths(
        torch.from_numpy(positions),
        torch.from_numpy(lattice),
        torch.from_numpy(j),
        torch.from_numpy(i),
        torch.from_numpy(shift).double(),
    ).numpy()
    keep = np.flatnonzero(squared <= cutoff * cutoff)
    keep = keep[_order(i[keep], j[keep], shift[keep])]
    i, j, shift = i[keep], j[keep], shift[keep]
    _check_coincident(torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(squared[keep]))
    return Neighbors(j, i, shift)


def neighbor_list_torch(
    positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float, structure: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the pairs of ``neighbor_list`` on the device of the positions, for one or several structures.

    Memory is linear in the number of atoms and edges and independent of the extent of the structure.

    Args:
        positions: Atom positions (N, 3) float64, in Angstrom.
        cell: Cell vectors as rows (3, 3), or (B, 3, 3) for several structures, in Angstrom.
        pbc: Periodicity of the three axes (3,), or (B, 3) for several structures.
        cutoff: Cutoff radius, in Angstrom; a pair at exactly this distance is included.
        structure: Index of the structure of each atom (N,) int64, ascending; None for one structure.

    Returns:
        source: Neighbours j (E,) int64.
        destination: Centres i (E,) int64, ascending.
        shift: Whole cell vectors added to the neighbour (E, 3) float64.

    Raises:
        ValueError: As for ``neighbor_list``, or if the shapes do not match.
    """
    positions = positions.double()
    check_positions(positions)
    if structure is not None and (structure.shape != positions.shape[:1] or cell.shape[0] != pbc.shape[0]):
        raise ValueError(
            f"structure {tuple(structure.shape)}, cell {tuple(cell.shape)} and pbc {tuple(pbc.shape)} do not match "
            f"each other or {len(positions)} positions"
        )
    lattice, periodic = periodic_lattice(cell.cpu().numpy(), pbc.cpu().numpy())
    if structure is None:
        structure = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
        lattice, periodic = lattice[None], periodic[None]
    check_cutoff(cutoff)
    if len(positions) == 0:
        none = structure.new_zeros(0)
        return none, none, positions.new_zeros(0, 3)

    destination, source, shift = candidate_pairs(
        positions, lattice, periodic, structure, cutoff * SEARCH_MARGIN
    )
    vectors = torch.from_numpy(lattice).to(positions.device)
    rows = vectors[0] if len(vectors) == 1 else vectors[structure[destination]]
    squared = _squared_lengths(positions, rows, source, destination, shift)
    keep = (squared <= cutoff * cutoff).nonzero().squeeze(1)
    source, destination = source[keep], destination[keep]
    _check_coincident(destination, source, squared[keep])
    return source, destination, shift[keep]


@own_settings
def build_graph(
    atomic_numbers: ArrayLike,
    positions: ArrayLike,
    cell: ArrayLike,
    pbc: ArrayLike,
    cutoff: float,
    charge_spin: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> Graph:
    """Build the graph of one structure.

    Args:
        atomic_numbers: Atomic numbers (N,).
        positions: Atom positions (N, 3), in Angstrom.
        cell: Cell vectors as rows (3, 3), in Angstrom.
        pbc: Periodicity of the three axes (3,).
        cutoff: Cutoff radius, in Angstrom.
        charge_spin: Total charge in e and spin multiplicity 2S + 1.
        device: Device of the neighbour search and of the graph; the arguments may be tensors on any device.

    Raises:
        ValueError: As for ``neighbor_list``, or if the numbers of atomic numbers and positions differ.
    """
    device = torch.device(device)
    numbers = _copied(atomic_numbers, torch.int64, device)
    places = _copied(positions, torch.float64, device)
    rows = _copied(cell, torch.float64, device)
    if numbers.shape != places.shape[:1]:
        raise ValueError(
            f"atomic_numbers {tuple(numbers.shape)} do not match positions {tuple(places.shape)}"
        )
    if device.type == "cuda":
        periodic = torch.as_tensor(np.asarray(_on_host(pbc), dtype=bool))
        source, destination, shift = neighbor_list_torch(places, rows, periodic, cutoff)
    else:
        found = neighbor_list(places.numpy(), rows.numpy(), _on_host(pbc), cutoff)
        source, destination = torch.from_numpy(found.source), torch.from_numpy(found.destination)
        shift = torch.from_numpy(found.shift).double()
    return Graph(
        atomic_numbers=numbers,
        positions=places,
        cell=rows[None],
        structure=torch.zeros_like(numbers),
        source=source,
        destination=destination,
        shift=shift,
        charge_spin=torch.tensor([charge_spin], dtype=torch.int64, device=device),
    )


def within_cutoff(graph: Graph, cutoff: float) -> Graph:
    """Remove the edges of a graph that are longer than a cutoff at the current positions.

    A graph built with cutoff + skin remains complete until an atom has moved by half the skin. Until then the
    result equals a newly built graph, including the order of the edges.

    Args:
        graph: The graph.
        cutoff: Cutoff radius, in Angstrom.

    Raises:
        ValueError: If two atoms coincide.
    """
    rows = graph.cell[0] if graph.num_structures == 1 else graph.cell[graph.structure[graph.destination]]
    squared = _squared_lengths(graph.positions, rows, graph.source, graph.destination, graph.shift)
    keep = (squared <= cutoff * cutoff).nonzero().squeeze(1)
    source, destination = graph.source.index_select(0, keep), graph.destination.index_select(0, keep)
    _check_coincident(destination, source, squared.index_select(0, keep))
    return graph._replace(source=source, destination=destination, shift=graph.shift.index_select(0, keep))


def _squared_lengths(
    positions: Tensor, rows: Tensor, source: Tensor, destination: Tensor, shift: Tensor
) -> Tensor:
    """Squared edge lengths (E,), identical to the last bit on every device; ``rows`` is (3, 3) or (E, 3, 3).

    Every operation is rounded once, in a fixed order; a matrix product could fuse or reorder operations.
    """
    columns = positions.t().contiguous()
    x, y, z = (
        columns[a].index_select(0, source)
        - columns[a].index_select(0, destination)
        + shift[:, 0] * rows[..., 0, a]
        + shift[:, 1] * rows[..., 1, a]
        + shift[:, 2] * rows[..., 2, a]
        for a in range(3)
    )
    return x * x + y * y + z * z


def _order(i: NDArray[np.int64], j: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    """Permutation that sorts edges by destination, source and shift."""
    columns = [i, j, *shift.T]
    if len(i) == 0:
        return i
    lows = [int(c.min()) for c in columns]
    widths = [int(c.max()) - low + 1 for c, low in zip(columns, lows, strict=True)]
    if np.prod([float(w) for w in widths]) >= 2**62:  # the key below would overflow
        return np.lexsort(columns[::-1])
    key = columns[0] - lows[0]
    for column, low, width in zip(columns[1:], lows[1:], widths[1:], strict=True):
        key = key * width + (column - low)
    return np.argsort(key)


def _copied(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a tensor or array-like to the device."""
    if not isinstance(values, Tensor):
        values = torch.from_numpy(
            np.asarray(values).astype(np.float64 if dtype == torch.float64 else np.int64)
        )
    return values.to(device, dtype, copy=True)


def _on_host(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def _closed_gaps(
    positions: NDArray[np.float64], full_cell: NDArray[np.float64], pbc: NDArray[np.bool_], gap: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shorten gaps between fragments along non-periodic directions to ``gap``.

    Pairs within half the gap do not change. An atom that has flown far away from its molecule then no longer
    inflates the cell list, which at extreme extents aborts the process (vesin 0.6.2).

    Returns:
        Positions (N, 3), and their extent along each non-periodic axis (3,).
    """
    extents = np.zeros(3)
    for axis in np.flatnonzero(~pbc):  # unit vectors, orthogonal to all other rows
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
    """Enlarge ``radius`` until the cell list of vesin works.

    Beyond 1e5 cells, vesin 0.6.2 coarsens all axes by the same factor. In a very large structure that is thin
    along one axis, no cell is left along that axis and vesin divides by zero. A larger radius results in
    fewer cells.
    """
    while True:
        cells = np.maximum(extents // radius, 1.0)
        if cells.min() >= 2 * np.cbrt(cells.prod() / 1e5) or cells.prod() < 5e4:
            return radius
        radius *= 1.2


def _check_coincident(i: Tensor, j: Tensor, squared: Tensor) -> None:
    """Raise a ValueError if two atoms coincide."""
    same = squared < MIN_DISTANCE**2
    if same.any():
        edge = int(same.nonzero()[0])
        a, b = sorted((int(i[edge]), int(j[edge])))
        distance = float(squared[edge].sqrt())
        raise ValueError(f"atoms {a} and {b} coincide (distance {distance:.1e} Angstrom); remove one of them")
