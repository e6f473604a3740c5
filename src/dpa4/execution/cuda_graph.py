"""Energy and forces as a CUDA graph: in small systems it takes longer to launch the kernels than to run them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from dpa4.execution.limits import is_in_parts
from dpa4.execution.padding import Buffers, replayed_size, rounded_up
from dpa4.execution.regions import regions
from dpa4.graph import Graph
from dpa4.potential.potential import Potential, Prediction
from dpa4.tracing.region import versions
from dpa4.tracing.sizes import MIN_SIZE

T = TypeVar("T")


class _Recording(NamedTuple):
    graph: "torch.cuda.CUDAGraph"
    buffers: Buffers
    prediction: Prediction
    constants: list[Any]  # of compiled regions: the kernels read them, so their memory must stay


class Replay:
    """Calls a potential on one structure at a time, by replaying recorded kernels.

    Sizes are rounded up with atoms far from everything, by at most 1/32, so one recording serves many structures.
    Recordings are given up when weights change, since they do not compute what depends on weights alone.

    Args:
        potential: In evaluation mode, on a GPU; its parameters and buffers must not be replaced by others.
        max_recordings: Of different sizes, that are held at a time.
    """

    def __init__(self, potential: Potential, max_recordings: int = 4):
        self.potential, self.max_recordings = potential, max_recordings
        self.recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self.weights = [*potential.parameters(), *potential.buffers()]
        self.recorded = versions(self.weights)

    def __call__(self, graph: Graph) -> Prediction:
        """Prediction for a graph of one structure, on the device."""
        graph = self.potential.without_excluded(graph)
        n, e = graph.num_atoms, graph.num_edges
        atoms, edges = replayed_size(n), rounded_up(e)
        if atoms is None or e < MIN_SIZE or is_in_parts(self.potential, edges):
            return self.potential.of_edges(graph)
        size = atoms, edges
        while True:
            if size not in self.recordings:
                self.recordings[size] = self._record(Buffers(graph, self.potential.config.cutoff))
                while len(self.recordings) > self.max_recordings:
                    self.recordings.popitem(last=False)
            self.recordings.move_to_end(size)
            recording = self.recordings[size]
            recording.buffers.copy(graph)
            recording.graph.replay()
            if (now := versions(self.weights)) == self.recorded:  # looked up while the device is busy
                break
            self.recordings.clear()
            del recording  # its memory is for the next one
            self.recorded = now
        energy, atomic, forces, virial = recording.prediction
        return Prediction(energy[:1].clone(), atomic[:n].clone(), forces[:n].clone(), virial[:1].clone())

    def _record(self, buffers: Buffers) -> _Recording:
        stream = torch.cuda.Stream(buffers.graph.positions.device)
        graph, prediction = record(lambda: self.potential.of_edges(buffers.graph), stream)
        constants = [region.constants.copy() for region in regions(self.potential)]
        return _Recording(graph, buffers, prediction, constants)


def record(work: Callable[[], T], stream: "torch.cuda.Stream", pool: Any = None) -> tuple[Any, T]:
    """Record the kernels of some work, which is done twice before.

    Args:
        work: Nothing in it may wait for the device; its inputs stay where they are.
        stream: What the work is done on while it is recorded.
        pool: Handle of the memory that it takes. Recordings may share it if none is replayed before the results of
            another have been used, since it may overwrite them.

    Returns:
        The ``torch.cuda.CUDAGraph``, and the results, which each replay overwrites.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills caches that must not be filled while recording
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer block brings the former stream back even if the recording cannot be ended. Other threads may go on
    # to allocate memory (of batches to come): "thread_local".
    try:
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            results = work()
    except BaseException:
        # Random numbers would go on to be recorded; a copy of their state does not know that they were.
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph, results
