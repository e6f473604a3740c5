"""Structures of LMDB databases that stay on the disk: a sequence of frames, and the data set of their graphs."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dpa4.data.batch import Batch
from dpa4.data.dataset import FrameDataset
from dpa4.data.frame import Frame
from dpa4.data.labels import USUAL_KEYS, LabelKeys
from dpa4.data.lmdb_index import FLAG_OF_LABEL, HIDDEN, NO_CHARGE, LmdbIndex, open_index
from dpa4.data.readers import group_of
from dpa4.data.summary import LABELS, IndexedFrames
from dpa4.graph import Graph

SAMPLE = 20_000
"""Structures from which statistics, reference energies and warnings are computed; of fewer, all are used."""

_PART = 1 << 20  # entries of a column that are looked at together

Indices = NDArray[np.int64]


class StreamedFrames(IndexedFrames):
    """Structures of LMDB databases, in the order of the files and rows; each is read when it is asked for.

    Rows that cannot be used are left out: those that are damaged or have a malformed label.
    """

    def __init__(self, indexes: Sequence[LmdbIndex], chosen: Indices | None = None, excluded: Any = None):
        """Create the sequence of all rows, of chosen ones, or of all but the excluded ones.

        Args:
            indexes: Indexes of the files.
            chosen: Positions among the rows of all files, in order.
            excluded: Positions that are left out, sorted; by default the rows that cannot be used.
        """
        self.indexes = tuple(indexes)
        self._starts = np.cumsum([0, *map(len, indexes)])
        if excluded is None:
            excluded = self.special("unusable")
        self._excluded = np.asarray(excluded, dtype=np.int64)
        self._chosen = chosen
        self._samples: dict[int, list[Frame]] = {}
        # Number of entries before each excluded one: an entry lies behind those that have at most as many.
        self._before = self._excluded - np.arange(len(self._excluded))

    def __getstate__(self) -> dict[str, Any]:
        """Without the structures that were read for statistics."""
        return self.__dict__ | {"_samples": {}}

    def __len__(self) -> int:
        """Number of structures."""
        total = int(self._starts[-1]) - len(self._excluded)
        return total if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> "StreamedFrames": ...
    def __getitem__(self, index: int | slice) -> "Frame | StreamedFrames":
        """Read a structure, or select a part.

        Raises:
            ValueError: If the row has changed since the index was built, and cannot be read.
        """
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int64)[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"structure {index} of {len(self)}")
        position = int(self.positions(np.array([index % len(self)]))[0])
        file = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.indexes[file].frame(position - int(self._starts[file]))

    def __iter__(self) -> Iterator[Frame]:
        """Read all structures, one after the other."""
        return (self[k] for k in range(len(self)))

    def positions(self, indices: Indices) -> Indices:
        """Positions of structures among the rows of all files."""
        if self._chosen is not None:
            return self._chosen[indices]
        return indices + np.searchsorted(self._before, indices, side="right")

    def take(self, indices: Indices) -> "StreamedFrames":
        """Select structures."""
        return StreamedFrames(self.indexes, self.positions(np.asarray(indices, dtype=np.int64)))

    def without(self, indices: Indices) -> "StreamedFrames":
        """All structures but these; takes memory for these only."""
        gone = self.positions(np.unique(np.asarray(indices, dtype=np.int64)))
        if self._chosen is not None:
            return StreamedFrames(self.indexes, np.setdiff1d(self._chosen, gone))
        return StreamedFrames(self.indexes, excluded=np.union1d(self._excluded, gone))

    def special(self, name: str) -> Indices:
        """Positions of the rows that are "unusable" or "free_atoms"."""
        found = [
            i.special[name] + start for i, start in zip(self.indexes, self._starts[:-1].tolist(), strict=True)
        ]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def indices_of(self, positions: Indices) -> Indices:
        """Indices of those of these positions that are part of the sequence; the inverse of ``positions``."""
        if self._chosen is not None:
            return np.flatnonzero(np.isin(self._chosen, positions))
        kept = np.setdiff1d(positions, self._excluded)
        return kept - np.searchsorted(self._excluded, kept)

    # What the indexes know

    def column(self, name: str) -> "Column":
        """Values of a column of the indexes: atoms, low, high, flags, charge or spin."""
        return Column(self, [index.columns[name] for index in self.indexes])

    def edges(self, cutoff: float) -> "Column":
        """Number of edges of each structure; the first use for a cutoff builds every neighbour list once."""
        return Column(self, [index.edges(cutoff) for index in self.indexes])

    @property
    def free_atoms(self) -> Indices:
        """Indices of the free atoms."""
        return self.indices_of(self.special("free_atoms"))

    def elements(self) -> list[int]:
        """Atomic numbers that occur, sorted."""
        found = 0
        for name, shift in (("low", 0), ("high", 64)):
            for part in self.column(name).parts():
                found |= int(np.bitwise_or.reduce(part)) << shift
        return [z for z in range(128) if found >> z & 1]

    def label_counts(self, used: bool = False) -> dict[str, int]:
        """Number of structures with each label; with ``used``, only of those whose weight is not zero."""
        counts = dict.fromkeys(LABELS, 0)
        for flags in self.column("flags").parts():
            seen = flags[flags & HIDDEN == 0] if used else flags
            for name, flag in FLAG_OF_LABEL.items():
                counts[name] += int(np.count_nonzero(seen & flag))
        return counts

    def sizes(self) -> tuple[int, float, int]:
        """Smallest, mean and largest number of atoms; there must be a structure."""
        found = [
            (int(p.min()), int(p.sum(dtype=np.int64)), int(p.max())) for p in self.column("atoms").parts()
        ]
        smallest, sums, largest = zip(*found, strict=True)
        return min(smallest), sum(sums) / len(self), max(largest)

    def hidden(self) -> int:
        """Number of structures whose weight is zero."""
        return sum(int(np.count_nonzero(part & HIDDEN)) for part in self.column("flags").parts())

    def charges_and_spins(self) -> Counter[tuple[int | None, int | None]]:
        """Number of structures with each pair of a total charge and a multiplicity; None: not stated."""
        found: Counter[tuple[int | None, int | None]] = Counter()
        parts = zip(self.column("charge").parts(), self.column("spin").parts(), strict=True)
        for charge, spin in parts:
            pairs, counts = np.unique(np.stack([charge, spin]), axis=1, return_counts=True)
            for (c, m), n in zip(pairs.T.tolist(), counts.tolist(), strict=True):
                found[None if c == NO_CHARGE else c, m or None] += n
        return found

    def first_outside(self, known: NDArray[np.bool_]) -> Frame | None:
        """First structure with an element that is not among the known ones, given by atomic number."""
        first = []
        for name, shift in (("low", 0), ("high", 64)):
            outside = sum(
                1 << bit for bit in range(64) if bit + shift < len(known) and not known[bit + shift]
            )
            for number, part in enumerate(self.column(name).parts()):
                if len(found := np.flatnonzero(part & np.uint64(outside))):
                    first.append(number * _PART + int(found[0]))
                    break
        return self[min(first)] if first else None

    def kinds(self, index: int) -> set[int | str]:
        """Atomic numbers and names of the labels of a structure, from the index alone."""
        where = np.array([index])
        bits = int(self.column("low")[where][0]) | int(self.column("high")[where][0]) << 64
        flags = int(self.column("flags")[where][0])
        labels = {name for name, flag in FLAG_OF_LABEL.items() if flags & flag}
        return {z for z in range(128) if bits >> z & 1} | labels

    def kind_counts(self) -> dict[int | str, int]:
        """Number of structures with each element (by atomic number) and each label."""
        counts: dict[int | str, int] = {}
        counts.update(self.label_counts())
        for name, shift in (("low", 0), ("high", 64)):
            for part in self.column(name).parts():
                for bit in range(64):
                    if n := int(np.count_nonzero(part >> np.uint64(bit) & np.uint64(1))):
                        counts[bit + shift] = counts.get(bit + shift, 0) + n
        return counts

    def sample(self, size: int = SAMPLE) -> list[Frame]:
        """Evenly spaced structures, with free atoms and structures of every element; all, if they are few.

        They are read once and stay in memory.
        """
        if size not in self._samples:
            self._samples[size] = [self[int(k)] for k in self._sampled(size)]
        return list(self._samples[size])

    def _sampled(self, size: int) -> Indices:
        count = len(self)
        if count <= size:
            return np.arange(count)
        chosen = [np.linspace(0, count - 1, size).round().astype(np.int64), self.free_atoms[:size]]
        for index, start in zip(self.indexes, self._starts[:-1].tolist(), strict=True):
            for rows in index.summary["examples"].values():
                chosen.append(self.indices_of(np.array(rows, dtype=np.int64) + start))
        return np.unique(np.concatenate(chosen))

    def digest(self) -> str:
        """Digest of the contents of the rows, by which a run recognises its data."""
        found = hashlib.blake2b(digest_size=16)
        for index in self.indexes:
            found.update(index.summary["digest"].encode())
        found.update(self._excluded.tobytes())
        found.update(b"all" if self._chosen is None else self._chosen.tobytes())
        return found.hexdigest()


class Column:
    """Values of the structures of a sequence, mapped from the disk: an array that is indexed by arrays of indices."""

    def __init__(self, frames: StreamedFrames, arrays: Sequence[NDArray[Any]]):
        self._frames, self._arrays = frames, arrays
        self._starts = frames._starts

    def __len__(self) -> int:
        """Number of values."""
        return len(self._frames)

    def __getitem__(self, indices: Any) -> NDArray[Any]:
        """Values at indices: one, a sequence, or a slice."""
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)), dtype=np.int64)
        where = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        positions = self._frames.positions(where)
        if len(self._arrays) == 1:
            values = self._arrays[0][positions]
        else:
            files = np.searchsorted(self._starts, positions, side="right") - 1
            values = np.zeros(len(positions), dtype=self._arrays[0].dtype)
            for file in np.unique(files).tolist():
                mine = files == file
                values[mine] = self._arrays[file][positions[mine] - self._starts[file]]
        return values if np.ndim(indices) else values[0]

    def parts(self) -> Iterator[NDArray[Any]]:
        """Yield the values in order, in pieces that fit into memory."""
        return (self[start : start + _PART] for start in range(0, len(self), _PART))


class StreamedDataset(FrameDataset):
    """Data set of structures that stay on the disk; nothing is cached.

    Structures and neighbour lists are the same as for a `FrameDataset` of the same frames.
    """

    by_windows = True

    def __init__(
        self,
        frames: StreamedFrames,
        cutoff: float,
        charge_spin: Callable[[Frame], tuple[int, int]] | None = None,
    ):
        """Create a data set; nothing is read yet.

        Args:
            frames: The structures.
            cutoff: Cutoff radius of the model, in Angstrom.
            charge_spin: Function that gives charge and multiplicity of a structure; None: neutral singlets.
        """
        self.frames = self._stored = frames
        self.cutoff, self._charge_spin_of = cutoff, charge_spin

    @property
    def num_atoms(self) -> Any:
        """Number of atoms of each structure, a `Column`."""
        return self._stored.column("atoms")

    @property
    def num_edges(self) -> Any:
        """Number of edges of each structure, a `Column`."""
        return self._stored.edges(self.cutoff)

    def graph(self, index: int) -> Graph:
        """Graph of one structure.

        Raises:
            ValueError: If it cannot be read, or its neighbour list cannot be built.
        """
        return self._graph_of(self.frames[index], index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read structures, and join them and their labels into one batch."""
        frames = [self.frames[int(i)] for i in indices]
        return self._joined(frames, [self._graph_of(f, i) for f, i in zip(frames, indices, strict=True)])

    def _graph_of(self, frame: Frame, index: int) -> Graph:
        pair = (0, 1) if self._charge_spin_of is None else self._charge_spin_of(frame)
        return self._built(frame, index, pair)


