"""Learning-rate schedules of the published runs (docs/training.md, "Recipes"), as pure functions of the step."""

import math
from typing import Literal, NamedTuple


class Schedule(NamedTuple):
    """Learning rate as a function of the 0-based step.

    After a linear warm-up from ``warmup_factor * peak`` to ``peak``, ``"cosine"`` decays at once, while ``"wsd"``
    (warm-up, stable, decay) stays at the peak and decays over the last ``decay_fraction`` of *all* steps. Both decay
    to ``final`` along half a cosine. ``"exp"`` decays at once by the same factor in every step.
    """

    kind: Literal["wsd", "cosine", "exp"]
    peak: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_factor: float = 0.2
    decay_fraction: float = 0.65

    def __call__(self, step: int) -> float:
        """Learning rate of a step; ``final`` from ``total_steps`` on."""
        if step < self.warmup_steps:
            return self.peak * (self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps)
        decay = self.total_steps - self.warmup_steps
        if self.kind == "wsd":
            decay = max(1, min(int(self.decay_fraction * self.total_steps), decay))
        progress = (step - self.total_steps + decay) / max(decay, 1)
        progress = min(max(progress, 0.0), 1.0)
        if self.kind == "exp":
            return self.peak * (self.final / self.peak) ** progress
        return self.final + 0.5 * (self.peak - self.final) * (1 + math.cos(math.pi * progress))
