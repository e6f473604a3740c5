"""Conversion of labelled structures of any format to one LMDB database of ASE, and division into two."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ase import Atoms
from ase.db import connect
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from dpa4.data.charge_spin import is_number
from dpa4.data.deepmd_npy import is_system, read_system
from dpa4.data.formats import vasp_output
from dpa4.data.frame import Frame
from dpa4.data.labels import USUAL_KEYS, LabelKeys, frame_from_atoms
from dpa4.data.readers import group_of, read_atoms, read_content
from dpa4.data.writers import with_results
from dpa4.output import atomic_write
from dpa4.system import require

TRANSACTION = 1000  # structures that are written to the disk together


class Entry(NamedTuple):
    """Structure of a source, or the reason why it cannot be used."""

    origin: str
    frame: Frame | None
    info: dict[str, Any]  # entries of the structure
    reason: str = ""


def entries(paths: Sequence[Path], keys: LabelKeys = USUAL_KEYS) -> Iterator[Entry]:
    """Yield the structures of files one by one; the memory does not depend on their number.

    Structures with malformed labels are yielded with a reason instead of a frame.

    Raises:
        ValueError: If a file cannot be read.
    """
    for path in paths:
        if is_system(path):
            yield from (Entry(frame.origin, frame, {}) for frame in read_system(path))
        elif vasp_output(path) is not None:  # small, and steps that did not converge are left out
            content = read_content(path, keys)
            yield from (Entry(frame.origin, frame, {}) for frame in content.frames)
            yield from (Entry(f"{path}, frame {s.number}", None, {}, s.reason) for s in content.skipped)
        else:
            group = group_of(path)
            for origin, atoms in read_atoms(path):
                try:
                    yield Entry(origin, frame_from_atoms(atoms, keys, group, origin), atoms.info)
                except ValueError as error:
                    yield Entry(origin, None, atoms.info, str(error))


def is_labelled(entry: Entry) -> bool:
    """Return whether a structure can be used and has an energy, forces or a virial."""
    frame = entry.frame
    return frame is not None and not (frame.energy is frame.forces is frame.virial is None)


@dataclass(frozen=True)
class Written:
    """Numbers of structures that were written to each file, and of those left out."""

    files: dict[Path, int]
    left_out: int
    first_reason: str  # "" if none was left out


def write_lmdb(
    paths: Sequence[Path],
    outputs: Sequence[Path],
    part: Callable[[int, Entry], int] = lambda number, entry: 0,
    keys: LabelKeys = USUAL_KEYS,
    progress: Callable[[Iterable[Entry]], Iterable[Entry]] = iter,
) -> Written:
    """Write the labelled structures of files to new ``.aselmdb`` files, which appear when they are complete.

    Results are stored as energy, forces and stress of a calculator, beside charge, spin, ``config_weight``, the group
    as ``config_type``, the exact virial as ``REF_virial``, and the origin as ``source``.

    Args:
        paths: Files to read.
        outputs: Files to write, in place of earlier ones.
        part: Function that gives the number of the output for a structure and its number; negative: none.
        keys: Names of labels that differ from the usual ones.
        progress: Function that iterates over the structures and may show the progress.

    Raises:
        ImportError: If ase-db-backends is not installed.
        ValueError: If a file cannot be read, or an output would be empty; then nothing is written.
    """
    require("ase_db_backends", "lmdb")
    for output in outputs:
        if output.suffix != ".aselmdb":
            raise ValueError(f"{output}: the name of an LMDB database ends in .aselmdb")
    counts = [0] * len(outputs)
    left_out, first_reason = 0, ""
    with ExitStack() as stack:
        writers = [stack.enter_context(_writer(output)) for output in outputs]
        for number, entry in enumerate(progress(entries(paths, keys))):
            which = part(number, entry) if is_labelled(entry) else -1
            if which < 0:
                left_out += 1
                first_reason = (
                    first_reason or f"{entry.origin}: {entry.reason or 'left out or without labels'}"
                )
                continue
            assert entry.frame is not None
            writers[which].add(entry.frame)
            counts[which] += 1
        for output, count in zip(outputs, counts, strict=True):
            if not count:
                why = f" ({left_out} left out; the first: {first_reason})" if left_out else ""
                raise ValueError(f"no structure for {output}{why}; nothing is written")
    return Written(dict(zip(outputs, counts, strict=True)), left_out, first_reason)


class _Writer:
    """Writes structures in transactions of `TRANSACTION`: one for each would wait for the disk every time."""

    def __init__(self, path: Path):
        self.path, self.waiting = path, list[Frame]()

    def add(self, frame: Frame) -> None:
        self.waiting.append(frame)
        if len(self.waiting) == TRANSACTION:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        # The end of a transaction closes the database.
        with connect(str(self.path), type="aselmdb", use_lock_file=False) as database:
            for frame in self.waiting:
                database.write(stored_atoms(frame), data=stored_entries(frame))
        self.waiting.clear()


@contextmanager
def _writer(output: Path) -> Iterator[_Writer]:
    with atomic_write(output) as temporary:
        renamed = temporary.with_name(temporary.name + ".aselmdb")
        writer = _Writer(renamed)
        try:
            yield writer
            writer.flush()
            if renamed.exists():  # absent if there was no structure, which is an error of the caller's
                renamed.replace(temporary)
        finally:
            for leftover in (renamed, renamed.with_name(renamed.name + "-lock")):
                leftover.unlink(missing_ok=True)


def stored_atoms(frame: Frame) -> Atoms:
    """ASE structure with the labels of a frame as results of a calculator."""
    atoms = Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    results: dict[str, float | NDArray] = {}
    if frame.energy is not None:
        results["energy"] = frame.energy
    if frame.forces is not None:
        results["forces"] = frame.forces
    if frame.virial is not None and (volume := frame.volume):
        results["stress"] = full_3x3_to_voigt_6_stress(-frame.virial / volume)
    return with_results(atoms, **results)


def stored_entries(frame: Frame) -> dict[str, Any]:
    """Entries of a frame beside its results: charge, spin, weight, group, the exact virial and the origin."""
    found: dict[str, Any] = {n: v for n, v in frame.charge_spin.items() if is_number(v)}
    if frame.virial is not None:
        found["REF_virial"] = frame.virial.ravel()  # the stress is rounded and symmetric
    if frame.weight != 1:
        found["config_weight"] = frame.weight
    if frame.group:
        found["config_type"] = frame.group
    return found | {"source": frame.origin}


def part_by(by: str, fraction: float, seed: int) -> Callable[[int, Entry], int]:
    """Rule that puts a share of the structures into part 1 and the others into part 0.

    Structures of the same formula, or with the same value of an entry, stay together. The rule depends on the value
    and the seed alone: it holds for data that are added later.

    Args:
        by: "structure", "formula", or the name of an entry of ``atoms.info``.
        fraction: Share of the structures, formulas or values for part 1.
        seed: Seed of the random choice.

    Raises:
        ValueError: By the rule, if a structure lacks the entry.
    """

    def rule(number: int, entry: Entry) -> int:
        assert entry.frame is not None
        if by == "structure":
            value = str(number)
        elif by == "formula":
            value = Atoms(entry.frame.atomic_numbers).get_chemical_formula()
        elif by in entry.info:
            value = str(entry.info[by])
        else:
            raise ValueError(
                f"{entry.origin} has no entry {by!r}; it has {sorted(map(str, entry.info))}; split by structure, "
                "formula or an entry that all structures have"
            )
        digest = hashlib.blake2b(f"{seed} {value}".encode(), digest_size=8).digest()
        return int(int.from_bytes(digest, "little") < fraction * 2**64)

    return rule
