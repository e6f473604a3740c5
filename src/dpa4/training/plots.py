"""Figures: learning curve and parity plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpa4.output import new_figure, read_csv, save_figure


def plot_parity(data: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], path: Path) -> None:
    """Plot predictions against labels, with histograms of the errors below.

    Args:
        data: Labels and predictions by quantity, named with its unit.
        path: PNG file to write.
    """
    figure = new_figure(4 * len(data), 6)
    axes = figure.subplots(2, len(data), squeeze=False, height_ratios=[2, 1])
    for (name, (label, value)), (top, bottom) in zip(data.items(), axes.T, strict=True):
        error = value - label
        ends = [min(label.min(), value.min()), max(label.max(), value.max())]
        top.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
        top.plot(label, value, ".", markersize=6 if error.size < 1000 else 3, alpha=0.5, markeredgewidth=0)
        top.set(title=name, xlabel="label", ylabel="prediction")
        # Explicit range, because numpy cannot bin errors that are all equal.
        span = 1.05 * max(float(np.abs(error).max()), 1e-9)
        bottom.hist(error, bins=min(100, max(11, error.size // 20)), range=(-span, span))
        bottom.axvline(0, color="0.6", linewidth=1)
        rmse = float(np.sqrt(np.mean(error**2)))
        bottom.set(
            xlabel=f"prediction - label   (MAE {np.abs(error).mean():.3g}, RMSE {rmse:.3g})", yticks=[]
        )
    save_figure(figure, path)


def plot_learning_curve(folder: Path) -> None:
    """Plot loss, errors and learning rate from train.csv and valid.csv of a run to its learning_curve.png."""
    train, valid = read_csv(folder / "train.csv"), read_csv(folder / "valid.csv")
    figure = new_figure(10, 7)
    panels = figure.subplots(2, 2, sharex=True).ravel()

    def curve(panel: Any, rows: list[dict[str, str]], column: str, label: str) -> None:
        points = [(int(r["step"]), float(r[column])) for r in rows if r[column] and float(r[column]) > 0]
        if points:
            panel.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 60 else "")

    curve(panels[0], train, "loss", "training loss")
    curve(panels[0], valid, "score", "validation score")
    for name, unit, panel in (("energy", "meV/atom", panels[1]), ("forces", "meV/Å", panels[2])):
        for kind in ("mae", "rmse"):
            curve(panel, valid, f"{name}_{kind}", f"{name} {kind.upper()} ({unit})")
    for kind in ("mae", "rmse"):
        curve(panels[1], valid, f"virial_{kind}", f"virial {kind.upper()} (meV/atom)")
    curve(panels[3], train, "learning_rate", "learning rate")
    for panel in panels:
        if panel.lines:
            panel.set_yscale("log")
            panel.legend()
        panel.grid(alpha=0.3, which="both")
        panel.set_xlabel("step")
    save_figure(figure, folder / "learning_curve.png")
