"""Second derivatives of the energy with respect to the positions, by differentiating twice."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpa4.graph import Graph
from dpa4.potential.potential import Potential


class Expansion(NamedTuple):
    """The energy of B structures with N atoms to second order along a displacement; float64, eV and Angstrom."""

    energy: Tensor  # (B,)
    forces: Tensor  # (N, 3)
    product: Tensor  # (N, 3), of the Hessian with the displacement


def expand_energy(potential: Potential, graph: Graph, vector: Tensor) -> Expansion:
    """Energy, forces and the product of the Hessian with a vector, from one forward pass.

    Arguments and errors as `hessian_vector_product`.
    """
    if vector.shape != graph.positions.shape:
        raise ValueError(
            f"the vector has shape {tuple(vector.shape)}; a displacement of {graph.num_atoms} atoms has "
            f"{tuple(graph.positions.shape)}"
        )
    found = _Differentiated(potential, graph)
    energy = graph.positions.new_zeros(graph.num_structures).index_add(0, graph.structure, found.atomic)
    return Expansion(energy, found.forces(), found.product(vector.to(graph.positions), last=True))


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
    return expand_energy(potential, graph, vector).product


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
    found = _Differentiated(potential, graph)
    units = torch.eye(graph.positions.numel()).to(graph.positions).unflatten(1, (-1, 3))
    return torch.stack([found.product(unit).flatten() for unit in units], dim=1)


class _Differentiated:
    """Energies of atoms and their first derivative, to be differentiated once more along any displacement."""

    def __init__(self, potential: Potential, graph: Graph):
        if "embed" in vars(potential.model):  # put there by compile_potential
            raise ValueError(
                "a compiled potential has no second derivatives; load it anew and do not compile it"
            )
        potential.check(graph)
        self.graph = graph = potential.without_excluded(graph)
        with torch.enable_grad():
            self._vectors = graph.edge_vectors().detach().requires_grad_()
            atomic = potential.atomic_energies(graph, self._vectors)
            self._gradient = torch.zeros_like(self._vectors)
            if graph.num_edges:  # autograd has no path from an energy without edges
                (self._gradient,) = torch.autograd.grad(atomic.sum(), self._vectors, create_graph=True)
        self.atomic = atomic.detach()  # (N,)

    def forces(self) -> Tensor:
        """Forces on the atoms (N, 3)."""
        return -self._of_atoms(self._gradient.detach())

    def product(self, vector: Tensor, last: bool = False) -> Tensor:
        """The Hessian times a displacement (N, 3); the last one frees the memory as it goes."""
        along = vector[self.graph.source] - vector[self.graph.destination]
        if not self.graph.num_edges:
            return torch.zeros_like(vector)
        (change,) = torch.autograd.grad(self._gradient, self._vectors, along, retain_graph=not last)
        return self._of_atoms(change)

    def _of_atoms(self, edges: Tensor) -> Tensor:
        """From derivatives by edge vectors (E, 3) to those by positions (N, 3)."""
        zeros = torch.zeros_like(self.graph.positions)
        return zeros.index_add(0, self.graph.source, edges).index_add(0, self.graph.destination, -edges)
