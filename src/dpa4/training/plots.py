"""Figures: learning curve and parity plot."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpa4.output import new_figure, plain_text, plain_ticks, read_csv, save_figure, short
from dpa4.training.logs import ERROR_UNITS

Array = NDArray[np.float64]

MANY = 2000  # points of a panel from which they are an image in an SVG file, not shapes
GROUPS = 18  # colours of groups
OTHERS = "0.6"  # colour of the groups without one of their own
PERCENTILES = ((50, ":"), (90, "-."), (99, "--"))


TERM_UNITS = {"energy": "eV/atom", "forces": "eV/Å", "virial": "eV/atom"}  # with a loss of kind mae
TIME_UNITS = (("s", 1.0), ("min", 60.0), ("h", 3600.0))


class ParityPanel(NamedTuple):
    """Labels and predictions of one quantity.

    Attributes:
        name: Name of the quantity.
        unit: Unit of labels and predictions.
        label: Labels (n,).
        prediction: Predictions (n,).
        structure: Number of the structure of each entry (n,).
    """

    name: str
    unit: str
    label: Array
    prediction: Array
    structure: NDArray[np.int64]


def plot_parity(panels: Sequence[ParityPanel], groups: Sequence[str], title: str, path: Path) -> None:
    """Plot predictions against labels, coloured by group, with histograms of the absolute errors below.

    Args:
        panels: Quantities.
        groups: Group of each structure.
        title: Title of the figure.
        path: PNG file to write; an SVG file is written beside it.
    """
    names = [name for name, _ in Counter(groups).most_common()]
    shown = names if len(names) <= GROUPS else names[: GROUPS - 1]
    group = np.array([shown.index(name) if name in shown else len(shown) for name in groups])
    legend = -(-min(len(names), GROUPS) // 5) if len(names) > 1 else 0  # lines
    figure = new_figure(max(4.3 * len(panels), 5.2), 7.2 + 0.25 * legend)
    axes = figure.subplots(2, len(panels), squeeze=False, height_ratios=[4.2, 2])
    for panel, (top, bottom) in zip(panels, axes.T, strict=True):
        _scatter(top, panel, group[panel.structure], len(shown))
        _histogram(bottom, panel)
    axes[0, 0].set_ylabel("prediction")
    axes[1, 0].set_ylabel("number of values")
    figure.suptitle(plain_text(title), fontsize=11)
    if legend:
        entries = [*shown, f"{len(names) - len(shown)} other groups"] if len(shown) < len(names) else shown
        handles = [
            top.plot([], [], "o", markersize=5, color=_colour(number, len(shown)))[0]
            for number, _ in enumerate(entries)
        ]
        labels = [plain_text(entry) or "without a group" for entry in entries]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(entries)), fontsize=8)
    save_figure(figure, path, svg=True)


def _scatter(axis: Any, panel: ParityPanel, group: NDArray[np.int64], count: int) -> None:
    """Draw a square panel of predictions against labels."""
    both = np.concatenate([panel.label, panel.prediction])
    margin = 0.04 * max(float(np.ptp(both)), 1e-6)
    ends = [float(both.min()) - margin, float(both.max()) + margin]
    axis.plot(ends, ends, color="0.6", linewidth=1, zorder=0)
    for number in range(count + 1):  # large groups first, so that they hide no small one
        chosen = group == number
        if chosen.any():
            axis.plot(
                panel.label[chosen], panel.prediction[chosen], "o", markersize=3 if both.size < 4000 else 2,
                alpha=0.6, markeredgewidth=0, color=_colour(number, count), rasterized=both.size > MANY,
            )  # fmt: skip
    axis.set(xlim=ends, ylim=ends, xlabel=f"label ({panel.unit})", aspect="equal")
    axis.set_title(panel.name.replace(", ", ",\n"), fontsize=10)
    axis.locator_params(nbins=6)
    axis.yaxis.set_major_locator(axis.xaxis.get_major_locator())  # the same numbers on both sides
    axis.grid(alpha=0.3)


def _histogram(axis: Any, panel: ParityPanel) -> None:
    """Draw how often absolute errors of each size occur, and their percentiles; both scales are logarithmic."""
    error, unit = np.abs(panel.prediction - panel.label), panel.unit
    if not unit.startswith("m"):
        error, unit = 1e3 * error, f"m{unit}"
    largest = max(float(error.max()), 1e-9)
    smallest = max(float(error.min()), 1e-5 * largest)
    bins = np.geomspace(smallest, largest * 1.0001, min(50, max(15, error.size // 20)))
    axis.hist(error.clip(smallest), bins=bins, color="C0", alpha=0.6)
    for percent, style in PERCENTILES:
        place = max(float(np.percentile(error, percent)), smallest)
        axis.axvline(
            place, color="C3", linewidth=1.2, linestyle=style, label=f"{percent} % below {short(place)}"
        )
    rmse = float(np.sqrt(np.mean(error**2)))
    axis.set(xscale="log", yscale="log", xlabel=f"absolute error ({unit})")
    axis.set_title(f"MAE {short(error.mean())}, RMSE {short(rmse)}, max {short(largest)} {unit}", fontsize=9)
    top = axis.get_ylim()[1]
    axis.set_ylim(0.7, max(top, 2) ** 1.6)  # room for the legend
    axis.legend(fontsize=8, loc="upper left", framealpha=0.7)
    for side in (axis.xaxis, axis.yaxis):
        plain_ticks(side)


def _colour(number: int, count: int) -> str | tuple[float, ...]:
    """Colour of a group; beyond the last one that of all others."""
    from matplotlib import colormaps

    if number >= count and count:
        return OTHERS
    if count <= 7:
        return f"C{number}"  # before the grey of the cycle
    return colormaps["tab20"](number if number < 14 else number + 2)  # without the greys


def plot_learning_curve(folder: Path) -> None:
    """Plot train.csv and valid.csv of a run to its learning_curve.png."""
    save_figure(draw_learning_curve(folder), folder / "learning_curve.png", dpi=120)


def draw_learning_curve(folder: Path) -> Any:
    """Draw the errors of a run on training and validation data, its loss, gradient norm and learning rate.

    Args:
        folder: Folder with train.csv and valid.csv.
    """
    train, valid = read_csv(folder / "train.csv"), read_csv(folder / "valid.csv")
    figure = new_figure(12.5, 7)
    quantities = [q for q in ERROR_UNITS if _points(train, f"{q}_mae") or _points(valid, f"{q}_mae")]
    quantities = quantities or ["energy", "forces"]
    grid = figure.add_gridspec(2, 12, height_ratios=[3, 2])
    width = 12 // len(quantities)
    upper = [figure.add_subplot(grid[0, k * width : (k + 1) * width]) for k in range(len(quantities))]
    lower = [figure.add_subplot(grid[1, 3 * k : 3 * k + 3], sharex=upper[0]) for k in range(4)]
    for axis, quantity in zip(upper, quantities, strict=True):
        _errors(axis, quantity, train, valid)
    _curve(lower[0], train, "loss")
    for term, unit in TERM_UNITS.items():
        _curve(lower[1], train, term, label=f"{term} ({unit})")
    _curve(lower[2], train, "gradient_norm")
    _curve(lower[3], train, "learning_rate", marker="")
    titles = ("training loss", "its terms, without weights", "gradient norm", "learning rate")
    if lower[1].lines:
        low, high = lower[1].dataLim.intervaly
        lower[1].set_ylim(low / 1.5, high * 8)  # room for the legend
    last = max([step for row in [*train, *valid] if (step := _number(row, "step"))], default=1)
    for axis, title in zip(lower, titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis in (*upper, *lower):
        axis.set(xlim=(0, last), xlabel="step")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.set_yscale("log")
            plain_ticks(axis.yaxis)
            if any(not line.get_label().startswith("_") for line in axis.lines):
                axis.legend(fontsize=8, loc="upper right")  # errors fall
    _time_axes(upper, train)
    return figure


def _errors(axis: Any, quantity: str, train: list[dict[str, str]], valid: list[dict[str, str]]) -> None:
    """Draw the MAE of training and validation data, and mark the model that is kept as best.safetensors."""
    column = f"{quantity}_mae"
    _curve(axis, train, column, label="training", color="C0", linewidth=1, markersize=3)
    _curve(axis, valid, column, label="validation", color="C1", linewidth=2)
    best = [row for row in valid if row.get("best") == "1"][-1:]
    if points := _points(best, column):
        label = f"chosen model: {short(points[0][1])}"  # by all errors together, so not always the lowest of these
        axis.plot(*points[0], "*", color="C3", markersize=12, label=label, zorder=4, clip_on=False)
    axis.set_title(f"{quantity}: MAE ({ERROR_UNITS[quantity]})", fontsize=10)


def _curve(axis: Any, rows: list[dict[str, str]], column: str, **style: Any) -> None:
    if points := _points(rows, column):
        axis.plot(
            *zip(*points, strict=True), **{"marker": "." if len(points) < 60 else "", "linewidth": 1} | style
        )


def _points(rows: list[dict[str, str]], column: str) -> list[tuple[float, float]]:
    """Step and value of the rows with a positive value, which a logarithmic scale can show.

    Entries that are not numbers, such as those of another program, are left out.
    """
    return [
        (x, y) for r in rows if (x := _number(r, "step")) is not None and (y := _number(r, column) or 0) > 0
    ]


def _number(row: dict[str, str], column: str) -> float | None:
    """Number in a column; None if there is none."""
    try:
        return float(row[column])
    except (KeyError, ValueError):
        return None


def _time_axes(panels: Sequence[Any], train: list[dict[str, str]]) -> None:
    """Add the training time as a second axis above panels."""
    seconds = _points(train, "seconds")
    if not seconds:
        return
    unit, size = next(
        entry for entry in TIME_UNITS if seconds[-1][1] < entry[1] * 200 or entry is TIME_UNITS[-1]
    )
    steps, times = np.array([(0, 0.0), *seconds]).T
    times = np.maximum.accumulate(times / size) + 1e-9 * np.arange(len(times))  # ascending, to be invertible
    steps, times = np.append(steps, 2 * steps[-1]), np.append(times, 2 * times[-1])
    for axis in panels:
        upper = axis.secondary_xaxis(
            "top", functions=(lambda x: np.interp(x, steps, times), lambda t: np.interp(t, times, steps))
        )
        upper.set_xlabel(f"training time ({unit})", fontsize=8)
        upper.tick_params(labelsize=8)
        upper.xaxis.get_major_locator().set_params(nbins=5)
