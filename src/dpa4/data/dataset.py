"""Data sets of labelled graphs, and the batches of an epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from dpa4.data.batch import Batch
from dpa4.data.division import Share, balanced, least
from dpa4.data.frame import Frame
from dpa4.data.loader import Loader
from dpa4.graph import Graph, build_graph, collate
from dpa4.messages import warn
from dpa4.system import own_settings

CACHE_BYTES = 4 * 1024**3  # limit of the graphs that a data set caches in memory; others are rebuilt
WINDOW = 2**18  # structures on the disk that are shuffled together
BLOCK = 256  # neighbouring structures on the disk that stay together in the order of windows


class FrameDataset:
    """Data set of structures, whose graphs are built at first use."""

    by_windows = False  # if the order of an epoch is made window by window

    def __init__(
        self,
        frames: Sequence[Frame],
        cutoff: float,
        charge_spin: Sequence[tuple[int, int]] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        """Create a data set; no graph is built yet.

        Args:
            frames: The structures.
            cutoff: Cutoff radius of the model, in Angstrom.
            charge_spin: Charge and multiplicity of each frame, from ``charges_and_spins``; None: neutral singlets.
            cache_bytes: Size limit of the graphs cached in memory. The first graphs stay cached: evicting the
                least recently used ones would evict every graph before its next use, one epoch later.
        """
        self.frames: Sequence[Frame] = list(frames)
        self.cutoff = cutoff
        self.charge_spin = charge_spin
        self._free_bytes = cache_bytes
        self._graphs: dict[int, Graph] = {}
        self._num_edges: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Number of structures."""
        return len(self.frames)

    @property
    def num_atoms(self) -> NDArray[np.int64]:
        """Number of atoms of each structure (n,)."""
        return np.array([len(frame) for frame in self.frames], dtype=np.int64)

    @property
    def num_edges(self) -> NDArray[np.int64]:
        """Number of edges of each structure (n,); the first use builds every graph."""
        if self._num_edges is None:
            indices = track(range(len(self)), "building neighbour lists", disable=len(self) <= 2000)
            self._num_edges = np.array([self.graph(i).num_edges for i in indices], dtype=np.int64)
        return self._num_edges

    def keep_num_edges(self, found: NDArray[np.int64]) -> None:
        """Keep numbers of edges (n,) that were counted elsewhere."""
        self._num_edges = found

    def graph(self, index: int) -> Graph:
        """Graph of one structure.

        Raises:
            ValueError: If its neighbour list cannot be built; the message names the origin of the structure.
        """
        if index in self._graphs:
            return self._graphs[index]
        charge_spin = (0, 1) if self.charge_spin is None else self.charge_spin[index]
        graph = self._built(self.frames[index], index, charge_spin)
        size = sum(t.nbytes for t in graph)
        if size <= self._free_bytes:
            self._graphs[index] = graph
            self._free_bytes -= size
        return graph

    def batch(self, indices: Sequence[int]) -> Batch:
        """Join structures and their labels into one batch."""
        return self._joined([self.frames[i] for i in indices], [self.graph(i) for i in indices])

    def _built(self, frame: Frame, index: int, charge_spin: tuple[int, int]) -> Graph:
        try:
            return build_graph(
                frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, self.cutoff, charge_spin
            )
        except ValueError as error:
            raise ValueError(f"{_name(frame, index)}: {error}") from error

    @own_settings
    def _joined(self, frames: Sequence[Frame], graphs: Sequence[Graph]) -> Batch:
        forces = [np.zeros((len(f), 3)) if f.forces is None else f.forces for f in frames]
        virial = [np.zeros((3, 3)) if f.virial is None else f.virial for f in frames]
        return Batch(
            graph=collate(graphs),
            energy=torch.tensor([f.energy or 0.0 for f in frames], dtype=torch.float64),
            forces=torch.from_numpy(np.concatenate(forces)),
            virial=torch.from_numpy(np.stack(virial)),
            has_energy=torch.tensor([f.energy is not None for f in frames]),
            has_forces=torch.tensor([f.forces is not None for f in frames]),
            has_virial=torch.tensor([f.virial is not None for f in frames]),
            weight=torch.tensor([f.weight for f in frames], dtype=torch.float64),
            max_force=torch.zeros(sum(map(len, frames)), dtype=torch.float64),
            counts=torch.zeros(4, dtype=torch.int64),
        ).counted()


class Budget(NamedTuple):
    """Limit of the structures, atoms or edges in a batch."""

    what: str  # "structures", "atoms" or "edges"
    sizes: Any  # of each structure (n,): an array, or anything that is indexed like one
    limit: int  # of a batch


