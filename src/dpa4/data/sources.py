"""Data files behind the paths, patterns and folders that a user names."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dpa4.data.deepmd_npy import is_system
from dpa4.data.formats import OUTCAR, VASPRUN, holds_results, vasp_output
from dpa4.system import user_path

_NAMED = 5  # examples of ignored files in a message


class Sources(NamedTuple):
    """Files and deepmd-kit systems to read, in order, and the other files of the folders among the entries."""

    paths: tuple[Path, ...]
    ignored: tuple[Path, ...]
    searched: bool  # if an entry was a folder or a pattern

    @property
    def text(self) -> str:
        """Number of files that are read and of those that are not, in one line."""
        names = list(dict.fromkeys(path.name for path in self.ignored))
        examples = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
        found = f"{len(self.paths)} data file{'s' if len(self.paths) != 1 else ''} found"
        others = "1 other file is" if len(self.ignored) == 1 else f"{len(self.ignored)} other files are"
        return f"{found}; {others} not read ({examples})" if names else found


def find_sources(entries: str | Path | Sequence[str | Path]) -> Sources:
    """Find the data files behind one or more entries: files, patterns such as ``runs/*/OUTCAR``, and folders.

    A folder is searched at any depth, in the order of the names. It holds either deepmd-kit systems, or databases,
    trajectories, extended XYZ files and outputs of calculations. Names that begin with a dot are left out. If an
    OUTCAR and the vasprun.xml beside it are both found, the OUTCAR is left out. A file that is found twice is read
    once.

    Raises:
        FileNotFoundError: If a path does not exist, or nothing matches a pattern.
        ValueError: If a folder has nothing to read, or both deepmd-kit systems and other data.
    """
    given = [user_path(e) for e in ([entries] if isinstance(entries, str | Path) else entries)]
    found: dict[Path, Path] = {}  # by the place where symbolic links lead
    ignored: list[Path] = []
    searched = False
    for entry in given:
        matches = [entry] if entry.exists() else _matches(entry)
        paths, others = _data_files(entry, matches)
        for path in paths:
            found.setdefault(path.resolve(), path)
        ignored += others
        searched = searched or paths != [entry]
    twins = _outcars_beside_vaspruns(found.values())
    read = tuple(path for path in found.values() if path not in twins)
    unread = {path.resolve(): path for path in ignored}.items()
    return Sources(read, (*(path for place, path in unread if place not in found), *twins), searched)


def _matches(pattern: Path) -> list[Path]:
    """Files and folders that match a pattern, in order; what lies in a folder that matches is not listed.

    Raises:
        FileNotFoundError: If there are none.
    """
    if not glob.has_magic(str(pattern)):
        raise FileNotFoundError(f"no such file or directory: {pattern}")
    found = dict.fromkeys(Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)))
    if not found:
        raise FileNotFoundError(
            f"no file or directory matches {pattern}; relative patterns start in the working directory"
        )
    folders = {path for path in found if path.is_dir()}
    return [path for path in found if folders.isdisjoint(path.parents)]


def _data_files(entry: Path, matches: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Data files, or deepmd-kit systems, of an entry, and the other files of its folders.

    If a pattern matches folders or data files, then other files that it matches are not read.
    """
    paths = [path for path in matches if not path.is_dir()]
    others: list[Path] = []
    if matches != [entry]:
        known = [path for path in paths if holds_results(path)]
        if known or len(paths) < len(matches):
            paths, others = known, [path for path in paths if path not in known]
    for folder in (path for path in matches if path.is_dir()):
        inner, unread = _contents(folder)
        paths += inner
        others += unread
    if not paths:
        what = (
            f"{entry} is a directory" if matches == [entry] else f"{entry} matches {len(matches)} directories"
        )
        raise ValueError(
            f"{what} with neither deepmd systems (type.raw) nor data files, which are .xyz, .extxyz, .traj, .db, "
            ".aselmdb and .castep files and outputs of calculations such as OUTCAR; name the files to read"
        )
    return paths, others


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Data files, or deepmd-kit systems, of a folder at any depth, and its other files."""
    if is_system(folder):
        return [folder], []
    systems: list[Path] = []
    files: list[Path] = []
    others: list[Path] = []
    for path in _walk(folder):
        (systems if path.is_dir() else files if holds_results(path) else others).append(path)
    if systems and files:
        raise ValueError(
            f"{folder} has both deepmd systems ({systems[0]}) and other data ({files[0]}), perhaps of the same "
            "calculations; name those to read"
        )
    return systems or files, others


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, and the deepmd-kit systems in it, which are not entered."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_file() or is_system(path):
            yield path
        elif path.is_dir() and not (path.is_symlink() and folder.resolve().is_relative_to(path.resolve())):
            yield from _walk(path)


def _outcars_beside_vaspruns(files: Iterable[Path]) -> list[Path]:
    """Outputs that repeat the vasprun.xml in their folder."""
    kinds = {path: vasp_output(path) for path in files}
    complete = {path.parent.resolve() for path, kind in kinds.items() if kind == VASPRUN}
    return [path for path, kind in kinds.items() if kind == OUTCAR and path.parent.resolve() in complete]
