"""Frame: one structure and its reference labels."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


def file_of(origin: str) -> str:
    """File of a structure, from the origin of the structure, such as "train.xyz" from "train.xyz, frame 12"."""
    return origin.rpartition(", ")[0] or origin


def digest(frames: Iterable[Frame]) -> str:
    """Digest of structures, labels and weights in their order, by which a run recognises its data."""
    found = hashlib.blake2b(digest_size=16)
    for frame in frames:
        arrays = (frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, frame.forces, frame.virial)
        for array in arrays:
            found.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        found.update(repr((len(frame), frame.charge_spin, frame.energy, float(frame.weight))).encode())
    return found.hexdigest()
