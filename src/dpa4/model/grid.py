"""Non-linearities as products of fields on a grid (docs/theory.md, "Grids").

Two fields with coefficients up to degree L are evaluated on a quadrature grid, multiplied pointwise and analysed
again. The grids integrate products of three such fields exactly, so the result is equivariant up to rounding.
Coefficients of the SO(3) grid carry frames k = 0, -1, +1, ... as an outer channel axis: (n, D, K c). With symmetry O3
the frames are k = 0, +1, +2, ..., whose products keep parity (docs/theory.md, "Mirror symmetry").
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.integrate import lebedev_rule
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.config import GridOperation, ModelConfig
from dpa4.model.constants import ConstantModule, SparseProduct, of_constants
from dpa4.model.harmonics import WignerRows, edge_frame, spherical_harmonics
from dpa4.model.layers import ChannelLinear, DegreeLinear, FocusLinear, append_zeros, degree_of
from dpa4.model.switches import Symmetry, frame_orders
from dpa4.ops.sparse_product import Terms, sparse_or_dense

LEBEDEV_DEGREES = (*range(3, 32, 2), *range(35, 132, 6))


def lebedev(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points (G, 3) and weights (G,) of the smallest Lebedev rule exact to ``degree``; weights sum to one."""
    points, weights = lebedev_rule(next(d for d in LEBEDEV_DEGREES if d >= degree))
    return points.T.copy(), weights / weights.sum()


def s2_grid(lmax: int) -> tuple[Tensor, Tensor]:
    """Evaluation (G, D) and analysis (D, G) matrices of fields on the sphere. Analysis inverts evaluation."""
    points, weights = lebedev(3 * lmax)
    harmonics = np.concatenate([spherical_harmonics(l, points) for l in range(lmax + 1)], axis=-1)
    degree = degree_of(lmax).numpy()
    evaluate = harmonics / np.sqrt(lmax + 1)
    analyse = weights[:, None] * (2 * degree + 1) * np.sqrt(lmax + 1) * harmonics
    return torch.from_numpy(evaluate), torch.from_numpy(analyse.T.copy())


def so3_grid(lmax: int, kmax: int, symmetry: Symmetry = "SO3") -> tuple[Tensor, Tensor]:
    """Evaluation (G, D K) and analysis (D K, G) matrices of fields on SO(3) with the frames of `frame_orders`.

    The grid is a Lebedev rule times 3 kmax + 1 rolls. Entries with |k| > l are zero.
    """
    points, weights = lebedev(3 * lmax)
    rolls = 3 * kmax + 1
    angle = 2 * torch.pi * torch.arange(rolls, dtype=torch.float64) / rolls
    frame = edge_frame(torch.from_numpy(points))[:, None].expand(-1, rolls, -1, -1)
    minus, axis, plus = frame.unbind(2)  # (Z(e2), Z(n), -Z(e1)): a roll mixes the outer two
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    frame = torch.stack([cos * minus - sin * plus, axis, cos * plus + sin * minus], dim=2).flatten(0, 1)
    rows = WignerRows(lmax, kmax).double()(frame)
    orders = frame_orders(kmax, symmetry)
    evaluate = torch.zeros(len(frame), (lmax + 1) ** 2, len(orders), dtype=torch.float64)
    for slot, k in enumerate(orders):
        evaluate[:, k * k :, slot] = rows[abs(k)][:, int(k > 0)]  # the row of -|k| precedes that of +|k|
    weight = torch.from_numpy(weights).repeat_interleave(rolls) / rolls
    factor = (2 * degree_of(lmax) + 1)[:, None] * weight[:, None, None]
    return evaluate.flatten(1), (factor * evaluate).flatten(1).T.contiguous()


@lru_cache(maxsize=16)
def grid_matrices(lmax: int, kmax: int | None, symmetry: Symmetry) -> tuple[Tensor, Tensor]:
    """Evaluation and analysis matrices of the sphere (kmax None) or of SO(3), cached."""
    return s2_grid(lmax) if kmax is None else so3_grid(lmax, kmax, symmetry)


@lru_cache(maxsize=16)
def couplings(lmax: int, kmax: int | None, symmetry: Symmetry) -> Terms:
    """Non-zero coefficients that couple two fields to their product, for use without the grid; cached."""
    evaluate, analyse = grid_matrices(lmax, kmax, symmetry)
    return Terms.of(torch.einsum("kg,gi,gj->kij", analyse, evaluate, evaluate))


