"""Reader of deepmd-kit's npy systems, standard and mixed type."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from dpa4.data.extxyz import ISOTOPES
from dpa4.data.frame import Frame
from dpa4.data.labels import checked_frame
from dpa4.data.unpacking import open_text


def is_system(directory: Path) -> bool:
    """Return whether a directory is a system: it contains ``type.raw``."""
    return (directory / "type.raw").is_file()


def read_system(system: Path) -> Iterator[Frame]:
    """Read all frames of all sets of one system.

    The virial is -dE/dstrain in eV, as in ``Frame``. Padding atoms (type -1) of mixed-type systems are
    removed.

    Args:
        system: Directory with ``type.raw``, ``type_map.raw`` and ``set.*``.

    Raises:
        ValueError: If a file is missing, does not match the others, or names an unknown element.
    """
    charges = _type_map(system)
    types = _types(system)
    sets = sorted(path for path in system.glob("set.*") if path.is_dir())
    if not sets:
        raise ValueError(f"{system} has type.raw but no set.* directory")
    periodic = not (system / "nopbc").exists()
    for folder in sets:
        yield from _read_set(folder, types, charges, periodic, group=system.name)


def _read_set(
    folder: Path, types: NDArray[np.int64], charges: NDArray[np.int64], periodic: bool, group: str
) -> Iterator[Frame]:
    n = len(types)
    positions = _load(folder, "coord", (-1, n, 3))
    if positions is None:
        raise ValueError(f"{folder} has no coord.npy")
    count = len(positions)
    cells = _load(folder, "box", (count, 3, 3)) if periodic else np.zeros((count, 3, 3))
    if cells is None:
        raise ValueError(f"{folder} has no box.npy; add it, or an empty file nopbc beside type.raw")
    all_types = _types_of_frames(folder, types, count, len(charges))
    energy = _load(folder, "energy", (count,))
    forces = _load(folder, "force", (count, n, 3))
    virial = _load(folder, "virial", (count, 3, 3))
    charge_spin = _load(folder, "charge_spin", (count, 2))
    for k in range(count):
        real = all_types[k] >= 0
        origin = f"{folder}, frame {k}"
        yield checked_frame(
            Frame(
                atomic_numbers=charges[all_types[k][real]],
                positions=positions[k][real],
                cell=cells[k],
                pbc=np.full(3, periodic),
                charge_spin={}
                if charge_spin is None
                else {"charge": charge_spin[k, 0], "spin": charge_spin[k, 1]},
                energy=None if energy is None else float(energy[k]),
                forces=None if forces is None else forces[k][real],
                virial=None if virial is None else virial[k],
                group=group,
                origin=origin,
            )
        )


def _types_of_frames(folder: Path, types: NDArray[np.int64], count: int, known: int) -> NDArray[np.int64]:
    """Type of each atom of each frame (count, n); -1 for padding atoms of mixed-type systems."""
    path = folder / "real_atom_types.npy"
    values = _load(folder, "real_atom_types", (count, len(types)))
    if values is None:
        path, values = folder.parent / "type.raw", np.tile(types.astype(np.float64), (count, 1))
    wrong = (values != np.floor(values)) | (values < -1) | (values >= known)
    if wrong.any():
        frame, atom = np.argwhere(wrong)[0]
        raise ValueError(
            f"{path}: the type of atom {atom} in frame {frame} is {values[frame, atom]:g}; allowed are whole numbers "
            f"from 0 to {known - 1}, as type_map.raw has {known} names, and -1 for padding"
        )
    return values.astype(np.int64)


def _load(folder: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Load an array of a set as float64; None if there is no such file.

    Raises:
        ValueError: If the file is not a complete array of numbers of this shape.
    """
    path = folder / f"{name}.npy"
    if not path.exists():
        return None
    found = _checked_header(path)
    try:
        return np.load(path, allow_pickle=False).astype(np.float64).reshape(shape)
    except ValueError:
        raise ValueError(f"{path} has shape {found}, which does not match {shape} of its system") from None


def _checked_header(path: Path) -> tuple[int, ...]:
    """Return the shape of a stored array after comparing the header with the size of the file.

    numpy allocates what the header says, and its messages do not name the file.
    """
    advice = "write it with numpy.save, as an array of numbers"
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
            size = path.stat().st_size - file.tell()
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, which raises many kinds of errors
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no .npy file or a damaged one ({reason}); {advice}") from None
    if dtype.kind not in "fiub":
        raise ValueError(f"{path} holds values of type {dtype}, not numbers; {advice}")
    needed = math.prod(shape) * dtype.itemsize
    if size != needed:
        raise ValueError(
            f"{path} has {size:,} bytes of data, but its header says {needed:,} (shape {shape}, {dtype}); "
            f"the file is damaged, copy it again or {advice}"
        )
    return shape


def _types(system: Path) -> NDArray[np.int64]:
    """Read the type of each atom."""
    path = system / "type.raw"
    words = _words(path)
    for number, word in enumerate(words):
        if not (word.isascii() and word.isdigit() and len(word) < 10):
            raise ValueError(
                f"{path}: the type of atom {number} is {word[:40]!r}; write a number, counted from 0 in the order of "
                "type_map.raw"
            )
    return np.array(words, dtype=np.int64)


def _words(path: Path) -> list[str]:
    try:
        with open_text(path) as file:
            return file.read().split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error})") from error


def _type_map(system: Path) -> NDArray[np.int64]:
    """Read the nuclear charge of each type; D and T are hydrogen."""
    path = system / "type_map.raw"
    if not path.exists():
        raise ValueError(f"{system} has no type_map.raw; add it, with the chemical symbol of each type")
    names = _words(path)
    numbers = atomic_numbers | dict.fromkeys(ISOTOPES, 1)
    if unknown := [name for name in names if not numbers.get(name)]:
        raise ValueError(f"{path} names {unknown}; use chemical symbols such as H, C, Si")
    return np.array([numbers[name] for name in names], dtype=np.int64)
