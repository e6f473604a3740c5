"""Graphs of batches of structures for engines that hold many structures in tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpa4.graph import Graph, build_graph, collate, neighbor_list_torch
from dpa4.interfaces.coverage_monitor import CoverageMonitor
from dpa4.potential import Potential


class BatchGraphs:
    """Builder and checker of the graphs of batches.

    Elements, charges and spins are checked only when they have changed since the last call. A warning is issued once
    about elements, and once about short distances, that the training data did not contain.

    Args:
        potentials: One or more potentials on one device. Edges reach to the largest cutoff.
    """

    def __init__(self, potentials: Sequence[Potential]):
        self._potentials = potentials
        self._cutoff = max(potential.config.cutoff for potential in potentials)
        self._monitor = CoverageMonitor([p.coverage for p in potentials], potentials[0].device)
        # Atomic numbers and charge_spin that passed the check.
        self._checked: tuple[Tensor, Tensor] | None = None

    def build(
        self,
        numbers: Tensor,
        positions: Tensor,
        cell: Tensor,
        pbc: Tensor,
        structure: Tensor,
        charge_spin: Tensor,
    ) -> Graph:
        """Build the graph of B structures with N atoms on the device of the tensors.

        Args:
            numbers: Atomic numbers (N,), int64.
            positions: Positions (N, 3) in Angstrom, float64.
            cell: Cell vectors as rows (B, 3, 3) in Angstrom, float64.
            pbc: Periodicity along the cell vectors, (B, 3) bool.
            structure: Index of the structure of each atom (N,), int64, ascending.
            charge_spin: Charge and multiplicity (B, 2), int64.

        Raises:
            ValueError: If an element, charge or spin is outside the model, a position is not finite, atoms coincide,
                or a periodic axis has no cell vector.
        """
        if positions.is_cuda:
            edges = neighbor_list_torch(positions, cell, pbc, self._cutoff, structure)
            graph = Graph(numbers, positions, cell, structure, *edges, charge_spin)
        else:
            sizes = structure.bincount(minlength=len(cell)).tolist()
            systems = zip(numbers.split(sizes), positions.split(sizes), cell, pbc, strict=True)
            graphs = [build_graph(z, r, rows, periodic, self._cutoff) for z, r, rows, periodic in systems]
            graph = collate(graphs)._replace(charge_spin=charge_spin)
        known = self._checked
        if known is None or not (torch.equal(numbers, known[0]) and torch.equal(charge_spin, known[1])):
            for potential in self._potentials:
                potential.check(graph)
            self._monitor.elements(numbers)
            self._checked = numbers.clone(), charge_spin
        self._monitor.look(graph)
        self._monitor.report()  # now, because no later step waits for the device
        return graph
