"""Energies of structures without the analytic repulsion of nuclei, to which reference energies are fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dpa4.data import Frame
from dpa4.data.coverage import ElementPair
from dpa4.graph import build_graph
from dpa4.model import ModelConfig
from dpa4.model.config import PairBridging, pair_names
from dpa4.model.short_range import PairRange
from dpa4.ops.incidence import Incidence


def without_repulsion(
    frames: Sequence[Frame], model: ModelConfig, shortest: Mapping[ElementPair, float]
) -> list[Frame]:
    """Subtract the repulsion per pair of elements from the energies of structures.

    Windows end below the distances in the data, so energies only change for structures with atoms that nearly
    coincide.

    Args:
        frames: The structures.
        model: Configuration of the model.
        shortest: Shortest distance of each pair of elements in the training data, in Angstrom.
    """
    if not overlapping_pairs(model, shortest):
        return list(frames)
    assert isinstance(model.bridging, PairBridging)
    short_range, reach = PairRange(model.elements, model.bridging), max(model.bridging.outer.values())

    def repulsion(frame: Frame) -> float:
        graph = build_graph(frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, reach)
        ends = Incidence.of(graph.source, len(frame)), Incidence.of_sorted(graph.destination, len(frame))
        return float(short_range(graph.edge_vectors(), *ends, graph.atomic_numbers)[1].sum())

    return [f if f.energy is None else replace(f, energy=f.energy - repulsion(f)) for f in frames]


def overlapping_pairs(model: ModelConfig, shortest: Mapping[ElementPair, float]) -> list[str]:
    """Names of the pairs of elements whose shortest distance in the data is within their window."""
    if not isinstance(model.bridging, PairBridging):
        return []
    found = {
        name: shortest.get((a, b), shortest.get((b, a)))
        for name, (a, b) in pair_names(model.elements).items()
    }
    return [n for n, length in found.items() if length is not None and length < model.bridging.outer[n]]
