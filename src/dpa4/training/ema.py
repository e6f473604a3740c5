"""Exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """Shadow copies of parameters that follow them with an exponential average.

    That of the reference (model-3 section 15) keeps the starting values for about 1/(1 - decay) steps. Here
    the decay grows to its value as (1 + k)/(10 + k) with the number k of updates: short runs profit too.

    Args:
        parameters: What is averaged; the order identifies the shadows.
        decay: Highest weight of the old average at an update.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters = [p.detach() for p in parameters]
        self.decay = decay
        self.shadows = [p.clone() for p in self.parameters]

    def update(self, count: int) -> None:
        """Move the average towards the parameters after an optimiser step; ``count`` steps came before."""
        decay = min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(self.shadows, self.parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the average; afterwards their own values, bit for bit."""
        own = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.shadows)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, own)
