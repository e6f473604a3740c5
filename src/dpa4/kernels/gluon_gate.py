"""Gluon twins of kernels of `dpa4.kernels.gate` in float32 for Hopper GPUs; see `gluon_tiles`.

A program keeps the weights of the gates in shared memory and walks over blocks of edges.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dpa4.kernels.gate import Rows
from dpa4.kernels.gluon_tiles import (
    EDGES,
    WARPS,
    by_name,
    by_place,
    keep_weights,
    memory_layout,
    multiprocessors,
    place_of,
    result_layout,
    split_product,
    two_halves,
)
from dpa4.kernels.matmul import Weight


def takes(gates: Tensor) -> bool:
    """Whether there are kernels for float32 features and these weights (F, C, lmax C), up to order 1."""
    return gates.shape[1] in (32, 64) and gates.shape[2] > 0


@gluon.jit
def _offsets(first, num_edges, f, stride, E: gl.constexpr, N: gl.constexpr):
    """Of N columns of a block of edges, in rows of so many numbers; and which edges there are."""
    layout: gl.constexpr = memory_layout(E, N)
    e = gl.arange(0, E, gl.SliceLayout(1, layout))
    n = gl.arange(0, N, gl.SliceLayout(0, layout))
    at = (f * num_edges + first) * stride + (e[:, None] * stride + n[None, :])
    return at, (first + e < num_edges)[:, None]


@gluon.jit
def _read(at, mask):
    return by_name(gl.load(at, mask=mask, other=0.0))


@gluon.jit
def _write(at, tile, mask):
    gl.store(at, by_place(tile), mask=mask)


@gluon.jit
def _sigmoid(z):
    return 1 / (1 + gl.exp(-z))


@gluon.jit
def _scale(scale, j, N: gl.constexpr):
    """Powers of two that belong to the columns of block j, by name, (1, N)."""
    n = gl.arange(0, N, gl.SliceLayout(0, result_layout(N, gl.num_warps())))
    return gl.load(scale + j * N + place_of(n))[None, :]


@gluon.jit
def _of_focus(pieces, scale, n_focus, LMAX: gl.constexpr, C: gl.constexpr, N: gl.constexpr):
    """The focus of this program, and its weights: on chip in blocks of N columns, with their powers of two."""
    size: gl.constexpr = LMAX * C * C
    f = gl.program_id(1).to(gl.int64)
    w = keep_weights(pieces + f * size, N, N * C, C, n_focus * size, LMAX * C // N, N, C)
    return f, w, scale + f * (LMAX * C)


# A number of edges that is a multiple of 16 made slower code: 0.61 instead of 0.44 ms (docs/adr/0015).
@gluon.jit(do_not_specialize=["num_edges"])
def _gate_value(
    y, x, u, pieces, scale, num_edges, n_focus,
    LMAX: gl.constexpr, MMAX: gl.constexpr, C: gl.constexpr, WIDTH: gl.constexpr,
    E: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    f, w, scale = _of_focus(pieces, scale, n_focus, LMAX, C, N)
    for first in range(gl.program_id(0) * E, num_edges, gl.num_programs(0) * E):
        at, mask = _offsets(first, num_edges, f, WIDTH, E, C)
        s = _read(u + at, mask)
        operand = two_halves(s, N)
        _write(y + at, _read(x + at, mask) + s * _sigmoid(s), mask)
        at, mask = _offsets(first, num_edges, f, WIDTH, E, N)
        for j in range(LMAX * C // N):
            gate = _sigmoid(split_product(operand, w, j) * _scale(scale, j, N))
            for k in gl.static_range(2 * MMAX + 1):
                here = at + (C + j * N + k * LMAX * C)
                out = _read(x + here, mask) + _read(u + here, mask) * gate
                _write(y + here, out, mask)


@gluon.jit
def _gate_vjp(
    du, p, a, u, pieces, scale, num_edges, n_focus, P: gl.constexpr,
    LMAX: gl.constexpr, MMAX: gl.constexpr, C: gl.constexpr, WIDTH: gl.constexpr,
    E: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    f, w, scale = _of_focus(pieces, scale, n_focus, LMAX, C, N)
    for first in range(gl.program_id(0) * E, num_edges, gl.num_programs(0) * E):
        at, mask = _offsets(first, num_edges, f, WIDTH, E, C)
        s = _read(u + at, mask)
        operand = two_halves(s, N)
        gate_s = _sigmoid(s)
        total = _read(a + at, mask) * gate_s * (1 + s * (1 - gate_s))
        half, mask_half = _offsets(first, num_edges, f, WIDTH, E, N)
        at_p, _ = _offsets(first, num_edges, f, LMAX * C, E, N)
        for j in range(LMAX * C // N):
            scale_j = _scale(scale, j, N)
            gate = _sigmoid(split_product(operand, w, j) * scale_j)
            h = gl.zeros([E, N], gl.float32, result_layout(N, num_warps))
            for k in gl.static_range(2 * MMAX + 1):
                here = half + (C + j * N + k * LMAX * C)
                a_r = _read(a + here, mask_half)
                h += a_r * _read(u + here, mask_half)
                _write(du + here, a_r * gate, mask_half)
            slope = h * gate * (1 - gate)
            if P:
                _write(p + at_p + j * N, slope, mask_half)
            total += split_product(two_halves(slope * scale_j, C), w, j, TRANSPOSED=True)
        _write(du + at, total, mask)


@gluon.jit
def _gate_tangent(
    y, d, v, u, pieces, scale, num_edges, n_focus,
    LMAX: gl.constexpr, MMAX: gl.constexpr, C: gl.constexpr, WIDTH: gl.constexpr,
    E: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    f, w, scale = _of_focus(pieces, scale, n_focus, LMAX, C, N)
    for first in range(gl.program_id(0) * E, num_edges, gl.num_programs(0) * E):
        at, mask = _offsets(first, num_edges, f, WIDTH, E, C)
        s = _read(u + at, mask)
        v_s = _read(v + at, mask)
        of_u = two_halves(s, N)
        of_v = two_halves(v_s, N)
        gate_s = _sigmoid(s)
        _write(y + at, _read(d + at, mask) + v_s * gate_s * (1 + s * (1 - gate_s)), mask)
        at, mask = _offsets(first, num_edges, f, WIDTH, E, N)
        for j in range(LMAX * C // N):
            scale_j = _scale(scale, j, N)
            gate = _sigmoid(split_product(of_u, w, j) * scale_j)
            change = gate * (1 - gate) * (split_product(of_v, w, j) * scale_j)
            for k in gl.static_range(2 * MMAX + 1):
                here = at + (C + j * N + k * LMAX * C)
                out = _read(d + here, mask) + _read(v + here, mask) * gate
                _write(y + here, out + _read(u + here, mask) * change, mask)


def value(x: Tensor, u: Tensor, gates: Weight, rows: Rows) -> Tensor:
    """`dpa4.kernels.gate.value`."""
    y = torch.empty_like(u)
    _launch(_gate_value, gates.matrix.shape[1], [y], [x, u], gates, rows)
    return y


def vjp(a: Tensor, u: Tensor, gates: Weight, rows: Rows, sums: bool) -> tuple[Tensor, Tensor | None]:
    """`dpa4.kernels.gate.vjp`."""
    du, p = torch.empty_like(u), u.new_empty((*u.shape[:-1], gates.matrix.shape[2])) if sums else None
    _launch(_gate_vjp, gates.matrix.shape[1], [du, du if p is None else p], [a, u], gates, rows, P=sums)
    return du, p


def tangent(d: Tensor, v: Tensor, u: Tensor, gates: Weight, rows: Rows) -> Tensor:
    """`dpa4.kernels.gate.tangent`."""
    y = torch.empty_like(u)
    _launch(_gate_tangent, 32, [y], [d, v, u], gates, rows)
    return y


def _launch(
    kernel: Any,
    columns: int,
    results: list[Tensor],
    edges: list[Tensor],
    gates: Weight,
    rows: Rows,
    **flags: bool,
) -> None:
    """Run a kernel that works on so many columns at a time; results and edge tensors are contiguous."""
    (n_focus, num_edges, width), c = edges[0].shape, gates.matrix.shape[1]
    if num_edges == 0:
        return
    assert gates.pieces is not None
    halves, scale = gates.pieces.by_name, gates.pieces.scale
    with torch.cuda.device_of(halves):
        shares = max(2 * multiprocessors(halves.device) // n_focus, 1)
        kernel[(min(shares, triton.cdiv(num_edges, EDGES)), n_focus)](
            *results, *edges, halves, scale, num_edges, n_focus,
            LMAX=rows.lmax, MMAX=rows.mmax, C=c, WIDTH=width, E=EDGES, N=columns, num_warps=WARPS, **flags,
        )  # fmt: skip
