"""System services for runs: device, memory allocator, crash-safe files and figures, signals, CSV logs."""

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
    """Return the device of this name; "auto" selects a GPU if there is one.

    Raises:
        ValueError: If the name is neither "auto" nor a device name of PyTorch.
        RuntimeError: If a CUDA device is requested but none is available.
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


_RETAINED_BYTES = 2**30  # upper limit of the freed memory that the allocator retains


@cache
def keep_freed_memory(device: torch.device) -> None:
    """Make the allocator retain up to 1 GiB of freed memory on a CPU, as PyTorch does on a GPU.

    By default, glibc returns tensors of a few MB to the system at the end of every step, and the system has
    to allocate and clear tens of thousands of pages again in the next step (docs/adr/0019). The function does
    nothing on other devices and systems, or when called again.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    program = ctypes.CDLL(None)
    if hasattr(program, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
        for option in (trim_threshold, mmap_threshold):
            program.mallopt(option, _RETAINED_BYTES)


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Full name of the module.
        extra: Extra of dpa4 that installs the package; the error message names it.

    Raises:
        ImportError: If the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is not installed; pip install 'dpa4[{extra}]'"
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; the file there replaces ``path`` unless the block raises.

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
    """Return an empty matplotlib figure of this width and height, in inches."""
    # The object interface needs no display. The import takes a second, so it is delayed until here.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, with the y labels of each column aligned."""
    figure.align_ylabels()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM append their number, so that a loop can stop after a step.

    A second signal has its usual effect at once. Outside the main thread, where Python does not handle
    signals, the list stays empty.
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
    """CSV file with one row per event and the step in the first column; every row is flushed to the file.

    Args:
        path: The file.
        columns: Column names; the first is the step.
        resume_step: Last step whose row of an earlier run is preserved; None starts a new file.
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
