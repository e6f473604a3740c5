"""SO(2)-equivariant operations in the edge frame: edge-node products and the stack of SO(2) layers.

See docs/theory.md, "EMFA convolution" and "SO(2) layers". Edge features have the shape (F, E, W): for every focus
stream and edge, the rows of the edge frame follow one another in the last axis, each with c channels. An order |m|
owns K_m adjacent columns, K_0 = (lmax + 1) c and K_m = 2 (lmax - m + 1) c, with the -m rows before the +m rows. The
linear maps of the stack act on each order separately.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dpa4.model.constants import of_constants
from dpa4.model.edges import LocalFrame, MatrixEntries, Neighborhood
from dpa4.model.layers import FocusLinear, degree_of, prepend_zeros, truncated_normal
from dpa4.model.radial import RadialFeatures
from dpa4.model.switches import Symmetry
from dpa4.ops.edge_products import edge_matmul
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.segments import pick
from dpa4.ops.so2_stack import so2_stack
from dpa4.ops.sparse_product import sparse_or_dense
from dpa4.ops.split_matmul import precise_matmul


def join_streams(x: Tensor, layout: EdgeLayout) -> Tensor:
    """Rearrange edge features (F, E, W) to rows of the edge frame, (E, M, F c)."""
    return x.unflatten(-1, (layout.total, -1)).permute(1, 2, 0, 3).flatten(2)


def split_streams(x: Tensor, n_focus: int) -> Tensor:
    """Rearrange rows of the edge frame (E, M, F c) to edge features, (F, E, W)."""
    return x.unflatten(-1, (n_focus, -1)).permute(2, 0, 1, 3).flatten(2)


class ElementwiseProduct(nn.Module):
    """Edge-node product of mode "none": the rotated source times the radial feature of each degree."""

    degree: Tensor

    def __init__(self, lmax: int, mmax: int):
        super().__init__()
        self.frame = LocalFrame(lmax, mmax)
        self.register_buffer("degree", torch.tensor(EdgeLayout(lmax, mmax).degrees()), persistent=False)

    def spread(self, x: Tensor) -> Tensor:
        """Return the nodes as `forward` gathers them, (N, D, C)."""
        return x

    def forward(
        self, x: Tensor, radial: RadialFeatures, hidden: Tensor, neighborhood: Neighborhood
    ) -> Tensor:
        """Map `spread` nodes to rows of the edge frame (E, M, C); ``hidden`` (C0, C) maps the radial channels."""
        rotation = self.frame.matrix(neighborhood.edges.rows).to(x.dtype)
        return edge_matmul(rotation[:, None], x, neighborhood.source) * radial.of_degrees(hidden, self.degree)


class DegreeProduct(nn.Module):
    """Edge-node product: the rotated source times a matrix over degrees that depends on the edge.

    For every order |m| the radial features determine a matrix over the degrees l, l' >= |m|. In mode
    "degree_channel", ``channel_basis`` (R, C) gives the product rank R in the channels; in mode "degree" all channels
    share one matrix. The basis acts on nodes before the gather, and matrix and rotation combine into one small matrix
    per edge.
    """

    columns: Tensor

    def __init__(self, lmax: int, mmax: int, width: int, rank: int | None):
        super().__init__()
        self.lmax, self.mmax, self.rank = lmax, mmax, rank or 1
        pairs = [(lmax - m + 1) ** 2 for m in range(mmax + 1)]  # of degrees, for each order
        shape = ((lmax + 1) * width, sum(pairs) * self.rank)
        self.weight = nn.Parameter(truncated_normal(shape, *shape))
        self.channel_basis = nn.Parameter(truncated_normal((rank, width), rank, width)) if rank else None
        self._register_entries(pairs)

    @of_constants
    def _register_entries(self, counts: Sequence[int]) -> None:
        """Find the products of the kernel and the Wigner rows, from the number of pairs of degrees of each order."""
        # The entry of degrees l, l' and rank r serves all coefficients of degree l. It is repeated in the weights,
        # which are small, to avoid indexing on the edges. Layout within |m|: (l', r, coefficient).
        columns, start = [], 0
        for m, count in enumerate(counts):
            n, degree = self.lmax - m + 1, degree_of(self.lmax)[m * m :] - m
            entry = (degree * n + torch.arange(n)[:, None, None]) * self.rank
            columns.append((start + entry + torch.arange(self.rank)[:, None]).flatten())
            start += count * self.rank
        self.sizes = [len(c) for c in columns]
        self.register_buffer("columns", torch.cat(columns), persistent=False)
        self.entries = MatrixEntries(self._of_entries, start, self.lmax, self.mmax)

    def spread(self, x: Tensor) -> Tensor:
        """Return the nodes as `forward` gathers them: (N, D, C) times the channel basis, (N, R D, C)."""
        if self.channel_basis is None:
            return x
        return (x[:, None] * self.channel_basis[:, None, :]).flatten(1, 2).to(x.dtype)

    def forward(
        self, x: Tensor, radial: RadialFeatures, hidden: Tensor, neighborhood: Neighborhood
    ) -> Tensor:
        """Map `spread` nodes to rows of the edge frame (E, M, C); ``hidden`` (C0, C) maps the radial channels."""
        rows = self.entries.own(neighborhood.edges.rows)

        def kernel(weight: Tensor) -> Tensor:
            weight = weight.unflatten(0, (self.lmax + 1, -1))
            return radial.project(torch.einsum("bc,lck->lbk", hidden, weight))

        matrices = sparse_or_dense(
            lambda: self.entries(self.entries.joined(rows), kernel(self.weight)),
            lambda: self.matrices(kernel(pick(self.weight, 1, self.columns)), rows),
            1,
            *rows,
        )
        return edge_matmul(matrices.to(x.dtype)[:, None], x, neighborhood.source)

    def _of_entries(self, kernel: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """`matrices` for a kernel whose entries are not repeated yet."""
        return self.matrices(kernel[:, self.columns], rows)

    def matrices(self, kernel: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Combine the kernel (E, K) and the Wigner rows to matrices (E, M, R D) that rotate and then mix degrees."""
        combined = []
        for m, block in enumerate(kernel.split(self.sizes, dim=1)):
            block = block.unflatten(1, (1, self.lmax - m + 1, self.rank, -1)) * rows[m][:, :, None, None]
            combined.append(prepend_zeros(block, m * m).flatten(3).flatten(1, 2))
        return torch.cat(combined, dim=1)


