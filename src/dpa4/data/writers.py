"""Writer of structures as extended XYZ; all structure files are written here.

ASE writes some entries of ``atoms.info`` and ``atoms.arrays`` in a form that no reader understands, such as texts
with line breaks. Here every entry gets a form that ASE reads back, in ASCII, so that the file does not depend on the
encoding of the machine.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict, write_xyz
from ase.spacegroup import Spacegroup
from numpy.typing import NDArray

from dpa4.data.labels import PREDICTED_ENERGY
from dpa4.messages import warn
from dpa4.output import naming
from dpa4.system import user_path

LABEL = re.compile(
    r"REF_.*|(.*_)?(energy|energies|forces?|stress|stresses|virials?)(_per_atom|_std)?|" + PREDICTED_ENERGY,
    re.IGNORECASE,
)
"""Names of labels of any calculation, such as REF_energy or dft_forces."""

SIMPLE_NAME = re.compile(r"(?!(?:uid|virial)$)[A-Za-z_][A-Za-z0-9_]*", re.IGNORECASE)
"""Names that need no test: ASE has rules of its own for the values of "uid" and "virial" only."""

OWN_KEYS = {"Lattice", "Properties", "pbc"}
"""Keys with a meaning of their own in the comment line of extended XYZ."""

OWN_COLUMNS = {"symbols", "species", "pos", "Z", "charge", "move_mask"}
"""Names of columns that ASE derives from the structure or reads as something else."""

RESERVED_FIELDS = {
    *OWN_COLUMNS,
    *(f"{name}{part}" for name in ("pos", *all_properties) for part in ("", *range(9))),
}
"""Names that ASE may give to the parts of other columns: all results may be columns."""

LARGEST_INTEGER = 2**31 - 1
"""Largest integer of a column; ASE reads columns of integers with 32 bits."""


def with_results(atoms: Atoms, **results: Any) -> Atoms:
    """Copy a structure with results of a calculation and without labels of any other.

    Args:
        atoms: The structure.
        results: Results by the names of ASE, such as energy (eV), forces (eV/Angstrom) and stress (eV/Angstrom^3).
    """
    copy = atoms.copy()
    copy.info = without_labels(copy.info)
    copy.arrays = without_labels(copy.arrays)
    copy.calc = SinglePointCalculator(copy, **results)
    return copy


def without_labels(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """Copy ``atoms.info`` or ``atoms.arrays`` without labels and results of calculators."""
    return {key: value for key, value in entries.items() if not _is_label(key)}


def write_structures(
    target: str | Path | IO[str], images: Atoms | Iterable[Atoms], *, append: bool = False
) -> None:
    """Write structures, with the results of their calculators, as extended XYZ that ASE can read again.

    Texts, numbers, arrays, lists and dictionaries in ``atoms.info`` are preserved. In the names of entries,
    characters that the format does not allow become "_". Arrays of atoms with more than two axes are flattened to
    one row per atom, and blanks in their texts become "_". Entries without any form are left out, with a warning.
    Results of a calculator replace entries of the same name.

    Args:
        target: File or stream to write to.
        images: One or more structures.
        append: Append to the file instead of replacing it.
    """
    frames = [images] if isinstance(images, Atoms) else images
    if isinstance(target, str | Path):
        path = user_path(target)
        with naming(path), path.open("a" if append else "w", encoding="utf-8", newline="\n") as file:
            write_structures(file, frames)
        return
    for atoms in frames:
        write_xyz(target, _readable(atoms))


def _is_label(name: Any) -> bool:
    return str(name) in all_properties or LABEL.fullmatch(str(name)) is not None


def _readable(atoms: Atoms) -> Atoms:
    """Copy a structure with entries that ASE writes in a form that it reads back."""
    copy = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    copy.set_constraint([c for c in atoms.constraints if isinstance(c, FixAtoms | FixCartesian)])
    copy.calc = atoms.calc
    copy.info = _readable_info(atoms.info)
    copy.arrays |= _readable_arrays(atoms.arrays)
    return copy


# --- entries of the whole structure


def _readable_info(info: dict[Any, Any]) -> dict[str, Any]:
    readable: dict[str, Any] = {}
    for key, value in info.items():
        name = str(key)
        if name in OWN_KEYS or name in all_properties:
            continue
        if not SIMPLE_NAME.fullmatch(name) and (not _is_plain_text(name) or _form(name, "text") is None):
            name = _plain_name(name)
        while name in readable or name in OWN_KEYS:
            name += "_"
        form = _text_form(name, value) if type(value) is str else _form(name, value)
        if form is None:
            kind = type(value).__name__
            warn(
                f"the entry {name!r} of atoms.info ({kind}) has no form in extended XYZ and is left out",
            )
        else:
            readable[name] = form
    return readable


@lru_cache(maxsize=1000)  # most texts are those of the frame before
def _text_form(name: str, text: str) -> Any:
    return _form(name, text)


def _form(name: str, value: Any) -> Any:
    """Form of an entry that ASE reads back as the same value; None if there is none."""
    if SIMPLE_NAME.fullmatch(name) and (
        isinstance(value, bool | float) or type(value) is int and abs(value) < 2**63
    ):
        return value
    for form in _forms(value):
        try:
            # The entries around it reveal a value that swallows the next entry.
            line = key_val_dict_to_str({f"before_{name}": 1, name: form, f"after_{name}": 2})
            found = key_val_str_to_dict(line)
        except (TypeError, ValueError, AttributeError, IndexError, RecursionError):
            continue
        names = [f"before_{name}", name, f"after_{name}"]
        if _is_plain_text(line) and list(found) == names and _same(found[name], value):
            return form
    return None


def _forms(value: Any) -> Iterator[Any]:
    """Forms to try: the value itself, if ASE has a form for its type, and JSON."""
    if isinstance(value, str | Real | np.bool_ | Spacegroup):
        yield value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        yield value
    try:
        # ASE's reader removes one level of backslashes, but ASE's writer does not add it.
        yield "_JSON " + _json(value).replace("\\", "\\\\")
    except (TypeError, ValueError, RecursionError):
        return


def _same(found: Any, value: Any) -> bool:
    """Return whether the value that was read is the one written; a text "12" may be read as a number, however."""
    if isinstance(value, str | Real) and isinstance(found, str | Real) and not isinstance(found, bool):
        return str(found) == str(value)
    return _json(found) == _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain_value)


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Spacegroup):
        return value.symbol
    raise TypeError(f"no JSON for {type(value).__name__}")


def _is_plain_text(text: str) -> bool:
    """Return whether a text has only printable ASCII characters, hence no line break."""
    return text.isascii() and text.isprintable()


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", name) or "_"


# --- columns


def _readable_arrays(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    readable: dict[str, NDArray[Any]] = {}
    fields = set(RESERVED_FIELDS)
    for key, array in arrays.items():
        if key in ("numbers", "positions") or key in all_properties:
            continue
        column = _column(array)
        if column is None:
            warn(
                f"the array {key!r} of type {array.dtype} and shape {array.shape} has no form in extended XYZ and is "
                "left out",
            )
            continue
        name = _plain_name(str(key))
        while fields & _fields(name, column):
            name += "_"
        fields |= _fields(name, column)
        readable[name] = column
    return readable


def _column(array: NDArray[Any]) -> NDArray[Any] | None:
    """Array (N,) or (N, K) of a type that columns may have, or None."""
    if array.size == 0:
        return None
    if array.ndim > 2:
        array = array.reshape(len(array), -1)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind in "iu":
        return array.astype(
            np.float64 if np.abs(array.astype(np.float64)).max() > LARGEST_INTEGER else np.int64
        )
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    if array.dtype.kind in "USO":
        words = [_word(value) for value in array.ravel()]
        return np.array(words, dtype=object).reshape(array.shape)
    return None


def _word(value: Any) -> str:
    """Text without blanks, in ASCII."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return re.sub(r"[^!-~]", "_", text.encode("ascii", "backslashreplace").decode()) or "_"


def _fields(name: str, column: NDArray[Any]) -> set[str]:
    """Names that ASE gives to a column and its parts; two columns must not share one."""
    return {name} if column.ndim == 1 else {name, *(f"{name}{k}" for k in range(column.shape[1]))}
