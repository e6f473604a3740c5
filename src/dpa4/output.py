"""Output files: crash-safe writing, CSV, JSON, figures."""

import csv
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; the file there replaces ``path`` unless the block raises.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    # Unique for each thread of each process, so that two writers of the same path do not disturb each other.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this width and height, in inches."""
    # The object interface needs no display. The import takes a second, so it is delayed until here.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, with the y labels of each column aligned."""
    figure.align_ylabels()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


class CsvLog:
    """CSV file with one row per event and the step in the first column; every row is flushed to the file.

    Args:
        path: The file.
        columns: Column names; the first is the step.
        resume_step: Last step whose row of an earlier run is preserved; None starts a new file.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None = None):
        rows = [] if resume_step is None else [r for r in read_csv(path) if int(r[columns[0]]) <= resume_step]
        write_csv(path, columns, rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the complete rows of a CSV file written by ``CsvLog``; [] if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A row that was cut off when the process was killed has missing fields.
        return [row for row in csv.DictReader(file) if None not in row.values()]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file; missing values stay empty."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file; NaN and infinity become null."""
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _finite(content: Any) -> Any:
    """Copy with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, np.ndarray | np.generic):
        return _finite(content.tolist())
    return None if isinstance(content, float) and not np.isfinite(content) else content
