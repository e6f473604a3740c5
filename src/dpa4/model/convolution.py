"""EMFA SO(2) convolution: edge-node product, multiple focus streams, envelope-gated attention.

See docs/theory.md, "EMFA convolution".
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpa4.model.attention import EnvelopeGatedAttention, EnvelopeSum, FocusCompetition, SingleFocus
from dpa4.model.config import ModelConfig
from dpa4.model.constants import of_constants
from dpa4.model.edges import Edges, LocalFrame, Neighborhood
from dpa4.model.grid import MessageNodeProduct, NoProduct
from dpa4.model.layers import ChannelLinear, DegreeLinear
from dpa4.model.radial import RadialFeatures
from dpa4.model.so2 import DegreeProduct, ElementwiseProduct, join_streams, so2_layers, split_streams
from dpa4.ops.edge_products import scatter_matmul
from dpa4.ops.segments import materialized


class SameChannels(nn.Module):
    """Constant identity in place of the radial projection, for convolutions as wide as the nodes."""

    weight: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self._register_identity(channels)

    @of_constants
    def _register_identity(self, channels: int) -> None:
        self.register_buffer("weight", torch.eye(channels), persistent=False)


class NodeStates(NamedTuple):
    """Node features that a convolution reads."""

    own: Tensor  # (N, D, F c) features after the pre-mix
    sources: Tensor  # (N, K, F c) features as the edge-node product gathers them
    query: Tensor  # (N, F, c)
    key: Tensor  # (N, F, c)


class SO2Convolution(nn.Module):
    """Message passing of one block in three parts: `states` on nodes, `messages` on edges, `update` on nodes."""

    scalar_degree: Tensor

    def __init__(self, config: ModelConfig, lmax: int):
        super().__init__()
        c, width, focus = config.channels, config.focus_width, config.n_focus
        hidden = focus * width
        self.lmax, self.mmax, self.n_focus, self.width = lmax, min(config.mmax, lmax), focus, width
        self.pre_mix = DegreeLinear(lmax, c, hidden, bias=config.mlp_bias)
        self.radial_hidden = ChannelLinear(c, hidden) if hidden != c else SameChannels(c)
        if config.radial_so2_mode == "none":
            self.product: ElementwiseProduct | DegreeProduct = ElementwiseProduct(lmax, self.mmax)
        else:
            rank = config.radial_so2_rank if config.radial_so2_mode == "degree_channel" else None
            self.product = DegreeProduct(lmax, self.mmax, hidden, rank)
        layers = config.mixing_layers, config.mlp_bias, config.layer_scale
        self.stack = so2_layers(lmax, self.mmax, width, focus, *layers, config.symmetry)
        self.focus = (
            FocusCompetition(width, focus, config.edge_norm.focus, config.mlp_bias)
            if focus > 1
            else SingleFocus()
        )
        heads = config.n_atten_head
        self.attention = EnvelopeGatedAttention(width, focus, heads) if heads else EnvelopeSum()
        self.node_product = MessageNodeProduct(config, lmax) if config.message_node_so3 else NoProduct()
        self.post_mix = DegreeLinear(lmax, hidden, c, bias=config.mlp_bias, zero=True)
        self.biased = config.mlp_bias
        self.frame = LocalFrame(lmax, self.mmax, heads=focus * max(heads, 1))
        self.register_buffer("scalar_degree", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, radial: RadialFeatures, neighborhood: Neighborhood) -> Tensor:
        """Compute the aggregated messages (N, D, C) of nodes (N, D, C)."""
        states = self.states(x)
        total = self.messages(states.sources, states.query, states.key, radial, neighborhood)
        return self.update(states.own, total, neighborhood.degree_norm)

    def states(self, x: Tensor) -> NodeStates:
        """Compute the features of nodes (N, D, C) that messages and update read."""
        x = self.pre_mix(x)
        query, key = self.attention.states(self._scalars(x))
        return NodeStates(x, self.product.spread(x), query, key)

    def messages(
        self, sources: Tensor, query: Tensor, key: Tensor, radial: RadialFeatures, neighborhood: Neighborhood
    ) -> Tensor:
        """Sum the weighted messages to every centre, (n, D, F c).

        Args:
            sources: `NodeStates.sources` of all nodes.
            query: Queries of the centres, (n, F, c).
            key: Keys of all nodes, (N, F, c).
            radial: Radial features of the edges.
            neighborhood: The edges, complete for the n centres.
        """
        to_hidden = self.radial_hidden.weight
        x = self.product(sources, radial, to_hidden, neighborhood)
        x = split_streams(x, self.n_focus)
        share = self.focus(x[..., : self.width])
        x = self.stack(x, self._bias_scale(radial, to_hidden, neighborhood.edges) if self.biased else None)
        weight = materialized(self.attention.weights(query, key, radial, to_hidden, neighborhood) * share)
        message = join_streams(x, self.stack.layout)
        # One matrix per edge and head applies weight, rotation back and rescaling.
        back = self.frame.weighted_back(neighborhood.edges.rows, weight.flatten(1))
        return scatter_matmul(back.to(message.dtype), message, neighborhood.destination)

    def update(self, x: Tensor, total: Tensor, degree_norm: Tensor) -> Tensor:
        """Compute the update (N, D, C) of nodes from their own features and sums of messages, (N, D, F c) each."""
        factor = self.attention.output_scale(self._scalars(x), degree_norm).flatten(1)
        total = (total.unflatten(-1, (factor.shape[-1], -1)) * factor[:, None, :, None]).flatten(2)
        return self.post_mix(self.node_product(total, x))

    def _scalars(self, x: Tensor) -> Tensor:
        return x[:, 0].unflatten(-1, (self.n_focus, -1))

    def _bias_scale(self, radial: RadialFeatures, to_hidden: Tensor, edges: Edges) -> Tensor:
        """Factor of the bias in the first SO(2) layer, which makes it vanish with the envelope, (F, E, c)."""
        scale = radial.of_degrees(to_hidden, self.scalar_degree)[:, 0] * edges.weight[:, None]
        return scale.unflatten(-1, (self.n_focus, -1)).transpose(0, 1)
