"""Figures: PNG and SVG files, plain numbers on logarithmic axes."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from dpa4.output.files import atomic_write

# Colours of a figure that a reader with a dark screen sees otherwise: matplotlib's own for text, frames, grids and
# paper, the greys of lines for reference, and the first colours of its cycle.
_DARK = {
    "#000000": "#e6e6e6",
    "#ffffff": "#1b1b1f",
    "#333333": "#c4c4c4",
    "#666666": "#a8a8a8",
    "#808080": "#9a9a9a",
    "#999999": "#8c8c8c",
    "#b0b0b0": "#5a5a5a",
    "#cccccc": "#4a4a4a",
    "#1f77b4": "#6cb2f0",
    "#ff7f0e": "#ffa64d",
    "#2ca02c": "#63c963",
    "#d62728": "#ff7b72",
    "#9467bd": "#c3a2e8",
    "#8c564b": "#c79a8f",
}


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this width and height, in inches."""
    # The object interface needs no display. The import takes a second, so it is delayed until here.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 150, svg: bool = False) -> None:
    """Write a figure as PNG, with the y labels of each column aligned.

    Args:
        figure: The figure.
        path: File to write.
        dpi: Resolution, in dots per inch.
        svg: Write an SVG file beside the PNG file, too; see ``svg_of``.
    """
    _align_labels(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    if svg:
        with atomic_write(path.with_suffix(".svg")) as temporary:
            temporary.write_bytes(svg_of(figure))


def svg_of(figure: Any) -> bytes:
    """Return a figure as SVG, which is dark on a dark screen (``prefers-color-scheme``).

    The same figure has the same bytes at any time.
    """
    from matplotlib import rc_context

    drawn = io.StringIO()
    _align_labels(figure)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "dpa4"}):
        figure.savefig(drawn, format="svg", dpi=150, metadata=nothing)
    text = drawn.getvalue()
    for number, colour in enumerate(_DARK):
        text = text.replace(colour, f"var(--c{number})")
    light, dark = (
        " ".join(f"--c{number}: {colour};" for number, colour in enumerate(colours))
        for colours in (_DARK, _DARK.values())
    )
    # Text has no colour of its own in the file of matplotlib, and is black then.
    style = (
        f"<style>svg {{ {light} fill: var(--c0); }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    head, end, rest = text.partition(" <defs>")
    return f"{head} {style}\n{end}{rest}".encode()


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis of matplotlib with plain numbers, such as 0.5, 20 and 1000.

    An axis of less than two decades has labels at 1, 2 and 5 times the powers of ten, a longer one at the powers. One
    of less than 0.7 decades, which may lie between two of these numbers, has labels at equal steps.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    elif decades < 2:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,), numticks=8))
    exponents = low < 1e-4  # of all labels, as in 1e-3 and 1e-6

    def text(value: float, _: int) -> str:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if exponents else f"{value:g}"

    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def _align_labels(figure: Any) -> None:
    """Align the y labels in each column of each grid of panels; grids within a grid are independent."""
    grids: dict[int, list[Any]] = {}
    for axes in figure.axes:
        if (place := axes.get_subplotspec()) is not None:
            grids.setdefault(id(place.get_gridspec()), []).append(axes)
    for panels in grids.values():
        figure.align_ylabels(panels)
