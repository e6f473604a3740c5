"""Functions of the edge length: cutoff envelope, radial basis, radial network.

See docs/theory.md, "Radial features".
"""

from math import comb, pi
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpa4.model.config import ModelConfig
from dpa4.model.layers import Linear, RMSNorm
from dpa4.ops.segments import pick
from dpa4.ops.split_matmul import precise_matmul


def envelope(length: Tensor, cutoff: float, exponent: int) -> Tensor:
    r"""Evaluate the cutoff envelope :math:`u^4 \sum_{k<p} \binom{k+3}{3} x^k` with x = r/rc and u = 1 - x.

    The envelope is one at r = 0 and zero beyond the cutoff, where its value and three derivatives vanish.

    Args:
        length: r, any shape, in Angstrom.
        cutoff: rc, in Angstrom.
        exponent: p >= 1; the higher, the longer the envelope stays near one.
    """
    u = ((cutoff - length) / cutoff).clamp(0, 1)
    x = 1 - u
    series = torch.full_like(x, float(comb(exponent + 2, 3)))
    for k in range(exponent - 2, -1, -1):
        series = series * x + comb(k + 3, 3)
    return u**4 * series


class RadialBasis(nn.Module):
    """Functions of the edge length, times the cutoff envelope unless ``exponent`` is None.

    Args:
        frequencies: Frequencies or centres at the start of training, (n_radial,).
        cutoff: Cutoff of the envelope, in Angstrom.
        exponent: Exponent of the envelope; None: no envelope.
        trained: Train the frequencies or centres.
    """

    def __init__(self, frequencies: Tensor, cutoff: float, exponent: int | None, trained: bool):
        super().__init__()
        # Both bases have the same parameter name, and a basis that is not trained is in the checkpoint as well.
        self.frequencies = nn.Parameter(frequencies, requires_grad=trained)
        self.cutoff, self.exponent = cutoff, exponent

    def forward(self, length: Tensor) -> Tensor:
        """Evaluate the basis at lengths (E,) in Angstrom: (E, n_radial)."""
        r = length[:, None]
        functions = self.functions(r)
        return functions if self.exponent is None else functions * envelope(r, self.cutoff, self.exponent)

    def functions(self, r: Tensor) -> Tensor:
        """Evaluate the functions without the envelope at lengths (E, 1): (E, n_radial)."""
        raise NotImplementedError


class BesselBasis(RadialBasis):
    """Bessel basis sin(w_n r) / r; the frequencies w_n start at n pi / rc."""

    def __init__(self, n_radial: int, cutoff: float, exponent: int | None, trained: bool = True):
        frequencies = pi / cutoff * torch.arange(1, n_radial + 1, dtype=torch.get_default_dtype())
        super().__init__(frequencies, cutoff, exponent, trained)

    def functions(self, r: Tensor) -> Tensor:
        """Evaluate the functions without the envelope at lengths (E, 1): (E, n_radial)."""
        return torch.sin(self.frequencies * r) / r


class GaussianBasis(RadialBasis):
    """Gaussian basis of fixed width; the centres start evenly spaced on [0, rc]."""

    def __init__(self, n_radial: int, cutoff: float, exponent: int | None, trained: bool = True):
        super().__init__(torch.linspace(0, cutoff, n_radial), cutoff, exponent, trained)
        self.width = cutoff / max(n_radial - 1, 1)

    def functions(self, r: Tensor) -> Tensor:
        """Evaluate the functions without the envelope at lengths (E, 1): (E, n_radial)."""
        return torch.exp(-0.5 * ((r - self.frequencies) / self.width).square())


def radial_basis(config: ModelConfig) -> RadialBasis:
    """Build the radial basis of a configuration."""
    family, _, suffix = config.basis.partition("/")
    basis = BesselBasis if family == "bessel" else GaussianBasis
    return basis(config.n_radial, config.cutoff, config.env_exp.basis, trained=suffix != "fix")


class RadialFeatures(NamedTuple):
    """Radial features of every degree, R[e, l, c] = hidden[e] @ last[:, l, c] + pair[e, c], never written out.

    All readers of R are linear in it. They multiply their weight with ``last`` once per step and apply the small
    product to the edges (docs/adr/0003).
    """

    hidden: Tensor  # (E, W) last hidden layer times the envelope
    pair: Tensor  # (E, C) sum of the two element embeddings, without an envelope
    last: Tensor  # (W, L, C) weight of the last radial layer

    def project(self, weight: Tensor) -> Tensor:
        """Contract degrees and channels of R with a weight (L', C, K), L' <= L, to (E, K)."""
        merged = torch.einsum("wlc,lck->wk", self.last[:, : len(weight)], weight)
        return precise_matmul(torch.cat([self.hidden, self.pair], -1), torch.cat([merged, weight.sum(0)]))

    def of_degrees(self, weight: Tensor, degrees: Tensor) -> Tensor:
        """Map the channels of R at the given degrees (n,) with a weight (C, K) to (E, n, K)."""
        merged = torch.einsum("wlc,ck->wlk", pick(self.last, 1, degrees), weight)
        by_degree = (self.hidden @ merged.flatten(1)).unflatten(1, (len(degrees), -1))
        return by_degree + (self.pair @ weight)[:, None]


class RadialNetwork(nn.Module):
    """Dense layers from the radial basis to (lmax + 1) * channels features, with the last layer kept separate.

    With ``weighted`` the features are multiplied by the edge weight; checkpoints of format below 1.1 have it off.
    """

    def __init__(
        self, n_radial: int, hidden: list[int], num_degrees: int, channels: int, *, norm: bool, weighted: bool
    ):
        super().__init__()
        widths = [n_radial, *hidden]
        self.hidden = nn.ModuleList(Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(RMSNorm(w) if norm else nn.Identity() for w in hidden)
        self.last = Linear(widths[-1], num_degrees * channels)
        self.num_degrees, self.weighted = num_degrees, weighted

    def forward(self, basis: Tensor, weight: Tensor, pair: Tensor) -> RadialFeatures:
        """Compute the features from the basis (E, n_radial), the edge weight (E,) and the pair feature (E, C)."""
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            basis = functional.silu(norm(layer(basis)))
        if self.weighted:
            basis = basis * weight[:, None]
        return RadialFeatures(basis, pair, self.last_of_degrees())

    def last_of_degrees(self) -> Tensor:
        """Return the weight of the last layer, (W, L, C)."""
        return self.last.weight.unflatten(1, (self.num_degrees, -1))
