r"""Gates between the layers of an SO(2) stack, and the derivatives that training needs.

Edge features are rows of the edge frame; row r has one degree l(r) and C channels. The first row of u holds the
scalars s. With the gates :math:`\sigma_l = \mathrm{sigmoid}(z_l)`, where :math:`z_0 = s` and :math:`z_l = s G_l`,

.. math:: y_r = x_r + u_r \sigma_{l(r)}

(docs/theory.md, "SO(2) layers"; for scalars the product is SiLU). The functions below compute y and its derivatives.
For a gradient a of y, the gradient of u is

.. math:: (a D)_r = a_r \sigma_{l(r)} + \delta_{r0} \Big(p_0 + \sum_l p_l G_l^T\Big), \qquad
          p_l = \sigma'_l \sum_{r \in l} a_r u_r

Edge tensors have the shape (F, E, W), with the rows one after another in the last axis (`EdgeLayout`); the weights of
the gates, G, have the shape (F, C, lmax C). On a GPU each function is a Triton kernel that reads and writes every
edge tensor once. Names follow the formula: x, u, y and a as above, d and v are changes of x and u, b is another
gradient of y, zeta is the change of z, p and q are sums over the rows of a degree.
"""

from typing import Any

import torch
from torch import Tensor

from dpa4.ops import available
from dpa4.ops.layout import EdgeLayout


def value(x: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout) -> Tensor:
    """Compute y = x + u sigma(u), (F, E, W)."""
    if (kernels := _kernels(u, gates)) is not None:
        return kernels.value(x, u, gates, layout)
    sigma = _logits(u, gates).sigmoid_()
    y = torch.empty_like(u)
    for run, of in layout.runs(u.shape[-1]):
        torch.addcmul(x[..., run], u[..., run], sigma[..., of], out=y[..., run])
    return y


def vjp(a: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout, sums: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient a D of u from the gradient a of y.

    Args:
        a: Gradient of y, (F, E, W).
        u: Products of the layer, (F, E, W).
        gates: Weights G, (F, C, lmax C).
        layout: Rows of the edge frame.
        sums: Whether p is returned.

    Returns:
        a D, (F, E, W), and p of the degrees above zero, (F, E, lmax C), or None. The gradient of G is s^T p.
    """
    if (kernels := _kernels(u, gates)) is not None:
        return kernels.vjp(a, u, gates, layout, sums)
    sigma = _logits(u, gates).sigmoid_()
    p = _contract(a, u, layout).mul_(_slope(sigma))
    du, p = _weighted(a, sigma, p, gates, layout)
    return du, p if sums else None


def tangent(d: Tensor, v: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout) -> Tensor:
    """Compute the change of y if x changes by d and u by v, to first order; all of them (F, E, W)."""
    if (kernels := _kernels(u, gates)) is not None:
        return kernels.tangent(d, v, u, gates, layout)
    sigma = _logits(u, gates).sigmoid_()
    change = _logits(v, gates).mul_(_slope(sigma))
    y = torch.empty_like(u)
    for run, of in layout.runs(u.shape[-1]):
        torch.addcmul(d[..., run], v[..., run], sigma[..., of], out=y[..., run])
        y[..., run].addcmul_(u[..., run], change[..., of])
    return y


def joint(
    b: Tensor, v: Tensor, a: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate <v, a D> + <b, y> with respect to u and G, and compute a D again; all tensors as above.

    Returns:
        The derivative with respect to u, (F, E, W); a D, (F, E, W); q and p, (F, E, lmax C). The derivative with
        respect to G is s^T q + v_0^T p, with v_0 the first row of v.
    """
    if (kernels := _kernels(u, gates)) is not None:
        return kernels.joint(b, v, a, u, gates, layout)
    c = u.shape[-1] // layout.total
    sigma = _logits(u, gates).sigmoid_()
    zeta, slope = _logits(v, gates), _slope(sigma)
    contracted = _contract(a, u, layout)
    q = _contract(b, u, layout).add_(_contract(v, a, layout))
    q.addcmul_(zeta * contracted, 1 - 2 * sigma).mul_(slope)
    p = contracted.mul_(slope)
    da, _ = _weighted(a, sigma, p, gates, layout)
    du, _ = _weighted(b, sigma, q, gates, layout)
    change = zeta.mul_(slope)
    for run, of in layout.runs(u.shape[-1]):
        du[..., run].addcmul_(a[..., run], change[..., of])
    return du, da, q[..., c:], p[..., c:]


def undo(
    x: Tensor,
    d: Tensor | None,
    v: Tensor | None,
    u: Tensor,
    gates: Tensor,
    layout: EdgeLayout,
    overwrite: bool,
) -> tuple[Tensor, Tensor | None]:
    """Invert `value` and `tangent`: recover their inputs x and d up to rounding. d and v may be None.

    If ``overwrite`` is true, the results may be written to the memory of x and d.
    """
    if (kernels := _kernels(u, gates)) is not None:
        return kernels.undo(x, d, v, u, gates, layout, overwrite)
    x = x - value(torch.zeros_like(x), u, gates, layout)
    if d is None or v is None:
        return x, None
    return x, d - tangent(torch.zeros_like(d), v, u, gates, layout)


def _kernels(u: Tensor, gates: Tensor) -> Any:
    """Module of the Triton kernels if they support u and the number of channels, else None."""
    if not available.triton_gate(u, gates.shape[1]):
        return None
    # Imported here, since a machine without a GPU may have no Triton.
    from dpa4.ops.triton import gate

    return gate


def _logits(u: Tensor, gates: Tensor) -> Tensor:
    """Arguments z of the gates, (F, E, (lmax + 1) C): the scalars s, then s G."""
    s = u[..., : gates.shape[1]]
    z = u.new_empty((*u.shape[:-1], gates.shape[1] + gates.shape[2]))
    z[..., : gates.shape[1]] = s
    torch.bmm(s, gates, out=z[..., gates.shape[1] :])
    return z


def _slope(sigma: Tensor) -> Tensor:
    """Derivative of the sigmoid, from its value: sigma - sigma^2."""
    return torch.addcmul(sigma, sigma, sigma, value=-1)


def _contract(a: Tensor, u: Tensor, layout: EdgeLayout) -> Tensor:
    """Sum of a_r u_r over the rows of each degree, (F, E, (lmax + 1) C)."""
    (first, _), *others = layout.runs(u.shape[-1])
    total = a[..., first] * u[..., first]
    for run, of in others:
        total[..., of].addcmul_(a[..., run], u[..., run])
    return total


def _weighted(
    a: Tensor, sigma: Tensor, p: Tensor, gates: Tensor, layout: EdgeLayout
) -> tuple[Tensor, Tensor]:
    """The gradient of u from sigma and p (the formula of a D); and p without degree 0."""
    c = gates.shape[1]
    du = torch.empty_like(a)
    for run, of in layout.runs(a.shape[-1]):
        torch.mul(a[..., run], sigma[..., of], out=du[..., run])
    du[..., :c] += torch.baddbmm(p[..., :c], p[..., c:], gates.mT)
    return du, p[..., c:]
