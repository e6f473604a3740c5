"""Conversion of ASE structures to ``Frame``: names, units and signs of the labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isclose
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from dpa4.data.charge_spin import charge_spin_entries
from dpa4.data.frame import Frame, check_structure
from dpa4.messages import warn

# Entries of a label, in "results" of a calculator, "info" or "arrays". Entries of one group are the same quantity and
# must agree; a later group is searched only if the groups before have no entry.
#
# REF_* (the names of MACE) are always reference labels. The plain names may be predictions: ASE reads energy, forces
# and stress of an extended XYZ file as results of a calculator, whichever calculator that was.
#
# free_energy is the last resort: the plain energy is extrapolated to zero smearing, and other structures are more
# likely to have it.
REFERENCE: dict[str, tuple[tuple[str, ...], ...]] = {
    "energy": (("info.REF_energy",),),
    "forces": (("arrays.REF_forces",),),
    "virial": (("info.REF_stress", "info.REF_virial", "info.REF_virials"),),
}
PLAIN: dict[str, tuple[tuple[str, ...], ...]] = {
    "energy": (("results.energy", "info.energy"), ("results.free_energy", "info.free_energy")),
    "forces": (("results.forces", "arrays.forces", "arrays.force"),),
    "virial": (("results.stress", "info.stress", "info.virial", "info.virials"),),
}
PLAIN_NAMES = {entry.partition(".")[2] for groups in PLAIN.values() for group in groups for entry in group}

PREDICTED_ENERGY = "DPA4_energy"
"""Key in ``atoms.info`` with a predicted energy. Plain labels with the same energy are predictions, not labels."""


@dataclass(frozen=True, slots=True)
class LabelKeys:
    """Names of labels in ``atoms.info``, ``atoms.arrays`` or calculator results; None finds the usual names.

    A named label is read from this entry only; a structure without the entry lacks the label. This excludes
    labels of another method that the file may contain under a usual name. Naming the stress or the virial
    replaces the search for both.

    The usual names are REF_energy, REF_forces, REF_stress or REF_virial(s), and otherwise the plain names: those of
    a structure with an entry REF_* are ignored, unless they have the same values.
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

    Entries of charge and spin multiplicity are collected, but not checked: see ``dpa4.data.charge_spin``. The weight
    is ``info["config_weight"]``, and the group ``info["config_type"]`` or ``info["group"]``.

    Args:
        atoms: The structure.
        keys: Names of the labels.
        group: Group if the structure names none.
        origin: Source of the structure, for messages.

    Raises:
        ValueError: If a label has the wrong shape or is not finite, a stress belongs to a cell without volume, or
            the weight is negative or not finite, or labels may belong to different calculations.
    """
    info = atoms.info
    weight = _numbers(info.get("config_weight", 1.0), (), "config_weight", origin)
    if not 0 <= weight < np.inf:
        raise ValueError(f"config_weight of {origin} must be a finite number >= 0, got {weight}")
    labels = _Search(atoms, keys, origin).labels()
    return checked_frame(
        Frame(
            atomic_numbers=atoms.numbers.astype(np.int64),
            positions=np.array(atoms.positions, dtype=np.float64),
            cell=np.array(atoms.cell.array, dtype=np.float64),
            pbc=np.array(atoms.pbc, dtype=bool),
            charge_spin=charge_spin_entries(info),
            energy=labels.get("energy"),
            forces=labels.get("forces"),
            virial=labels.get("virial"),
            weight=float(weight),
            group=str(info.get("config_type", info.get("group", group))),
            origin=origin,
        )
    )


def has_reference_labels(atoms: Atoms) -> bool:
    """Return whether a structure has an entry REF_*."""
    entries = [entry.split(".", 1) for groups in REFERENCE.values() for group in groups for entry in group]
    return any(
        (atoms.info if place == "info" else atoms.arrays).get(key) is not None for place, key in entries
    )


def warn_of_two_sources(path: Path, frames: Sequence[Frame], references: Sequence[bool]) -> None:
    """Warn if some structures of a file have labels under REF_* and others under plain names.

    The latter may be structures without labels in a file of predictions.

    Args:
        path: The file, for the message.
        frames: Structures of the file.
        references: Whether each structure has an entry REF_*.
    """
    pairs = zip(frames, references, strict=True)
    plain = [f for f, known in pairs if not (known or f.energy is f.forces is f.virial is None)]
    if plain and any(references):
        warn(
            f"{path}: {sum(references)} structures have labels under REF_*, but {len(plain)} under plain names, such "
            f"as {plain[0].origin}; if these are predictions, remove them or name the labels in data.keys",
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


def _results(atoms: Atoms) -> dict[str, Any]:
    return atoms.calc.results if atoms.calc is not None else {}


class _Label(NamedTuple):
    """Label in the units of ``Frame``, and its entry."""

    entry: str  # such as "info.REF_energy"
    value: Any

    @property
    def key(self) -> str:
        return self.entry.partition(".")[2]


class _Search:
    """Search for the labels of one structure, which must all belong to one calculation."""

    def __init__(self, atoms: Atoms, keys: LabelKeys, origin: str):
        self.atoms, self.keys, self.origin = atoms, keys, origin
        self.places: dict[str, dict[str, Any]] = {
            "results": _results(atoms),
            "info": atoms.info,
            "arrays": atoms.arrays,
        }
        keys_of = {"energy": [keys.energy], "forces": [keys.forces], "virial": [keys.virial, keys.stress]}
        named = {name: [key for key in given if key is not None] for name, given in keys_of.items()}
        self.named = {
            name: (tuple(f"{place}.{key}" for key in given for place in self.places),)
            for name, given in named.items()
            if given
        }

    def labels(self) -> dict[str, Any]:
        """Values of the labels by name, without the missing ones.

        Raises:
            ValueError: If a label is malformed, entries of a label disagree, or labels may belong to different
                calculations.
        """
        unnamed = [name for name in REFERENCE if name not in self.named]
        named = self._find_all(self.named)
        reference = self._find_all({name: REFERENCE[name] for name in unnamed})
        for label in named.values():
            if reference and label.key in PLAIN_NAMES:
                raise self._mixed(label, next(iter(reference.values())))
        found = reference | named
        if set(found) < set(REFERENCE) and not self._is_prediction():
            found = self._plain(unnamed, reference, named) | found
        return {name: label.value for name, label in found.items()}

    def _plain(
        self, unnamed: Sequence[str], reference: dict[str, _Label], named: dict[str, _Label]
    ) -> dict[str, _Label]:
        """Labels under plain names, unless they belong to another calculation than the entries REF_*."""
        existing = [e for groups in REFERENCE.values() for group in groups for e in self._existing(group)]
        if existing and not any(
            self._existing(group) for name in unnamed if name not in reference for group in PLAIN[name]
        ):
            return {}  # nothing to complete
        plain = self._find_all({name: PLAIN[name] for name in unnamed})
        if not existing:
            return plain
        known = reference | named
        twins = plain | {name: twin for name in named if (twin := self._twin(name))}
        common = [name for name in known if name in twins]
        if plain and not common:
            one = next(iter(known.values()), _Label(*existing[0]))
            raise self._mixed(one, next(iter(plain.values())))
        return plain if all(_agree(name, twins[name].value, known[name].value) for name in common) else {}

    def _twin(self, name: str) -> _Label | None:
        """Label under a plain name beside one that the user has named; None if it has no single value."""
        try:
            return self._find(name, PLAIN[name])
        except ValueError:
            return None

    def _find_all(self, groups_by_name: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, _Label]:
        found = {name: self._find(name, groups) for name, groups in groups_by_name.items()}
        return {name: label for name, label in found.items() if label is not None}

    def _find(self, name: str, groups: Sequence[Sequence[str]]) -> _Label | None:
        """Label of the first group with an entry, or None."""
        for group in groups:
            entries = [_Label(entry, self._value(name, entry, raw)) for entry, raw in self._existing(group)]
            labels = [label for label in entries if label.value is not None]
            for other in labels[1:]:
                if not _agree(name, labels[0].value, other.value):
                    raise ValueError(
                        f"{self.origin} has two labels for {name} that disagree: {labels[0].entry} and "
                        f"{other.entry}; remove one of them, or name the right one in data.keys"
                    )
            if labels:
                return labels[0]
        return None

    def _existing(self, entries: Iterable[str]) -> list[tuple[str, Any]]:
        """Entries that the structure has, with their values."""
        pairs = ((entry, *entry.split(".", 1)) for entry in entries)
        found = ((entry, self.places[place].get(key)) for entry, place, key in pairs)
        return [(entry, value) for entry, value in found if value is not None]

    def _value(self, name: str, entry: str, value: Any) -> Any:
        key = entry.partition(".")[2]
        if name == "virial":
            return _virial(self.atoms, key, value, self.keys, self.origin)
        if name == "forces":
            return _numbers(value, (len(self.atoms), 3), key, self.origin)
        return float(_numbers(value, (), key, self.origin))

    def _is_prediction(self) -> bool:
        """Return whether the plain labels are predictions: their energy is that under ``PREDICTED_ENERGY``."""
        predicted = self.atoms.info.get(PREDICTED_ENERGY)
        energy = self.places["results"].get("energy", self.atoms.info.get("energy"))
        if not isinstance(predicted, Real) or not isinstance(energy, Real):
            return False
        return isclose(energy, predicted, rel_tol=1e-9, abs_tol=1e-9)

    def _mixed(self, one: _Label, other: _Label) -> ValueError:
        return ValueError(
            f"{self.origin} has labels under {one.key} and {other.key}, which may belong to different calculations; "
            "remove one of them, or name every label of the right calculation in data.keys"
        )


def _agree(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of a label are the same number, rounded to different digits or precisions."""
    if name == "energy":
        return abs(one - other) <= 1e-4 + 2e-7 * abs(one)
    if name == "forces":
        return np.allclose(one, other, rtol=1e-5, atol=1e-3)
    return bool(np.abs(one - other).max() <= 1e-2 + 0.02 * np.abs(one).max())


def _numbers(value: Any, shape: tuple[int, ...], name: str, origin: str) -> NDArray[np.float64]:
    """Convert a value to float64 of this shape."""
    try:
        return np.array(value, dtype=np.float64).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        expected = f"numbers of shape {shape}" if shape else "a number"
        got = " ".join(repr(value).split())[:200]
        raise ValueError(f"{name} of {origin} must be {expected}, got {got}") from None


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
