"""Compilation in several processes.

The compiler works on one stage at a time, mostly in one thread. Training takes 23 of them, so while this process
traces the network, others compile what it has traced, and leave it in files where it is found when it is needed. The
network is traced without computing anything: results of stages are replaced by tensors of the right shape without
values, and weights do not matter.
"""

import itertools
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers

from dpa4.graph import Graph, build_graph, first_atoms
from dpa4.kernels.stage import Stage
from dpa4.potential.compiled import COMPARED, in_eager_mode, probe, regions
from dpa4.potential.potential import Potential

MOST_PROCESSES = 8
"""With more the longest graph decides. On a GPU each takes half a GiB for its context."""

_CONTEXT = 2**30  # bytes of the GPU that a process may take
_log = logging.getLogger(__name__)


class Mode(NamedTuple):
    """How a potential is going to be called."""

    training: bool
    autocast: torch.dtype | None = None  # of the blocks


def precompile(
    potential: Potential, modes: Sequence[Mode], graph: Graph | None = None, processes: int | None = None
) -> None:
    """Trace a compiled potential and have the stages compiled that no file has yet.

    Where other processes are not worth it, or fail, code is made as ever: when it is needed.

    Args:
        potential: After `compile_potential`.
        modes: How it is going to be called.
        graph: Of which a part is computed in eager mode in the meantime, since on a GPU that makes the kernels of the
            operators.
        processes: As many as there are processors for, up to 8, by default; below 4 processors none.
    """
    if processes is None:
        processes = _affordable(potential.reference_energies.device)
    if processes < 2:
        return
    with closing(_Workshop(processes)) as workshop:
        for mode in modes:
            _outline(potential, mode, workshop)
        if workshop.workers and graph is not None and graph.positions.is_cuda:
            for mode in modes:
                with _called_as(mode, potential), in_eager_mode(potential), suppress(torch.OutOfMemoryError):
                    probe(potential, first_atoms(graph, COMPARED))
        if error := workshop.finish():
            _log.warning("compilation in other processes failed, so it goes on in this one: %s", error)


def _affordable(device: torch.device) -> int:
    processors = _processors()
    if processors < 4:
        return 0
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize
    return min(MOST_PROCESSES, processors, memory // _CONTEXT)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_Tasks = queue.PriorityQueue[tuple[int, int, Stage | None]]
"""By priority; numbers keep those of a kind in order. None ends a process."""


class _Workshop:
    """Processes that compile stages.

    Args:
        processes: How many.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self.tasks: _Tasks = queue.PriorityQueue()
        self.numbers = itertools.count()
        self.workers: list[_Worker] = []
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the processes unless they run."""
        if not self.workers:
            self.workers += [_Worker(_processors() // self.processes) for _ in range(self.processes)]
            self.threads += [
                threading.Thread(target=w.work, args=(self.tasks,), daemon=True) for w in self.workers
            ]
            for thread in self.threads:
                thread.start()

    def add(self, stages: Sequence[Stage]) -> None:
        """Have stages compiled, but those whose code is there."""
        for stage in stages:
            if stage.file is not None and not stage.empty and not stage.is_made():
                self.start()
                length = stage.recipe.source.count("\n")
                self.tasks.put((-length, next(self.numbers), stage))  # the longest first

    def finish(self) -> str:
        """Wait for the processes; the last words of one that failed."""
        for _ in self.workers:
            self.tasks.put((1, next(self.numbers), None))
        for thread in self.threads:
            thread.join()
        return next((w.error for w in self.workers if w.error), "")

    def close(self) -> None:
        """End the processes, whatever they do."""
        for worker in self.workers:
            worker.process.kill()
        self.finish()
        for worker in self.workers:
            worker.log.close()


class _Worker:
    """A process that compiles one stage after the other."""

    def __init__(self, compile_threads: int):
        self.error = ""
        self.log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.settings = {
            "path": [p or os.getcwd() for p in sys.path],
            "compile_threads": max(1, compile_threads),
            "threads": torch.get_num_threads(),  # part of the code that is made for a processor
        }

    def work(self, tasks: _Tasks) -> None:
        """Compile tasks until one is None or the process fails."""
        assert self.process.stdin and self.process.stdout
        try:
            self._tell(self.settings)
            while (stage := tasks.get()[-1]) is not None:
                self._tell([stage.recipe, str(stage.file)])
                if not self.process.stdout.readline():
                    break
            self.process.stdin.close()
        except OSError:  # it says in its log why it did not read
            pass
        if self.process.wait() != 0:
            self.log.seek(0)
            self.error = self.log.read()[-2000:].strip() or f"exit status {self.process.returncode}"

    def _tell(self, what: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()


def _command() -> list[str]:
    """Runs what `_Worker` asks for on its standard input, with modules from where this process has them."""
    program = (
        "import json, sys; start = json.loads(sys.stdin.readline()); sys.path[:] = start['path']; "
        "from dpa4.kernels.worker import run; run(start)"
    )
    return [sys.executable, "-c", program]


def _outline(potential: Potential, mode: Mode, workshop: _Workshop) -> None:
    """Trace everything that calls in a mode need, without computing anything.

    Args:
        potential: After `compile_potential`.
        mode: The mode.
        workshop: Gets the stages of each region as soon as they are known.
    """
    codes = {region.code for region in regions(potential)}
    before = {code: (code.make, code.report, code.tracing, code.added) for code in codes}
    known = {id(stage): stage.function for code in codes for stage in code.stages()}
    for code in codes:
        code.make, code.report = Stage.outline, lambda name, seconds: None
        code.tracing, code.added = workshop.start, workshop.add
    try:
        with _called_as(mode, potential):
            potential(_triatomic(potential))
    finally:
        for code in codes:
            code.make, code.report, code.tracing, code.added = before[code]
            for stage in code.stages():  # none may go on without values
                stage.function = known.get(id(stage))


@contextmanager
def _called_as(mode: Mode, potential: Potential) -> Iterator[None]:
    """Within the block a potential is in a mode."""
    before = potential.training, potential.model.block_autocast
    try:
        potential.train(mode.training)
        potential.model.block_autocast = mode.autocast
        yield
    finally:
        potential.train(before[0])
        potential.model.block_autocast = before[1]


def _triatomic(potential: Potential) -> Graph:
    """The smallest graph that compiled code is used for."""
    number, length = atomic_numbers[potential.elements[0]], 0.5 * potential.config.cutoff
    positions = length * np.eye(3)
    graph = build_graph([number] * 3, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), 2 * length)
    return graph.to(potential.reference_energies.device)
