"""HybridMuon: orthogonalised momentum for matrices, Adam for the rest (docs/theory.md, "HybridMuon").

Muon replaces the momentum of a matrix by its nearest (semi-)orthogonal matrix, found by Newton-Schulz
iteration, so that every singular direction moves by the same amount. A weight of more than two axes is a
stack of independent matrices, its blocks (the "slice" mode of deepmd-kit). All blocks are processed together
in a few batched matrix products (see ``_Packing``), so the number of kernels does not grow with the number of
parameters, and no step waits for the device.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

Route = Literal["muon", "adam", "adamw"]

# Coefficients a, b, c of X <- aX + bAX + cA^2 X with A = X X^T. Eight steps enlarge small singular values, two
# polish.
SQUARE_COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2

# Polar Express (arXiv:2505.16932). Each map is shrunk by a factor of 1.05, so that rounding cannot push a singular
# value out of range.
_POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
GRAM_COEFFICIENTS = [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in _POLAR_EXPRESS]
GRAM_RESTART = 2  # iteration before which the Gram matrix is recomputed

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


def orthogonalize(blocks: Tensor) -> Tensor:
    """Approximate nearest semi-orthogonal matrix of each block (singular values of about 0.7 to 1.2).

    For square blocks, ten Newton-Schulz steps in bfloat16; for wide ones, five on the Gram matrix in float16.

    Args:
        blocks: (K, m, n) float32 with m <= n; a block of zeros stays zero.

    Returns:
        (K, m, n), bfloat16 for square blocks and float32 for wide ones.
    """
    return _newton_schulz(blocks) if blocks.shape[1] == blocks.shape[2] else _gram_newton_schulz(blocks)


def _newton_schulz(blocks: Tensor) -> Tensor:
    x = blocks.bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in SQUARE_COEFFICIENTS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _gram_newton_schulz(blocks: Tensor) -> Tensor:
    """Newton-Schulz iteration on R = X X^T; the product Q of the steps is applied to X once per restart."""
    x = (blocks / (torch.linalg.vector_norm(blocks, dim=(-2, -1), keepdim=True) + 1e-7)).half()
    product = _half_product(x)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    r, q = product(None, x, x.mT, 0.0), None
    last = len(GRAM_COEFFICIENTS) - 1
    for i, (a, b, c) in enumerate(GRAM_COEFFICIENTS):
        if i == GRAM_RESTART and q is not None:
            x = product(None, q, x, 0.0)
            r, q = product(None, x, x.mT, 0.0), None
        z = product(r, r, r, b, c)
        q = z + a * identity if q is None else product(q, q, z, a)
        if i < last and i + 1 != GRAM_RESTART:
            rz = product(r, r, z, a)
            r = product(rz, z, rz, a)
    assert q is not None
    return product(None, q, x, 0.0).float()


def _half_product(x: Tensor) -> Callable[..., Tensor]:
    """Return a function for beta * C + alpha * A B in float16, accumulated in float32 and rounded once.

    CPUs multiply float16 matrices 5 to 7 times slower than float32 ones (measured). There the product is computed
    in float32, and the result is rounded at the same place (docs/adr/0008).
    """

    def product(c: Tensor | None, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        if x.device.type == "cpu":
            a, b, c = a.float(), b.float(), None if c is None else c.float()
        out = torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
        return out.half()

    return product


def update_magma_score(score: Tensor, dot: Tensor, norms: Tensor) -> Tensor:
    """Update the score of each block and return its step factor, small if gradient and momentum disagree.

    This is "Magma-lite" of HybridMuon.

    Args:
        score: (K,) running average of the agreement between gradient and momentum, updated in place.
        dot: (K,) inner product of momentum and gradient.
        norms: (K,) product of the norms of momentum and gradient.

    Returns:
        (K,) factor of the step, between 0.1 and 1.
    """
    cosine = (dot / norms.clamp(min=1e-12)).clamp(-1, 1)
    low, high = 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))
    agreement = ((torch.sigmoid(0.5 * cosine) - low) / (high - low)).clamp(0, 1)
    score.mul_(0.9).add_(agreement, alpha=0.1)
    return 0.1 + 0.9 * score


class HybridMuon(Optimizer):
    """Muon for matrix weights, AdamW or Adam (no decay) for others, selected by the ``route`` of the group.

    Parameters without a gradient do not change, not even by weight decay.

    Args:
        groups: Parameter groups with the key ``route``; see ``dpa4.training.routing.parameter_groups``.
        lr: Learning rate of all routes.
        momentum: Decay of Muon's (Nesterov) momentum.
        betas: Decays of Adam's moments.
        weight_decay: Decoupled decay of the routes muon and adamw.
        scale: Root mean square of a Muon update before the learning rate; 0.18 is that of Adam in practice.

    Raises:
        ValueError: If a parameter on the route muon is not a matrix.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 1e-3,
        scale: float = 0.18,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
            "scale": scale,
        }
        super().__init__(groups, defaults)
        self._packings: dict[int, _Packing] = {}  # by the index of the group
        for group in self.param_groups:
            for p in group["params"]:
                if group["route"] == "muon" and block_shape(p.shape) is None:
                    raise ValueError(
                        f"route 'muon' needs a matrix, got a parameter of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["route"] != "adam":
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            if group["route"] == "muon":
                self._muon(self._packing(index, params, group["scale"]), group)
            else:
                self._adam(params, group)

    def _adam(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in params if p.grad is not None]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
        mean = [state["exp_avg"] for state in states]
        square = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(mean, gradients, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
        denominator = torch._foreach_div(square, [1 - beta2 ** state["step"] for state in states])
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, 1e-20)
        sizes = [-group["lr"] / (1 - beta1 ** state["step"]) for state in states]
        torch._foreach_addcdiv_(params, mean, denominator, sizes)

    def _muon(self, pack: "_Packing", group: dict[str, Any]) -> None:
        weight = 1 - group["momentum"]
        momentum, gradient, work = pack.momentum, pack.gradient, pack.work
        torch._foreach_copy_(pack.gradients, [p.grad for p in pack.params if p.grad is not None])
        momentum.lerp_(gradient, weight)

        # `pairs` views `work` and `gradient` side by side, so one reduction per shape gives both norms.
        work.copy_(momentum)
        norms = torch.cat([torch.linalg.vector_norm(pair, dim=-1) for pair in pack.pairs], dim=1).prod(0)
        work.mul_(gradient)
        dot = torch.cat([product.sum(-1) for product in pack.products])
        factors = update_magma_score(pack.score, dot, norms)[:, None, None].split(pack.counts)

        torch.lerp(momentum, gradient, weight, out=work)
        updates = []
        for index, scale, factor in zip(pack.indices, pack.scales, factors, strict=True):
            x = orthogonalize(work.take(index).float())
            updates.append(((x * scale).to(x.dtype) * factor.to(x.dtype)).view(-1))
        # The gradient is no longer needed. Its buffer receives the updates, permuted into the order of the weights.
        torch.take(torch.cat(updates).to(gradient.dtype), pack.inverse, out=gradient[:-1])
        torch._foreach_add_(pack.params, pack.gradients, alpha=-group["lr"])

    def _packing(self, index: int, params: list[Tensor], scale: float) -> "_Packing":
        """Packing of a group's ``params``; a new one if other parameters had gradients in the last step."""
        pack = self._packings.get(index)
        if pack is None or pack.key != [id(p) for p in params]:
            pack = self._packings[index] = _Packing(params, self.state, scale)
        return pack

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a loaded or unpickled state. The next step packs its tensors again."""
        super().__setstate__(state)
        self._packings = {}


class _Packing:
    """Flat buffers and stacks of blocks for the weights of a Muon group.

    A buffer holds one weight after the other, so that statistics of the blocks are one reduction per block shape.
    For the orthogonalisation, blocks are gathered from the buffers into a few stacks, transposed to wide and
    padded with zeros, which add nothing to any product. The optimiser state of the weights becomes views of the
    buffers.

    Args:
        params: The weights, of one data type and device.
        state: Optimiser state by parameter; empty entries are initialised.
        scale: Root mean square of an update.

    Attributes:
        params: The weights in the order of the buffers.
        momentum, gradient, work: (P + 1,) buffers; the last entry is the zero used as padding. ``momentum`` is
            allocated separately, because saving a view stores all memory behind it.
        score: (K,) Magma scores of all blocks.
        gradients: Views of ``gradient`` shaped like the weights.
        products: For each shape, the view (k, m n) of ``work``.
        pairs: For each shape, the view (2, k, m n) of ``work`` and ``gradient``.
        indices: For each stack, (k, m, n) positions of its elements in the buffers.
        inverse: (P,) positions of the elements of a buffer in the flattened and concatenated stacks.
        counts: Number of blocks of each stack.
        scales: For each stack, (k, 1, 1) factors from orthogonalised blocks to the root mean square ``scale``.
    """

    def __init__(self, params: list[Tensor], state: dict[Tensor, dict[str, Tensor]], scale: float):
        self.key = [id(p) for p in params]
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[_wide_shape(p)].append(p)
        stacks = _stacks({s: sum(map(_num_blocks, members)) for s, members in by_shape.items()})
        shapes = [shape for stack in stacks for shape in stack]
        self.params = [p for shape in shapes for p in by_shape[shape]]

        dtype, device = params[0].dtype, params[0].device
        sizes = [p.numel() for p in self.params]
        total = sum(sizes)
        self.momentum = torch.zeros(total + 1, dtype=dtype, device=device)
        buffers = torch.zeros(2, total + 1, dtype=dtype, device=device)
        self.work, self.gradient = buffers
        blocks = [_num_blocks(p) for p in self.params]
        self.score = torch.full((sum(blocks),), 0.5, device=device)
        self.gradients = [
            g.view(p.shape) for g, p in zip(self.gradient[:-1].split(sizes), self.params, strict=True)
        ]
        for p, flat, score in zip(
            self.params, self.momentum[:-1].split(sizes), self.score.split(blocks), strict=True
        ):
            momentum = flat.view(p.shape)
            if old := state[p]:
                momentum.copy_(old["momentum_buffer"])
                score.copy_(old["magma_score"])
            state[p].update(momentum_buffer=momentum, magma_score=score)

        lengths = [sum(p.numel() for p in by_shape[shape]) for shape in shapes]
        parts = zip(buffers[:, :-1].split(lengths, dim=1), shapes, strict=True)
        self.pairs = [part.view(2, -1, m * n) for part, (m, n) in parts]
        self.products = [pair[0] for pair in self.pairs]

        positions = dict(zip(self.params, torch.arange(total).split(sizes), strict=True))
        indices, self.counts, self.scales = [], [], []
        for stack in stacks:
            rows, columns = max(m for m, _ in stack), max(n for _, n in stack)
            index, roots = [], []
            for m, n in stack:
                for p in by_shape[m, n]:
                    block = _to_blocks(positions[p].view(p.shape))
                    index.append(F.pad(block, (0, columns - n, 0, rows - m), value=total))
                    roots += [scale * n**0.5] * len(block)
            indices.append(torch.cat(index))
            self.counts.append(len(roots))
            self.scales.append(torch.tensor(roots, device=device)[:, None, None])
        inverse = torch.empty(total + 1, dtype=torch.int64)
        elements = torch.cat([index.view(-1) for index in indices])
        inverse[elements] = torch.arange(len(elements))
        self.inverse = inverse[:-1].to(device)
        self.indices = [index.to(device) for index in indices]


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
