"""Preparation of batches ahead of their use, in a thread or in processes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dpa4.data.batch import Batch
from dpa4.graph import Graph
from dpa4.system import processors

PREFETCH = 3  # batches prepared ahead by a thread, or by each process
MOST_WORKERS = 12  # processes by default: 8 suffice for 5,000 structures/s of 20 atoms (docs/adr/0031)

_ALIGNED = 64  # bytes between the starts of tensors in a buffer, enough for every data type

T = TypeVar("T")


def default_workers(device: torch.device) -> int:
    """Number of processes that prepare batches from a disk; 0 on a CPU, whose cores compute the network."""
    return max(1, min(MOST_WORKERS, processors() - 1)) if device.type == "cuda" else 0


class Loader:
    """Prepares batches ahead, in the order of their use.

    Args:
        make: Function that makes a batch of an item; with processes, it is sent to each of them once.
        workers: Number of processes; 0: a thread.
    """

    context: str | None = None  # how processes are started; None: as usual on the system

    def __init__(self, make: Callable[[Any], Batch], workers: int = 0):
        self.make, self.workers = make, workers

    def load(self, items: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batch of every item, in page-locked memory if there is a GPU; exceptions are raised here."""
        pin = torch.cuda.is_available()
        if self.workers:
            return _by_processes(self.make, items, self.workers, pin, self.context)
        return _by_thread(lambda item: self.make(item).pin_memory() if pin else self.make(item), items)


def _by_thread(make: Callable[[T], Batch], items: Iterable[T]) -> Iterator[Batch]:
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


class _Packed:
    """Batch in one buffer: a process hands over one open file instead of one for each tensor."""

    def __init__(self, batch: Batch):
        tensors = [t.contiguous() for t in (*batch.graph, *batch[1:])]
        sizes = [-(-t.nbytes // _ALIGNED) * _ALIGNED for t in tensors]
        self.buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        self.layout: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        start = 0
        for tensor, size in zip(tensors, sizes, strict=True):
            self.layout.append((start, tensor.nbytes, tensor.dtype, tuple(tensor.shape)))
            if tensor.nbytes:
                self.buffer[start : start + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
            start += size

    def pin_memory(self) -> "_Packed":
        """Move to page-locked memory; called by the thread of PyTorch's loader."""
        self.buffer = self.buffer.pin_memory()
        return self

    def batch(self) -> Batch:
        """The batch, whose tensors are views of the buffer."""
        tensors = [
            self.buffer[a : a + n].view(kind).view(shape)
            if n
            else torch.zeros(shape, dtype=kind, pin_memory=self.buffer.is_pinned())
            for a, n, kind, shape in self.layout
        ]
        count = len(Graph._fields)
        return Batch(Graph(*tensors[:count]), *tensors[count:])


class _Failure(NamedTuple):
    """Exception of a process, as it was raised: PyTorch would put a traceback into its message."""

    error: Exception


class _Made(Dataset[Any]):
    """What the processes compute: the batch of an item."""

    def __init__(self, make: Callable[[Any], Batch]):
        self.make = make

    def __getitem__(self, item: Any) -> "_Packed | _Failure":
        try:
            return _Packed(self.make(item))
        except Exception as error:
            return _Failure(error)


def _by_processes(
    make: Callable[[Any], Batch], items: Iterable[Any], workers: int, pin: bool, context: str | None
) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        _Made(make),
        batch_size=None,  # an item is a whole batch
        sampler=items,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context=context,
        collate_fn=_unchanged,
        pin_memory=pin,
        generator=torch.Generator(),  # the seeds of the processes must not be drawn from the numbers of the run
    )
    for found in loader:
        if isinstance(found, _Failure):
            raise found.error
        yield found.batch()


def _unchanged(batch: Any) -> Any:
    return batch
