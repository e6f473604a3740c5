"""Batch: joined structures and their labels, as tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpa4.graph import Graph, collate


class Batch(NamedTuple):
    """B structures with N atoms in all, and their labels; a missing label is zero and its mask is false."""

    graph: Graph
    energy: Tensor  # (B,) float64, eV
    forces: Tensor  # (N, 3) float64, eV/Angstrom
    virial: Tensor  # (B, 3, 3) float64, eV, -dE/dstrain
    has_energy: Tensor  # (B,) bool
    has_forces: Tensor  # (B,) bool
    has_virial: Tensor  # (B,) bool
    weight: Tensor  # (B,) float64
    max_force: (
        Tensor  # (N,) float64, eV/Angstrom: bound of the force of an atom without labels; zero: no bound
    )
    counts: Tensor  # (4,) int64: energies, atoms with forces, virials, atoms with a bound; of all parts of the batch

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device."""
        non_blocking = torch.device(device).type != "cpu"  # see Graph.to
        return Batch(self.graph.to(device), *(t.to(device, non_blocking=non_blocking) for t in self[1:]))

    def extended(self, graph: Graph) -> "Batch":
        """Batch of a graph with further structures after those of the batch; these have no labels and no bound."""

        def longer(t: Tensor, like: Tensor) -> Tensor:
            return torch.cat([t, t.new_zeros(len(like) - len(t), *t.shape[1:])])

        of_atoms = ("forces", "max_force")
        fields = {name: t for name, t in self._asdict().items() if name not in ("graph", "counts")}
        return Batch(
            graph,
            **{n: longer(t, graph.positions if n in of_atoms else graph.cell) for n, t in fields.items()},
            counts=self.counts,
        )

    def joined(self, other: "Batch") -> "Batch":
        """Batch with the structures of another batch after its own."""
        labels = [torch.cat(pair) for pair in zip(self[1:-1], other[1:-1], strict=True)]
        labels.append(self.counts + other.counts)
        return Batch(collate([self.graph, other.graph]), *labels)

    def counted(self) -> "Batch":
        """Batch with the ``counts`` of its own labels and bounds."""
        forces = self.has_forces[self.graph.structure]
        found = [mask.sum() for mask in (self.has_energy, forces, self.has_virial, self.max_force > 0)]
        return self._replace(counts=torch.stack(found))

    def without_labels(self) -> "Batch":
        """Batch of the same structures, none of which has a label."""
        none = torch.zeros_like(self.has_energy)
        return self._replace(has_energy=none, has_forces=none, has_virial=none).counted()

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which copies to a GPU are asynchronous."""
        return Batch(self.graph.pin_memory(), *(t.pin_memory() for t in self[1:]))
