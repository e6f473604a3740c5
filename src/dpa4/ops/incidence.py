"""Incidence of edges and nodes: the node of each edge, and the edges of each node for sums over them."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Incidence(NamedTuple):
    """One end of the edges: the node of every edge, and the edges of every node.

    The edges of node n are ``order[offsets[n]:offsets[n + 1]]``, in ascending order. Build it with `of` or
    `of_sorted`; neither waits for the device.
    """

    index: Tensor  # type: ignore[assignment]  # node of each edge, (E,) int64; hides tuple.index, which is not used
    order: Tensor | None  # permutation that sorts the edges by node, (E,) int64; None if they are sorted
    offsets: Tensor  # (N + 1,) int64

    @classmethod
    def of_sorted(cls, index: Tensor, num_nodes: int) -> Self:
        """Build from the node of each edge, (E,) int64 in [0, num_nodes), sorted by node."""
        return cls(index, None, _offsets(index, num_nodes))

    @classmethod
    def of(cls, index: Tensor, num_nodes: int) -> Self:
        """Build from the node of each edge, (E,) int64 in [0, num_nodes), in any order."""
        order = torch.argsort(_shortened(index, num_nodes), stable=True)
        return cls(index, order, _offsets(index[order], num_nodes))

    @property
    def num_nodes(self) -> int:
        """Number of nodes, including those without edges."""
        return self.offsets.shape[0] - 1


def _shortened(index: Tensor, num_nodes: int) -> Tensor:
    """Convert to the shortest integer type that holds all nodes: a GPU sorts byte by byte."""
    short = next((t for t in (torch.int16, torch.int32) if num_nodes <= torch.iinfo(t).max), index.dtype)
    return index.to(short)


def _offsets(ascending: Tensor, num_nodes: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(num_nodes + 1, device=ascending.device))
