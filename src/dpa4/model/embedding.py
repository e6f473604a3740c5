"""Initial node features: element, charge and spin, environment (model-1 sections 9, 11, 12)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.config import ModelConfig
from dpa4.model.edges import SOFTENING, Edges
from dpa4.model.layers import Linear, RMSNorm
from dpa4.model.radial import RadialFeatures
from dpa4.model.segments import gather, scatter_sum


class Embedding(nn.Module):
    """Table of learned vectors; ``padding`` adds a zero row at the end, as the published checkpoints have it."""

    def __init__(self, rows: int, width: int, padding: bool = False):
        super().__init__()
        table = torch.randn(rows, width) * (rows + width) ** -0.5
        self.table = nn.Parameter(functional.pad(table, (0, 0, 0, int(padding))))

    def forward(self, index: Tensor) -> Tensor:
        """(n,) -> (n, width)."""
        return gather(self.table, index)


class ChargeSpinEmbedding(nn.Module):
    """Vector added to the element embedding for the total charge and spin multiplicity of the structure."""

    MAX_CHARGE, MAX_SPIN = 100, 99

    def __init__(self, channels: int):
        super().__init__()
        self.charge = Embedding(2 * self.MAX_CHARGE, channels)
        self.spin = Embedding(self.MAX_SPIN + 1, channels)
        self.mix = Linear(2 * channels, channels, bias=True)

    def forward(self, charge_spin: Tensor) -> Tensor:
        """(B, 2) int64 -> (B, C)."""
        charge, spin = charge_spin.unbind(-1)
        both = torch.cat([self.charge(charge + self.MAX_CHARGE), self.spin(spin)], dim=-1)
        return functional.silu(self.mix(both))


class EnvironmentSeed(nn.Module):
    """Scale and shift of the element embedding by a learned invariant of the environment (FiLM).

    Per node a 4 x A matrix sums (1/r, v/r^2) times a learned function of length and elements; its Gram matrix is
    rotation invariant and gives the logits of scale and shift.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, rows = config.channels, len(config.elements)
        width = min(c, 128)
        type_width = min(32, max(8, c // 4))
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
        nn.init.zeros_(self.output.weight)  # starts as the identity
        self.scale_norm = RMSNorm(1, c) if config.edge_norm else nn.Identity()
        self.shift_norm = RMSNorm(1, c) if config.edge_norm else nn.Identity()
        self.scale_strength = nn.Parameter(torch.full((1,), math.log(0.01)))
        self.shift_strength = nn.Parameter(torch.full((1,), math.log(0.01)))

    def forward(self, x: Tensor, species: Tensor, basis: Tensor, edges: Edges) -> Tensor:
        """Element embeddings x (N, C) to seeded scalars (N, C); basis is (E, n_radial)."""
        types = self.types(species)
        features = [
            self.basis_out(functional.silu(self.basis_in(basis))),
            gather(types, edges.source),
            gather(types, edges.destination),
        ]
        filters = self.pair_out(functional.silu(self.pair_in(torch.cat(features, dim=-1))))
        inverse = torch.rsqrt(edges.vector.square().sum(-1, keepdim=True) + SOFTENING**2)
        radial = (edges.weight * edges.gate)[:, None] * inverse
        vector = torch.cat([radial, radial * edges.vector * inverse], dim=-1)
        matrix = scatter_sum(vector[:, :, None] * filters[:, None, :], edges.destination, edges.num_nodes)
        matrix = matrix * edges.degree_norm[:, None, None]
        gram = matrix.transpose(1, 2) @ matrix[:, :, : self.axes]
        scale, shift = self.output(gram.flatten(1)).unflatten(1, (2, 1, -1)).unbind(1)
        scale, shift = self.scale_norm(scale)[:, 0], self.shift_norm(shift)[:, 0]
        return x * (1 + self.scale_strength.exp() * scale.tanh()) + self.shift_strength.exp() * shift.tanh()


def geometric_embedding(radial: RadialFeatures, edges: Edges, lmax: int) -> Tensor:
    """Initial features of degree l >= 1: neighbours' harmonics times radial features, (N, D - 1, C).

    The hidden radial features are summed first and the last radial layer acts on nodes, which are fewer.
    """
    angular = edges.harmonics()[:, 1:] * edges.gate[:, None]
    summed = scatter_sum(angular[:, :, None] * radial.hidden[:, None, :], edges.destination, edges.num_nodes)
    summed = summed * edges.degree_norm[:, None, None]
    rows = [summed[:, l * l - 1 : (l + 1) ** 2 - 1] @ radial.last[:, l] for l in range(1, lmax + 1)]
    return torch.cat(rows, dim=1)
