"""Runs over many items that keep every result at once, so that the same call goes on after an interruption."""

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from dpa4.simulation.runs.progress import progress_bar
from dpa4.system import atomic_write, stop_requests

Record = dict[str, Any]
T = TypeVar("T")

SETTINGS = "settings.json"


class Interrupted(Exception):
    """Ctrl-C came while an item was at work; its result is not kept."""


class Progressed(NamedTuple):
    """State of a run after a call."""

    done: int  # items with a result, those of earlier calls included
    failed: int  # items whose last attempt failed
    interrupted: bool
    reason: str = ""  # of the first failure


class Records:
    """Results by name in a file of JSON lines; every line reaches the file at once, and a torn last line is dropped.

    All files ``{name}*.jsonl`` of the folder are read, and one of them is written, so that several processes may
    share a folder, each with a part of its own. Failures, records with an ``error``, count as not done.

    Args:
        folder: Made if absent.
        settings: What the results depend on.
        name: Of the results.
        part: Ending of the name of the file to write, for one process of several.

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
        """The last record of every item of ``names``."""
        return map(self.__getitem__, self.names)

    def __getitem__(self, name: str) -> Record:
        """Last record of an item.

        Raises:
            KeyError: If it has none.
        """
        path, offset = self._places[name]
        with path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def append(self, record: Record) -> None:
        """Keep a record; its ``id`` is the name of the item."""
        offset = self._file.tell()
        self._file.write(json.dumps(record, default=_plain).encode() + b"\n")
        self._file.flush()
        self._note(record, self._own, offset)

    def _read(self, path: Path, repair: bool) -> None:
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
        name = record["id"]
        if "error" not in record:
            self.done.add(name)
        elif name in self.done:  # another process was more lucky
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
    """Compute every item that has no result yet and keep what comes out; Ctrl-C ends with the item at hand.

    An item that raises ``ValueError``, ``RuntimeError`` or ``ArithmeticError`` is kept as a failure and tried again
    by the next call.

    Args:
        items: Name and item.
        total: Number of items, for the progress bar.
        compute: Gives the record of an item, without ``id`` and ``seconds``; it may look at the list, which is not
            empty after Ctrl-C, and raise ``Interrupted``.
        records: Where results are kept.
        title: Beside the progress bar.
        progress: Show it on a terminal.

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
    """Write a table; absent values stay empty."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented, NaN as null."""
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_settings(folder: Path) -> Record:
    """Settings of the run in a folder.

    Raises:
        FileNotFoundError: If there is no run.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {folder}: {path} is absent")
    return json.loads(path.read_text(encoding="utf-8"))


def check_settings(settings: Record, found: Record, folder: Path) -> None:
    """Refuse to go on with results of other settings.

    Args:
        settings: Of this call.
        found: Those that the results in the folder depend on, from JSON.
        folder: For the message.

    Raises:
        ValueError: If they differ.
    """
    settings = json.loads(json.dumps(settings, default=_plain))
    for name in {**found, **settings}:
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"{name} = {settings.get(name)!r}, but {folder} holds results with {name} = {found.get(name)!r}; "
                "choose another folder"
            )


def _plain(value: Any) -> Any:
    """NumPy values as those of Python, for JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _finite(content: Any) -> Any:
    """The same with None in place of numbers that JSON does not know."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, np.ndarray | np.generic):
        return _finite(content.tolist())
    return None if isinstance(content, float) and not np.isfinite(content) else content
