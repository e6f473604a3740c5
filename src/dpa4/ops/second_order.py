"""Functions with two derivatives, given as four stages instead of as a derivative of a derivative.

Training on forces asks of a function y = f(p, x) of parameters p and arguments x:

0. y, in the forward pass;
1. g J, given the gradient g of y: the backward pass that yields the forces (J is the Jacobian with respect to x);
2. J c, given the cotangent c of stage 1: the way of the loss from the forces back through stage 1;
3. the derivatives of <c, g J> + <G, y> with respect to p and x, given the gradient G of y.

Stages keep results for later ones. Two ``torch.autograd.Function`` tie them together, so that
``torch.autograd.grad(..., create_graph=True)`` and ``loss.backward()`` work as with any function. In the last
backward pass autograd reaches stage 1 before stage 0: its derivative, stage 2, only hands c on, and stage 3
differentiates both at once, which takes fewer products of matrices than one after the other. A third derivative is
an error.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Maybe = Tensor | None


class FourStages(Protocol):
    """A function in stages.

    Attributes:
        num_inputs: Parameters and arguments, of which some may be None.
        mask: Which inputs stage 1 differentiates with respect to.
        last_mask: Which inputs stage 3 differentiates with respect to.
        once: There are stages 0 and 1 only: one derivative, with respect to the inputs of ``mask``.
    """

    num_inputs: int
    mask: list[bool]
    last_mask: list[bool]
    once: bool

    def run(self, stage: int, given: Sequence[Sequence[Maybe]]) -> tuple[list[Maybe], list[Tensor]]:
        """Results of a stage (None where an input has no influence) and what it keeps for later ones.

        Args:
            stage: 0 to 3.
            given: Inputs, kept of stage 0, g, kept of stage 1, c, kept of stage 2, G; of these the first 2 stage + 1.
        """

    def without_first(self, given: list[list[Maybe]], grads: Sequence[Tensor]) -> list[Maybe]:
        """Results of stage 3 if the loss does not depend on stage 1.

        Args:
            given: Inputs, kept of stage 0.
            grads: G.
        """


def apply(stages: FourStages, inputs: Sequence[Maybe]) -> list[Tensor]:
    """Results of stage 0, differentiable."""
    *results, _ = _Value.apply(_Call(stages), *inputs)
    return results


class _Call:
    """One call: hands what stage 2 found to stage 3 of the same backward pass."""

    def __init__(self, stages: FourStages):
        self.stages = stages
        self.handed: tuple[int, list[list[Maybe]]] | None = None

    def hand_over(self, given: list[list[Maybe]]) -> None:
        self.handed = torch._C._current_graph_task_id(), given

    def take_over(self) -> list[list[Maybe]] | None:
        handed, self.handed = self.handed, None
        return handed[1] if handed is not None and handed[0] == torch._C._current_graph_task_id() else None


class _Value(torch.autograd.Function):
    """Stage 0; its derivative is stage 1, or, in the last backward pass of training, stage 3.

    The last result is empty. It enters stage 1 so that the derivative of that is taken before stage 3.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Maybe) -> tuple[Tensor, ...]:
        inputs = tuple(None if t is None else t.detach().contiguous() for t in inputs)
        results, kept = call.stages.run(0, [inputs])
        token = next(t for t in results if t is not None).new_empty(0)
        ctx.call = call
        ctx.save_for_backward(token, *inputs, *kept)
        return *results, token  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Maybe, ...]:
        call, stages = ctx.call, ctx.call.stages
        token, *saved = ctx.saved_tensors
        inputs, kept = saved[: stages.num_inputs], saved[stages.num_inputs :]
        if stages.once:
            found, _ = stages.run(1, [inputs, kept, grads[:-1]])
            mask = stages.mask
        elif torch.is_grad_enabled():
            found = list(_Vjp.apply(call, token, len(kept), *inputs, *kept, *grads[:-1]))
            mask = stages.mask
        elif not any(stages.last_mask):  # nothing is asked of stage 3
            return (None,) * (1 + stages.num_inputs)
        else:
            given = call.take_over()
            if given is None:
                found = stages.without_first([inputs, kept], grads[:-1])
            else:
                found, _ = stages.run(3, [*given, grads[:-1]])
            mask = stages.last_mask
        rest = iter(found)
        return None, *(next(rest) if m else None for m in mask)


class _Vjp(torch.autograd.Function):
    """Stage 1; its derivative is stage 2 with respect to g, and left to stage 3 with respect to the rest."""

    @staticmethod
    def forward(ctx: Any, call: _Call, token: Tensor, num_kept: int, *tensors: Maybe) -> tuple[Maybe, ...]:
        stages = call.stages
        split = stages.num_inputs, stages.num_inputs + num_kept
        parts = tensors[: split[0]], tensors[split[0] : split[1]], tensors[split[1] :]
        given: list[Sequence[Maybe]] = [*parts]
        results, kept = stages.run(1, given)
        ctx.call, ctx.lengths = call, [len(g) for g in (*given, kept)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(t for group in (*given, kept) for t in group))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Maybe) -> tuple[Maybe, ...]:
        stages, saved = ctx.call.stages, iter(ctx.saved_tensors)
        given = [[next(saved) for _ in range(n)] for n in ctx.lengths]
        given.append(with_zeros(stages, given[0], cotangents))
        found, kept = stages.run(2, given)
        if any(stages.last_mask):  # else stage 3 never comes to take it, and it would keep the graph alive
            ctx.call.hand_over([*given, kept])
        return None, None, None, *[None] * (ctx.lengths[0] + ctx.lengths[1]), *found


def with_zeros(stages: FourStages, inputs: Sequence[Maybe], cotangents: Sequence[Maybe]) -> list[Maybe]:
    """Cotangents of stage 1, with zeros where there are none."""
    like = [t for t, m in zip(inputs, stages.mask, strict=True) if m and t is not None]
    return [torch.zeros_like(t) if c is None else c for c, t in zip(cotangents, like, strict=True)]


def needs_gradient(ctx: Any, count: int) -> list[bool]:
    """Find the first ``count`` inputs of a ``torch.autograd.Function`` that the running backward pass needs.

    ``ctx.needs_input_grad`` only says which inputs can have a gradient at all. The last backward pass of training
    asks for the gradients of the parameters alone, so gradients that lead only to the edge vectors need not be
    computed. PyTorch's own functions skip them by themselves.

    Args:
        ctx: Context of the function, in its ``backward``.
        count: Number of inputs to look at; all of them tensors.
    """
    return [
        needed and _is_executed(node)
        for needed, (node, _) in zip(ctx.needs_input_grad[:count], ctx.next_functions, strict=False)
    ]


def _is_executed(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # raised for leaves passed to `torch.autograd.grad`
        return True
