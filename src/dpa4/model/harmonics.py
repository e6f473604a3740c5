"""Real spherical harmonics of the model's basis, and the rows of Wigner matrices that an edge needs.

Basis (docs/theory.md, "Graph and edge frames"): Racah-normalised Z_l(v) with |Z_l| = 1 and Z_1(x, y, z) =
(y, z, -x); polar axis z, orders m = -l..l ascending. A rotation acts as Z_l(R v) = D^l(R) Z_l(v).

One constant tensor per degree is enough: the coupling of degrees l - 1 and 1 to l. With an edge frame
R = (e1, e2, n), rows m = 0 and m = +-1 of D^l(R) are this coupling applied to Z_{l-1}(n) and one vector of the frame.
Higher orders follow by recursion. Any choice of e1 and e2 gives the same network output (docs/adr/0002).
"""

from functools import lru_cache
from typing import cast

import numpy as np
import scipy.special
import torch
from torch import Tensor, nn

from dpa4.model.constants import ConstantModule, SparseProduct, of_constants
from dpa4.ops.sparse_product import Terms, sparse_or_dense

HarmonicRows = tuple[Tensor, ...]
"""Wigner rows by order. rows[m] holds rows -m and +m of D^m, D^{m+1}, ..., D^lmax side by side, of shape
(E, 2, (lmax+1)^2 - m^2). rows[0] holds the single row 0, of shape (E, 1, (lmax+1)^2)."""


def spherical_harmonics(l: int, directions: np.ndarray) -> np.ndarray:
    """Evaluate Z_l by its definition, in float64; the reference for everything else in this file.

    Args:
        l: Degree.
        directions: Unit vectors, (..., 3).

    Returns:
        (..., 2l+1).
    """
    theta = np.arccos(np.clip(directions[..., 2], -1, 1))
    phi = np.arctan2(directions[..., 1], directions[..., 0])
    y = [scipy.special.sph_harm_y(l, m, theta, phi) for m in range(l + 1)]
    negative = [-np.sqrt(2) * y[m].imag for m in range(l, 0, -1)]
    positive = [np.sqrt(2) * y[m].real for m in range(1, l + 1)]
    return np.sqrt(4 * np.pi / (2 * l + 1)) * np.stack([*negative, y[0].real, *positive], axis=-1)


@lru_cache(maxsize=32)
def coupling(l: int) -> Tensor:
    """Constant T_l with Z_l(n) = T_l (Z_{l-1}(n) x Z_1(n)), float64, shape (3 (2l-1), 2l+1).

    T_l commutes with rotations, so it also couples Z_{l-1}(n) to any other vector. T_l is the least-squares solution
    of smallest norm on points of the sphere; the smallest norm excludes degrees l - 1 and l - 2 of the product.
    """
    k = np.arange(16 * (2 * l + 1)) + 0.5
    z, angle = 1 - 2 * k / len(k), np.pi * (1 + 5**0.5) * k
    points = np.stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z], axis=-1)
    lower, vector = spherical_harmonics(l - 1, points), spherical_harmonics(1, points)
    product = (lower[:, :, None] * vector[:, None, :]).reshape(len(k), -1)
    solution = np.linalg.lstsq(product, spherical_harmonics(l, points), rcond=1e-10)[0]
    solution[np.abs(solution) < 1e-13] = 0.0
    return torch.from_numpy(solution)


def edge_frame(direction: Tensor) -> Tensor:
    """Build right-handed frames around unit vectors n (Duff et al. 2017), smooth except where n_z changes sign.

    Args:
        direction: Unit vectors, (E, 3).

    Returns:
        Rows (Z_1(e2), Z_1(n), -Z_1(e1)), which form D^1 of the rotation that takes n to z, (E, 3, 3).
    """
    x, y, z = direction.unbind(-1)
    sign = torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
    a = -1 / (sign + z)
    b = x * y * a
    one, two = (1 + sign * x * x * a, sign * b, -sign * x), (b, sign + y * y * a, -y)
    rows = [two[1], two[2], -two[0], y, z, -x, -one[1], -one[2], one[0]]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def _several(coupling: Tensor, count: int) -> Tensor:
    """Coefficients (t (2l+1), 2l-1, t 3) that couple one factor with each of t vectors, from `coupling`."""
    one = coupling.unflatten(0, (-1, 3)).permute(2, 0, 1)
    return torch.einsum("kij,tu->tkiuj", one, torch.eye(count, dtype=one.dtype)).flatten(3).flatten(0, 1)


class WignerRows(ConstantModule):
    """Rows |m| <= mmax of the Wigner matrices up to degree lmax, computed from an edge frame."""

    def __init__(self, lmax: int, mmax: int):
        super().__init__()
        self.lmax, self.mmax = lmax, mmax
        self._register_couplings()

    @of_constants
    def _register_couplings(self) -> None:
        products = {}
        for l in range(2, self.lmax + 1):
            self.register_constant(f"coupling_{l}", coupling(l))
            for count in (1, 2):
                products[f"{l} {count}"] = SparseProduct(Terms.of(_several(coupling(l), count)))
        self.products = nn.ModuleDict(products)  # the same couplings as sparse products: faster on a CPU

    def _couple(self, lower: Tensor, vectors: Tensor, l: int) -> Tensor:
        """Couple a row (E, 1, 2l-1) of degree l - 1 with one or two vectors (E, t, 3) to degree l, (E, t, 2l+1)."""
        count = vectors.shape[1]
        product = cast(SparseProduct, self.products[f"{l} {count}"])
        one, other = lower.flatten(1)[..., None], vectors.flatten(1)[..., None]

        def sparse() -> Tensor:
            entries = product(one, other, count * (2 * l + 1))
            return entries.unflatten(1, (count, -1))[..., 0]

        def dense() -> Tensor:
            products = (lower.unsqueeze(-1) * vectors.unsqueeze(-2)).flatten(-2)
            return products @ getattr(self, f"coupling_{l}")

        return sparse_or_dense(sparse, dense, 1, one, other)

    def forward(self, frame: Tensor) -> HarmonicRows:
        """Compute the Wigner rows of edge frames (E, 3, 3) as returned by `edge_frame`."""
        minus, axis, plus = frame[:, 0:1], frame[:, 1:2], frame[:, 2:3]
        pair = frame[:, 0::2]
        rows = [[frame.new_ones(frame.shape[0], 1, 1), axis][: self.lmax + 1]]  # [order][degree - order]
        for l in range(2, self.lmax + 1):
            rows[0].append(self._couple(rows[0][l - 1], axis, l))
        for m in range(1, self.mmax + 1):
            current = []
            for l in range(m, self.lmax + 1):
                if l == 1:
                    current.append(pair)
                    continue
                lower = rows[m - 1][l - m]
                # Ratio of two Clebsch-Gordan coefficients.
                norm = (2 * l * l / ((l + m - 1) * (l + m))) ** 0.5
                if m == 1:
                    current.append(norm * self._couple(lower, pair, l))
                else:  # product (P - iM)(P1 - iM1) of rows +m, -m: real part is +m, minus the imaginary part is -m
                    low_minus, low_plus = lower[:, 0:1], lower[:, 1:2]
                    up = self._couple(low_plus, plus, l) - self._couple(low_minus, minus, l)
                    down = self._couple(low_plus, minus, l) + self._couple(low_minus, plus, l)
                    current.append(norm / 2**0.5 * torch.cat([down, up], dim=1))
            rows.append(current)
        return tuple(torch.cat(degrees, dim=-1) for degrees in rows)
