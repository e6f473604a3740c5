"""Feed-forward networks and the interaction block.

See docs/theory.md, "Feed-forward network", "Normalisation" and "Readout and energy".
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.config import ModelConfig, auto_width
from dpa4.model.convolution import NodeStates, SO2Convolution
from dpa4.model.edges import Neighborhood
from dpa4.model.ghosts import WHOLE, Domain
from dpa4.model.grid import GridActivation
from dpa4.model.layers import DegreeLinear, EquivariantRMSNorm, FocusLinear, degree_of
from dpa4.model.radial import RadialFeatures
from dpa4.ops.segments import pick


class GatedActivation(nn.Module):
    """Gated linear unit per degree: the halves of the output of a linear layer are value and gate.

    Scalars become value * silu(gate). Higher degrees are multiplied by sigmoids of the scalars of the gate.
    """

    degree: Tensor
    frames = 1

    def __init__(self, lmax: int, width: int, bias: bool):
        super().__init__()
        self.linear = FocusLinear(width, lmax * width, bias=bias, std=0.01) if lmax else None
        self.register_buffer("degree", degree_of(lmax)[1:] - 1, persistent=False)

    def forward(self, x: Tensor, linear: DegreeLinear) -> Tensor:
        """Gate linear(x), (n, D, 2 c), to (n, D, c)."""
        value, gate = linear(x).chunk(2, dim=-1)
        scalars = (value[:, 0] * functional.silu(gate[:, 0]))[:, None]
        if self.linear is None:
            return scalars
        factor = self.linear(gate[:, :1]).sigmoid().unflatten(-1, (-1, value.shape[-1]))[:, 0]
        return torch.cat([scalars, value[:, 1:] * pick(factor, 1, self.degree)], dim=1)

    def scalars(self, x: Tensor, linear: DegreeLinear) -> Tensor:
        """Compute only the scalars of `forward`, (n, c)."""
        value, gate = linear(x)[:, 0].chunk(2, dim=-1)
        return value * functional.silu(gate)


class FeedForward(nn.Module):
    """Equivariant network on single nodes: linear, non-linearity, linear. The last layer starts at zero."""

    def __init__(
        self,
        lmax: int,
        channels: int,
        width: int,
        activation: GatedActivation | GridActivation,
        bias: bool,
    ):
        super().__init__()
        frames = activation.frames
        self.linear_in = DegreeLinear(lmax, channels, 2 * frames * width, bias=bias)
        self.activation = activation
        self.linear_out = DegreeLinear(lmax, frames * width, channels, bias=bias, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Update of nodes (N, D, C), without the residual."""
        return self.linear_out(self.activation(x, self.linear_in))

    def scalars(self, x: Tensor) -> Tensor:
        """Compute only the scalars of `forward`, (N, D, C) to (N, C)."""
        hidden = self.activation.scalars(x, self.linear_in)
        y = hidden @ self.linear_out.weight[0, : hidden.shape[-1]]
        return y if self.linear_out.bias is None else y + self.linear_out.bias


def feed_forward(config: ModelConfig, lmax: int) -> FeedForward:
    """Build the feed-forward network of a block of degree lmax."""
    width, kmax = config.ffn_neurons or auto_width(config.channels), min(config.kmax, lmax)
    bias = config.mlp_bias
    if config.ffn_on == "degrees":
        activation: GatedActivation | GridActivation = GatedActivation(lmax, width, bias)
    else:
        grid_kmax = kmax if config.ffn_on == "so3" else None
        activation = GridActivation(lmax, grid_kmax, width, config.ffn_grid, bias, config.symmetry)
    return FeedForward(lmax, config.channels, width, activation, bias)


def read_out(config: ModelConfig, lmax: int) -> FeedForward:
    """Build one layer of the read-out: on scalars (lmax 0) or on the SO(3) grid."""
    width, bias = config.ffn_neurons or auto_width(config.channels), config.mlp_bias
    if config.so3_readout == "none":
        return FeedForward(0, config.channels, width, GatedActivation(0, width, bias), bias)
    kmax = min(config.kmax, lmax)
    activation = GridActivation(lmax, kmax, width, config.so3_readout, bias, config.symmetry)
    return FeedForward(lmax, config.channels, width, activation, bias)


