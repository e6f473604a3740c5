"""Weights of messages: over the edges of a node, and over the focus streams of an edge.

See docs/theory.md, "Attention".
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.edges import SOFTENING, Neighborhood
from dpa4.model.layers import FocusLinear, RMSNorm
from dpa4.model.radial import RadialFeatures
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import gather, segment_max, segment_sum


def envelope_softmax(
    logits: Tensor, envelope: Tensor, gate: Tensor, null: Tensor, destination: Incidence
) -> Tensor:
    r"""Attention weights that vanish smoothly with the cutoff envelope (docs/theory.md, "Attention").

    .. math:: \alpha_e = \frac{w_e^2 g_e e^{l_e}}{\zeta + \sum_{e' \to n} w_{e'}^2 g_{e'} e^{l_{e'}}}

    The weight is computed as the square of :math:`w e^{(l - M)/2}`, up to the gate. This root stays below one, and
    its derivatives need neither the logarithm of a vanishing envelope nor a division by the envelope
    (docs/adr/0005). The shift M cancels in the ratio, so it is treated as a constant.

    Args:
        logits: Logits l, (E, F, H).
        envelope: Cutoff envelope w in [0, 1], (E,).
        gate: Freeze gate g in [0, 1], (E,).
        null: Weight zeta > 0 of attending to nothing, (F, H).
        destination: Centre of each edge.

    Returns:
        (E, F, H); the weights of a node sum to less than one.
    """
    with torch.no_grad():
        log_weight = logits + (2 * envelope.log() + gate.log())[:, None, None]
        shift = segment_max(log_weight, null.log().to(log_weight.dtype), destination)
    root = envelope[:, None, None] * torch.exp(0.5 * (logits - gather(shift, destination)))
    weight = root * root * gate[:, None, None]
    total = segment_sum(weight, destination) + null * torch.exp(-shift)
    return weight / gather(total, destination)


class EnvelopeGatedAttention(nn.Module):
    """Attention over the neighbours of a node, with weights that vanish at the cutoff.

    Queries and keys come from the scalars of the nodes. Radial features add a bias to the logits.
    """

    def __init__(self, width: int, n_focus: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qk_norm = RMSNorm(n_focus, width)
        self.query = FocusLinear(width, width, n_focus)
        self.key = FocusLinear(width, width, n_focus)
        self.radial_logit = nn.Parameter(0.01 * torch.randn(width, n_focus, heads))
        self.null_logit = nn.Parameter(torch.full((n_focus, heads), 0.5413))  # softplus of it is 1
        self.gate_norm = RMSNorm(n_focus, width)
        self.gate_logit = nn.Parameter(0.01 * torch.randn(width, n_focus, heads))

    def states(self, scalars: Tensor) -> tuple[Tensor, Tensor]:
        """Compute queries and keys, (N, F, c) each, from node scalars (N, F, c)."""
        normed = self.qk_norm(scalars)
        return self.query(normed), self.key(normed)

    def weights(
        self, query: Tensor, key: Tensor, radial: RadialFeatures, hidden: Tensor, neighborhood: Neighborhood
    ) -> Tensor:
        """Weight of every edge, focus stream and head, (E, F, H).

        Args:
            query: Queries of the centres, (n, F, c).
            key: Keys of all nodes, (N, F, c).
            radial: Radial features of the edges.
            hidden: Map of the radial channels, (C, F c).
            neighborhood: The edges, complete for the n centres.
        """
        focuses, width = query.shape[1:]
        query, key = query.flatten(1), key.flatten(1)
        products = gather(query, neighborhood.destination) * gather(key, neighborhood.source)
        content = products.unflatten(-1, (focuses * self.heads, width // self.heads)).sum(-1)
        content = content.unflatten(1, (focuses, self.heads)) * (width / self.heads) ** -0.5
        by_focus = hidden.unflatten(1, (focuses, -1))
        projection = torch.einsum("bfc,cfh->bfh", by_focus, self.radial_logit)
        logits = content + radial.project(projection.flatten(1)[None]).view_as(content)
        null = functional.softplus(self.null_logit) + SOFTENING
        return envelope_softmax(
            logits.to(null.dtype),
            neighborhood.edges.weight,
            neighborhood.edges.gate,
            null,
            neighborhood.destination,
        )

    def output_scale(self, scalars: Tensor, degree_norm: Tensor) -> Tensor:
        """Gate of the aggregated messages of every node, (N, F, H)."""
        return torch.einsum("nfc,cfh->nfh", self.gate_norm(scalars), self.gate_logit).sigmoid()


class EnvelopeSum(nn.Module):
    """Sum over neighbours, weighted by the envelope and divided by the root of the smooth coordination number."""

    def states(self, scalars: Tensor) -> tuple[Tensor, Tensor]:
        """Return empty queries and keys (N, F, 0): the weights do not depend on the nodes."""
        return scalars[..., :0], scalars[..., :0]

    def weights(
        self, query: Tensor, key: Tensor, radial: RadialFeatures, hidden: Tensor, neighborhood: Neighborhood
    ) -> Tensor:
        """Weight of every edge, (E, 1, 1)."""
        return (neighborhood.edges.weight * neighborhood.edges.gate)[:, None, None]

    def output_scale(self, scalars: Tensor, degree_norm: Tensor) -> Tensor:
        """Normalisation of the aggregated messages of every node, (N, 1, 1)."""
        return degree_norm[:, None, None]


class FocusCompetition(nn.Module):
    """Softmax over the focus streams of an edge, smoothed so that every stream keeps a share."""

    SMOOTHING = 0.02

    def __init__(self, width: int, n_focus: int, norm: bool, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(width, n_focus))
        self.norm = RMSNorm(n_focus, width) if norm else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(n_focus)) if bias else None

    def forward(self, scalars: Tensor) -> Tensor:
        """Compute weights (E, F, 1) from the scalars of the edges (F, E, c)."""
        normed = self.norm(scalars.transpose(0, 1))
        logits = torch.einsum("efc,cf->ef", normed, self.weight)
        logits = logits if self.bias is None else logits + self.bias
        share = logits.softmax(-1)
        return ((1 - self.SMOOTHING) * share + self.SMOOTHING / share.shape[-1])[..., None]


class SingleFocus(nn.Module):
    """Replacement for `FocusCompetition` for a single focus stream, whose weight is one."""

    def forward(self, scalars: Tensor) -> Tensor:
        """Ones of shape (1, 1, 1).

        Built with `torch.ones`, because ``scalars.new_ones`` would make compiled code save the scalars for the
        backward pass.
        """
        return torch.ones(1, 1, 1, dtype=scalars.dtype, device=scalars.device)
