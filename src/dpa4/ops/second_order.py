"""Functions with second derivatives, written as four explicit stages instead of as nested autograd functions.

Training on forces evaluates a function y = f(p, x) of parameters p and arguments x in four stages:

0. y: the forward pass;
1. g J for a gradient g of y, with J the Jacobian with respect to x: the backward pass that yields the forces;
2. J c for a cotangent c of stage 1: the loss propagates from the forces back through stage 1;
3. the derivatives of <c, g J> + <G, y> with respect to p and x, for a gradient G of y: the last backward pass.

Each stage may save results for later stages. Two ``torch.autograd.Function`` classes tie the stages together, so that
``torch.autograd.grad(..., create_graph=True)`` and ``loss.backward()`` work as with any function. The last backward
pass reaches stage 1 before stage 0. The derivative of stage 1, which is stage 2, computes J c and passes its saved
results on; the derivative of stage 0, which is stage 3, then differentiates both terms at once. That takes fewer
matrix products than differentiating them one after the other. A third derivative raises an error.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Maybe = Tensor | None
"""A tensor, or None in place of an input, result or gradient that is missing."""


class FourStages(Protocol):
    """A function in four stages.

    Attributes:
        num_inputs: Number of inputs: parameters and arguments together. An input may be None.
        mask: For each input, whether stage 1 differentiates with respect to it.
        last_mask: For each input, whether stage 3 differentiates with respect to it.
        once: If true, only stages 0 and 1 exist: one derivative, with respect to the inputs of ``mask``.
    """

    num_inputs: int
    mask: list[bool]
    last_mask: list[bool]
    once: bool

    def run(self, stage: int, groups: Sequence[Sequence[Maybe]]) -> tuple[list[Maybe], list[Tensor]]:
        """Run a stage.

        Args:
            stage: Number of the stage, 0 to 3.
            groups: Groups of tensors that exist before the stage, the first 2 stage + 1 of these:

                0. the inputs, p and x;
                1. tensors saved by stage 0;
                2. g, one gradient per result of stage 0;
                3. tensors saved by stage 1;
                4. c, one cotangent per result of stage 1;
                5. tensors saved by stage 2;
                6. G, one gradient per result of stage 0.

                Group 2 stage is what autograd passes to the stage, and group 2 stage + 1 what the stage saves.

        Returns:
            Results of the stage, None where an input has no influence; and the tensors it saves for later stages.
        """

    def without_first(self, groups: list[list[Maybe]], grads: Sequence[Tensor]) -> list[Maybe]:
        """Run stage 3 if the loss does not depend on stage 1, so that stages 1 and 2 did not run.

        Args:
            groups: The inputs, and the tensors saved by stage 0.
            grads: Gradients G of the results of stage 0.
        """


def apply(stages: FourStages, inputs: Sequence[Maybe]) -> list[Tensor]:
    """Evaluate stage 0; its results can be differentiated twice, or once if ``stages.once``."""
    *results, _ = _Value.apply(_Call(stages), *inputs)
    return results


class _Call:
    """State of one call: passes the groups from stage 2 to stage 3 of the same backward pass."""

    def __init__(self, stages: FourStages):
        self.stages = stages
        self.handed: tuple[int, list[list[Maybe]]] | None = None  # backward pass, and groups 0 to 5

    def hand_over(self, groups: list[list[Maybe]]) -> None:
        self.handed = torch._C._current_graph_task_id(), groups

    def take_over(self) -> list[list[Maybe]] | None:
        # Groups of an earlier backward pass, which ended between stages 2 and 3, are dropped.
        handed, self.handed = self.handed, None
        return handed[1] if handed is not None and handed[0] == torch._C._current_graph_task_id() else None


class _Value(torch.autograd.Function):
    """Stage 0; its derivative is stage 1, or stage 3 in the last backward pass of training.

    The last result is an empty tensor, a token. It is an input of stage 1, so that autograd runs the derivative of
    stage 1, which is stage 2, before stage 3.
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
        elif not any(stages.last_mask):  # stage 3 has no results
            return (None,) * (1 + stages.num_inputs)
        else:
            groups = call.take_over()
            if groups is None:
                found = stages.without_first([inputs, kept], grads[:-1])
            else:
                found, _ = stages.run(3, [*groups, grads[:-1]])
            mask = stages.last_mask
        # Results exist only for inputs of the mask; autograd expects one entry per argument of `forward`.
        rest = iter(found)
        return None, *(next(rest) if m else None for m in mask)


class _Vjp(torch.autograd.Function):
    """Stage 1; its derivative with respect to g is stage 2. Stage 3 covers all other derivatives."""

    @staticmethod
    def forward(ctx: Any, call: _Call, token: Tensor, num_kept: int, *tensors: Maybe) -> tuple[Maybe, ...]:
        stages = call.stages
        # Autograd functions have flat arguments: here groups 0 to 2, one after another.
        split = stages.num_inputs, stages.num_inputs + num_kept
        parts = tensors[: split[0]], tensors[split[0] : split[1]], tensors[split[1] :]
        groups: list[Sequence[Maybe]] = [*parts]
        results, kept = stages.run(1, groups)
        ctx.call, ctx.lengths = call, [len(g) for g in (*groups, kept)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(t for group in (*groups, kept) for t in group))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Maybe) -> tuple[Maybe, ...]:
        stages, saved = ctx.call.stages, iter(ctx.saved_tensors)
        groups = [[next(saved) for _ in range(n)] for n in ctx.lengths]  # groups 0 to 3
        groups.append(with_zeros(stages, groups[0], cotangents))
        found, kept = stages.run(2, groups)
        if any(stages.last_mask):  # otherwise stage 3 does not run, and the groups would keep the graph alive
            ctx.call.hand_over([*groups, kept])
        # No gradient for call, token, num_kept and groups 0 and 1; stage 2 is the gradient of group 2.
        return None, None, None, *[None] * (ctx.lengths[0] + ctx.lengths[1]), *found


def with_zeros(stages: FourStages, inputs: Sequence[Maybe], cotangents: Sequence[Maybe]) -> list[Maybe]:
    """Replace missing cotangents of stage 1 by zeros of the shape of the input they belong to."""
    like = [t for t, m in zip(inputs, stages.mask, strict=True) if m and t is not None]
    return [torch.zeros_like(t) if c is None else c for c, t in zip(cotangents, like, strict=True)]


def needs_gradient(ctx: Any, count: int) -> list[bool]:
    """Find out which of a Function's first ``count`` inputs need a gradient in the running backward pass.

    ``ctx.needs_input_grad`` only says which inputs can have a gradient at all. The last backward pass of training
    computes the gradients of the parameters alone, so gradients that lead only to the edge vectors can be skipped.
    PyTorch's own functions skip them automatically.

    Args:
        ctx: Context of the function, in its ``backward``.
        count: Number of inputs to check; all of them tensors.
    """
    return [
        needed and _is_executed(node)
        for needed, (node, _) in zip(ctx.needs_input_grad[:count], ctx.next_functions, strict=False)
    ]


def _is_executed(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # raised for leaves that are inputs of `torch.autograd.grad`
        return True
