"""Geometry of the edges, computed once per step and shared by all blocks.

See docs/theory.md, "Graph and edge frames" and "ZBL bridging".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dpa4.model.config import Bridging, ModelConfig
from dpa4.model.constants import ConstantModule, SparseProduct, of_constants
from dpa4.model.ghosts import WHOLE, Domain
from dpa4.model.harmonics import HarmonicRows, WignerRows, edge_frame
from dpa4.model.layers import degree_of, prepend_zeros
from dpa4.model.radial import envelope
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import gather, segment_sum
from dpa4.ops.sparse_product import Terms, sparse_or_dense

SOFTENING = 1e-7
"""Length added in quadrature to every edge length, in Angstrom (``eps`` of deepmd-kit)."""


class Edges(NamedTuple):
    """Geometry of E edges; every tensor has one row per edge."""

    vector: Tensor  # (E, 3), Angstrom; clamped with bridging
    length: Tensor  # (E,), Angstrom; clamped with bridging
    weight: Tensor  # (E,) cutoff envelope w
    gate: Tensor  # (E,) freeze gate of the source atom; ones without bridging
    rows: HarmonicRows  # rows |m| <= mmax of the edge's Wigner matrices

    def harmonics(self) -> Tensor:
        """Return the harmonics Z_{l,m} of the edge directions, (E, D)."""
        return self.rows[0][:, 0]


class Neighborhood(NamedTuple):
    """Edges, and the nodes that they join."""

    edges: Edges
    source: Incidence  # neighbour of each edge
    destination: Incidence  # centre of each edge
    degree_norm: Tensor  # (N,) inverse square root of the smooth coordination number of each centre


def in_parts(source: Incidence, destination: Incidence, max_edges: int) -> list[tuple[Incidence, Incidence]]:
    """Split the edges into parts, each with all edges of a run of centres, to bound the memory in use at once.

    Args:
        source: Neighbour of each edge, among all nodes.
        destination: Centre of each edge; edges are sorted by centre.
        max_edges: Highest number of edges in a part. A single centre with more edges still forms one part.

    Returns:
        Neighbours and centres of every part. Neighbours count among all nodes, centres among those of the part.
    """
    num_nodes = destination.num_nodes
    if len(destination.index) <= max_edges:
        return [(source, destination)]
    offsets = destination.offsets.cpu().numpy()  # waits for the device
    cuts = [0]
    while cuts[-1] < num_nodes:
        last = np.searchsorted(offsets, offsets[cuts[-1]] + max_edges, side="right") - 1
        cuts.append(max(cuts[-1] + 1, int(last)))
    nodes, edges = np.diff(cuts).tolist(), np.diff(offsets[cuts]).tolist()
    ends = zip(cuts, nodes, source.index.split(edges), destination.index.split(edges), strict=False)
    return [
        (Incidence.of(neighbours, source.num_nodes), Incidence.of_sorted(centers - start, size))
        for start, size, neighbours, centers in ends
    ]


def clamp_length(length: Tensor, bridging: Bridging) -> Tensor:
    """Clamp lengths: constant r_inner below r_inner, and a smooth transition to the true length at r_outer."""
    width = bridging.r_outer - bridging.r_inner
    t = ((length - bridging.r_inner) / width).clamp(0, 1)
    inner = bridging.r_inner + width * t**4 * (20 + t * (-45 + t * (36 - 10 * t)))
    return torch.where(length >= bridging.r_outer, length, inner)


def smooth_step(t: Tensor) -> Tensor:
    """Polynomial from 0 at t = 0 to 1 at t = 1, with three vanishing derivatives at both ends."""
    return t**4 * (35 + t * (-84 + t * (70 - 20 * t)))


def openness(length: Tensor, destination: Incidence, bridging: Bridging) -> Tensor:
    """Freeze gate of each node as a source, (N,): zero if a neighbour is within r_inner.

    The gate is a product over the edges of a node, computed as the exponential of a sum of logarithms of the non-zero
    factors. Gradients thus stay finite where a factor is exactly zero; the derivative of such a factor is zero.
    """
    t = ((length - bridging.r_inner) / (bridging.r_outer - bridging.r_inner)).clamp(0, 1)
    switch = smooth_step(t)
    gates_open = switch > 0
    log_product = segment_sum(torch.where(gates_open, switch, 1.0).log(), destination)
    closed = segment_sum((~gates_open).to(length.dtype), destination) > 0
    return torch.where(closed, 0.0, log_product.exp())


Formula = Callable[[Tensor, Sequence[Tensor]], Tensor]


class MatrixEntries(nn.Module):
    """Matrices on edges in which every entry is a number of the edge times an entry of its Wigner rows.

    The products are found once by applying a formula to numbered entries. `forward` then forms the matrices by a
    sparse product; users choose between it and the formula by `dpa4.ops.sparse_product.sparse_or_dense`.
    """

    def __init__(self, formula: Formula, size: int, lmax: int, mmax: int):
        """Find the products of a formula.

        Args:
            formula: Maps numbers (E, size) and the Wigner rows of a block to matrices, see `Terms.of_products`.
            size: Numbers per edge.
            lmax: Degree of the block.
            mmax: Highest order of the block.
        """
        super().__init__()
        self.columns = [(lmax + 1) ** 2 - m * m for m in range(mmax + 1)]
        shapes = [torch.Size((min(m + 1, 2), n)) for m, n in enumerate(self.columns)]
        empty = (torch.empty(0, *shape) for shape in ((size,), *shapes))
        self.shape = formula(next(empty), list(empty)).shape[1:]  # shape of the matrices of one edge
        self.product = SparseProduct(Terms.of_products(formula, size, shapes))

    def own(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Drop the orders and degrees that the block lacks from the rows."""
        return [r[..., :n] for r, n in zip(rows, self.columns, strict=False)]

    def joined(self, rows: Sequence[Tensor]) -> Tensor:
        """Put the `own` rows of the block side by side, (E, n), as `forward` reads them."""
        return torch.cat([r.flatten(1) for r in rows], dim=1)

    def forward(self, joined: Tensor, numbers: Tensor) -> Tensor:
        """Evaluate the formula for `joined` rows (E, n) and numbers (E, size)."""
        numbers = numbers.to(joined.dtype)  # mixed precision yields numbers of another dtype
        entries = self.product(numbers[..., None], joined[..., None], self.shape.numel())
        return entries.view(-1, *self.shape)


