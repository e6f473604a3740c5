"""Potential: network, reference energies and nuclear repulsion, differentiated to forces and virial."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from dpa4.data.coverage import Coverage
from dpa4.graph import Graph
from dpa4.model import DPA4, ModelConfig
from dpa4.model.ghosts import WHOLE, Domain
from dpa4.model.seed import ChargeSpinEmbedding
from dpa4.model.short_range import short_range
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import segment_sum
from dpa4.potential.precision import Precision
from dpa4.system import float32_by_default, own_settings


class Prediction(NamedTuple):
    """Prediction for B structures with N atoms in all; float64, eV and Angstrom."""

    energy: Tensor  # (B,)
    atomic_energies: Tensor  # (N,)
    forces: Tensor  # (N, 3)
    virial: Tensor  # (B, 3, 3), -dE/dstrain = -volume * stress (tensile stress positive)


class Potential(nn.Module):
    """Conservative potential: one energy, its exact forces and virial (docs/theory.md, "Readout and energy").

    Energies are summed in float64, whatever the precision of the network. In training mode, forces and virial can
    be differentiated with respect to the parameters.

    Attributes:
        reference_energies: Energy of each isolated atom in the order of ``elements``, (T,) float64, in eV.
        excluded: Pairs of elements without edges between them, (T, T) bool.
        species_of: Index of the element by atomic number, int64; -1 for elements outside the model.
        coverage: Coverage of the training data if the potential was trained with this package, else None.
            Checkpoints contain it.
    """

    reference_energies: Tensor
    excluded: Tensor
    species_of: Tensor

    @own_settings
    @float32_by_default()
    def __init__(self, config: ModelConfig, reference_energies: Mapping[str, float] | None = None):
        """Build a potential with freshly initialised weights.

        Args:
            config: Architecture.
            reference_energies: Energy of each isolated atom, in eV; zero for missing elements.

        Raises:
            ValueError: If a reference energy is given for an element outside the model.
        """
        super().__init__()
        reference_energies = reference_energies or {}
        if unknown := set(reference_energies) - set(config.elements):
            raise ValueError(
                f"reference energies are given for {sorted(unknown)}, but the model knows {list(config.elements)}"
            )
        self.config = config
        self.elements = config.elements
        self.coverage: Coverage | None = None
        self.model = DPA4(config)
        self.short_range = short_range(config)
        energies = [reference_energies.get(e, 0.0) for e in config.elements]
        self.register_buffer("reference_energies", torch.tensor(energies, dtype=torch.float64))
        species_of = torch.full((len(chemical_symbols),), -1)
        for index, element in enumerate(config.elements):
            species_of[atomic_numbers[element]] = index
        self.register_buffer("species_of", species_of, persistent=False)
        excluded = torch.zeros(len(config.elements), len(config.elements), dtype=torch.bool)
        for a, b in config.excluded_pairs:
            i, j = config.elements.index(a), config.elements.index(b)
            excluded[i, j] = excluded[j, i] = True
        self.register_buffer("excluded", excluded, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the network."""
        return self.model.types.table.dtype

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.reference_energies.device

    @property
    def is_compiled(self) -> bool:
        """True if parts of the network are compiled (`dpa4.execution.regions.compile_potential`)."""
        from dpa4.tracing.region import Region  # imports the compiler, which takes a second

        return any(
            isinstance(part, Region) for module in self.model.modules() for part in vars(module).values()
        )

    @property
    def precision(self) -> Precision:
        """Precision of the matrix products of the interaction blocks, see `dpa4.potential.precision.Precision`."""
        return "high" if self.model.block_autocast is None else "fast"

    @precision.setter
    def precision(self, precision: Precision) -> None:
        self.model.block_autocast = torch.bfloat16 if precision == "fast" else None

    @contextmanager
    def at_precision(self, precision: Precision) -> Iterator[None]:
        """Use a precision within the block; the former precision returns afterwards."""
        before = self.precision
        self.precision = precision
        try:
            yield
        finally:
            self.precision = before

    @own_settings
    def _apply(self, fn: Any, recurse: bool = True) -> "Potential":
        """Move or cast the network; reference energies stay float64."""
        energies = self.reference_energies
        super()._apply(fn, recurse)
        self.reference_energies = energies.to(self.reference_energies.device)
        return self

    @own_settings
    def check(self, graph: Graph) -> None:
        """Refuse a graph that the model cannot describe.

        The check waits for the device, so call it where data enter, not in every step.

        Raises:
            ValueError: If an element, charge or spin is outside the model.
        """
        numbers = graph.atomic_numbers.cpu().unique()
        known = {atomic_numbers[e] for e in self.elements}
        if unknown := [int(z) for z in numbers if int(z) not in known]:
            names = ", ".join(f"{chemical_symbols[z]} ({z})" for z in unknown)
            what = f"element {names} is" if len(unknown) == 1 else f"elements {names} are"
            raise ValueError(f"{what} not in the model, which knows {', '.join(self.elements)}")
        if self.config.charge_spin:
            charge, spin = graph.charge_spin.cpu().unbind(-1)
            limit_q, limit_s = ChargeSpinEmbedding.MAX_CHARGE, ChargeSpinEmbedding.MAX_SPIN
            if bool(((charge < -limit_q) | (charge >= limit_q) | (spin < 0) | (spin > limit_s)).any()):
                raise ValueError(
                    f"charge must be in [-{limit_q}, {limit_q - 1}] and spin in [0, {limit_s}], "
                    f"got charge {charge.tolist()}, spin {spin.tolist()}"
                )

    @own_settings
    def forward(self, graph: Graph) -> Prediction:
        """Compute energy, forces and virial of a graph on the device of the model."""
        return self.of_edges(self.without_excluded(graph))

    @own_settings
    def of_edges(self, graph: Graph) -> Prediction:
        """Compute `forward` for a graph without excluded pairs, without waiting for the device."""
        graph = recordable(graph)
        ends = _ends(graph)
        atomic, vectors, gradient = self._differentiated(graph, ends)
        atomic = atomic if self.training else atomic.detach()
        return self._assemble(graph, ends, atomic, vectors, gradient)

    @own_settings
    def atomic_virials(self, graph: Graph) -> Tensor:
        """Virial of each atom, (N, 3, 3) in eV: half of the contribution of each edge that ends or starts at it.

        The sum of the atomic virials is the virial of `forward`. An atomic virial need not be symmetric.
        """
        graph = self.without_excluded(recordable(graph))
        source, destination = ends = _ends(graph)
        _, vectors, gradient = self._differentiated(graph, ends)
        virial = gradient[:, :, None] * -vectors[:, None, :]
        return 0.5 * (segment_sum(virial, source) + segment_sum(virial, destination))

    @own_settings
    def atomic_energies(self, graph: Graph, vectors: Tensor) -> Tensor:
        """Energy of each atom, (N,) in eV, as a differentiable function of the edge vectors (E, 3).

        In training mode it is also differentiable with respect to the parameters.
        """
        graph = recordable(graph)
        return self._atomic_energies(graph, vectors, _ends(graph))

    def _differentiated(self, graph: Graph, ends: "Ends") -> tuple[Tensor, Tensor, Tensor]:
        """Atomic energies (N,), edge vectors (E, 3), and derivative of the energy by the edge vectors (E, 3)."""
        with torch.enable_grad():
            vectors = graph.edge_vectors().detach().requires_grad_()
            atomic = self._atomic_energies(graph, vectors, ends)
            return atomic, vectors.detach(), self._gradient(atomic, vectors)

    @own_settings
    def domain_energies(
        self,
        atomic_numbers: Tensor,
        vectors: Tensor,
        source: Incidence,
        destination: Incidence,
        charge_spin: Tensor,
        domain: Domain = WHOLE,
    ) -> Tensor:
        """Energy of each own atom of a domain, (n,) in eV, as a differentiable function of the edge vectors.

        Args:
            atomic_numbers: Atomic numbers of the nodes, (N,) int64.
            vectors: Edge vectors from centre to neighbour, (E, 3) float64, in Angstrom, without excluded pairs.
            source: Neighbour of each edge, a node.
            destination: Centre of each edge, an own atom, ascending.
            charge_spin: Total charge and multiplicity of the structure of each node, (N, 2) int64.
            domain: The n own atoms among the N nodes; by default all nodes are own atoms.
        """
        species = self.species_of[atomic_numbers]
        vectors, repulsion = self.short_range(vectors, source, destination, atomic_numbers)
        network = self.model(species, vectors.to(self.dtype), source, destination, charge_spin, domain)
        return network.double() + self.reference_energies[domain.own(species)] + repulsion

    def _atomic_energies(self, graph: Graph, vectors: Tensor, ends: "Ends") -> Tensor:
        charge_spin = graph.charge_spin[graph.structure]
        return self.domain_energies(graph.atomic_numbers, vectors, *ends, charge_spin)

    @own_settings
    def descriptor(self, graph: Graph) -> Tensor:
        """Invariant features of every atom, (N, channels), the input of the energy network."""
        graph = self.without_excluded(graph)
        species, charge_spin = self.species_of[graph.atomic_numbers], graph.charge_spin[graph.structure]
        ends = _ends(graph)
        vectors, _ = self.short_range(graph.edge_vectors(), *ends, graph.atomic_numbers)
        return self.model.descriptor(species, vectors.to(self.dtype), *ends, charge_spin)

    def _gradient(self, atomic: Tensor, vectors: Tensor) -> Tensor:
        if vectors.shape[0] == 0:  # without edges, autograd has no path from the energy to the vectors
            return torch.zeros_like(vectors)
        (gradient,) = torch.autograd.grad(atomic.sum(), vectors, create_graph=self.training)
        return gradient

    @staticmethod
    def _assemble(
        graph: Graph, ends: "Ends", atomic: Tensor, vectors: Tensor, gradient: Tensor
    ) -> Prediction:
        """Forces and virial from dE/d(edge vector); moving an atom changes the edges that end or start at it."""
        source, destination = ends
        forces = segment_sum(gradient, destination) - segment_sum(gradient, source)
        structure = Incidence.of_sorted(graph.structure, graph.num_structures)
        virial = segment_sum(gradient[:, :, None] * -vectors[:, None, :], destination)
        virial, energy = segment_sum(virial, structure), segment_sum(atomic, structure)
        return Prediction(energy, atomic, forces, virial)

    def without_excluded(self, graph: Graph) -> Graph:
        """Remove the edges between excluded pairs of elements from a graph."""
        if not self.config.excluded_pairs:
            return graph
        species = self.species_of[graph.atomic_numbers]
        keep = ~self.excluded[species[graph.source], species[graph.destination]]
        return graph._replace(
            source=graph.source[keep], destination=graph.destination[keep], shift=graph.shift[keep]
        )


Ends = tuple[Incidence, Incidence]
"""Sources and destinations of the edges."""


def recordable(graph: Graph) -> Graph:
    """Copy the tensors of a graph that were created in inference mode; autograd refuses to save them."""
    return Graph(*(t.clone() if t.is_inference() else t for t in graph))


def _ends(graph: Graph) -> Ends:
    source = Incidence.of(graph.source, graph.num_atoms)
    return source, Incidence.of_sorted(graph.destination, graph.num_atoms)
