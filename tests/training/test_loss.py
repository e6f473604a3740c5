"""Loss: terms and weights by hand, structures without labels, gradients."""

import numpy as np
import pytest
import torch

from dpa4.data import Batch
from dpa4.graph import Graph
from dpa4.potential import Prediction
from dpa4.training.loss import Loss

SIZES = (2, 3, 1)


def batch(
    has_energy=(True, True, True), has_forces=(True, True, True), has_virial=(True, True, True), weight=1.0
):
    """Three structures without edges; all labels are zero, like absent ones."""
    n, b = sum(SIZES), len(SIZES)
    graph = Graph(
        atomic_numbers=torch.ones(n, dtype=torch.int64),
        positions=torch.zeros(n, 3, dtype=torch.float64),
        cell=torch.zeros(b, 3, 3, dtype=torch.float64),
        structure=torch.arange(b).repeat_interleave(torch.tensor(SIZES)),
        source=torch.zeros(0, dtype=torch.int64),
        destination=torch.zeros(0, dtype=torch.int64),
        shift=torch.zeros(0, 3, dtype=torch.float64),
        charge_spin=torch.tensor([[0, 1]] * b),
    )
    zeros = torch.zeros(b, dtype=torch.float64)
    return Batch(
        graph=graph,
        energy=zeros,
        forces=torch.zeros(n, 3, dtype=torch.float64),
        virial=torch.zeros(b, 3, 3, dtype=torch.float64),
        has_energy=torch.tensor(has_energy),
        has_forces=torch.tensor(has_forces),
        has_virial=torch.tensor(has_virial),
        weight=torch.full((b,), weight, dtype=torch.float64),
        max_force=torch.zeros(n, dtype=torch.float64),
        counts=torch.zeros(4, dtype=torch.int64),
    ).counted()


def prediction(seed=0, scale=1.0):
    """Random predictions, which equal their errors, since all labels are zero."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return torch.tensor(scale * rng.normal(size=shape), requires_grad=True)

    return Prediction(leaf(3), leaf(6), leaf(6, 3), leaf(3, 3, 3))


def plain_terms(p, kind, delta, energy=(0, 1, 2), forces=(0, 1, 2), virial=(0, 1, 2)):
    def penalty(x):
        x = abs(x)
        return {"mae": x, "mse": x * x, "huber": x * x / 2 if x <= delta else delta * (x - delta / 2)}[kind]

    starts = np.cumsum((0, *SIZES))
    e, f, v = (t.detach().numpy() for t in (p.energy, p.forces, p.virial))
    atoms = [i for b in forces for i in range(starts[b], starts[b + 1])]
    if kind == "mse":
        force_errors = [np.mean(f[i] ** 2) for i in atoms]
    else:
        force_errors = [penalty(np.linalg.norm(f[i])) for i in atoms]
    return {
        "energy": np.mean([penalty(e[b] / SIZES[b]) for b in energy]),
        "forces": np.mean(force_errors),
        "virial": np.mean([penalty(x / SIZES[b]) for b in virial for x in v[b].ravel()]),
    }


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
def test_terms_and_weights(kind):
    p = prediction()
    loss, terms = Loss(2.0, 3.0, 5.0, kind, huber_delta=0.4)(p, batch())
    expected = plain_terms(p, kind, 0.4)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-12), name
        assert not terms[name].requires_grad
    assert loss.item() == pytest.approx(
        2 * expected["energy"] + 3 * expected["forces"] + 5 * expected["virial"], rel=1e-12
    )
    assert loss.dtype == torch.float64


def test_structures_without_a_label_stay_out_of_the_mean():
    p = prediction()
    masked = batch((True, False, True), (False, True, True), (False, True, False))
    _, terms = Loss(1, 1, 1)(p, masked)
    expected = plain_terms(p, "mae", 0, (0, 2), (1, 2), (1,))
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
def test_a_batch_without_any_label_gives_zero_with_a_graph(kind):
    p = prediction()
    none = (False,) * 3
    loss, terms = Loss(1, 1, 1, kind)(p, batch(none, none, none))
    assert loss.item() == 0 and all(t.item() == 0 for t in terms.values())
    loss.backward()
    for leaf in (p.energy, p.forces, p.virial):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
def test_gradient_is_finite_where_the_prediction_is_exact(kind):
    p = prediction(scale=0.0)
    loss, _ = Loss(1, 1, 1, kind)(p, batch())
    loss.backward()
    assert torch.isfinite(p.forces.grad).all() and p.forces.grad.abs().max() == 0


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
def test_gradient_agrees_with_finite_differences(kind):
    fixed, labels = prediction(), batch()

    def value(energy, forces, virial):
        return Loss(2.0, 3.0, 5.0, kind, 0.4)(
            Prediction(energy, fixed.atomic_energies, forces, virial), labels
        )[0]

    assert torch.autograd.gradcheck(value, (fixed.energy, fixed.forces, fixed.virial))


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
def test_structures_without_atoms_change_nothing(kind):
    p, labels = prediction(), batch()
    expected, _ = Loss(2.0, 3.0, 5.0, kind)(p, labels)
    b, none = 2, torch.zeros(2, dtype=torch.bool)
    leaf = torch.zeros(b, dtype=torch.float64, requires_grad=True)
    longer = {
        name: torch.cat([getattr(labels, name), none]) for name in ("has_energy", "has_forces", "has_virial")
    }
    longer |= {name: torch.cat([getattr(labels, name), leaf.detach()]) for name in ("energy", "weight")}
    zeros = torch.zeros(b, 3, 3, dtype=torch.float64)
    graph = labels.graph._replace(cell=torch.cat([labels.graph.cell, zeros]))
    padded = labels._replace(graph=graph, virial=torch.cat([labels.virial, zeros]), **longer)
    q = p._replace(energy=torch.cat([p.energy, leaf]), virial=torch.cat([p.virial, zeros]))
    loss, _ = Loss(2.0, 3.0, 5.0, kind)(q, padded)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_targets_of_weight_zero_are_reported_but_not_differentiated():
    p = prediction()
    loss, terms = Loss(1.0, 1.0, 0.0)(p, batch())
    loss.backward()
    assert p.virial.grad is None and terms["virial"] > 0


def test_weights_of_structures_multiply():
    p = prediction()
    one, _ = Loss(1, 1, 1)(p, batch())
    three, _ = Loss(1, 1, 1)(p, batch(weight=3.0))
    assert three.item() == pytest.approx(3 * one.item())


def test_huber_joins_smoothly():
    below, above = (
        Loss(1, 0, 0, "huber", 0.01)(
            prediction(scale=0)._replace(energy=torch.tensor(e) * torch.tensor(SIZES)), batch()
        )[0].item()
        for e in ([0.01 - 1e-9] * 3, [0.01 + 1e-9] * 3)
    )
    assert below == pytest.approx(above, rel=1e-6) == pytest.approx(0.5e-4, rel=1e-6)
