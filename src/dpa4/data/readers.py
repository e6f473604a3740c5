"""Readers of structures and labels; all data files are read here."""

import io
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

import ase.io
from ase import Atoms
from ase.io.formats import ioformats
from ase.io.vasp import iread_vasp_out

from dpa4.data.ase_json import check_trajectory
from dpa4.data.convergence import Steps, ionic_steps
from dpa4.data.databases import is_database, read_database
from dpa4.data.deepmd_npy import is_system, read_system
from dpa4.data.extxyz import ISOTOPES, read_extxyz
from dpa4.data.formats import EXTXYZ, OUTCAR, POSCAR, TRAJECTORY, format_of, vasp_output
from dpa4.data.frame import Frame, check_structure
from dpa4.data.labels import (
    USUAL_KEYS,
    LabelKeys,
    check_keys,
    frame_from_atoms,
    has_reference_labels,
    label_names,
    warn_of_two_sources,
)
from dpa4.data.references import is_group_of_atoms
from dpa4.data.sources import Sources, find_sources
from dpa4.data.unpacking import archive_members, as_text, open_binary, reason, size_limit
from dpa4.messages import warn

_SHORTEST_LINE = 20  # bytes of the line of an atom, k-point or band in an OUTCAR


class Skipped(NamedTuple):
    """Structure of a file that is left out, or the unreadable rest of the file, and the reason."""

    path: Path
    number: int | None  # of the structure in the file; None for the rest of the file
    reason: str


class Content(NamedTuple):
    """Labelled structures of one file or deepmd-kit system."""

    frames: list[Frame]
    skipped: list[Skipped]
    names: set[str]  # entries of the structures, by which labels can be named
    referenced: list[bool]  # whether each structure has an entry REF_*; [] for deepmd-kit systems


def read_frames(
    paths: str | Path | Sequence[str | Path] | Sources, keys: LabelKeys = USUAL_KEYS
) -> list[Frame]:
    """Read every structure of one or more files, folders or patterns such as ``runs/*/OUTCAR``.

    Files may have any format that ASE reads (extended XYZ, trajectories, VASP and other outputs), also compressed
    (``.gz``, ``.bz2``, ``.xz``), be ASE databases (``.db``, ``.json``, ``.aselmdb``), or ``.zip`` archives of
    extended XYZ files. Folders are searched at any depth, see ``dpa4.data.sources.find_sources``.

    Labels are in eV and Angstrom. Without ``keys`` they are searched as ``REF_energy``, ``REF_forces``,
    ``REF_stress``, ``REF_virial(s)``, otherwise in the calculator's results and under the plain names. A virial is
    -dE/dstrain in eV; a stress is in eV/Angstrom^3 in ASE's sign (tensile positive) and is converted to the
    virial -volume * stress. The energy is preferred to the free energy.

    Ionic steps of VASP whose electronic loop did not converge are left out, with a warning.

    Args:
        paths: A path or pattern, or several that are read in order; or what ``find_sources`` found behind them.
        keys: Names of labels that differ from the usual ones. Each must occur in at least one structure of
            all paths together. deepmd-kit directories have fixed names.

    Raises:
        FileNotFoundError: If a path does not exist, or nothing matches a pattern.
        ValueError: If a file cannot be read or has no structure, a label is malformed or not finite, labels of a
            structure may belong to different calculations, a named label is in no structure, or a folder has
            nothing to read.
    """
    sources = paths if isinstance(paths, Sources) else find_sources(paths)
    frames: list[Frame] = []
    skipped: list[Skipped] = []
    found: set[str] = set()
    for path in sources.paths:
        try:
            content = read_content(path, keys)
        except ValueError as error:
            advice = "; remove the file, or let dpa4 data collect leave out what is unusable"
            raise ValueError(f"{error}{advice if sources.searched else ''}") from error
        if not (content.frames or content.skipped):
            raise ValueError(f"{path} has no structure")
        if keys == USUAL_KEYS and content.referenced:
            warn_of_two_sources(path, content.frames, content.referenced)
        frames += content.frames
        skipped += content.skipped
        found |= content.names
    names = ", ".join(map(str, sources.paths))
    if skipped and not frames:
        raise ValueError(f"no structure to use in {names}; left out: {'; '.join(skipped_lines(skipped, 3))}")
    check_keys(keys, found, names)
    if skipped:
        warn(f"left out: {'; '.join(skipped_lines(skipped, 3))}")
    return frames


