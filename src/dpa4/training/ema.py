"""Exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """Exponential moving average of parameters, held in shadow copies.

    The average of deepmd-kit has a constant decay and contains the initial weights for about 1/(1 - decay) steps.
    Here the decay after k updates is min(decay, (1 + k)/(10 + k)), so that short runs benefit as well.

    Args:
        parameters: The parameters to average; their order identifies the shadow copies.
        decay: Largest weight of the old average in an update.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters = [p.detach() for p in parameters]
        self.decay = decay
        self.shadows = [p.clone() for p in self.parameters]

    def update(self, count: int) -> None:
        """Move the average towards the parameters after an optimiser step.

        Args:
            count: Number of earlier steps.
        """
        decay = min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(self.shadows, self.parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by their average within the block, and restore them bit for bit afterwards."""
        own = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.shadows)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, own)
