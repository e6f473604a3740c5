"""Optimiser of a run, from its options."""

from dpa4.potential import Potential
from dpa4.training.muon import HybridMuon
from dpa4.training.options import TrainingOptions
from dpa4.training.routing import parameter_groups


def optimizer_of(options: TrainingOptions, potential: Potential, rate: float) -> HybridMuon:
    """Optimiser of the parameters of a potential, at a learning rate that a schedule changes later."""
    groups = parameter_groups(potential.model, adam_for_basis=options.adam_for_basis)
    if options.optimizer == "hybrid_muon":
        return HybridMuon(groups, rate, weight_decay=options.weight_decay)
    for group in groups:
        group["route"] = "adam" if group["route"] == "adam" else "adamw"
    return HybridMuon(groups, rate, weight_decay=options.weight_decay, eps=1e-8)
