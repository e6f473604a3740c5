"""Graphs of atoms and edges, and neighbour searches."""

from dpa4.graph.graph import Graph, collate, first_atoms
from dpa4.graph.neighbors import build_graph, neighbor_list, neighbor_list_torch, within_cutoff
from dpa4.graph.skin import SKIN, SkinnedNeighbors

__all__ = [
    "SKIN",
    "Graph",
    "SkinnedNeighbors",
    "build_graph",
    "collate",
    "first_atoms",
    "neighbor_list",
    "neighbor_list_torch",
    "within_cutoff",
]
