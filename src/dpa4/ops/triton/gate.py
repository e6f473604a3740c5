"""Triton kernels of `dpa4.ops.gate`: each reads and writes every edge tensor once.

A program holds a few edges. Degree by degree it computes the gates from the scalars, a small product on tensor cores,
and then processes the rows of that degree. float32 operands are multiplied as three TF32 products, which keeps
float32 accuracy; all other arithmetic is in float32.

The rows of the edge frame (`EdgeLayout`) are degrees 0..LMAX of order 0, then degrees k..LMAX of order -k and of
order +k for k = 1..MMAX; each is C channels wide.

Variables of the kernels and the formula of `dpa4.ops.gate`, for the degree l of the loop:

    s, v_s, a_s, b_s   first row of u, v, a and b (scalars); u_r, a_r, b_r, ... are the other rows, one at a time
    gate               sigma_l, the sigmoid of z_l = s G_l
    first              sigma'_l = gate (1 - gate); the second derivative of the sigmoid is first (1 - 2 gate)
    zeta               change of z_l if u changes by v: v_s for degree 0, v_s G_l above
    slope              sigma'_l zeta, the change of sigma_l, in `_gate_tangent` and `_gate_undo`
    h                  sum over the rows of degree l of a_r u_r
    both               sum over the rows of degree l of b_r u_r + a_r v_r
    slope              p_l = sigma'_l h, in `_gate_vjp` and `_gate_joint`
    second             q_l = sigma'_l (both + zeta h (1 - 2 gate))
    total, total_a     first row of a D; rows of degree l add p_l G_l^T
    total_u            first row of the derivative with respect to u; rows of degree l add q_l G_l^T
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpa4.ops.layout import EdgeLayout
from dpa4.ops.operands import Operand, check


@triton.jit
def _row(l: tl.constexpr, k: tl.constexpr, sign: tl.constexpr, L: tl.constexpr):
    """Index of the row of degree l and order -k (sign 0) or +k (sign 1) in the edge frame; L = LMAX + 1."""
    before: tl.constexpr = 0 if k == 0 else L + (k - 1) * (2 * L - k)
    return before + sign * (L - k) + l - k


@triton.jit
def _begin(
    weight, num_edges,
    LMAX: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Indices and masks of this program.

    Returns:
        Indices of its edges among those of all focus streams, (BLOCK_E, 1); offsets of their first rows in an edge
        tensor, and the mask of existing entries, (BLOCK_E, BLOCK_C); pointers to the weights of degree 1 of its
        focus, a C x C square, and the mask of existing entries of a square, (BLOCK_C, BLOCK_C).
    """
    f = tl.program_id(1)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.arange(0, BLOCK_C)
    index = (f.to(tl.int64) * num_edges + e)[:, None]
    at = index * WIDTH + c[None, :]
    mask = (e < num_edges)[:, None] & (c < C)[None, :]
    square = (c < C)[:, None] & (c < C)[None, :]
    weight += f * (C * LMAX * C) + c[:, None] * (LMAX * C) + c[None, :]
    return index, at, mask, weight, square


