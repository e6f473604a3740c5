"""Training steps recorded as CUDA graphs and replayed.

With small batches, launching the kernels one by one takes longer than running them. A step is two graphs: the
gradients, recorded for each frequent batch size, and the update of the weights, recorded once.
"""

import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dpa4.data import Batch
from dpa4.execution.cuda_graph import record
from dpa4.execution.limits import BATCH_SIZE_DIGITS, can_be_compiled, is_in_parts
from dpa4.execution.padding import pad
from dpa4.potential import Potential
from dpa4.training.update import WeightUpdate

Step = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""Function of a batch without excluded pairs that returns the detached loss and its terms and leaves the gradients in
the parameters."""

Size = tuple[int, int, int]
"""Numbers of structures, atoms and edges of a batch."""


class RecordingError(RuntimeError):
    """Failure to record a step as a CUDA graph."""


class ReplayedStep:
    """Training step that is recorded for frequent batch sizes and replayed for batches of these sizes.

    Batches are padded, so that there are few sizes. A size is recorded at its second occurrence. Once there are
    ``max_recordings``, a new size replaces the rarest recorded one as soon as it has occurred twice as often.
    (Batches are drawn at random: replacing the least recently used size would record rare sizes again and again.)
    Each call overwrites the results of the previous one. Batches that are so large that the network splits them
    into parts are not recorded: they keep the device busy anyway, and splitting waits for the device.

    Args:
        potential: Potential in training mode; its parameters must stay at their place in memory.
        step: Training step up to the gradients, without the optimiser.
        record: Function that records the step for batches as large as the given one; only the size of the given
            batch matters. See `StepRecorder`.
        max_recordings: Maximum number of recordings, each for a different size.

    Attributes:
        seen: Number of occurrences of each size.
        recordings: Recorded steps by size.
    """

    def __init__(
        self, potential: Potential, step: Step, record: Callable[[Batch], Step], max_recordings: int = 16
    ):
        self.potential, self.step, self.record = potential, step, record
        self.max_recordings = max_recordings
        self.seen: Counter[Size] = Counter()
        self.recordings: dict[Size, Step] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the step on a batch without excluded pairs, on the device.

        Raises:
            RecordingError: If recording fails; weights and optimiser are unchanged.
        """
        if not can_be_compiled(batch.graph):
            return self.step(batch)
        padded = pad_batch(batch, self.potential.config.cutoff)
        graph = padded.graph
        if is_in_parts(self.potential, graph.num_edges):
            return self.step(batch)
        size = graph.num_structures, graph.num_atoms, graph.num_edges
        self.seen[size] += 1
        if size not in self.recordings:
            self._record_if_frequent(size, padded)
        return self.recordings.get(size, self.step)(padded)

    def _record_if_frequent(self, size: Size, padded: Batch) -> None:
        full = len(self.recordings) == self.max_recordings
        rarest = min(self.recordings, key=self.seen.__getitem__) if full else None
        if self.seen[size] < (2 if rarest is None else 2 * self.seen[rarest]):
            return
        if rarest is not None:
            del self.recordings[rarest]
        try:
            self.recordings[size] = self.record(padded)
        except Exception as error:
            raise RecordingError(f"{type(error).__name__}: {error}") from error


class StepRecorder:
    """Recorder of a step for any number of batch sizes, and of updates; all recordings share one memory pool.

    Args:
        step: The step to record.
        parameters: Parameters whose gradients the step computes, on a GPU.
    """

    def __init__(self, step: Step, parameters: Iterable[Tensor]):
        self.step, self.parameters = step, list(parameters)
        self.stream = torch.cuda.Stream(self.parameters[0].device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> "StepRecording":
        """Record the step for batches of the size of this one."""
        inputs = pytree.tree_map(torch.clone, batch)
        gc.collect()  # remains of an earlier autograd graph would tie the gradients to the stream of that step
        graph, results = record(lambda: self.step(inputs), self.stream, self.pool)
        return StepRecording(graph, inputs, results, self.parameters)

    def record_update(self, work: Callable[[], None]) -> Any:
        """Record an update of the parameters; return the ``torch.cuda.CUDAGraph``."""
        graph, _ = record(work, self.stream, self.pool)
        return graph


class ReplayedUpdate:
    """Update of the weights that is recorded at its first use, and again if other parameters have a gradient.

    Args:
        update: The update.
        record: Function that records some work and returns the ``torch.cuda.CUDAGraph``.
    """

    def __init__(self, update: WeightUpdate, record: Callable[[Callable[[], None]], Any]):
        self.update, self.record = update, record
        self.recordings: dict[Hashable, Any] = {}

    def __call__(self) -> None:
        """Apply the update that was received last.

        Raises:
            RecordingError: If recording fails; nothing was updated.
        """
        key = self.update.key
        if key not in self.recordings:
            try:
                with self.update.suspended():
                    self.recordings[key] = self.record(self.update.apply)
            except Exception as error:
                raise RecordingError(f"{type(error).__name__}: {error}") from error
        self.recordings[key].replay()
        # A replay does not tell autograd that it writes. Results that are cached for the weights depend on that.
        torch.autograd.graph.increment_version(self.update.written)


class StepRecording:
    """Recorded step, whose loss, terms and gradients are valid until the next recorded step of any size.

    Args:
        graph: The ``torch.cuda.CUDAGraph``.
        inputs: Batch that the graph reads.
        results: Loss and terms that the graph writes.
        parameters: Parameters whose ``grad`` the graph writes as well.
    """

    def __init__(
        self,
        graph: Any,
        inputs: Batch,
        results: tuple[Tensor, dict[str, Tensor]],
        parameters: list[Tensor],
    ):
        self.graph, self.inputs, self.results, self.parameters = graph, inputs, results, parameters
        self.gradients = [p.grad for p in parameters]

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Replay the step on a batch of the same size as the inputs."""
        for own, new in zip(pytree.tree_leaves(self.inputs), pytree.tree_leaves(batch), strict=True):
            own.copy_(new)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.results


def pad_batch(batch: Batch, cutoff: float) -> Batch:
    """Pad a batch to one of few sizes by structures without labels; loss and gradients do not change.

    The numbers of atoms and edges grow by at most a sixteenth. The number of structures grows to the next power of
    two, because structures cost nothing.

    Args:
        batch: The batch.
        cutoff: Cutoff of the model, in Angstrom.
    """
    structures = (1 << batch.graph.num_structures.bit_length()) - batch.graph.num_structures
    return batch.extended(pad(batch.graph, cutoff, structures, digits=BATCH_SIZE_DIGITS))
