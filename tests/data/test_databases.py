"""ASE databases: damaged files, values that would fill the memory, databases of other programs."""

import json
import sqlite3
import zlib

import ase.db
import numpy as np
import pytest
from ase.build import molecule

from dpa4.data import databases, read_frames
from dpa4.data.databases import decode
from dpa4.data.lmdb_file import LmdbFile
from dpa4.data.readers import read_atoms

HUGE = {"__ndarray__": [[10**10], "float64", [0.0]]}
lmdb = pytest.importorskip("lmdb", reason="needs lmdb")


def write_lmdb(path, rows, **extra):
    """Write an .aselmdb file; rows are dictionaries or packed bytes."""
    with (
        lmdb.open(str(path), subdir=False, map_size=2**24) as environment,
        environment.begin(write=True) as txn,
    ):
        for number, row in rows.items():
            packed = row if isinstance(row, bytes) else zlib.compress(json.dumps(row).encode())
            txn.put(str(number).encode(), packed)
        for name, value in extra.items():
            txn.put(name.encode(), zlib.compress(json.dumps(value).encode()))
    path.with_name(path.name + "-lock").unlink()
    return path


def water(**entries):
    atoms = molecule("H2O")
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": np.zeros((3, 3)).tolist(),
        "pbc": [False] * 3,
        "unique_id": "0" * 32,
        "ctime": 1.0,
        "mtime": 1.0,
        "user": "x",
        "key_value_pairs": {"k": 1},
    } | entries


def test_rows_of_lmdb_are_those_that_exist(tmp_path):
    """The counter of rows may say anything, as 10^12; deleted rows have no key."""
    rows = {11: water(energy=-11.0), 2: water(energy=-2.0), 7: water(energy=-7.0)}
    path = write_lmdb(tmp_path / "a.aselmdb", rows, nextid=10**12, deleted_ids=[1, 3])
    assert [f.energy for f in read_frames(path)] == [-2.0, -7.0, -11.0]
    ((origin, atoms),) = read_atoms(path, last=True)
    assert origin == f"{path}, row 11" and atoms.get_potential_energy() == -11 and atoms.info["k"] == 1


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_a_cut_lmdb_file_is_refused(tmp_path, kept):
    """LMDB maps the file, and reading beyond its end ends the process with SIGBUS."""
    path = write_lmdb(tmp_path / "a.aselmdb", {k: water(data={"x": [k] * 999}) for k in range(1, 40)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"a.aselmdb .*(the copy is incomplete, repeat it|has no structure)"):
        read_frames(path)


def test_other_files_are_no_lmdb(tmp_path):
    (tmp_path / "a.aselmdb").write_bytes(b"whatever its name says " * 999)
    with pytest.raises(ValueError, match="a.aselmdb cannot be read as an ASE database: it is no LMDB file"):
        read_frames(tmp_path / "a.aselmdb")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            zlib.compress(bytes(2**16 + 1)),
            "its .* compressed bytes unpack to more than 65,536 bytes",
        ),
        (zlib.compress(b"{}")[:-3], "its 7 compressed bytes are incomplete"),
        (b"nothing", ".*incorrect header check"),
        (water(data={"x": HUGE}), r"an array of shape \[10000000000\] .* is written with 1 numbers"),
        (zlib.compress(b"[" * 2**15), ".*recursion"),
        (water(numbers=[1, 2]), ""),
    ],
)
def test_a_damaged_or_malicious_row_is_named(tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(databases, "LARGEST_ROW", 2**16)
    path = write_lmdb(tmp_path / "a.aselmdb", {1: water(), 3: row})
    with pytest.raises(ValueError, match=rf"a.aselmdb, row 3 cannot be read .*{message}") as caught:
        read_frames(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.db"])
def test_arrays_are_as_large_as_their_numbers(tmp_path, name):
    with ase.db.connect(tmp_path / name) as database:
        database.write(molecule("H2O"), config_type="x", data={"x": [1.5]})
    text = json.dumps({"config_type": HUGE})
    if name == "a.json":
        content = json.loads((tmp_path / name).read_text())
        content["1"]["key_value_pairs"] = {"config_type": HUGE}
        (tmp_path / name).write_text(json.dumps(content))
    else:
        with sqlite3.connect(tmp_path / name) as connection:
            connection.execute("UPDATE systems SET key_value_pairs = ?", (text,))
        connection.close()
    with pytest.raises(
        ValueError, match=f"{name}.* cannot be read .*: an array of shape .* is written with 1 numbers"
    ):
        read_frames(tmp_path / name)


def test_arrays_of_ase_are_decoded_as_by_ase():
    for array in (np.arange(6).reshape(2, 3), np.array([1 + 2j, 3j]), np.array(["a", "bc"]), np.array(2.5)):
        found = decode(ase.io.jsonio.encode({"a": array}))["a"]
        assert found.shape == array.shape and (found == array).all()


def test_databases_of_other_programs_are_not_changed(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x INTEGER)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other.db cannot be read as an ASE database"):
        read_frames(path)
    assert path.read_bytes() == before
    (tmp_path / "run.json").write_text('{"energy": 1}')
    with pytest.raises(
        ValueError, match="run.json cannot be read as an ASE database: it has neither ids nor a row 1"
    ):
        read_frames(tmp_path / "run.json")


def test_entries_of_lmdb_are_those_that_lmdb_finds(tmp_path):
    """With pages of every kind: several levels of branches, values of many pages, deleted and replaced entries."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.mdb"
    with lmdb.open(str(path), subdir=False, map_size=2**26) as environment:
        for _ in range(3):
            with environment.begin(write=True) as txn:
                for key in rng.integers(0, 5000, 2000):
                    if rng.random() < 0.2:
                        txn.delete(str(key).encode())
                    else:
                        txn.put(str(key).encode(), rng.bytes(int(10 ** rng.uniform(0, 4))))
        with environment.begin() as txn:
            expected = dict(txn.cursor())
            assert txn.stat()["depth"] > 2
    with path.open("rb") as file:
        content = LmdbFile(file)
        assert {key: content.value(place) for key, place in content.places()} == expected
