"""Rows of ASE databases: SQLite, JSON and LMDB; what a row may unpack to or allocate is checked first."""

import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.db.row import AtomsRow
from ase.db.sqlite import SQLite3Database

from dpa4.data.ase_json import decode
from dpa4.data.lmdb_file import LmdbFile
from dpa4.data.unpacking import inflate, name_without_compression, open_text, reason, unpacked_limit

SUFFIXES = (".db", ".json", ".aselmdb")
LARGEST_ROW = 2**26  # bytes of JSON in an .aselmdb file; as Python objects they can become 25 times as many

Row = tuple[int, Callable[[], AtomsRow]]
"""Number of a row, and the function that reads it."""


def is_database(path: Path) -> bool:
    """Return whether the name of a file is that of an ASE database."""
    return name_without_compression(path).suffix in SUFFIXES


def read_database(path: Path, last: bool = False) -> Iterator[tuple[str, Atoms]]:
    """Yield origin and structure of each row; key-value pairs and data of a row become ``atoms.info``.

    Args:
        path: File ``.db``, ``.json`` or ``.aselmdb``.
        last: Read the row with the highest number only.

    Raises:
        ValueError: If the file is damaged, or would fill the memory; the message names file and row.
    """
    rows = {".db": _sqlite_rows, ".aselmdb": _lmdb_rows}.get(path.suffix, _json_rows)
    origin = str(path)
    try:
        for number, load in rows(path, last):
            origin = f"{path}, row {number}"
            yield origin, _with_info(load())
            origin = f"{path}, after row {number}"
    except Exception as error:  # the databases and their decoders raise many kinds of errors
        raise ValueError(f"{origin} cannot be read as an ASE database: {reason(error)}") from error


def atoms_of(content: dict[str, Any]) -> Atoms:
    """Structure of a row, given its decoded JSON and its number as "id"."""
    return _with_info(AtomsRow(content))


def _with_info(row: AtomsRow) -> Atoms:
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


def _sqlite_rows(path: Path, last: bool) -> Iterator[Row]:
    # No lock file, because the folder of a data set may be read-only.
    with _ReadOnly(str(path.absolute()), create_indices=False, use_lock_file=False) as database:
        rows = database.select(sort="-id", limit=1) if last else database.select()
        yield from ((row.id, lambda row=row: row) for row in rows)


# JSON


def _json_rows(path: Path, last: bool) -> Iterator[Row]:
    with open_text(path) as file:
        content = decode(file.read())
    if not isinstance(content, dict) or ("ids" not in content and 1 not in content):
        raise ValueError("it has neither ids nor a row 1")
    ids = [int(number) for number in content.get("ids", [1])]
    for number in ids[-1:] if last else ids:
        yield number, partial(AtomsRow, content[number] | {"id": number})


# LMDB


def _lmdb_rows(path: Path, last: bool) -> Iterator[Row]:
    with path.open("rb") as file:
        content = LmdbFile(file)
        left = unpacked_limit(path.stat().st_size)  # for all rows together: their values may overlap

        def load(number: int) -> AtomsRow:
            nonlocal left
            text = inflate(content.value(places[number]), min(left, LARGEST_ROW))
            left -= len(text)
            return AtomsRow(decode(text.decode()) | {"id": number})

        # The other keys are nextid, deleted_ids and metadata.
        places = {int(key): place for key, place in content.places() if key.isdigit() and len(key) < 20}
        for number in sorted(places)[-1:] if last else sorted(places):
            yield number, partial(load, number)
