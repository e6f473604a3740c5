"""Resumable runs over many items: the result of each item is saved at once, and a later call continues the run."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from dpa4.output import OutputFolder, naming, write_json
from dpa4.progress import ProgressBar
from dpa4.system import stop_requests

Record = dict[str, Any]
T = TypeVar("T")

SETTINGS = "settings.json"  # file in the folder of a run: everything its results depend on


class ItemInterrupted(Exception):
    """Signal to ``run_items`` that Ctrl-C ended the computation of an item before its result; caught there."""


class RunState(NamedTuple):
    """State of a run at the end of a call."""

    done: int  # items with a result, including earlier calls
    failed: int  # items whose last attempt failed
    interrupted: bool
    reason: str = ""  # name and error of the first failed item


class Records:
    """Results of the items of a run, in a file with one JSON object per line.

    Each record is written to the file at once. An incomplete last line, left behind by a killed process, is removed.
    A failed item has a record with the key ``error`` and does not count as done.

    Args:
        folder: Folder of the run, created if absent.
        settings: Everything the results depend on.
        name: Name of the file, without its ending ``.jsonl``.
        anew: Remove the results of an earlier run in the file, if there is one.

    Attributes:
        path: The file.
        done: Names of the items with a result.

    Raises:
        BlockingIOError: If another process is working in the folder.
        ValueError: If the folder holds results of other settings, or the file is damaged.
    """

    def __init__(self, folder: Path, settings: Record, name: str = "results", anew: bool = False):
        self._folder = OutputFolder(folder)
        self._offsets: dict[str, int] = {}  # first byte of the last record of each item
        self.done: set[str] = set()
        self.path = folder / f"{name}.jsonl"
        try:
            if anew:
                self.path.unlink(missing_ok=True)
                own = (folder / SETTINGS).exists() and read_settings(folder).get("task") == settings.get(
                    "task"
                )
                if own and not any(folder.glob("*.jsonl")):  # other results have the settings, too
                    (folder / SETTINGS).unlink()
            if (folder / SETTINGS).exists():
                check_settings(settings, read_settings(folder), folder)
            else:
                write_json(folder / SETTINGS, settings)
            if self.path.exists():
                self._read()
            self._file = self.path.open("ab")
        except BaseException:
            self._folder.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with naming(self.path):
                self._file.close()
        finally:
            self._folder.close()

    def __len__(self) -> int:
        """Number of items with a record, failures included."""
        return len(self._offsets)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the items with a record, failures included, in the order of their first records."""
        return tuple(self._offsets)

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def __iter__(self) -> Iterator[Record]:
        """Last record of every item, in the order of ``names``."""
        return map(self.__getitem__, self.names)

    def __getitem__(self, name: str) -> Record:
        """Last record of an item.

        Raises:
            KeyError: If the item has no record.
        """
        with self.path.open("rb") as file:
            file.seek(self._offsets[name])
            return json.loads(file.readline())

    def append(self, record: Record) -> None:
        """Save a record; its ``id`` is the name of the item."""
        offset = self._file.tell()
        with naming(self.path):
            self._file.write(json.dumps(record, default=_plain).encode() + b"\n")
            self._file.flush()
        self._note(record, offset)

    def _read(self) -> None:
        """Note the records in the file, and remove an incomplete last line from it."""
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._note(self._parsed(line, offset), offset)
                offset += len(line)
        if offset < self.path.stat().st_size:
            os.truncate(self.path, offset)

    def _parsed(self, line: bytes, offset: int) -> Record:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("id"), str):
                return record
        except ValueError:
            pass
        raise ValueError(
            f"{self.path} is damaged: there is no result at byte {offset}; restore the file, or start again in "
            "another folder"
        )

    def _note(self, record: Record, offset: int) -> None:
        """Remember the position of a record; a failure does not replace a result."""
        name = record["id"]
        if "error" not in record:
            self.done.add(name)
        elif name in self.done:
            return
        self._offsets[name] = offset


def run_items(
    items: Iterable[tuple[str, T]],
    total: int,
    compute: Callable[[T, list[int]], Record],
    records: Records,
    *,
    title: str,
    progress: bool,
) -> RunState:
    """Compute and save every item that has no result yet; Ctrl-C stops after the current item.

    An item that raises ``ValueError``, ``RuntimeError`` or ``ArithmeticError`` is recorded as a failure. The next
    call tries it again.

    Args:
        items: Name and input of each item.
        total: Number of items, for the progress bar.
        compute: Returns the record of an item, without ``id`` and ``seconds``. Its second argument is a list that is
            not empty after Ctrl-C; ``compute`` may then raise ``ItemInterrupted`` instead of finishing the item.
        records: Receives the results.
        title: Text beside the progress bar.
        progress: Show the progress.

    Returns:
        Numbers of finished and failed items, including those of earlier calls.

    Raises:
        ValueError: If two items have the same name.
    """
    names: set[str] = set()
    interrupted = False
    with stop_requests() as stopped, ProgressBar(title, total, show=progress) as bar:
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
                except ItemInterrupted:
                    interrupted = True
                    break
                except (ValueError, RuntimeError, ArithmeticError) as error:
                    record = {"error": f"{type(error).__name__}: {error}"}
                records.append({"id": name, "seconds": round(time.monotonic() - start, 3)} | record)
            bar.advance(bar.task_ids[0])
    failed = sorted(name for name in names - records.done if name in records)
    reason = f"{failed[0]}: {records[failed[0]]['error']}" if failed else ""
    return RunState(len(names & records.done), len(failed), interrupted, reason)


def read_settings(folder: Path) -> Record:
    """Settings of the run in a folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {folder}: {path} does not exist")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another folder") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no settings; choose another folder")
    return found


def check_settings(settings: Record, found: Record, folder: Path) -> None:
    """Check that a run is continued with the settings it was started with.

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
    """Convert a NumPy value to Python's types, for JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
