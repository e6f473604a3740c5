"""Part of the training data read in a bounded time, to choose options before a run."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dpa4.data.deepmd_npy import read_system
from dpa4.data.formats import vasp_output
from dpa4.data.frame import Frame
from dpa4.data.labels import USUAL_KEYS, frame_from_atoms
from dpa4.data.readers import group_of, read_atoms, read_content

MAX_STRUCTURES = 20_000
"""Number of structures after which reading stops."""

MAX_SECONDS = 20.0
"""Time after which reading stops; a structure that has been started is finished."""


class Sample(NamedTuple):
    """Structures that were read, and the size of the data that they stand for.

    Attributes:
        frames: Structures in the order of the files.
        structures: Number of structures of all files, estimated unless ``complete``.
        complete: True if every structure was read.
    """

    frames: list[Frame]
    structures: int
    complete: bool


def read_sample(
    paths: Sequence[Path], max_structures: int = MAX_STRUCTURES, max_seconds: float = MAX_SECONDS
) -> Sample:
    """Read files until all structures, a number of structures or a time is reached.

    Each file has an equal share of what the files before it left. The number of structures of a file that was read in
    part follows from its size if it is an uncompressed extended XYZ file; of another file only the structures read
    are counted, so the number is a lower bound.

    Args:
        paths: Files and deepmd-kit systems, as from ``find_sources``.
        max_structures: Number of structures to read at most.
        max_seconds: Time to read at most, in seconds.

    Raises:
        ValueError: If a file cannot be read or has no structure.
    """
    end = time.monotonic() + max_seconds
    frames: list[Frame] = []
    structures, complete = 0, True
    for done, path in enumerate(paths):
        left = len(paths) - done
        share = max(1, (max_structures - len(frames)) // left)
        until = time.monotonic() + max(0.0, end - time.monotonic()) / left
        before = len(frames)
        whole = True
        for frame in _frames(path):
            if len(frames) - before >= share or (len(frames) > before and time.monotonic() > until):
                whole = False
                break
            frames.append(frame)
        complete &= whole
        structures += len(frames) - before if whole else _structures_in(path, frames[before:])
    if not frames:
        raise ValueError(f"{', '.join(map(str, paths))}: no structure that can be used")
    return Sample(frames, structures, complete)


def _frames(path: Path) -> Iterator[Frame]:
    if path.is_dir():
        yield from read_system(path)
    elif vasp_output(path) is not None:  # small, and steps that did not converge are left out
        yield from read_content(path).frames
    else:
        for origin, atoms in read_atoms(path):
            yield frame_from_atoms(atoms, USUAL_KEYS, group=group_of(path), origin=origin)


def _structures_in(path: Path, frames: Sequence[Frame]) -> int:
    """Number of structures of a file whose first structures are known."""
    if path.suffix not in (".xyz", ".extxyz") or not path.is_file():
        return len(frames)
    with path.open("rb") as file:
        for frame in frames:
            for _ in range(len(frame) + 2):
                file.readline()
        return max(len(frames), round(len(frames) * path.stat().st_size / max(1, file.tell())))
