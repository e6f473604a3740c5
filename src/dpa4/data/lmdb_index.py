"""Index of an LMDB database of ASE: the place of each row in the file, its size, elements, labels, charge and spin.

The index is built once, in parallel, and kept in a hidden folder beside the file, or in the cache of the user if that
folder cannot be written. It belongs to a size and a time of change of the file, and to the names of the labels. A
build that was interrupted continues. Columns are mapped from the disk, so an open index takes no memory.
"""

import hashlib
import json
import os
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from rich.progress import track

from dpa4 import code_cache
from dpa4.data.charge_spin import stated_charge_and_spin
from dpa4.data.frame import Frame
from dpa4.data.labels import USUAL_KEYS, LabelKeys
from dpa4.data.lmdb_file import Place
from dpa4.data.lmdb_rows import LmdbRows
from dpa4.data.references import is_isolated_atom
from dpa4.data.summary import LABELS
from dpa4.graph import build_graph
from dpa4.output import OutputFolder, write_json
from dpa4.parsing import parse_json
from dpa4.system import processors

VERSION = 1
CHUNK = 2048  # rows that a process describes at a time; what an interrupted build loses
CONFIRMED = 64  # chunks between two writes to the disk
EXAMPLES = 32  # rows of each element whose numbers are kept, so that a sample has every element
FEW_ROWS = 4096  # rows of files that are described without other processes

ENERGY, FORCES, VIRIAL, HIDDEN, FREE_ATOM, UNUSABLE = (1 << k for k in range(6))
"""Flags of a row: its labels; a weight of zero; a free atom; not readable, or with a malformed label."""

FLAG_OF_LABEL = dict(zip(LABELS, (ENERGY, FORCES, VIRIAL), strict=True))
NO_CHARGE = -(2**15)
"""Charge of a row that states none, or none that is valid."""

_SPECIAL = {"unusable": UNUSABLE, "free_atoms": FREE_ATOM}  # rows that are listed
_PLACES = {"offset": "<i8", "size": "<u4", "row": "<i8"}
_DESCRIPTIONS = {
    "atoms": "<i4",
    "low": "<u8",  # bit z: contains the element with atomic number z
    "high": "<u8",  # bit z - 64
    "flags": "u1",
    "charge": "<i2",
    "spin": "<i2",  # multiplicity; 0: none
}


@dataclass(frozen=True)
class LmdbIndex:
    """Index of one file.

    Attributes:
        rows: The rows of the file.
        columns: Values of each row by name, mapped from the disk.
        special: Positions of the rows that are "unusable" and of the "free_atoms".
        summary: Number of rows with each flag, elements, examples of each element, and a digest of all rows.
        folder: Folder of the index.
    """

    rows: LmdbRows
    columns: dict[str, NDArray[Any]]
    special: dict[str, NDArray[np.int64]]
    summary: dict[str, Any]
    folder: Path

    def __len__(self) -> int:
        """Number of rows, usable or not."""
        return len(self.columns["row"])

    def frame(self, position: int) -> Frame:
        """Structure at a position in the order of the row numbers."""
        c = self.columns
        return self.rows.frame(
            int(c["row"][position]), Place(int(c["offset"][position]), int(c["size"][position]))
        )

    def __getstate__(self) -> tuple[LmdbRows, Path]:
        """Rows and folder: another process maps the columns itself."""
        return self.rows, self.folder

    def __setstate__(self, state: tuple[LmdbRows, Path]) -> None:
        """Map the columns."""
        rows, folder = state
        found = _opened(rows, folder)
        if found is None:
            raise ValueError(f"the index of {rows.path} has changed or was removed; start again")
        self.__dict__.update(found.__dict__)

    def edges(self, cutoff: float, workers: int | None = None) -> NDArray[np.int32]:
        """Number of edges of each row within a cutoff in Angstrom, (rows,); built once, like the index itself.

        Rows without a neighbour list have none here; reading such a structure is an error.
        """
        name = f"edges-{cutoff:g}"
        describe = partial(_count_edges, self.rows, cutoff)
        with _locked(self.folder):
            _fill(self.folder, len(self), {name: "<i4"}, name, self._jobs, describe, workers, self.rows.path)
        return _column(self.folder, name, "<i4", len(self))

    def _jobs(self, chunk: int) -> list[tuple[int, Place]]:
        return _jobs(self.columns, chunk)