class Grid(ConstantModule):
    """Products of fields on a quadrature grid.

    Args:
        lmax: Highest degree of the fields.
        kmax: Highest frame order of an SO(3) grid; None for the sphere.
        symmetry: Group of the equivariance; determines the frames of an SO(3) grid.
    """

    evaluate: Tensor
    analyse: Tensor
    metric: Tensor

    def __init__(self, lmax: int, kmax: int | None, symmetry: Symmetry = "SO3"):
        super().__init__()
        self.frames = 1 if kmax is None else len(frame_orders(kmax, symmetry))
        self._register_matrices(lmax, kmax, symmetry)

    @of_constants
    def _register_matrices(self, lmax: int, kmax: int | None, symmetry: Symmetry) -> None:
        evaluate, analyse = grid_matrices(lmax, kmax, symmetry)
        self.register_constant("evaluate", evaluate)
        self.register_constant("analyse", analyse)
        self.coupling = SparseProduct(couplings(lmax, kmax, symmetry))  # without the grid: faster on a CPU
        # Different coefficients are orthogonal on the grid, so the mean of a product needs no values on the grid.
        self.register_constant("metric", (analyse[0] @ evaluate.square())[:, None])

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply two fields, (n, D K, c) each."""

        def sparse() -> Tensor:
            return self.coupling(left, right, left.shape[1])

        def dense() -> Tensor:
            values = (self.evaluate.to(left.dtype) @ left) * (self.evaluate.to(left.dtype) @ right)
            return self.analyse.to(values.dtype) @ values

        return sparse_or_dense(sparse, dense, left.shape[-1], left, right)

    def scalar_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute only the scalars of frame 0 of `product`, (n, c)."""
        return (left * right * self.metric.to(left.dtype)).sum(1)


