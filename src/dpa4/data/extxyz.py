"""Frames of extended XYZ files: split from the stream one by one, then parsed by ASE.

ASE's own reader first scans the whole file, does not know the number of a faulty frame, and stops at a blank line.
"""

import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TextIO

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.io.extxyz import key_val_str_to_dict, parse_properties, read_xyz
from ase.stress import voigt_6_to_full_3x3_stress

from dpa4.data.unpacking import lines_of, reason

# Hydrogen isotopes that files write as symbols of their own, and their masses in u (atomic mass evaluation 2020).
ISOTOPES = {"D": 2.014101778, "T": 3.016049281}

LONGEST_COMMENT = 2**23  # characters; ASE needs half a second for a million
MOST_COLUMNS = 10**5  # in a line of an atom
_DEFAULT_COLUMNS = "species:S:1:pos:R:3"
_CELL_VECTOR = "VEC"  # lines VEC1 to VEC3 after the atoms: the cell in XYZ files of ADF
_TENSOR = re.compile(r"""(?<![\w-])(stress|virial)\s*=\s*(["'{\[])([^"'}\]]*)(["'}\]])""")


def read_extxyz(stream: TextIO, source: str, last: bool = False) -> Iterator[tuple[str, Atoms]]:
    """Yield origin and structure of each frame; with ``last``, only of the last one.

    The symbols D and T become hydrogen with the isotope's mass, unless a column ``masses`` sets the masses. Six
    numbers of ``stress`` or ``virial`` are in Voigt order xx, yy, zz, yz, xz, xy.

    Args:
        stream: Text of the file.
        source: Name of the file, for the origins "source, frame 3".
        last: Parse the last frame only.

    Raises:
        ValueError: If a frame cannot be read; the message names file, frame and fault.
    """
    frames = _split(stream, source)
    if last:
        frames = iter(deque(frames, maxlen=1))
    for origin, lines in frames:
        yield origin, _parse(lines, origin)


def _split(stream: TextIO, source: str) -> Iterator[tuple[str, list[str]]]:
    """Yield origin and lines of each frame: number of atoms, comment, atoms, and cell vectors, if any."""
    lines = lines_of(stream)
    number = 0
    header = next(lines, "")
    while header:
        if not header.strip():  # blank lines between frames and at the end of the file
            header = next(lines, "")
            continue
        origin = f"{source}, frame {number}"
        count = _number_of_atoms(header, origin)
        frame = [header, *islice(lines, count + 1)]
        if len(frame) < 2 or len(frame) < count + 2:
            raise ValueError(
                f"{origin}: {count:,} atoms are declared, but the file ends after {max(0, len(frame) - 2):,}; "
                "complete the frame or remove it"
            )
        header = next(lines, "")
        while header.lstrip().startswith(_CELL_VECTOR):
            frame.append(header)
            header = next(lines, "")
        yield origin, frame
        number += 1


def _number_of_atoms(header: str, origin: str) -> int:
    text = header.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ValueError(
            f"{origin}: its first line must be the number of atoms, got {text[:60]!r}; if the frame before has more "
            "or fewer atoms than it declares, correct its number"
        )
    return int(text)


def _parse(lines: Sequence[str], origin: str) -> Atoms:
    try:
        return _atoms(lines)
    except KeyError as error:  # unknown symbol
        try:
            if error.args[0] in ISOTOPES:
                return _with_isotopes(lines)
        except Exception as other:
            raise ValueError(f"{origin}: {_fault(lines, other)}") from other
        raise ValueError(f"{origin}: {_fault(lines, error)}") from error
    except Exception as error:  # ASE's reader raises many kinds of errors
        raise ValueError(f"{origin}: {_fault(lines, error)}") from error


def _atoms(lines: Sequence[str]) -> Atoms:
    return next(read_xyz(io.StringIO("".join(lines)), index=0, properties_parser=_properties))


def _properties(comment: str) -> dict[str, Any]:
    """Parse the comment line; stress and virial may have six numbers, which ASE refuses.

    Raises:
        ValueError: If the line is longer than ``LONGEST_COMMENT``, or there are more than ``MOST_COLUMNS`` columns:
            ASE prepares each of them before it reads a line.
    """
    if len(comment) > LONGEST_COMMENT:
        raise ValueError(
            f"its second line has {len(comment):,} characters; at most {LONGEST_COMMENT:,} are read"
        )
    entries = key_val_str_to_dict(_TENSOR.sub(_nine_numbers, comment))
    columns = str(entries.get("Properties", _DEFAULT_COLUMNS))
    if sum(int(count[:20]) for count in columns.split(":")[2::3] if count.isdigit()) > MOST_COLUMNS:
        raise ValueError(f"Properties={columns[:60]} declares more than {MOST_COLUMNS:,} columns")
    return entries


def _nine_numbers(entry: re.Match[str]) -> str:
    numbers = entry[3].replace(",", " ").split()
    if len(numbers) != 6:
        return entry[0]
    full = voigt_6_to_full_3x3_stress(np.array(numbers, dtype=object))
    return f"{entry[1]}={entry[2]}{' '.join(full.ravel())}{entry[4]}"


def _with_isotopes(lines: Sequence[str]) -> Atoms:
    """Parse a frame with hydrogen in place of D and T, and set the masses of these atoms."""
    column = _column_of_symbols(str(_properties(lines[1].strip()).get("Properties", _DEFAULT_COLUMNS)))
    masses: dict[int, float] = {}
    replaced = list(lines)
    for atom, line in enumerate(lines[2:]):
        words = line.split()
        if len(words) > column and (mass := ISOTOPES.get(words[column].capitalize())):
            words[column] = "H"
            masses[atom] = mass
            replaced[atom + 2] = " ".join(words) + "\n"
    atoms = _atoms(replaced)
    if not atoms.has("masses"):
        values = atoms.get_masses()
        values[list(masses)] = list(masses.values())
        atoms.set_masses(values)
    return atoms


def _column_of_symbols(properties: str) -> int:
    column = 0
    fields = properties.split(":")
    for name, count in zip(fields[::3], fields[2::3], strict=False):
        if name == "species":
            break
        column += int(count)
    return column


def _fault(lines: Sequence[str], error: Exception) -> str:
    """Describe in one line why a frame cannot be parsed."""
    try:
        properties = str(_properties(lines[1].strip()).get("Properties", _DEFAULT_COLUMNS))
        converters = parse_properties(properties)[3]
        column = _column_of_symbols(properties)
    except Exception:
        converters = []
    for atom, line in enumerate(lines[2 : int(lines[0]) + 2] if converters else []):
        words = line.split()
        if len(words) < len(converters):
            return (
                f"atom {atom} has {len(words)} columns, but {len(converters)} are declared "
                f"(Properties={properties}): {line.strip()[:60]!r}; correct the line, or the number of atoms"
            )
        for word, convert in zip(words, converters, strict=False):
            try:
                convert(word)
            except ValueError:
                return f"atom {atom}: {word[:60]!r} is not a number; columns are {properties}"
        if isinstance(error, KeyError) and words[column].capitalize() not in atomic_numbers | ISOTOPES:
            return f"atom {atom}: {words[column][:60]!r} is no chemical symbol; write H, C, Si, ..."
    return f"it cannot be read: {reason(error)}"
