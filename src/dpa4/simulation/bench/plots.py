"""Figures of the benchmarks, in the style of the package."""

from pathlib import Path
from typing import Any

from dpa4.system import atomic_write


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # takes a second to import

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
