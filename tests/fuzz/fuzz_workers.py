"""Reads mutated files in worker processes with limits on time and memory, and collects the faults."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

SECONDS = 15.0
"""Limit per file. A file takes some 20 ms; the machine may be busy."""

MEMORY = 2 * 2**30
"""Address space of a worker beyond that of the imported modules, in bytes."""

WORKERS = 2
TRANSLATED = (ValueError, OSError, ImportError, FloatingPointError)
"""Errors that the commands print as one line."""

OUT_OF_MEMORY = ("MemoryError", "allocate", "bad_alloc", "out of memory")


@dataclass(frozen=True)
class Target:
    """A file format under test."""

    make: Callable[[random.Random, Path], Path]  # writes a mutated file into a folder and returns its path
    read: Callable[[Path], object]  # reads it as the commands do
    accept: Callable[[object, Path], str | None]  # fault of a file that was read without an error


def faults(target: Target, cases: int, seed: int, folder: Path) -> tuple[list[str], dict[str, int]]:
    """Read ``cases`` mutated files.

    Returns:
        Description of every fault, and the number of cases by outcome.
    """
    torch.set_num_threads(1)  # a forked process must not inherit the threads of OpenMP
    todo = [list(range(worker, cases, WORKERS)) for worker in range(WORKERS)]
    running = {}
    found: list[str] = []
    outcomes: dict[str, int] = {}
    for numbers in todo:
        _start(running, target, seed, folder, numbers)
    while running:
        ready = wait([worker.connection for worker in running.values()], timeout=1.0)
        for worker in list(running.values()):
            if worker.connection in ready:
                worker.receive()
            finished = worker.over()
            if finished is None:
                continue
            del running[worker.process.pid]
            found += worker.found
            for outcome, count in worker.outcomes.items():
                outcomes[outcome] = outcomes.get(outcome, 0) + count
            if worker.numbers:  # killed in the middle of a case
                case = worker.numbers.pop(0)
                found.append(f"case {case}: {finished}")
                outcomes["fault"] = outcomes.get("fault", 0) + 1
                _start(running, target, seed, folder, worker.numbers)
    return found, outcomes


class _Worker:
    def __init__(self, process: multiprocessing.Process, connection: Connection, numbers: list[int]):
        self.process, self.connection, self.numbers = process, connection, numbers
        self.found: list[str] = []
        self.outcomes: dict[str, int] = {}
        self.last = time.monotonic()

    def receive(self) -> None:
        """Take the results of finished cases."""
        while self.connection.poll():
            try:
                case, outcome, text = json.loads(self.connection.recv_bytes())
            except EOFError:
                self.process.join()
                return
            self.last = time.monotonic()
            self.numbers.remove(case)
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
            if outcome == "fault":
                self.found.append(f"case {case}: {text}")

    def over(self) -> str | None:
        """Reason why the worker has ended, or is ended because its case takes too long; None while it works."""
        if not self.process.is_alive():
            self.receive()
            code = self.process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
            return f"the process crashed with {how}"
        if time.monotonic() - self.last > SECONDS:
            self.process.kill()
            self.process.join()
            return f"no end after {SECONDS:g} s"
        return None


def _start(running: dict, target: Target, seed: int, folder: Path, numbers: list[int]) -> None:
    if not numbers:
        return
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(target, seed, folder, list(numbers), theirs), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking a process with threads, which are idle
        process.start()
    theirs.close()
    running[process.pid] = _Worker(process, ours, numbers)


def _work(target: Target, seed: int, folder: Path, numbers: list[int], connection: Connection) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for case in numbers:
        own = folder / f"case{case}"
        own.mkdir()
        outcome, text = judge(target, random.Random(f"{seed}-{case}"), own)
        connection.send_bytes(json.dumps([case, outcome, text]).encode())
        if outcome != "fault":
            for path in sorted(own.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            own.rmdir()


def judge(target: Target, rng: random.Random, folder: Path) -> tuple[str, str]:
    """Make and read one mutated file; return "refused", "accepted" or "fault", and the text of the fault."""
    try:
        path = target.make(rng, folder)
    except Exception as error:
        return "fault", f"the mutation failed: {type(error).__name__}: {error!s:.300}"
    try:
        result = target.read(path)
    except TRANSLATED as error:
        fault = fault_of_message(str(error), path)
        return ("fault", f"{type(error).__name__}: {fault}") if fault else ("refused", "")
    except BaseException as error:
        kind = "out of memory" if isinstance(error, MemoryError) else "traceback"
        return "fault", f"{kind}: {type(error).__name__}: {error!s:.300}"
    try:
        fault = target.accept(result, path)
    except Exception as error:
        fault = f"read without an error, then {type(error).__name__}: {error!s:.300}"
    return ("fault", fault) if fault else ("accepted", "")


def fault_of_message(message: str, path: Path) -> str | None:
    """Reason why an error message is not good: no name, several lines (but for lists of options), no memory."""
    if any(word in message for word in OUT_OF_MEMORY):
        return f"out of memory: {message:.300}"
    if path.name not in message:
        return f"the file is not named: {message:.300}"
    if "\n" in message and not message.startswith(f"{path} is not valid:\n"):
        return f"several lines: {message[:300]!r}"
    if max(map(len, message.splitlines())) > 1000:
        return f"a message of {len(message)} characters: {message:.300}"
    return None