class SO2Linear(nn.Module):
    """Linear map within each order |m| that commutes with rotations about the edge.

    With L = lmax + 1 and n = L - m, ``weight_m0`` has the shape (L c, F L c), and ``weight_m[m - 1]`` the shape
    (n c, F 2 n c). The latter holds [U | V] with y- = x- U - x+ V and y+ = x- V + x+ U. With symmetry O3 there is no
    V, and the shape is (n c, F n c).
    """

    def __init__(
        self, lmax: int, mmax: int, width: int, n_focus: int, bias: bool, symmetry: Symmetry = "SO3"
    ):
        super().__init__()
        self.n_focus, self.width, self.symmetry = n_focus, width, symmetry

        def block(n: int, m: int) -> nn.Parameter:
            parts = 2 if m and symmetry == "SO3" else 1  # U and V
            rows, columns = n * width, parts * n * width
            per_focus = [truncated_normal((rows, columns), rows, columns) for _ in range(n_focus)]
            return nn.Parameter(torch.cat(per_focus, dim=1) * parts**-0.5)

        self.weight_m0 = block(lmax + 1, 0)
        self.weight_m = nn.ParameterList(block(lmax + 1 - m, m) for m in range(1, mmax + 1))
        self.bias = nn.Parameter(torch.zeros(n_focus * width)) if bias else None

    def matrices(self) -> list[Tensor]:
        """Return one matrix per order, [(F, K_m, K_m)]; with symmetry O3, U of the orders above zero."""
        matrices = [self.weight_m0.unflatten(1, (self.n_focus, -1)).transpose(0, 1)]
        for weight in self.weight_m:
            if self.symmetry == "O3":
                matrices.append(weight.unflatten(1, (self.n_focus, -1)).transpose(0, 1))
                continue
            u, v = weight.unflatten(1, (self.n_focus, 2, -1)).permute(2, 1, 0, 3)
            matrices.append(torch.cat([torch.cat([u, v], -1), torch.cat([-v, u], -1)], dim=1))
        return matrices

    def forward(self, groups: list[Tensor], bias_scale: Tensor | None) -> list[Tensor]:
        """Map [(F, E, K_m)]. The bias of the scalars is multiplied by ``bias_scale`` (F, E, c), if given."""
        out = []
        for x, w in zip(groups, self.matrices(), strict=True):
            signs = x.unflatten(-1, (-1, w.shape[-1])).flatten(1, 2)  # rows of -m and +m one below the other
            out.append(precise_matmul(signs, w).reshape(x.shape))
        if self.bias is not None:
            bias = self.bias.view(self.n_focus, 1, -1)
            scalars, rest = out[0].tensor_split([self.width], dim=-1)
            bias = bias if bias_scale is None else bias * bias_scale
            out[0] = torch.cat([scalars + bias, rest], dim=-1)
        return out