def sampled(frames: Sequence[Frame]) -> list[Frame]:
    """All structures that are in memory; of structures on the disk a `StreamedFrames.sample`."""
    return frames.sample() if isinstance(frames, StreamedFrames) else list(frames)


def are_streamed(paths: Sequence[Path]) -> bool:
    """Return whether sources are read while they are used: all of them are ``.aselmdb`` files."""
    return bool(paths) and all(path.suffix == ".aselmdb" for path in paths)


def open_streamed(
    paths: Sequence[Path], keys: LabelKeys = USUAL_KEYS, workers: int | None = None
) -> StreamedFrames:
    """Open ``.aselmdb`` files; their indexes are built first where they are absent.

    Raises:
        ValueError: If a file cannot be read, or no row can be used.
    """
    frames = StreamedFrames([open_index(path, group_of(path), keys, workers) for path in paths])
    if not len(frames):
        first = frames.indexes[0]
        try:
            first.frame(0)
        except ValueError as error:
            raise ValueError(f"no structure to use in {', '.join(map(str, paths))}: {error}") from error
    counts = frames.label_counts()
    for label, key in asdict(keys).items():
        if key is not None and not counts["virial" if label == "stress" else label]:
            raise ValueError(
                f"data.keys.{label} = {key!r} is in no structure of {', '.join(map(str, paths))}; look at the "
                "entries with dpa4 data info"
            )
    return frames


def unusable_text(frames: StreamedFrames) -> str:
    """Number of rows that are left out, and why the first of them is; "" if there are none."""
    gone = frames.special("unusable")
    if not len(gone):
        return ""
    file = int(np.searchsorted(frames._starts, gone[0], side="right")) - 1
    try:
        frames.indexes[file].frame(int(gone[0] - frames._starts[file]))
        reason = "it can be read now"
    except ValueError as error:
        reason = str(error)
    return f"left out: {len(gone)} of {int(frames._starts[-1])} rows; the first: {reason}"
