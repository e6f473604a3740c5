"""Input features of the nodes: element, charge and spin, environment.

See docs/theory.md, "Input features" and "Charge and spin".
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.config import ModelConfig
from dpa4.model.edges import SOFTENING, Neighborhood
from dpa4.model.layers import Linear, RMSNorm, append_zeros
from dpa4.model.radial import RadialFeatures
from dpa4.ops.edge_products import scatter_matmul
from dpa4.ops.segments import gather


class Embedding(nn.Module):
    """Table of learned vectors. ``padding`` adds a zero row at the end, as in the published checkpoints."""

    def __init__(self, rows: int, width: int, padding: bool = False):
        super().__init__()
        table = torch.randn(rows, width) * (rows + width) ** -0.5
        self.table = nn.Parameter(functional.pad(table, (0, 0, 0, int(padding))))

    def forward(self, index: Tensor) -> Tensor:
        """Look up rows (n,) int64: (n, width)."""
        return self.table[index]


class ChargeSpinEmbedding(nn.Module):
    """Embedding of the total charge and spin multiplicity of a structure, added to its element embeddings.

    Charges from -100 to 99 and multiplicities from 0 to 99 have a row in the tables.
    """

    MAX_CHARGE, MAX_SPIN = 100, 99

    def __init__(self, channels: int):
        super().__init__()
        self.charge = Embedding(2 * self.MAX_CHARGE, channels)
        self.spin = Embedding(self.MAX_SPIN + 1, channels)
        self.mix = Linear(2 * channels, channels, bias=True)

    def forward(self, types: Tensor, charge_spin: Tensor) -> Tensor:
        """Condition element embeddings (N, C) on the charge and spin of each atom's structure, (N, 2) int64."""
        charge, spin = charge_spin.unbind(-1)
        both = torch.cat([self.charge(charge + self.MAX_CHARGE), self.spin(spin)], dim=-1)
        return types + functional.silu(self.mix(both))


class Unconditioned(nn.Module):
    """Replacement for `ChargeSpinEmbedding` for models that ignore charge and spin."""

    def forward(self, types: Tensor, charge_spin: Tensor) -> Tensor:
        """Return the element embeddings unchanged."""
        return types


class ElementSeed(nn.Module):
    """Input features from the element alone: its embedding as scalars, zeros for l >= 1."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.padding = (config.degrees[0] + 1) ** 2 - 1

    def forward(
        self,
        types: Tensor,
        species: Tensor,
        own_species: Tensor,
        basis: Tensor,
        radial: RadialFeatures,
        neighborhood: Neighborhood,
    ) -> Tensor:
        """Features (n, D, C) from element embeddings (n, C); arguments as in `EnvironmentSeed.forward`."""
        return append_zeros(types[:, None], self.padding, 0)


class EnvironmentSeed(nn.Module):
    """Input features from the environment of an atom.

    Scalars are the element embedding, scaled and shifted by a learned invariant of the environment (FiLM). A 4 x A
    matrix per node sums (1/r, v/r^2) times a learned function of length and elements. Its Gram matrix is invariant to
    rotations and yields the logits of scale and shift. Higher degrees are the harmonics of the neighbours times their
    radial features.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, rows = config.channels, len(config.elements)
        width = min(c, 128)
        type_width = min(32, max(8, c // 4))
        self.lmax = config.degrees[0]
        self.axes = min(4 if width < 64 else 8, max(1, width - 1))
        basis_width = max(32, width - 2 * type_width)
        pair_width = basis_width + 2 * type_width
        hidden = min(256, max(2 * width, pair_width))
        bias = config.mlp_bias
        self.basis_in = Linear(config.n_radial, basis_width, bias)
        self.basis_out = Linear(basis_width, basis_width, bias)
        self.types = Embedding(rows, type_width, padding=True)
        self.pair_in = Linear(pair_width, hidden, bias)
        self.pair_out = Linear(hidden, width, bias)
        self.output = Linear(width * self.axes, 2 * c)
        nn.init.zeros_(self.output.weight)  # scale and shift start as the identity
        self.scale_norm = RMSNorm(1, c) if config.edge_norm.film else nn.Identity()
        self.shift_norm = RMSNorm(1, c) if config.edge_norm.film else nn.Identity()
        self.scale_strength = nn.Parameter(torch.full((1,), math.log(0.01)))
        self.shift_strength = nn.Parameter(torch.full((1,), math.log(0.01)))

    def forward(
        self,
        types: Tensor,
        species: Tensor,
        own_species: Tensor,
        basis: Tensor,
        radial: RadialFeatures,
        neighborhood: Neighborhood,
    ) -> Tensor:
        """Compute the features of every centre.

        Args:
            types: Element embeddings of the centres, (n, C).
            species: Index of the element of all nodes, (N,).
            own_species: Index of the element of the centres, (n,).
            basis: Radial basis of the edges, (E, n_radial).
            radial: Radial features of the edges.
            neighborhood: Edges and their nodes, complete for the centres.

        Returns:
            (n, D, C).
        """
        scalars = self._modulate(types, species, own_species, basis, neighborhood)
        return torch.cat([scalars[:, None], *self._geometric(radial, neighborhood)], dim=1)

    def _modulate(
        self, types: Tensor, species: Tensor, own_species: Tensor, basis: Tensor, neighborhood: Neighborhood
    ) -> Tensor:
        edges = neighborhood.edges
        features = [
            self.basis_out(functional.silu(self.basis_in(basis))),
            gather(self.types(species), neighborhood.source),
            gather(self.types(own_species), neighborhood.destination),
        ]
        filters = self.pair_out(functional.silu(self.pair_in(torch.cat(features, dim=-1))))
        inverse = torch.rsqrt(edges.vector.square().sum(-1, keepdim=True) + SOFTENING**2)
        radial = (edges.weight * edges.gate)[:, None] * inverse
        vector = torch.cat([radial, radial * edges.vector * inverse], dim=-1)
        matrix = _sum_of_products(vector, filters, neighborhood)
        matrix = matrix * neighborhood.degree_norm[:, None, None]
        gram = matrix.transpose(1, 2) @ matrix[:, :, : self.axes]
        scale, shift = self.output(gram.flatten(1)).unflatten(1, (2, 1, -1)).unbind(1)
        scale, shift = self.scale_norm(scale)[:, 0], self.shift_norm(shift)[:, 0]
        return (
            types * (1 + self.scale_strength.exp() * scale.tanh()) + self.shift_strength.exp() * shift.tanh()
        )

    def _geometric(self, radial: RadialFeatures, neighborhood: Neighborhood) -> list[Tensor]:
        """Features of each degree l >= 1, (n, 2l + 1, C).

        Hidden radial features are summed over the edges first. The last radial layer then acts on nodes, which are
        fewer than edges.
        """
        angular = neighborhood.edges.harmonics()[:, 1:] * neighborhood.edges.gate[:, None]
        summed = _sum_of_products(angular, radial.hidden, neighborhood)
        summed = summed * neighborhood.degree_norm[:, None, None]
        return [summed[:, l * l - 1 : (l + 1) ** 2 - 1] @ radial.last[:, l] for l in range(1, self.lmax + 1)]


def _sum_of_products(a: Tensor, b: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Sum outer products of (E, k) and (E, c) over the edges of every centre, (N, k, c), without storing them."""
    return scatter_matmul(a[:, None, None], b[:, None], neighborhood.destination)
