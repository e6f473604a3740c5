"""Files that survive being killed at any moment: checkpoints and logs of a training run."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpa4.system import atomic_write

STATE_FORMAT = 1


def save_state(state: dict[str, Any], path: Path) -> None:
    """Save a training state of tensors and plain Python values."""
    with atomic_write(path) as temporary:
        torch.save({"format": STATE_FORMAT} | state, temporary)


def load_state(path: Path) -> dict[str, Any]:
    """Load a training state onto the CPU.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged, not a training state, or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no training state {path} to resume from; train without --resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a training state: {error}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != STATE_FORMAT:
        raise ValueError(
            f"{path} is a training state of format {found}; this version reads format {STATE_FORMAT}"
        )
    return state


class CsvLog:
    """A CSV file with a row per event, whose first column is the step; every row reaches the file at once.

    Args:
        path: The file.
        columns: Column names; the first is the step.
        resume_step: Keep the rows of an earlier run up to this step and drop later ones; None starts anew.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None = None):
        rows = [] if resume_step is None else [r for r in read_csv(path) if int(r["step"]) <= resume_step]
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; absent columns stay empty."""
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Complete rows of a CSV file written by ``CsvLog``; [] if there is none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A row cut off by a kill has missing fields.
        return [row for row in csv.DictReader(file) if None not in row.values()]
