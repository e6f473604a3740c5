"""Coverage of training data: the elements, and the shortest distance between atoms of each pair of elements."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from rich.progress import track

from dpa4.data.dataset import FrameDataset
from dpa4.data.summary import elements_in
from dpa4.parsing import parse_json, shown

_SIZE = len(chemical_symbols)

MAX_STRUCTURES = 100_000
"""Largest number of structures whose distances are searched, which takes a minute or two."""
_SYMBOLS = frozenset(chemical_symbols[1:])

ElementPair = tuple[str, str]  # chemical symbols, the one with the smaller atomic number first


@dataclass(frozen=True)
class Coverage:
    """Elements of training data, and the shortest distance between atoms of each pair of elements."""

    cutoff: float  # Angstrom; longer distances are not recorded
    elements: tuple[str, ...]  # by atomic number
    # Angstrom. A pair that is absent is never within the cutoff. None: the distances are unknown.
    shortest: Mapping[ElementPair, float] | None = None

    @property
    def text(self) -> str:
        """Shortest distances in ascending order, such as "O-H 0.952, H-H 1.514 Å"; at most twelve pairs."""
        if self.shortest is None:
            return "unknown, because not every structure was used"
        ascending = sorted(self.shortest.items(), key=lambda entry: entry[1])
        entries = [f"{a}-{b} {length:.3f}" for (a, b), length in ascending]
        more = f" and {len(entries) - 12} more pairs" if len(entries) > 12 else ""
        return ", ".join(entries[:12]) + " Å" + more if entries else f"no pair within {self.cutoff:g} Å"

    def union(self, other: "Coverage") -> "Coverage":
        """Coverage of both data sets; the distances are unknown if those of one are."""
        elements = sorted({*self.elements, *other.elements}, key=atomic_numbers.__getitem__)
        shortest: dict[ElementPair, float] | None = None
        if self.shortest is not None and other.shortest is not None:
            shortest = dict(self.shortest)
            for pair, length in other.shortest.items():
                shortest[pair] = min(length, shortest.get(pair, length))
        return Coverage(min(self.cutoff, other.cutoff), tuple(elements), shortest)

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
            found = parse_json(text, "it")
            if not isinstance(found, dict) or found.keys() != {"cutoff", "elements", "shortest"}:
                raise ValueError(f"it is {shown(found)}")
            cutoff = _length("cutoff", found["cutoff"])
            elements = found["elements"]
            if not isinstance(elements, list) or not all(e in _SYMBOLS for e in elements):
                raise ValueError(f"elements = {shown(elements)}, not a list of chemical symbols")
            return cls(cutoff, tuple(elements), _shortest(found["shortest"]))
        except (ValueError, TypeError) as error:
            raise ValueError(f"not a description of training data: {error}") from error


def _shortest(found: object) -> dict[ElementPair, float] | None:
    """Check the shortest distances of a checkpoint, by pairs such as "H-O"."""
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"shortest = {shown(found)}, not a map of distances")
    shortest = {}
    for name, length in found.items():
        pair = tuple(name.split("-"))
        if len(pair) != 2 or not all(e in _SYMBOLS for e in pair):
            raise ValueError(f"{shown(name)} is not a pair of elements such as H-O")
        shortest[pair] = _length(name, length)
    return shortest


def _length(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise ValueError(f"{name} = {shown(value)}, not a length in Angstrom")
    return float(value)


def shortest_distances(dataset: FrameDataset, limit: int = MAX_STRUCTURES) -> dict[ElementPair, float]:
    """Shortest distance between atoms of each pair of elements within the cutoff, in Angstrom.

    Of more than ``limit`` structures only an evenly spaced part is searched.

    Raises:
        ValueError: If a structure has no neighbour list.
    """
    indices = np.unique(
        np.linspace(0, len(dataset) - 1, min(len(dataset), limit)).round().astype(int)
    ).tolist()
    squared = np.full((_SIZE, _SIZE), np.inf)  # by atomic numbers
    for index in track(indices, "looking for close atoms", disable=len(indices) <= 2000):
        graph = dataset.graph(index)
        numbers = graph.atomic_numbers.numpy()
        ends = numbers[graph.source.numpy()], numbers[graph.destination.numpy()]
        np.minimum.at(squared, ends, graph.edge_vectors().square().sum(1).numpy())
    shortest = {}
    for pair in combinations_with_replacement(elements_in(dataset.frames), 2):
        found = squared[atomic_numbers[pair[0]], atomic_numbers[pair[1]]]
        if np.isfinite(found):
            shortest[pair] = float(np.sqrt(found))
    return shortest


def coverage_of(
    dataset: FrameDataset, shortest: Mapping[ElementPair, float], searched: int | None = None
) -> Coverage:
    """Coverage of a data set with these `shortest_distances`.

    Args:
        dataset: The data set.
        shortest: Shortest distance of each pair of elements in the structures that were searched.
        searched: Number of these structures; None: as many as `shortest_distances` searches. The distances are
            unknown if the data set has more.
    """
    known = len(dataset) <= (MAX_STRUCTURES if searched is None else searched)
    return Coverage(dataset.cutoff, tuple(elements_in(dataset.frames)), shortest if known else None)
