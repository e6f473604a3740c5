"""Frame: one structure and its reference labels; checks of structures that were read."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray

from dpa4.graph.lattice import check_positions, periodic_lattice

_HEAVIEST = len(chemical_symbols) - 1  # atomic number of the last element


@dataclass(frozen=True, slots=True)
class Frame:
    """A structure and its reference labels, in eV and Angstrom; a missing label is None.

    ``virial`` is -dE/dstrain = -volume * stress, with the stress in ASE's sign (tensile positive).
    """

    atomic_numbers: NDArray[np.int64]  # (N,)
    positions: NDArray[np.float64]  # (N, 3)
    cell: NDArray[np.float64]  # (3, 3), cell vectors as rows; zeros without periodicity
    pbc: NDArray[np.bool_]  # (3,)
    # Entries that look like a total charge or a spin, as in the file: a model that ignores them does not check them.
    charge_spin: Mapping[str, Any] = field(default_factory=dict)
    energy: float | None = None
    forces: NDArray[np.float64] | None = None  # (N, 3)
    virial: NDArray[np.float64] | None = None  # (3, 3)
    weight: float = 1.0
    group: str = ""  # group in error tables: config_type in the file, or the name of the file
    origin: str = ""  # source for messages, such as "train.xyz, frame 12"

    def __len__(self) -> int:
        """Number of atoms."""
        return len(self.atomic_numbers)

    @property
    def volume(self) -> float:
        """Volume of the cell in Angstrom^3; 0 unless the structure is periodic along all three axes."""
        return abs(float(np.linalg.det(self.cell))) if self.pbc.all() else 0.0


def file_of(origin: str) -> str:
    """File of a structure, such as "train.xyz" from the origin "train.xyz, frame 12"; "" if there is none."""
    return origin.rpartition(", ")[0]


def digest(frames: Iterable[Frame]) -> str:
    """Digest of structures, labels and weights in their order, by which a run recognises its data."""
    found = hashlib.blake2b(digest_size=16)
    for frame in frames:
        arrays = (frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, frame.forces, frame.virial)
        for array in arrays:
            found.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        found.update(repr((len(frame), frame.charge_spin, frame.energy, float(frame.weight))).encode())
    return found.hexdigest()


def structure_digest(frame: Frame) -> bytes:
    """Digest of elements, positions and cell, with five decimals, because files differ in the number of digits."""
    found = hashlib.blake2b(frame.atomic_numbers.tobytes(), digest_size=16)
    for array in (frame.positions, frame.cell):
        found.update((np.round(array, 5) + 0.0).tobytes())  # the sum turns -0 into 0
    return found.digest()


def check_structure(
    atomic_numbers: NDArray, positions: NDArray[np.float64], cell: NDArray[np.float64], origin: str
) -> None:
    """Check that every atom is of an element, and that positions and cell are in the range of neighbour searches.

    Args:
        atomic_numbers: Atomic numbers (N,).
        positions: Atom positions (N, 3), in Angstrom.
        cell: Cell vectors as rows (3, 3), in Angstrom.
        origin: Source of the structure, for messages.

    Raises:
        ValueError: If not; the message names the source and the first atom concerned.
    """
    if len(other := np.flatnonzero((atomic_numbers < 1) | (atomic_numbers > _HEAVIEST))):
        atom, number = int(other[0]), int(atomic_numbers[other[0]])
        what = "is a ghost or dummy atom (X)" if number == 0 else f"has the atomic number {number}"
        raise ValueError(f"{origin}: atom {atom} {what}, not an atom of an element; remove or replace it")
    try:
        check_positions(torch.from_numpy(np.asarray(positions, dtype=np.float64)))
        periodic_lattice(cell, np.ones(3, dtype=bool))
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
