"""Several processes that train one model together (docs/adr/0032).

Each has its part of every batch. The processes add up their losses and gradients, so that each makes the same update
of the weights as one process with the whole batch. Process 0 alone prints and writes files.
"""

import hashlib
import math
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dpa4.data import Batch, EpochBatches, FrameDataset
from dpa4.data.division import Share
from dpa4.system import caught_signals, choose_device
from dpa4.training.errors import FramePrediction
from dpa4.training.launcher import Place, launched

if TYPE_CHECKING:
    from dpa4.training.watch import Watch

JOIN = 120.0  # s in which all processes must have started
LONG = 7200.0  # s that a process waits for long work of another; `watch` ends the run much earlier if that one hangs
SEARCH = 60.0  # s in which the watch ends a process that has lost another one, or fails with all others
STEPS = 10  # a process is not stuck before this many times the longest step
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NUMBERS = (
    "energy",
    "forces",
    "virial",
    "bounded",
    "with_edges",
    "refused",
    *_SIGNALS,
)  # of `Processes.agree`


class Processes:
    """The processes of a run, as seen by one of them; a single one if there is no other.

    Every process must call the methods that exchange something, in the same order.

    Args:
        place: Place of this process among those of the run; None: it is the only one.

    Attributes:
        rank, size: Number of this process, from 0, and number of all processes.
        first: True for the process that prints and writes files.
        all_fail: True once all processes are about to raise the same error.
    """

    def __init__(self, place: Place | None = None):
        self.place = place
        self.rank, self.size = (0, 1) if place is None else (place.rank, place.size)
        self.first = self.rank == 0
        self._watch: Watch | None = None
        self._store: Any = None
        self._known = len(caught_signals)  # signals of earlier work
        self._stopped = False
        self.all_fail = False
        self._edges_differ = False
        self._waits = 0
        self._left = math.inf  # time at which the last exchange of a step ended
        self._longest = 0.0

    # --- start and end

    def join(self, device: torch.device) -> None:
        """Find the other processes, and connect to them.

        Raises:
            TimeoutError: If they have not all started in time.
            ValueError: If two processes have the same GPU.
        """
        if self.place is None:
            return
        from dpa4.training import watch

        place, host = self.place, socket.gethostname()
        serve = self.first and not place.has_store
        self._store = watch.connect(place, serve, JOIN)
        self._watch = watch.Watch(place, watch.connect(place, False, JOIN), host)
        self._watch.doing = "start"
        with self.failures():
            own = f"{host} {device}"
            if device.type == "cuda":
                torch.cuda.set_device(device)
                own = f"{host} {getattr(torch.cuda.get_device_properties(device), 'uuid', device)}"
            self._store.set(f"device/{self.rank}", own)
            self._wait_for([f"device/{r}" for r in range(self.size)])
            found = [self._store.get(f"device/{r}").decode() for r in range(self.size)]
            if device.type == "cuda" and (same := found.index(own)) != self.rank:
                raise ValueError(
                    f"processes {same} and {self.rank} would share the GPU {device} of {host}; start one process "
                    "per GPU"
                )
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=torch.distributed.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=LONG),
            )
        self._watch.doing = ""

    def leave(self) -> None:
        """Wait until all processes have come to the end, and disconnect."""
        if self._watch is None:
            return
        with suppress(RuntimeError):
            self.wait("the end of the run")
        self._watch.stop()
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            if self.first:  # the store may end with this process
                self._store.wait([f"left/{r}" for r in range(self.size)], timedelta(seconds=10))
        torch.distributed.destroy_process_group()

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Tell the other processes of an error within the block, so that they end; process 0 raises it as it is.

        Raises:
            SystemExit: In the other processes. What they would print, process 0 does.
        """
        try:
            yield
        except BaseException as error:
            if self._watch is None:
                raise
            if self.all_fail and not self.first:
                time.sleep(
                    SEARCH
                )  # process 0 saves the state, raises the same error, and so ends this process
            self._watch.announce(str(error).strip().partition("\n")[0] or type(error).__name__)
            self._watch.stop()
            if self.place is not None and self.place.has_store:  # torchrun looks for the reason in a file
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)
            if self.first:
                raise
            raise SystemExit(1) from None

    def device(self, name: str) -> torch.device:
        """Device of this process by the option ``device``: the GPU with its number on the node.

        Raises:
            ValueError: If the option names one GPU for several processes.
        """
        device = choose_device(name)
        if self.place is None or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(
                f"device = {name} is one GPU for {self.size} processes; use device: cuda or auto, and each takes "
                "its own"
            )
        count = torch.cuda.device_count()
        if 1 < count <= self.place.local_rank:
            raise ValueError(
                f"process {self.rank} is number {self.place.local_rank} of its node, which has {count} GPUs; start "
                "one process per GPU"
            )
        # Slurm may show each process its own GPU only.
        return torch.device("cuda", self.place.local_rank if count > 1 else 0)

    def refuse_with(self, used: bool, what: str) -> None:
        """Refuse what several processes cannot do yet.

        Raises:
            ValueError: If it is used and there are several processes.
        """
        if used and self.place is not None:
            raise ValueError(f"{what} needs a single process; start it without torchrun or srun")

    def describe(self, batch_size: int | None, console: Console) -> None:
        """Print how the work is divided."""
        if self.place is None:
            return
        console.print(
            f"{self.size} processes, each with its part of every batch, balanced by edges", highlight=False
        )
        if batch_size is not None and batch_size < self.size:
            console.print(
                f"batches of {batch_size} structures leave {self.size - batch_size} of {self.size} processes without "
                "work; set training.batch_size higher",
                style="yellow",
                soft_wrap=True,
            )

    # --- waiting

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Mark long work of this process, for which the others wait longer than usual."""
        if self._watch is None:
            yield
            return
        before, self._watch.doing = self._watch.doing, what
        try:
            yield
        finally:
            self._watch.doing = before
            self._left = math.inf  # not part of a step

    def wait(self, what: str) -> None:
        """Wait until all processes have come here."""
        if self.place is None:
            return
        self._waits += 1
        self._store.set(f"wait/{self._waits}/{self.rank}", "")
        with self.busy(f"waiting for {what}"):
            self._wait_for([f"wait/{self._waits}/{r}" for r in range(self.size)])

    @contextmanager
    def first_of_each_node(self, what: str) -> Iterator[None]:
        """Let the first process of each node go through the block before the others, which find its cached code."""
        if self.place is None:
            yield
            return
        if self.place.local_rank:
            self.wait(what)
        with self.busy(what):
            yield
        if not self.place.local_rank:
            self.wait(what)

    def check_same(self, what: str, text: str) -> None:
        """Check that a text is the same in all processes.

        Raises:
            ValueError: If it is not that of process 0.
        """
        if self.place is None:
            return
        own = hashlib.sha256(text.encode()).hexdigest()
        if self.first:
            self._store.set(f"same/{what}", own)
        self._wait_for([f"same/{what}"])
        if self._store.get(f"same/{what}").decode() != own:
            raise ValueError(
                f"{what} are not those of process 0; start all processes with the same command and files"
            )

    def _wait_for(self, keys: list[str]) -> None:
        try:
            self._store.wait(keys, timedelta(seconds=JOIN if self._watch_starts() else LONG))
        except RuntimeError as error:
            missing = [key for key in keys if not self._store.check([key])]
            raise TimeoutError(
                f"{len(missing)} of {self.size} processes have not come in time; look at what they printed"
            ) from error

    def _watch_starts(self) -> bool:
        return self._watch is not None and self._watch.doing == "start"

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Mark an exchange; an error of the connection is replaced by the reason that the watch finds for it."""
        assert self._watch is not None
        now = time.monotonic()
        self._longest = max(self._longest, now - self._left)
        self._watch.patience = max(self._watch.patience, STEPS * self._longest)
        self._watch.progress += 1
        try:
            yield
        except RuntimeError:
            self._watch.suspects = True
            time.sleep(SEARCH)  # in which the watch ends this process
            raise
        self._left = time.monotonic()

    def _add_up(self, *tensors: Tensor) -> None:
        with self._exchange():
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    # --- data

    def share(self, whole: bool = False) -> Share | None:
        """Share of this process in the batches of training or, with ``whole``, of validation."""
        return None if self.place is None else Share(self.rank, self.size, whole)

    def count_edges(self, dataset: FrameDataset) -> None:
        """Count the edges of all structures, of which each process builds the graphs of a part."""
        if self.place is None:
            return
        found = torch.zeros(len(dataset), dtype=torch.int64)
        if not len(found):
            return
        for index in range(self.rank, len(dataset), self.size):
            found[index] = dataset.graph(index).num_edges
        with self.busy("counting edges"):
            self._add_up(found)
        dataset.keep_num_edges(found.numpy())

    # --- steps

    def agree(self, batch: Batch) -> Batch:
        """Exchange the numbers of labels and the signals of all processes before a step.

        Args:
            batch: Part of this process.

        Returns:
            The part, with the numbers of labels of the whole batch.

        Raises:
            ValueError: If another process has a structure that cannot be used.
        """
        if self.place is None:
            return batch
        with_edges = int(batch.graph.num_edges > 0)
        numbers = self._sum_of_numbers([*batch.counts.tolist(), with_edges, 0])
        self._edges_differ = 0 < numbers["with_edges"] < self.size
        counts = torch.tensor([numbers[name] for name in _NUMBERS[:4]])
        return batch._replace(counts=counts.pin_memory() if torch.cuda.is_available() else counts)

    def refuse(self, error: ValueError) -> None:
        """Take part in `agree` without a batch, so that all processes refuse a structure; nothing if they know."""
        if self.place is None or isinstance(error, _Refused):
            return
        self._store.set(f"refused/{self.rank}", str(error))
        with suppress(_Refused):
            self._sum_of_numbers([0, 0, 0, 0, 0, 1])

    def _sum_of_numbers(self, own: list[int]) -> dict[Any, int]:
        received = caught_signals[self._known :]
        signals = [received.count(number) for number in _SIGNALS]
        sums = torch.tensor([*own, *signals])
        self._add_up(sums)
        numbers = dict(zip(_NUMBERS, sums.tolist(), strict=True))
        for number in _SIGNALS:
            if numbers[number]:
                self._stopped = True
                if number not in received:
                    caught_signals.append(number)
        if numbers["refused"]:
            self.all_fail = True
            texts = [
                self._store.get(f"refused/{r}").decode()
                for r in range(self.size)
                if self._store.check([f"refused/{r}"])
            ]
            raise _Refused("; ".join(texts))
        return numbers

    def stopped(self, received: Sequence[int]) -> bool:
        """Return whether all processes shall stop after this step.

        Args:
            received: Signals that this process has received.
        """
        return bool(received) if self.place is None else self._stopped

    def complete(self, parameters: Sequence[Tensor]) -> None:
        """Set missing gradients of parameters to zero if another process has them.

        They are missing where no structure of the part has an edge.
        """
        if not self._edges_differ:
            return
        found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
        self._add_up(found)
        for p, number in zip(parameters, found.tolist(), strict=True):
            if number and p.grad is None:
                p.grad = torch.zeros_like(p)

    def add_up(self, buffers: Sequence[Tensor]) -> None:
        """Replace flat buffers by their sums over all processes; on a GPU without waiting for it."""
        if self.place is not None:
            self._add_up(*buffers)

    # --- evaluation

    def gathered(self, own: list[FramePrediction], batches: EpochBatches) -> list[FramePrediction]:
        """Predictions of all processes, one for each structure in the order of the batches.

        Args:
            own: Predictions of this process for its batches of epoch 0.
            batches: Batches that are divided as a whole among the processes.
        """
        if self.place is None:
            return own
        every = batches.indices(0)
        atoms = batches.dataset.num_atoms
        order = [index for batch in every for index in batch]
        places = dict(zip(order, range(len(order)), strict=True))
        starts = np.concatenate([[0], np.cumsum(10 + 3 * atoms[order])])
        flat = np.zeros(int(starts[-1]))
        mine = [index for number in batches.owners(0)[self.rank] for index in every[number]]
        for index, found in zip(mine, own, strict=True):
            values = [np.array([found.energy]), np.ravel(found.virial), np.ravel(found.forces)]
            flat[starts[places[index]] : starts[places[index] + 1]] = np.concatenate(values)
        self._add_up(torch.from_numpy(flat))  # each number is one process's own and zero elsewhere
        parts = np.split(flat, starts[1:-1])
        return [FramePrediction(float(p[0]), p[10:].reshape(-1, 3), p[1:10].reshape(3, 3)) for p in parts]


ALONE = Processes()


class _Refused(ValueError):
    """Error of another process about a structure."""


def launched_processes() -> Processes:
    """The processes that a launcher has started, or this one alone; see `Processes.join`."""
    place = launched()
    return ALONE if place is None else Processes(place)
