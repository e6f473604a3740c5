"""Linear maps and norms of scalars (n, C), coefficients (n, D, C) and focus streams (n, F, c).

Packed coefficients run over degrees l = 0..lmax and orders m = -l..l; their index is l^2 + l + m. See docs/theory.md,
"Normalisation".
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.constants import ConstantModule
from dpa4.ops.segments import pick
from dpa4.ops.split_matmul import precise_matmul


def degree_of(lmax: int) -> Tensor:
    """Degree of each packed coefficient, (D,) int64."""
    l = torch.arange(lmax + 1)
    return l.repeat_interleave(2 * l + 1, output_size=(lmax + 1) ** 2)


def balance_of(lmax: int, channels: int) -> Tensor:
    """Weight of each packed coefficient in a mean square where every degree counts equally, (D,) float64."""
    return 1 / ((2 * degree_of(lmax).double() + 1) * (lmax + 1) * channels)


def prepend_zeros(x: Tensor, count: int) -> Tensor:
    """Prepend ``count`` zeros along the last axis. ``functional.pad`` would freeze symbolic sizes."""
    return torch.cat([x.new_zeros((*x.shape[:-1], count)), x], dim=-1) if count else x


def append_zeros(x: Tensor, rows: int, columns: int) -> Tensor:
    """Append zeros to the last two axes: ``rows`` to the second last and ``columns`` to the last."""
    x = torch.cat([x, x.new_zeros((*x.shape[:-1], columns))], dim=-1) if columns else x
    return torch.cat([x, x.new_zeros((*x.shape[:-2], rows, x.shape[-1]))], dim=-2) if rows else x


def truncated_normal(shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
    """Draw from a normal distribution of standard deviation 1/sqrt(fan_in + fan_out), truncated at three of them."""
    std = (fan_in + fan_out) ** -0.5
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-3 * std, b=3 * std)


class Linear(nn.Module):
    """Dense layer y = x W + b of the scalar networks, with weight (in, out)."""

    def __init__(self, width_in: int, width_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_in, width_out) * (width_in + width_out) ** -0.5)
        self.bias = nn.Parameter(torch.randn(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class ChannelLinear(nn.Module):
    """Linear map of the last axis, shared by all coefficients and frames, without bias. Weight (in, out)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(width_in, width_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return x @ self.weight


class FocusLinear(nn.Module):
    """Linear map of scalars with one matrix per focus stream. Weight (in, F out)."""

    def __init__(
        self, width_in: int, width_out: int, n_focus: int = 1, bias: bool = False, std: float | None = None
    ):
        super().__init__()
        self.n_focus = n_focus
        weight = torch.empty(width_in, n_focus * width_out)
        bound = width_in**-0.5
        self.weight = nn.Parameter(weight.uniform_(-bound, bound) if std is None else weight.normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(n_focus * width_out)) if bias else None

    def per_focus(self) -> Tensor:
        """Return the weight with the focus axis first, (F, in, out)."""
        return self.weight.unflatten(1, (self.n_focus, -1)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, F, in) to (n, F, out)."""
        y = precise_matmul(x.transpose(0, 1), self.per_focus()).transpose(0, 1)
        return y if self.bias is None else y + self.bias.view(self.n_focus, -1)


class DegreeLinear(nn.Module):
    """SO(3)-equivariant mixing of channels, one matrix per degree. Weight (lmax+1, in, out); bias for l = 0 only."""

    degree: Tensor

    def __init__(self, lmax: int, width_in: int, width_out: int, bias: bool = False, zero: bool = False):
        super().__init__()
        weight = truncated_normal((lmax + 1, width_in, width_out), width_in, width_out)
        self.weight = nn.Parameter(torch.zeros(weight.shape) if zero else weight)
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None
        self.register_buffer("degree", degree_of(lmax), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, D, in) to (n, D, out)."""
        return self.map(x, self.weight, self.bias)

    def map(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (n, D, in) to (n, D, out) with the given weight (lmax+1, in, out) and bias (out)."""
        y = torch.bmm(x.transpose(0, 1), pick(weight, 0, self.degree)).transpose(0, 1)
        return y if bias is None else y + functional.pad(bias[None], (0, 0, 0, len(self.degree) - 1))


class RMSNorm(nn.Module):
    """Root-mean-square norm of scalars over channels, with a learned scale."""

    EPSILON = 1e-7

    def __init__(self, *shape: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, *shape) in the precision of the scale."""
        x = x.to(self.scale.dtype)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.EPSILON) * self.scale


class EquivariantRMSNorm(ConstantModule):
    """Root-mean-square norm of packed coefficients in which every degree counts equally.

    Scalars are first centred over channels. One factor per node multiplies all coefficients, so the norm commutes
    with rotations. Scales are per degree and channel; the bias acts on scalars only.
    """

    degree: Tensor
    balance: Tensor
    scalar: Tensor

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
        degree = degree_of(lmax)
        self.register_buffer("degree", degree, persistent=False)
        self.register_constant("balance", balance_of(lmax, channels)[:, None])
        self.register_constant("scalar", (degree == 0).double()[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, D, C) in the precision of the scale."""
        x = x.to(self.scale.dtype)
        x = x - self.scalar * x[:, :1].mean(-1, keepdim=True)
        variance = (x.square() * self.balance).sum((1, 2), keepdim=True)
        scale = pick(self.scale, 0, self.degree)
        return x * torch.rsqrt(variance + self.eps) * scale + self.scalar * self.bias