def read_content(path: Path, keys: LabelKeys = USUAL_KEYS, *, tolerant: bool = False) -> Content:
    """Read the labelled structures of one file or deepmd-kit system.

    Args:
        path: The file or system.
        keys: Names of labels that differ from the usual ones.
        tolerant: Put structures without labels or with malformed ones, and what follows an unreadable place of the
            file, into ``skipped`` instead of raising an error.

    Raises:
        OSError, ValueError: Unless ``tolerant`` is true; as in ``read_frames``.
    """
    content = Content([], [], set(), [])
    try:
        if is_system(path):
            content.frames.extend(read_system(path))
        else:
            _read_into(content, path, keys, tolerant)
    except (OSError, ValueError) as error:
        if not tolerant:
            raise
        content.skipped.append(Skipped(path, None, _without_name(str(error), path)))
    return _with_labels(content, path) if tolerant else content


def _read_into(content: Content, path: Path, keys: LabelKeys, tolerant: bool) -> None:
    """Add structures and what is left out of a file."""
    steps = _steps(path)
    group = group_of(path)
    for number, (origin, atoms) in enumerate(read_atoms(path)):
        if reason := steps.unconverged.get(number):
            content.skipped.append(Skipped(path, number, reason))
            continue
        try:
            frame = frame_from_atoms(atoms, keys, group, origin)
        except ValueError as error:
            if not tolerant:
                raise
            content.skipped.append(Skipped(path, number, _without_name(str(error), path)))
            continue
        content.frames.append(frame)
        content.names.update(label_names(atoms))
        content.referenced.append(has_reference_labels(atoms))
    if steps.unfinished:
        content.skipped.append(Skipped(path, None, steps.unfinished))


def _with_labels(content: Content, path: Path) -> Content:
    """Content whose structures without any label are moved to those left out."""
    bare = [frame.energy is frame.forces is frame.virial is None for frame in content.frames]
    if not any(bare):
        return content
    lost = Skipped(path, None, f"{sum(bare)} without energy, forces and stress")
    frames = [frame for frame, without in zip(content.frames, bare, strict=True) if not without]
    return content._replace(frames=frames, skipped=[*content.skipped, *[lost] * sum(bare)])


def _steps(path: Path) -> Steps:
    try:
        return ionic_steps(path)
    except Exception:  # the reader of the structures fails as well, and says more
        return Steps({}, None)


def group_of(path: Path) -> str:
    """Group of the structures of a file: its name or, for parts of a database and outputs of VASP, that of a folder.

    Folders that only number the runs of VASP are passed over. The folder isolated_atom is the group of runs in its
    folders, one for each element.
    """
    if path.suffix == ".aselmdb" and len(list(path.absolute().parent.glob("*.aselmdb"))) > 1:
        return path.absolute().parent.name
    if vasp_output(path) is None:
        return path.stem
    folders = path.absolute().parts[-2::-1]
    if len(folders) > 1 and is_group_of_atoms(folders[1]):
        return folders[1]
    return next((name for name in folders if not name.isdecimal()), path.stem)


def skipped_lines(skipped: Sequence[Skipped], limit: int) -> list[str]:
    """Describe structures that are left out, one line per file and reason, and at most ``limit`` lines and a rest."""
    numbers: dict[tuple[Path, str], list[int]] = {}
    for entry in skipped:
        own = numbers.setdefault((entry.path, entry.reason), [])
        own += [] if entry.number is None else [entry.number]
    lines = [f"{path}{_frames(found)}: {text}" for (path, text), found in numbers.items()]
    rest = len(lines) - limit
    return lines if rest <= 0 else [*lines[:limit], f"and {rest} more"]


def _frames(numbers: Sequence[int]) -> str:
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f", frame{'s' if len(numbers) > 1 else ''} {shown}"


def _without_name(message: str, path: Path) -> str:
    """Message without the name of the file at its start."""
    return message.removeprefix(str(path)).lstrip(" :,")


def read_atoms(path: Path, last: bool = False) -> Iterator[tuple[str, Atoms]]:
    """Yield origin and structure of each structure of a path, in any format of ``read_frames`` except deepmd-kit's.

    Args:
        path: File, or folder of ``.aselmdb`` files.
        last: Read the last structure only.

    Raises:
        ValueError: If the path cannot be read.
    """
    if path.is_dir():
        shards = sorted(path.glob("*.aselmdb"))
        if not shards:
            raise ValueError(
                f"{path} is a directory with neither deepmd systems (type.raw) nor .aselmdb files"
            )
        for shard in shards[-1:] if last else shards:
            yield from read_database(shard, last)
    elif is_database(path):
        yield from read_database(path, last)
    elif path.suffix == ".zip":
        yield from _read_archive(path, last)
    else:
        yield from _read_file(path, last)