class LocalFrame(ConstantModule):
    """Rotation between the packed coefficients of a block and the rows of its edge frame."""

    def __init__(self, lmax: int, mmax: int, heads: int = 1):
        super().__init__()
        self.lmax, self.mmax = lmax, min(mmax, lmax)
        self._register_masks(heads)

    @of_constants
    def _register_masks(self, heads: int) -> None:
        degree, rescaled = degree_of(self.lmax), []
        for m in range(self.mmax + 1):
            rows = torch.arange(m, self.lmax + 1, dtype=torch.float64)[:, None]
            same = (rows == degree[m * m :]).double()
            # Orders beyond mmax are lost in the edge frame; the factor restores the norm on average.
            rescale = torch.where(rows > self.mmax, ((2 * rows + 1) / (2 * self.mmax + 1)).sqrt(), 1.0)
            rescaled.append(same * rescale)
            self.register_constant(f"degree_{m}", same)
            self.register_constant(f"rescaled_{m}", rescaled[-1])
        self.entries = MatrixEntries(
            lambda weight, rows: _weighted_frame(weight, rows, rescaled), heads, self.lmax, self.mmax
        )

    def matrix(self, rows: Sequence[Tensor]) -> Tensor:
        """Rotation matrices (E, M, D) into the edge frame, from Wigner rows (E, k, D')."""
        return _frame(self.entries.own(rows), self._masks("degree"))

    def weighted_back(self, rows: Sequence[Tensor], weight: Tensor) -> Tensor:
        """Matrices (E, H, M, D) whose transpose rotates back, rescales and multiplies by a weight (E, H)."""
        rows = self.entries.own(rows)
        return sparse_or_dense(
            lambda: self.entries(self.entries.joined(rows), weight),
            lambda: _weighted_frame(weight, rows, self._masks("rescaled")),
            1,
            *rows,
        )

    def _masks(self, kind: str) -> list[Tensor]:
        return [getattr(self, f"{kind}_{m}") for m in range(self.mmax + 1)]


