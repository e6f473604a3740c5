"""Readers of structures and labels; all data files are read here."""

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

    Files may have any format that ASE reads (extended XYZ, trajectories, VASP and other outputs), be ASE
    databases (``.db``, ``.json``, ``.aselmdb``), or ``.zip`` archives of extended XYZ files. Directories may
    contain deepmd-kit npy systems at any depth, or ``.aselmdb`` shards.

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
    """Yield origin and structure of each structure of a path, in any format of ``read_frames`` except deepmd-kit's.

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
    """Read the structures of a file in a format of ASE, without their origin.

    Args:
        path: The file.
        index: ASE's index string; ":" selects all images, "-1" the last one.

    Raises:
        ValueError: If ASE cannot read the file.
    """
    try:
        return list(ase.io.iread(path, index=index))
    except Exception as error:  # ASE's readers raise many kinds of errors
        raise ValueError(f"{path} cannot be read by ASE: {type(error).__name__}: {error}") from error


def _read_archive(path: Path) -> Iterator[tuple[str, Atoms]]:
    """Iterate over the structures of the extended XYZ files in an archive, without unpacking it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith((".extxyz", ".xyz")):
                    text = io.StringIO(archive.read(name).decode())
                    for k, atoms in enumerate(ase.io.iread(text, index=":", format="extxyz")):
                        yield f"{path}, {name}, frame {k}", atoms
    except Exception as error:  # the archive and ASE's reader raise many kinds of errors
        raise ValueError(
            f"{path} cannot be read as a zip archive: {type(error).__name__}: {error}"
        ) from error


def _read_database(path: Path) -> Iterator[tuple[str, Atoms]]:
    """Iterate over the rows of an ASE database; key-value pairs and data of a row become ``atoms.info``."""
    options: dict[str, object] = {}
    if path.suffix == ".aselmdb":
        try:
            import ase_db_backends  # noqa: F401
        except ImportError:
            raise ImportError(f"reading {path} needs ase-db-backends: pip install 'dpa4[aselmdb]'") from None
        options = {"type": "aselmdb", "readonly": True}
    try:
        # No lock file, because the folder of a data set may be read-only.
        with ase.db.connect(path, use_lock_file=False, **options) as database:
            for row in database.select():
                atoms = row.toatoms()
                atoms.info.update(row.key_value_pairs)
                atoms.info.update(row.data)
                yield f"{path}, row {row.id}", atoms
    except Exception as error:  # the database and its decoder raise many kinds of errors
        raise ValueError(
            f"{path} cannot be read as an ASE database: {type(error).__name__}: {error}"
        ) from error
