"""Whole stacks of SO(2) layers, and their derivative with respect to features, in one kernel each for Hopper GPUs.

The kernels are written in CUDA C++ (`so2_stack.cu`, docs/adr/0017). They read weights as two streams of bytes, one
per half of the channels, in the order and arrangement in which tensor cores use them; `pack` builds the streams.
They reach float32 accuracy from float16 parts (see `dpa4.ops.triton.split_matmul`). They serve energies and forces;
training needs more derivatives and uses the kernels of `dpa4.ops.so2_stack`.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dpa4.ops.hopper.build import Kernel
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.operands import Operand, check, check_count
from dpa4.ops.registration import register

LAYOUT, CHANNELS = EdgeLayout(lmax=3, mmax=1), 64
"""Supported shape: one focus stream of degree 3 with 64 channels (air, paper-air, paper-neo)."""

MAX_GATES = 8
"""Largest number of gated layers."""

EDGES = 64
"""Number of edges that a block of threads takes through all layers."""

PADDING = EDGES - 1
"""Extra rows of saved tensors, so that every block writes EDGES rows without bounds checks."""

_WIDTH = LAYOUT.total * CHANNELS
_THREADS, _SHARED_MEMORY = 384, 232_448
_SOURCE = Path(__file__).with_name("so2_stack.cu")


# Weights.


def pack(matrices: Sequence[Tensor], gates: Sequence[Tensor], backward: bool) -> list[Tensor]:
    """Pack the weights of a stack for the kernels. The identity is added to the matrices of the last layer.

    Args:
        matrices: For each layer, the matrices of orders 0 and 1, (1, K_m, K_m). Those of order 1 have the form
            [[U, V], [-V, U]].
        gates: Weights of the gates of each layer but the last, (1, C, lmax C).
        backward: Whether the weights are for the derivative.

    Returns:
        The streams (2, n), float16; and the powers of two by which products must be multiplied, (layers, 4) float32:
        for the matrices of order 0, of order 1, for the gates, and a zero.
    """
    layers = len(matrices) // 2
    of_order = [torch.cat(list(matrices[m::2])) for m in (0, 1)]
    for w in of_order:
        w[-1].diagonal().add_(1)
    zero, one, gate = (_split(w) for w in (*of_order, torch.cat(list(gates)) if gates else of_order[0][:0]))
    halves = torch.cat([t.flatten() for t, _ in (zero, one, gate)])
    scales = halves.new_zeros((layers, 4), dtype=torch.float32)
    for column, (_, power) in enumerate((zero, one, gate)):
        scales[: len(power), column] = power
    return [halves[_order(layers, backward, halves.device)], scales]


def _split(w: Tensor) -> tuple[Tensor, Tensor]:
    """Split matrices (n, K, N) into float16 parts (n, 2, K, N) and a power of two per matrix, (n,).

    w = (high + low) * power. The power moves the largest entry close to the end of the float16 range, so that small
    entries keep as many bits as possible.
    """
    largest = w.abs().amax((1, 2)) if len(w) else w.new_empty(0)
    exponent = torch.frexp(largest)[1].clamp(-100, 100) - 15
    scaled = torch.ldexp(w, -exponent[:, None, None])
    high = scaled.half()
    return torch.stack([high, (scaled - high).half()], dim=1), torch.ldexp(torch.ones_like(largest), exponent)


@cache
def _order(layers: int, backward: bool, device: torch.device) -> Tensor:
    """Permutation that arranges the parts of all weights into the two streams, (2, n) int64.

    It is found by arranging the numbers 0, 1, ... in the place of the entries.
    """
    with torch.utils._python_dispatch._disable_current_modes():  # also while tracing, real numbers are needed
        width = (LAYOUT.lmax + 1) * CHANNELS, 2 * LAYOUT.lmax * CHANNELS, LAYOUT.lmax * CHANNELS
        shapes = [(layers, 2, n, n) for n in width[:2]] + [(layers - 1, 2, CHANNELS, width[2])]
        sizes = [torch.Size(s).numel() for s in shapes]
        parts = torch.arange(sum(sizes)).split(sizes)
        zero, one, gates = (p.view(s) for p, s in zip(parts, shapes, strict=True))
        if backward:
            zero, one = zero.mT, one.mT
        streams = []
        for group in (0, 1):
            found: list[Tensor] = []
            for t in reversed(range(layers)) if backward else range(layers):
                product = _product(zero[t], one[t], group)
                gate = _gate(gates[t], group, backward) if t < layers - 1 else iter(())
                found += [*gate, *product] if backward else [*product, *gate]
            streams.append(torch.cat(found))
        return torch.stack(streams).to(device)


def _product(zero: Tensor, one: Tensor, group: int) -> Iterator[Tensor]:
    """Sections of a stream for the matrices of orders 0 and 1, (2, K, K) with the two float16 parts first."""
    u, v = one[:, : one.shape[1] // 2].chunk(2, dim=2)
    columns = torch.arange(LAYOUT.lmax + 1)[:, None, None] * CHANNELS + _channels(group).view(2, -1)
    runs = [columns[:-1, run].flatten() for run in (0, 1)]
    for block in range(0, LAYOUT.lmax * CHANNELS, CHANNELS):
        for w in (u, v):
            for run in runs:
                yield from _tiles(w, block, CHANNELS, run)
    for block in range(0, (LAYOUT.lmax + 1) * CHANNELS, CHANNELS):
        for half in columns.flatten().chunk(2):
            yield from _tiles(zero, block, CHANNELS, half)


def _gate(w: Tensor, group: int, backward: bool) -> Iterator[Tensor]:
    """Sections of a stream for the gates of a layer, (2, C, lmax C); for the derivative also their transposes."""
    columns = _channels(group)
    for degree in range(LAYOUT.lmax):
        yield from _tiles(w, 0, CHANNELS, degree * CHANNELS + columns)
    if backward:
        yield from _tiles(w.mT, 0, LAYOUT.lmax * CHANNELS, columns)


def _channels(group: int) -> Tensor:
    """Channels of a group in the order of the columns of a product.

    Tensor cores give each thread pairs of adjacent columns in every run of eight. In this order two such pairs are
    four adjacent channels, so that a thread holds two runs of four channels, see the kernel.
    """
    n = torch.arange(CHANNELS // 2)
    return group * CHANNELS // 2 + n // 16 * 16 + n % 8 // 2 * 4 + n // 8 % 2 * 2 + n % 2


def _tiles(w: Tensor, first: int, rows: int, columns: Tensor) -> Iterator[Tensor]:
    """Rows first to first + rows, and some columns, of split weights (2, K, N), as tiles of 32 rows.

    The entries of a tile are arranged for tensor cores: by float16 part, by column, then the 32 rows in four chunks
    whose order depends on the column (shared memory with rows of 64 bytes, swizzled).
    """
    n = torch.arange(len(columns))[:, None]
    chunk = (torch.arange(4) ^ (n // 2 % 4))[None, :, :, None]
    for start in range(first, first + rows, 32):
        tile = w[:, start : start + 32, columns].mT.unflatten(2, (4, 8))
        yield tile.gather(2, chunk.expand(tile.shape)).flatten()


# Launches.


def value(x: Tensor, weights: Sequence[Tensor], keep: bool) -> list[Tensor]:
    """Apply the stack to features.

    Args:
        x: Features, (1, E, W), contiguous.
        weights: Result of `pack`.
        keep: Whether tensors are saved for `vjp`.

    Returns:
        y, (1, E, W); with ``keep`` also the products of the gated layers, in an order that `in_rows` undoes, and the
        largest entry of each product and edge.
    """
    y, *kept = _new_value(x, weights, keep)
    *us, maxima = kept or [y]
    _launch("so2_value", x, y, us, maxima, weights, int(keep))
    return [y, *kept]


def vjp(g: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Compute the gradient of x, (1, E, W).

    Args:
        g: Gradient of y, (1, E, W).
        kept: Tensors saved by `value`.
        weights: Result of `pack` with ``backward``.
    """
    g = g.contiguous()
    dx = torch.empty_like(g)
    *us, maxima = kept
    _launch("so2_vjp", g, dx, us, maxima, weights)
    return dx