def _frame(rows: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Stack the rows (..., k, D') of every order, one matrix row per degree, with columns for all coefficients."""
    parts = []
    for m, (of_order, mask) in enumerate(zip(rows, masks, strict=True)):
        parts.append(prepend_zeros((of_order[..., None, :] * mask).flatten(-3, -2), m * m))
    return torch.cat(parts, dim=-2)


def _weighted_frame(weight: Tensor, rows: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """`_frame` times weights (E, H): (E, H, M, D).

    The weight multiplies the rows before they are stacked. Its derivative is then a sum over rows instead of whole
    matrices (docs/adr/0014).
    """
    return _frame([r[:, None] * weight[..., None, None] for r in rows], masks)


def softened_length(vector: Tensor) -> Tensor:
    """Compute the lengths (E,) of vectors (E, 3), differentiable at zero."""
    return (vector.square().sum(-1) + SOFTENING**2).sqrt()


class FullRange(nn.Module):
    """Geometry without bridging: true lengths and open gates."""

    def openness(self, vector: Tensor, source: Incidence, destination: Incidence, domain: Domain) -> Tensor:
        """Freeze gate of each node as a source, (N,), from the vectors (E, 3)."""
        return vector.new_ones(source.num_nodes)

    def forward(self, vector: Tensor, gates_open: Tensor, source: Incidence) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors (E, 3), their lengths (E,) and the gates of the edges (E,)."""
        length = softened_length(vector)
        return vector, length, torch.ones_like(length)


class FrozenCore(FullRange):
    """Geometry with zone bridging: lengths frozen below r_inner, gates closed for atoms with such a neighbour."""

    def __init__(self, bridging: Bridging):
        super().__init__()
        self.bridging = bridging

    def openness(self, vector: Tensor, source: Incidence, destination: Incidence, domain: Domain) -> Tensor:
        """Freeze gate of each node as a source, (N,), from the vectors (E, 3)."""
        clamped = clamp_length(softened_length(vector), self.bridging)
        return domain.with_ghosts(openness(clamped, destination, self.bridging))

    def forward(self, vector: Tensor, gates_open: Tensor, source: Incidence) -> tuple[Tensor, Tensor, Tensor]:
        """Return clamped vectors (E, 3), their lengths (E,) and the gates of the edges (E,)."""
        length = softened_length(vector)
        clamped = clamp_length(length, self.bridging)
        return vector * (clamped / length)[:, None], clamped, gather(gates_open, source)


class EdgeGeometry(nn.Module):
    """Map from edge vectors to a `Neighborhood`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        lmax = config.degrees[0]
        self.wigner = WignerRows(lmax, min(config.mmax, lmax))
        self.cutoff, self.exponent = config.weight_cutoff, config.env_exp.weight
        zones = config.bridging if isinstance(config.bridging, Bridging) else None
        self.short_range = FullRange() if zones is None else FrozenCore(zones)
        self.degree_floor = SOFTENING if config.pre_release else 0.25

    def openness(
        self, vector: Tensor, source: Incidence, destination: Incidence, domain: Domain = WHOLE
    ) -> Tensor:
        """Freeze gate of each node as a source, (N,); it depends on all neighbours of the node."""
        return self.short_range.openness(vector, source, destination, domain)

    def forward(
        self, vector: Tensor, gates_open: Tensor, source: Incidence, destination: Incidence
    ) -> Neighborhood:
        """Compute the geometry of edge vectors (E, 3) in Angstrom; ``gates_open`` is the `openness` of all nodes."""
        vector, length, gate = self.short_range(vector, gates_open, source)
        weight = envelope(length, self.cutoff, self.exponent)
        coordination = segment_sum(weight.square(), destination)
        rows = self.wigner(edge_frame(vector / length[:, None]))
        degree_norm = torch.rsqrt(coordination + self.degree_floor)
        return Neighborhood(Edges(vector, length, weight, gate, rows), source, destination, degree_norm)
