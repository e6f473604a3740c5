"""Reader of deepmd-kit's npy systems, standard and mixed type."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers
from numpy.typing import NDArray

from dpa4.data.frame import Frame
from dpa4.data.labels import checked_frame


def find_systems(directory: Path) -> list[Path]:
    """Find all systems at or below a directory, sorted: the directories that contain ``type.raw``."""
    return sorted(file.parent for file in directory.rglob("type.raw"))


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
    types = np.array((system / "type.raw").read_text().split(), dtype=np.int64)
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
    real_types = _load(folder, "real_atom_types", (count, n))
    all_types = np.tile(types, (count, 1)) if real_types is None else real_types.astype(np.int64)
    if all_types.max(initial=-1) >= len(charges) or all_types.min(initial=0) < -1:
        raise ValueError(
            f"{folder} has types up to {all_types.max()}, but type_map.raw has {len(charges)} names"
        )
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


def _load(folder: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Load an array of a set as float64; None if there is no such file."""
    path = folder / f"{name}.npy"
    if not path.exists():
        return None
    values = np.load(path, allow_pickle=False)
    try:
        return values.astype(np.float64).reshape(shape)
    except ValueError:
        raise ValueError(
            f"{path} has shape {values.shape}, which does not match {shape} of its system"
        ) from None


def _type_map(system: Path) -> NDArray[np.int64]:
    """Read the nuclear charge of each type."""
    path = system / "type_map.raw"
    if not path.exists():
        raise ValueError(f"{system} has no type_map.raw; add it, with the chemical symbol of each type")
    names = path.read_text().split()
    if unknown := [name for name in names if not atomic_numbers.get(name)]:
        raise ValueError(f"{path} names {unknown}; use chemical symbols such as H, C, Si")
    return np.array([atomic_numbers[name] for name in names], dtype=np.int64)
