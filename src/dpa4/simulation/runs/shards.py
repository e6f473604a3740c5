"""Results of a screening by several processes that share a folder.

Each process writes a shard: files of its own, to which it appends one structure at a time, first the relaxed
structure and then the row of the table. If the process is killed, incomplete entries at the ends of the files are
removed when the shard is resumed. The process that finishes last joins all shards.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ase import Atoms
from ase.io import iread

from dpa4.data import write_structures
from dpa4.output import (
    CsvLog,
    OutputFolder,
    already_there,
    atomic_write,
    check_start,
    naming,
    remove_files,
    remove_leftovers,
    write_csv,
)
from dpa4.simulation.runs.store import check_settings

FORMAT = 1
TABLE, FRAMES = "screen.csv", "relaxed.xyz"
NUMBER = "screen_structure"  # key in the info of a structure, for its number
ALL_ROWS = 2**63  # larger than any number: CsvLog drops no row
Span = tuple[Path, int, int]  # part of a file: path, first byte, number of bytes


class Shard:
    """Results of one of ``world_size`` processes, in files of its own in the subfolder ``shards`` of the output.

    Attributes:
        done: Numbers of the recorded structures.
        counts: Number of recorded structures by status.
    """

    def __init__(
        self,
        output: Path,
        columns: Sequence[str],
        settings: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
        resume: bool = False,
        overwrite: bool = False,
    ):
        """Create the shard, or open it to continue after the recorded structures.

        Args:
            output: Output folder shared by all processes, created if absent.
            columns: Columns of the table. The first is "structure", the number of the structure; another is "status".
                A column "frame" is added: True if there is a relaxed structure.
            settings: Settings that all shards and earlier calls must share; written as JSON.
            rank: Index of this process, from 0.
            world_size: Number of processes.
            resume: Continue the shard if it exists.
            overwrite: Remove all shards and the joined results first. Only for ``world_size`` 1.

        Raises:
            FileExistsError: If the shard exists and neither ``resume`` nor ``overwrite`` is set.
            BlockingIOError: If another process is working on the shard.
            ValueError: If the rank is not allowed, world_size or settings differ from those in the folder, or
                ``overwrite`` is set with ``resume`` or several processes.
        """
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}; it is the index of this "
                "process"
            )
        check_start(resume, overwrite)
        if overwrite and world_size > 1:
            raise ValueError(
                f"overwrite is for one process, but world_size is {world_size}; remove {output} before the "
                "processes start"
            )
        folder = output / "shards"
        name = f"{rank}-of-{world_size}"
        self._lock = OutputFolder(folder, name)
        try:
            if overwrite:
                _remove_results(output, name)
            self._open(folder, name, columns, settings, world_size, resume)
        except BaseException:
            self._lock.close()
            raise

    def _open(
        self,
        folder: Path,
        name: str,
        columns: Sequence[str],
        settings: Mapping[str, Any],
        world_size: int,
        resume: bool,
    ) -> None:
        output = folder.parent
        self.marker = folder / f"{name}.json"
        self.table, self.frames = folder / f"{name}.csv", folder / f"{name}.xyz"
        self.settings = dict(settings)
        for other in sorted(folder.glob("*-of-*.json")):
            found = {"world_size": int(other.stem.partition("-of-")[2])}
            check_settings({"world_size": world_size}, found, output)
        begun = self.marker.is_file()
        if begun and not resume:
            raise already_there(output, f"a run ({self.marker.name})")
        if begun:
            check_settings(self.settings, _read_marker(self.marker)["settings"], output)
        if not begun:
            self.frames.unlink(missing_ok=True)
            self.table.unlink(missing_ok=True)
        if world_size == 1:
            remove_leftovers(output)  # of joining
        columns = [*columns, "frame"]
        rows = self._recovered(columns)
        self._mark(None)
        self.done = {int(row["structure"]) for row in rows}
        self.counts = Counter(row["status"] for row in rows)
        self._log = CsvLog(self.table, columns, ALL_ROWS)
        self._frames = self.frames.open("ab")

    def record(self, row: Mapping[str, Any], frame: Atoms | None = None) -> None:
        """Write the row of a structure and, if there is one, the relaxed structure.

        Args:
            row: Values of the table, among them "structure" and "status".
            frame: Relaxed structure with its results in a calculator. The number is added to its info.
        """
        # The row comes last: a row that says there is a frame is never written before the frame.
        if frame is not None:
            # The number comes first: a text of the user may contain its key, too.
            frame.info = {NUMBER: row["structure"]} | {k: v for k, v in frame.info.items() if k != NUMBER}
            text = io.StringIO()
            write_structures(text, frame)
            with naming(self.frames):
                self._frames.write(text.getvalue().encode())
                self._frames.flush()
        self._log.write(dict(row) | {"frame": frame is not None})
        self.done.add(row["structure"])
        self.counts[row["status"]] += 1

    def finish(self, total: int) -> None:
        """Mark the shard as finished.

        Args:
            total: Number of structures of all shards.
        """
        self._mark(total)

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._frames.close()
        self._lock.close()

    def _mark(self, total: int | None) -> None:
        """Write the marker; ``total`` is None until the shard has finished."""
        marker = {"format": FORMAT, "settings": self.settings, "total": total}
        with atomic_write(self.marker) as temporary:
            temporary.write_text(json.dumps(marker, indent=1), encoding="utf-8")

    def _recovered(self, columns: Sequence[str]) -> list[dict[str, str]]:
        """Rows of the completely written structures; all other content is removed from the files."""
        spans = _spans(self.frames)
        rows = [r for r in _rows(self.table) if r["frame"] != "True" or int(r["structure"]) in spans]
        known = {int(row["structure"]) for row in rows}
        if self.frames.is_file():
            _copy([span for number, span in spans.items() if number in known], self.frames)
        if self.table.is_file():
            write_csv(self.table, columns, rows)
        return rows


def join_shards(output: Path, world_size: int) -> bool:
    """Join the tables and the relaxed structures of all shards in the order of the input, if all have finished.

    Returns:
        True if all shards have finished, so that the joined files were written.

    Raises:
        ValueError: If the shards have different settings, or a structure is missing or occurs twice.
    """
    names = [f"{rank}-of-{world_size}" for rank in range(world_size)]
    folder = output / "shards"
    found = [m for name in names if (m := folder / f"{name}.json").is_file()]
    markers = [_read_marker(marker) for marker in found]
    if len(found) < world_size or any(marker["total"] is None for marker in markers):
        return False
    for marker in markers[1:]:
        check_settings(marker["settings"], markers[0]["settings"], output)
    rows = [row for name in names for row in _rows(folder / f"{name}.csv")]
    rows.sort(key=lambda row: int(row["structure"]))
    numbers = [int(row["structure"]) for row in rows]
    if {marker["total"] for marker in markers} != {len(rows)} or numbers != list(range(len(rows))):
        raise ValueError(
            f"the shards in {folder} do not add up: {len(rows)} rows for {len(set(numbers))} of "
            f"{markers[0]['total']} structures; if the input files have changed, screen them again in another folder"
        )
    spans: dict[int, Span] = {}
    for name in names:
        spans |= _spans(folder / f"{name}.xyz")
    _copy([spans[number] for number in numbers if number in spans], output / FRAMES)
    write_csv(output / TABLE, list(rows[0]), rows)
    return True


class FinishedScreening:
    """Results of a screening whose shards have been joined.

    Attributes:
        settings: Settings of the run.
        rows: Rows of the table, in the order of the input.
    """

    def __init__(self, output: Path):
        """Read settings and table; structures are read on demand.

        Raises:
            FileNotFoundError: If the folder holds no finished run.
        """
        markers = sorted((output / "shards").glob("*-of-*.json"))
        if not markers or not (output / TABLE).is_file():
            raise FileNotFoundError(f"there is no finished run of dpa4 screen in {output}; finish it first")
        self.settings = _read_marker(markers[0])["settings"]
        self.rows = _rows(output / TABLE)
        self._spans = _spans(output / FRAMES)

    def atoms(self, number: int) -> Atoms:
        """Relaxed structure with a number.

        Raises:
            KeyError: If the structure was not relaxed.
        """
        path, begin, length = self._spans[number]
        with path.open("rb") as file:
            file.seek(begin)
            return next(iread(io.StringIO(file.read(length).decode()), format="extxyz"))


def _remove_results(output: Path, own: str) -> None:
    """Remove the shards of an earlier run and the joined results, while the shard ``own`` is locked.

    Raises:
        BlockingIOError: If another process is working on a shard.
    """
    folder = output / "shards"
    for name in sorted({path.stem for path in folder.glob("*-of-*.*")}):
        if name == own:
            remove_files(folder, f"{name}.*")
            continue
        with OutputFolder(folder, name):
            remove_files(folder, f"{name}.*")
    remove_files(output, TABLE, FRAMES)


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads(path.read_bytes())
        found = marker["format"]
        known = isinstance(marker["settings"], dict) and isinstance(marker["total"], int | None)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); choose another folder") from None
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found}; this version reads format {FORMAT}; choose another folder"
        )
    if not known:
        raise ValueError(f"{path} is damaged (settings or total); choose another folder")
    return marker


def _rows(table: Path) -> list[dict[str, str]]:
    """Rows of a table up to the last complete line."""
    if not table.is_file():
        return []
    content = table.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _spans(frames: Path) -> dict[int, Span]:
    """Positions of the complete structures in an extended XYZ file, by number."""
    spans: dict[int, Span] = {}
    if not frames.is_file():
        return spans
    with frames.open("rb") as file:
        while True:
            begin = file.tell()
            header = file.readline()
            if not header.strip().isdigit():
                return spans
            comment = file.readline()
            last = comment
            for _ in range(int(header)):
                last = file.readline()
            if not last.endswith(b"\n"):  # cut off
                return spans
            number = re.search(rb"\b%s=(\d+)" % NUMBER.encode(), comment)
            if number is not None:
                spans[int(number[1])] = (frames, begin, file.tell() - begin)


def _copy(spans: Iterable[Span], path: Path) -> None:
    """Write parts of files one after another."""
    sources: dict[Path, IO[bytes]] = {}
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for source, begin, length in spans:
                if source not in sources:
                    sources[source] = source.open("rb")
                sources[source].seek(begin)
                file.write(sources[source].read(length))
    finally:
        for opened in sources.values():
            opened.close()
