"""Flat buffers in which `dpa4.training.muon` updates the weights of a parameter group.

All weights of a group lie one after the other in a buffer, so that the number of kernels of an update does not grow
with the number of weights. The buffers stay at their place in memory, so that the update can be recorded as a CUDA
graph (docs/adr/0027).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")

State = dict[str, Any]
"""State of the optimiser for one parameter."""

# Blocks of different shapes are padded with zeros and iterated together if that adds at most this many
# multiplications: on a GPU, the roughly thirty kernels of a separate stack take longer.
PADDING_LIMIT = 2e8


def block_shape(shape: Iterable[int]) -> tuple[int, int, int] | None:
    """Number, rows and columns of the matrix blocks of a weight, ignoring axes of size one.

    Returns:
        None if fewer than two axes are left.
    """
    sizes = [n for n in shape if n != 1]
    if len(sizes) < 2:
        return None
    count = 1
    for n in sizes[:-2]:
        count *= n
    return count, sizes[-2], sizes[-1]


class Packing:
    """Buffers for weights of one data type and device, and for their gradients.

    Args:
        params: The weights, in the order of the buffers.
        rates: Factor of the learning rate of each weight; None: 1 for all.
        padded: Number of additional entries of the buffer of gradients, which are zero.

    Attributes:
        weight: (P,) copy of the weights.
        rate: (P,) factor of the learning rate of each element; None: 1 for all.
        received: (P,) gradient as computed.
        gradient: (P + padded,) scaled gradient, which an update reads.
        weights, gradients: Views of ``weight`` and ``received`` shaped like the weights.
    """

    def __init__(self, params: list[Tensor], rates: Sequence[float] | None = None, padded: int = 0):
        self.params = params
        self.sizes = [p.numel() for p in params]
        total = sum(self.sizes)
        self.rate: Tensor | None = None
        if rates is not None:
            each = torch.tensor(rates, dtype=params[0].dtype)
            self.rate = each.repeat_interleave(torch.tensor(self.sizes)).to(params[0].device)
        self.weight, self.received = params[0].new_zeros(2, total)
        self.gradient = params[0].new_zeros(total + padded)
        self.weights, self.gradients = self.views(self.weight), self.views(self.received)
        self._borrowed: tuple[list[Tensor], list[Tensor]] = (
            [],
            [],
        )  # own views, and the state of other packings

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views of a buffer (P,) shaped like the weights."""
        return [t.view(p.shape) for t, p in zip(buffer.split(self.sizes), self.params, strict=True)]

    def hold(self, states: list[State], name: str, views: list[Tensor], borrowed: list[bool]) -> None:
        """Let views of a buffer hold an entry of the optimiser's state.

        Args:
            states: State of each weight.
            name: Name of the entry. The views keep their values for a weight without this entry.
            views: View for each weight.
            borrowed: For each weight, True if its entry is a view of another packing. That view remains the entry,
                and is copied before and after each update.
        """
        for state, view, shared in zip(states, views, borrowed, strict=True):
            if (old := state.get(name)) is not None:
                view.copy_(torch.as_tensor(old))
            if shared:
                self._borrowed[0].append(view)
                self._borrowed[1].append(state[name])
            else:
                state[name] = view

    def receive(self) -> None:
        """Copy the gradients into the buffer; they become its views."""
        found = [p.grad for p in self.params if p.grad is not None]
        if all(own is new for own, new in zip(self.gradients, found, strict=True)):
            return
        torch._foreach_copy_(self.gradients, found)
        for p, own in zip(self.params, self.gradients, strict=True):
            p.grad = own

    def begin(self, scale: Tensor) -> None:
        """Fill the buffers before an update.

        Args:
            scale: () factor of the gradient; with zero, a gradient that is not finite becomes zero, too.
        """
        if self._borrowed[0]:
            torch._foreach_copy_(*self._borrowed)
        torch._foreach_copy_(self.weights, self.params)
        own = self.gradient[: len(self.received)]
        torch.mul(self.received, scale.to(own.dtype), out=own)
        torch.nan_to_num(own, nan=0.0, out=own)  # a choice between two tensors is slower on a CPU

    def decay(self, factor: Tensor) -> None:
        """Multiply the weights by a factor, () float64, whose distance from 1 is that for a rate of 1."""
        dtype = self.weight.dtype
        if self.rate is None:
            self.weight.mul_(factor.to(dtype))
        else:
            self.weight.addcmul_(self.weight * self.rate, (factor - 1).to(dtype))

    def end(self) -> None:
        """Copy the new weights and the borrowed state back after an update."""
        torch._foreach_copy_(self.params, self.weights)
        if self._borrowed[0]:
            torch._foreach_copy_(self._borrowed[1], self._borrowed[0])


