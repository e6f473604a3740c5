"""Output: folders of one process at a time, files that survive a crash, CSV, JSON, figures, terminals."""

import csv
import glob
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from dpa4.messages import warn

_NUMBERED = ".[0-9]*.tmp"  # end of the names of temporary files
LEFTOVERS = f".*{_NUMBERED}"  # temporary files of ``atomic_write``, left behind by a killed process
LEFTOVERS_OF_SAFETENSORS = ".tmp??????"  # in runs of earlier versions

# --- folders


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
            remove_leftovers(path, f".{name}*{_NUMBERED}" if name else LEFTOVERS)

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


def already_holds(folder: Path, what: str) -> FileExistsError:
    """Error about a folder with results of an earlier run."""
    return FileExistsError(
        f"{folder} already holds {what}; resume it, overwrite it (--overwrite), or choose another folder"
    )


def remove_files(folder: Path, *patterns: str) -> None:
    """Remove files of an earlier run, by name or pattern; to be called while the folder is locked."""
    for pattern in patterns:
        for file in folder.glob(pattern):
            if file.is_file():
                with naming(file):
                    file.unlink()


def remove_leftovers(folder: Path, pattern: str = LEFTOVERS) -> None:
    """Remove the temporary files of killed processes; to be called while the folder is locked."""
    for leftover in folder.glob(pattern):
        leftover.unlink()


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


# --- files


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
        remove_leftovers(path.parent, f".{glob.escape(path.name)}{_NUMBERED}")
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


# --- figures


# Colours of a figure that a reader with a dark screen sees otherwise: matplotlib's own for text, frames, grids and
# paper, the greys of lines for reference, and the first colours of its cycle.
_DARK = {
    "#000000": "#e6e6e6",
    "#ffffff": "#1b1b1f",
    "#333333": "#c4c4c4",
    "#666666": "#a8a8a8",
    "#808080": "#9a9a9a",
    "#999999": "#8c8c8c",
    "#b0b0b0": "#5a5a5a",
    "#cccccc": "#4a4a4a",
    "#1f77b4": "#6cb2f0",
    "#ff7f0e": "#ffa64d",
    "#2ca02c": "#63c963",
    "#d62728": "#ff7b72",
    "#9467bd": "#c3a2e8",
    "#8c564b": "#c79a8f",
}


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this width and height, in inches."""
    # The object interface needs no display. The import takes a second, so it is delayed until here.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 150, svg: bool = False) -> None:
    """Write a figure as PNG, with the y labels of each column aligned.

    Args:
        figure: The figure.
        path: File to write.
        dpi: Resolution, in dots per inch.
        svg: Write an SVG file beside the PNG file, too; see ``svg_of``.
    """
    _align_labels(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    if svg:
        with atomic_write(path.with_suffix(".svg")) as temporary:
            temporary.write_bytes(svg_of(figure))


def svg_of(figure: Any) -> bytes:
    """Return a figure as SVG, which is dark on a dark screen (``prefers-color-scheme``).

    The same figure has the same bytes at any time.
    """
    from matplotlib import rc_context

    drawn = io.StringIO()
    _align_labels(figure)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "dpa4"}):
        figure.savefig(drawn, format="svg", dpi=150, metadata=nothing)
    text = drawn.getvalue()
    for number, colour in enumerate(_DARK):
        text = text.replace(colour, f"var(--c{number})")
    light, dark = (
        " ".join(f"--c{number}: {colour};" for number, colour in enumerate(colours))
        for colours in (_DARK, _DARK.values())
    )
    # Text has no colour of its own in the file of matplotlib, and is black then.
    style = (
        f"<style>svg {{ {light} fill: var(--c0); }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    head, end, rest = text.partition(" <defs>")
    return f"{head} {style}\n{end}{rest}".encode()


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis of matplotlib with plain numbers, such as 0.5, 20 and 1000.

    An axis of less than two decades has labels at 1, 2 and 5 times the powers of ten, a longer one at the powers.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    subs = (
        (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    )
    axis.set_major_locator(LogLocator(subs=subs, numticks=8 if decades >= 2 else 20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plain_text(text: str) -> str:
    """Escape a name for a figure.

    Dollar signs would start a formula, and SVG files cannot hold control characters.
    """
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")


def _align_labels(figure: Any) -> None:
    """Align the y labels in each column of each grid of panels; grids within a grid are independent."""
    grids: dict[int, list[Any]] = {}
    for axes in figure.axes:
        if (place := axes.get_subplotspec()) is not None:
            grids.setdefault(id(place.get_gridspec()), []).append(axes)
    for panels in grids.values():
        figure.align_ylabels(panels)


# --- tables


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


def short(number: float) -> str:
    """Write a number in at most eight characters, with four significant digits or three decimals."""
    size = abs(number)
    if size < 0.001 or size >= 1e6:
        return f"{number:.1e}" if size else "0"
    return f"{number:.3f}" if size < 1 else f"{number:#.4g}".rstrip(".") if size < 9999.5 else f"{number:.0f}"


def wrapped(text: str, width: int) -> str:
    """Break a name into lines of at most ``width`` characters, after blanks and punctuation.

    A part without either that is longer than a line is cut.
    """
    lines = [""]
    for part in re.findall(rf"[^\W_]{{1,{width}}}[\W_]?|[\W_]", text):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


# --- JSON


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


# --- notebooks


def html_table(title: str, sections: Mapping[str, Mapping[str, str]]) -> str:
    """HTML table with a title and sections of labels and values, for ``_repr_html_``; all texts are escaped."""
    left = 'style="text-align: left"'  # notebooks align to the right
    rows = []
    for section, lines in sections.items():
        rows.append(f'<tr><th colspan="2" {left}>{escape(section)}</th></tr>')
        for label, value in lines.items():
            rows.append(f"<tr><td {left}>{escape(label)}</td><td {left}>{escape(value)}</td></tr>")
    return f"<p><b>{escape(title)}</b></p><table>{''.join(rows)}</table>"


# --- terminals


def tolerate_any_encoding() -> None:
    """Replace characters that standard output and standard error cannot encode, such as Å in GBK, by "?".

    By default, such a character ends the program.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
