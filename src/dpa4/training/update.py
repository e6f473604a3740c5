"""Everything in a training step that follows the gradients, without waiting for the device (docs/adr/0027)."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpa4.training.ema import MovingAverage
from dpa4.training.logs import ERROR_UNITS, TERMS
from dpa4.training.low_rank import LowRank
from dpa4.training.muon import HybridMuon


class WeightUpdate:
    """Norm and clipping of the gradient, optimiser, moving average, and sums for the log.

    A loss or gradient that is not finite leaves weights, state of the optimiser, average and sums as they are; so do
    all later updates. The device decides that. The host learns of it by a `Report`, when the next step is under way.

    `receive` copies the inputs of an update to tensors that stay at their place. `apply` reads these only, so it can
    be recorded as a CUDA graph and replayed as long as ``key`` is the same.

    Args:
        parameters: The trained parameters, on their device.
        optimizer: Optimiser of these parameters.
        average: Moving average of these parameters, if any.
        gradient_clip: Largest norm of the gradient, if any.
        low_rank: Weights of the network that depend on some of the parameters, if any.

    Attributes:
        written: The parameters, and the weights that depend on them.
        sums: (len(TERMS),) float64, sums over the steps since they were last set to zero.
        errors: (2, targets) float64, sums of `absolute_errors` over the same steps.
        key: Key of the parameters that have a gradient.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: HybridMuon,
        average: MovingAverage | None,
        gradient_clip: float | None,
        low_rank: LowRank | None = None,
    ):
        self.parameters, self.optimizer, self.average = parameters, optimizer, average
        self.gradient_clip, self.low_rank = gradient_clip, low_rank
        self.written = [*parameters, *(low_rank.weights.values() if low_rank else ())]
        device = parameters[0].device
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=device)
        self.key: Hashable = None
        self.errors = torch.zeros(2, len(ERROR_UNITS), dtype=torch.float64, device=device)
        numbers = self.sums.new_zeros(len(TERMS) + self.errors.numel())  # of the step
        self._record = numbers[: len(TERMS)]  # terms, loss and norm
        self._errors = numbers[len(TERMS) :].view(self.errors.shape)
        self._numbers = numbers
        self._finite = torch.ones((), dtype=torch.bool, device=device)  # this step and all steps before it
        self._one = torch.ones((), device=device)

    @torch.no_grad()
    def receive(self, loss: Tensor, terms: Mapping[str, Tensor], count: int) -> None:
        """Copy the gradients of the parameters and the numbers of a step.

        Args:
            loss: Detached loss.
            terms: Its terms, and ``absolute_errors``.
            count: Number of earlier steps.
        """
        torch.stack([terms["energy"], terms["forces"], terms["virial"], loss], out=self._record[:-1])
        self._errors.copy_(terms["absolute_errors"])
        self.key = self.optimizer.receive()
        if self.average is not None:
            self.average.receive(count)

    def received(self) -> list[Tensor]:
        """Flat buffers of the gradients and numbers that `receive` has copied, for processes that add theirs up."""
        return [self._numbers, *self.optimizer.received()]

    @torch.no_grad()
    def apply(self) -> None:
        """Update weights, state of the optimiser, average and sums."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).double().norm()
        self._record[-1].copy_(norm)
        self._finite.logical_and_(torch.isfinite(self._record).all())
        scale = self._one
        if self.gradient_clip:
            scale = (self.gradient_clip / (norm + 1e-6)).clamp(max=1.0).float()
        self.optimizer.update(scale, self._finite)
        if self.low_rank is not None:
            self.low_rank.merge()
        if self.average is not None:
            self.average.update(self._finite)
        self.sums.add_(self._record.masked_fill(~self._finite, 0.0))
        self.errors.add_(self._errors.masked_fill(~self._finite, 0.0))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let `apply` change nothing within the block, so that it can be tried before it is recorded."""
        finite = self._finite.clone()
        self._finite.fill_(False)
        try:
            yield
        finally:
            self._finite.copy_(finite)

    def report(self, counters: Mapping[str, Any]) -> "Report":
        """Report of the step that was launched last.

        Args:
            counters: Counters of the run before the step.
        """
        return Report(self._record, counters)


class Report:
    """Loss terms, loss and norm of the gradient of a step that the device may not have finished.

    Args:
        record: (len(TERMS),) the numbers, on the device.
        counters: Counters of the run before the step.
    """

    def __init__(self, record: Tensor, counters: Mapping[str, Any]):
        cuda = record.is_cuda
        self.counters = counters
        self._values = torch.empty(record.shape, dtype=record.dtype, pin_memory=cuda)
        self._values.copy_(record, non_blocking=True)
        self._ready = torch.cuda.Event() if cuda else None
        if self._ready is not None:
            self._ready.record()

    def values(self) -> list[float]:
        """Numbers in the order of ``TERMS``; waits until the device has finished the step."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._values.tolist()

    def is_finite(self) -> bool:
        """Return whether all numbers are finite; waits like `values`."""
        return all(map(math.isfinite, self.values()))