class Block(nn.Module):
    """Interaction block: x + norm(convolution(x)), then x + ffn(norm(x)).

    The residual stream keeps the precision of the parameters, also in mixed precision.
    """

    def __init__(self, config: ModelConfig, lmax: int):
        super().__init__()
        conv_in, conv_out, ffn_in, ffn_out = config.sandwich_norm
        c, count = config.channels, config.ffn_blocks

        def norm(enabled: bool, eps: float = 1e-5) -> nn.Module:
            return EquivariantRMSNorm(lmax, c, eps) if enabled else nn.Identity()

        self.size = (lmax + 1) ** 2
        self.conv_norm_in = norm(conv_in)
        self.conv = SO2Convolution(config, lmax)
        # Without a norm of the radial features small messages must stay small, so that they vanish smoothly at the
        # cutoff.
        self.conv_norm_out = norm(conv_out, 1e-5 if config.edge_norm.radial else 1.0)
        self.ffn_norms_in = nn.ModuleList(norm(ffn_in) for _ in range(count))
        self.ffns = nn.ModuleList(feed_forward(config, lmax) for _ in range(count))
        self.ffn_norms_out = nn.ModuleList(norm(ffn_out) for _ in range(count))
        scales = range(count if config.layer_scale else 0)
        self.ffn_scales = nn.ParameterList(torch.full((c,), 1e-3) for _ in scales)

    def forward(
        self,
        x: Tensor,
        radial: Sequence[RadialFeatures],
        neighborhoods: Sequence[Neighborhood],
        domain: Domain = WHOLE,
    ) -> Tensor:
        """Map own nodes of at least the block's degree to own nodes of the block's degree, (n, D, C).

        Args:
            x: Features of the own nodes, (n, D', C) with D' >= D.
            radial: Radial features of every part of the edges.
            neighborhoods: Parts of the edges, each complete for its centres.
            domain: The own atoms among all nodes.
        """
        x = x[:, : self.size]
        states = self.states(domain.with_ghosts(x))
        sizes = [neighborhood.destination.num_nodes for neighborhood in neighborhoods]
        queries = domain.own(states.query).split(sizes)
        update = self.update if len(neighborhoods) == 1 else self.update_part
        parts = []
        for own_x, own, query, features, neighborhood in zip(
            x.split(sizes), domain.own(states.own).split(sizes), queries, radial, neighborhoods, strict=True
        ):
            total = self.messages(states.sources, query, states.key, features, neighborhood)
            parts.append(update(own_x, own, total, neighborhood.degree_norm))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def states(self, x: Tensor) -> NodeStates:
        """Compute the features of nodes (N, D, C) that messages and update read."""
        return self.conv.states(self.conv_norm_in(x))

    def messages(
        self, sources: Tensor, query: Tensor, key: Tensor, radial: RadialFeatures, neighborhood: Neighborhood
    ) -> Tensor:
        """Sum the weighted messages to every centre, (n, D, F c); see `SO2Convolution.messages`."""
        return self.conv.messages(sources, query, key, radial, neighborhood)

    def update(self, x: Tensor, own: Tensor, total: Tensor, degree_norm: Tensor) -> Tensor:
        """Apply aggregated messages and feed-forward networks to nodes (N, D, C)."""
        x = x + self.conv_norm_out(self.conv.update(own, total, degree_norm))
        for i, ffn in enumerate(self.ffns):
            update = self.ffn_norms_out[i](ffn(self.ffn_norms_in[i](x)))
            x = x + (update * self.ffn_scales[i] if self.ffn_scales else update)
        return x

    def update_part(self, x: Tensor, own: Tensor, total: Tensor, degree_norm: Tensor) -> Tensor:
        """`update` for a part of the nodes; compiled for a GPU, it stores no intermediates for the backward pass."""
        return Block.update(self, x, own, total, degree_norm)
