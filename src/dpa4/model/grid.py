"""Non-linearities as products of fields on a grid (model-3 sections 2, 3; model-2 section 9).

A field with coefficients up to degree L is evaluated on a quadrature grid, multiplied pointwise and analysed
again. The grids are exact for products of three such fields, so the result is equivariant to rounding.
Coefficients on the SO(3) grid carry frames k = 0, -1, +1, ... as an outer channel axis: (n, D, K c).
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.integrate import lebedev_rule
from torch import Tensor, nn
from torch.nn import functional

from dpa4.kernels.bilinear import Terms
from dpa4.model.config import GridOperation, ModelConfig
from dpa4.model.constants import ConstantModule, SparseProduct
from dpa4.model.harmonics import WignerRows, edge_frame, spherical_harmonics
from dpa4.model.layers import ChannelLinear, DegreeLinear, FocusLinear, before_zeros, degree_of

LEBEDEV_DEGREES = (*range(3, 32, 2), *range(35, 132, 6))


def lebedev(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (G, 3) and weights (G,), summing to one, of the smallest Lebedev rule exact to ``degree``."""
    points, weights = lebedev_rule(next(d for d in LEBEDEV_DEGREES if d >= degree))
    return points.T.copy(), weights / weights.sum()


def s2_grid(lmax: int) -> tuple[Tensor, Tensor]:
    """Evaluation (G, D) and analysis (D, G) matrices of fields on the sphere; analysis inverts evaluation."""
    points, weights = lebedev(3 * lmax)
    harmonics = np.concatenate([spherical_harmonics(l, points) for l in range(lmax + 1)], axis=-1)
    degree = degree_of(lmax).numpy()
    evaluate = harmonics / np.sqrt(lmax + 1)
    analyse = weights[:, None] * (2 * degree + 1) * np.sqrt(lmax + 1) * harmonics
    return torch.from_numpy(evaluate), torch.from_numpy(analyse.T.copy())


def so3_grid(lmax: int, kmax: int) -> tuple[Tensor, Tensor]:
    """Evaluation (G, D K) and analysis (D K, G) matrices of fields on the rotations, frames |k| <= kmax.

    The grid is a Lebedev rule times 3 kmax + 1 rolls. Slots with |k| > l hold zeros.
    """
    points, weights = lebedev(3 * lmax)
    rolls = 3 * kmax + 1
    angle = 2 * torch.pi * torch.arange(rolls, dtype=torch.float64) / rolls
    frame = edge_frame(torch.from_numpy(points))[:, None].expand(-1, rolls, -1, -1)
    minus, axis, plus = frame.unbind(2)  # (Z(e2), Z(n), -Z(e1)): a roll turns the outer two into each other
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    frame = torch.stack([cos * minus - sin * plus, axis, cos * plus + sin * minus], dim=2).flatten(0, 1)
    rows = WignerRows(lmax, kmax).double()(frame)
    evaluate = torch.zeros(len(frame), (lmax + 1) ** 2, 2 * kmax + 1, dtype=torch.float64)
    for k in range(kmax + 1):
        slots = [0] if k == 0 else [2 * k - 1, 2 * k]
        evaluate[:, k * k :, slots] = rows[k].transpose(1, 2)
    weight = torch.from_numpy(weights).repeat_interleave(rolls) / rolls
    factor = (2 * degree_of(lmax) + 1)[:, None] * weight[:, None, None]
    return evaluate.flatten(1), (factor * evaluate).flatten(1).T.contiguous()


@lru_cache(maxsize=16)
def grid_matrices(lmax: int, kmax: int | None) -> tuple[Tensor, Tensor]:
    """Those of the sphere, without kmax, or of the rotations."""
    return s2_grid(lmax) if kmax is None else so3_grid(lmax, kmax)


@lru_cache(maxsize=16)
def couplings(lmax: int, kmax: int | None) -> Terms:
    """The products of coefficients that a product of two fields consists of."""
    evaluate, analyse = grid_matrices(lmax, kmax)
    return Terms.of(torch.einsum("kg,gi,gj->kij", analyse, evaluate, evaluate))


