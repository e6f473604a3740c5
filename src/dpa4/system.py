"""Device, memory allocator, optional packages and signals."""

import ctypes
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def user_path(path: str | os.PathLike[str]) -> Path:
    """Path that a user gave, with ~ or ~name at its start replaced by the home folder, as in a shell.

    Every path goes through this function where it enters: arguments of the commands, run files and the functions of
    the Python interface. A shell leaves ~ as it is behind an equals sign (``--output=~/run``).
    """
    return Path(os.path.expanduser(path))


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device of this name; "auto" selects a GPU if there is one.

    Raises:
        ValueError: If the name is neither "auto" nor the name of a CPU or CUDA device.
        RuntimeError: If a CUDA device is requested but none is available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None  # not a device of PyTorch
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {str(name)!r}")
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


caught_signals: list[int] = []
"""Numbers of all signals that ``stop_requests`` has caught in this process, for the exit status of a command."""


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
        caught_signals.append(number)
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield received
    finally:
        restore()
