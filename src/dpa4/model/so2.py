"""SO(2)-equivariant mixing in the edge frame (model-2 sections 5 to 7.3).

Edge features are held as one tensor per order |m|: (F, E, K_m) with K_0 = (lmax + 1) c and
K_m = 2 (lmax - m + 1) c, the -m run before the +m run and channels fastest. Every operation of the stack acts on
the orders separately, so the runs are never joined inside it.
"""

import torch
from torch import Tensor, nn

from dpa4.kernels.matmul import precise_matmul
from dpa4.kernels.rotate import edge_matmul
from dpa4.model.edges import LocalFrame, Neighborhood, reduced_degrees
from dpa4.model.layers import FocusLinear, after_zeros, degree_of, truncated_normal
from dpa4.model.radial import RadialFeatures


def join_orders(groups: list[Tensor], width: int) -> Tensor:
    """Edge features per order, [(F, E, K_m)], to rows of the edge frame, (E, M, F width)."""
    rows = torch.cat([g.unflatten(-1, (-1, width)) for g in groups], dim=2)
    return rows.permute(1, 2, 0, 3).flatten(2)


def split_orders(x: Tensor, lmax: int, mmax: int, n_focus: int) -> list[Tensor]:
    """Rows of the edge frame (E, M, F c) to edge features per order, [(F, E, K_m)]."""
    sizes = [lmax + 1] + [2 * (lmax - m + 1) for m in range(1, mmax + 1)]
    streams = x.unflatten(-1, (n_focus, -1)).permute(2, 0, 1, 3)
    return [rows.flatten(2) for rows in streams.split(sizes, dim=2)]


class ElementwiseProduct(nn.Module):
    """Edge-node product of mode "none": rotate the source, multiply by the radial feature of its degree."""

    degree: Tensor

    def __init__(self, lmax: int, mmax: int, width: int):
        super().__init__()
        self.frame = LocalFrame(lmax, mmax)
        self.register_buffer("degree", torch.tensor(reduced_degrees(lmax, mmax)), persistent=False)

    def spread(self, x: Tensor) -> Tensor:
        """Nodes as the product gathers them, (N, D, C)."""
        return x

    def forward(self, x: Tensor, radial: RadialFeatures, hidden: Tensor, hood: Neighborhood) -> Tensor:
        """Spread nodes (N, D, C) to rows of the edge frame (E, M, C); ``hidden`` (C0, C) maps radial channels."""
        rotation = self.frame.matrix(hood.edges.rows).to(x.dtype)
        return edge_matmul(rotation[:, None], x, hood.source) * radial.of_degrees(hidden, self.degree)


class DegreeProduct(nn.Module):
    """Edge-node product by a matrix over degrees that depends on the edge (model-2 section 6).

    For every order |m| the radial features give a matrix over degrees l, l' >= |m|. ``channel_basis`` (R, C) makes
    it rank R in the channels (mode "degree_channel"); without it all channels share one (mode "degree"). The
    basis acts on nodes before the gather, and matrix and rotation combine into one small product per edge.
    """

    columns: Tensor

    def __init__(self, lmax: int, mmax: int, width: int, rank: int | None):
        super().__init__()
        self.lmax, self.mmax, self.rank = lmax, mmax, rank or 1
        entries = [(lmax - m + 1) ** 2 for m in range(mmax + 1)]
        shape = ((lmax + 1) * width, sum(entries) * self.rank)
        self.weight = nn.Parameter(truncated_normal(shape, *shape))
        self.channel_basis = nn.Parameter(truncated_normal((rank, width), rank, width)) if rank else None
        # The entry of degrees l, l' and rank r serves all coefficients of degree l: repeated on the weights, which
        # are small, it needs no indexing on the edges. Order within |m|: (l', r, coefficient).
        columns, start = [], 0
        for m in range(mmax + 1):
            n, degree = lmax - m + 1, degree_of(lmax)[m * m :] - m
            entry = (degree * n + torch.arange(n)[:, None, None]) * self.rank
            columns.append((start + entry + torch.arange(self.rank)[:, None]).flatten())
            start += entries[m] * self.rank
        self.sizes = [len(c) for c in columns]
        self.register_buffer("columns", torch.cat(columns), persistent=False)

    def spread(self, x: Tensor) -> Tensor:
        """Nodes as the product gathers them: (N, D, C) to (N, R D, C)."""
        if self.channel_basis is None:
            return x
        return (x[:, None] * self.channel_basis[:, None, :]).flatten(1, 2).to(x.dtype)

    def forward(self, x: Tensor, radial: RadialFeatures, hidden: Tensor, hood: Neighborhood) -> Tensor:
        """Spread nodes to rows of the edge frame (E, M, C); ``hidden`` (C0, C) maps radial channels."""
        weight = self.weight.index_select(1, self.columns).unflatten(0, (self.lmax + 1, -1))
        kernel = radial.project(torch.einsum("bc,lck->lbk", hidden, weight))
        combined = []
        for m, block in enumerate(kernel.split(self.sizes, dim=1)):
            rows = hood.edges.rows[m][:, :, None, None, : (self.lmax + 1) ** 2 - m * m]
            block = block.unflatten(1, (1, self.lmax - m + 1, self.rank, -1)) * rows
            combined.append(after_zeros(block, m * m).flatten(3).flatten(1, 2))
        return edge_matmul(torch.cat(combined, dim=1).to(x.dtype)[:, None], x, hood.source)


