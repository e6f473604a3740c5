"""Functions with derivatives of their own compute those that a backward pass asks for, and no others."""

import pytest
import torch
from dpa4.ops.pairs import pair_dot
from torch.utils._python_dispatch import TorchDispatchMode

from dpa4.graph import collate
from dpa4.ops.edge_products import edge_matmul, edge_outer, scatter_matmul
from dpa4.ops.incidence import Incidence
from dpa4.ops.sparse_product import Terms, bilinear
from dpa4.ops.split_matmul import precise_matmul
from helpers import assert_close, graph_of, molecule, random_potential


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


END = Incidence.of(torch.tensor([1, 0, 1]), 2)
TERMS = Terms.of(torch.ones(2, 3, 4, dtype=torch.float64))
FUNCTIONS = {  # with shapes of its two arguments
    "edge_matmul": (lambda a, x: edge_matmul(a, x, END), (3, 1, 4, 5), (2, 5, 16)),
    "scatter_matmul": (lambda a, g: scatter_matmul(a, g, END), (3, 1, 4, 5), (3, 4, 16)),
    "edge_outer": (lambda g, x: edge_outer(g, x, END, 1), (3, 4, 16), (2, 5, 16)),
    "precise_matmul": (precise_matmul, (6, 5), (5, 4)),
    "pair_dot": (lambda x, y: pair_dot(x, y, END, END, 1), (2, 16), (2, 16)),
    "bilinear": (lambda a, b: bilinear(a, b, TERMS, 2), (6, 3, 16), (6, 4, 16)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("way", ["grad", "backward"])
def test_one_gradient_takes_one_product(name, leaves, way):
    function, *shapes = FUNCTIONS[name]
    made = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs = made if leaves else [2 * t for t in made]
    y = function(*inputs).sin().sum()
    expected = torch.autograd.grad(y, inputs, retain_graph=True)
    for which in (0, 1):
        asked = made[which] if leaves or way == "backward" else inputs[which]
        with Calls() as calls:
            if way == "grad":
                (found,) = torch.autograd.grad(y, asked, retain_graph=True)
            else:
                y.backward(inputs=[asked], retain_graph=True)
                found, asked.grad = asked.grad, None
        assert_close(found, expected[which] * (1 if asked is inputs[which] else 2))
        products = [n for n in calls.names if n.startswith("dpa4::") or n.endswith(("::mm", "::bmm"))]
        untold = leaves and way == "grad"  # PyTorch does not say, so both may be computed
        assert len(products) == 1 or untold


def test_training_asks_for_no_gradient_of_the_geometry():
    """The same gradients of parameters, from fewer operations."""
    potential = random_potential().train()
    graph = collate([graph_of(molecule()), graph_of(molecule(1))])
    parameters = list(potential.parameters())
    found, counts = [], []
    for inputs in (None, parameters):
        prediction = potential(graph)
        value = prediction.energy.square().sum() + prediction.forces.square().sum()
        with Calls() as calls:
            value.backward(inputs=inputs)
        found.append([p.grad for p in parameters])
        counts.append(len(calls.names))
        for p in parameters:
            p.grad = None
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other)
    assert counts[1] < 0.95 * counts[0]