@triton.jit
def _gate_value(
    y, x, u, weight, num_edges,
    LMAX: tl.constexpr, MMAX: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _, at, mask, weight, square = _begin(weight, num_edges, LMAX, C, WIDTH, BLOCK_E, BLOCK_C)
    s = tl.load(u + at, mask=mask, other=0.0)
    for l in tl.static_range(LMAX + 1):
        if l == 0:
            gate = tl.sigmoid(s.to(tl.float32))
        else:
            w = tl.load(weight + (l - 1) * C, mask=square, other=0.0)
            gate = tl.sigmoid(tl.dot(s, w, input_precision=PRECISION))
        for k in tl.static_range(MMAX + 1):
            for sign in tl.static_range(2):
                if k <= l and (sign == 0 or k > 0):
                    here = at + _row(l, k, sign, LMAX + 1) * C
                    out = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
                    out += tl.load(u + here, mask=mask, other=0.0).to(tl.float32) * gate
                    tl.store(y + here, out, mask=mask)


@triton.jit
def _gate_vjp(
    du, p, a, u, weight, num_edges,
    LMAX: tl.constexpr, MMAX: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    index, at, mask, weight, square = _begin(weight, num_edges, LMAX, C, WIDTH, BLOCK_E, BLOCK_C)
    at_p = index * (LMAX * C) + tl.arange(0, BLOCK_C)[None, :]
    s = tl.load(u + at, mask=mask, other=0.0)
    a_s = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(s.to(tl.float32))
    total = a_s * gate * (1 + s.to(tl.float32) * (1 - gate))  # a sigma + p_0, p_0 = a s sigma'
    for l in tl.static_range(1, LMAX + 1):
        w = tl.load(weight + (l - 1) * C, mask=square, other=0.0)
        gate = tl.sigmoid(tl.dot(s, w, input_precision=PRECISION))
        h = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        for k in tl.static_range(MMAX + 1):
            for sign in tl.static_range(2):
                if k <= l and (sign == 0 or k > 0):
                    here = at + _row(l, k, sign, LMAX + 1) * C
                    a_r = tl.load(a + here, mask=mask, other=0.0).to(tl.float32)
                    h += a_r * tl.load(u + here, mask=mask, other=0.0).to(tl.float32)
                    tl.store(du + here, a_r * gate, mask=mask)
        slope = (h * gate * (1 - gate)).to(s.dtype)
        if SUMS:
            tl.store(p + at_p + (l - 1) * C, slope, mask=mask)
        total = tl.dot(slope, tl.trans(w), total, input_precision=PRECISION)
    tl.store(du + at, total, mask=mask)


@triton.jit
def _gate_tangent(
    y, d, v, u, weight, num_edges,
    LMAX: tl.constexpr, MMAX: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _, at, mask, weight, square = _begin(weight, num_edges, LMAX, C, WIDTH, BLOCK_E, BLOCK_C)
    s = tl.load(u + at, mask=mask, other=0.0)
    v_s = tl.load(v + at, mask=mask, other=0.0)
    for l in tl.static_range(LMAX + 1):
        if l == 0:
            gate = tl.sigmoid(s.to(tl.float32))
            zeta = v_s.to(tl.float32)
        else:
            w = tl.load(weight + (l - 1) * C, mask=square, other=0.0)
            gate = tl.sigmoid(tl.dot(s, w, input_precision=PRECISION))
            zeta = tl.dot(v_s, w, input_precision=PRECISION)
        slope = gate * (1 - gate) * zeta
        for k in tl.static_range(MMAX + 1):
            for sign in tl.static_range(2):
                if k <= l and (sign == 0 or k > 0):
                    here = at + _row(l, k, sign, LMAX + 1) * C
                    out = tl.load(d + here, mask=mask, other=0.0).to(tl.float32)
                    out += tl.load(v + here, mask=mask, other=0.0).to(tl.float32) * gate
                    out += tl.load(u + here, mask=mask, other=0.0).to(tl.float32) * slope
                    tl.store(y + here, out, mask=mask)


@triton.jit
def _gate_undo(
    x, d, x_new, d_new, v, u, weight, num_edges,
    LMAX: tl.constexpr, MMAX: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, TANGENT: tl.constexpr,
):  # fmt: skip
    _, at, mask, weight, square = _begin(weight, num_edges, LMAX, C, WIDTH, BLOCK_E, BLOCK_C)
    s = tl.load(u + at, mask=mask, other=0.0)
    v_s = tl.load(v + at, mask=mask, other=0.0)
    for l in tl.static_range(LMAX + 1):
        if l == 0:
            gate = tl.sigmoid(s.to(tl.float32))
            zeta = v_s.to(tl.float32)
        else:
            w = tl.load(weight + (l - 1) * C, mask=square, other=0.0)
            gate = tl.sigmoid(tl.dot(s, w, input_precision=PRECISION))
            if TANGENT:
                zeta = tl.dot(v_s, w, input_precision=PRECISION)
        if TANGENT:
            slope = gate * (1 - gate) * zeta
        for k in tl.static_range(MMAX + 1):
            for sign in tl.static_range(2):
                if k <= l and (sign == 0 or k > 0):
                    here = at + _row(l, k, sign, LMAX + 1) * C
                    u_r = tl.load(u + here, mask=mask, other=0.0).to(tl.float32)
                    x_r = tl.load(x + here, mask=mask, other=0.0).to(tl.float32) - u_r * gate
                    tl.store(x_new + here, x_r, mask=mask)
                    if TANGENT:
                        d_r = tl.load(d + here, mask=mask, other=0.0).to(tl.float32)
                        d_r -= tl.load(v + here, mask=mask, other=0.0).to(tl.float32) * gate + u_r * slope
                        tl.store(d_new + here, d_r, mask=mask)


@triton.jit
def _gate_joint(
    du, da, q, p, b, v, a, u, weight, num_edges,
    LMAX: tl.constexpr, MMAX: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    index, at, mask, weight, square = _begin(weight, num_edges, LMAX, C, WIDTH, BLOCK_E, BLOCK_C)
    at_p = index * (LMAX * C) + tl.arange(0, BLOCK_C)[None, :]
    s = tl.load(u + at, mask=mask, other=0.0)
    v_s = tl.load(v + at, mask=mask, other=0.0)
    s_ = s.to(tl.float32)
    zeta = v_s.to(tl.float32)
    a_s = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    b_s = tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(s_)
    first = gate * (1 - gate)
    h = a_s * s_
    total_a = a_s * gate + h * first  # a sigma + p_0
    # b sigma + a sigma' zeta + q_0; here zeta is v_s, so that q_0 has both = zeta a + b s.
    total_u = b_s * gate + a_s * zeta * first + (zeta * a_s + b_s * s_ + zeta * h * (1 - 2 * gate)) * first
    for l in tl.static_range(1, LMAX + 1):
        w = tl.load(weight + (l - 1) * C, mask=square, other=0.0)
        gate = tl.sigmoid(tl.dot(s, w, input_precision=PRECISION))
        zeta = tl.dot(v_s, w, input_precision=PRECISION)
        first = gate * (1 - gate)
        h = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        both = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        for k in tl.static_range(MMAX + 1):
            for sign in tl.static_range(2):
                if k <= l and (sign == 0 or k > 0):
                    here = at + _row(l, k, sign, LMAX + 1) * C
                    u_r = tl.load(u + here, mask=mask, other=0.0).to(tl.float32)
                    a_r = tl.load(a + here, mask=mask, other=0.0).to(tl.float32)
                    b_r = tl.load(b + here, mask=mask, other=0.0).to(tl.float32)
                    h += a_r * u_r
                    both += b_r * u_r + a_r * tl.load(v + here, mask=mask, other=0.0).to(tl.float32)
                    tl.store(du + here, b_r * gate + a_r * zeta * first, mask=mask)
                    tl.store(da + here, a_r * gate, mask=mask)
        slope = (h * first).to(s.dtype)
        second = ((both + zeta * h * (1 - 2 * gate)) * first).to(s.dtype)
        tl.store(p + at_p + (l - 1) * C, slope, mask=mask)
        tl.store(q + at_p + (l - 1) * C, second, mask=mask)
        total_a = tl.dot(slope, tl.trans(w), total_a, input_precision=PRECISION)
        total_u = tl.dot(second, tl.trans(w), total_u, input_precision=PRECISION)
    tl.store(du + at, total_u, mask=mask)
    tl.store(da + at, total_a, mask=mask)


# Launches; arguments and results are those of the functions of the same name in `dpa4.ops.gate`. A tile such as
# (16, 2) stands for 16 edges and 2 warps per program. Tiles were tuned on an H200 for at most 64 channels; the
# measurement was not kept. The weights of a degree with 128 channels are four times as large: in float32, fewer than
# 8 warps would move 30 to 70 KiB per thread to slow memory (according to the assembler).


_WIDE = 64  # channels above which the tile is _WIDE_TILE
_WIDE_TILE = (16, 8)


def value(x: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout) -> Tensor:
    y = torch.empty_like(u)
    _launch(_gate_value, (16, 2), [y], [x, u], gates, layout)
    return y


def vjp(a: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout, sums: bool) -> tuple[Tensor, Tensor | None]:
    du, p = torch.empty_like(u), _per_degree(u, gates) if sums else None
    results = [du, du if p is None else p]
    _launch(_gate_vjp, (64, 4) if u.itemsize == 2 else (16, 4), results, [a, u], gates, layout, SUMS=sums)
    return du, p


def tangent(d: Tensor, v: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout) -> Tensor:
    y = torch.empty_like(u)
    _launch(_gate_tangent, (64, 8) if u.itemsize == 2 else (16, 2), [y], [d, v, u], gates, layout)
    return y


def joint(
    b: Tensor, v: Tensor, a: Tensor, u: Tensor, gates: Tensor, layout: EdgeLayout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    du, da, q, p = torch.empty_like(u), torch.empty_like(u), _per_degree(u, gates), _per_degree(u, gates)
    _launch(_gate_joint, (16, 2) if u.itemsize == 2 else (16, 4), [du, da, q, p], [b, v, a, u], gates, layout)
    return du, da, q, p


def undo(
    x: Tensor,
    d: Tensor | None,
    v: Tensor | None,
    u: Tensor,
    gates: Tensor,
    layout: EdgeLayout,
    overwrite: bool,
) -> tuple[Tensor, Tensor | None]:
    x_new = x if overwrite else torch.empty_like(x)
    d_new = d if overwrite or d is None else torch.empty_like(d)
    tensors = [x if t is None else t for t in (x, d, x_new, d_new, v, u)]
    tile = (16, 1) if u.itemsize == 2 else (16, 2)
    _launch(_gate_undo, tile, [], tensors, gates, layout, TANGENT=d is not None)
    return x_new, d_new


def _per_degree(u: Tensor, gates: Tensor) -> Tensor:
    return u.new_empty((*u.shape[:-1], gates.shape[2]))


def _launch(
    kernel: Any,
    tile: tuple[int, int],
    results: list[Tensor],
    edges: list[Tensor],
    gates: Tensor,
    layout: EdgeLayout,
    **flags: bool,
) -> None:
    """Launch a kernel.

    Args:
        kernel: Kernel whose arguments are results, edge tensors, weight, sizes and blocks, in this order.
        tile: Edges and warps per program.
        results: Tensors that are written, contiguous.
        edges: Edge tensors, contiguous.
        gates: Weights of the gates, (F, C, lmax C).
        layout: Rows of the edge frame.
        **flags: Compile-time switches of the kernel.
    """
    (n_focus, num_edges, width), weight = edges[0].shape, gates
    c = weight.shape[1]
    if num_edges == 0:
        return
    operands = [
        *(Operand("an edge tensor", t, (n_focus, num_edges, layout.total * c), weight.dtype) for t in edges),
        Operand("gates", weight, (n_focus, c, layout.lmax * c), weight.dtype),
    ]
    check("gate", weight.device, operands)
    block_e, warps = tile if c <= _WIDE else _WIDE_TILE
    with torch.cuda.device_of(weight):
        kernel[(triton.cdiv(num_edges, block_e), n_focus)](
            *results, *edges, weight, num_edges, layout.lmax, layout.mmax, c, width,
            block_e, max(16, triton.next_power_of_2(c)), "tf32x3" if weight.dtype == torch.float32 else "tf32",
            num_warps=warps, **flags,
        )  # fmt: skip
