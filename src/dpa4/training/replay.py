"""Training steps as CUDA graphs: with small batches it takes longer to launch the kernels than to run them."""

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dpa4.data import Batch
from dpa4.potential import Potential
from dpa4.potential.replay import is_in_parts, pad, record

Step = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""Detached loss of a batch without excluded pairs, and its terms; the parameters have their gradients afterwards."""

Size = tuple[int, int, int]
"""Structures, atoms and edges of a batch."""


class RecordingError(RuntimeError):
    """A step could not be recorded."""


class ReplayedStep:
    """A step that is recorded for sizes that come often and replayed for batches of these sizes.

    Batches are padded so that they have few sizes. A size is recorded when it comes a second time; with
    ``max_recordings`` of them, it takes the place of the size that came least when it has come twice as often.
    (Batches are drawn at random: forgetting the size that was not used for longest would record rare sizes again and
    again.) Results are overwritten by the next call. Batches that the network works on in parts are not recorded:
    they keep the device busy, and cutting them waits for it.

    Args:
        potential: In training mode; its parameters must not move afterwards.
        step: Up to the gradients, without the optimiser.
        record: The step for batches of the size of the given one, from which it takes nothing else. See `Recorder`.
        max_recordings: Of different sizes, that are held at a time.

    Attributes:
        seen: How often each size has come.
        recordings: The recorded steps.
    """

    def __init__(
        self, potential: Potential, step: Step, record: Callable[[Batch], Step], max_recordings: int = 16
    ):
        self.potential, self.step, self.record = potential, step, record
        self.max_recordings = max_recordings
        self.seen: Counter[Size] = Counter()
        self.recordings: dict[Size, Step] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The step on a batch without excluded pairs, on the device.

        Raises:
            RecordingError: If recording fails; weights and optimiser are as before.
        """
        if batch.graph.num_edges < 2:  # nothing is compiled for it
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


class Recorder:
    """Records a step, for one size of batches after the other, in memory that all recordings share.

    Args:
        step: The step.
        parameters: Those whose gradients it leaves; on a GPU.
    """

    def __init__(self, step: Step, parameters: Iterable[nn.Parameter]):
        self.step, self.parameters = step, list(parameters)
        self.stream = torch.cuda.Stream(self.parameters[0].device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> "Recording":
        """Recording for batches of the size of this one."""
        inputs = pytree.tree_map(torch.clone, batch)
        gc.collect()  # what is left of the graph of a former step would tie the gradients to the stream of that
        graph, results = record(lambda: self.step(inputs), self.stream, self.pool)
        return Recording(graph, inputs, results, self.parameters)


class Recording:
    """A recorded step; its loss, terms and gradients lie where they are until the next recorded step of any size.

    Args:
        graph: The ``torch.cuda.CUDAGraph``.
        inputs: The batch that it reads.
        results: Loss and terms that it writes.
        parameters: Their ``grad`` is what it writes, too.
    """

    def __init__(
        self,
        graph: Any,
        inputs: Batch,
        results: tuple[Tensor, dict[str, Tensor]],
        parameters: list[nn.Parameter],
    ):
        self.graph, self.inputs, self.results, self.parameters = graph, inputs, results, parameters
        self.gradients = [p.grad for p in parameters]

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The step on a batch of the size of the inputs."""
        for own, new in zip(pytree.tree_leaves(self.inputs), pytree.tree_leaves(batch), strict=True):
            own.copy_(new)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.results


def pad_batch(batch: Batch, cutoff: float) -> Batch:
    """Add structures without labels, so that a batch has one of few sizes and the same loss and gradients.

    Atoms and edges grow by at most a sixteenth, structures, which cost nothing, to the next power of two.

    Args:
        batch: The batch.
        cutoff: Of the model, in Angstrom.
    """
    structures = (1 << batch.graph.num_structures.bit_length()) - batch.graph.num_structures
    # Few sizes: batches differ more than steps of dynamics.
    graph = pad(batch.graph, cutoff, structures, digits=5)

    def longer(t: Tensor, count: int) -> Tensor:
        return torch.cat([t, t.new_zeros(count, *t.shape[1:])])

    labels = {
        name: longer(t, structures) for name, t in batch._asdict().items() if name not in ("graph", "forces")
    }
    return Batch(graph, forces=longer(batch.forces, graph.num_atoms - batch.graph.num_atoms), **labels)
