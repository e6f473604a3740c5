"""Trial of compiled code: compile, compare with eager mode, and return to eager mode with a reason on failure."""

from collections.abc import Callable
from typing import TypeVar

import torch

from dpa4.execution.check import compare_with_eager
from dpa4.execution.limits import tolerance
from dpa4.execution.regions import restore_eager
from dpa4.graph import Graph
from dpa4.messages import warn
from dpa4.potential.potential import Potential

T = TypeVar("T")


class DeviationError(ArithmeticError):
    """Raised if compiled and eager results deviate by more than rounding explains."""


def require_agreement(potential: Potential, graph: Graph) -> dict[str, float]:
    """Compare a compiled potential with its eager form on a graph, in its current mode and precision.

    Returns:
        Largest relative deviations, see `dpa4.execution.check.compare_with_eager`.

    Raises:
        DeviationError: If a deviation is larger than `dpa4.execution.limits.tolerance` or NaN.
    """
    allowed = tolerance(potential)
    found = compare_with_eager(potential, graph)
    # Deviations that are NaN are not smaller than allowed.
    if worse := {name: deviation for name, deviation in found.items() if not deviation <= allowed}:
        mode = "training" if potential.training else "evaluation"
        listed = ", ".join(f"{name} {deviation:.1g}" for name, deviation in worse.items())
        raise DeviationError(
            f"relative deviations from eager mode in {mode}: {listed}; rounding explains at most {allowed:.0g}"
        )
    return found


def attempt(
    potential: Potential,
    work: Callable[[], T],
    give_up: Callable[[Exception], None],
    propagate: tuple[type[Exception], ...] = (torch.OutOfMemoryError,),
) -> T | None:
    """Compile and compare; on any failure return to eager mode and report the reason.

    Args:
        potential: The potential.
        work: Function that compiles the potential and compares it with eager mode, see `require_agreement`.
        give_up: Called with the error after the potential is back in eager mode.
        propagate: Errors to raise instead, as the compiler is not at fault; by default lack of memory, since a later
            graph may be smaller.

    Returns:
        Result of ``work``, or None after a failure.
    """
    try:
        return work()
    except propagate:
        raise
    except Exception as error:
        restore_eager(potential)
        give_up(error)
        return None


def warn_of_eager_mode(error: Exception) -> None:
    """Warn that calculations continue in eager mode, and why."""
    warn(
        "compilation failed, so calculations continue in eager mode: results are correct but slower "
        f"({type(error).__name__}: {str(error)[:500]}); compile=False skips compilation",
        RuntimeWarning,
    )
