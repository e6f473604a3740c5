"""Fragments: random, reproducible, within the distances of the network, and bounded in the loss."""

import numpy as np
import pytest
import torch

from dpa4.data import FrameDataset, frame_from_atoms
from dpa4.model.config import ModelConfig, PairBridging, pair_names
from dpa4.potential import Prediction
from dpa4.training.fragments import Fragments
from dpa4.training.loss import Loss
from helpers import molecule

ELEMENTS = ("H", "C", "O")
PAIRS = pair_names(ELEMENTS)
WINDOWS = PairBridging(outer=dict.fromkeys(PAIRS, 1.0), frozen=0.8, full=dict.fromkeys(PAIRS, 0.5))
CONFIG = ModelConfig(elements=ELEMENTS, cutoff=4.0, bridging=WINDOWS)


@pytest.fixture
def batch():
    return FrameDataset([frame_from_atoms(molecule(k, 4 + k)) for k in range(2)], 4.0).batch([0, 1])


def test_a_batch_gets_a_pair_and_a_triple(batch):
    extended = Fragments(CONFIG, ELEMENTS, seed=0)(batch, 0, 0)
    graph, n = extended.graph, batch.graph.num_atoms
    assert graph.num_structures == 4 and graph.num_atoms == n + 5
    assert torch.equal(graph.structure[n:], torch.tensor([2, 2, 3, 3, 3]))
    assert torch.equal(graph.positions[:n], batch.graph.positions)
    for known in (extended.has_energy, extended.has_forces, extended.has_virial):
        assert not known[2:].any()
    assert not extended.max_force[:n].any() and (extended.max_force[n:] > 8).all()


def test_seed_epoch_and_number_determine_the_fragments(batch):
    def positions(seed, epoch, number):
        return Fragments(CONFIG, ELEMENTS, seed)(batch, epoch, number).graph.positions[
            batch.graph.num_atoms :
        ]

    assert torch.equal(positions(0, 1, 2), positions(0, 1, 2))
    others = [positions(*key) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert not any(torch.equal(positions(0, 1, 2), other) for other in others)


def test_distances_are_those_that_the_network_sees(batch):
    """None is below the middle of the window; edges are those within the cutoff, in both directions."""
    fragments, shortest, elements = Fragments(CONFIG, ("H", "O"), seed=0), np.inf, set()
    for number in range(300):
        graph = fragments(batch, 0, number).graph
        added = graph.destination >= batch.graph.num_atoms
        length = graph.edge_vectors()[added].norm(dim=1)
        assert (length < 4.0).all() and len(length) % 2 == 0
        shortest = min([shortest, *length.tolist()])
        elements |= set(graph.atomic_numbers[batch.graph.num_atoms :].tolist())
    assert 0.9 <= shortest < 0.92 and elements == {1, 8}


def prediction_of(batch, force: float) -> Prediction:
    forces = torch.zeros_like(batch.forces)
    forces[-1, 0] = force
    forces.requires_grad_()
    b = batch.graph.num_structures
    zeros = torch.zeros(b, dtype=torch.float64)
    return Prediction(batch.energy + zeros, torch.zeros(len(forces)), forces, batch.virial)


def test_only_forces_above_the_bound_count(batch):
    """A force of bound + e - 1 on one of five atoms adds 0.1 / 5 to the loss, as its logarithm is one."""
    extended = Fragments(CONFIG, ELEMENTS, seed=0)(batch, 0, 0)
    bound = float(extended.max_force[-1])
    loss = Loss(0.0, 0.0, 0.0)
    below = prediction_of(extended, 0.99 * bound)
    value, _ = loss(below, extended)
    assert float(value.detach()) == 0
    above = prediction_of(extended, bound + np.e - 1)
    value, _ = loss(above, extended)
    assert float(value.detach()) == pytest.approx(0.1 / 5)
    (gradient,) = torch.autograd.grad(value, above.forces)
    assert gradient[-1, 0] == pytest.approx(0.1 / 5 / np.e) and not gradient[:-1].any()


def test_fragments_leave_the_errors_of_the_labels(batch):
    extended = Fragments(CONFIG, ELEMENTS, seed=0)(batch, 0, 0)
    loss = Loss(2.0, 3.0, 0.0)

    def terms(b):
        forces = torch.ones_like(b.forces)
        forces[batch.graph.num_atoms :] = 0
        zeros = torch.zeros(b.graph.num_structures, dtype=torch.float64)
        return loss(Prediction(b.energy + 1.5, zeros, forces, b.virial), b)

    for a, b in zip(terms(batch)[1].values(), terms(extended)[1].values(), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-15)
