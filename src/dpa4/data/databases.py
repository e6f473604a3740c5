"""Rows of ASE databases: SQLite, JSON and LMDB; what a row may unpack to or allocate is checked first."""

import json
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.db.row import AtomsRow
from ase.db.sqlite import SQLite3Database
from ase.io import jsonio

from dpa4.data.unpacking import inflate, name_without_compression, open_text
from dpa4.system import require

SUFFIXES = (".db", ".json", ".aselmdb")
LONGEST_TEXT = 2**12  # bytes of one element of an array of texts


def is_database(path: Path) -> bool:
    """Return whether the name of a file is that of an ASE database."""
    return name_without_compression(path).suffix in SUFFIXES


def read_database(path: Path, last: bool = False) -> Iterator[tuple[str, Atoms]]:
    """Yield origin and structure of each row; key-value pairs and data of a row become ``atoms.info``.

    Args:
        path: File ``.db``, ``.json`` or ``.aselmdb``.
        last: Read the row with the highest number only.

    Raises:
        ImportError: If the reader of ``.aselmdb`` files is not installed.
        ValueError: If the file is damaged, or would fill the memory; the message names file and row.
    """
    readers: dict[str, Callable[[Path, bool], Iterator[tuple[int, AtomsRow | bytes]]]]
    readers = {".db": _sqlite_rows, ".aselmdb": _lmdb_rows}
    rows = readers.get(path.suffix, _json_rows)
    origin = str(path)
    try:
        for number, row in rows(path, last):
            origin = f"{path}, row {number}"
            yield origin, _atoms(row, number)
            origin = f"{path}, after row {number}"
    except ImportError:
        raise
    except Exception as error:  # the databases and their decoders raise many kinds of errors
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(
            f"{origin} cannot be read as an ASE database: {kind}{' '.join(str(error).split())}"
        ) from error


def _atoms(row: AtomsRow | bytes, number: int) -> Atoms:
    if isinstance(row, bytes):
        row = AtomsRow(decode(inflate(row).decode()) | {"id": number})
    # ASE decodes these texts later, without a look at the sizes in them.
    for name in ("_constraints", "_data"):
        if isinstance(text := getattr(row, name, None), str):
            setattr(row, name, decode(text))
    atoms = row.toatoms()
    atoms.info.update(row.key_value_pairs)
    atoms.info.update(row.data)
    return atoms


# SQLite


class _ReadOnly(SQLite3Database):
    """SQLite database of ASE, opened without the right to write: ASE creates its tables in any other database."""

    def _connect(self) -> Any:
        return sqlite3.connect(f"{Path(str(self.filename)).as_uri()}?mode=ro", uri=True, timeout=20)

    def decode(self, txt: Any, lazy: bool = False) -> Any:
        return decode(txt) if isinstance(txt, str) and not lazy else super().decode(txt, lazy)


def _sqlite_rows(path: Path, last: bool) -> Iterator[tuple[int, AtomsRow]]:
    # No lock file, because the folder of a data set may be read-only.
    with _ReadOnly(str(path.absolute()), create_indices=False, use_lock_file=False) as database:
        rows = database.select(sort="-id", limit=1) if last else database.select()
        yield from ((row.id, row) for row in rows)


# JSON


def decode(text: str) -> Any:
    """Decode the JSON of ASE, whose arrays must be as large as their list of numbers.

    ASE allocates and fills an array of whatever shape is written, even if there is a single number.
    """
    return jsonio.numpyfy(jsonio.fix_int_keys_in_dicts(_decoder.decode(text)))


def _checked_object(values: dict[str, Any]) -> Any:
    if "__ndarray__" in values:
        shape, name, numbers = values["__ndarray__"]
        dtype = np.dtype(name)
        size = int(np.prod([int(n) for n in shape], dtype=object)) * (2 if dtype.kind == "c" else 1)
        given = len(numbers) if isinstance(numbers, list) else 1
        if size != given or dtype.kind not in "biufcSU" or dtype.itemsize > LONGEST_TEXT:
            raise ValueError(f"an array of shape {shape} and type {name} is written with {given} numbers")
    return jsonio.object_hook(values)


_decoder = json.JSONDecoder(object_hook=_checked_object)


def _json_rows(path: Path, last: bool) -> Iterator[tuple[int, AtomsRow]]:
    with open_text(path) as file:
        content = decode(file.read())
    if not isinstance(content, dict) or ("ids" not in content and 1 not in content):
        raise ValueError("it has neither ids nor a row 1")
    ids = [int(number) for number in content.get("ids", [1])]
    for number in ids[-1:] if last else ids:
        yield number, AtomsRow(content[number] | {"id": number})


# LMDB


def _lmdb_rows(path: Path, last: bool) -> Iterator[tuple[int, bytes]]:
    """Yield number and packed value of each row."""
    try:
        lmdb = require("lmdb", "aselmdb")
    except ImportError:
        raise ImportError(f"reading {path} needs lmdb: pip install 'dpa4[aselmdb]'") from None
    _check_length(path)
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as txn,
    ):
        # The other keys are nextid, deleted_ids and metadata.
        numbers = sorted(int(key) for key in txn.cursor().iternext(values=False) if key.isdigit())
        for number in numbers[-1:] if last else numbers:
            yield number, txn.get(str(number).encode())


class _Meta(NamedTuple):
    """Fields of a meta page of LMDB that say how long the file must be."""

    page_size: int
    last_page: int
    transaction: int


# Header of a page (16 bytes), magic number, version, address, size of the map, page size, other fields of the two
# root records of 48 bytes each, last page, number of the transaction.
_META = struct.Struct("<16x I I 8x 8x I 92x Q Q")
_MAGIC, _VERSION = 0xBEEFC0DE, 1


def _check_length(path: Path) -> None:
    """Check that an LMDB file is as long as its newest meta page says: reading beyond the end kills the process.

    Raises:
        ValueError: If the file is too short or not of LMDB.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = _meta(file.read(_META.size))
        file.seek(first.page_size)
        second = _meta(file.read(_META.size))
    newest = max(first, second, key=lambda meta: meta.transaction)
    needed = (newest.last_page + 1) * first.page_size
    if size < needed:
        raise ValueError(
            f"it has {size:,} bytes but should have {needed:,}; the copy is incomplete, repeat it"
        )


def _meta(page: bytes) -> _Meta:
    if len(page) < _META.size:
        raise ValueError("it is too short for an LMDB file; the copy is incomplete, repeat it")
    magic, version, *values = _META.unpack(page)
    meta = _Meta(*values)
    if magic != _MAGIC or version != _VERSION or not 256 <= meta.page_size <= 2**16:
        raise ValueError("it is no LMDB file, or a damaged one")
    return meta
