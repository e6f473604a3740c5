"""HybridMuon: orthogonalised momentum for matrices, Adam for the rest (model-3 section 13, slice mode).

Muon replaces the momentum of a matrix by its nearest (semi-)orthogonal matrix, found by Newton-Schulz
iteration, so that every singular direction moves by the same amount. A weight of more than two axes is a
stack of independent blocks. Blocks of one shape are processed together as batched matrix products, so the
number of kernels does not grow with the number of parameters, and no step waits for the device.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

Route = Literal["muon", "adam", "adamw"]

# a, b, c of X <- aX + bAX + cA^2 X with A = X X^T: eight steps that enlarge small singular values, two that
# polish.
SQUARE_COEFFICIENTS = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2

# Polar Express (arXiv:2505.16932), each map shrunk by 1.05 so that rounding cannot push a singular value out
# of range.
_POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
GRAM_COEFFICIENTS = [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in _POLAR_EXPRESS]
GRAM_RESTART = 2  # iteration before which the Gram matrix is formed anew


def block_shape(shape: Iterable[int]) -> tuple[int, int, int] | None:
    """Number, rows and columns of the matrix blocks of a weight; axes of size one do not count.

    Returns:
        None for a weight that is a vector or a scalar then.
    """
    sizes = [n for n in shape if n != 1]
    if len(sizes) < 2:
        return None
    count = 1
    for n in sizes[:-2]:
        count *= n
    return count, sizes[-2], sizes[-1]


def orthogonalize(blocks: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each block, approximately (singular values within about 0.7 to 1.2).

    Square blocks take ten Newton-Schulz steps in bfloat16, wide ones five on their Gram matrix in float16.

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
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _gram_newton_schulz(blocks: Tensor) -> Tensor:
    """Newton-Schulz on R = X X^T: the product Q of the steps is applied to X once per restart."""
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
    """beta * C + alpha * A B in float16, accumulated in float32 and rounded once.

    Processors multiply float16 matrices several times slower than float32 ones (measured: 5 to 7 times), so
    there the product is done in float32; the result is rounded at the same place.
    """

    def product(c: Tensor | None, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        if x.device.type == "cpu":
            a, b, c = a.float(), b.float(), None if c is None else c.float()
        out = torch.bmm(a, b) if c is None else torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
        return out.half()

    return product


def update_magma_score(score: Tensor, momentum: Tensor, gradient: Tensor) -> Tensor:
    """Damp blocks whose gradient disagrees with their momentum ("Magma-lite").

    Args:
        score: (K,) running agreement, updated in place.
        momentum: (K, m, n).
        gradient: (K, m, n).

    Returns:
        (K,) factor of the step, between 0.1 and 1.
    """
    dot = (momentum * gradient).sum((-2, -1))
    norms = torch.linalg.vector_norm(momentum, dim=(-2, -1)) * torch.linalg.vector_norm(
        gradient, dim=(-2, -1)
    )
    cosine = (dot / norms.clamp(min=1e-12)).clamp(-1, 1)
    low, high = torch.sigmoid(torch.tensor(-0.5)).item(), torch.sigmoid(torch.tensor(0.5)).item()
    agreement = ((torch.sigmoid(0.5 * cosine) - low) / (high - low)).clamp(0, 1)
    score.mul_(0.9).add_(agreement, alpha=0.1)
    return 0.1 + 0.9 * score


class HybridMuon(Optimizer):
    """Muon for matrix weights, AdamW or Adam (no decay) for the others, by the group's ``route``.

    Parameters without a gradient are left alone, decay included.

    Args:
        groups: Parameter groups with the key ``route``; see ``dpa4.training.routing.parameter_groups``.
        lr: Learning rate; the same for all routes.
        momentum: Decay of Muon's (Nesterov) momentum.
        betas: Decays of Adam's moments.
        weight_decay: Decoupled decay of the routes muon and adamw.
        scale: A Muon update has the root mean square of ``scale`` (0.18, like Adam's in practice).

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
        for group in self.param_groups:
            for p in group["params"]:
                if group["route"] == "muon" and block_shape(p.shape) is None:
                    raise ValueError(
                        f"route 'muon' needs a matrix, got a parameter of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["route"] != "adam":
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            if group["route"] == "muon":
                self._muon(params, group)
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

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for p in params:
            count, rows, columns = _matrix_shape(p)
            by_shape[min(rows, columns), max(rows, columns)].append(p)
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.state[p]["magma_score"] = torch.full((count,), 0.5, device=p.device)
        for (_, columns), members in by_shape.items():
            buffers = [self.state[p]["momentum_buffer"] for p in members]
            scores = [self.state[p]["magma_score"] for p in members]
            gradient = torch.cat([_to_blocks(p.grad) for p in members if p.grad is not None])
            momentum = torch.cat([_to_blocks(b) for b in buffers]).lerp_(gradient, 1 - group["momentum"])
            score = torch.cat(scores)
            factor = update_magma_score(score, momentum, gradient)[:, None, None]
            update = orthogonalize(momentum.lerp(gradient, 1 - group["momentum"]).float())
            update = update * (group["scale"] * columns**0.5) * factor.to(update.dtype)
            counts = [len(s) for s in scores]
            torch._foreach_copy_(scores, list(score.split(counts)))
            torch._foreach_copy_(buffers, _from_blocks(momentum.split(counts), members))
            torch._foreach_add_(
                members, _from_blocks(update.to(gradient.dtype).split(counts), members), alpha=-group["lr"]
            )


def _matrix_shape(p: Tensor) -> tuple[int, int, int]:
    shape = block_shape(p.shape)
    assert shape is not None
    return shape


def _to_blocks(t: Tensor) -> Tensor:
    """A weight as its blocks (K, m, n), transposed to wide."""
    count, rows, columns = _matrix_shape(t)
    blocks = t.reshape(count, rows, columns)
    return blocks.mT if rows > columns else blocks


def _from_blocks(pieces: Iterable[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Invert ``_to_blocks`` for the weights ``like``."""
    out = []
    for blocks, p in zip(pieces, like, strict=True):
        _, rows, columns = _matrix_shape(p)
        out.append((blocks.mT if rows > columns else blocks).reshape(p.shape))
    return out
