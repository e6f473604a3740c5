"""Softmax over the edges of a node."""

import torch
from torch import Tensor

from dpa4.kernels.incidence import Incidence
from dpa4.kernels.segments import gather, segment_max, segment_sum


def envelope_softmax(
    logits: Tensor, envelope: Tensor, gate: Tensor, null: Tensor, destination: Incidence
) -> Tensor:
    r"""Attention weights that vanish smoothly with the cutoff envelope (docs/theory.md, "Attention").

    .. math:: \alpha_e = \frac{w_e^2 g_e e^{l_e}}{\zeta + \sum_{e' \to n} w_{e'}^2 g_{e'} e^{l_{e'}}}

    The weight is computed as the square of :math:`w e^{(l - M)/2}`, up to the gate. This root stays below one, and
    its derivatives need neither the logarithm of a vanishing envelope nor a division by the envelope
    (docs/adr/0005). The shift M cancels in the ratio, so it is treated as a constant.

    Args:
        logits: Logits l, (E, F, H).
        envelope: Cutoff envelope w in [0, 1], (E,).
        gate: Freeze gate g in [0, 1], (E,).
        null: Weight zeta > 0 of attending to nothing, (F, H).
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
