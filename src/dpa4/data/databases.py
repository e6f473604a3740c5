"""Rows of ASE databases: SQLite, JSON and LMDB; what a row may unpack to or allocate is checked first."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.db.row import AtomsRow
from ase.db.sqlite import SQLite3Database
from ase.io import jsonio

from dpa4.data.lmdb_file import LmdbFile
from dpa4.data.unpacking import inflate, name_without_compression, open_text, unpacked_limit

SUFFIXES = (".db", ".json", ".aselmdb")
LONGEST_TEXT = 2**12  # bytes of one element of an array of texts
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
            yield origin, _atoms(load())
            origin = f"{path}, after row {number}"
    except Exception as error:  # the databases and their decoders raise many kinds of errors
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(
            f"{origin} cannot be read as an ASE database: {kind}{' '.join(str(error).split())}"
        ) from error


def _atoms(row: AtomsRow) -> Atoms:
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
