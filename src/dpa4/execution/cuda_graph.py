"""Energy and forces by CUDA graphs: in small systems launching the kernels takes longer than running them."""

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
    constants: list[Any]  # constants of compiled regions, kept alive because the recorded kernels read them


class Replay:
    """Evaluates a potential on one structure at a time by replaying recorded kernels.

    Sizes are padded by at most 1/32 with atoms that interact with nothing, so one recording serves many structures.
    All recordings are discarded when weights change, since they do not compute what depends on weights alone.

    Args:
        potential: Potential in evaluation mode, on a GPU; its parameters and buffers must not be replaced by others.
        max_recordings: Largest number of recordings, of different sizes, that are held at a time.
    """

    def __init__(self, potential: Potential, max_recordings: int = 4):
        self.potential, self.max_recordings = potential, max_recordings
        self.recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self.weights = [*potential.parameters(), *potential.buffers()]
        self.recorded = versions(self.weights)

    def __call__(self, graph: Graph) -> Prediction:
        """Return the prediction for a graph of one structure on the device."""
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
            # Checked after the launch, while the device is busy. If the weights have changed, the result is
            # discarded.
            if (now := versions(self.weights)) == self.recorded:
                break
            self.recordings.clear()
            del recording  # frees its memory for the next one
            self.recorded = now
        energy, atomic, forces, virial = recording.prediction
        return Prediction(energy[:1].clone(), atomic[:n].clone(), forces[:n].clone(), virial[:1].clone())

    def _record(self, buffers: Buffers) -> _Recording:
        stream = torch.cuda.Stream(buffers.graph.positions.device)
        graph, prediction = record(lambda: self.potential.of_edges(buffers.graph), stream)
        constants = [region.constants.copy() for region in regions(self.potential)]
        return _Recording(graph, buffers, prediction, constants)


def record(work: Callable[[], T], stream: "torch.cuda.Stream", pool: Any = None) -> tuple[Any, T]:
    """Record the kernels of some work as a CUDA graph, after running the work twice.

    Args:
        work: Function to record. It must not wait for the device, and its inputs must stay at the same addresses.
        stream: Stream on which the work is recorded.
        pool: Handle of the memory pool of the recording. Recordings may share a pool if each result is used before
            another recording is replayed, since the replay may overwrite it.

    Returns:
        The ``torch.cuda.CUDAGraph``, and the results, which each replay overwrites.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles code and fills caches, neither of which may happen while recording
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer block restores the former stream even if the recording cannot be ended. "thread_local" lets other
    # threads allocate memory meanwhile, such as the one that prepares batches.
    try:
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            results = work()
    except BaseException:
        # After a failed recording the random generator would remain in recording mode; a copy of its state is not.
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph, results