def concurrently(work: Sequence[Callable[[], T]], streams: Sequence[torch.cuda.Stream]) -> list[T]:
    """Call functions that do not depend on each other, and return their results.

    On a GPU their kernels run side by side, also while a CUDA graph is recorded: each is too small to occupy it.

    Args:
        work: The functions.
        streams: Stream for every function but the first; none on a CPU. Tensors of the calling function that the work
            reads, and the results, must live until this function has returned.
    """
    if not streams:
        return [function() for function in work]
    own = torch.cuda.current_stream()
    results = []
    for function, stream in zip(work[1:], streams, strict=True):
        stream.wait_stream(own)
        with torch.cuda.stream(stream):
            results.append(function())
    results.insert(0, work[0]())
    for stream in streams:
        own.wait_stream(stream)
    return results


class AdamPacking(Packing):
    """Buffers for Adam.

    Args:
        params: The weights.
        states: State of each weight.
        borrowed: For each weight, True if its state belongs to another packing; see `Packing.hold`.
        rates: As for `Packing`.

    Attributes:
        mean, square: (P,) moments of the gradient.
        steps: (n,) float64, number of updates of each weight.
        owner: (P,) index of the weight of each element.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[State],
        borrowed: list[bool],
        rates: Sequence[float] | None = None,
    ):
        super().__init__(params, rates)
        device = params[0].device
        self.mean, self.square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.steps = torch.zeros(len(params), dtype=torch.float64, device=device)
        self.owner = torch.arange(len(params)).repeat_interleave(torch.tensor(self.sizes)).to(device)
        self.hold(states, "step", list(self.steps.unbind()), borrowed)
        self.hold(states, "exp_avg", self.views(self.mean), borrowed)
        self.hold(states, "exp_avg_sq", self.views(self.square), borrowed)


class MuonPacking(Packing):
    """Buffers for Muon, and the stacks of blocks of the weights.

    Statistics of the blocks are one reduction per block shape. For the orthogonalisation, blocks are gathered from
    the buffers into a few stacks, transposed to wide and padded with zeros, which add nothing to any product.

    Args:
        params: The weights, in any order.
        states: State of each weight.
        borrowed: As for `AdamPacking`.
        scale: Root mean square of an update.
        rates: As for `Packing`.

    Attributes:
        momentum, work, product: (P + 1,) buffers; the last entry is the zero used as padding. ``momentum`` is
            allocated separately, because saving a view stores all memory behind it.
        score: (K,) Magma scores of all blocks.
        products: For each shape, the view (k, m n) of ``product``.
        pairs: For each shape, the view (2, k, m n) of ``product`` and ``gradient``.
        indices: For each stack, (k, m, n) positions of its elements in the buffers.
        inverse: (P,) positions of the elements of a buffer in the flattened and concatenated stacks.
        counts: Number of blocks of each stack.
        scales: For each stack, (k, 1, 1) factors from orthogonalised blocks to the root mean square ``scale``, times
            the factor of the learning rate.
        streams: Streams for `concurrently`, one per stack; none on a CPU.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[State],
        borrowed: list[bool],
        scale: float,
        rates: Sequence[float] | None = None,
    ):
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            by_shape[_wide_shape(p)].append(i)
        counts = {s: sum(_num_blocks(params[i]) for i in members) for s, members in by_shape.items()}
        stacks = _stacks(counts)
        shapes = [shape for stack in stacks for shape in stack]
        order = [i for shape in shapes for i in by_shape[shape]]
        super().__init__([params[i] for i in order], rates and [rates[i] for i in order], padded=1)

        dtype, device = params[0].dtype, params[0].device
        total = sum(self.sizes)
        blocks = [_num_blocks(p) for p in self.params]
        self.momentum = torch.zeros(total + 1, dtype=dtype, device=device)
        self.score = torch.full((sum(blocks),), 0.5, device=device)
        states, borrowed = [states[i] for i in order], [borrowed[i] for i in order]
        self.hold(states, "momentum_buffer", self.views(self.momentum[:-1]), borrowed)
        self.hold(states, "magma_score", list(self.score.split(blocks)), borrowed)

        buffers = torch.zeros(2, total + 1, dtype=dtype, device=device)
        self.product, self.gradient = buffers
        self.work = torch.zeros_like(self.momentum)
        lengths = [counts[m, n] * m * n for m, n in shapes]
        parts = zip(buffers[:, :-1].split(lengths, dim=1), shapes, strict=True)
        self.pairs = [part.view(2, -1, m * n) for part, (m, n) in parts]
        self.products = [pair[0] for pair in self.pairs]

        positions = dict(zip(order, torch.arange(total).split(self.sizes), strict=True))
        indices, self.counts, self.scales = [], [], []
        for stack in stacks:
            rows, columns = max(m for m, _ in stack), max(n for _, n in stack)
            index, roots = [], []
            for m, n in stack:
                for i in by_shape[m, n]:
                    block = _to_blocks(positions[i].view(params[i].shape))
                    index.append(F.pad(block, (0, columns - n, 0, rows - m), value=total))
                    roots += [scale * n**0.5 * (rates[i] if rates else 1.0)] * len(block)
            indices.append(torch.cat(index))
            self.counts.append(len(roots))
            self.scales.append(torch.tensor(roots, device=device)[:, None, None])
        inverse = torch.empty(total + 1, dtype=torch.int64)
        elements = torch.cat([index.view(-1) for index in indices])
        inverse[elements] = torch.arange(len(elements))
        self.inverse = inverse[:-1].to(device)
        self.indices = [index.to(device) for index in indices]
        self.streams = [torch.cuda.Stream(device) for _ in stacks] if device.type == "cuda" else []


