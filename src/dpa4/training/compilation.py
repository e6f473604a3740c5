"""Compiled training: trusted after a comparison with eager mode, and given up for it where it fails."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from rich.console import Console
from rich.panel import Panel
from rich.status import Status
from rich.text import Text
from torch import Tensor

from dpa4.data import Batch, EpochBatches
from dpa4.graph import Graph
from dpa4.potential import Potential
from dpa4.potential.compiled import (
    compare_with_eager,
    compile_potential,
    restore_eager,
    tolerance,
)
from dpa4.potential.precompile import Mode, precompile
from dpa4.training.evaluation import full_precision
from dpa4.training.replay import Recorder, RecordingError, ReplayedStep, Step

T = TypeVar("T")

NOISE = 0.02
"""Of the weights in the self-check. Fresh models have layers of zeros, which make forces and all gradients zero: no
wrong derivative would show. With 0.05, bfloat16 alone changes the energy of the largest presets by 7 %."""


class DeviationError(ArithmeticError):
    """Compiled and eager results differ by more than rounding."""


class CompiledTraining:
    """A potential whose parts are compiled, or eager again after something failed. On a GPU its steps are replayed.

    Args:
        potential: The potential, on its device and in its precision.
        differentiate: A step up to the gradients of the parameters.
        console: Where to say what happens.

    Attributes:
        active: Whether compiled code is in use.
        seconds: Time spent on compilation so far.
    """

    def __init__(self, potential: Potential, differentiate: Step, console: Console):
        self.potential, self.differentiate, self.console = potential, differentiate, console
        self.active, self.pieces, self.seconds = False, 0, 0.0
        self._evaluates = False  # compiled, and compared
        self._step = differentiate
        self._status: Status | None = None

    def start(self, batches: EpochBatches) -> None:
        """Compile, compare with eager mode on the first batch, and print what was found.

        Weights, their gradients and the state of the random numbers are afterwards as before.

        Raises:
            ValueError: If an element, charge or spin is outside the model.
        """
        self.active = True
        self._check(batches, training=True)
        if self.active and self.potential.reference_energies.is_cuda:
            recorder = Recorder(self.differentiate, self.potential.parameters())
            self._step = ReplayedStep(self.potential, self.differentiate, recorder)

    def check_evaluation(self, batches: EpochBatches) -> None:
        """The same for evaluation as validation does it; only the first call does something."""
        if self.active and not self._evaluates:
            self._check(batches, training=False)
            self._evaluates = True

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`differentiate`, replayed where that is possible, compiled or eager; to be used before the next call."""
        return self.run(lambda: self._step(batch))

    def run(self, work: Callable[[], T]) -> T:
        """Result of the work, which is repeated in eager mode if compiled code raises.

        Something that the self-check did not meet can make new code necessary at any time. Being out of memory is
        no reason for eager mode, which needs more, but one to give up recordings, which hold some.
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
        return self.run(work)  # out of the handlers, which hold on to the memory of what failed

    def _check(self, batches: EpochBatches, training: bool) -> None:
        """Make the code of training or evaluation and compare it, or go over to eager mode."""
        # Also in a resumed run from the first epoch: the same run finds the same.
        order = batches.indices(0)
        batch = next((b for b in order if _is_compiled(batches.dataset.batch(b).graph)), order[0])
        graph = batches.dataset.batch(batch).graph
        self.potential.check(graph)
        device, before = self.potential.reference_energies.device, self.potential.training
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _noise_on(self.potential.parameters()),
            self.console.status("compiling the network") as self._status,
        ):
            try:
                if training:
                    self._compile(graph.to(device))
                line = self._self_check(batches, batch, training)
            except Exception as error:
                self._give_up(error)
            else:
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._status = None
        self.potential.train(before)

    def _compile(self, graph: Graph) -> None:
        compile_potential(self.potential, self._report)
        modes = [Mode(training=True, autocast=self.potential.model.block_autocast), Mode(training=False)]
        start = time.monotonic()
        precompile(self.potential, modes, graph)
        self.seconds += time.monotonic() - start

    def _self_check(self, batches: EpochBatches, batch: Sequence[int], training: bool) -> str:
        """The line to print.

        Raises:
            DeviationError: If a deviation is larger than allowed or not finite.
        """
        count = len(batch)
        while True:
            graph = batches.dataset.batch(batch[:count]).graph.to(self.potential.reference_energies.device)
            try:
                found = self._compare(graph, training)
                break
            except (
                torch.OutOfMemoryError
            ):  # a batch may fit compiled code and still be too large for eager mode
                if count == 1:
                    raise
            count //= 2
        where = "the first batch" if count == len(batch) else f"{count} structures of the first batch"
        if training and not _is_compiled(graph):
            where += ", which has no edges, so that derivatives were not compared"
        where = f"on {where}" if training else f"in evaluation on {where}"
        return f"compiled {self.pieces} pieces in {self.seconds:.0f} s; deviation from eager mode {where}: {found}"

    def _compare(self, graph: Graph, training: bool) -> str:
        """Deviations from eager mode on a graph, as validation (in full precision) or training meets them."""
        model = self.potential.train(training).model
        with nullcontext() if training else full_precision(model):
            allowed = tolerance(self.potential)
            found = compare_with_eager(self.potential, graph)
        for name, deviation in found.items():
            if not deviation <= allowed:  # also if it is not a number
                raise DeviationError(
                    f"{name} in {'training' if training else 'evaluation'}: relative deviation from eager mode "
                    f"{deviation:.1g}, allowed {allowed:.0g}"
                )
        return ", ".join(f"{name} {d:.0e}" for name, d in found.items()) + f" (allowed {allowed:.0e})"

    def _report(self, name: str, seconds: float) -> None:
        self.pieces, self.seconds = self.pieces + 1, self.seconds + seconds
        if self._status is not None:
            self._status.update(
                f"compiling the network: {self.pieces} pieces in {self.seconds:.0f} s ({name})"
            )
        else:
            self.console.print(f"compiled {name} in {seconds:.0f} s", highlight=False)

    def _give_up(self, error: Exception) -> None:
        restore_eager(self.potential)
        self.active, self._step = False, self.differentiate
        self._say(
            "Compilation failed",
            error,
            "Training goes on in eager mode: right, but slower and with more memory. "
            "training.compile = false leaves compilation out.",
        )

    def _give_up_replay(self, error: Exception) -> None:
        self._step = self.differentiate
        self._say(
            "Replay of training steps failed",
            error,
            "Training goes on with compiled steps that are not replayed: right, but slower with small batches.",
        )

    def _say(self, title: str, error: Exception, consequence: str) -> None:
        lines = [line[:300] for line in str(error).splitlines() if line.strip()]
        cause = "\n".join([f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:4]])
        text = Text.assemble((cause, "bold"), f"\n\n{consequence}")
        self.console.print(Panel(text, title=title, border_style="bold red"))


def _is_compiled(graph: Graph) -> bool:
    """Whether a graph is large enough for compiled code; smaller sizes run eagerly."""
    return graph.num_atoms > 1 and graph.num_edges > 1


@contextmanager
def _noise_on(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block there is noise on the parameters; afterwards they are the same bit for bit."""
    parameters = [p.detach() for p in parameters]
    own = [p.clone() for p in parameters]
    torch.manual_seed(0)
    for p in parameters:
        p.add_(NOISE * torch.randn_like(p))
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, own)