def open_index(path: Path, group: str, keys: LabelKeys = USUAL_KEYS, workers: int | None = None) -> LmdbIndex:
    """Open the index of a file, and build it first if it is absent, incomplete or of an earlier state of the file.

    Args:
        path: File ``.aselmdb``.
        group: Group of the structures that name none.
        keys: Names of labels that differ from the usual ones.
        workers: Processes that build the index; None: one per core.

    Raises:
        BlockingIOError: If another process is building this index.
        ValueError: If the file is no LMDB file, is damaged or cut off, or has no row.
    """
    rows = LmdbRows(path, group, keys)
    for folder in _folders(path, keys):
        if (found := _opened(rows, folder)) is not None:
            return found
    folder = _writable(path, keys)
    with _locked(folder):
        _build(rows, folder, workers)
    found = _opened(rows, folder)
    if found is None:
        raise ValueError(f"{path} has changed while its index was built; start again when it is complete")
    return found


# Folders


def _locked(folder: Path) -> Any:
    return OutputFolder(folder) if os.access(folder, os.W_OK) else nullcontext()


def _folders(path: Path, keys: LabelKeys) -> list[Path]:
    """Folders in which the index of a file may be."""
    place = path.resolve()
    named = "" if keys == USUAL_KEYS else "-" + _short_digest(json.dumps(asdict(keys), sort_keys=True))
    beside = place.parent / f".{place.name}.index{named}"
    return [beside, code_cache.folder() / "indexes" / _short_digest(str(beside))]


def _writable(path: Path, keys: LabelKeys) -> Path:
    """The first of these folders that can be written; created if it is missing."""
    beside, private = _folders(path, keys)
    try:
        beside.mkdir(exist_ok=True)
        if os.access(beside, os.W_OK):
            return beside
    except OSError:
        pass  # a data set that only its owner may change
    private.mkdir(parents=True, exist_ok=True)
    return private


def _short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _state(rows: LmdbRows) -> dict[str, Any]:
    """Everything that an index depends on."""
    found = rows.path.stat()
    return {
        "version": VERSION,
        "bytes": found.st_size,
        "changed_ns": found.st_mtime_ns,
        "keys": asdict(rows.keys),
    }


