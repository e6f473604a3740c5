"""Comparison of a compiled potential with its eager form."""

import math

import torch
from torch import Tensor

from dpa4.execution.regions import in_eager_mode
from dpa4.graph import Graph, first_atoms
from dpa4.potential.potential import Potential


def compare_with_eager(potential: Potential, graph: Graph) -> dict[str, float]:
    """Compare a compiled potential with its eager form, on a graph and on the same graph without its last atom.

    The second size reveals code that is only valid for the sizes it was compiled with.

    Returns:
        Largest deviations relative to the largest eager entry: of the energy, the forces and, in training mode, of
        the parameter gradients of the mean square force, where errors of second derivatives show first.
    """
    smaller = first_atoms(graph, graph.num_atoms - 1)
    graphs = [graph, smaller] if smaller.num_edges > 1 else [graph]
    compiled = [probe(potential, g) for g in graphs]
    with in_eager_mode(potential):
        eager = [probe(potential, g) for g in graphs]
    pairs = list(zip(compiled, eager, strict=True))
    return {name: _worst([_deviation(c[name], e[name]) for c, e in pairs]) for name in eager[0]}


def probe(potential: Potential, graph: Graph) -> dict[str, list[Tensor]]:
    """Compute the quantities that are compared.

    Returns:
        The energy, the forces, and in training mode the parameter gradients of the mean square force.
    """
    prediction = potential(graph)
    found = {"energy": [prediction.energy.detach()], "forces": [prediction.forces.detach()]}
    if potential.training and graph.num_edges:
        parameters = [p for p in potential.parameters() if p.requires_grad]
        loss = prediction.forces.square().mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        zipped = zip(gradients, parameters, strict=True)
        found["parameter gradients"] = [torch.zeros_like(p) if g is None else g for g, p in zipped]
    return found


def _deviation(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest expected entry; NaN if an entry is NaN."""
    scale = _largest(expected)
    worst = _largest([a - b for a, b in zip(actual, expected, strict=True)])
    return worst / scale if scale and math.isfinite(scale) else worst


def _worst(deviations: list[float]) -> float:
    return float(torch.tensor(deviations, dtype=torch.float64).max())  # unlike Python's max, propagates NaN


def _largest(tensors: list[Tensor]) -> float:
    sizes = [t.abs().max() for t in tensors if t.numel()]
    return float(torch.stack(sizes).max()) if sizes else 0.0  # propagates NaN
