"""Resumable runs over many items: every result is saved at once, and a later call continues the run."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from dpa4.output import atomic_write
from dpa4.simulation.runs.progress import progress_bar
from dpa4.system import stop_requests

Record = dict[str, Any]
T = TypeVar("T")

SETTINGS = "settings.json"


class Interrupted(Exception):
    """Ctrl-C was pressed during the computation of an item, whose result is discarded."""


class Progressed(NamedTuple):
    """State of a run after a call."""

    done: int  # items with a result, including earlier calls
    failed: int  # items whose last attempt failed
    interrupted: bool
    reason: str = ""  # of the first failure


class Records:
    """Results by name in a file of JSON lines.

    Every line reaches the file at once. An incomplete last line, left by a kill, is dropped. All files
    ``{name}*.jsonl`` of the folder are read, but only ``{name}{part}.jsonl`` is written. Several processes may thus
    share a folder, each with a part of its own. Failures are records with an ``error``; they do not count as done.

    Args:
        folder: Folder; created if it does not exist.
        settings: Everything the results depend on.
        name: Name of the results, the beginning of the file names.
        part: Ending of the name of the file to write, different for each process.

    Attributes:
        done: Names of the items with a result.

    Raises:
        ValueError: If the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: Record, name: str = "results", part: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SETTINGS).exists():
            check_settings(settings, read_settings(folder), folder)
        else:
            write_json(folder / SETTINGS, settings)
        self._places: dict[str, tuple[Path, int]] = {}  # last line of each item
        self.done: set[str] = set()
        own = folder / f"{name}{part}.jsonl"
        for path in sorted(folder.glob(f"{name}*.jsonl")):
            self._read(path, repair=path == own)
        self._own, self._file = own, own.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        """Number of items with a record, failures included."""
        return len(self._places)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the items with a record, failures included, in the order of their first records."""
        return tuple(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[Record]:
        """Last record of every item, in the order of ``names``."""
        return map(self.__getitem__, self.names)

    def __getitem__(self, name: str) -> Record:
        """Last record of an item.

        Raises:
            KeyError: If the item has no record.
        """
        path, offset = self._places[name]
        with path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def append(self, record: Record) -> None:
        """Save a record; its ``id`` is the name of the item."""
        offset = self._file.tell()
        self._file.write(json.dumps(record, default=_plain).encode() + b"\n")
        self._file.flush()
        self._note(record, self._own, offset)

    def _read(self, path: Path, repair: bool) -> None:
        """Note the records of a file; ``repair`` removes an incomplete last line from it."""
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._note(json.loads(line), path, offset)
                offset += len(line)
        if repair and offset < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(offset)

    def _note(self, record: Record, path: Path, offset: int) -> None:
        """Remember the position of a record; a failure does not replace a result."""
        name = record["id"]
        if "error" not in record:
            self.done.add(name)
        elif name in self.done:  # from another process
            return
        self._places[name] = path, offset


def run_items(
    items: Iterable[tuple[str, T]],
    total: int,
    compute: Callable[[T, list[int]], Record],
    records: Records,
    *,
    title: str,
    progress: bool,
) -> Progressed:
    """Compute and save every item that has no result yet; Ctrl-C stops after the current item.

    An item that raises ``ValueError``, ``RuntimeError`` or ``ArithmeticError`` is recorded as a failure. The next
    call tries it again.

    Args:
        items: Name and input of each item.
        total: Number of items, for the progress bar.
        compute: Returns the record of an item, without ``id`` and ``seconds``. Its second argument is a list that is
            not empty after Ctrl-C; ``compute`` may then raise ``Interrupted`` to stop before the item is finished.
        records: Receives the results.
        title: Text beside the progress bar.
        progress: Show a progress bar if the output is a terminal.

    Returns:
        Numbers of finished and failed items, earlier calls included.

    Raises:
        ValueError: If two items have the same name.
    """
    names: set[str] = set()
    interrupted = False
    with stop_requests() as stopped, progress_bar(title, total, show=progress) as bar:
        for name, item in items:
            if name in names:
                raise ValueError(f"two structures have the name {name!r}; names must be unique")
            names.add(name)
            if name not in records.done:
                if stopped:
                    interrupted = True
                    break
                bar.update(bar.task_ids[0], status=name)
                start = time.monotonic()
                try:
                    record = compute(item, stopped)
                except Interrupted:
                    interrupted = True
                    break
                except (ValueError, RuntimeError, ArithmeticError) as error:
                    record = {"error": f"{type(error).__name__}: {error}"}
                records.append({"id": name, "seconds": round(time.monotonic() - start, 3)} | record)
            bar.advance(bar.task_ids[0])
    failed = sorted(name for name in names - records.done if name in records)
    reason = f"{failed[0]}: {records[failed[0]]['error']}" if failed else ""
    return Progressed(len(names & records.done), len(failed), interrupted, reason)


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


def read_settings(folder: Path) -> Record:
    """Settings of the run in a folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {folder}: {path} does not exist")
    return json.loads(path.read_text(encoding="utf-8"))


def check_settings(settings: Record, found: Record, folder: Path) -> None:
    """Refuse to continue a run with other settings.

    Args:
        settings: Settings of this call.
        found: Settings of the results in the folder, as read from JSON.
        folder: Folder, for the message.

    Raises:
        ValueError: If the settings differ.
    """
    settings = json.loads(json.dumps(settings, default=_plain))
    for name in {**found, **settings}:
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"{name} = {settings.get(name)!r}, but {folder} holds results with {name} = {found.get(name)!r}; "
                "choose another folder"
            )


def _plain(value: Any) -> Any:
    """Convert NumPy values to Python's, for JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(content: Any) -> Any:
    """Copy with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, np.ndarray | np.generic):
        return _finite(content.tolist())
    return None if isinstance(content, float) and not np.isfinite(content) else content
