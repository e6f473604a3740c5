"""Errors of a model during training, their score, and the comparison of the best model with its start."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpa4.data import Frame
from dpa4.output import read_csv
from dpa4.training.errors import ErrorRow, FramePrediction, error_table
from dpa4.training.loss import Loss

TARGETS = {"energy": "energy per atom", "forces": "forces", "virial": "virial per atom"}
"""Quantity of each term of the loss in a table of errors."""


def errors_of(frames: Sequence[Frame], predictions: Sequence[FramePrediction]) -> dict[str, ErrorRow]:
    """Errors of predictions by term of the loss; terms without labels are absent.

    Args:
        frames: The structures.
        predictions: A prediction for each.
    """
    table = error_table(frames, predictions)
    return {name: row for name, quantity in TARGETS.items() if (row := table.row(quantity))}


def score_of(errors: Mapping[str, ErrorRow], loss: Loss) -> float:
    """Sum of the mean absolute errors, whatever the kind of the loss, with its weights and in its units.

    An absent error is not zero: without it the score is NaN, which is never the best.
    """
    return sum(
        weight * (errors[name].mae / 1e3 if name in errors else math.nan)
        for name in TARGETS
        if (weight := getattr(loss, name))
    )


def columns_of(errors: Mapping[str, ErrorRow]) -> dict[str, float]:
    """MAE and RMSE of each term, named as the columns of the logs."""
    return {f"{name}_{kind}": getattr(row, kind) for name, row in errors.items() for kind in ("mae", "rmse")}


def comparison_with_start(folder: Path) -> str | None:
    """Say whether the best model of a run is better on the validation data than its start, the model of step 0.

    Args:
        folder: Output folder of a run that fine-tunes a model.

    Returns:
        One sentence; None without validation data.
    """
    rows = read_csv(folder / "valid.csv")
    best = [row for row in rows if row["best"] == "1"]
    if not best or rows[0]["step"] != "0":
        return None
    if best[-1] is not rows[0]:
        scores = float(best[-1]["score"]), float(rows[0]["score"])
        return "score of the best model {:.4g}, of its start {:.4g}; lower is better".format(*scores)
    return (
        f"the start is the best model: none of {len(rows) - 1} validations was better, so best.safetensors is the "
        "start with its new reference energies"
    )
