"""The DPA4 network, from elements and edge vectors to atomic energies."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.block import Block, FeedForward, read_out
from dpa4.model.config import ModelConfig, auto_width
from dpa4.model.edges import EdgeGeometry, Edges, Neighborhood, in_parts
from dpa4.model.ghosts import WHOLE, Domain
from dpa4.model.layers import Linear
from dpa4.model.radial import RadialFeatures, RadialNetwork, radial_basis
from dpa4.model.seed import ChargeSpinEmbedding, ElementSeed, Embedding, EnvironmentSeed, Unconditioned
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import gather

MAX_EDGES = {"cpu": 16_384, "cuda": 262_144}
"""Edges processed at once, by type of device. On a CPU, edge features of this size stay in the cache (docs/adr/0012).
On a GPU the limit bounds the memory, and parts of this size keep the device busy; wider networks have fewer edges."""

EDGE_WIDTH = 1024
"""Largest width of an edge (`ModelConfig.edge_widths`) for which MAX_EDGES applies on a GPU: a tensor on edges then
has at most 1 GiB in float32. The preset plus has a width of 832, pro of 2,048."""


def max_edges(config: ModelConfig) -> dict[str, int]:
    """Highest number of edges that a network processes at once, by type of device."""
    share = min(1.0, EDGE_WIDTH / max(config.edge_widths))
    return MAX_EDGES | {"cuda": int(MAX_EDGES["cuda"] * share)}


class EnergyNetwork(nn.Module):
    """Gated dense layers from the descriptor to one energy per atom (docs/theory.md, "Readout and energy")."""

    def __init__(self, channels: int, widths: tuple[int, ...]):
        super().__init__()
        sizes = [channels]
        for width in widths:
            sizes.append(width or auto_width(channels))
        self.hidden = nn.ModuleList(
            Linear(a, 2 * b, bias=True) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.output = Linear(sizes[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map descriptors (N, C) to energies (N,), in eV."""
        for layer in self.hidden:
            value, gate = layer(x).chunk(2, dim=-1)
            x = value * functional.silu(gate)
        return self.output(x)[:, 0]


