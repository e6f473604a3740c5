"""Estimates of the time and memory of a run before it starts, from measured training steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Measured cost of a training step: seconds = max(least, per_edge * edges).

    Attributes:
        least: Time of a step of few edges, in seconds.
        per_edge: Time per edge of the batch, in seconds.
        fixed_bytes: Memory without a batch, in bytes.
        bytes_per_edge: Memory per edge of the batch, in bytes.
        device: Device of the measurement, for the comment.
    """

    least: float
    per_edge: float
    fixed_bytes: float
    bytes_per_edge: float
    device: str


# docs/training.md, "How the recipes were found", has the commands.
# cuda: 12.0 ms for 8 molecules of acetylacetone (paper-neo, 2026-11-30); 43.4 ms and 11.6 GiB for 32 x 64 atoms with
# 56 neighbours, 114,688 edges (paper-air, bfloat16, 2026-11-26, benchmarks/README.md). float32 is taken
# as twice that; paper-neo as two thirds of paper-air.
# cpu: nano, 32 molecules of acetylacetone (5,800 edges), 0.36 s of processor time per step, mean of 4 steps; memory:
# difference to 8 molecules (256 MB); the least time is that of 8 molecules by the same slope, not measured.
COSTS: dict[tuple[str, str], Cost] = {
    ("cuda", "paper-neo"): Cost(0.012, 5.0e-7, 1.0e9, 1.4e5, "one H200"),
    ("cuda", "paper-air"): Cost(0.018, 7.6e-7, 1.0e9, 2.1e5, "one H200"),
    ("cpu", "nano"): Cost(0.09, 6.1e-5, 5.2e8, 5.9e4, "one core of a server"),
}


@dataclass(frozen=True)
class Estimate:
    """Estimate of the time and memory of a run; within a factor of two or three."""

    seconds: float
    bytes: float
    device: str


def estimate_of(mean_edges: float, options: Mapping[str, Any], device: str, network: str) -> Estimate | None:
    """Estimate the time and memory of a run; None for a network whose step has not been timed.

    Args:
        mean_edges: Mean number of edges of a structure.
        options: Options of the run by dotted name.
        device: Kind of device: "cpu" or "cuda".
        network: Name of the preset.
    """
    cost = COSTS.get((device, network))
    if cost is None:
        return None
    edges = options["training.batch_size"] * mean_edges
    seconds = options["training.steps"] * max(cost.least, cost.per_edge * edges)
    return Estimate(seconds, cost.fixed_bytes + cost.bytes_per_edge * edges, cost.device)


def estimate_text(estimate: Estimate | None) -> str:
    """Time and memory of a run in words."""
    if estimate is None:
        return "none, because a step of this network has not been timed"
    hours = estimate.seconds / 3600
    time = (
        f"{hours / 24:.1f} days"
        if hours > 48
        else f"{hours:.1f} h"
        if hours > 1.5
        else f"{hours * 60:.0f} min"
    )
    return (
        f"about {time} and {estimate.bytes / 2**30:.1f} GiB on {estimate.device}; a rough figure from the number of "
        "neighbours, without compilation and validation, which may be wrong by a factor of three"
    )
