"""What a run needs of the machine: a device, files and figures that survive a crash, signals that wait for a step."""

import csv
import ctypes
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def choose_device(name: str | torch.device) -> torch.device:
    """The device a name stands for; "auto" takes a GPU if there is one.

    Raises:
        ValueError: If the name is not one of PyTorch's, "auto" aside.
        RuntimeError: If CUDA is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device = {name}, but no CUDA device is available; use device: cpu or auto")
    return device


_KEPT = 2**30
"""Bytes."""


@cache
def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep memory that it frees, up to 1 GiB, if it computes on a CPU; like PyTorch on a GPU.

    The allocator of glibc gives tensors of a few MB back to the system at the end of every step, which then has to
    hand out and clear tens of thousands of pages in the next one (docs/adr/0019). Elsewhere, and at further calls,
    nothing happens.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    program = ctypes.CDLL(None)
    if hasattr(program, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
        for option in (trim_threshold, mmap_threshold):
            program.mallopt(option, _KEPT)


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package, named by the extra of dpa4 that installs it.

    Raises:
        ImportError: If the package is absent.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is not installed; pip install 'dpa4[{extra}]'"
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; its file replaces ``path`` unless the block raises.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches."""
    # The object interface needs no display; imported here because it takes a second.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, its labels of one column on one line."""
    figure.align_ylabels()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, for a loop to look at; a second signal acts at once.

    Outside the main thread, where Python does not handle signals, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, _: Any) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield received
    finally:
        restore()


class CsvLog:
    """A CSV file with a row per event, whose first column is the step; every row reaches the file at once.

    Args:
        path: The file.
        columns: Column names; the first is the step.
        resume_step: Keep the rows of an earlier run up to this step and drop later ones; None starts anew.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None = None):
        rows = [] if resume_step is None else [r for r in read_csv(path) if int(r[columns[0]]) <= resume_step]
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
