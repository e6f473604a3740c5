"""Softmax over the edges that share a node."""

import torch
from torch import Tensor

from dpa4.kernels.incidence import Incidence
from dpa4.kernels.segments import gather, segment_max, segment_sum


def envelope_softmax(
    logits: Tensor, envelope: Tensor, gate: Tensor, null: Tensor, destination: Incidence
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
        destination: Centre of each edge.

    Returns:
        (E, F, H); the weights of a node sum to less than one.
    """
    with torch.no_grad():
        log_weight = logits + (2 * envelope.log() + gate.log())[:, None, None]
        shift = segment_max(log_weight, null.log().to(log_weight.dtype), destination)
    root = envelope[:, None, None] * torch.exp(0.5 * (logits - gather(shift, destination)))
    weight = root * root * gate[:, None, None]
    total = segment_sum(weight, destination) + null * torch.exp(-shift)
    return weight / gather(total, destination)
