"""Calibration of a committee: its deviations compared with the errors of its mean on labelled structures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dpa4.data import Frame
from dpa4.output import new_figure, plain_ticks, save_figure, write_json
from dpa4.potential.committee import force_deviations

if TYPE_CHECKING:
    from dpa4.training.errors import FramePrediction

Values = NDArray[np.float64]

FILE = "calibration.json"
BINS = 10  # of equal numbers of values, for the root mean square error as a function of the deviation
PER_BIN = 10  # smallest number of values in one of them
FEW = 30  # values, below which the numbers of a calibration say little
SMALLEST = 1e-3  # meV and Angstrom; smaller values are drawn there, because the axes are logarithmic


class Calibration(NamedTuple):
    """Deviations of a committee and errors of its mean for one quantity, with two numbers that compare them.

    Attributes:
        quantity: "forces" or "energy per atom".
        unit: Unit of deviations and errors.
        deviations: Deviation of the energy per atom of each structure, or of the force on each atom.
        errors: Error of the energy per atom of each structure, or of the force on each atom (its length).
    """

    quantity: str
    unit: str
    deviations: Values
    errors: Values

    @property
    def factor(self) -> float:
        """Root mean square error divided by root mean square deviation; 1 if the deviation is an error bar."""
        spread = float(np.sqrt(np.mean(self.deviations**2)))
        return float(np.sqrt(np.mean(self.errors**2))) / spread if spread else float("inf")

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of deviations and errors; NaN if it is not defined."""
        constant = min(np.ptp(self.deviations), np.ptp(self.errors)) == 0
        return float("nan") if constant else float(spearmanr(self.deviations, self.errors).statistic)

    @property
    def text(self) -> str:
        """The two numbers in words."""
        return _text(self.factor, self.correlation, len(self.errors))


def calibrations(frames: Sequence[Frame], predictions: Sequence["FramePrediction"]) -> list[Calibration]:
    """Compare the deviations of a committee with its errors, for forces and energies that have labels.

    Args:
        frames: Labelled structures that no member was trained on.
        predictions: Their predictions by ``predict_committee``; without deviations there is nothing to compare.
    """
    forces: list[tuple[Values, Values]] = []
    energies: list[tuple[Values, Values]] = []
    for frame, prediction in zip(frames, predictions, strict=True):
        spread = prediction.deviation
        if spread is None:
            continue
        if frame.forces is not None:
            error = np.linalg.norm(prediction.forces - frame.forces, axis=1)
            forces.append((force_deviations(spread.forces), error))
        if frame.energy is not None:
            change = np.array([abs(prediction.energy - frame.energy), spread.energy]) / len(frame)
            energies.append((change[1:], change[:1]))
    found = []
    for quantity, unit, pairs in (("forces", "eV/Å", forces), ("energy per atom", "eV/atom", energies)):
        if pairs:
            deviations, errors = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
            found.append(Calibration(quantity, unit, deviations, errors))
    return found


def write_calibration(found: Sequence[Calibration], folder: Path) -> None:
    """Write calibration.json with the numbers, calibration.png and calibration.svg; earlier ones are removed."""
    for name in (FILE, "calibration.png", "calibration.svg"):
        (folder / name).unlink(missing_ok=True)
    if not found:
        return
    rows = [
        {
            "quantity": one.quantity,
            "values": len(one.errors),
            "factor": one.factor,
            "rank_correlation": one.correlation,
            "rms_error": float(np.sqrt(np.mean(one.errors**2))),
            "rms_deviation": float(np.sqrt(np.mean(one.deviations**2))),
            "unit": one.unit,
        }
        for one in found
    ]
    write_json(folder / FILE, rows)
    figure = new_figure(5 * len(found), 4.6)
    for axis, one in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _draw(axis, one)
    save_figure(figure, folder / "calibration.png", svg=True)


def calibration_lines(folder: Path) -> list[str]:
    """Numbers of the calibration in a folder in words, a line for each quantity; [] if there is none."""
    file = folder / FILE
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [
        f"{row['quantity']}: {_text(row['factor'], row['rank_correlation'], row['values'])}" for row in rows
    ]


def _text(factor: float | None, correlation: float | None, values: int) -> str:
    numbers = map(_number, (factor, correlation))
    few = ", too few to rely on" if values < FEW else ""
    return "error {} x deviation, rank correlation {} ({} values{})".format(*numbers, values, few)


def _number(value: float | None) -> str:
    return "not defined" if value is None or not np.isfinite(value) else f"{value:.2f}"


def _draw(axis: Any, one: Calibration) -> None:
    """Draw errors against deviations, root mean square errors of bins, and the lines of factor 1 and of the fit."""
    deviations, errors = (np.maximum(1e3 * values, SMALLEST) for values in (one.deviations, one.errors))
    few = len(errors) < 500
    axis.plot(deviations, errors, ".", color="C0", alpha=0.6 if few else 0.25, markersize=6 if few else 3,
              markeredgewidth=0, rasterized=not few)  # fmt: skip
    ends = np.array([deviations.min(), deviations.max()])
    axis.plot(ends, ends, color="0.4", linestyle="--", linewidth=1, label="error = deviation")
    defined = np.isfinite(one.factor)  # not if all members are the same model
    if defined:
        axis.plot(
            ends, one.factor * ends, color="C1", linewidth=1.5, label=f"error = {one.factor:.2f} × deviation"
        )
    if bins := len(errors) // PER_BIN:
        parts = np.array_split(np.argsort(deviations), min(BINS, bins))
        middle, rms = ([float(np.sqrt(np.mean(v[p] ** 2))) for p in parts] for v in (deviations, errors))
        axis.plot(
            middle, rms, "o-", color="black", markersize=4, linewidth=1, label="RMS error at this deviation"
        )
    # A few errors are zero by chance, and would stretch the logarithmic axis.
    lowest = max(float(np.quantile(errors, 0.01)), SMALLEST) / 2
    axis.set(
        xscale="log",
        yscale="log",
        xlabel=f"deviation of the committee (m{one.unit})",
        ylabel=f"error of the mean (m{one.unit})",
        title=f"{one.quantity}, rank correlation {_number(one.correlation)}",
        ylim=(lowest, 2 * max(float(errors.max()), one.factor * ends[1] if defined else 0.0)),
    )
    for side in (axis.xaxis, axis.yaxis):
        plain_ticks(side)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize="small")
