"""Curves for the picture of a check, and the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpa4.output import new_figure

Array = NDArray[np.float64]
LEAST_DEPTH, DEEPEST = 1.0, 30.0
"""Range of the depths, in eV, to which the axis of energies fits: a tenth of a bond, and somewhat more than any."""
LEAST_HEIGHT, HEIGHT = 5.0, 2.0  # of the wall that is shown: eV, and relative to the depth
GOOD, BAD = "tab:blue", "tab:red"


@dataclass(frozen=True)
class Line:
    """Energy (n,) in eV over distance (n,) in Angstrom, and whether the curve failed."""

    name: str
    distance: Array
    energy: Array
    failed: bool


@dataclass(frozen=True)
class Drawing:
    """Content of the picture.

    Attributes:
        pairs: Curves of pairs.
        triples: Curves of triples.
        inside: Distances between a shell of atoms and the cutoff, in Angstrom.
        response: Change of the forces per displacement at these distances, in eV/Angstrom^2.
        limit: Tolerance of the response.
    """

    pairs: Sequence[Line] = ()
    triples: Sequence[Line] = ()
    inside: Sequence[float] = ()
    response: Sequence[float] = ()
    limit: float = 0.0


def draw(drawing: Drawing) -> Any:
    """Draw the curves of pairs and triples and the response near the cutoff as a matplotlib figure."""
    figure = new_figure(11.0, 3.6)
    left, middle, right = figure.subplots(1, 3)
    _draw_lines(left, drawing.pairs, "pairs", "distance (Å)")
    _draw_lines(middle, drawing.triples, "triples", "shortest distance (Å)")
    right.set_title("near the cutoff", fontsize=10)
    if len(drawing.inside):
        right.loglog(drawing.inside, np.maximum(drawing.response, 1e-6), marker="o", markersize=4, color=GOOD)
        right.axhline(drawing.limit, color=BAD, linestyle="--", linewidth=1)
        right.text(drawing.inside[0], 0.9 * drawing.limit, "tolerance", color=BAD, fontsize=8, va="top")
    right.set_xlabel("distance of a shell from the cutoff (Å)", fontsize=9)
    right.set_ylabel("change of force per displacement (eV/Å²)", fontsize=9)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    return figure


def _draw_lines(axis: Any, lines: Sequence[Line], what: str, label: str) -> None:
    failed = sum(line.failed for line in lines)
    title = f"{what}: {len(lines)} drawn" if lines else f"{what}: not computed"
    axis.set_title(title + (f", {failed} failed (red)" if failed else ""), fontsize=10)
    for line in sorted(lines, key=lambda line: line.failed):
        colour = BAD if line.failed else GOOD
        axis.plot(line.distance, line.energy, color=colour, alpha=0.5, linewidth=0.9)
    axis.axhline(0, color="0.5", linewidth=0.8)
    lowest = min((np.nanmin(line.energy, initial=0.0) for line in lines), default=0.0)
    depth = float(np.clip(-lowest, LEAST_DEPTH, DEEPEST))
    axis.set_ylim(-1.1 * depth, max(LEAST_HEIGHT, HEIGHT * depth))
    axis.set_xlabel(label, fontsize=9)
    axis.set_ylabel("energy (eV)", fontsize=9)
