r"""Gates between the layers of an SO(2) stack, and the derivatives that training needs.

Edge features are rows of the edge frame, each of one degree l and C channels. The first row holds the scalars s. With
the gates :math:`\sigma_l = \mathrm{sigmoid}(z_l)`, where :math:`z_0 = s` and :math:`z_l = s G_l`,

.. math:: y_r = x_r + u_r \sigma_{l(r)}

(model-2 section 4.1; for scalars that is SiLU). The functions below are that and what follows of it:
given the gradient a of y, that of u is

.. math:: (a D)_r = a_r \sigma_{l(r)} + \delta_{r0} \Big(p_0 + \sum_l p_l G_l^T\Big), \qquad
          p_l = \sigma'_l \sum_{r \in l} a_r u_r

Every function takes and makes tensors (F, E, W) with rows one after another in the last axis (`Rows`), and takes
weights of the gates (F, C, lmax C). Each has a Triton kernel for a GPU that reads
and writes every edge tensor once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of the edge frame: order 0, then -m and +m for m = 1..mmax, each with degrees m..lmax."""

    lmax: int
    mmax: int

    @property
    def total(self) -> int:
        """M."""
        return sum(count for _, count in self.orders())

    def orders(self) -> list[tuple[int, int]]:
        """First row and number of rows of every order |m|."""
        sizes = [self.lmax + 1] + [2 * (self.lmax - m + 1) for m in range(1, self.mmax + 1)]
        return [(sum(sizes[:m]), size) for m, size in enumerate(sizes)]

    def runs(self, width: int) -> list[tuple[slice, slice]]:
        """Columns of every signed order of an edge tensor of this width, and those of its degrees among the gates."""
        c, gates = width // self.total, slice(0, (self.lmax + 1) * width // self.total)
        found = [(gates, gates)]
        for m, (first, count) in enumerate(self.orders()[1:], start=1):
            for half in (first, first + count // 2):
                found.append((slice(half * c, (half + count // 2) * c), slice(m * c, gates.stop)))
        return found


def value(x: Tensor, u: Tensor, gates: Tensor, rows: Rows) -> Tensor:
    """y."""
    if (kernels := _kernels(u)) is not None:
        return kernels.value(x, u, gates, rows)
    sigma = _logits(u, gates).sigmoid_()
    y = torch.empty_like(u)
    for run, of in rows.runs(u.shape[-1]):
        torch.addcmul(x[..., run], u[..., run], sigma[..., of], out=y[..., run])
    return y


def vjp(a: Tensor, u: Tensor, gates: Tensor, rows: Rows, sums: bool) -> tuple[Tensor, Tensor | None]:
    """a D, and, if wanted, the sums p but that of the scalars, (F, E, lmax C): the gradient of G is s^T p."""
    if (kernels := _kernels(u)) is not None:
        return kernels.vjp(a, u, gates, rows, sums)
    sigma = _logits(u, gates).sigmoid_()
    p = _contract(a, u, rows).mul_(_slope(sigma))
    du, p = _weighted(a, sigma, p, gates, rows)
    return du, p if sums else None


def tangent(d: Tensor, v: Tensor, u: Tensor, gates: Tensor, rows: Rows) -> Tensor:
    """Change of y where x changes by d and u by v."""
    if (kernels := _kernels(u)) is not None:
        return kernels.tangent(d, v, u, gates, rows)
    sigma = _logits(u, gates).sigmoid_()
    change = _logits(v, gates).mul_(_slope(sigma))
    y = torch.empty_like(u)
    for run, of in rows.runs(u.shape[-1]):
        torch.addcmul(d[..., run], v[..., run], sigma[..., of], out=y[..., run])
        y[..., run].addcmul_(u[..., run], change[..., of])
    return y


def joint(
    b: Tensor, v: Tensor, a: Tensor, u: Tensor, gates: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of <v, a D> + <b, y>, and a D once more.

    Returns:
        The derivative with respect to u; a D; q and p, (F, E, lmax C), of which that with respect to G is
        s^T q + v_0^T p.
    """
    if _on_gpu(u):
        from dpa4.kernels import triton_gate

        return triton_gate.joint(b, v, a, u, gates, rows)
    c = u.shape[-1] // rows.total
    sigma = _logits(u, gates).sigmoid_()
    zeta, slope = _logits(v, gates), _slope(sigma)
    contracted = _contract(a, u, rows)
    q = _contract(b, u, rows).add_(_contract(v, a, rows))
    q.addcmul_(zeta * contracted, 1 - 2 * sigma).mul_(slope)
    p = contracted.mul_(slope)
    da, _ = _weighted(a, sigma, p, gates, rows)
    du, _ = _weighted(b, sigma, q, gates, rows)
    change = zeta.mul_(slope)
    for run, of in rows.runs(u.shape[-1]):
        du[..., run].addcmul_(a[..., run], change[..., of])
    return du, da, q[..., c:], p[..., c:]


def undo(
    x: Tensor, d: Tensor | None, v: Tensor | None, u: Tensor, gates: Tensor, rows: Rows, overwrite: bool
) -> tuple[Tensor, Tensor | None]:
    """What became x by `value` and d by `tangent`, to rounding; d and v may be missing.

    ``overwrite``: the results may take the places of x and d.
    """
    if _on_gpu(u):
        from dpa4.kernels import triton_gate

        return triton_gate.undo(x, d, v, u, gates, rows, overwrite)
    x = x - value(torch.zeros_like(x), u, gates, rows)
    if d is None or v is None:
        return x, None
    return x, d - tangent(torch.zeros_like(d), v, u, gates, rows)


def _on_gpu(u: Tensor) -> bool:
    """Whether the Triton kernels take over; tensor cores have no float64 of use here."""
    return u.is_cuda and u.dtype != torch.float64


def _kernels(u: Tensor) -> Any:
    """Module of the kernels that take over, if any; a machine without a GPU may have no Triton to import."""
    if not _on_gpu(u):
        return None
    from dpa4.kernels import triton_gate

    return triton_gate


def _logits(u: Tensor, gates: Tensor) -> Tensor:
    """z, (F, E, (lmax + 1) C)."""
    s = u[..., : gates.shape[1]]
    z = u.new_empty((*u.shape[:-1], gates.shape[1] + gates.shape[2]))
    z[..., : gates.shape[1]] = s
    torch.bmm(s, gates, out=z[..., gates.shape[1] :])
    return z


def _slope(sigma: Tensor) -> Tensor:
    """Derivative of the sigmoid by its argument, from its value."""
    return torch.addcmul(sigma, sigma, sigma, value=-1)


def _contract(a: Tensor, u: Tensor, rows: Rows) -> Tensor:
    """Products of the rows of each degree, summed, (F, E, (lmax + 1) C)."""
    (first, _), *others = rows.runs(u.shape[-1])
    total = a[..., first] * u[..., first]
    for run, of in others:
        total[..., of].addcmul_(a[..., run], u[..., run])
    return total


def _weighted(a: Tensor, sigma: Tensor, p: Tensor, gates: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows of a times their gates, plus what comes back through the scalars from p; and p of the degrees >= 1."""
    c = gates.shape[1]
    du = torch.empty_like(a)
    for run, of in rows.runs(a.shape[-1]):
        torch.mul(a[..., run], sigma[..., of], out=du[..., run])
    du[..., :c] += torch.baddbmm(p[..., :c], p[..., c:], gates.mT)
    return du, p[..., c:]
