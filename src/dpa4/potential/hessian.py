"""Second derivatives of the energy with respect to the positions, by differentiating twice."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpa4.graph import Graph
from dpa4.potential.potential import Potential


def hessian_vector_product(potential: Potential, graph: Graph, vector: Tensor) -> Tensor:
    """Product of the Hessian of the energy with a vector: how the gradient changes along a displacement.

    It takes a few times as long as the forces, and no matrix. The displacement changes the forces by minus the
    product. Structures of a batch do not touch each other, so one call gives a product for each of them.

    Args:
        potential: The potential, not compiled. In float32 the relative error is some 1e-5.
        graph: One or more structures, on the device of the potential.
        vector: Displacement of every atom, (N, 3).

    Returns:
        (N, 3) float64, in eV/Angstrom^2 times the unit of the vector.

    Raises:
        ValueError: If the vector has another shape, an element, charge or spin is outside the model, or the
            potential is compiled.
    """
    if vector.shape != graph.positions.shape:
        raise ValueError(
            f"the vector has shape {tuple(vector.shape)}; a displacement of {graph.num_atoms} atoms has "
            f"{tuple(graph.positions.shape)}"
        )
    return _second_derivative(potential, graph)(vector.to(graph.positions))


def hessian(potential: Potential, graph: Graph) -> Tensor:
    """The Hessian of the energy of one small structure, column by column.

    Args:
        potential: The potential, not compiled; float64 for vibrations.
        graph: One structure, on the device of the potential. The time grows with the square of its size.

    Returns:
        (3 N, 3 N) float64 in eV/Angstrom^2; x, y, z of the first atom come first.

    Raises:
        ValueError: If the graph holds more than one structure, an element, charge or spin is outside the model, or
            the potential is compiled.
    """
    if graph.num_structures != 1:
        raise ValueError(f"the Hessian is that of one structure, got {graph.num_structures}")
    product = _second_derivative(potential, graph)
    units = torch.eye(graph.positions.numel()).to(graph.positions).unflatten(1, (-1, 3))
    return torch.stack([product(unit).flatten() for unit in units], dim=1)


def _second_derivative(potential: Potential, graph: Graph) -> Callable[[Tensor], Tensor]:
    """The product with vectors (N, 3); the energy is differentiated once for all of them."""
    if "embed" in vars(potential.model):  # put there by compile_potential
        raise ValueError("a compiled potential has no second derivatives; load it anew and do not compile it")
    potential.check(graph)
    graph = potential.without_excluded(graph)
    source, destination = graph.source, graph.destination
    with torch.enable_grad():
        vectors = graph.edge_vectors().detach().requires_grad_()
        if graph.num_edges == 0:  # autograd has no path from an energy without edges
            return torch.zeros_like
        atomic = potential.atomic_energies(graph, vectors)
        (gradient,) = torch.autograd.grad(atomic.sum(), vectors, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        along = vector[source] - vector[destination]
        (change,) = torch.autograd.grad(gradient, vectors, along, retain_graph=True)
        return torch.zeros_like(vector).index_add(0, source, change).index_add(0, destination, -change)

    return product
