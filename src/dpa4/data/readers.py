"""Readers of structures and labels; all data files are read here."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase.io
from ase import Atoms
from ase.io.formats import PEEK_BYTES, filetype, ioformats

from dpa4.data.ase_json import check_trajectory
from dpa4.data.databases import is_database, read_database
from dpa4.data.deepmd_npy import find_systems, read_system
from dpa4.data.extxyz import ISOTOPES, read_extxyz
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
from dpa4.data.unpacking import archive_members, as_text, encoding_of, open_binary, reason
from dpa4.system import user_path

_EXTXYZ, _TRAJECTORY = "extxyz", "traj"  # ASE's names of the formats


def read_frames(paths: str | Path | Sequence[str | Path], keys: LabelKeys = USUAL_KEYS) -> list[Frame]:
    """Read every structure of one or more files or directories.

    Files may have any format that ASE reads (extended XYZ, trajectories, VASP and other outputs), also compressed
    (``.gz``, ``.bz2``, ``.xz``), be ASE databases (``.db``, ``.json``, ``.aselmdb``), or ``.zip`` archives of
    extended XYZ files. Directories may contain deepmd-kit npy systems at any depth, or ``.aselmdb`` shards.

    Labels are in eV and Angstrom. Without ``keys`` they are searched as ``REF_energy``, ``REF_forces``,
    ``REF_stress``, ``REF_virial(s)``, otherwise in the calculator's results and under the plain names. A virial is
    -dE/dstrain in eV; a stress is in eV/Angstrom^3 in ASE's sign (tensile positive) and is converted to the
    virial -volume * stress. The energy is preferred to the free energy.

    Args:
        paths: A path, or several that are read in order.
        keys: Names of labels that differ from the usual ones. Each must occur in at least one structure of
            all paths together. deepmd-kit directories have fixed names.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file cannot be read or has no structure, a label is malformed or not finite, labels of a
            structure may belong to different calculations, or a named label is in no structure.
    """
    sources = [user_path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    frames: list[Frame] = []
    found: set[str] = set()
    for path in sources:
        before = len(frames)
        if not path.exists():
            raise FileNotFoundError(f"no such file or directory: {path}")
        if path.is_dir() and (systems := find_systems(path)):
            for system in systems:
                frames += read_system(system)
        else:
            references = []
            for origin, atoms in read_atoms(path):
                frames.append(frame_from_atoms(atoms, keys, group=path.stem, origin=origin))
                found |= label_names(atoms)
                references.append(has_reference_labels(atoms))
            if keys == USUAL_KEYS:
                warn_of_two_sources(path, frames[before:], references)
        if len(frames) == before:
            raise ValueError(f"{path} has no structure")
    check_keys(keys, found, ", ".join(map(str, sources)))
    return frames


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
            name = _format_of(file, path)
        kind = ioformats[name]
        source = str(path) if kind.single else f"{path}, frame 0"
        with open_binary(path) as file:
            if name == _EXTXYZ:
                yield from read_extxyz(as_text(file), str(path), last)
                return
            if name == _TRAJECTORY:
                check_trajectory(file)
            # A format that needs the file itself gets an absolute path. ASE takes relative names such as postgres.dat
            # for addresses of databases.
            opened = (file if kind.isbinary else as_text(file)) if kind.acceptsfd else str(path.absolute())
            images = ase.io.iread(opened, -1 if last else ":", name, do_not_split_by_at_sign=True)
            for number, atoms in enumerate(images):
                source = f"{path}, last frame" if last else f"{path}, frame {number}"
                yield source, atoms
                source = f"{path}, frame {number + 1}"
    except Exception as error:  # ASE's readers raise many kinds of errors
        raise _unreadable(source, path, "by ASE", error) from error


def _format_of(file: io.BufferedReader, path: Path) -> str:
    """Name of a file's format, from its name and the first bytes without byte-order mark."""
    head = file.read(PEEK_BYTES)
    if (encoding := encoding_of(head)) != "utf-8":
        head = head.decode(encoding, errors="ignore").encode()
    name = ""
    for guess in (
        True,
        False,
    ):  # ASE may guess a format that does not exist from a suffix such as that of run.xyz@0
        start = io.BytesIO(head)
        start.name = str(path.absolute())  # type: ignore[attr-defined]
        if (name := filetype(start, guess=guess)) in ioformats:
            break
    return name


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
