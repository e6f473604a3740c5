"""Graphs of atoms and edges."""

from dpa4.graph.graph import Graph, collate
from dpa4.graph.neighbors import build_graph, neighbor_list, within_cutoff

__all__ = ["Graph", "build_graph", "collate", "neighbor_list", "within_cutoff"]
