"""Compilation in several processes before the first call.

The compiler processes one stage at a time, mostly in one thread, and training needs tens of stages. While this
process traces the network, worker processes compile the traced stages and store them in files, which are loaded at
first use. The network is traced without computing anything: results of stages are replaced by uninitialised tensors
of the right shape, and the values of the weights do not matter.
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
from dpa4.potential.precision import Precision
from dpa4.system import processors
from dpa4.tracing.stage import Stage
from dpa4.tracing.workers import WorkerPool

_log = logging.getLogger(__name__)


class Mode(NamedTuple):
    """Mode in which a potential is called: training or evaluation, and the precision."""

    training: bool
    precision: Precision = "high"


def precompile(
    potential: Potential, modes: Sequence[Mode], graph: Graph | None = None, processes: int | None = None
) -> None:
    """Trace a compiled potential and let workers compile all stages that are not in the cache.

    If workers are not worthwhile, or fail, stages are compiled in this process at first use.

    Args:
        potential: Potential after `compile_potential`.
        modes: Modes in which it will be called.
        graph: Graph of which a part is computed in eager mode meanwhile; on a GPU that compiles the Triton kernels
            of the operators.
        processes: Number of workers; by default one per processor, at most `MAX_WORKERS`, none below
            `MIN_PROCESSORS`.
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
            _log.warning("compile workers failed, so stages are compiled in this process: %s", error)


def _affordable(device: torch.device) -> int:
    """Number of workers that the number of processors and the free memory of the device allow."""
    if processors() < MIN_PROCESSORS:
        return 0
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize
    return min(MAX_WORKERS, processors(), memory // WORKER_MEMORY)


def _outline(potential: Potential, mode: Mode, pool: WorkerPool) -> None:
    """Trace everything that calls in a mode need, without computing anything.

    Args:
        potential: Potential after `compile_potential`.
        mode: Mode of the calls.
        pool: Workers, which receive the stages of each region as soon as it is traced.
    """
    codes = {region.code for region in regions(potential)}
    before = {c: (c.compile_stage, c.report, c.before_trace, c.after_trace) for c in codes}
    known = {id(stage): stage.function for code in codes for stage in code.stages()}
    for code in codes:
        code.compile_stage, code.report = Stage.outline, lambda name, seconds: None
        code.before_trace, code.after_trace = pool.start, pool.add
    try:
        with _called_as(mode, potential):
            potential(_triatomic(potential))
    finally:
        for code in codes:
            code.compile_stage, code.report, code.before_trace, code.after_trace = before[code]
            for stage in code.stages():  # no outline, which returns no values, may remain
                stage.function = known.get(id(stage))


@contextmanager
def _called_as(mode: Mode, potential: Potential) -> Iterator[None]:
    """Put a potential into a mode within the block."""
    before = potential.training
    try:
        with potential.at_precision(mode.precision):
            potential.train(mode.training)
            yield
    finally:
        potential.train(before)


def _triatomic(potential: Potential) -> Graph:
    """Three atoms within the cutoff of each other: a small graph for which compiled code is used."""
    number, length = atomic_numbers[potential.elements[0]], 0.5 * potential.config.cutoff
    positions = length * np.eye(3)
    graph = build_graph([number] * 3, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), 2 * length)
    return graph.to(potential.device)
