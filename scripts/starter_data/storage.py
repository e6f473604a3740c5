"""Files of the starter data: molecules as JSON, labelled structures in a database that survives an interruption."""

import gzip
import json
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = {"train": 0.90, "valid": 0.04, "test": 0.06}
POSITION_DECIMALS = 3  # digits in Angstrom; the labels belong to the rounded positions
FORCE_DECIMALS = 4  # digits in eV/Angstrom


@dataclass(frozen=True)
class Molecule:
    """Molecule with its bonds and conformers.

    Attributes:
        smiles: Canonical SMILES without stereochemistry.
        family: Family of the enumeration.
        split: "train", "valid" or "test".
        numbers: Atomic numbers.
        bonds: Index, index and order of each bond.
        conformers: Positions in Angstrom, (number of conformers, atoms, 3).
    """

    smiles: str
    family: str
    split: str
    numbers: list[int]
    bonds: list[list[float]]
    conformers: list[list[list[float]]]


@dataclass(frozen=True)
class System:
    """One molecule or a cluster of molecules, whose structures are created and labelled together.

    Attributes:
        name: Unique name, from which all random numbers follow.
        family: Family of the molecule, or "dimer", "cluster", "water".
        split: "train", "valid" or "test".
        members: Indices of molecules.
    """

    name: str
    family: str
    split: str
    members: list[int]


@dataclass(frozen=True)
class Frames:
    """Labelled structures of one system.

    Attributes:
        numbers: Atomic numbers, (atoms,).
        positions: (frames, atoms, 3) in Angstrom.
        energies: (frames,) in eV.
        forces: (frames, atoms, 3) in eV/Angstrom.
        gaps: Gaps between the highest occupied and the lowest empty orbital, (frames,) in eV.
        kinds: Origin of each structure, for example "md-600K".
    """

    numbers: NDArray[Any]
    positions: NDArray[Any]
    energies: NDArray[Any]
    forces: NDArray[Any]
    gaps: NDArray[Any]
    kinds: list[str]


def split_of(group: str) -> str:
    """Split of a group of molecules or clusters that belong together; it depends on the text only."""
    position = int.from_bytes(sha256(group.encode()).digest()[:8], "big") / 2**64
    for split, share in SPLITS.items():
        position -= share
        if position < 0:
            return split
    return split


def write_molecules(path: Path, molecules: list[Molecule], systems: list[System]) -> None:
    """Write molecules and systems as compressed JSON; equal input yields equal bytes."""
    text = json.dumps({"molecules": [asdict(m) for m in molecules], "systems": [asdict(s) for s in systems]})
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_molecules(path: Path) -> tuple[list[Molecule], list[System]]:
    """Read the file of ``write_molecules``."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    return [Molecule(**m) for m in content["molecules"]], [System(**s) for s in content["systems"]]


class Database:
    """Results by system. Each is stored in one transaction, so that an interruption loses unfinished systems only."""

    def __init__(self, path: Path, digest: str) -> None:
        """Open or create the database.

        Args:
            path: The file.
            digest: Digest of the file of molecules.

        Raises:
            ValueError: If the database belongs to another file of molecules.
        """
        self._connection = sqlite3.connect(path)
        self._connection.execute("PRAGMA page_size = 1024")  # results are small; larger pages waste space
        with self._connection as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS source (digest TEXT)")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS results (name TEXT PRIMARY KEY, seconds TEXT, dropped TEXT, frames BLOB)"
            )
            stored = connection.execute("SELECT digest FROM source").fetchone()
            if stored is None:
                connection.execute("INSERT INTO source VALUES (?)", (digest,))
            elif stored[0] != digest:
                raise ValueError(
                    f"{path} belongs to another file of molecules; continue with that file or choose another output"
                )

    def names(self) -> set[str]:
        """Names of the systems that are finished."""
        return {name for (name,) in self._connection.execute("SELECT name FROM results")}

    def add(
        self, name: str, frames: Frames | None, seconds: dict[str, float], dropped: dict[str, int]
    ) -> None:
        """Store the result of a system."""
        blob = b"" if frames is None else pack(frames)
        with self._connection as connection:
            connection.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?)",
                (name, json.dumps(seconds), json.dumps(dropped), blob),
            )

    def results(self) -> Iterator[tuple[str, Frames | None, dict[str, float], dict[str, int]]]:
        """Yield the results in the order of the names."""
        for name, seconds, dropped, blob in self._connection.execute("SELECT * FROM results ORDER BY name"):
            yield name, unpack(blob) if blob else None, json.loads(seconds), json.loads(dropped)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def pack(frames: Frames) -> bytes:
    """Compressed bytes of labelled structures, with rounded positions and forces."""
    count, atoms, _ = frames.positions.shape
    columns = {
        "numbers": np.asarray(frames.numbers, np.int32),
        "positions": np.rint(frames.positions * 10**POSITION_DECIMALS).astype(np.int32),
        "forces": np.rint(frames.forces * 10**FORCE_DECIMALS).astype(np.int32),
        "energies": np.asarray(frames.energies, np.float64),
        "gaps": np.asarray(frames.gaps, np.float32),
    }
    head = json.dumps({"frames": count, "atoms": atoms, "kinds": frames.kinds}).encode()
    # The leading bytes of the integers are nearly all equal: side by side they need no space.
    planes = [column.reshape(-1).view(np.uint8).reshape(column.size, -1).T for column in columns.values()]
    return zlib.compress(head + b"\n" + b"".join(plane.tobytes() for plane in planes), 9)


def unpack(data: bytes) -> Frames:
    """Labelled structures from the bytes of ``pack``."""
    head, _, body = zlib.decompress(data).partition(b"\n")
    content = json.loads(head)
    count, atoms = content["frames"], content["atoms"]

    def column(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        nonlocal body
        size, width = int(np.prod(shape)), np.dtype(dtype).itemsize
        planes = np.frombuffer(body, np.uint8, size * width).reshape(width, size)
        body = body[size * width :]
        return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)

    return Frames(
        numbers=column((atoms,), np.int32).astype(int),
        positions=column((count, atoms, 3), np.int32) / 10**POSITION_DECIMALS,
        forces=column((count, atoms, 3), np.int32) / 10**FORCE_DECIMALS,
        energies=column((count,), np.float64),
        gaps=column((count,), np.float32),
        kinds=content["kinds"],
    )
