"""Learning-rate schedules: pure functions of the step (model-3 section 14)."""

import math
from typing import Literal, NamedTuple


class Schedule(NamedTuple):
    """Learning rate as a function of the 0-based step.

    Linear warm-up from ``warmup_factor * peak`` to ``peak``. Then ``"wsd"`` (warm-up, stable, decay) keeps
    the peak and falls along half a cosine over the last ``decay_fraction`` of *all* steps; ``"cosine"``
    falls at once.
    """

    kind: Literal["wsd", "cosine"]
    peak: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_factor: float = 0.2
    decay_fraction: float = 0.65

    def __call__(self, step: int) -> float:
        """Learning rate used in a step; ``final`` at and beyond ``total_steps``."""
        if step < self.warmup_steps:
            return self.peak * (self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps)
        decay = self.total_steps - self.warmup_steps
        if self.kind == "wsd":
            decay = max(1, min(int(self.decay_fraction * self.total_steps), decay))
        progress = (step - self.total_steps + decay) / max(decay, 1)
        progress = min(max(progress, 0.0), 1.0)
        return self.final + 0.5 * (self.peak - self.final) * (1 + math.cos(math.pi * progress))
