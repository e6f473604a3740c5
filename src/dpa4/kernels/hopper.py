"""Whether the kernels in Gluon, which are for Hopper GPUs (H100, H200), can be used."""

import logging
from functools import cache

import torch

_LOG = logging.getLogger(__name__)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is such a GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def on_hopper(device: torch.device) -> bool:
    """Whether they compile and compute on a device; tried once, on a small product.

    Gluon is a part of Triton that still changes. Where it fails, the kernels in plain Triton are used.
    """
    if not is_hopper(device):
        return False
    x, w = (torch.linspace(-1, 1, n * 64, device=device).view(1, n, 64) for n in (128, 64))
    y = torch.empty_like(x)
    try:
        from dpa4.kernels import gluon_matmul, matmul

        pieces = matmul.Pieces(*matmul.split(x, [matmul.Weight(w)]))
        gluon_matmul.matmul_into(y, x, [pieces], None)
        error = float((y.double() - x.double() @ w.double()).abs().max())
        if error < 1e-4:  # sums of 64 terms up to 1, in float32
            return True
        reason = f"a product was wrong by {error:.1g}"
    except Exception as caught:  # whatever a version of Triton raises
        reason = f"{type(caught).__name__}: {caught}"
    _LOG.warning("kernels for Hopper GPUs are not used, the slower ones are: %s", reason)
    return False
