"""Learning-rate schedules of the published runs (docs/training.md, "Recipes"), and the peak that suits a run."""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console

if TYPE_CHECKING:
    from dpa4.training.options import TrainingOptions

# The measurements are in docs/training.md, "Learning rate". The exponent gives 12,000 steps the rate of the measured
# runs of that length, 2e-3.
HIGHEST_RATE = 1e-2  # better than 4e-3 for 250, 400 and 1000 steps
HIGHEST_STEPS = 1000  # up to which it is used
EXPONENT = 2 / 3
LOWEST_RATE = 1e-3  # upper end of the published runs
SHORT_RUN = 2000  # steps up to which a low rate is warned of; in a longer run it may be a choice


def rate_for(steps: int) -> float:
    """Peak learning rate that suits the number of steps of a run, with two digits; never higher for more steps."""
    rate = HIGHEST_RATE * (HIGHEST_STEPS / steps) ** EXPONENT
    return float(f"{min(max(rate, LOWEST_RATE), HIGHEST_RATE):.2g}")


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


def schedule_of(options: "TrainingOptions", steps: int, console: Console) -> Schedule:
    """Schedule of a run; prints the peak if the number of steps decides on it, and warns if it is low.

    Args:
        options: Options of the run.
        steps: Number of steps of the run.
        console: Console to print to.
    """
    suitable, rate = rate_for(steps), options.learning_rate
    if rate == "auto":
        rate = suitable
        console.print(f"training.learning_rate = {rate}, because the run has {steps} steps", highlight=False)
    elif steps <= SHORT_RUN and rate < suitable / 3:
        console.print(
            f"training.learning_rate = {rate} is low for {steps} steps, so errors will be large at their end; "
            f"training.learning_rate = auto would be {suitable}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    return Schedule(
        options.schedule,
        rate,
        options.final_learning_rate,
        steps,
        int(options.warmup_fraction * steps),
        options.warmup_factor,
        options.decay_fraction,
    )
