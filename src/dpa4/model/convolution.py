"""The EMFA SO(2) convolution: edge-node product, multiple foci, envelope-gated attention (model-2 section 7)."""

import torch
from torch import Tensor, nn

from dpa4.model.attention import EnvelopeGatedAttention, EnvelopeSum, FocusCompetition, SingleFocus
from dpa4.model.config import ModelConfig
from dpa4.model.edges import Edges
from dpa4.model.grid import MessageNodeProduct, NoProduct
from dpa4.model.layers import ChannelLinear, DegreeLinear
from dpa4.model.radial import RadialFeatures
from dpa4.model.segments import scatter_sum
from dpa4.model.so2 import DegreeProduct, ElementwiseProduct, SO2Stack, join_orders, split_orders


class SameChannels(nn.Module):
    """Stands for the radial projection where the convolution is as wide as the nodes."""

    weight: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.eye(channels), persistent=False)


class SO2Convolution(nn.Module):
    """Message passing of one block: nodes (N, D, C) to their aggregated messages (N, D, C)."""

    def __init__(self, config: ModelConfig, lmax: int):
        super().__init__()
        c, width, focus = config.channels, config.focus_width, config.n_focus
        hidden = focus * width
        self.lmax, self.mmax, self.n_focus, self.width = lmax, min(config.mmax, lmax), focus, width
        self.pre_mix = DegreeLinear(lmax, c, hidden, bias=config.mlp_bias)
        self.radial_hidden = ChannelLinear(c, hidden) if hidden != c else SameChannels(c)
        if config.radial_so2_mode == "none":
            self.product: nn.Module = ElementwiseProduct(lmax, self.mmax, hidden)
        else:
            rank = config.radial_so2_rank if config.radial_so2_mode == "degree_channel" else None
            self.product = DegreeProduct(lmax, self.mmax, hidden, rank)
        self.stack = SO2Stack(
            lmax, self.mmax, width, focus, config.mixing_layers, config.mlp_bias, config.layer_scale
        )
        self.focus = (
            FocusCompetition(width, focus, config.edge_norm, config.mlp_bias) if focus > 1 else SingleFocus()
        )
        heads = config.n_atten_head
        self.attention = EnvelopeGatedAttention(width, focus, heads) if heads else EnvelopeSum()
        self.node_product = MessageNodeProduct(config, lmax) if config.message_node_so3 else NoProduct()
        self.post_mix = DegreeLinear(lmax, hidden, c, bias=config.mlp_bias, zero=True)
        self.biased = config.mlp_bias

    def forward(self, x: Tensor, radial: RadialFeatures, edges: Edges) -> Tensor:
        """Aggregate messages.

        Args:
            x: Node features of the block's degree, (N, D, C).
            radial: Radial features of the edges.
            edges: Geometry of the edges.
        """
        x = self.pre_mix(x)
        to_hidden = self.radial_hidden.weight
        groups = split_orders(self.product(x, radial, to_hidden, edges), self.lmax, self.mmax, self.n_focus)
        share = self.focus(groups[0][..., : self.width])
        groups = self.stack(groups, self._bias_scale(radial, to_hidden, edges) if self.biased else None)

        scalars = x[:, 0].unflatten(-1, (self.n_focus, -1))
        weight = self.attention.weights(scalars, radial, to_hidden, edges) * share
        message = self._scale(join_orders(groups, self.width), weight)
        rotated = edges.to_global[self.lmax].to(message.dtype) @ message
        total = scatter_sum(rotated, edges.destination, edges.num_nodes)
        total = self._scale(total, self.attention.output_scale(scalars, edges))
        return self.post_mix(self.node_product(total, x))

    def _bias_scale(self, radial: RadialFeatures, to_hidden: Tensor, edges: Edges) -> Tensor:
        """Factor of the first layer's bias, so that it vanishes with the envelope, (F, E, c)."""
        scale = radial.per_degree(to_hidden, 1)[:, 0] * edges.weight[:, None]
        return scale.unflatten(-1, (self.n_focus, -1)).transpose(0, 1)

    @staticmethod
    def _scale(x: Tensor, factor: Tensor) -> Tensor:
        """Multiply channels (n, rows, F H d) by one factor per focus and head, (n, F, H)."""
        heads = factor.flatten(1)
        return (x.unflatten(-1, (heads.shape[-1], -1)) * heads[:, None, :, None]).flatten(2)
