"""What training data covered: their elements, and how close atoms of each pair of elements came."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from rich.progress import track
from torch import Tensor

from dpa4.data.dataset import FrameDataset
from dpa4.data.summary import elements_in
from dpa4.graph import Graph

MARGIN = (
    0.05  # Angstrom that atoms may be closer than they ever were in the data before it is worth a warning
)
_SIZE = len(chemical_symbols)

Pair = tuple[str, str]  # chemical symbols, that of the smaller atomic number first


@dataclass(frozen=True)
class Coverage:
    """Elements of the training data, and the shortest distance between atoms of each pair of them."""

    cutoff: float  # Angstrom; distances beyond it were not looked at
    elements: tuple[str, ...]  # by atomic number
    shortest: Mapping[Pair, float] = field(
        default_factory=dict
    )  # Angstrom; no entry: never within the cutoff

    @property
    def text(self) -> str:
        """Shortest distances first, such as "O-H 0.952, H-H 1.514 Å"; long lists are cut."""
        entries = [f"{a}-{b} {length:.3f}" for (a, b), length in self._ascending()]
        more = f" and {len(entries) - 12} more pairs" if len(entries) > 12 else ""
        return ", ".join(entries[:12]) + " Å" + more if entries else f"no pair within {self.cutoff:g} Å"

    def _ascending(self) -> list[tuple[Pair, float]]:
        return sorted(self.shortest.items(), key=lambda entry: entry[1])

    def to_json(self) -> str:
        """As text for a checkpoint."""
        shortest = {f"{a}-{b}": length for (a, b), length in self.shortest.items()}
        return json.dumps({"cutoff": self.cutoff, "elements": self.elements, "shortest": shortest})

    @classmethod
    def from_json(cls, text: str) -> "Coverage":
        """From the text of ``to_json``.

        Raises:
            ValueError: If it is something else.
        """
        try:
            found = json.loads(text)
            pairs = {tuple(name.split("-")): float(length) for name, length in found["shortest"].items()}
            if unknown := {*found["elements"], *(e for pair in pairs for e in pair)} - set(chemical_symbols):
                raise ValueError(f"no elements: {sorted(unknown)}")
            shortest = {(a, b): length for (a, b), length in pairs.items()}
            return cls(float(found["cutoff"]), tuple(found["elements"]), shortest)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a description of training data ({error!r})") from error


def coverage_of(dataset: FrameDataset) -> Coverage:
    """What a data set covers; builds every graph, of which the data set keeps as many as it has memory for.

    Raises:
        ValueError: If a structure has no neighbour list.
    """
    squared = np.full((_SIZE, _SIZE), np.inf)
    for index in track(range(len(dataset)), "looking for close atoms", disable=len(dataset) <= 2000):
        graph = dataset.graph(index)
        numbers, ends = graph.atomic_numbers, (graph.source, graph.destination)
        lengths = graph.edge_vectors().square().sum(1).numpy()
        np.minimum.at(squared, (numbers[ends[0]].numpy(), numbers[ends[1]].numpy()), lengths)
    elements = tuple(elements_in(dataset.frames))
    shortest = {}
    for pair in combinations_with_replacement(elements, 2):
        found = squared[atomic_numbers[pair[0]], atomic_numbers[pair[1]]]
        if np.isfinite(found):
            shortest[pair] = float(np.sqrt(found))
    return Coverage(dataset.cutoff, elements, shortest)


class CoverageMonitor:
    """Warns, once each, of elements that training data lacked and of atoms closer than there.

    Args:
        coverages: Of the models that compute together; the narrowest decides. None warns of nothing.
        device: Of the graphs.
    """

    def __init__(self, coverages: Sequence[Coverage | None], device: torch.device | str = "cpu"):
        self.coverages = [c for c in coverages if c is not None]
        self._seen: set[str] = set(chemical_symbols).intersection(*(c.elements for c in self.coverages))
        limits = np.zeros((_SIZE, _SIZE))  # Angstrom, by atomic numbers
        for one in self.coverages:
            for a, b in combinations_with_replacement(one.elements, 2):
                i, j = atomic_numbers[a], atomic_numbers[b]
                limit = max(one.shortest.get((a, b), one.cutoff) - MARGIN, limits[i, j])
                limits[i, j] = limits[j, i] = limit
        self._squared = torch.from_numpy(limits**2).ravel().to(device)
        self._watch_elements = self._watch_distances = bool(self.coverages)

    def elements(self, atomic_numbers: Tensor) -> None:
        """Warn of elements outside the training data, at their first occurrence."""
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

    def distances(self, graph: Graph) -> None:
        """Warn of atoms closer than in the training data, at their first occurrence."""
        if not self._watch_distances:
            return
        numbers = graph.atomic_numbers
        pair = numbers[graph.source] * _SIZE + numbers[graph.destination]
        squared = graph.edge_vectors().square().sum(1)
        excess = self._squared[pair] - squared
        if not bool((excess > 0).any()):
            return
        self._watch_distances = False
        edge = int(excess.argmax())
        i, j = sorted((int(graph.source[edge]), int(graph.destination[edge])))
        names = sorted((int(numbers[i]), int(numbers[j])))
        a, b = (chemical_symbols[z] for z in names)
        data = max((c.shortest.get((a, b), np.inf) for c in self.coverages), default=np.inf)
        known = f"{data:.3f} Angstrom" if np.isfinite(data) else "none within the cutoff"
        warnings.warn(
            f"atoms {i} and {j} are {float(squared[edge]) ** 0.5:.3f} Angstrom apart, closer than any {a}-{b} pair "
            f"of the training data ({known}); the model extrapolates. Closer atoms are not reported again",
            RuntimeWarning,
            stacklevel=3,
        )
