"""Graph that a model evaluates: atoms of one or more structures and the directed edges within the cutoff."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Graph(NamedTuple):
    """B structures with N atoms and E directed edges in flat lists.

    A message flows source -> destination. Each pair within the cutoff has two edges, one in each direction.
    Every periodic image is an edge of its own, including images of the centre itself. Edges are sorted by
    destination; neighbour searches also sort the edges of one atom by source and shift.
    """

    atomic_numbers: Tensor  # (N,) int64
    positions: Tensor  # (N, 3) float64, Angstrom
    cell: Tensor  # (B, 3, 3) float64, cell vectors as rows in Angstrom; non-periodic rows are unused
    structure: Tensor  # (N,) int64, ascending: index of the structure of each atom
    source: Tensor  # (E,) int64, neighbour j
    destination: Tensor  # (E,) int64, centre i, ascending
    shift: Tensor  # (E, 3) float64, whole cell vectors added to the neighbour
    charge_spin: Tensor  # (B, 2) int64, total charge in e and spin multiplicity

    @property
    def num_structures(self) -> int:
        """Number of structures B."""
        return self.cell.shape[0]

    @property
    def num_atoms(self) -> int:
        """Number of atoms N."""
        return self.atomic_numbers.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of directed edges E."""
        return self.source.shape[0]

    @property
    def size(self) -> str:
        """The three numbers in words, for messages."""
        atoms = f"{self.num_atoms:,} atoms and {self.num_edges:,} edges"
        return atoms if self.num_structures == 1 else f"{self.num_structures:,} structures with {atoms}"

    def edge_vectors(self) -> Tensor:
        """Vectors r_j + S cell - r_i from centre to neighbour, (E, 3) float64 in Angstrom."""
        cell = self.cell[self.structure[self.destination]]
        # A batched matrix product would be several times slower on a GPU.
        image = (self.shift[:, :, None] * cell).sum(1)
        return self.positions[self.source] - self.positions[self.destination] + image

    def to(self, device: torch.device | str) -> "Graph":
        """Copy to a device."""
        # A copy to the CPU must be complete on return; a copy to an accelerator is ordered by its stream.
        non_blocking = torch.device(device).type != "cpu"
        return Graph(*(t.to(device, non_blocking=non_blocking) for t in self))

    def pin_memory(self) -> "Graph":
        """Copy to page-locked memory, from which copies to a GPU are asynchronous."""
        return Graph(*(t.pin_memory() for t in self))


def collate(graphs: Sequence[Graph]) -> Graph:
    """Join graphs into one, preserving the order of atoms and edges.

    Raises:
        ValueError: If there is no graph.
    """
    if not graphs:
        raise ValueError("collate needs at least one graph")
    atoms, structures = 0, 0
    structure, source, destination = [], [], []
    for g in graphs:
        structure.append(g.structure + structures)
        source.append(g.source + atoms)
        destination.append(g.destination + atoms)
        atoms += g.num_atoms
        structures += g.num_structures
    return Graph(
        atomic_numbers=torch.cat([g.atomic_numbers for g in graphs]),
        positions=torch.cat([g.positions for g in graphs]),
        cell=torch.cat([g.cell for g in graphs]),
        structure=torch.cat(structure),
        source=torch.cat(source),
        destination=torch.cat(destination),
        shift=torch.cat([g.shift for g in graphs]),
        charge_spin=torch.cat([g.charge_spin for g in graphs]),
    )


def first_atoms(graph: Graph, count: int) -> Graph:
    """Return the graph of the first ``count`` atoms and of the edges between them."""
    keep = (graph.source < count) & (graph.destination < count)
    return graph._replace(
        atomic_numbers=graph.atomic_numbers[:count],
        positions=graph.positions[:count],
        structure=graph.structure[:count],
        source=graph.source[keep],
        destination=graph.destination[keep],
        shift=graph.shift[keep],
    )
