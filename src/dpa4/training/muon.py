"""HybridMuon: orthogonalised momentum for matrices, Adam for the rest (docs/theory.md, "HybridMuon").

Muon replaces the momentum of a matrix by its nearest (semi-)orthogonal matrix, found by Newton-Schulz
iteration, so that every singular direction moves by the same amount. A weight of more than two axes is a
stack of independent matrices, its blocks (the "slice" mode of deepmd-kit). All blocks are processed together
in a few batched matrix products (see `dpa4.training.packing`), so the number of kernels does not grow with the
number of parameters, and no step waits for the device.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from dpa4.training.packing import AdamPacking, MuonPacking, block_shape, concurrently

Route = Literal["muon", "adam", "adamw"]

Key = tuple[int, ...]
"""Index of a parameter group, and identities of its parameters that have a gradient."""

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

    Without a group of the route muon, the optimiser is AdamW. Parameters without a gradient do not change, not even
    by weight decay.

    ``step`` is `receive`, then `update`. The latter only launches kernels on tensors that stay at their place, so it
    can be recorded as a CUDA graph and replayed as long as `receive` returns the same key.

    Args:
        groups: Parameter groups with the key ``route`` and, optionally, ``rates``, a factor of the learning rate for
            each parameter; see ``dpa4.training.routing.parameter_groups``.
        lr: Learning rate of all routes.
        momentum: Decay of Muon's (Nesterov) momentum.
        betas: Decays of Adam's moments.
        eps: Addition to the denominator of Adam.
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
        eps: float = 1e-20,
        weight_decay: float = 1e-3,
        scale: float = 0.18,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
        }
        super().__init__(groups, defaults)
        self._forget_packings()
        for group in self.param_groups:
            for p in group["params"]:
                if group["route"] == "muon" and block_shape(p.shape) is None:
                    raise ValueError(
                        f"route 'muon' needs a matrix, got a parameter of shape {tuple(p.shape)}"
                    )

    def _forget_packings(self) -> None:
        self._packings: dict[Key, AdamPacking | MuonPacking] = {}
        self._packed: set[int] = set()  # identities of the parameters whose state is in a packing
        self._current: list[tuple[int, AdamPacking | MuonPacking]] = []  # index of the group, and packing
        device = self.param_groups[0]["params"][0].device
        size = len(self.param_groups), 4
        self._streams = [torch.cuda.Stream(device) for _ in self.param_groups[1:] if device.type == "cuda"]
        self._factors = torch.zeros(size, dtype=torch.float64, device=device)
        # Factors that change nothing. 1.0 and True: scale and ``active`` of a step that is not part of a training.
        self._idle = torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=torch.float64).to(device).repeat(size[0], 1)
        self._one, self._true = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.receive()
        self.update(self._one, self._true)

    @torch.no_grad()
    def receive(self) -> tuple[Key, ...]:
        """Copy gradients and options to where `update` reads them; the gradients become views of the copy.

        Returns:
            Key of the parameters that have a gradient.
        """
        rows: list[list[float]] = []
        keys: list[Key] = []
        self._current = []
        for index, group in enumerate(self.param_groups):
            decay = 0.0 if group["route"] == "adam" else group["weight_decay"]
            old, keep = (group["momentum"], 1.0) if group["route"] == "muon" else group["betas"]
            rows.append([-group["lr"], 1 - group["lr"] * decay, 1 - old, keep])
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            key = index, *map(id, params)
            if key not in self._packings:
                self._packings[key] = self._packing(params, group)
            self._packings[key].receive()
            self._current.append((index, self._packings[key]))
            keys.append(key)
        factors = torch.from_numpy(np.array(rows))
        if self._factors.is_cuda:
            factors = factors.pin_memory()  # else the host might wait
        self._factors.copy_(factors, non_blocking=True)
        return tuple(keys)

    def received(self) -> list[Tensor]:
        """Flat buffer of the gradients of each group that `receive` has copied."""
        return [pack.received for _, pack in self._current]

    @torch.no_grad()
    def update(self, scale: Tensor, active: Tensor) -> None:
        """Update the parameters whose gradients `receive` has copied.

        Args:
            scale: () factor of the gradient.
            active: () bool on the device; if false, parameters and state do not change, whatever the gradient is.
        """
        scale = scale.masked_fill(~active, 0.0)
        table = torch.where(active, self._factors, self._idle)

        def update(index: int, pack: AdamPacking | MuonPacking) -> None:
            group, factors = self.param_groups[index], table[index]
            pack.begin(scale)
            if group["route"] != "adam":
                pack.decay(factors[1])
            if isinstance(pack, MuonPacking):
                _muon(pack, factors, active)
            else:
                _adam(pack, factors, active, group)
            pack.end()

        work = [partial(update, *entry) for entry in self._current]
        concurrently(work, self._streams[: len(work) - 1])

    def _packing(self, params: list[Tensor], group: dict[str, Any]) -> AdamPacking | MuonPacking:
        states, borrowed = [self.state[p] for p in params], [id(p) in self._packed for p in params]
        self._packed.update(map(id, params))
        rates = None
        if "rates" in group:
            rate_of = dict(zip(map(id, group["params"]), group["rates"], strict=True))
            rates = [rate_of[id(p)] for p in params]
        if group["route"] == "muon":
            return MuonPacking(params, states, borrowed, group["scale"], rates)
        return AdamPacking(params, states, borrowed, rates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the parameters; options and routes remain those of this optimiser."""
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]
            group.update(options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a loaded or unpickled state. The next step packs its tensors again."""
        super().__setstate__(state)
        self._forget_packings()


def _adam(pack: AdamPacking, factors: Tensor, active: Tensor, group: dict[str, Any]) -> None:
    """Update the weights of a packing by Adam.

    Args:
        pack: The packing.
        factors: (4,) float64: negative learning rate, factor of the weights, weight of the gradient in its mean, and
            factor of the mean square.
        active: () bool; if false, the step is not counted.
        group: The parameter group.
    """
    (beta1, beta2), gradient = group["betas"], pack.gradient
    _, _, weight, keep = factors.to(gradient.dtype).unbind()
    pack.steps.add_(active)
    pack.mean.lerp_(gradient, weight)
    pack.square.mul_(keep).addcmul_(gradient, gradient, value=1 - beta2)
    steps = pack.steps.clamp(min=1)  # zero if not even the first one was active
    corrections = torch.stack([1 - beta2**steps, factors[0] / (1 - beta1**steps)])
    square, size = corrections.to(gradient.dtype)[:, pack.owner]
    denominator = pack.square.div(square).sqrt_().add_(group["eps"])
    step = pack.mean * size
    pack.weight.addcdiv_(step if pack.rate is None else step.mul_(pack.rate), denominator)


def _muon(pack: MuonPacking, factors: Tensor, active: Tensor) -> None:
    """Update the weights of a packing by Muon; arguments as for `_adam`."""
    size, _, weight, _ = factors.to(pack.momentum.dtype).unbind()
    pack.momentum.lerp_(pack.gradient, weight)
    torch.lerp(pack.momentum, pack.gradient, weight, out=pack.work)
    orthogonal = [
        partial(_scaled_orthogonal, pack.work, index, scale)
        for index, scale in zip(pack.indices, pack.scales, strict=True)
    ]
    # The stacks come first, since that of the square blocks is the longest chain of kernels.
    *updates, damping = concurrently([*orthogonal, partial(_magma, pack, active)], pack.streams)
    parts = zip(updates, damping[:, None, None].split(pack.counts), strict=True)
    update = torch.cat([(x * factor.to(x.dtype)).view(-1) for x, factor in parts]).to(pack.work.dtype)
    pack.weight.addcmul_(update.take(pack.inverse), size)


def _scaled_orthogonal(work: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    x = orthogonalize(work.take(index).float())
    return (x * scale).to(x.dtype)


def _magma(pack: MuonPacking, active: Tensor) -> Tensor:
    """Update the scores of all blocks if ``active``; return the factors of their steps, (K,)."""
    # `pairs` views `product` and `gradient` side by side, so one reduction per shape gives both norms.
    pack.product.copy_(pack.momentum)
    norms = torch.cat([torch.linalg.vector_norm(pair, dim=-1) for pair in pack.pairs], dim=1).prod(0)
    pack.product.mul_(pack.gradient)
    dot = torch.cat([product.sum(-1) for product in pack.products])
    score = pack.score.clone()
    damping = update_magma_score(score, dot, norms)
    pack.score.copy_(torch.where(active, score, pack.score))
    return damping
