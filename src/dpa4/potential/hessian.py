"""Second derivatives of the energy with respect to the positions, by automatic differentiation."""

from typing import NamedTuple

import torch
from torch import Tensor

from dpa4.graph import Graph
from dpa4.potential.potential import Potential, recordable
from dpa4.system import own_settings


class Expansion(NamedTuple):
    """Second-order expansion of the energy along a displacement: B structures, N atoms; float64, eV, Angstrom."""

    energy: Tensor  # (B,)
    forces: Tensor  # (N, 3)
    product: Tensor  # (N, 3), Hessian times displacement


@own_settings
def expand_energy(potential: Potential, graph: Graph, vector: Tensor) -> Expansion:
    """Compute energy, forces and the product of the Hessian with a vector in one forward pass.

    Arguments and errors as in `hessian_vector_product`.
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
    """Product of the Hessian of the energy with a vector: the change of the gradient along a displacement.

    The product takes a few times as long as the forces; the Hessian itself is never formed. To first order, a
    displacement changes the forces by minus its product. Structures of a batch are independent of each other, so one
    call computes the product for each of them.

    Args:
        potential: The potential, not compiled. In float32 the relative error is about 1e-5.
        graph: One or more structures, on the device of the potential.
        vector: Displacement of every atom, (N, 3).

    Returns:
        (N, 3) float64, in eV/Angstrom^2 times the unit of the vector.

    Raises:
        ValueError: If the shape of the vector is not that of the positions, an element, charge or spin is outside the
            model, or the potential is compiled.
    """
    return expand_energy(potential, graph, vector).product


@own_settings
def hessian(potential: Potential, graph: Graph) -> Tensor:
    """Hessian of the energy of one small structure, computed column by column.

    Args:
        potential: The potential, not compiled; float64 for vibrations.
        graph: One structure, on the device of the potential. The time grows with the square of the number of atoms.

    Returns:
        (3 N, 3 N) float64, in eV/Angstrom^2, ordered as x, y, z of the first atom, of the second, and so on.

    Raises:
        ValueError: If the graph holds more than one structure, an element, charge or spin is outside the model, or
            the potential is compiled.
    """
    if graph.num_structures != 1:
        raise ValueError(f"the Hessian needs a graph of one structure, got {graph.num_structures}")
    found = _Differentiated(potential, graph)
    units = torch.eye(graph.positions.numel()).to(graph.positions).unflatten(1, (-1, 3))
    return torch.stack([found.product(unit).flatten() for unit in units], dim=1)


class _Differentiated:
    """Atomic energies and their first derivative, ready to be differentiated again along any displacement."""

    def __init__(self, potential: Potential, graph: Graph):
        if potential.is_compiled:
            raise ValueError(
                "a compiled potential does not support second derivatives; load it again and do not compile it"
            )
        potential.check(graph)
        self.graph = graph = potential.without_excluded(recordable(graph))
        with torch.enable_grad():
            self._vectors = graph.edge_vectors().detach().requires_grad_()
            atomic = potential.atomic_energies(graph, self._vectors)
            self._gradient = torch.zeros_like(self._vectors)
            if graph.num_edges:  # without edges, autograd has no path from the energy to the vectors
                (self._gradient,) = torch.autograd.grad(atomic.sum(), self._vectors, create_graph=True)
        self.atomic = atomic.detach()  # (N,)

    def forces(self) -> Tensor:
        """Forces on the atoms, (N, 3)."""
        return -self._of_atoms(self._gradient.detach())

    def product(self, vector: Tensor, last: bool = False) -> Tensor:
        """Product of the Hessian with a displacement (N, 3). With ``last``, the autograd graph is freed."""
        along = vector[self.graph.source] - vector[self.graph.destination]
        if not self.graph.num_edges:
            return torch.zeros_like(vector)
        (change,) = torch.autograd.grad(self._gradient, self._vectors, along, retain_graph=not last)
        return self._of_atoms(change)

    def _of_atoms(self, edges: Tensor) -> Tensor:
        """Convert derivatives by edge vectors (E, 3) to derivatives by positions (N, 3)."""
        zeros = torch.zeros_like(self.graph.positions)
        return zeros.index_add(0, self.graph.source, edges).index_add(0, self.graph.destination, -edges)
