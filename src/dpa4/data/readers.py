"""Reading structures and labels from files, the only place where they enter."""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase.db
import ase.io
from ase import Atoms

from dpa4.data.deepmd_npy import find_systems, read_system
from dpa4.data.frame import Frame
from dpa4.data.labels import USUAL_KEYS, LabelKeys, check_keys, frame_from_atoms, label_names


def read_frames(paths: str | Path | Sequence[str | Path], keys: LabelKeys = USUAL_KEYS) -> list[Frame]:
    """Read every structure of one or more files or directories.

    Files: all ASE reads (extended XYZ, trajectories, VASP and other outputs), ASE databases (``.db``,
    ``.json``), ``.aselmdb``, and ``.zip`` archives of extended XYZ files. Directories: deepmd npy systems at
    any depth, or ``.aselmdb`` shards.

    Labels are in eV and Angstrom. Without ``keys`` they are looked for in the calculator's results, then as
    ``REF_energy``, ``REF_forces``, ``REF_stress``, ``REF_virial(s)``, then under the plain names. A virial is
    -dE/dstrain in eV; a stress is in eV/Angstrom^3 in ASE's sign (tensile positive) and becomes
    -volume * stress. Of an energy and a free energy the energy is taken.

    Args:
        paths: A path, or several that are read in order.
        keys: Names of the labels where they are not the usual ones. Each must occur in at least one structure
            of all the paths together; deepmd directories have fixed names.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file cannot be read or has no structure, a label is malformed or not finite, or a
            named label is in no structure.
        ImportError: If the reader of ``.aselmdb`` files is not installed.
    """
    sources = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
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
            for origin, atoms in read_atoms(path):
                frames.append(frame_from_atoms(atoms, keys, group=path.stem, origin=origin))
                found |= label_names(atoms)
        if len(frames) == before:
            raise ValueError(f"{path} has no structure")
    check_keys(keys, found, ", ".join(map(str, sources)))
    return frames


def read_atoms(path: Path) -> Iterator[tuple[str, Atoms]]:
    """Structures of one path with their origin, in any of the formats of ``read_frames`` but deepmd's.

    Raises:
        ImportError: If the reader of ``.aselmdb`` files is not installed.
        ValueError: If the path cannot be read.
    """
    if path.is_dir():
        shards = sorted(path.glob("*.aselmdb"))
        if not shards:
            raise ValueError(
                f"{path} is a directory with neither deepmd systems (type.raw) nor .aselmdb files"
            )
        for shard in shards:
            yield from read_atoms(shard)
    elif path.suffix in (".db", ".json", ".aselmdb"):
        yield from _read_database(path)
    elif path.suffix == ".zip":
        yield from _read_archive(path)
    else:
        for k, atoms in enumerate(read_images(path)):
            yield f"{path}, frame {k}", atoms


def read_images(path: Path, index: str = ":") -> list[Atoms]:
    """Structures of a file in a format of ASE, without their origin.

    Args:
        path: The file.
        index: Which of them, as ASE writes it; "-1" is the last.

    Raises:
        ValueError: If ASE cannot read it.
    """
    try:
        return list(ase.io.iread(path, index=index))
    except Exception as error:  # ASE's readers raise errors of every kind
        raise ValueError(f"{path} cannot be read by ASE: {type(error).__name__}: {error}") from error


def _read_archive(path: Path) -> Iterator[tuple[str, Atoms]]:
    """Structures of the extended XYZ files in an archive, which is not unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith((".extxyz", ".xyz")):
                    text = io.StringIO(archive.read(name).decode())
                    for k, atoms in enumerate(ase.io.iread(text, index=":", format="extxyz")):
                        yield f"{path}, {name}, frame {k}", atoms
    except Exception as error:  # of the archive or ASE's reader, of every kind
        raise ValueError(f"{path} cannot be read as archive: {type(error).__name__}: {error}") from error


def _read_database(path: Path) -> Iterator[tuple[str, Atoms]]:
    """Rows of an ASE database; their key-value pairs and data become ``atoms.info``."""
    options: dict[str, object] = {}
    if path.suffix == ".aselmdb":
        try:
            import ase_db_backends  # noqa: F401
        except ImportError:
            raise ImportError(f"reading {path} needs ase-db-backends: pip install dpa4[aselmdb]") from None
        options = {"type": "aselmdb", "readonly": True}
    try:
        # No lock file: the folder of a data set may not be writable.
        with ase.db.connect(path, use_lock_file=False, **options) as database:
            for row in database.select():
                atoms = row.toatoms()
                atoms.info.update(row.key_value_pairs)
                atoms.info.update(row.data)
                yield f"{path}, row {row.id}", atoms
    except Exception as error:  # of the database or its decoder, of every kind
        raise ValueError(f"{path} cannot be read as ASE database: {type(error).__name__}: {error}") from error