class SO2Linear(nn.Module):
    """Linear map within each order |m| that commutes with rotations about the edge (model-2 section 5).

    ``weight_m0`` ((L c), F (L c)); ``weight_m[m - 1]`` (n c, F 2 n c) holds [U | V] with
    y- = x- U - x+ V and y+ = x- V + x+ U.
    """

    def __init__(self, lmax: int, mmax: int, width: int, n_focus: int, bias: bool):
        super().__init__()
        self.n_focus, self.width = n_focus, width

        def block(n: int, m: int) -> nn.Parameter:
            rows, columns = n * width, min(m + 1, 2) * n * width
            per_focus = [truncated_normal((rows, columns), rows, columns) for _ in range(n_focus)]
            return nn.Parameter(torch.cat(per_focus, dim=1) * 2 ** (-0.5 * min(m, 1)))

        self.weight_m0 = block(lmax + 1, 0)
        self.weight_m = nn.ParameterList(block(lmax + 1 - m, m) for m in range(1, mmax + 1))
        self.bias = nn.Parameter(torch.zeros(n_focus * width)) if bias else None

    def matrices(self) -> list[Tensor]:
        """One dense matrix per order, [(F, K_m, K_m)]."""
        matrices = [self.weight_m0.unflatten(1, (self.n_focus, -1)).transpose(0, 1)]
        for weight in self.weight_m:
            u, v = weight.unflatten(1, (self.n_focus, 2, -1)).permute(2, 1, 0, 3)
            matrices.append(torch.cat([torch.cat([u, v], -1), torch.cat([-v, u], -1)], dim=1))
        return matrices

    def forward(self, groups: list[Tensor], bias_scale: Tensor | None) -> list[Tensor]:
        """Map [(F, E, K_m)]; the scalar bias is multiplied by ``bias_scale`` (F, E, c) where that is given."""
        out = [precise_matmul(x, w) for x, w in zip(groups, self.matrices(), strict=True)]
        if self.bias is not None:
            bias = self.bias.view(self.n_focus, 1, -1)
            scalars, rest = out[0].tensor_split([self.width], dim=-1)
            bias = bias if bias_scale is None else bias * bias_scale
            out[0] = torch.cat([scalars + bias, rest], dim=-1)
        return out


class Gate(nn.Module):
    """SiLU on scalars; a sigmoid of the scalars, one per degree and channel, on the rest (model-2 section 4.1)."""

    def __init__(self, lmax: int, width: int, n_focus: int, bias: bool):
        super().__init__()
        self.width = width
        self.linear = FocusLinear(width, lmax * width, n_focus, bias, std=0.01) if lmax else None

    def forward(self, groups: list[Tensor]) -> list[Tensor]:
        """Gate [(F, E, K_m)]; silu(x) = x sigmoid(x), so one sigmoid serves scalars and gates."""
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
    """Residual SO(2) layers: gated, the last one linear (model-2 section 7.3, step 6)."""

    def __init__(
        self, lmax: int, mmax: int, width: int, n_focus: int, layers: int, bias: bool, layer_scale: bool
    ):
        super().__init__()
        self.linears = nn.ModuleList(SO2Linear(lmax, mmax, width, n_focus, bias) for _ in range(layers))
        self.gates = nn.ModuleList(
            Gate(lmax, width, n_focus, bias) if t < layers - 1 else nn.Identity() for t in range(layers)
        )
        scales = range(layers if layer_scale else 0)
        self.scales = nn.ParameterList(torch.full((n_focus, width), 1e-3) for _ in scales)

    def forward(self, groups: list[Tensor], bias_scale: Tensor | None) -> list[Tensor]:
        """Mix [(F, E, K_m)]; ``bias_scale`` (F, E, c) multiplies the bias of the first layer."""
        for t, (linear, gate) in enumerate(zip(self.linears, self.gates, strict=True)):
            update = gate(linear(groups, bias_scale if t == 0 else None))
            if self.scales:
                scale = self.scales[t][:, None]
                update = [u * scale.tile(u.shape[-1] // scale.shape[-1]) for u in update]
            groups = [x + u for x, u in zip(groups, update, strict=True)]
        return groups
