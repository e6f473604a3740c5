"""Padding of graphs to a few standard sizes, so that one CUDA graph serves many structures."""

import torch

from dpa4.execution.limits import MAX_REPLAYED_ATOMS, SIZE_DIGITS
from dpa4.graph import Graph, collate


def replayed_size(atoms: int) -> int | None:
    """Padded number of atoms in the CUDA graph for a number of atoms; None if it would be too large."""
    size = rounded_up(atoms + 1)
    return size if size <= MAX_REPLAYED_ATOMS else None


def rounded_up(n: int, digits: int = SIZE_DIGITS) -> int:
    """Round up to a number with ``digits`` significant binary digits; with six digits by at most 1/32."""
    unit = _unit(n, digits)
    return -(-n // unit) * unit


class Buffers:
    """Buffers of padded size that hold one structure after another; ``graph`` is the last structure, padded by `pad`.

    Args:
        graph: The first structure; the others must be padded to the same sizes.
        cutoff: Cutoff of the model, in Angstrom.
    """

    def __init__(self, graph: Graph, cutoff: float):
        self.cutoff = cutoff
        self.sizes = graph.num_atoms, graph.num_edges
        self.graph = pad(graph, cutoff)

    def copy(self, graph: Graph) -> None:
        """Copy another structure into the buffers. If the number of atoms is unchanged, this takes a few launches."""
        own, (n, e), (atoms, edges) = self.graph, (graph.num_atoms, graph.num_edges), self.sizes
        self.sizes = n, e
        if n != atoms:
            for to, whole in zip(own, pad(graph, self.cutoff), strict=True):
                to.copy_(whole)
            return
        # One launch per dtype: in small systems launches take longer than copies.
        for fields in (
            ("positions", "cell", "shift"),
            ("atomic_numbers", "source", "destination", "charge_spin"),
        ):
            new = [getattr(graph, field) for field in fields]
            torch._foreach_copy_(
                [getattr(own, field)[: len(t)] for field, t in zip(fields, new, strict=True)], new
            )
        own.atomic_numbers[n:], own.charge_spin[1:] = graph.atomic_numbers[0], graph.charge_spin[0]
        if e < edges:  # replace the edges left over from the last structure by padding
            ends = n + _padding_ends(
                e, edges, own.num_edges, own.num_atoms - n, SIZE_DIGITS, own.source.device
            )
            own.source[e:edges], own.destination[e:edges], own.shift[e:edges] = ends, ends, 1.0


def pad(graph: Graph, cutoff: float, structures: int = 1, digits: int = SIZE_DIGITS) -> Graph:
    """Pad a graph to a standard number of atoms and edges by adding structures.

    The first added structure has atoms of the element of the graph's first atom. Each of its edges joins an atom to
    its own periodic image beyond the cutoff, so it contributes no energy. Further added structures are empty. The
    structures of the graph are not affected.

    Args:
        graph: The graph.
        cutoff: Cutoff of the model, in Angstrom.
        structures: Number of added structures.
        digits: Significant binary digits of the sizes, see `rounded_up`.
    """
    atoms = rounded_up(graph.num_atoms + 1, digits) - graph.num_atoms
    size = rounded_up(graph.num_edges, digits)
    edges, device = size - graph.num_edges, graph.positions.device
    own = _padding_ends(graph.num_edges, size, size, atoms, digits, device)
    extra = Graph(
        atomic_numbers=graph.atomic_numbers[:1].expand(atoms),
        positions=torch.zeros(atoms, 3, dtype=torch.float64, device=device),
        cell=(cutoff + 1) * torch.eye(3, dtype=torch.float64, device=device).expand(structures, 3, 3),
        structure=torch.zeros(atoms, dtype=torch.int64, device=device),
        source=own,
        destination=own,
        shift=torch.ones(edges, 3, dtype=torch.float64, device=device),
        charge_spin=graph.charge_spin[:1].expand(structures, 2),
    )
    return collate([graph, extra])


def _padding_ends(
    first: int, last: int, size: int, atoms: int, digits: int, device: torch.device
) -> torch.Tensor:
    """Padding atoms to which the padding edges first … last-1 belong; edges below ``first`` are real.

    The result is ascending and spreads the edges evenly over the padding atoms if most of them are needed. The atom
    of an edge depends on the position of the edge and not on the number of real edges, so that another structure can
    be copied into the same buffers.
    """
    unit = _unit(first, digits)
    return (torch.arange(first, last, device=device) - (size - unit)) * atoms // unit


def _unit(n: int, digits: int) -> int:
    return 1 << max(n.bit_length() - digits, 0)
