"""Compilation in several processes, which share the compiler's cache on disk.

The compiler works on one graph at a time, mostly in one thread. Training takes 30 graphs, so other processes, each
with a share of them, fill the cache while this one traces the network. None of them computes anything: results of
graphs are replaced by tensors of the right shape without values, and weights do not matter.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers

from dpa4.graph import Graph, build_graph
from dpa4.kernels.region import Stage
from dpa4.model import ModelConfig
from dpa4.potential.compiled import compile_potential, regions
from dpa4.potential.potential import Potential

MOST_PROCESSES = 8
"""With more the longest graph decides. On a GPU each takes half a GiB for its context."""

_CONTEXT = 2**30  # bytes of the GPU that a process may take
_log = logging.getLogger(__name__)


class Mode(NamedTuple):
    """How a potential is going to be called."""

    training: bool
    autocast: torch.dtype | None = None  # of the blocks


def precompile(potential: Potential, modes: Sequence[Mode], processes: int | None = None) -> None:
    """Trace a compiled potential and have its code made by other processes, unless that was done before.

    Where it is not worth it, or fails, code is made as ever: when it is needed.

    Args:
        potential: After `compile_potential`.
        modes: How it is going to be called.
        processes: As many as there are processors for, up to 8, by default; below 4 processors none.
    """
    if processes is None:
        processes = _affordable(potential.reference_energies.device)
    if processes < 2:
        return
    task = _task(potential, modes)
    mark = _mark(task)
    if mark.exists():
        return
    about = {
        "path": [p or os.getcwd() for p in sys.path],
        "compile_threads": max(1, _processors() // processes),
    }
    with _started([task | about | {"share": [i, processes]} for i in range(processes)]) as started:
        for mode in modes:
            _outline(potential, mode)
        errors = [text for process, log in started if (text := _outcome(process, log))]
    if errors:
        _log.warning("compilation in other processes failed, so it goes on in this one: %s", errors[0])
    else:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _affordable(device: torch.device) -> int:
    processors = _processors()
    if processors < 4:
        return 0
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize
    return min(MOST_PROCESSES, processors, memory // _CONTEXT)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _task(potential: Potential, modes: Sequence[Mode]) -> dict[str, Any]:
    return {
        "config": potential.config.model_dump_json(),
        "dtype": _name(potential.dtype),
        "device": str(potential.reference_energies.device),
        "modes": [[m.training, m.autocast and _name(m.autocast)] for m in modes],
        "threads": torch.get_num_threads(),  # part of the code that is made for a processor
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mark(task: dict[str, Any]) -> Path:
    """File in the compiler's cache that says that a task was done by these versions on such a device."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    device = torch.device(task["device"])
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    digest = hashlib.sha256(json.dumps([task, torch.__version__, gpu], sort_keys=True).encode())
    for source in sorted(Path(__file__).parents[1].glob("[kmp]*/*.py")):  # kernels, model, potential
        digest.update(source.read_bytes())
    return Path(cache_dir()) / "dpa4" / digest.hexdigest()


def _command() -> list[str]:
    """Runs the task on its standard input, with modules from where this process has them."""
    program = (
        "import json, sys; task = json.load(sys.stdin); sys.path[:] = task['path']; "
        "from dpa4.potential.precompile import run; run(task)"
    )
    return [sys.executable, "-c", program]


@contextmanager
def _started(tasks: Sequence[dict[str, Any]]) -> Iterator[list[tuple[subprocess.Popen[str], IO[str]]]]:
    """Processes at work on the tasks, and files with what they say; at the end none is left."""
    started: list[tuple[subprocess.Popen[str], IO[str]]] = []
    try:
        for task in tasks:
            log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            process = subprocess.Popen(
                _command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
            )
            started.append((process, log))
            assert process.stdin
            with suppress(BrokenPipeError), process.stdin:  # it says in its log why it did not read
                process.stdin.write(json.dumps(task))
        yield started
    finally:
        for process, log in started:
            process.kill()
            process.wait()
            log.close()


def _outcome(process: subprocess.Popen[str], log: IO[str]) -> str:
    """Wait for a process; its last words if it failed."""
    if process.wait() == 0:
        return ""
    log.seek(0)
    return log.read()[-2000:].strip() or f"exit status {process.returncode}"


def _outline(potential: Potential, mode: Mode) -> list[Stage]:
    """Trace everything that calls in a mode need, without computing anything; the new stages."""
    # In the order of the network, in every process: stages of one length are shared by their order.
    model, codes = potential.model, dict.fromkeys(region.code for region in regions(potential))
    before = potential.training, model.block_autocast
    reports = {code: code.report for code in codes}
    known = {id(stage): stage.function for code in codes for stage in code.stages()}
    for code in codes:
        code.make, code.report = Stage.outline, lambda name, seconds: None
    try:
        potential.train(mode.training)
        model.block_autocast = mode.autocast
        potential(_triatomic(potential))
    finally:
        potential.train(before[0])
        model.block_autocast = before[1]
        for code in codes:
            code.make, code.report = Stage.compile, reports[code]
            for stage in code.stages():  # none may go on without values
                stage.function = known.get(id(stage))
    return [s for code in codes for s in code.stages() if id(s) not in known and not s.empty]


def _triatomic(potential: Potential) -> Graph:
    """The smallest graph that compiled code is used for."""
    number, length = atomic_numbers[potential.elements[0]], 0.5 * potential.config.cutoff
    positions = length * np.eye(3)
    graph = build_graph([number] * 3, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), 2 * length)
    return graph.to(potential.reference_energies.device)


def compile_share(task: dict[str, Any]) -> None:
    """Compile a share of the stages of a network; together the shares are all of them."""
    dtype = getattr(torch, task["dtype"])
    potential = Potential(ModelConfig.model_validate_json(task["config"])).to(task["device"], dtype)
    compile_potential(potential)
    stages: list[Stage] = []
    for training, autocast in task["modes"]:
        stages += _outline(potential, Mode(training, autocast and getattr(torch, autocast)))
    for i in _share([len(stage.graph.graph.nodes) for stage in stages], *task["share"]):
        stages[i].compile()


def _share(lengths: Sequence[int], process: int, processes: int) -> list[int]:
    """Pieces of work for one of several processes, largest first; each goes to the one with the least work so far."""
    load, own = [0] * processes, []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = load.index(min(load))  # the same in every process
        load[least] += lengths[i]
        if least == process:
            own.append(i)
    return own


def run(task: dict[str, Any]) -> None:
    """What one of the processes does."""
    import torch._inductor.config as inductor

    torch.set_num_threads(task["threads"])
    inductor.compile_threads = task["compile_threads"]
    compile_share(task)
