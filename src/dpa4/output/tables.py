"""CSV files."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpa4.output.files import atomic_write, naming


class CsvLog:
    """CSV file with one row per event and the step in the first column; every row is flushed to the file.

    Args:
        path: The file.
        columns: Column names; the first is the step.
        resume_step: Last step whose row of an earlier run is preserved; None starts a new file.
        added: Last columns that files of earlier versions lack; they stay empty in the rows of such a file.

    Raises:
        ValueError: If the file of an earlier run has other columns, or a step that is not a number.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], resume_step: int | None = None, added: Sequence[str] = ()
    ):
        rows = [] if resume_step is None else rows_until(path, columns, resume_step, added)
        write_csv(path, columns, rows)
        self._path = path
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty."""
        with naming(self._path):
            self._writer.writerow(row)
            self._file.flush()

    def flush_to_disk(self) -> None:
        """Wait until all rows are on the disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


def rows_until(
    path: Path, columns: Sequence[str], last_step: int, added: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Rows of a file of ``CsvLog`` up to a step, which is in the first column; [] if there is no such file.

    The columns ``added`` may be absent.

    Raises:
        ValueError: If the file has other columns, or a step that is not a number.
    """
    rows = read_csv(path)
    if rows and list(rows[0]) not in ([*columns], [name for name in columns if name not in added]):
        raise ValueError(f"{path} is damaged: its columns are not {', '.join(columns)}; restore or remove it")
    try:
        return [row for row in rows if int(row[columns[0]]) <= last_step]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore or remove it") from None


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
