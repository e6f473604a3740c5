"""Warnings about structures outside the training data of a model."""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from dpa4.data.coverage import Coverage
from dpa4.graph import Graph
from dpa4.messages import warn

MARGIN = 0.05
"""Tolerance of the distances, in Angstrom: atoms closer than in the data by more than this cause a warning."""


class CoverageMonitor:
    """Issues one warning about elements missing from the training data, and one about atoms closer than in the data.

    Distances are compared in two steps, so that a GPU need not wait: ``look`` starts the comparison, ``report``
    waits for its result.

    Args:
        coverages: Coverage of every model of a committee; the narrowest one decides. A model without coverage
            (None) causes no warning.
        device: Device of the graphs.
    """

    def __init__(self, coverages: Sequence[Coverage | None], device: torch.device | str = "cpu"):
        self.coverages = [c for c in coverages if c is not None]
        self._seen: set[str] = set(chemical_symbols).intersection(*(c.elements for c in self.coverages))
        limits = np.zeros((len(chemical_symbols), len(chemical_symbols)))  # Angstrom, by atomic numbers
        for one in self.coverages:
            if one.shortest is None:
                continue
            for a, b in combinations_with_replacement(one.elements, 2):
                i, j = atomic_numbers[a], atomic_numbers[b]
                limit = max(one.shortest.get((a, b), one.cutoff) - MARGIN, limits[i, j])
                limits[i, j] = limits[j, i] = limit
        self._squared = torch.from_numpy(limits**2).ravel().to(device)
        self._watch_elements = bool(self.coverages)
        self._watch_distances = bool(limits.any())
        self._looked: tuple[Graph, Tensor] | None = None  # with a flag on the device: atoms are too close

    def elements(self, atomic_numbers: Tensor) -> None:
        """Warn at the first occurrence of an element that is not in the training data."""
        if not self._watch_elements:
            return
        present = {chemical_symbols[int(z)] for z in atomic_numbers.unique()}
        if unseen := present - self._seen:
            self._watch_elements = False
            seen = " ".join(s for s in chemical_symbols if s in self._seen)
            warn(
                f"{', '.join(sorted(unseen))}: supported by the model, but not in its training data (only {seen}); "
                "do not trust the results",
                RuntimeWarning,
            )

    def look(self, graph: Graph) -> None:
        """Start comparing the distances in a graph with the training data."""
        if self._watch_distances:
            self._looked = graph, (self._excess(graph) > 0).any()

    def report(self) -> None:
        """Wait for the last ``look``; warn at the first occurrence of atoms closer than in the training data."""
        looked, self._looked = self._looked, None
        if looked is None or not bool(looked[1]):
            return
        graph, numbers = looked[0], looked[0].atomic_numbers
        self._watch_distances = False
        edge = int(self._excess(graph).argmax())
        distance = float(graph.edge_vectors()[edge].norm())
        i, j = sorted((int(graph.source[edge]), int(graph.destination[edge])))
        names = sorted((int(numbers[i]), int(numbers[j])))
        a, b = (chemical_symbols[z] for z in names)
        data = max(c.shortest.get((a, b), np.inf) for c in self.coverages if c.shortest is not None)
        known = f"{data:.3f} Angstrom" if np.isfinite(data) else "none within the cutoff"
        warn(
            f"atoms {i} and {j} are {distance:.3f} Angstrom apart, closer than any {a}-{b} pair "
            f"of the training data ({known}); the model extrapolates. Closer atoms are not reported again",
            RuntimeWarning,
        )

    def _excess(self, graph: Graph) -> Tensor:
        """Squared limit minus squared distance of every edge, (E,), in square Angstrom; positive: too close."""
        numbers = graph.atomic_numbers
        pair = numbers[graph.source] * len(chemical_symbols) + numbers[graph.destination]
        return self._squared[pair] - graph.edge_vectors().square().sum(1)
