"""Coverage of training data: its elements and the shortest distance of each pair of elements."""

import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

MARGIN = 0.05  # Angstrom below the shortest distance in the data that is tolerated without a warning
_SIZE = len(chemical_symbols)

ElementPair = tuple[str, str]  # chemical symbols, the smaller atomic number first


@dataclass(frozen=True)
class Coverage:
    """Elements of the training data, and the shortest distance between atoms of each pair of elements."""

    cutoff: float  # Angstrom; longer distances were not examined
    elements: tuple[str, ...]  # sorted by atomic number
    shortest: Mapping[ElementPair, float] | None = (
        None  # Angstrom; no entry: none within the cutoff; None: unknown
    )

    @property
    def text(self) -> str:
        """Summary with the shortest distances first, such as "O-H 0.952, H-H 1.514 Å"; at most 12 pairs."""
        if self.shortest is None:
            return "unknown, because not every structure was used"
        ascending = sorted(self.shortest.items(), key=lambda entry: entry[1])
        entries = [f"{a}-{b} {length:.3f}" for (a, b), length in ascending]
        more = f" and {len(entries) - 12} more pairs" if len(entries) > 12 else ""
        return ", ".join(entries[:12]) + " Å" + more if entries else f"no pair within {self.cutoff:g} Å"

    def to_json(self) -> str:
        """Serialise to the text stored in a checkpoint."""
        shortest = None
        if self.shortest is not None:
            shortest = {f"{a}-{b}": length for (a, b), length in self.shortest.items()}
        return json.dumps({"cutoff": self.cutoff, "elements": self.elements, "shortest": shortest})

    @classmethod
    def from_json(cls, text: str) -> "Coverage":
        """Restore from the text of ``to_json``.

        Raises:
            ValueError: If the text has another format.
        """
        try:
            found = json.loads(text)
            known = found["shortest"] is not None
            entries = found["shortest"].items() if known else ()
            pairs = {tuple(name.split("-")): float(length) for name, length in entries}
            if unknown := {*found["elements"], *(e for pair in pairs for e in pair)} - set(chemical_symbols):
                raise ValueError(f"not chemical symbols: {sorted(unknown)}")
            shortest = {(a, b): length for (a, b), length in pairs.items()}
            return cls(float(found["cutoff"]), tuple(found["elements"]), shortest if known else None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a description of training data ({error!r})") from error


class CoverageCollector:
    """Collects the coverage of structures from their graphs, in any order, as graphs are built.

    One thread may add graphs while another reads the state.

    Args:
        frames: The structures.
        cutoff: Cutoff radius of the graphs, in Angstrom.
    """

    def __init__(self, frames: Sequence[Frame], cutoff: float):
        self.frames, self.cutoff = frames, cutoff
        self._elements = tuple(elements_in(frames))
        self._seen = np.zeros(len(frames), dtype=bool)
        self._squared = np.full((_SIZE, _SIZE), np.inf)

    def add(self, index: int, graph: Graph) -> None:
        """Add the graph of structure ``index``, unless it was added before."""
        if self._seen[index]:
            return
        numbers, ends = graph.atomic_numbers, (graph.source, graph.destination)
        squared = graph.edge_vectors().square().sum(1).numpy()
        np.minimum.at(self._squared, (numbers[ends[0]].numpy(), numbers[ends[1]].numpy()), squared)
        self._seen[index] = True  # last: another thread may read the state

    @property
    def complete(self) -> bool:
        """True if the graph of every structure was added."""
        return bool(self._seen.all())

    @property
    def missing(self) -> NDArray[np.int64]:
        """Indices of the structures whose graph was not added yet."""
        return np.flatnonzero(~self._seen)

    @property
    def coverage(self) -> Coverage:
        """Coverage of all structures; distances are unknown until the graph of every structure was added.

        Distances from only some of the structures would be too long.
        """
        if not self.complete:
            return Coverage(self.cutoff, self._elements)
        shortest = {}
        for pair in combinations_with_replacement(self._elements, 2):
            found = self._squared[atomic_numbers[pair[0]], atomic_numbers[pair[1]]]
            if np.isfinite(found):
                shortest[pair] = float(np.sqrt(found))
        return Coverage(self.cutoff, self._elements, shortest)

    def state_dict(self) -> dict[str, int | Tensor]:
        """State of the collection, for a checkpoint of a run."""
        seen = torch.from_numpy(self._seen.copy())  # first: another thread may add a graph
        return {"data": self._checksum, "seen": seen, "squared": torch.from_numpy(self._squared.copy())}

    def load_state_dict(self, state: Mapping[str, int | Tensor]) -> None:
        """Merge a saved state, unless it belongs to other structures."""
        if state["data"] == self._checksum:
            self._seen |= torch.as_tensor(state["seen"]).numpy()
            np.minimum(self._squared, torch.as_tensor(state["squared"]).numpy(), out=self._squared)

    @cached_property
    def _checksum(self) -> int:
        """Checksum of everything that the distances depend on."""
        value = zlib.crc32(np.float64(self.cutoff).tobytes())
        for frame in self.frames:
            for array in (frame.atomic_numbers, frame.positions, frame.cell, frame.pbc):
                value = zlib.crc32(array.tobytes(), value)
        return value


def coverage_of(dataset: FrameDataset, collector: CoverageCollector | None = None) -> Coverage:
    """Find the coverage of a data set.

    Args:
        dataset: The data set.
        collector: Collection to complete, so that only missing graphs are built; None starts a new one.

    Raises:
        ValueError: If the neighbour list of a structure cannot be built.
    """
    collector = collector or CoverageCollector(dataset.frames, dataset.cutoff)
    missing = collector.missing.tolist()
    for index in track(missing, "finding shortest distances", disable=len(missing) <= 2000):
        collector.add(index, dataset.graph(index))
    return collector.coverage


class CoverageMonitor:
    """Warns once about elements missing from the training data and once about atoms closer than there.

    Distances are compared in two steps, so that a GPU need not wait: ``look`` starts the comparison before
    the evaluation, ``report`` waits for its result afterwards.

    Args:
        coverages: Coverage of each model of a committee; the narrowest counts. None stands for unknown
            coverage, about which there are no warnings.
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
        self._looked: tuple[Graph, Tensor] | None = None  # last graph, and True if atoms are too close

    def elements(self, atomic_numbers: Tensor) -> None:
        """Warn about elements outside the training data, at the first occurrence only."""
        if not self._watch_elements:
            return
        present = {chemical_symbols[int(z)] for z in atomic_numbers.unique()}
        if unseen := present - self._seen:
            self._watch_elements = False
            seen = " ".join(s for s in chemical_symbols if s in self._seen)
            warnings.warn(
                f"{', '.join(sorted(unseen))}: supported by the model, but not in its training data (only {seen}); "
                "do not trust the results",
                RuntimeWarning,
                stacklevel=3,
            )

    def look(self, graph: Graph) -> None:
        """Start comparing the distances of a graph with the training data."""
        if self._watch_distances:
            self._looked = graph, (self._excess(graph) > 0).any()

    def report(self) -> None:
        """Warn, at the first occurrence only, if the last ``look`` found atoms closer than in the training data."""
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
            f"of the training data ({known}); the model extrapolates. Further close atoms are not reported",
            RuntimeWarning,
            stacklevel=2,
        )

    def _excess(self, graph: Graph) -> Tensor:
        """Squared limit minus squared length of each edge (E,), in square Angstrom."""
        numbers = graph.atomic_numbers
        pair = numbers[graph.source] * _SIZE + numbers[graph.destination]
        return self._squared[pair] - graph.edge_vectors().square().sum(1)