class Grid(ConstantModule):
    """Products of fields on a quadrature grid, and what is left of the grid in them."""

    evaluate: Tensor
    analyse: Tensor
    metric: Tensor

    def __init__(self, lmax: int, kmax: int | None):
        super().__init__()
        evaluate, analyse = grid_matrices(lmax, kmax)
        self.frames = 1 if kmax is None else 2 * kmax + 1
        self.register_constant("evaluate", evaluate)
        self.register_constant("analyse", analyse)
        self.coupling = SparseProduct(couplings(lmax, kmax))  # faster than the grid on a CPU
        self.scaling = SparseProduct(Terms.of(torch.eye(len(analyse), dtype=torch.float64)[:, :, None]))
        # Different coefficients are orthogonal on the grid, so the mean of a product needs no values on it.
        self.register_constant("metric", (analyse[0] @ evaluate.square())[:, None])

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Product of two fields, (n, D K, c) each."""
        if self.coupling.takes(left, right):
            return self.coupling(left, right, left.shape[1])
        values = (self.evaluate.to(left.dtype) @ left) * (self.evaluate.to(left.dtype) @ right)
        return self.analyse.to(values.dtype) @ values

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """A field (n, D K, c) times a factor (n, c)."""
        factor = factor[:, None]
        # On a CPU the sums over rows that are derivatives of the plain product are slow.
        return self.scaling(x, factor, x.shape[1]) if self.scaling.takes(x, factor) else x * factor

    def scalar_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Scalar of frame 0 of `product`: (n, c)."""
        return (left * right * self.metric.to(left.dtype)).sum(1)


