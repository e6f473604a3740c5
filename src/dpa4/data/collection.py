"""Collection of labelled structures from many files in one extended XYZ file, with a record of what was found."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from rich.markup import escape
from rich.table import Table

from dpa4.data.charge_spin import is_number
from dpa4.data.frame import Frame
from dpa4.data.labels import USUAL_KEYS, LabelKeys, check_keys
from dpa4.data.readers import Skipped, read_content
from dpa4.data.sources import Sources
from dpa4.data.summary import elements_in, label_counts
from dpa4.data.writers import write_structures
from dpa4.output import atomic_write, check_replaceable, wrapped_path

CAPTION = "E energy, F forces, S stress, with their number if not all frames have them"
NAME_WIDTH = 26  # characters of a file name, so that the table fits into 80 columns
SHOWN_FILES = 40  # rows of the table; files with structures that are left out come on top of them


@dataclass(frozen=True)
class FileRecord:
    """What one file or deepmd-kit system contributed."""

    path: Path
    frames: int
    atoms: tuple[int, int]  # of the smallest and the largest structure; (0, 0) without structures
    elements: tuple[str, ...]
    labels: dict[str, int]  # number of structures with an energy, forces and a virial
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Collection:
    """Labelled structures of all files, and a record of each file."""

    frames: list[Frame]
    files: list[FileRecord]

    @property
    def skipped(self) -> list[Skipped]:
        """Structures of all files that were left out."""
        return [entry for file in self.files for entry in file.skipped]

    def table(self) -> Table:
        """Table of the files: structures, atoms, elements, labels and number of structures that were left out."""
        table = Table(title="Collected", title_justify="left", caption=CAPTION, caption_justify="left")
        table.add_column("file", overflow="fold")
        for name in ("frames", "atoms"):
            table.add_column(name, justify="right")
        table.add_column("elements")
        table.add_column("labels")
        table.add_column("left out", justify="right")
        plain = [file for file in self.files if not file.skipped]
        hidden = set(map(id, plain[SHOWN_FILES:]))
        for file in self.files:
            if id(file) not in hidden:
                table.add_row(*_cells(escape(wrapped_path(str(file.path), NAME_WIDTH)), file))
        if hidden:
            table.add_row(f"and {len(hidden)} more files")
        if len(self.files) > 1:
            table.add_section()
            table.add_row(*_cells(f"all {len(self.files)}", _record(Path(), self.frames, self.skipped)))
        return table


def collect(
    sources: Sources,
    output: Path,
    keys: LabelKeys = USUAL_KEYS,
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
    overwrite: bool = False,
) -> Collection:
    """Read all files and write their labelled structures to one extended XYZ file.

    Labels are written as ``REF_energy``, ``REF_forces`` and ``REF_stress`` (of molecules ``REF_virial``), beside
    charge and spin, ``config_weight``, the group as ``config_type``, and the origin as ``source``. Left out, with a
    reason, are structures without any label or with malformed ones, those whose file says that the electronic loop
    did not converge, and what follows an unreadable place of a file.

    Args:
        sources: Files to read, from ``find_sources``.
        output: File to write.
        keys: Names of labels that differ from the usual ones.
        progress: Function that iterates over the files and may show the progress.
        overwrite: Replace the file to write if it exists.

    Raises:
        FileExistsError: If the file to write exists and ``overwrite`` is not set.
        ValueError: If a named label is in no structure.
    """
    check_replaceable(output, overwrite)
    frames: list[Frame] = []
    files: list[FileRecord] = []
    names: set[str] = set()
    for path in progress(sources.paths):
        content = read_content(path, keys, tolerant=True)
        files.append(_record(path, content.frames, content.skipped))
        frames += content.frames
        names |= content.names
    collection = Collection(frames, files)
    check_keys(keys, names, f"{len(files)} files")
    if frames:
        with atomic_write(output) as temporary:
            write_structures(temporary, map(labelled_atoms, frames))
    return collection


def labelled_atoms(frame: Frame) -> Atoms:
    """ASE structure with the labels of a frame as REF_*, so that they are never taken for predictions."""
    atoms = Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    if frame.energy is not None:
        atoms.info["REF_energy"] = frame.energy
    if frame.forces is not None:
        atoms.arrays["REF_forces"] = frame.forces
    if frame.virial is not None and (volume := frame.volume):
        atoms.info["REF_stress"] = -frame.virial / volume
    elif frame.virial is not None:
        atoms.info["REF_virial"] = frame.virial
    if frame.weight != 1:
        atoms.info["config_weight"] = frame.weight
    if frame.group:
        atoms.info["config_type"] = frame.group
    atoms.info |= {name: value for name, value in frame.charge_spin.items() if is_number(value)}
    atoms.info["source"] = frame.origin
    return atoms


def _record(path: Path, frames: Sequence[Frame], skipped: Sequence[Skipped]) -> FileRecord:
    sizes = [len(frame) for frame in frames] or [0]
    return FileRecord(
        path,
        len(frames),
        (min(sizes), max(sizes)),
        tuple(elements_in(frames)),
        label_counts(frames),
        tuple(skipped),
    )


def _cells(name: str, file: FileRecord) -> tuple[str, ...]:
    smallest, largest = file.atoms
    letters = zip("EFS", file.labels.values(), strict=True)
    labels = [letter if count == file.frames else f"{letter} {count}" for letter, count in letters if count]
    return (
        name,
        str(file.frames),
        str(largest) if smallest == largest else f"{smallest}-{largest}",
        " ".join(file.elements),
        ", ".join(labels),
        str(len(file.skipped)) if file.skipped else "",
    )
