"""Trial run of the CUDA kernels on a device before they are used."""

import logging
from functools import cache

import torch
from torch import Tensor

from dpa4.ops.hopper.so2_stack import CHANNELS, EDGES, LAYOUT, pack, value, vjp

_LOG = logging.getLogger(__name__)


@cache
def whole_stacks_work(device: torch.device) -> bool:
    """Return whether the kernels compile and give right results on a device; tried once, on a small stack."""
    with torch.utils._python_dispatch._disable_current_modes():
        try:
            if (error := _error(device)) < 1e-4:  # the rounding of float32 is about 1e-6
                return True
            reason = f"results were wrong by {error:.1g}"
        except (OSError, RuntimeError) as caught:  # no compiler, or one of another version
            reason = f"{type(caught).__name__}: {caught}"
    _LOG.warning(
        "the CUDA kernels for whole stacks of SO(2) layers are not used, slower kernels run: %s", reason
    )
    return False


def _error(device: torch.device) -> float:
    """Error of two layers and their derivative relative to float64 on a CPU, in units of the largest entry."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng) * shape[-2] ** -0.5

    c, l, width = CHANNELS, LAYOUT.lmax, LAYOUT.total * CHANNELS
    x, g, *gates = normal(1, EDGES + 1, width), normal(1, EDGES + 1, width), normal(1, c, l * c)
    zeros, us, vs = ([normal(1, n, n) for _ in range(2)] for n in ((l + 1) * c, l * c, l * c))
    ones = [torch.cat([torch.cat(w, -1), torch.cat([-w[1], w[0]], -1)], 1) for w in zip(us, vs, strict=True)]
    matrices = [w for pair in zip(zeros, ones, strict=True) for w in pair]
    wide = [[t.double() for t in tensors] for tensors in (matrices, gates)]
    y, *us = torch.ops.dpa4.so2_value(x.double(), *wide, [], *LAYOUT, False)
    expected = [y, *torch.ops.dpa4.so2_vjp(g.double(), us, *wide, [], *LAYOUT, False)]
    (x, g), matrices, gates = ([t.to(device) for t in tensors] for tensors in ((x, g), matrices, gates))
    with torch.no_grad():
        y, *kept = value(x, pack(matrices, gates, backward=False), keep=True)
        found = [y, vjp(g, kept, pack(matrices, gates, backward=True))]
    return max(float((f.cpu() - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))
