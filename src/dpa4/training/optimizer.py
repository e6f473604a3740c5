"""Optimiser of a run, from its options."""

from collections.abc import Sequence
from typing import Any

from dpa4.training.muon import HybridMuon
from dpa4.training.options import TrainingOptions


def optimizer_of(options: TrainingOptions, groups: Sequence[dict[str, Any]], rate: float) -> HybridMuon:
    """Optimiser of the groups of `dpa4.training.routing`, at a learning rate that a schedule changes later."""
    if options.optimizer == "hybrid_muon":
        return HybridMuon(groups, rate, weight_decay=options.weight_decay)
    for group in groups:
        group["route"] = "adam" if group["route"] == "adam" else "adamw"
    return HybridMuon(groups, rate, weight_decay=options.weight_decay, eps=1e-8)
