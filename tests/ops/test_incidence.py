"""Incidences: the node of every edge, and the edges of every node."""

import torch

from dpa4.ops.incidence import Incidence


def test_incidence_lists_the_edges_of_every_node():
    index = torch.tensor([4, 1, 1, 4, 0, 1])
    end = Incidence.of(index, 6)
    bounds = end.offsets.tolist()
    listed = [end.order[s:t].tolist() for s, t in zip(bounds, bounds[1:], strict=False)]
    assert listed == [[4], [1, 2, 5], [], [], [0, 3], []]
    assert end.num_nodes == 6
    ordered = Incidence.of_sorted(index.sort().values, 6)
    assert ordered.order is None
    assert torch.equal(ordered.offsets, end.offsets)
    assert Incidence.of(index[:0], 2).offsets.tolist() == [0, 0, 0]
