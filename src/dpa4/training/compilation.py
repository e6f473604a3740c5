"""Compiled training steps: compared with eager mode before use, and replaced by it on failure."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.text import Text
from torch import Tensor

from dpa4.data import Batch, EpochBatches
from dpa4.execution.limits import can_be_compiled, tolerance
from dpa4.execution.precompile import Mode, precompile
from dpa4.execution.regions import compile_potential, restore_eager
from dpa4.execution.trial import attempt, require_agreement
from dpa4.graph import Graph
from dpa4.potential import Potential
from dpa4.training.replayed_step import RecordingError, ReplayedStep, ReplayedUpdate, Step, StepRecorder
from dpa4.training.update import WeightUpdate

T = TypeVar("T")

NOISE = 0.02
"""Standard deviation of the noise on the weights during the comparison with eager mode.

In a fresh model some layers are zero, so that forces and all gradients are zero and a wrong derivative would go
unnoticed. With 0.05, rounding to bfloat16 alone changes the energy of the largest presets by 7 %.
"""


class CompiledTraining:
    """Training steps with compiled code, which fall back to eager mode on failure.

    On a GPU the compiled steps are also recorded as CUDA graphs and replayed (`dpa4.training.replayed_step`).

    Args:
        potential: The potential, on its device and in its precision.
        differentiate: Training step up to the gradients of the parameters. The trainer passes one of its methods,
            which is called for every step, directly or while a step is recorded.
        weight_update: Update of the weights after each step.
        console: Console for progress and warnings.

    Attributes:
        active: True while compiled code is in use.
        stages: Number of stages compiled so far.
        seconds: Time spent on compilation so far, in seconds.
    """

    def __init__(
        self, potential: Potential, differentiate: Step, weight_update: WeightUpdate, console: Console
    ):
        self.potential, self.differentiate, self.console = potential, differentiate, console
        self.weight_update = weight_update
        self.active, self.stages, self.seconds = False, 0, 0.0
        self._evaluates = False  # compiled evaluation was compared with eager mode
        self._step = differentiate
        self._update: Callable[[], None] = weight_update.apply
        self._status: Status | None = None

    def start(self, batches: EpochBatches) -> None:
        """Compile, compare with eager mode on the first batch, and print the deviations.

        Weights, gradients and the state of the random-number generators are unchanged afterwards.

        Raises:
            ValueError: If an element, charge or spin is outside the model.
        """
        self.active = True
        self._check(batches, training=True)
        if self.active and self.potential.device.type == "cuda":
            recorder = StepRecorder(self.differentiate, self.weight_update.parameters)
            self._step = ReplayedStep(self.potential, self.differentiate, recorder)
            self._update = ReplayedUpdate(self.weight_update, recorder.record_update)

    def check_evaluation(self, batches: EpochBatches) -> None:
        """Compare compiled evaluation with eager mode, as in validation. Only the first call has an effect."""
        if self.active and not self._evaluates:
            self._check(batches, training=False)
            self._evaluates = True

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run `differentiate`: replayed where possible, else compiled or eager.

        Returns:
            The detached loss and its terms. The next call may overwrite them and the gradients.
        """
        return self.run(lambda: self._step(batch))

    def update(self) -> None:
        """Apply the weight update: replayed where possible. It is never repeated after a part of it was done."""
        try:
            self._update()
        except RecordingError as error:
            self._give_up_replay(error)
            self._update()

    def run(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``, repeating it in eager mode if compiled code raises.

        Errors are possible at any time, because an input unlike the compared ones may require new code. If memory
        runs out, only the recordings are given up, which hold memory; eager mode would need even more.
        """
        try:
            return work()
        except (RecordingError, torch.OutOfMemoryError) as error:
            if self._step is self.differentiate:
                raise
            self._give_up_replay(error)
        except Exception as error:
            if not self.active:
                raise
            self._give_up(error)
        return self.run(work)  # outside the handlers: a caught exception keeps the memory of the failed call

    def _check(self, batches: EpochBatches, training: bool) -> None:
        """Compare training (compiled here) or evaluation with eager mode; on failure switch to eager mode."""
        # Order of the first epoch, even in a resumed run: the deviations are those of the uninterrupted run.
        order = (indices for _, indices in batches.plan(0))
        first = next(order)
        every = chain([first], order)
        batch = next((b for b in every if can_be_compiled(batches.dataset.batch(b).graph)), first)
        graph = batches.dataset.batch(batch).graph
        self.potential.check(graph)
        device, before = self.potential.device, self.potential.training
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _noise_on(self.potential.parameters()),
            self.console.status("compiling the network") as self._status,
        ):

            def work() -> str:
                if training:
                    self._compile(graph.to(device))
                return self._self_check(batches, batch, training)

            # Even lack of memory does not end the training: batches differ in size.
            line = attempt(self.potential, work, self._give_up, propagate=())
            if line is not None:
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._status = None
        self.potential.train(before)

    def _compile(self, graph: Graph) -> None:
        compile_potential(self.potential, self._report)
        modes = [Mode(training=True, precision=self.potential.precision), Mode(training=False)]
        start = time.monotonic()
        precompile(self.potential, modes, graph)
        self.seconds += time.monotonic() - start

    def _self_check(self, batches: EpochBatches, batch: Sequence[int], training: bool) -> str:
        """Compare on a batch, or on a part of it that eager mode has the memory for; return the line to print.

        Raises:
            DeviationError: If a deviation is larger than allowed or not finite.
        """
        count = len(batch)
        while True:
            graph = batches.dataset.batch(batch[:count]).graph.to(self.potential.device)
            try:
                found = self._compare(graph, training)
                break
            except torch.OutOfMemoryError:  # eager mode needs more memory than compiled code
                if count == 1:
                    raise
            count //= 2
        where = "the first batch" if count == len(batch) else f"{count} structures of the first batch"
        if training and not can_be_compiled(graph):
            where += ", which has no edges, so that derivatives were not compared"
        where = f"on {where}" if training else f"in evaluation on {where}"
        return f"compiled {self.stages} stages in {self.seconds:.0f} s; deviation from eager mode {where}: {found}"

    def _compare(self, graph: Graph, training: bool) -> str:
        """Compare on a graph, in the mode and precision of training or validation; return the deviations as text.

        Raises:
            DeviationError: If a deviation is larger than allowed or not finite.
        """
        self.potential.train(training)
        with self.potential.at_precision(self.potential.precision if training else "high"):
            allowed = tolerance(self.potential)
            found = require_agreement(self.potential, graph)
        return ", ".join(f"{name} {d:.0e}" for name, d in found.items()) + f" (allowed {allowed:.0e})"

    def _report(self, name: str, seconds: float) -> None:
        self.stages, self.seconds = self.stages + 1, self.seconds + seconds
        if self._status is not None:
            self._status.update(
                f"compiling the network: {self.stages} stages in {self.seconds:.0f} s ({name})"
            )
        else:
            self.console.print(f"compiled {name} in {seconds:.0f} s", highlight=False)

    def _give_up(self, error: Exception) -> None:
        restore_eager(self.potential)
        self.active = False
        self._drop_recordings()
        self._say(
            "Compilation failed",
            error,
            "Training continues in eager mode: results are correct, but steps are slower and need more memory. "
            "Set training.compile = false to skip compilation.",
        )

    def _drop_recordings(self) -> None:
        self._step, self._update = self.differentiate, self.weight_update.apply

    def _give_up_replay(self, error: Exception) -> None:
        self._drop_recordings()
        self._say(
            "Replay of training steps failed",
            error,
            "Training continues with compiled steps that are not replayed: results are correct, but small batches "
            "are slower.",
        )

    def _say(self, title: str, error: Exception, consequence: str) -> None:
        lines = [line[:300] for line in str(error).splitlines() if line.strip()]
        cause = "\n".join([f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:4]])
        text = Text.assemble((cause, "bold"), f"\n\n{consequence}")
        self.console.print(Panel(text, title=title, border_style="bold red"))


@contextmanager
def _noise_on(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Add noise to the parameters within the block, and restore them bit for bit afterwards."""
    parameters = [p.detach() for p in parameters]
    own = [p.clone() for p in parameters]
    torch.manual_seed(0)
    for p in parameters:
        p.add_(NOISE * torch.randn_like(p))
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, own)
