"""Data sets of labelled graphs, and the batches of an epoch."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from dpa4.data.division import Share, balanced, least
from dpa4.data.frame import Frame
from dpa4.graph import Graph, build_graph, collate
from dpa4.messages import warn
from dpa4.system import own_settings

CACHE_BYTES = 4 * 1024**3  # limit of the graphs that a data set caches in memory; others are rebuilt
PREFETCH = 3  # batches prepared ahead

T = TypeVar("T")


class Batch(NamedTuple):
    """B structures with N atoms in all, and their labels; a missing label is zero and its mask is false."""

    graph: Graph
    energy: Tensor  # (B,) float64, eV
    forces: Tensor  # (N, 3) float64, eV/Angstrom
    virial: Tensor  # (B, 3, 3) float64, eV, -dE/dstrain
    has_energy: Tensor  # (B,) bool
    has_forces: Tensor  # (B,) bool
    has_virial: Tensor  # (B,) bool
    weight: Tensor  # (B,) float64
    max_force: (
        Tensor  # (N,) float64, eV/Angstrom: bound of the force of an atom without labels; zero: no bound
    )
    counts: Tensor  # (4,) int64: energies, atoms with forces, virials, atoms with a bound; of all parts of the batch

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device."""
        non_blocking = torch.device(device).type != "cpu"  # see Graph.to
        return Batch(self.graph.to(device), *(t.to(device, non_blocking=non_blocking) for t in self[1:]))

    def extended(self, graph: Graph) -> "Batch":
        """Batch of a graph with further structures after those of the batch; these have no labels and no bound."""

        def longer(t: Tensor, like: Tensor) -> Tensor:
            return torch.cat([t, t.new_zeros(len(like) - len(t), *t.shape[1:])])

        of_atoms = ("forces", "max_force")
        fields = {name: t for name, t in self._asdict().items() if name not in ("graph", "counts")}
        return Batch(
            graph,
            **{n: longer(t, graph.positions if n in of_atoms else graph.cell) for n, t in fields.items()},
            counts=self.counts,
        )

    def counted(self) -> "Batch":
        """Batch with the ``counts`` of its own labels and bounds."""
        forces = self.has_forces[self.graph.structure]
        found = [mask.sum() for mask in (self.has_energy, forces, self.has_virial, self.max_force > 0)]
        return self._replace(counts=torch.stack(found))

    def without_labels(self) -> "Batch":
        """Batch of the same structures, none of which has a label."""
        none = torch.zeros_like(self.has_energy)
        return self._replace(has_energy=none, has_forces=none, has_virial=none).counted()

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which copies to a GPU are asynchronous."""
        return Batch(self.graph.pin_memory(), *(t.pin_memory() for t in self[1:]))


class FrameDataset:
    """Data set of structures, whose graphs are built at first use."""

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
        self.frames = list(frames)
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

    @num_edges.setter
    def num_edges(self, found: NDArray[np.int64]) -> None:
        self._num_edges = found

    def graph(self, index: int) -> Graph:
        """Graph of one structure.

        Raises:
            ValueError: If its neighbour list cannot be built; the message names the origin of the structure.
        """
        if index in self._graphs:
            return self._graphs[index]
        frame = self.frames[index]
        charge_spin = (0, 1) if self.charge_spin is None else self.charge_spin[index]
        try:
            graph = build_graph(
                frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, self.cutoff, charge_spin
            )
        except ValueError as error:
            raise ValueError(f"{_name(frame, index)}: {error}") from error
        size = sum(t.nbytes for t in graph)
        if size <= self._free_bytes:
            self._graphs[index] = graph
            self._free_bytes -= size
        return graph

    @own_settings
    def batch(self, indices: Sequence[int]) -> Batch:
        """Join structures and their labels into one batch."""
        frames = [self.frames[i] for i in indices]
        forces = [np.zeros((len(f), 3)) if f.forces is None else f.forces for f in frames]
        virial = [np.zeros((3, 3)) if f.virial is None else f.virial for f in frames]
        return Batch(
            graph=collate([self.graph(i) for i in indices]),
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
    sizes: NDArray[np.int64]  # of each structure (n,)
    limit: int  # of a batch


def pack(order: Sequence[int], budgets: Sequence[Budget]) -> list[list[int]]:
    """Split structures into consecutive batches, each as large as all budgets allow.

    A structure that exceeds a budget becomes a batch of its own; none is dropped.

    Args:
        order: Indices of the structures, in the order of the batches.
        budgets: Limits of a batch.
    """
    batches: list[list[int]] = []
    filled = np.zeros(len(budgets), dtype=np.int64)
    limits = np.array([budget.limit for budget in budgets])
    for index, size in zip(order, np.stack([b.sizes for b in budgets], axis=1)[order], strict=True):
        filled += size
        if not batches or (filled > limits).any():
            batches.append([])
            filled = size.copy()
        batches[-1].append(int(index))
    return batches


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
        self.dataset, self.seed, self.shuffle, self.extend = dataset, seed, shuffle, extend
        self.share = share
        self._budgets: list[Budget] = []
        if batch_size is not None:
            self._budgets.append(Budget("structures", np.ones(len(dataset), dtype=np.int64), batch_size))
        if max_atoms is not None:
            self._budgets.append(Budget("atoms", dataset.num_atoms, max_atoms))
        if max_edges is not None:
            self._budgets.append(Budget("edges", dataset.num_edges, max_edges))
        for budget in self._budgets:
            self._warn_of_oversized(budget)

    def _warn_of_oversized(self, budget: Budget) -> None:
        largest = int(budget.sizes.argmax())
        if budget.sizes[largest] > budget.limit:
            count = int((budget.sizes > budget.limit).sum())
            warn(
                f"{count} structures exceed max_{budget.what} = {budget.limit} and are batches of their own; "
                f"the largest is {_name(self.dataset.frames[largest], largest)} with "
                f"{budget.sizes[largest]} {budget.what}",
            )

    def indices(self, epoch: int) -> list[list[int]]:
        """Indices of the structures of each batch of an epoch."""
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return pack(order.tolist(), self._budgets)

    def num_batches(self, epoch: int) -> int:
        """Number of batches of an epoch; with ``max_atoms`` or ``max_edges`` it differs between epochs."""
        return len(self.indices(epoch))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from number ``start`` on.

        The batches are in page-locked memory if there is a GPU. A thread prepares them ahead and ends when the
        iterator is exhausted, closed or deleted.
        """
        pin = torch.cuda.is_available()

        def make(item: tuple[int, list[int]]) -> Batch:
            batch = self._own(item[1], epoch, item[0])
            return batch.pin_memory() if pin else batch

        numbered = list(enumerate(self.indices(epoch)))
        if self.share is not None and self.share.whole:
            numbered = [numbered[i] for i in self.owners(epoch)[self.share.rank]]
        return _prefetched(make, numbered[start:])

    def owners(self, epoch: int) -> list[list[int]]:
        """Numbers of the batches of each process, if whole batches are divided."""
        assert self.share is not None
        batches, costs = self.indices(epoch), self._costs()
        sums = np.array([costs[batch].sum() for batch in batches])
        return balanced(range(len(batches)), sums, self.share.size)

    def _own(self, indices: list[int], epoch: int, number: int) -> Batch:
        """Batch ``number`` of an epoch, or the part of this process.

        A process without a structure of the batch has one without labels, so that it does the same work as the
        others. Structures that are added belong to the process with the smallest part.
        """
        added = self.extend
        if self.share is None or self.share.whole:
            batch = self.dataset.batch(indices)
        else:
            costs = self._costs()
            parts = balanced(indices, costs, self.share.size)
            own = parts[self.share.rank]
            if self.share.rank != least(parts, costs):
                added = None
            batch = self.dataset.batch(own or [min(indices, key=costs.__getitem__)])
            batch = batch if own else batch.without_labels()
        return batch if added is None else added(batch, epoch, number)

    def _costs(self) -> NDArray[np.int64]:
        """Cost of each structure: its edges and, so that none is free, its atoms."""
        return self.dataset.num_edges + self.dataset.num_atoms


def _prefetched(make: Callable[[T], Batch], items: Sequence[T]) -> Iterator[Batch]:
    """Yield ``make(item)`` for every item, computed ahead in one thread; exceptions of ``make`` are raised here."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dpa4-batches")
    todo = iter(items)
    pending: deque[Future[Batch]] = deque()
    try:
        pending.extend(pool.submit(make, item) for item in islice(todo, PREFETCH))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(make, item) for item in islice(todo, 1))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _name(frame: Frame, index: int) -> str:
    return frame.origin or f"structure {index}"