def _meta(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = parse_json((folder / name).read_text(encoding="utf-8"), "it")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _opened(rows: LmdbRows, folder: Path) -> LmdbIndex | None:
    """The index in a folder; None if it is absent, incomplete, or not of this state of the file."""
    meta = _meta(folder, "index.json")
    if meta.get("state") != _state(rows) or not {"rows", "examples", "digest"} <= meta.keys():
        return None
    try:
        columns = {n: _column(folder, n, kind, meta["rows"]) for n, kind in (_PLACES | _DESCRIPTIONS).items()}
        special = {n: np.load(folder / f"{n}.npy", allow_pickle=False) for n in _SPECIAL}
    except (EOFError, OSError, TypeError, ValueError):  # damaged: the index is built anew
        return None
    return LmdbIndex(rows, columns, special, meta, folder)


def _column(folder: Path, name: str, kind: str, count: int) -> NDArray[Any]:
    """Map a column; no array with objects is ever loaded.

    Raises:
        OSError, ValueError: If it is absent, or has another length or type.
    """
    found = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    if found.shape != (count,) or found.dtype != np.dtype(kind):
        raise ValueError(f"{folder / name}.npy has shape {found.shape} and type {found.dtype}")
    return found


# Building


def _build(rows: LmdbRows, folder: Path, workers: int | None) -> None:
    state = _state(rows)
    places = _meta(folder, "places.json")
    # An index that is complete, but was not opened, is damaged.
    if places.get("state") != state or (folder / "index.json").exists():
        for file in (*folder.glob("*.json"), *folder.glob("*.npy")):
            file.unlink()
        places = {"state": state, "rows": _write_places(rows, folder)}
        write_json(folder / "places.json", places)
    count = places["rows"]
    columns = {name: _column(folder, name, kind, count) for name, kind in _PLACES.items()}
    kinds = _DESCRIPTIONS
    _fill(
        folder, count, kinds, "index", partial(_jobs, columns), partial(_describe, rows), workers, rows.path
    )
    columns |= {name: _column(folder, name, kind, count) for name, kind in kinds.items()}
    write_json(folder / "index.json", {"state": state, "rows": count} | _summary(columns, folder))


def _write_places(rows: LmdbRows, folder: Path) -> int:
    """Write the places of all rows in the order of their numbers; return how many they are."""
    numbers, offsets, sizes = array("q"), array("q"), array("q")
    try:
        for key, place in rows.places().places():
            if key.isdigit() and len(key) < 19:  # the other keys are nextid, deleted_ids and metadata
                numbers.append(int(key))
                offsets.append(place.offset)
                sizes.append(place.size)
    except ValueError as error:
        raise ValueError(f"{rows.path} cannot be read as an ASE database: {error}") from error
    if not numbers:
        raise ValueError(f"{rows.path} has no structure")
    order = np.argsort(np.frombuffer(numbers, dtype=np.int64), kind="stable")
    for (name, kind), values in zip(_PLACES.items(), (offsets, sizes, numbers), strict=True):
        np.save(folder / f"{name}.npy", np.frombuffer(values, dtype=np.int64)[order].astype(kind))
    return len(numbers)


def _jobs(columns: dict[str, NDArray[Any]], chunk: int) -> list[tuple[int, Place]]:
    part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    numbers, offsets, sizes = (columns[name][part].tolist() for name in ("row", "offset", "size"))
    return [
        (number, Place(offset, size)) for number, offset, size in zip(numbers, offsets, sizes, strict=True)
    ]


def _fill(
    folder: Path,
    count: int,
    kinds: dict[str, str],
    name: str,
    jobs: Callable[[int], list[tuple[int, Place]]],
    describe: Callable[[list[tuple[int, Place]]], tuple[dict[str, list[int]], bytes]],
    workers: int | None,
    path: Path,
) -> None:
    """Fill columns chunk by chunk; chunks that an earlier, interrupted call has filled are left as they are."""
    chunks = -(-count // CHUNK)
    marks = f"{name}-chunks"
    found = {n: _mapped(folder, n, kind, (count,)) for n, kind in kinds.items()}
    if any(column is None for column in found.values()):
        (folder / f"{marks}.npy").unlink(missing_ok=True)
    columns = {n: _new(folder, n, kinds[n], (count,)) if c is None else c for n, c in found.items()}
    digests = _mapped(folder, marks, "V16", (chunks,))  # zero: not filled yet
    if digests is None:
        digests = _new(folder, marks, "V16", (chunks,))
    left = np.flatnonzero(digests.view("<u8").reshape(-1, 2).sum(axis=1) == 0).tolist()
    if not left:
        return
    todo = ((chunk, jobs(chunk)) for chunk in left)
    described = _in_order_of_completion(todo, describe, workers, count)
    title = f"{name.partition('-')[0]} of {path.name}"
    written: dict[int, bytes] = {}

    def confirm() -> None:
        """Mark chunks as filled, once their values are on the disk."""
        for column in columns.values():
            column.flush()
        for chunk, digest in written.items():
            digests[chunk] = np.void(digest)
        digests.flush()
        written.clear()

    try:
        for chunk, (values, digest) in track(described, title, total=len(left), disable=count <= FEW_ROWS):
            for n, column in columns.items():
                column[chunk * CHUNK : (chunk + 1) * CHUNK] = values[n]
            written[chunk] = digest
            if len(written) == CONFIRMED:
                confirm()
    finally:
        confirm()


def _mapped(folder: Path, name: str, kind: str, shape: tuple[int, ...]) -> Any:
    """Column that is mapped for writing; None if it is absent or damaged."""
    with suppress(EOFError, OSError, ValueError):
        found = np.load(folder / f"{name}.npy", mmap_mode="r+", allow_pickle=False)
        if found.shape == shape and found.dtype == np.dtype(kind):
            return found
    return None


def _new(folder: Path, name: str, kind: str, shape: tuple[int, ...]) -> Any:
    """Column of zeros that is mapped for writing."""
    return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(kind), shape)


def _in_order_of_completion(
    todo: Iterator[tuple[int, Any]], describe: Callable[[Any], Any], workers: int | None, count: int
) -> Iterator[tuple[int, Any]]:
    """Yield the number and the result of each job, computed in processes if the work is long."""
    workers = processors() if workers is None else workers
    if workers < 2 or count <= FEW_ROWS:
        yield from ((number, describe(job)) for number, job in todo)
        return
    pool = ProcessPoolExecutor(workers)
    running: dict[Future[Any], int] = {}
    try:
        while True:
            for number, job in islice(todo, 2 * workers - len(running)):
                running[pool.submit(describe, job)] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _describe(rows: LmdbRows, jobs: Sequence[tuple[int, Place]]) -> tuple[dict[str, list[int]], bytes]:
    """Descriptions of rows, by column, and a digest of their contents."""
    values: dict[str, list[int]] = {name: [] for name in _DESCRIPTIONS}
    digest = hashlib.blake2b(digest_size=16)
    for number, place in jobs:
        try:
            digest.update(rows.packed(place))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = _description(rows.frame(number, place))
        except ValueError:
            found = (0, 0, 0, UNUSABLE, NO_CHARGE, 0)
        for column, value in zip(values.values(), found, strict=True):
            column.append(value)
    return values, digest.digest()


def _description(frame: Frame) -> tuple[int, ...]:
    elements = sum(1 << z for z in np.unique(frame.atomic_numbers).tolist())
    flags = sum(flag for name, flag in FLAG_OF_LABEL.items() if getattr(frame, name) is not None)
    flags |= (HIDDEN if not frame.weight else 0) | (FREE_ATOM if is_isolated_atom(frame) else 0)
    return (len(frame), elements % 2**64, elements >> 64, flags, *_charge_and_spin(frame))


def _charge_and_spin(frame: Frame) -> tuple[int, int]:
    charge, spin = stated_charge_and_spin(frame.charge_spin)
    return (
        NO_CHARGE if charge is None else max(NO_CHARGE + 1, min(charge, 2**15 - 1)),
        0 if spin is None else min(spin, 2**15 - 1),
    )


def _count_edges(
    rows: LmdbRows, cutoff: float, jobs: Sequence[tuple[int, Place]]
) -> tuple[dict[str, list[int]], bytes]:
    """Numbers of edges of rows, as a column, and any digest."""
    counts = []
    for number, place in jobs:
        try:
            frame = rows.frame(number, place)
            graph = build_graph(frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, cutoff)
            counts.append(graph.num_edges)
        except ValueError:
            counts.append(0)
    return {f"edges-{cutoff:g}": counts}, b"filled" + bytes(10)


def _summary(columns: dict[str, NDArray[Any]], folder: Path) -> dict[str, Any]:
    """Numbers of rows with each flag, elements with examples, and a digest; one pass over the columns."""
    size = 1 << 20
    counts = np.zeros(256, dtype=np.int64)
    examples: dict[str, list[int]] = {}
    special: dict[str, list[NDArray[np.int64]]] = {name: [] for name in _SPECIAL}
    for start in range(0, len(columns["flags"]), size):
        part = {n: np.asarray(columns[n][start : start + size]) for n in ("flags", "low", "high")}
        counts += np.bincount(part["flags"], minlength=256)
        for name, flag in _SPECIAL.items():
            special[name].append(np.flatnonzero(part["flags"] & flag) + start)
        for z in range(1, len(chemical_symbols)):
            mask = part["low" if z < 64 else "high"] >> np.uint64(z % 64) & np.uint64(1)
            if len(known := examples.get(chemical_symbols[z], [])) < EXAMPLES and mask.any():
                found = np.flatnonzero(mask)[: EXAMPLES - len(known)] + start
                examples[chemical_symbols[z]] = known + found.tolist()
    for name, found_rows in special.items():
        np.save(folder / f"{name}.npy", np.concatenate(found_rows))
    digest = hashlib.blake2b(
        np.load(folder / "index-chunks.npy", allow_pickle=False).tobytes(), digest_size=16
    )
    return {
        "flags": {str(value): int(n) for value, n in enumerate(counts) if n},
        "examples": examples,
        "digest": digest.hexdigest(),
    }
