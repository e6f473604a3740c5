"""Exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """Shadow copies of parameters, started at their first values and never bias-corrected (model-3 15).

    Args:
        parameters: What is averaged; the order identifies the shadows.
        decay: Weight of the old average at each update.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters = [p.detach() for p in parameters]
        self.decay = decay
        self.shadows = [p.clone() for p in self.parameters]

    def update(self) -> None:
        """Move the average towards the parameters; call after each optimiser step."""
        torch._foreach_lerp_(self.shadows, self.parameters, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the average; afterwards their own values, bit for bit."""
        own = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.shadows)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, own)
