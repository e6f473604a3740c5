"""Worker processes that compile stages, both ends of the pipe: `WorkerPool` here, `serve` in each worker.

A worker reads one recipe per line, compiles it into a file and answers with a line. Importing `dpa4.ops` registers
the operators that recipes name.
"""

import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

import dpa4.ops  # noqa: F401
from dpa4.tracing.stage import Recipe, Stage, make_file

_Tasks = queue.PriorityQueue[tuple[int, int, Stage | None]]
"""By priority; numbers keep those of a kind in order. None ends a process."""


class WorkerPool:
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
            self.workers += [_Worker(processors() // self.processes) for _ in range(self.processes)]
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
    """Command of a worker: it imports modules from where this process has them, and serves its standard input."""
    program = (
        "import json, sys; start = json.loads(sys.stdin.readline()); sys.path[:] = start['path']; "
        "from dpa4.tracing.workers import serve; serve(start)"
    )
    return [sys.executable, "-c", program]


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(start: dict[str, Any]) -> None:
    """Compile the stages that are read from standard input, one per line, and answer each with a line.

    Args:
        start: Numbers of threads: ``threads`` of the code, and ``compile_threads`` of the compiler.
    """
    import torch._inductor.config as inductor

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(start["threads"])
    inductor.compile_threads = start["compile_threads"]
    for line in sys.stdin:
        recipe, file = json.loads(line)
        make_file(Recipe.read(recipe), Path(file))
        print("made", file=answers, flush=True)
