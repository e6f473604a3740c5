"""Folders of results: of one process at a time, and never replaced unasked."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from dpa4.messages import warn
from dpa4.output.files import LEFTOVERS, NUMBERED, naming, remove_leftovers


class OutputFolder:
    """Output folder that belongs to one process until it is closed; use as a context manager.

    The folder is created if absent. Its lock file shows at once whether files can be written to it, and ends with
    the process, however the process ends. Temporary files that a killed process left behind are removed.

    Args:
        path: The folder.
        name: Part of the folder that is locked, for processes that share a folder; by default the whole folder.

    Raises:
        BlockingIOError: If another process is working in the folder.
        OSError: If the folder cannot be created, or no file can be written to it.
    """

    def __init__(self, path: Path, name: str = ""):
        self._created = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"cannot create the folder {path}: {error.strerror}") from error
        self._path = path.absolute() / (f".{name}.lock" if name else ".lock")
        with naming(self._path):
            self._file = _locked(self._path, path / name)
            remove_leftovers(path, f".{name}*{NUMBERED}" if name else LEFTOVERS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the lock file, and the folder if it was created for nothing; end the lock."""
        if not self._file.closed:
            with suppress(OSError):  # the folder may be gone, and is only removed if it is empty
                self._path.unlink()
                if self._created:
                    self._path.parent.rmdir()
            self._file.close()


def check_start(resume: bool, overwrite: bool) -> None:
    """Check that a run is not both continued and replaced.

    Raises:
        ValueError: If both are set.
    """
    if resume and overwrite:
        raise ValueError(
            "resume continues the earlier run and overwrite replaces it; give one of the two, not both"
        )


def already_there(path: Path, what: str = "", resumable: bool = True) -> FileExistsError:
    """Error about results that are only replaced on request, in the words of all commands.

    Args:
        path: File, or folder of an earlier run.
        what: What the folder holds; none for a file.
        resumable: The run can be continued with --resume.
    """
    if not what:
        return FileExistsError(f"{path} already exists; replace it with --overwrite, or choose another name")
    resume = "continue it with --resume, " if resumable else ""
    return FileExistsError(
        f"{path} already holds {what}; {resume}replace it with --overwrite, or choose another folder"
    )


def check_replaceable(file: Path, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        FileExistsError: If it exists and ``overwrite`` is false.
    """
    if file.exists() and not overwrite:
        raise already_there(file)


def remove_files(folder: Path, *patterns: str) -> None:
    """Remove files of an earlier run, by name or pattern; to be called while the folder is locked."""
    for pattern in patterns:
        for file in folder.glob(pattern):
            if file.is_file():
                with naming(file):
                    file.unlink()


def _locked(path: Path, what: Path) -> IO[str]:
    """Open and lock a file that only one process may hold.

    Args:
        path: The file.
        what: Folder, or part of one, for messages.

    Raises:
        BlockingIOError: If another process holds it.
    """
    while True:
        file = path.open("w", encoding="utf-8")
        try:
            _lock(file)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise BlockingIOError(
                f"another process is working on {what}; wait until it has finished, or choose another folder"
            ) from error
        except OSError as error:
            warn(
                f"{what} cannot be locked ({error.strerror}); let no other process write to it",
            )
            return file
        # The previous owner may have removed the file after it was opened here.
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        file.close()


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
