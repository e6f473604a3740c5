"""Compilation in several processes.

The compiler works on one stage at a time, mostly in one thread. Training takes 23 of them, so while this process
traces the network, others compile what it has traced, and leave it in files where it is found when it is needed. The
network is traced without computing anything: results of stages are replaced by tensors of the right shape without
values, and weights do not matter.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from ase.data import atomic_numbers

from dpa4.execution.check import probe
from dpa4.execution.limits import MAX_COMPARED_ATOMS, MAX_WORKERS, MIN_PROCESSORS, WORKER_MEMORY
from dpa4.execution.regions import in_eager_mode, regions
from dpa4.graph import Graph, build_graph, first_atoms
from dpa4.potential.potential import Potential
from dpa4.potential.precision import Precision, at_precision
from dpa4.tracing.stage import Stage
from dpa4.tracing.workers import WorkerPool, processors

_log = logging.getLogger(__name__)


class Mode(NamedTuple):
    """How a potential is going to be called."""

    training: bool
    precision: Precision = "high"


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
        processes = _affordable(potential.device)
    if processes < 2:
        return
    with closing(WorkerPool(processes)) as pool:
        for mode in modes:
            _outline(potential, mode, pool)
        if pool.workers and graph is not None and graph.positions.is_cuda:
            for mode in modes:
                with _called_as(mode, potential), in_eager_mode(potential), suppress(torch.OutOfMemoryError):
                    probe(potential, first_atoms(graph, MAX_COMPARED_ATOMS))
        if error := pool.finish():
            _log.warning("compilation in other processes failed, so it goes on in this one: %s", error)


def _affordable(device: torch.device) -> int:
    """Number of workers that the processors and the memory of the device allow."""
    if processors() < MIN_PROCESSORS:
        return 0
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize
    return min(MAX_WORKERS, processors(), memory // WORKER_MEMORY)


def _outline(potential: Potential, mode: Mode, pool: WorkerPool) -> None:
    """Trace everything that calls in a mode need, without computing anything.

    Args:
        potential: After `compile_potential`.
        mode: The mode.
        pool: Gets the stages of each region as soon as they are known.
    """
    codes = {region.code for region in regions(potential)}
    before = {code: (code.make, code.report, code.tracing, code.added) for code in codes}
    known = {id(stage): stage.function for code in codes for stage in code.stages()}
    for code in codes:
        code.make, code.report = Stage.outline, lambda name, seconds: None
        code.tracing, code.added = pool.start, pool.add
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
    """Put a potential into a mode within the block."""
    before = potential.training
    try:
        with at_precision(potential, mode.precision):
            potential.train(mode.training)
            yield
    finally:
        potential.train(before)


def _triatomic(potential: Potential) -> Graph:
    """The smallest graph that compiled code is used for."""
    number, length = atomic_numbers[potential.elements[0]], 0.5 * potential.config.cutoff
    positions = length * np.eye(3)
    graph = build_graph([number] * 3, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), 2 * length)
    return graph.to(potential.device)
