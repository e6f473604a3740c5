"""Files that survive a crash: complete or as they were, on the disk, with their name in every error."""

import glob
import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

NUMBERED = ".[0-9]*.tmp"  # end of the names of temporary files
LEFTOVERS = f".*{NUMBERED}"  # temporary files of ``atomic_write``, left behind by a killed process
LEFTOVERS_OF_SAFETENSORS = ".tmp??????"  # in runs of earlier versions


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors of the operating system, such as a full disk, which often lack it."""
    try:
        yield
    except OSError as error:
        elsewhere = isinstance(error.filename, str) and Path(error.filename).parent != path.parent
        if error.strerror is None or elsewhere:  # the message says all, or is about another file
            raise
        raise type(error)(f"cannot write {path}: {error.strerror}") from error


def remove_leftovers(folder: Path, pattern: str = LEFTOVERS) -> None:
    """Remove the temporary files of killed processes; to be called while the folder is locked."""
    for leftover in folder.glob(pattern):
        leftover.unlink()


def check_writable(path: Path) -> None:
    """Check that a file can be written, before the work whose result it will hold.

    Temporary files of this name that a killed process left behind are removed.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If no file of this name can be written.
    """
    _check_folder(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give the name of a file")
    trial = _temporary(path)
    with naming(path):
        remove_leftovers(path.parent, f".{glob.escape(path.name)}{NUMBERED}")
        try:
            trial.touch(exist_ok=True)
        finally:
            with suppress(OSError):
                trial.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; the file there replaces ``path`` unless the block raises.

    The file is on the disk, not only in memory, when it replaces ``path``.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the file cannot be written, for example because the disk is full; ``path`` is as it was.
    """
    _check_folder(path)
    temporary = _temporary(path)
    try:
        with naming(path):
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # the folder may be gone or read-only; the first error tells more
            temporary.unlink(missing_ok=True)


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; create it first")


def _temporary(path: Path) -> Path:
    # Unique for each thread of each process, so that two writers of the same path do not disturb each other.
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk, so that it survives a loss of power."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def cut_back(path: Path, size: int, origin: Path) -> None:
    """Remove what was appended to a file after a state was saved.

    Args:
        path: The file.
        size: Size of the file at that time, in bytes.
        origin: File with the state, for the message.

    Raises:
        ValueError: If the file is shorter. It is not changed.
    """
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise ValueError(
            f"{path} is damaged: it has {found} bytes, {origin.name} says at least {size}; restore the file, or "
            "start again in another folder"
        )
    if path.is_file():
        with naming(path):
            os.truncate(path, size)


def write_torch(path: Path, content: Any) -> None:
    """Write tensors and plain Python values as a PyTorch file."""
    import torch

    # In memory first: PyTorch's own writer reports a full disk by a trace of its C++ code.
    memory = io.BytesIO()
    torch.save(content, memory)
    with atomic_write(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


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
