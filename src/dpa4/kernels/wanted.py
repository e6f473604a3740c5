"""What a backward pass asks of the functions on its way."""

from typing import Any

import torch


def wanted(ctx: Any, count: int) -> list[bool]:
    """Of which of the first arguments of a ``torch.autograd.Function`` the running backward pass needs the gradient.

    ``ctx.needs_input_grad`` says of which there can be one at all. The last backward pass of training asks for those
    of parameters only, so whatever leads to nothing but the edge vectors need not be computed; PyTorch's own
    functions know that by themselves.

    Args:
        ctx: Context of the function, in its ``backward``.
        count: How many of its arguments; all of them tensors.
    """
    return [
        needed and _is_executed(node)
        for needed, (node, _) in zip(ctx.needs_input_grad[:count], ctx.next_functions, strict=False)
    ]


def _is_executed(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it does not tell of leaves whose gradient `torch.autograd.grad` is asked for
        return True