def _stacks(blocks: dict[tuple[int, int], int]) -> list[list[tuple[int, int]]]:
    """Group block shapes (m, n), given with their numbers, into stacks that are padded to a common shape."""

    def cost(number: int, m: int, n: int) -> int:
        """Multiplications of the Gram iteration; for square blocks correct up to a factor."""
        return number * m * m * (14 * m + 4 * n)

    stacks: list[list[tuple[int, int]]] = []
    for square in (True, False):
        stack: list[tuple[int, int]] = []
        for shape in sorted((s for s in blocks if (s[0] == s[1]) == square), reverse=True):
            joined = [*stack, shape]
            padded = cost(sum(blocks[s] for s in joined), joined[0][0], max(n for _, n in joined))
            if not stack or padded - sum(cost(blocks[s], *s) for s in joined) > PADDING_LIMIT:
                stack = []
                stacks.append(stack)
            stack.append(shape)
    return stacks


def _matrix_shape(p: Tensor) -> tuple[int, int, int]:
    shape = block_shape(p.shape)
    assert shape is not None
    return shape


def _num_blocks(p: Tensor) -> int:
    return _matrix_shape(p)[0]


def _wide_shape(p: Tensor) -> tuple[int, int]:
    """Rows and columns of the blocks after transposition to wide."""
    _, rows, columns = _matrix_shape(p)
    return min(rows, columns), max(rows, columns)


def _to_blocks(t: Tensor) -> Tensor:
    """View of a weight as its blocks (K, m, n), transposed to wide."""
    count, rows, columns = _matrix_shape(t)
    blocks = t.reshape(count, rows, columns)
    return blocks.mT if rows > columns else blocks