def pack(order: Sequence[int] | NDArray[np.int64], budgets: Sequence[Budget]) -> list[list[int]]:
    """Split structures into consecutive batches, each as large as all budgets allow.

    A structure that exceeds a budget becomes a batch of its own; none is dropped.

    Args:
        order: Indices of the structures, in the order of the batches.
        budgets: Limits of a batch.
    """
    indices = np.asarray(order, dtype=np.int64)
    ends = batch_ends(indices, budgets)
    return [indices[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]


def batch_ends(order: NDArray[np.int64], budgets: Sequence[Budget]) -> list[int]:
    """End of each batch in the order, for `pack`."""
    sums = [np.cumsum(budget.sizes[order], dtype=np.int64) for budget in budgets]
    # Entry k is the end of a batch that begins with structure k.
    following = np.full(len(order), len(order), dtype=np.int64)
    for total, budget in zip(sums, budgets, strict=True):
        before = np.concatenate([[0], total[:-1]]) if len(total) else total
        np.minimum(following, np.searchsorted(total, before + budget.limit, side="right"), out=following)
    ends = np.maximum(following, np.arange(1, len(order) + 1)).tolist()
    found, start = [], 0
    while start < len(order):
        start = ends[start]
        found.append(start)
    return found


class Fill(NamedTuple):
    """Filled share of a budget in the batches of an epoch."""

    what: str  # "atoms" or "edges"
    mean: float
    deviation: float  # standard deviation over the batches
    batches: int


@dataclass(frozen=True)
class _Maker:
    """Makes a batch, given the epoch, the number of the batch and the indices of its structures."""

    dataset: FrameDataset
    extend: Callable[[Batch, int, int], Batch] | None
    share: Share | None = None

    def __call__(self, item: tuple[int, int, list[int]]) -> Batch:
        """Make a batch, or the part of this process.

        A process without a structure of the batch has one without labels, so that it does the same work as the
        others. Structures that are added belong to the process with the smallest part.
        """
        epoch, number, indices = item
        added = self.extend
        if self.share is None or self.share.whole:
            batch = self.dataset.batch(indices)
        else:
            costs = costs_of(self.dataset, indices)
            parts = balanced(range(len(indices)), costs, self.share.size)
            own = parts[self.share.rank]
            if self.share.rank != least(parts, costs):
                added = None
            batch = self.dataset.batch([indices[k] for k in own or [int(costs.argmin())]])
            batch = batch if own else batch.without_labels()
        return batch if added is None else added(batch, epoch, number)


class EpochBatches:
    """Batches of every epoch, determined by seed and epoch alone so that a run can be resumed.

    Batches mix structures of different sizes. A batch is filled until its budget of atoms or edges is spent,
    so that large structures do not exhaust the memory.
    """

    def __init__(
        self,
        dataset: FrameDataset,
        *,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        extend: Callable[[Batch, int, int], Batch] | None = None,
        workers: int = 0,
        share: Share | None = None,
    ):
        """Set the size of batches: ``batch_size``, or ``max_atoms`` and/or ``max_edges``.

        A structure that alone exceeds a budget causes one warning.

        Args:
            dataset: The structures.
            batch_size: Number of structures per batch.
            max_atoms: Maximum number of atoms per batch.
            max_edges: Maximum number of edges per batch.
            seed: Seed of the shuffling.
            shuffle: Shuffle anew in every epoch; otherwise preserve the order of the frames.
            extend: Function that adds structures to a batch, given the epoch and the number of the batch.
            workers: Processes that prepare batches; 0: a thread. The batches are the same.
            share: Share of this process in the batches; None: all of them.

        Raises:
            ValueError: If no size, both kinds of size or a size below 1 is given, or the data set is empty.
        """
        given = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        limits = {name: value for name, value in given.items() if value is not None}
        if not limits or ("batch_size" in limits and len(limits) > 1):
            raise ValueError(f"give either batch_size, or max_atoms and/or max_edges; got {limits}")
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not len(dataset):
            raise ValueError("the data set has no structures, so there are no batches")
        self.dataset, self.seed, self.shuffle, self.share = dataset, seed, shuffle, share
        self.loader = Loader(_Maker(dataset, extend, share), workers)
        self._counted: tuple[int, int] | None = None  # epoch, number of batches
        self._budgets: list[Budget] = []
        if batch_size is not None:
            ones = np.broadcast_to(np.int64(1), len(dataset))  # takes no memory
            self._budgets.append(Budget("structures", ones, batch_size))
        if max_atoms is not None:
            self._budgets.append(Budget("atoms", dataset.num_atoms, max_atoms))
        if max_edges is not None:
            self._budgets.append(Budget("edges", dataset.num_edges, max_edges))
        for budget in self._budgets:
            self._warn_of_oversized(budget)

    def _warn_of_oversized(self, budget: Budget) -> None:
        count, largest, size = 0, 0, 0
        for start in range(0, len(self.dataset), WINDOW):
            part = np.asarray(budget.sizes[start : start + WINDOW])
            count += int((part > budget.limit).sum())
            if part.max() > size:
                largest, size = start + int(part.argmax()), int(part.max())
        if count:
            warn(
                f"{count} structures exceed max_{budget.what} = {budget.limit} and are batches of their own; "
                f"the largest is {_name(self.dataset.frames[largest], largest)} with {size} {budget.what}",
            )

    def _windows(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """Yield the order of an epoch in windows of at most `WINDOW` structures; batches do not cross their borders.

        Of larger data the blocks of neighbouring structures are shuffled, and then the structures of every window of
        blocks, so that no array has an entry per structure of the data set and a disk reads whole blocks.
        """
        count = len(self.dataset)
        random = np.random.default_rng((self.seed, epoch))
        if count <= WINDOW or not self.dataset.by_windows:
            yield random.permutation(np.arange(count)) if self.shuffle else np.arange(count)
            return
        blocks = np.arange(-(-count // BLOCK))
        blocks = random.permutation(blocks) if self.shuffle else blocks
        for first in range(0, len(blocks), WINDOW // BLOCK):
            chosen = blocks[first : first + WINDOW // BLOCK, None] * BLOCK + np.arange(BLOCK)
            window = chosen[chosen < count]
            yield random.permutation(window) if self.shuffle else window

    def plan(self, epoch: int, start: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Yield number and indices of the structures of each batch of an epoch, from number ``start`` on.

        The list depends on seed and epoch alone, so several processes that divide it by number need not talk to each
        other.
        """
        number = 0
        for window in self._windows(epoch):
            ends = batch_ends(window, self._budgets)
            skipped = min(len(ends), max(0, start - number))
            number += skipped
            for a, b in list(zip([0, *ends], ends, strict=False))[skipped:]:
                yield number, window[a:b].tolist()
                number += 1

    def indices(self, epoch: int) -> list[list[int]]:
        """Indices of the structures of each batch of an epoch, in one list."""
        return [indices for _, indices in self.plan(epoch)]

    def num_batches(self, epoch: int) -> int:
        """Number of batches of an epoch; with ``max_atoms`` or ``max_edges`` it differs between epochs."""
        if self._counted is None or self._counted[0] != epoch:
            count = sum(len(batch_ends(window, self._budgets)) for window in self._windows(epoch))
            self._counted = epoch, count
        return self._counted[1]

    def fill(self, epoch: int = 0) -> list[Fill]:
        """Filled share of each budget of atoms or edges in the batches of an epoch, at most of its first window."""
        window = next(self._windows(epoch))
        ends = batch_ends(window, self._budgets)
        found = []
        for budget in self._budgets:
            sums = np.add.reduceat(np.asarray(budget.sizes[window], dtype=np.int64), [0, *ends[:-1]])
            share = sums / budget.limit
            if budget.what != "structures":
                found.append(Fill(budget.what, float(share.mean()), float(share.std()), len(ends)))
        return found

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from number ``start`` on.

        The batches are in page-locked memory if there is a GPU. A thread or processes prepare them ahead; a thread
        ends when the iterator is exhausted, closed or deleted.
        """
        items = self.plan(epoch, start)
        if self.share is not None and self.share.whole:
            own = self.owners(epoch)[self.share.rank][start:]
            every = self.indices(epoch)
            items = ((number, every[number]) for number in own)
        return self.loader.load((epoch, number, indices) for number, indices in items)

    def owners(self, epoch: int) -> list[list[int]]:
        """Numbers of the batches of each process, if whole batches are divided."""
        assert self.share is not None
        sums = np.array([costs_of(self.dataset, batch).sum() for batch in self.indices(epoch)])
        return balanced(range(len(sums)), sums, self.share.size)


def costs_of(dataset: FrameDataset, indices: Sequence[int]) -> NDArray[np.int64]:
    """Cost of some structures: their edges and, so that none is free, their atoms."""
    chosen = np.asarray(indices, dtype=np.int64)
    return np.asarray(dataset.num_edges[chosen] + dataset.num_atoms[chosen], dtype=np.int64)


def _name(frame: Frame, index: int) -> str:
    return frame.origin or f"structure {index}"