class GridProduct(nn.Module):
    """Product of two fields, and what operations with weights of their own do before and after it."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """What is multiplied, a linear map of the channels of both fields: (..., K, c) -> (..., K, c').

        Also of weights that make the fields: they are fewer than the coefficients of some tens of nodes.
        """
        return left, right

    def combine(self, values: Tensor, scalars: Tensor) -> Tensor:
        """Products (n, D K, c') mixed by what the scalars (n, 2 c) say."""
        return values

    def mix(self, x: Tensor) -> Tensor:
        """What becomes of the result's channels: (..., c') -> (..., c)."""
        return x

    def forward(
        self, left: Tensor, right: Tensor, scalars: Tensor, gate: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """The product of two fields, gated, plus a product of scalars for those of frame 0.

        Args:
            left: Projected field, (n, D, K c').
            right: Projected field, (n, D, K c').
            scalars: Of both fields before they were projected, (n, 2 c).
            gate: Factor of all coefficients, (n, c).
            first: Scalars (n, c); their SiLU is multiplied.
            second: Scalars (n, c).

        Returns:
            (n, D, K c).
        """
        product = self.combine(self.grid.product(self._fields(left), self._fields(right)), scalars)
        y = self.grid.scaled(self.mix(product), gate).unflatten(1, (-1, self.grid.frames)).flatten(2)
        direct = functional.silu(first) * second
        return y + before_zeros(direct[:, None], y.shape[1] - 1, y.shape[2] - direct.shape[1])

    def scalar(
        self, left: Tensor, right: Tensor, scalars: Tensor, gate: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """The scalar of frame 0 of what `forward` returns, (n, c); those of other frames are zero."""
        product = self.grid.scalar_product(self._fields(left), self._fields(right))
        y = self.mix(self.combine(product[:, None], scalars)[:, 0])
        return y * gate + functional.silu(first) * second

    def _fields(self, x: Tensor) -> Tensor:
        """(n, D, K c') to (n, D K, c')."""
        return x.unflatten(-1, (self.grid.frames, -1)).flatten(1, 2)


class GridMLP(GridProduct):
    """Product of two mixed fields, mixed again; ``joint`` mixes both fields into both factors."""

    def __init__(self, grid: Grid, width: int, joint: bool):
        super().__init__(grid)
        self.joint = joint
        self.left = ChannelLinear(2 * width if joint else width, 2 * width)
        self.right = ChannelLinear(2 * width if joint else width, 2 * width)
        self.out = ChannelLinear(2 * width, width)

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """See `GridProduct`."""
        if self.joint:
            left = right = torch.cat([left, right], dim=-1)
        return self.left(left), self.right(right)

    def mix(self, x: Tensor) -> Tensor:
        """See `GridProduct`."""
        return self.out(x)


class GridBranches(GridProduct):
    """Products of several projected field pairs, mixed by a softmax over the scalars."""

    def __init__(self, grid: Grid, width: int, branches: int):
        super().__init__(grid)
        self.branches = branches
        self.left = ChannelLinear(width, branches * width)
        self.right = ChannelLinear(width, branches * width)
        self.out = ChannelLinear(width, width)
        self.router = ChannelLinear(2 * width, branches)

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """See `GridProduct`."""
        return self.left(left), self.right(right)

    def combine(self, values: Tensor, scalars: Tensor) -> Tensor:
        """See `GridProduct`."""
        if self.branches == 1:  # it has all of the share
            return values
        share = self.router(scalars).softmax(-1)
        return (values.unflatten(-1, (self.branches, -1)) * share[:, None, :, None]).sum(2)

    def mix(self, x: Tensor) -> Tensor:
        """See `GridProduct`."""
        return self.out(x)


def grid_operation(operation: GridOperation, grid: Grid, width: int, joint: bool) -> GridProduct:
    """The operation a configuration names; ``joint`` applies to the MLP of one input split in halves."""
    if operation == "glu":
        return GridProduct(grid)
    if operation == "mlp":
        return GridMLP(grid, width, joint)
    return GridBranches(grid, width, int(operation))


class GridActivation(nn.Module):
    """Non-linearity of a feed-forward network: the product of both halves of what a linear layer makes."""

    def __init__(self, lmax: int, kmax: int | None, width: int, operation: GridOperation, bias: bool):
        super().__init__()
        grid = Grid(lmax, kmax)
        self.frames = grid.frames
        self.operation = grid_operation(operation, grid, width, joint=True)
        self.scalar_gate = FocusLinear(2 * width, width, bias=bias, std=0.01)

    def forward(self, x: Tensor, linear: DegreeLinear) -> Tensor:
        """Multiply the halves of linear(x)."""
        factors = self._factors(x, linear)
        return self.operation(*factors, *self._scalar_path(factors[-1]))

    def scalars(self, x: Tensor, linear: DegreeLinear) -> Tensor:
        """The scalars of frame 0 of what `forward` returns, (n, c); those of other frames are zero."""
        factors = self._factors(x, linear)
        return self.operation.scalar(*factors, *self._scalar_path(factors[-1]))

    def _factors(self, x: Tensor, linear: DegreeLinear) -> tuple[Tensor, Tensor, Tensor]:
        """Projected fields and scalars. The projections act on the weights of the layer, whose result is not made."""

        def halves(of_layer: Tensor) -> list[Tensor]:
            left, right = of_layer.unflatten(-1, (2, self.frames, -1)).unbind(-3)
            return [p.flatten(-2) for p in self.operation.project(left, right)]

        def scalars(of_layer: Tensor) -> Tensor:
            """Those of frame 0, of both halves."""
            return of_layer.unflatten(-1, (2, self.frames, -1))[..., 0, :].flatten(-2)

        biases = [None, None] if linear.bias is None else halves(linear.bias)
        left, right = (linear.map(x, w, b) for w, b in zip(halves(linear.weight), biases, strict=True))
        first = x[:, 0] @ scalars(linear.weight[0])
        return left, right, first if linear.bias is None else first + scalars(linear.bias)

    def _scalar_path(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, and the two factors of what is added to the scalars."""
        gate = self.scalar_gate(scalars[:, None])[:, 0].sigmoid()
        return gate, *scalars.chunk(2, dim=-1)


class MessageNodeProduct(nn.Module):
    """Product of the aggregated message with its own node on the SO(3) grid (model-2 sections 7.6, 9.1)."""

    def __init__(self, config: ModelConfig, lmax: int):
        super().__init__()
        width, self.n_focus = config.focus_width, config.n_focus
        grid = Grid(lmax, min(config.kmax, lmax))
        bound = width**-0.5
        self.expand = DegreeLinear(lmax, width, grid.frames * width)
        self.contract = DegreeLinear(lmax, grid.frames * width, width)
        nn.init.uniform_(self.expand.weight, -bound, bound)
        bound = (grid.frames * width) ** -0.5
        nn.init.uniform_(self.contract.weight, -bound, bound)
        self.operation = grid_operation(config.message_grid, grid, width, joint=False)
        self.scalar_gate = FocusLinear(2 * width, width, self.n_focus, bias=config.mlp_bias, std=0.01)
        self.residual_scale = nn.Parameter(torch.full((self.n_focus, width), 1e-3))

    def forward(self, message: Tensor, node: Tensor) -> Tensor:
        """Message plus product, (N, D, F c) each; the focus streams are rows of one batch."""
        query, context = self._streams(message), self._streams(node)
        first, second = query[:, 0], context[:, 0]
        scalars = torch.cat([first, second], dim=-1)
        gate = self.scalar_gate(scalars.unflatten(0, (-1, self.n_focus))).sigmoid().flatten(0, 1)
        weight = self.expand.weight.unflatten(-1, (self.operation.grid.frames, -1))
        left, right = (w.flatten(-2) for w in self.operation.project(weight, weight))
        left, right = self.expand.map(query, left), self.expand.map(context, right)
        product = self.contract(self.operation(left, right, scalars, gate, first, second))
        product = product.unflatten(0, (-1, self.n_focus)) * self.residual_scale[:, None]
        return message + product.transpose(1, 2).flatten(2)

    def _streams(self, x: Tensor) -> Tensor:
        """(N, D, F c) -> (N F, D, c)."""
        return x.unflatten(-1, (self.n_focus, -1)).transpose(1, 2).flatten(0, 1)


class NoProduct(nn.Module):
    """Leaves the message as it is."""

    def forward(self, message: Tensor, node: Tensor) -> Tensor:
        """Return the message."""
        return message
