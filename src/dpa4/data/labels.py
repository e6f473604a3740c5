"""Conversion of ASE structures to ``Frame``: names, units and signs of the labels."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from dpa4.data.frame import Frame, check_structure

# Entries searched for a label; the first match counts. Results of a calculator come first, because ASE stores
# energy, forces and stress of an extxyz file there, then REF_* (MACE), then plain names. free_energy is the last
# resort: the plain energy is extrapolated to zero smearing, and other structures are more likely to have it.
ENERGY = ("results.energy", "info.REF_energy", "info.energy", "results.free_energy", "info.free_energy")
FORCES = ("results.forces", "arrays.REF_forces", "arrays.forces", "arrays.force")
STRESS = (
    *("results.stress", "info.REF_stress", "info.REF_virial", "info.REF_virials"),
    *("info.stress", "info.virial", "info.virials"),
)


@dataclass(frozen=True, slots=True)
class LabelKeys:
    """Names of labels in ``atoms.info``, ``atoms.arrays`` or calculator results; None finds the usual names.

    A named label is read from this entry only; a structure without the entry lacks the label. This excludes
    labels of another method that the file may contain under a usual name. Naming the stress or the virial
    replaces the search for both.
    """

    energy: str | None = None  # eV
    forces: str | None = None  # eV/Angstrom
    # eV/Angstrom^3, tensile positive; nine numbers, or six in Voigt order xx, yy, zz, yz, xz, xy
    stress: str | None = None
    virial: str | None = None  # eV, -dE/dstrain = -volume * stress


USUAL_KEYS = LabelKeys()


def label_names(atoms: Atoms) -> set[str]:
    """Names of all entries of a structure: calculator results, info and arrays."""
    return {*_results(atoms), *atoms.info, *atoms.arrays} - {"numbers", "positions"}


def check_keys(keys: LabelKeys, found: Iterable[str], origin: str) -> None:
    """Check that every named label occurs in some structure.

    Args:
        keys: Names of the labels.
        found: Names of all entries of all structures.
        origin: Source of the structures, for the message.

    Raises:
        ValueError: If a named label does not occur; the message lists the existing entries.
    """
    found = set(found)
    for label, key in asdict(keys).items():
        if key is not None and key not in found:
            raise ValueError(
                f"data.keys.{label} = {key!r} is in no structure of {origin}; entries found: {sorted(found)}"
            )


def frame_from_atoms(atoms: Atoms, keys: LabelKeys = USUAL_KEYS, group: str = "", origin: str = "") -> Frame:
    """Read positions, labels, charge, spin multiplicity, weight and group of an ASE structure.

    Charge and multiplicity are ``info["charge"]`` and ``info["spin"]`` (if only one is present, the other is
    0 or 1), the weight is ``info["config_weight"]``, and the group ``info["config_type"]`` or
    ``info["group"]``.

    Args:
        atoms: The structure.
        keys: Names of the labels.
        group: Group if the structure names none.
        origin: Source of the structure, for messages.

    Raises:
        ValueError: If a label has the wrong shape or is not finite, or a stress belongs to a cell without
            volume.
    """
    info = atoms.info
    weight = _numbers(info.get("config_weight", 1.0), (), "config_weight", origin)
    if weight < 0:
        raise ValueError(f"config_weight of {origin} must not be negative, got {weight}")
    energy = _find(atoms, ENERGY, (keys.energy,))
    forces = _find(atoms, FORCES, (keys.forces,))
    virial = _find(atoms, STRESS, (keys.virial, keys.stress))
    return checked_frame(
        Frame(
            atomic_numbers=atoms.numbers.astype(np.int64),
            positions=np.array(atoms.positions, dtype=np.float64),
            cell=np.array(atoms.cell.array, dtype=np.float64),
            pbc=np.array(atoms.pbc, dtype=bool),
            charge_spin=_charge_spin(info, origin),
            energy=None if energy is None else float(_numbers(energy[1], (), energy[0], origin)),
            forces=None if forces is None else _numbers(forces[1], (len(atoms), 3), forces[0], origin),
            virial=None if virial is None else _virial(atoms, *virial, keys, origin),
            weight=float(weight),
            group=str(info.get("config_type", info.get("group", group))),
            origin=origin,
        )
    )


def checked_frame(frame: Frame) -> Frame:
    """Return the frame if it has atoms of elements and all its numbers are finite and in range.

    Raises:
        ValueError: If not; the message names the frame and the problem.
    """
    if not len(frame):
        raise ValueError(f"{frame.origin} has no atoms; remove it")
    for name in ("positions", "cell", "energy", "forces", "virial"):
        value = getattr(frame, name)
        if value is not None and not np.isfinite(value).all():
            where = np.argwhere(~np.isfinite(value))[0]
            row = f" of atom {where[0]}" if name in ("positions", "forces") else ""
            raise ValueError(f"{frame.origin}: {name}{row} not finite; correct or remove the structure")
    check_structure(frame.atomic_numbers, frame.positions, frame.cell, frame.origin)
    return frame


def whole_charge_spin(charge: Any, spin: Any, origin: str) -> tuple[int, int]:
    """Convert total charge and spin multiplicity to integers.

    Raises:
        ValueError: If a value is not a whole number, or the multiplicity is below 1.
    """
    values = []
    for name, value in (("charge", charge), ("spin", spin)):
        number = float(_numbers(value, (), name, origin))
        if not number.is_integer() or (name == "spin" and number < 1):
            allowed = "the multiplicity 2S + 1 >= 1" if name == "spin" else "the total charge in e"
            raise ValueError(f"{name} of {origin} must be {allowed}, a whole number, got {value}")
        values.append(int(number))
    return values[0], values[1]


def _charge_spin(info: dict[str, Any], origin: str) -> tuple[int, int] | None:
    if "charge" not in info and "spin" not in info:
        return None
    return whole_charge_spin(info.get("charge", 0), info.get("spin", 1), origin)


def _results(atoms: Atoms) -> dict[str, Any]:
    return atoms.calc.results if atoms.calc is not None else {}


def _find(atoms: Atoms, usual: Iterable[str], named: Iterable[str | None]) -> tuple[str, Any] | None:
    """Name and value of the first existing entry; entries in ``named``, if any, replace the usual ones."""
    places: dict[str, dict[str, Any]] = {
        "results": _results(atoms),
        "info": atoms.info,
        "arrays": atoms.arrays,
    }
    if given := [key for key in named if key is not None]:
        usual = [f"{place}.{key}" for key in given for place in places]
    for entry in usual:
        place, key = entry.split(".", 1)
        if places[place].get(key) is not None:
            return key, places[place][key]
    return None


def _numbers(value: Any, shape: tuple[int, ...], name: str, origin: str) -> NDArray[np.float64]:
    """Convert a value to float64 of this shape."""
    try:
        return np.array(value, dtype=np.float64).reshape(shape)
    except (TypeError, ValueError):
        expected = f"numbers of shape {shape}" if shape else "a number"
        raise ValueError(f"{name} of {origin} must be {expected}, got {value!r}") from None


def _virial(atoms: Atoms, name: str, value: Any, keys: LabelKeys, origin: str) -> NDArray[np.float64] | None:
    """Virial (3, 3) in eV from 6 or 9 numbers of a stress or virial; None for the zero stress of a molecule."""
    tensor = _numbers(value, np.shape(value), name, origin)
    if tensor.size not in (6, 9):
        raise ValueError(f"{name} of {origin} must have 6 or 9 numbers, got shape {tensor.shape}")
    tensor = voigt_6_to_full_3x3_stress(tensor.ravel()) if tensor.size == 6 else tensor.reshape(3, 3)
    named = keys.stress is not None or keys.virial is not None
    if name == keys.virial if named else "virial" in name:
        return tensor
    volume = abs(np.linalg.det(atoms.cell.array))
    if volume == 0:
        if not tensor.any():
            return None
        raise ValueError(
            f"{name} of {origin} needs a cell with a volume; remove the label or give its virial"
        )
    return -volume * tensor
