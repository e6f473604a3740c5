"""Recipes of fine-tuning: options of a run that starts from a trained model, with the reason of each choice.

Each number has the measurement it comes from (docs/finetuning.md), or says that it is not measured.
"""

from collections.abc import Mapping
from typing import Any

from dpa4.model import ModelConfig
from dpa4.model.presets import closest_preset
from dpa4.training.costs import estimate_of
from dpa4.training.finetuning_options import FINETUNING
from dpa4.training.recipes import (
    NO_LABELS,
    Choice,
    DataSummary,
    Recipe,
    weights_from_labels,
)

OUTPUT = "finetuned"
"""Folder of the run; that of its start is often ``run``."""

_OTHER = "50 structures at another level of theory than the start, preset nano, CPU, 2026-12-01"
_RATE, _WARMUP = FINETUNING["learning_rate"], FINETUNING["warmup_fraction"]
_FEW: dict[str, tuple[Any, str]] = {
    "training.steps": (
        1_200,
        f"the longest measured run: force errors were 107 meV/A after 300 steps and 61 after 1,200 ({_OTHER})",
    ),
    "training.batch_size": (4, f"small batches, hence many steps, as in the measured runs ({_OTHER})"),
    "training.learning_rate": (
        _RATE,
        "a fifth of the best for random weights in short runs. Force errors at 1e-3, 2e-3 and 4e-3: 140, 107 and 94 "
        "meV/A at another level of theory, 195, 204 and 196 for a new molecule at the same one (nano, 300 steps)",
    ),
    "training.warmup_fraction": (
        _WARMUP,
        "steps of the optimiser have a fixed length, so they are short until its averages have formed; other values "
        "are not measured",
    ),
    "training.weight_decay": (
        1e-3,
        "default of the package, used in the measured runs; a larger decay pulls the weights of the start to zero",
    ),
    "training.ema_decay": (
        0.999,
        "the averaged weights are evaluated and saved; they begin as those of the start",
    ),
    "training.energy_weight": (20.0, "default of the package, used in the measured runs"),
    "training.forces_weight": (20.0, "default of the package, used in the measured runs"),
    "data.validation_fraction": (0.2, "a fifth: fewer structures would select the best model at random"),
}
_SOME = _FEW | {
    "training.steps": (4_000, "more structures for longer; not measured"),
    "training.batch_size": (8, "larger batches use the device better; not measured"),
    "data.validation_fraction": (0.1, "a tenth of the structures selects the best model"),
}
_MANY = _SOME | {
    "training.steps": (20_000, "6 passes over 50,000 structures; not measured"),
    "training.batch_size": (16, "larger batches use the device better; not measured"),
    "data.validation_fraction": (0.05, "a twentieth is enough to select the best model"),
}
_MOST = _MANY | {
    "training.steps": (100_000, "3.2 million structures; not measured"),
    "training.batch_size": (32, "batch of the timed training step (benchmarks/README.md)"),
    "data.validation_fraction": (0.01, "a hundredth still holds hundreds of structures"),
}
RECIPES = (
    Recipe(
        200,
        "batch, learning rate, decay and weights of measured runs on 25 to 100 structures (docs/finetuning.md)",
        _FEW,
    ),
    Recipe(2_000, "extrapolated from 25 to 100 structures; not measured itself", _SOME),
    Recipe(50_000, "extrapolated from 25 to 100 structures; not measured itself", _MANY),
    Recipe(None, "extrapolated from 25 to 100 structures; not measured itself", _MOST),
)
"""Ordered by the number of structures, the same on a CPU and on a GPU: the start decides on the network."""


def finetuning_recipe(
    summary: DataSummary, start: ModelConfig, chosen_start: Mapping[str, Any], device: str
) -> Choice:
    """Choose the options of a run that fine-tunes a model.

    Args:
        summary: Properties of the training data.
        start: Configuration of the model.
        chosen_start: Options that name the model, such as ``model.start_from``.
        device: Kind of device: "cpu" or "cuda".
    """
    recipe = next(r for r in RECIPES if r.below is None or summary.structures < r.below)
    chosen = dict(recipe.options) | weights_from_labels(summary)
    batch = min(chosen["training.batch_size"][0], summary.structures)
    if batch < chosen["training.batch_size"][0]:
        chosen["training.batch_size"] = (batch, "not more than there are")
    if summary.structures < 2:
        chosen["data.validation_fraction"] = (0.0, "a single structure cannot be split")
    options = dict(chosen_start) | {name: value for name, (value, _) in chosen.items()} | {"output": OUTPUT}
    source = f"{'' if summary.complete else 'about '}{summary.structures:,} structures: {recipe.source}"
    reasons = {name: reason for name, (_, reason) in chosen.items()}
    reasons["model.elements"] = _elements_text(summary, start, chosen_start)
    estimate = estimate_of(summary.edges, options, device, closest_preset(start).name)
    return Choice(options, reasons, source, estimate, _warnings(summary, start))


def network_text(start: ModelConfig) -> str:
    """Name of the network of a start, for a table."""
    return f"that of the start, closest preset {closest_preset(start).name}"


def _elements_text(summary: DataSummary, start: ModelConfig, chosen_start: Mapping[str, Any]) -> str:
    others = [e for e in start.elements if e not in summary.elements]
    if not others:
        return "the data have all elements of the start"
    names = ", ".join(others) if len(others) <= 10 else f"{len(others)} elements"
    if chosen_start["model.elements"] != "auto":
        return f"{names} of the start, which the data lack, dropped by --drop-elements: a smaller file"
    return f"{names} of the start, which the data lack, kept; a list of the other elements drops them"


def _warnings(summary: DataSummary, start: ModelConfig) -> tuple[str, ...]:
    """Return advice on what the data lack."""
    found = []
    if not any(summary.labels.values()):
        found.append(NO_LABELS)
    if summary.undetermined:
        found.append(
            "the compositions do not determine how the reference energies of "
            f"{', '.join(summary.undetermined)} change one by one; with another level of theory than that of the "
            "start, add structures with other compositions, or give the energies in data.reference_energies"
        )
    if summary.charged and not start.charge_spin:
        found.append("the structures state a charge or spin, which the start ignores")
    if summary.structures < 10:
        found.append(
            f"{summary.structures} structures are few, and their split for validation says little; test the model on "
            "other data (--validation)"
        )
    return tuple(found)
