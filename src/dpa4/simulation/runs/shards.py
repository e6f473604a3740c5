"""Results of many structures, computed by several processes that share a folder.

Each process, a shard, appends to files of its own, one structure at a time: first the structure, then its row of the
table. Whatever a kill leaves at their ends is put right when the shard goes on. The shard that ends last joins all.
"""

import csv
import fcntl
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ase import Atoms
from ase.io import iread, write

from dpa4.simulation.runs.store import check_settings, write_csv
from dpa4.system import CsvLog, atomic_write

FORMAT = 1
TABLE, FRAMES = "screen.csv", "relaxed.xyz"
NUMBER = "screen_structure"  # key of a structure's number in its info
FOREVER = 2**63
Span = tuple[Path, int, int]  # bytes of a file: where they begin, and how many


class Shard:
    """Files of one of ``world_size`` processes, in the folder ``shards`` of the output.

    Attributes:
        done: Numbers of the structures that have been recorded.
        counts: How many of them have each status.
    """

    def __init__(
        self,
        output: Path,
        columns: Sequence[str],
        settings: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
        resume: bool = False,
    ):
        """Begin, or go on after what has been recorded.

        Args:
            output: Folder of all shards, made if absent.
            columns: Of the table; "structure", the number, comes first, and there is "status". "frame" is added:
                whether there is a frame of the structure.
            settings: What all shards, and the calls before, must have in common; for JSON.
            rank: Which of the processes this is, from 0.
            world_size: How many there are.
            resume: Go on if there is something to go on with.

        Raises:
            FileExistsError: If the shard has files and is not to go on.
            RuntimeError: If another process is working on the shard.
            ValueError: If rank or settings do not fit what is there.
        """
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}; it is the number of this "
                "process among all"
            )
        folder = output / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{rank}-of-{world_size}"
        self.marker = folder / f"{name}.json"
        self.table, self.frames = folder / f"{name}.csv", folder / f"{name}.xyz"
        self.settings = dict(settings)
        for other in sorted(folder.glob("*-of-*.json")):
            found = {"world_size": int(other.stem.partition("-of-")[2])}
            check_settings({"world_size": world_size}, found, output)
        begun = self.marker.is_file()
        if begun and not resume:
            raise FileExistsError(
                f"{output} already holds a run ({self.marker.name}); resume it or choose another folder"
            )
        if begun:
            check_settings(self.settings, _read_marker(self.marker)["settings"], output)
        self._lock = _locked(folder / f".{name}.lock")
        if not begun:
            self.frames.unlink(missing_ok=True)
            self.table.unlink(missing_ok=True)
        columns = [*columns, "frame"]
        rows = self._recovered(columns)
        self._mark(None)
        self.done = {int(row["structure"]) for row in rows}
        self.counts = Counter(row["status"] for row in rows)
        self._log = CsvLog(self.table, columns, FOREVER)
        self._frames = self.frames.open("ab", buffering=0)

    def record(self, row: Mapping[str, Any], frame: Atoms | None = None) -> None:
        """Add a structure for good: its row and, where there is something to show, its final form.

        ``frame`` carries its results in a calculator; its info gets the number of the structure.
        """
        if frame is not None:
            frame.info[NUMBER] = row["structure"]
            text = io.StringIO()
            write(text, frame, format="extxyz")
            self._frames.write(text.getvalue().encode())
        self._log.write(dict(row) | {"frame": frame is not None})
        self.done.add(row["structure"])
        self.counts[row["status"]] += 1

    def finish(self, total: int) -> None:
        """Note that everything of this shard is recorded, out of ``total`` structures of all shards."""
        self._mark(total)

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._frames.close()
        self._lock.close()

    def _mark(self, total: int | None) -> None:
        marker = {"format": FORMAT, "settings": self.settings, "total": total}
        with atomic_write(self.marker) as temporary:
            temporary.write_text(json.dumps(marker, indent=1), encoding="utf-8")

    def _recovered(self, columns: Sequence[str]) -> list[dict[str, str]]:
        """Rows of complete structures; what is left of others leaves the files."""
        spans = _spans(self.frames)
        rows = [r for r in _rows(self.table) if r["frame"] != "True" or int(r["structure"]) in spans]
        known = {int(row["structure"]) for row in rows}
        if self.frames.is_file():
            _copy([span for number, span in spans.items() if number in known], self.frames)
        if self.table.is_file():
            write_csv(self.table, columns, rows)
        return rows


def join(output: Path, world_size: int) -> bool:
    """Make one table and one file of structures, in the order of the input, once all shards have finished.

    Returns:
        Whether they have.

    Raises:
        ValueError: If the shards do not belong together or a structure is missing or there twice.
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
            f"{markers[0]['total']} structures; were the input files changed in between?"
        )
    spans: dict[int, Span] = {}
    for name in names:
        spans |= _spans(folder / f"{name}.xyz")
    _copy([spans[number] for number in numbers if number in spans], output / FRAMES)
    write_csv(output / TABLE, list(rows[0]), rows)
    return True


class FinishedRun:
    """What a run left once its shards were joined.

    Attributes:
        settings: Of the run.
        rows: Of the table.
    """

    def __init__(self, output: Path):
        """Read settings and table; structures are read one by one.

        Raises:
            FileNotFoundError: If there is no such run.
        """
        markers = sorted((output / "shards").glob("*-of-*.json"))
        if not markers or not (output / TABLE).is_file():
            raise FileNotFoundError(f"there is no finished run of dpa4 screen in {output}")
        self.settings = _read_marker(markers[0])["settings"]
        self.rows = _rows(output / TABLE)
        self._spans = _spans(output / FRAMES)

    def atoms(self, number: int) -> Atoms:
        """The relaxed structure of a number.

        Raises:
            KeyError: If there is none.
        """
        path, begin, length = self._spans[number]
        with path.open("rb") as file:
            file.seek(begin)
            return next(iread(io.StringIO(file.read(length).decode()), format="extxyz"))


def _read_marker(path: Path) -> dict[str, Any]:
    marker = json.loads(path.read_text(encoding="utf-8"))
    if marker["format"] != FORMAT:
        raise ValueError(f"{path} has format {marker['format']}; this version reads format {FORMAT}")
    return marker


def _locked(path: Path) -> IO[str]:
    """A file that only one process has open at a time."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise RuntimeError(
            f"another process is working on {path.parent}/{path.stem[1:]}; wait for it"
        ) from error
    return file


def _rows(table: Path) -> list[dict[str, str]]:
    """Rows of a table up to the last complete line."""
    if not table.is_file():
        return []
    content = table.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _spans(frames: Path) -> dict[int, Span]:
    """Where the complete structures of an extended XYZ file are, by their numbers."""
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
    """Write parts of files, one after another."""
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
