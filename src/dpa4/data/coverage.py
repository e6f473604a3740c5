"""Coverage of training data: the elements, and the shortest distance between atoms of each pair of elements."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from dpa4.data.dataset import FrameDataset
from dpa4.data.frame import Frame
from dpa4.data.summary import elements_in
from dpa4.graph import Graph

MARGIN = 0.05  # Angstrom by which atoms may be closer than any in the data before a warning is issued
_SIZE = len(chemical_symbols)

ElementPair = tuple[str, str]  # chemical symbols, the one with the smaller atomic number first


@dataclass(frozen=True)
class Coverage:
    """Elements of training data, and the shortest distance between atoms of each pair of elements."""

    cutoff: float  # Angstrom; longer distances are not recorded
    elements: tuple[str, ...]  # by atomic number
    shortest: Mapping[ElementPair, float] | None = (
        None  # Angstrom; a missing pair is beyond the cutoff; None: unknown
    )

    @property
    def text(self) -> str:
        """Shortest distances in ascending order, such as "O-H 0.952, H-H 1.514 Å"; at most twelve pairs."""
        if self.shortest is None:
            return "not known, not every structure was used"
        ascending = sorted(self.shortest.items(), key=lambda entry: entry[1])
        entries = [f"{a}-{b} {length:.3f}" for (a, b), length in ascending]
        more = f" and {len(entries) - 12} more pairs" if len(entries) > 12 else ""
        return ", ".join(entries[:12]) + " Å" + more if entries else f"no pair within {self.cutoff:g} Å"

    def to_json(self) -> str:
        """Convert to JSON text for a checkpoint."""
        shortest = None
        if self.shortest is not None:
            shortest = {f"{a}-{b}": length for (a, b), length in self.shortest.items()}
        return json.dumps({"cutoff": self.cutoff, "elements": self.elements, "shortest": shortest})

    @classmethod
    def from_json(cls, text: str) -> "Coverage":
        """Read the text written by ``to_json``.

        Raises:
            ValueError: If the text is anything else.
        """
        try:
            found = json.loads(text)
            known = found["shortest"] is not None
            entries = found["shortest"].items() if known else ()
            pairs = {tuple(name.split("-")): float(length) for name, length in entries}
            if unknown := {*found["elements"], *(e for pair in pairs for e in pair)} - set(chemical_symbols):
                raise ValueError(f"no elements: {sorted(unknown)}")
            shortest = {(a, b): length for (a, b), length in pairs.items()}
            return cls(float(found["cutoff"]), tuple(found["elements"]), shortest if known else None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a description of training data ({error!r})") from error


class CoverageCollector:
    """Collects the coverage of structures from their graphs, which may be added in any order.

    One thread may add graphs while another thread reads the coverage.

    Args:
        frames: The structures.
        cutoff: Cutoff of the graphs, in Angstrom.
    """

    def __init__(self, frames: Sequence[Frame], cutoff: float):
        self.cutoff = cutoff
        self._elements = tuple(elements_in(frames))
        self._seen = np.zeros(len(frames), dtype=bool)
        self._squared = np.full((_SIZE, _SIZE), np.inf)  # shortest squared distance, by atomic numbers

    def add(self, index: int, graph: Graph) -> None:
        """Add the graph of structure ``index``; a structure that was added before is skipped."""
        if self._seen[index]:
            return
        numbers, ends = graph.atomic_numbers, (graph.source, graph.destination)
        squared = graph.edge_vectors().square().sum(1).numpy()
        np.minimum.at(self._squared, (numbers[ends[0]].numpy(), numbers[ends[1]].numpy()), squared)
        self._seen[index] = True  # last, because another thread may read

    @property
    def complete(self) -> bool:
        """True if every structure was added."""
        return bool(self._seen.all())

    @property
    def missing(self) -> NDArray[np.int64]:
        """Indices of the structures that were not added yet."""
        return np.flatnonzero(~self._seen)

    @property
    def coverage(self) -> Coverage:
        """Coverage of all structures.

        The distances are unknown until every structure was added: the shortest distances of a part of the data
        would be too long.
        """
        if not self.complete:
            return Coverage(self.cutoff, self._elements)
        shortest = {}
        for pair in combinations_with_replacement(self._elements, 2):
            found = self._squared[atomic_numbers[pair[0]], atomic_numbers[pair[1]]]
            if np.isfinite(found):
                shortest[pair] = float(np.sqrt(found))
        return Coverage(self.cutoff, self._elements, shortest)


def coverage_of(dataset: FrameDataset, collector: CoverageCollector | None = None) -> Coverage:
    """Coverage of a data set; only the graphs that are missing from the collector, if one is given, are built.

    Raises:
        ValueError: If a structure has no neighbour list.
    """
    collector = collector or CoverageCollector(dataset.frames, dataset.cutoff)
    missing = collector.missing.tolist()
    for index in track(missing, "looking for close atoms", disable=len(missing) <= 2000):
        collector.add(index, dataset.graph(index))
    return collector.coverage


class CoverageMonitor:
    """Warns of elements missing from the training data and of atoms closer than any in the data, once each.

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
        limits = np.zeros((_SIZE, _SIZE))  # Angstrom, by atomic numbers
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
            warnings.warn(
                f"{', '.join(sorted(unseen))}: the model knows the element, but its training data had none of it "
                f"(they had {seen}); results are not to be trusted",
                RuntimeWarning,
                stacklevel=3,
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
        warnings.warn(
            f"atoms {i} and {j} are {distance:.3f} Angstrom apart, closer than any {a}-{b} pair "
            f"of the training data ({known}); the model extrapolates. Closer atoms are not reported again",
            RuntimeWarning,
            stacklevel=2,
        )

    def _excess(self, graph: Graph) -> Tensor:
        """Squared limit minus squared distance of every edge, (E,), in square Angstrom; positive: too close."""
        numbers = graph.atomic_numbers
        pair = numbers[graph.source] * _SIZE + numbers[graph.destination]
        return self._squared[pair] - graph.edge_vectors().square().sum(1)
