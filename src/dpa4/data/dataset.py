"""Labelled graphs and the batches they are packed into."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from dpa4.data.frame import Frame
from dpa4.graph import Graph, build_graph, collate

CACHE_BYTES = (
    4 * 1024**3
)  # graphs of one data set that are kept in memory; the others are rebuilt when needed
PREFETCH = 3  # batches prepared ahead


class Batch(NamedTuple):
    """B structures with N atoms and their labels; an absent label is zeros with a false mask."""

    graph: Graph
    energy: Tensor  # (B,) float64, eV
    forces: Tensor  # (N, 3) float64, eV/Angstrom
    virial: Tensor  # (B, 3, 3) float64, eV, -dE/dstrain
    has_energy: Tensor  # (B,) bool
    has_forces: Tensor  # (B,) bool
    has_virial: Tensor  # (B,) bool
    weight: Tensor  # (B,) float64

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device."""
        non_blocking = torch.device(device).type != "cpu"  # as Graph.to
        return Batch(self.graph.to(device), *(t.to(device, non_blocking=non_blocking) for t in self[1:]))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from where copies to a GPU do not wait."""
        return Batch(self.graph.pin_memory(), *(t.pin_memory() for t in self[1:]))


class FrameDataset:
    """Structures and their graphs, which are built when first needed."""

    def __init__(
        self,
        frames: Sequence[Frame],
        cutoff: float,
        default_charge_spin: tuple[int, int] | None = None,
        cache_bytes: int = CACHE_BYTES,
        observe: Callable[[int, Graph], None] | None = None,
    ):
        """Hold frames for a model.

        Args:
            frames: The structures.
            cutoff: Cutoff radius of the model, in Angstrom.
            default_charge_spin: Charge and multiplicity of frames that carry none; None: neutral singlet.
            cache_bytes: Graphs are kept in memory up to this size. The first ones stay: dropping the least
                recently used would keep none until its next use, an epoch later.
            observe: Called with the index and graph of a structure whenever one is built, in the thread that does.
        """
        self.frames = list(frames)
        self.cutoff = cutoff
        self.default_charge_spin = default_charge_spin or (0, 1)
        self.observe = observe
        self._free_bytes = cache_bytes
        self._graphs: dict[int, Graph] = {}
        self._num_edges: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Number of structures."""
        return len(self.frames)

    @property
    def num_atoms(self) -> NDArray[np.int64]:
        """Atoms of each structure, (n,)."""
        return np.array([len(frame) for frame in self.frames], dtype=np.int64)

    @property
    def num_edges(self) -> NDArray[np.int64]:
        """Edges of each structure, (n,); the first use builds every graph."""
        if self._num_edges is None:
            indices = track(range(len(self)), "building neighbour lists", disable=len(self) <= 2000)
            self._num_edges = np.array([self.graph(i).num_edges for i in indices], dtype=np.int64)
        return self._num_edges

    def graph(self, index: int) -> Graph:
        """Graph of one structure.

        Raises:
            ValueError: If the structure has no neighbour list; the message names its origin.
        """
        if index in self._graphs:
            return self._graphs[index]
        frame = self.frames[index]
        charge_spin = frame.charge_spin or self.default_charge_spin
        try:
            graph = build_graph(
                frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, self.cutoff, charge_spin
            )
        except ValueError as error:
            raise ValueError(f"{_name(frame, index)}: {error}") from error
        if self.observe is not None:
            self.observe(index, graph)
        size = sum(t.nbytes for t in graph)
        if size <= self._free_bytes:
            self._graphs[index] = graph
            self._free_bytes -= size
        return graph

    def batch(self, indices: Sequence[int]) -> Batch:
        """Join structures and their labels."""
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
        )


class Budget(NamedTuple):
    """Most of something that a batch may hold."""

    what: str  # structures, atoms or edges
    sizes: NDArray[np.int64]  # of every structure
    most: int


def pack(order: Sequence[int], budgets: Sequence[Budget]) -> list[list[int]]:
    """Cut an order of structures into batches, each as long as every budget allows.

    A structure larger than a budget is a batch of its own: nothing is dropped.

    Args:
        order: Indices of structures.
        budgets: Limits of a batch.
    """
    batches: list[list[int]] = []
    filled = np.zeros(len(budgets), dtype=np.int64)
    most = np.array([budget.most for budget in budgets])
    for index, size in zip(order, np.stack([b.sizes for b in budgets], axis=1)[order], strict=True):
        filled += size
        if not batches or (filled > most).any():
            batches.append([])
            filled = size.copy()
        batches[-1].append(int(index))
    return batches


class EpochBatches:
    """The batches of every epoch, determined by seed and epoch alone, so that a run can be resumed.

    Batches mix system sizes: a batch is filled until its budget of atoms or edges is spent, so that one large
    structure cannot exhaust the memory.
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
    ):
        """Choose the size of a batch: ``batch_size``, or ``max_atoms`` and/or ``max_edges``.

        Warns once if a structure alone exceeds a budget.

        Args:
            dataset: The structures.
            batch_size: Structures per batch.
            max_atoms: Most atoms per batch.
            max_edges: Most edges per batch.
            seed: Seed of the shuffling.
            shuffle: A new order in every epoch; otherwise the order of the frames.

        Raises:
            ValueError: If no size, both kinds, or a size below one is given, or there is no structure.
        """
        given = {"batch_size": batch_size, "max_atoms": max_atoms, "max_edges": max_edges}
        limits = {name: value for name, value in given.items() if value is not None}
        if not limits or ("batch_size" in limits and len(limits) > 1):
            raise ValueError(f"give either batch_size, or max_atoms and/or max_edges; got {limits}")
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not len(dataset):
            raise ValueError("there is no structure to make batches of")
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
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
        if budget.sizes[largest] > budget.most:
            count = int((budget.sizes > budget.most).sum())
            warnings.warn(
                f"{count} structures exceed max_{budget.what} = {budget.most} and are batches of their own; "
                f"the largest is {_name(self.dataset.frames[largest], largest)} with "
                f"{budget.sizes[largest]} {budget.what}",
                stacklevel=3,
            )

    def indices(self, epoch: int) -> list[list[int]]:
        """Structures of every batch of an epoch."""
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        return pack(order.tolist(), self._budgets)

    def num_batches(self, epoch: int) -> int:
        """Number of batches of an epoch; under a budget it depends on the order."""
        return len(self.indices(epoch))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of an epoch, in page-locked memory where there is a GPU.

        They are prepared ahead by a thread, which ends when the iterator is exhausted, closed or deleted.
        """
        pin = torch.cuda.is_available()

        def make(indices: list[int]) -> Batch:
            batch = self.dataset.batch(indices)
            return batch.pin_memory() if pin else batch

        return _prefetched(make, self.indices(epoch)[start:])


def _prefetched(make: Callable[[list[int]], Batch], items: Sequence[list[int]]) -> Iterator[Batch]:
    """``make`` of every item, a few items early, in one thread; its exceptions are raised here."""
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
