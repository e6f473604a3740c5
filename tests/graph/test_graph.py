"""The graph type: edge vectors and collation."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from dpa4.graph import Graph, build_graph, collate


def example_graphs() -> list[Graph]:
    """A molecule, a crystal, an empty structure, a single atom."""
    water, copper = molecule("H2O"), bulk("Cu")
    return [
        build_graph(water.numbers, water.positions, water.cell.array, water.pbc, 4.0),
        build_graph(copper.numbers, copper.positions, copper.cell.array, copper.pbc, 4.0, (1, 2)),
        build_graph([], np.zeros((0, 3)), np.zeros((3, 3)), [False] * 3, 4.0),
        build_graph([1], [[0.0, 0, 0]], np.zeros((3, 3)), [False] * 3, 4.0),
    ]


def test_edge_vectors_point_from_centre_to_neighbour():
    graph = build_graph([1, 9], [[0, 0, 0], [0, 0, 3.0]], np.diag([9, 9, 4.0]), [False, False, True], 2.0)
    # Only the image of F below H and the image of H above F are near.
    edges = sorted(torch.column_stack((graph.source, graph.destination, graph.shift[:, 2])).tolist())
    assert edges == [[0, 1, 1], [1, 0, -1]]
    to_h = graph.edge_vectors()[graph.source.tolist().index(1)]
    assert to_h.tolist() == [0, 0, -1.0]


def test_collate_keeps_every_structure():
    graphs = example_graphs()
    joined = collate(graphs)
    assert joined.num_structures == 4
    assert joined.num_atoms == sum(g.num_atoms for g in graphs)
    assert joined.structure.tolist() == [0, 0, 0, 1, 3]
    assert joined.charge_spin.tolist() == [[0, 1], [1, 2], [0, 1], [0, 1]]
    assert (joined.destination.diff() >= 0).all()
    assert (joined.structure[joined.source] == joined.structure[joined.destination]).all()
    torch.testing.assert_close(
        joined.edge_vectors(), torch.cat([g.edge_vectors() for g in graphs]), rtol=0, atol=0
    )


def test_collate_of_batches_is_collate_of_all():
    graphs = example_graphs()
    nested = collate([collate(graphs[:2]), collate(graphs[2:])])
    for a, b in zip(nested, collate(graphs), strict=True):
        assert torch.equal(a, b)


def test_collate_needs_a_graph():
    with pytest.raises(ValueError, match="collate needs at least one graph"):
        collate([])


def test_to_copies_every_field():
    graph = example_graphs()[0]
    assert all(t.device.type == "meta" for t in graph.to("meta"))
    for a, b in zip(graph.to(torch.device("cpu")), graph, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_gpu_from_pinned_memory():
    graph = example_graphs()[1]
    pinned = graph.pin_memory()
    assert all(t.is_pinned() for t in pinned)
    torch.testing.assert_close(pinned.to("cuda").to("cpu").positions, graph.positions, rtol=0, atol=0)
