"""Geometry of the edges, computed once per step and shared by all blocks (model-1 sections 5 to 8)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.config import Bridging, ModelConfig
from dpa4.model.constants import ConstantModule
from dpa4.model.harmonics import Rows, WignerRows, edge_frame
from dpa4.model.radial import envelope
from dpa4.model.segments import gather, scatter_sum

SOFTENING = 1e-7
"""Length added in quadrature to every edge length, in Angstrom (the reference's ``eps``)."""


class Edges(NamedTuple):
    """What the network knows about E edges between N nodes."""

    source: Tensor  # (E,)
    destination: Tensor  # (E,)
    num_nodes: int
    vector: Tensor  # (E, 3), Angstrom; clamped when bridging
    length: Tensor  # (E,), Angstrom; clamped when bridging
    weight: Tensor  # (E,) cutoff envelope w
    gate: Tensor  # (E,) freeze gate of the source atom; ones without bridging
    degree_norm: Tensor  # (N,) inverse square root of the smooth coordination number
    rows: Rows  # rows |m| <= mmax of the edge's Wigner matrices
    to_local: dict[int, Tensor]  # by block degree: packed coefficients to rows of the edge frame, (E, M, D)
    to_global: dict[int, Tensor]  # by block degree: the way back, degrees > mmax rescaled, (E, D, M)

    def harmonics(self) -> Tensor:
        """Z_{l,m} of the edge direction, (E, D)."""
        return torch.cat([row[:, 0] for row in self.rows[0]], dim=-1)


def clamp_length(length: Tensor, bridging: Bridging) -> Tensor:
    """Length that is frozen at r_inner below it and smoothly joins the true one at r_outer (model-1 section 7.1)."""
    width = bridging.r_outer - bridging.r_inner
    t = ((length - bridging.r_inner) / width).clamp(0, 1)
    inner = bridging.r_inner + width * t**4 * (20 + t * (-45 + t * (36 - 10 * t)))
    return torch.where(length >= bridging.r_outer, length, inner)


def freeze_gate(length: Tensor, source: Tensor, num_nodes: int, bridging: Bridging) -> Tensor:
    """Gate of each edge: zero if any neighbour of its source is within r_inner (model-1 section 7.5), (E,).

    The product over a node's edges is the exponential of a sum of logarithms over the non-zero factors, so
    gradients stay finite where a factor is exactly zero (its own derivative is zero there).
    """
    t = ((length - bridging.r_inner) / (bridging.r_outer - bridging.r_inner)).clamp(0, 1)
    switch = t**4 * (35 + t * (-84 + t * (70 - 20 * t)))
    open_ = switch > 0
    log_product = scatter_sum(torch.where(open_, switch, 1.0).log(), source, num_nodes)
    closed = scatter_sum((~open_).to(length.dtype), source, num_nodes) > 0
    return gather(torch.where(closed, 0.0, log_product.exp()), source)


def reduced_degrees(lmax: int, mmax: int) -> list[int]:
    """Degree of each row of the edge frame: orders 0, then -1, +1, -2, +2, ... (m-major, model-1 section 8.5)."""
    order = [*range(lmax + 1)]
    for m in range(1, mmax + 1):
        order += 2 * list(range(m, lmax + 1))
    return order


def rotation_blocks(rows: Rows, lmax: int, mmax: int) -> Tensor:
    """Rows of the Wigner matrices as one matrix per edge, packed coefficients to m-major rows, (E, M, D)."""
    size = (lmax + 1) ** 2
    blocks = []
    for m in range(mmax + 1):
        for s in range(min(m, 1) + 1):
            for l in range(m, lmax + 1):
                blocks.append(functional.pad(rows[m][l - m][:, s : s + 1], (l * l, size - (l + 1) ** 2)))
    return torch.cat(blocks, dim=1)


class FullRange(nn.Module):
    """No bridging: true lengths, open gates."""

    def forward(self, vector: Tensor, source: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (E, 3), their lengths (E,) and the gates of the edges (E,)."""
        length = (vector.square().sum(-1) + SOFTENING**2).sqrt()
        return vector, length, torch.ones_like(length)


class FrozenCore(FullRange):
    """Zone bridging: lengths frozen below r_inner, gates closed for atoms that have such a neighbour."""

    def __init__(self, bridging: Bridging):
        super().__init__()
        self.bridging = bridging

    def forward(self, vector: Tensor, source: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (E, 3), their clamped lengths (E,) and the gates of the edges (E,)."""
        vector, length, _ = super().forward(vector, source, num_nodes)
        clamped = clamp_length(length, self.bridging)
        return (
            vector * (clamped / length)[:, None],
            clamped,
            freeze_gate(clamped, source, num_nodes, self.bridging),
        )


class EdgeGeometry(ConstantModule):
    """Edge vectors to `Edges`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        lmax = config.degrees[0]
        self.mmax = min(config.mmax, lmax)
        self.wigner = WignerRows(lmax, self.mmax)
        self.block_degrees = sorted(set(config.degrees))
        self.cutoff, self.exponent = config.cutoff, config.env_exp[1]
        self.short_range = FullRange() if config.bridging is None else FrozenCore(config.bridging)
        self.degree_floor = SOFTENING if config.pre_release else 0.25
        for l in self.block_degrees:
            m = min(self.mmax, l)
            degree = torch.tensor(reduced_degrees(l, m), dtype=torch.float64)
            rescale = torch.where(degree > m, ((2 * degree + 1) / (2 * m + 1)).sqrt(), 1.0)
            self.register_constant(f"rescale_{l}", rescale[:, None])

    def forward(self, vector: Tensor, source: Tensor, destination: Tensor, num_nodes: int) -> Edges:
        """Geometry of edge vectors (E, 3) in Angstrom."""
        vector, length, gate = self.short_range(vector, source, num_nodes)
        weight = envelope(length, self.cutoff, self.exponent)
        coordination = scatter_sum(weight.square(), destination, num_nodes)
        rows = self.wigner(edge_frame(vector / length[:, None]))
        to_local = {l: rotation_blocks(rows, l, min(self.mmax, l)) for l in self.block_degrees}
        to_global = {l: (m * getattr(self, f"rescale_{l}")).transpose(1, 2) for l, m in to_local.items()}
        return Edges(
            source=source,
            destination=destination,
            num_nodes=num_nodes,
            vector=vector,
            length=length,
            weight=weight,
            gate=gate,
            degree_norm=torch.rsqrt(coordination + self.degree_floor),
            rows=rows,
            to_local=to_local,
            to_global=to_global,
        )
