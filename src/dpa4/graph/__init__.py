"""Graphs of atoms and edges."""

from dpa4.graph.graph import Graph, collate

__all__ = ["Graph", "collate"]