def read_images(path: Path, last: bool = False) -> list[Atoms]:
    """Read the structures of a path in any format of ``read_atoms``, or the last one, and check atoms and cells.

    Raises:
        ValueError: If the path cannot be read, an atom is not of an element, or a coordinate is too large; the
            message names file and structure.
    """
    images = []
    for origin, atoms in read_atoms(path, last):
        check_structure(atoms.numbers, atoms.positions, atoms.cell.array, origin)
        images.append(atoms)
    return images


def _read_archive(path: Path, last: bool) -> Iterator[tuple[str, Atoms]]:
    """Iterate over the structures of the extended XYZ files in an archive, without unpacking it to the disk."""
    source = str(path)
    newest: list[tuple[str, Atoms]] = []
    try:
        for name, text in archive_members(path, (".extxyz", ".xyz")):
            source = f"{path}, {name}"
            found = read_extxyz(text, source, last)
            if last:
                newest = list(found) or newest
            else:
                yield from found
    except Exception as error:  # the archive raises many kinds of errors
        raise _unreadable(source, path, "as a zip archive", error) from error
    yield from newest


def _read_file(path: Path, last: bool) -> Iterator[tuple[str, Atoms]]:
    """Iterate over the structures of a file in a format of ASE, which may be compressed."""
    source, number = str(path), -1
    try:
        if path.stat().st_size == 0:
            return
        with open_binary(path) as file:
            name = format_of(file, path)
        kind = ioformats[name]
        source = str(path) if kind.single else f"{path}, frame 0"
        with open_binary(path) as file:
            if name == EXTXYZ:
                yield from read_extxyz(as_text(file), str(path), last)
                return
            if name == TRAJECTORY:
                check_trajectory(file)
            elif name in POSCAR:
                _check_counts(file)
            elif name == OUTCAR:
                _check_sizes(file, size_limit(path))
            # A format that needs the file itself gets an absolute path. ASE takes relative names such as postgres.dat
            # for addresses of databases.
            opened = (file if kind.isbinary else as_text(file)) if kind.acceptsfd else str(path.absolute())
            which = -1 if last else ":"
            if (
                name == OUTCAR
            ):  # ase.io.iread reads all ionic steps first, and none if one of them is malformed
                images = iread_vasp_out(opened, which)
            else:
                images = ase.io.iread(opened, which, name, do_not_split_by_at_sign=True)
            for number, atoms in enumerate(images):
                source = f"{path}, last frame" if last else f"{path}, frame {number}"
                yield source, atoms
                source = f"{path}, frame {number + 1}"
    except Exception as error:  # ASE's readers raise many kinds of errors
        raise _unreadable(source, path, "by ASE", error) from error


def _check_counts(file: io.BufferedReader) -> None:
    """Check that a POSCAR or XDATCAR has a line per atom, and go back to the start.

    ASE makes a list of all declared atoms first.

    Raises:
        ValueError: If it has fewer lines.
    """
    head = [line.split() for line in islice(file, 7)]
    counts = next((words for words in head[5:] if words and words[0].isdigit()), [])
    declared = sum(int(word[:20]) for word in takewhile(bytes.isdigit, counts))
    lines = sum(1 for _ in file)
    if declared > lines:
        raise ValueError(
            f"{declared:,} atoms are declared, but only {lines:,} lines follow; complete the file"
        )
    file.seek(0)


def _check_sizes(file: io.BufferedReader, size: int) -> None:
    """Check that an OUTCAR can hold the atoms, k-points and bands that its head declares, and go back to the start.

    ASE allocates memory for all of them first.

    Args:
        file: The file.
        size: Number of bytes that it can have at most.

    Raises:
        ValueError: If a line for each would not fit.
    """
    names = (b"ions per type", b"NKPTS")
    for line in takewhile(lambda line: b"Iteration" not in line, file):
        if any(name in line for name in names):
            largest = max((int(word[:20]) for word in line.split() if word.isdigit()), default=0)
            if largest * _SHORTEST_LINE > size:
                raise ValueError(
                    f"{largest:,} atoms, k-points or bands are declared, more than the file can hold: "
                    f"{line.strip()[:80].decode(errors='replace')!r}"
                )
    file.seek(0)


def _unreadable(source: str, path: Path, how: str, error: Exception) -> Exception:
    """Error that names the file, in one line; an error that already does so is returned as it is."""
    if type(error) is ValueError and str(error).startswith(str(path)):
        return error
    if isinstance(error, KeyError) and error.args and error.args[0] in ISOTOPES:
        return ValueError(
            f"{source}: this format has no symbol {error.args[0]}; write H, or convert the file to extended XYZ, "
            "where D and T are hydrogen with their masses"
        )
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"{source} is not a text in UTF-8; convert it, for example with iconv ({error})")
    return ValueError(f"{source} cannot be read {how}: {reason(error)}")