class DPA4(nn.Module):
    """Equivariant message-passing network (arXiv:2606.02419; docs/theory.md).

    The network sees elements and edge vectors only, so its energy is invariant to translations and permutations. The
    energy is invariant to rotations because every layer is equivariant.

    Attributes:
        block_autocast: Lower precision (torch.bfloat16) for the matrix products of the interaction blocks;
            geometry, norms, softmax, residual stream and read-out keep the precision of the parameters.
        max_edges: Highest number of edges processed at once, by type of device; bounds the memory.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, lmax = config.channels, config.degrees[0]
        self.config, self.lmax = config, lmax
        self.block_autocast: torch.dtype | None = None
        self.max_edges = max_edges(config)
        self.geometry = EdgeGeometry(config)
        self.basis = radial_basis(config)
        hidden = [width or c for width in config.radial_mlp]
        self.radial = RadialNetwork(
            config.n_radial,
            hidden,
            lmax + 1,
            c,
            norm=config.edge_norm.radial,
            weighted=not config.pre_release,
        )
        self.types = Embedding(len(config.elements), c, padding=True)
        self.charge_spin = ChargeSpinEmbedding(c) if config.charge_spin else Unconditioned()
        self.seed = EnvironmentSeed(config) if config.use_env_seed else ElementSeed(config)
        self.blocks = nn.ModuleList(Block(config, l) for l in config.degrees)
        readout_degree = config.degrees[-1] if config.so3_readout != "none" else 0
        self.readout_size = (readout_degree + 1) ** 2
        self.readout = nn.ModuleList(read_out(config, readout_degree) for _ in range(config.readout_layers))
        self.energy = EnergyNetwork(c, config.fitting)

    def forward(
        self,
        species: Tensor,
        vectors: Tensor,
        source: Incidence,
        destination: Incidence,
        charge_spin: Tensor,
        domain: Domain = WHOLE,
    ) -> Tensor:
        """Compute the energy of every own atom, without its reference energy.

        Args:
            species: Index of the element of each node in ``config.elements``, (N,).
            vectors: Edge vectors from destination to source, (E, 3), in Angstrom.
            source: Neighbour of each edge.
            destination: Centre of each edge, an own atom; edges are sorted by centre.
            charge_spin: Total charge and multiplicity of each node's structure, (N, 2) int64.
            domain: The n own atoms among the N nodes; all of them by default.

        Returns:
            (n,), in eV.
        """
        return self.energy(self.descriptor(species, vectors, source, destination, charge_spin, domain))

    def descriptor(
        self,
        species: Tensor,
        vectors: Tensor,
        source: Incidence,
        destination: Incidence,
        charge_spin: Tensor,
        domain: Domain = WHOLE,
    ) -> Tensor:
        """Compute the invariant features of every own atom, (n, C); arguments as in `forward`."""
        gates_open = self.geometry.openness(vectors, source, destination, domain)
        ends = in_parts(source, destination, self.max_edges[vectors.device.type])
        sizes = [centers.num_nodes for _, centers in ends]
        own = (domain.own(t).split(sizes) for t in (species, charge_spin))
        edges = vectors.split([len(centers.index) for _, centers in ends])
        nodes, radial, neighborhoods, last = [], [], [], self.radial.last_of_degrees()
        for own_vectors, own_species, own_charge_spin, (neighbours, centers) in zip(
            edges, *own, ends, strict=True
        ):
            geometry, degree_norm = self.locate(own_vectors, neighbours, centers, gates_open)
            neighborhood = Neighborhood(geometry, neighbours, centers, degree_norm)
            x, hidden, pair = self.input_features(
                species, charge_spin, own_species, own_charge_spin, neighborhood
            )
            nodes.append(x)
            radial.append(RadialFeatures(hidden, pair, last))
            neighborhoods.append(neighborhood)
        x = nodes[0] if len(nodes) == 1 else torch.cat(nodes)
        with torch.autocast(x.device.type, self.block_autocast, enabled=self.block_autocast is not None):
            for block in self.blocks:
                x = block(x, radial, neighborhoods, domain)
        return self.read_out(x)

    def locate(
        self, vectors: Tensor, source: Incidence, destination: Incidence, gates_open: Tensor
    ) -> tuple[Edges, Tensor]:
        """Compute the geometry of the edges, which depends on no parameter, and `Neighborhood.degree_norm`.

        Args:
            vectors: Edge vectors from destination to source, (E, 3), in Angstrom.
            source: Neighbour of each edge.
            destination: Centre of each edge.
            gates_open: Freeze gate of each node, (N,), see `EdgeGeometry.openness`.
        """
        neighborhood = self.geometry(vectors, gates_open, source, destination)
        return neighborhood.edges, neighborhood.degree_norm

    def input_features(
        self,
        species: Tensor,
        charge_spin: Tensor,
        own_species: Tensor,
        own_charge_spin: Tensor,
        neighborhood: Neighborhood,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the input features of the centres, and the radial and element features of the edges.

        Args:
            species: Index of the element of all nodes, (N,).
            charge_spin: Total charge and multiplicity of all nodes, (N, 2).
            own_species: Index of the element of the centres, (n,).
            own_charge_spin: Total charge and multiplicity of the centres, (n, 2).
            neighborhood: The edges, complete for the centres.

        Returns:
            Input features (n, D, C), `RadialFeatures.hidden` and `RadialFeatures.pair`.
        """
        basis = self.basis(neighborhood.edges.length)
        types = self.charge_spin(self.types(species), charge_spin)
        own_types = self.charge_spin(self.types(own_species), own_charge_spin)
        pair = gather(types, neighborhood.source) + gather(own_types, neighborhood.destination)
        radial = self.radial(basis, neighborhood.edges.weight, pair)
        x = self.seed(own_types, species, own_species, basis, radial, neighborhood)
        return x, radial.hidden, radial.pair

    def read_out(self, x: Tensor) -> Tensor:
        """Compute invariant features (N, C) from node features (N, D, C)."""
        x = x[:, : self.readout_size]
        *layers, last = cast(Iterable[FeedForward], self.readout)
        for layer in layers:
            x = x + layer(x)
        return x[:, 0] + last.scalars(x)