class Gate(nn.Module):
    """Gate between SO(2) layers: SiLU for scalars, sigmoids of the scalars per degree and channel for the rest."""

    def __init__(self, lmax: int, width: int, n_focus: int, bias: bool):
        super().__init__()
        self.width = width
        self.n_focus = n_focus
        self.linear = FocusLinear(width, lmax * width, n_focus, bias, std=0.01) if lmax else None

    def weight(self, x: Tensor) -> Tensor:
        """Weight of the gates of the degrees l >= 1, (F, c, lmax c); empty for lmax = 0, on the device of x."""
        if self.linear is None:
            return x.new_empty(self.n_focus, self.width, 0)
        return self.linear.per_focus()

    def forward(self, groups: list[Tensor]) -> list[Tensor]:
        """Gate [(F, E, K_m)]. Since silu(x) = x sigmoid(x), one sigmoid serves scalars and gates."""
        logits = groups[0][..., : self.width]
        if self.linear is not None:
            gates = self.linear(logits.transpose(0, 1)).transpose(0, 1)
            logits = torch.cat([logits, gates], dim=-1)
        factor = logits.sigmoid()
        out = [groups[0] * factor]
        for m, x in enumerate(groups[1:], start=1):
            out.append((x.unflatten(-1, (2, -1)) * factor[..., None, m * self.width :]).flatten(-2))
        return out


class SO2Stack(nn.Module):
    """Stack of residual SO(2) layers. All but the last layer are gated."""

    def __init__(
        self,
        lmax: int,
        mmax: int,
        width: int,
        n_focus: int,
        layers: int,
        bias: bool,
        layer_scale: bool,
        symmetry: Symmetry = "SO3",
    ):
        super().__init__()
        self.layout = EdgeLayout(lmax, mmax)
        self.linears = nn.ModuleList(
            SO2Linear(lmax, mmax, width, n_focus, bias, symmetry) for _ in range(layers)
        )
        self.gates = nn.ModuleList(
            Gate(lmax, width, n_focus, bias) if t < layers - 1 else nn.Identity() for t in range(layers)
        )
        scales = range(layers if layer_scale else 0)
        self.scales = nn.ParameterList(torch.full((n_focus, width), 1e-3) for _ in scales)

    def forward(self, x: Tensor, bias_scale: Tensor | None) -> Tensor:
        """Apply the layers to (F, E, W); ``bias_scale`` (F, E, c) multiplies the bias of the first layer."""
        width = x.shape[-1] // self.layout.total
        groups = list(x.split([count * width for _, count in self.layout.orders()], dim=-1))
        for t, (linear, gate) in enumerate(zip(self.linears, self.gates, strict=True)):
            update = gate(linear(groups, bias_scale if t == 0 else None))
            if self.scales:
                scale = self.scales[t][:, None]
                update = [u * scale.tile(u.shape[-1] // scale.shape[-1]) for u in update]
            groups = [x + u for x, u in zip(groups, update, strict=True)]
        return torch.cat(groups, dim=-1)


class FusedSO2Stack(SO2Stack):
    """`SO2Stack` as one operator with few passes over the edges.

    Biases and layer scales, which no published model has, are not supported.
    """

    def __init__(
        self, lmax: int, mmax: int, width: int, n_focus: int, layers: int, symmetry: Symmetry = "SO3"
    ):
        super().__init__(lmax, mmax, width, n_focus, layers, False, False, symmetry)

    def forward(self, x: Tensor, bias_scale: Tensor | None) -> Tensor:
        """Apply the layers to (F, E, W); ``bias_scale`` is ignored."""
        linears, gates = cast(Iterable[SO2Linear], self.linears), cast(list[Gate], list(self.gates)[:-1])
        matrices = [linear.matrices() for linear in linears]
        return so2_stack(x, matrices, [gate.weight(x) for gate in gates], self.layout, self.training)


def so2_layers(
    lmax: int,
    mmax: int,
    width: int,
    n_focus: int,
    layers: int,
    bias: bool,
    layer_scale: bool,
    symmetry: Symmetry = "SO3",
) -> SO2Stack:
    """Build the stack for a configuration, as one operator where it is supported."""
    if bias or layer_scale or layers == 0:
        return SO2Stack(lmax, mmax, width, n_focus, layers, bias, layer_scale, symmetry)
    return FusedSO2Stack(lmax, mmax, width, n_focus, layers, symmetry)