def in_rows(u: Tensor, edges: int) -> Tensor:
    """Rearrange products saved by `value` to edge features (1, E, W)."""
    tiles, blocks = -(-edges // EDGES), LAYOUT.total
    # The kernel writes each thread's entries as float4, in the order of the threads. For every 64 edges the axes are:
    #   1 group of warps = half of the channels (2)    2 row of the edge frame, degree by degree (10)
    #   3 bit 3 of the edge (2)                        4 run of four channels (2)
    #   5 bits 4 and 5 of the edge (4), the warp       6 bits 0 to 2 of the edge (8)
    #   7 quad of the thread in its warp (4)           8 channel in the run (4)
    # The edge is (bits 4 and 5, bit 3, bits 0 to 2) = axes 5, 3, 6, and the channel (group, run, quad, entry) = axes
    # 1, 4, 7, 8.
    u = u.flatten()[: tiles * EDGES * _WIDTH].view(tiles, 2, blocks, 2, 2, 4, 8, 4, 4)
    u = u.permute(0, 5, 3, 6, 2, 1, 4, 7, 8).reshape(-1, blocks, CHANNELS)
    # Degree by degree means: degree 0; then for each degree its orders 0, -1, +1. Row b of the layout, b > 0, has
    # degree 1 + (b - 1) % lmax and is the (b - 1) // lmax-th order of it.
    order = [0, *(1 + 3 * ((b - 1) % LAYOUT.lmax) + (b - 1) // LAYOUT.lmax for b in range(1, blocks))]
    return u[:edges, order].reshape(1, edges, -1)


class _Pointers(ctypes.Structure):
    _fields_ = [("of", ctypes.c_void_p * MAX_GATES)]


@cache
def _kernel(name: str, device: int) -> Kernel:
    """Kernel on the current device; ``device`` keys the cache."""
    return Kernel(_SOURCE, name, _THREADS, _SHARED_MEMORY)


def _launch(
    name: str,
    x: Tensor,
    y: Tensor,
    us: Sequence[Tensor],
    maxima: Tensor,
    weights: Sequence[Tensor],
    *more: int,
) -> None:
    edges, (streams, scales) = x.shape[1], weights
    if edges == 0:
        return
    _check(name, x, y, us, maxima, weights)
    with torch.cuda.device_of(x):
        device = torch.cuda.current_device()
        blocks = min(-(-edges // EDGES), torch.cuda.get_device_properties(device).multi_processor_count)
        pointers = _Pointers((ctypes.c_void_p * MAX_GATES)(*(u.data_ptr() for u in us)))
        sizes = [ctypes.c_int(n) for n in (edges, len(scales), 2 * streams.shape[1], *more)]
        _kernel(name, device)(blocks, [x, y, pointers, maxima, streams, scales, *sizes])


def _check(
    name: str, x: Tensor, y: Tensor, us: Sequence[Tensor], maxima: Tensor, weights: Sequence[Tensor]
) -> None:
    """Compare the operands of a kernel with what it expects, see `dpa4.ops.operands.check`."""
    edges, (streams, scales), backward = x.shape[1], weights, name == "so2_vjp"
    layers, rows, gates = len(scales), edges + PADDING, len(scales) - 1
    check_count(name, "the products", us, [gates] if backward else [0, gates])
    operands = [
        *(Operand("an edge tensor", t, (1, edges, _WIDTH), torch.float32) for t in (x, y)),
        *(Operand("a product", u, (rows, _WIDTH), torch.float32) for u in us),
        *([Operand("the largest entries", maxima, (rows, gates), torch.float32)] if us else []),
        Operand("the streams", streams, (2, _stream_length(layers, backward)), torch.float16),
        Operand("the scales", scales, (layers, 4), torch.float32),
    ]
    check(name, x.device, operands)


def _stream_length(layers: int, backward: bool) -> int:
    """Entries of each of the two streams: two float16 parts of every weight, divided between them."""
    c = CHANNELS
    product = ((LAYOUT.lmax + 1) * c) ** 2 + 2 * (LAYOUT.lmax * c) ** 2
    return layers * product + (layers - 1) * LAYOUT.lmax * c * c * (1 + backward)


# The operators. Tracing calls the functions `_new_...`, which return uninitialised results.


def _new_pack(matrices: list[Tensor], gates: list[Tensor], backward: bool) -> list[Tensor]:
    layers = len(matrices) // 2
    return [
        matrices[0].new_empty((2, _stream_length(layers, backward)), dtype=torch.float16),
        matrices[0].new_empty((layers, 4)),
    ]


def _new_value(x: Tensor, weights: Sequence[Tensor], keep: bool) -> list[Tensor]:
    gates, padded = len(weights[1]) - 1, x.shape[1] + PADDING
    us = [x.new_empty((padded, _WIDTH)) for _ in range(gates if keep else 0)]
    return [torch.empty_like(x), *us, *([x.new_empty((padded, gates))] if keep else [])]


def _new_vjp(g: Tensor, kept: list[Tensor], weights: list[Tensor]) -> Tensor:
    return torch.empty_like(g)


for _schema, _operator, _new in (
    ("so2_pack(Tensor[] matrices, Tensor[] gates, bool backward) -> Tensor[]", pack, _new_pack),
    ("so2_fused_value(Tensor x, Tensor[] weights, bool keep) -> Tensor[]", value, _new_value),
    ("so2_fused_vjp(Tensor g, Tensor[] kept, Tensor[] weights) -> Tensor", vjp, _new_vjp),
):
    register(_schema, _new, {"CompositeExplicitAutograd": _operator})
