"""Helpers for the tests of training in several processes: the processes, as a launcher would start them."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from dpa4.system import caught_signals
from dpa4.training import run as run_module
from dpa4.training.options import RunConfig
from dpa4.training.run import train

PATIENCE = 6.0  # s between the failure of a process and the end of the others, as launchers do it


class Ended(NamedTuple):
    """Processes that have ended: exit status and printed text of each."""

    statuses: list[int]
    texts: list[str]


def free_port() -> int:
    """A port that no program uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(work: Callable[[int], None], folder: Path, size: int = 2, seconds: float = 60) -> Ended:
    """Run a function, given the rank, in several processes as if started by a launcher.

    They are forked: a new process would need seconds to import PyTorch. Those that still run after ``seconds``, or
    some time after one has failed, are killed and have the status -9.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()

    def start(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with open(folder / f"out-{rank}", "w", buffering=1) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout = sys.stderr = out
            try:
                work(rank)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
                out.flush()
                os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 3)
            out.flush()
            os._exit(128 + caught_signals[0] if caught_signals else 0)

    processes = [context.Process(target=start, args=(rank,)) for rank in range(size)]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # forking with threads, none of which holds a lock here
        for process in processes:
            process.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(p.is_alive() for p in processes):
        time.sleep(0.05)
        if any(p.exitcode for p in processes):
            end = min(end, time.monotonic() + PATIENCE)
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    texts = [(folder / f"out-{rank}").read_text() for rank in range(size)]
    return Ended([p.exitcode for p in processes], texts)


def train_together(
    values: dict, folder: Path, size: int = 2, prepare=lambda rank: None, seconds=60, **kwargs
) -> Ended:
    """Train with these options in several processes; ``prepare(rank)`` comes before."""

    def work(rank: int) -> None:
        prepare(rank)
        train(RunConfig.model_validate(values), console=Console(width=200), **kwargs)

    return together(work, folder, size, seconds)


def in_double_precision(monkeypatch) -> None:
    """Let `train` build float64 potentials, in this process and those forked from it."""
    original = run_module.prepare

    def prepare(*args):
        preparation = original(*args)
        return preparation._replace(potential=preparation.potential.to(torch.float64))

    monkeypatch.setattr(run_module, "prepare", prepare)