class GridProduct(nn.Module):
    """Gated product of two fields (operation "glu"). Derived classes add learned maps before and after it."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Project the channels of both factors, (..., K, c) to (..., K, c').

        Being linear, the projection may be applied to the weights of the layer that makes the factors instead. This
        is cheaper beyond a few tens of nodes.
        """
        return left, right

    def combine(self, values: Tensor, scalars: Tensor) -> Tensor:
        """Combine products (n, D K, c') with weights that depend on the scalars (n, 2 c)."""
        return values

    def mix(self, x: Tensor) -> Tensor:
        """Map the channels of the product, (..., c') to (..., c)."""
        return x

    def forward(
        self, left: Tensor, right: Tensor, scalars: Tensor, gate: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """Multiply two fields, gate the product, and add silu(first) * second to the scalars of frame 0.

        Args:
            left: Projected field, (n, D, K c').
            right: Projected field, (n, D, K c').
            scalars: Scalars of both fields before the projection, (n, 2 c).
            gate: Factor of all coefficients, (n, c).
            first: Scalars of the left field, (n, c).
            second: Scalars of the right field, (n, c).

        Returns:
            (n, D, K c).
        """
        product = self.combine(self.grid.product(self._fields(left), self._fields(right)), scalars)
        y = (self.mix(product) * gate[:, None]).unflatten(1, (-1, self.grid.frames)).flatten(2)
        direct = functional.silu(first) * second
        return y + append_zeros(direct[:, None], y.shape[1] - 1, y.shape[2] - direct.shape[1])

    def scalar(
        self, left: Tensor, right: Tensor, scalars: Tensor, gate: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """Compute only the scalars of frame 0 of `forward`, (n, c). Scalars of other frames are zero."""
        product = self.grid.scalar_product(self._fields(left), self._fields(right))
        y = self.mix(self.combine(product[:, None], scalars)[:, 0])
        return y * gate + functional.silu(first) * second

    def _fields(self, x: Tensor) -> Tensor:
        """Move the frames from the channels to the rows: (n, D, K c') to (n, D K, c')."""
        return x.unflatten(-1, (self.grid.frames, -1)).flatten(1, 2)


class GridMLP(GridProduct):
    """Operation "mlp": product of two projected fields, mapped back.

    With ``joint`` each factor is a projection of both fields.
    """

    def __init__(self, grid: Grid, width: int, joint: bool):
        super().__init__(grid)
        self.joint = joint
        self.left = ChannelLinear(2 * width if joint else width, 2 * width)
        self.right = ChannelLinear(2 * width if joint else width, 2 * width)
        self.out = ChannelLinear(2 * width, width)

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Project both factors to 2 c channels, see `GridProduct.project`."""
        if self.joint:
            left = right = torch.cat([left, right], dim=-1)
        return self.left(left), self.right(right)

    def mix(self, x: Tensor) -> Tensor:
        """Map 2 c channels back to c, see `GridProduct.mix`."""
        return self.out(x)


class GridBranches(GridProduct):
    """Operation of n branches: products of n pairs of projected fields, mixed by a softmax of the scalars."""

    def __init__(self, grid: Grid, width: int, branches: int):
        super().__init__(grid)
        self.branches = branches
        self.left = ChannelLinear(width, branches * width)
        self.right = ChannelLinear(width, branches * width)
        self.out = ChannelLinear(width, width)
        self.router = ChannelLinear(2 * width, branches)

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Project both factors to one c-channel field per branch, see `GridProduct.project`."""
        return self.left(left), self.right(right)

    def combine(self, values: Tensor, scalars: Tensor) -> Tensor:
        """Mix the branches, see `GridProduct.combine`."""
        if self.branches == 1:  # the softmax of one logit is one
            return values
        share = self.router(scalars).softmax(-1)
        return (values.unflatten(-1, (self.branches, -1)) * share[:, None, :, None]).sum(2)

    def mix(self, x: Tensor) -> Tensor:
        """Map the channels of the mixed branches, see `GridProduct.mix`."""
        return self.out(x)


def grid_operation(operation: GridOperation, grid: Grid, width: int, joint: bool) -> GridProduct:
    """Build the operation named by a configuration; ``joint`` is for an MLP on the halves of one input."""
    if operation == "glu":
        return GridProduct(grid)
    if operation == "mlp":
        return GridMLP(grid, width, joint)
    return GridBranches(grid, width, int(operation))


class GridActivation(nn.Module):
    """Non-linearity of a feed-forward network: product of both halves of the output of a linear layer."""

    def __init__(
        self,
        lmax: int,
        kmax: int | None,
        width: int,
        operation: GridOperation,
        bias: bool,
        symmetry: Symmetry = "SO3",
    ):
        super().__init__()
        grid = Grid(lmax, kmax, symmetry)
        self.frames = grid.frames
        self.operation = grid_operation(operation, grid, width, joint=True)
        self.scalar_gate = FocusLinear(2 * width, width, bias=bias, std=0.01)

    def forward(self, x: Tensor, linear: DegreeLinear) -> Tensor:
        """Multiply the halves of linear(x): (n, D, C) to (n, D, K c)."""
        factors = self._factors(x, linear)
        return self.operation(*factors, *self._scalar_path(factors[-1]))

    def scalars(self, x: Tensor, linear: DegreeLinear) -> Tensor:
        """Compute only the scalars of frame 0 of `forward`, (n, c). Scalars of other frames are zero."""
        factors = self._factors(x, linear)
        return self.operation.scalar(*factors, *self._scalar_path(factors[-1]))

    def _factors(self, x: Tensor, linear: DegreeLinear) -> tuple[Tensor, Tensor, Tensor]:
        """Projected fields and scalars of linear(x), with the projections applied to the weights of the layer."""

        def halves(of_layer: Tensor) -> list[Tensor]:
            left, right = of_layer.unflatten(-1, (2, self.frames, -1)).unbind(-3)
            return [p.flatten(-2) for p in self.operation.project(left, right)]

        def scalars(of_layer: Tensor) -> Tensor:
            """Select the scalars of frame 0 of both halves."""
            return of_layer.unflatten(-1, (2, self.frames, -1))[..., 0, :].flatten(-2)

        biases = [None, None] if linear.bias is None else halves(linear.bias)
        left, right = (linear.map(x, w, b) for w, b in zip(halves(linear.weight), biases, strict=True))
        first = x[:, 0] @ scalars(linear.weight[0])
        return left, right, first if linear.bias is None else first + scalars(linear.bias)

    def _scalar_path(self, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate of the product, and the scalars of both halves."""
        gate = self.scalar_gate(scalars[:, None])[:, 0].sigmoid()
        return gate, *scalars.chunk(2, dim=-1)


class MessageNodeProduct(nn.Module):
    """Product of the aggregated message with its own node on the SO(3) grid."""

    def __init__(self, config: ModelConfig, lmax: int):
        super().__init__()
        width, self.n_focus = config.focus_width, config.n_focus
        grid = Grid(lmax, min(config.kmax, lmax), config.symmetry)
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
        """Add the product of message and node to the message, (N, D, F c) each."""
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
        """Move the focus streams to the first axis: (N, D, F c) to (N F, D, c)."""
        return x.unflatten(-1, (self.n_focus, -1)).transpose(1, 2).flatten(0, 1)


class NoProduct(nn.Module):
    """Replacement for `MessageNodeProduct` for models without it."""

    def forward(self, message: Tensor, node: Tensor) -> Tensor:
        """Return the message unchanged."""
        return message
