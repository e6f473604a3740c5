"""Worker processes that compile stages: `WorkerPool` in this process, `serve` in each worker.

The two ends talk by lines of JSON. A worker reads one recipe per line, compiles it into a file and answers with a
line. Importing `dpa4.ops` registers the operators that recipes call.
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
from dpa4 import code_cache
from dpa4.system import processors
from dpa4.tracing.stage import Recipe, Stage, compile_to_file

_Tasks = queue.PriorityQueue[tuple[int, int, Stage | None]]
"""Stages by priority, then by a running number for a stable order. None instead of a stage ends a worker."""


class WorkerPool:
    """Pool of worker processes that compile stages; they start with the first stage.

    Args:
        processes: Number of processes.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self.tasks: _Tasks = queue.PriorityQueue()
        self.numbers = itertools.count()
        self.workers: list[_Worker] = []
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the processes unless they are running."""
        if not self.workers:
            self.workers += [_Worker(processors() // self.processes) for _ in range(self.processes)]
            self.threads += [
                threading.Thread(target=w.work, args=(self.tasks,), daemon=True) for w in self.workers
            ]
            for thread in self.threads:
                thread.start()

    def add(self, stages: Sequence[Stage]) -> None:
        """Queue stages for compilation, except those that are cached."""
        for stage in stages:
            if stage.file is not None and not stage.empty and not stage.is_cached():
                self.start()
                length = stage.recipe.source.count("\n")
                self.tasks.put((-length, next(self.numbers), stage))  # longest stage first

    def finish(self) -> str:
        """Wait until all stages are compiled; return the end of the log of a failed worker, or an empty string."""
        for _ in self.workers:
            self.tasks.put((1, next(self.numbers), None))
        for thread in self.threads:
            thread.join()
        return next((w.error for w in self.workers if w.error), "")

    def close(self) -> None:
        """Kill the processes, even while they compile."""
        for worker in self.workers:
            worker.process.kill()
        self.finish()
        for worker in self.workers:
            worker.log.close()


class _Worker:
    """Process that compiles one stage after another, and the thread that feeds it."""

    def __init__(self, compile_threads: int):
        self.error = ""
        self.log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.settings = {
            "path": [p or os.getcwd() for p in sys.path],
            "compile_threads": max(1, compile_threads),
            "threads": torch.get_num_threads(),  # compiled into code for CPUs
        }

    def work(self, tasks: _Tasks) -> None:
        """Compile stages from the queue until None comes or the process fails; runs in a thread of its own."""
        assert self.process.stdin and self.process.stdout
        try:
            self._send(self.settings)
            while (stage := tasks.get()[-1]) is not None:
                self._send([stage.recipe, str(stage.file)])
                if not self.process.stdout.readline():
                    break
            self.process.stdin.close()
        except OSError:  # the process has ended; its log says why
            pass
        if self.process.wait() != 0:
            self.log.seek(0)
            self.error = self.log.read()[-2000:].strip() or f"exit status {self.process.returncode}"

    def _send(self, message: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()


def _command() -> list[str]:
    """Command of a worker. It first reads the import path of this process, then serves standard input."""
    program = (
        "import json, sys; start = json.loads(sys.stdin.readline()); sys.path[:] = start['path']; "
        "from dpa4.tracing.workers import serve; serve(start)"
    )
    return [sys.executable, "-c", program]


def serve(start: dict[str, Any]) -> None:
    """Compile stages read from standard input, one per line, and answer each with a line on standard output.

    Args:
        start: Settings: ``threads``, the number of threads of compiled code, and ``compile_threads``, the number of
            threads of the compiler.
    """
    import torch._inductor.config as inductor

    answers, sys.stdout = sys.stdout, sys.stderr  # other output must not look like an answer
    torch.set_num_threads(start["threads"])
    inductor.compile_threads = start["compile_threads"]
    for line in sys.stdin:
        recipe, file = json.loads(line)
        with code_cache.locked(Path(file)):
            if code_cache.read(Path(file)) is None:  # another process may have compiled it by now
                compile_to_file(Recipe.read(recipe), Path(file))
        print("compiled", file=answers, flush=True)
