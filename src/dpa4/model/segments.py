"""Gathers, sums and softmax over the edges that share a node.

The only place where node and edge tensors meet: a fused kernel replaces these three functions.
"""

import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a node tensor for each edge: (N, ...) and (E,) -> (E, ...)."""
    return x.index_select(0, index)


def scatter_sum(x: Tensor, index: Tensor, num_nodes: int) -> Tensor:
    """Sum of edge rows per node: (E, ...) and (E,) -> (num_nodes, ...); nodes without edges get zero."""
    return x.new_zeros((num_nodes, *x.shape[1:])).index_add(0, index, x)


def envelope_softmax(
    logits: Tensor, envelope: Tensor, gate: Tensor, null: Tensor, destination: Tensor, num_nodes: int
) -> Tensor:
    r"""Attention weights that vanish smoothly with the cutoff envelope (model-2 section 8).

    .. math:: \alpha_e = \frac{w_e^2 g_e e^{l_e}}{\zeta + \sum_{e' \to n} w_{e'}^2 g_{e'} e^{l_{e'}}}

    Written with the square root :math:`w e^{(l - M)/2}`, which stays below one and needs neither the logarithm
    of a vanishing envelope nor a division by it in any derivative. The shift M cancels, so it is a constant.

    Args:
        logits: (E, F, H).
        envelope: w, (E,), in [0, 1].
        gate: g, (E,), in [0, 1].
        null: zeta > 0, the weight of attending to nothing, (F, H).
        destination: (E,).
        num_nodes: N.

    Returns:
        (E, F, H); the weights of a node sum to less than one.
    """
    with torch.no_grad():
        log_weight = logits + (2 * envelope.log() + gate.log())[:, None, None]
        start = null.log().to(logits.dtype).expand(num_nodes, *null.shape)
        index = destination[:, None, None].expand_as(log_weight)
        shift = start.scatter_reduce(0, index, log_weight, "amax", include_self=True)
    root = envelope[:, None, None] * torch.exp(0.5 * (logits - gather(shift, destination)))
    weight = root * root * gate[:, None, None]
    total = scatter_sum(weight, destination, num_nodes) + null * torch.exp(-shift)
    return weight / gather(total, destination)
