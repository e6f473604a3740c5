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
        parameters: The parameters to average, of one data type; their order identifies the shadow copies.
        decay: Largest weight of the old average in an update.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters = [p.detach() for p in parameters]
        self.decay = decay
        # One after the other in a buffer, so that an update is few kernels.
        self._average = torch.cat([p.flatten() for p in self.parameters])
        self._present = self._average.clone()
        self.shadows, self._own = self._views(self._average), self._views(self._present)
        self._weight = torch.zeros_like(self._average[0])  # of the parameters in the next update

    def _views(self, buffer: Tensor) -> list[Tensor]:
        parts = buffer.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def receive(self, count: int) -> None:
        """Set the decay of the next `update`.

        Args:
            count: Number of earlier updates.
        """
        self._weight.fill_(1 - min(self.decay, (1 + count) / (10 + count)))

    def update(self, active: Tensor) -> None:
        """Move the average towards the parameters. The operations can be recorded as a CUDA graph.

        Args:
            active: () bool on the device; if false, the average does not change.
        """
        torch._foreach_copy_(self._own, self.parameters)
        self._average.lerp_(self._present, self._weight * active)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by their average within the block, and restore them bit for bit afterwards."""
        own = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.shadows)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, own)
