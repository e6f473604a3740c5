"""Dry run: all preparations of a run and its first steps, for an estimate of time and memory; nothing is written."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from dpa4.data import Batch, EpochBatches
from dpa4.system import float32_by_default, own_settings, peak_memory
from dpa4.training.evaluation import predict
from dpa4.training.launcher import refuse_several
from dpa4.training.options import RunConfig
from dpa4.training.prepare import prepare
from dpa4.training.run import check_unused
from dpa4.training.trainer import Trainer
from dpa4.training.update import Report

STEPS = 10
WARM_UP = 3  # of these steps, which are not timed
VALIDATED = 5  # batches of the validation data that are timed, after one that is not


@dataclass(frozen=True)
class DryRun:
    """Estimate of a run from its first steps; times in seconds, memory in bytes."""

    steps: int
    steps_per_epoch: int
    timed: int  # number of steps that were timed
    seconds_per_step: float
    validations: int
    seconds_per_validation: float
    compilation: float
    memory: int | None  # peak so far; None where the system does not tell
    largest_batch: int  # atoms
    device: str

    @property
    def epochs(self) -> float:
        """Passes over the training data."""
        return self.steps / self.steps_per_epoch

    @property
    def seconds(self) -> float:
        """Time of the whole run."""
        return (
            self.compilation
            + self.steps * self.seconds_per_step
            + self.validations * self.seconds_per_validation
        )

    def __rich__(self) -> Table:
        """The estimate as a table for the terminal."""
        table = Table(title="Dry run", title_justify="left", show_header=False)
        table.add_row("steps", f"{self.steps:,}")
        table.add_row("epochs", f"{round(self.epochs, 1):,g} of {self.steps_per_epoch:,} steps")
        table.add_row(
            "seconds per step", f"{self.seconds_per_step:.3g}, mean of {self.timed} steps on {self.device}"
        )
        table.add_row("validations", f"{self.validations:,} of {duration(self.seconds_per_validation)}")
        if self.compilation:
            table.add_row("compilation", duration(self.compilation))
        table.add_row("estimated time", duration(self.seconds))
        table.add_row("peak memory", self._memory_text())
        return table

    def _memory_text(self) -> str:
        if self.memory is None:
            return "not known on this system"
        of_gpu = " of the GPU" if self.device.startswith("cuda") else ""
        return f"{self.memory / 2**30:.2f} GiB{of_gpu}, largest batch {self.largest_batch:,} atoms"


@own_settings
@float32_by_default()
@torch.enable_grad()
def dry_run(config: RunConfig, console: Console | None = None) -> DryRun:
    """Prepare a run, do ten steps, and estimate the time and memory of the run.

    The steps begin with the largest batch of the first epoch, so that its memory is part of the peak. No file is
    written, except for compiled code in the cache of PyTorch.

    Args:
        config: Options of the run.
        console: Console to print to; standard output by default.

    Raises:
        FloatingPointError, RuntimeError, ValueError: As in ``train``, but nothing is saved.
    """
    refuse_several("a dry run")
    console = console or Console()
    _warn_of_used_folder(config.output, console)
    preparation = prepare(config, console)
    trainer = _Trial(config, preparation, console)
    timed, seconds = trainer.time_steps()
    validations = 0
    if preparation.validation:
        of_start = 1 if config.model.start_from else 0
        validations = -(-trainer.total // trainer.validation_interval) + of_start
    return DryRun(
        steps=trainer.total,
        steps_per_epoch=preparation.train.num_batches(0),
        timed=timed,
        seconds_per_step=seconds,
        validations=validations,
        seconds_per_validation=trainer.time_validation(),
        compilation=trainer.compiled.seconds if trainer.compiled else 0.0,
        memory=peak_memory(trainer.device),
        largest_batch=max(_atoms(preparation.train)),
        device=str(trainer.device),
    )


class _Trial(Trainer):
    """Trainer that does a few steps and saves nothing."""

    def time_steps(self) -> tuple[int, float]:
        """Compile if the options say so, do the first steps, and return number and mean time of the timed ones."""
        self._compile()
        steps = min(STEPS, self.total)
        warm_up = min(WARM_UP, steps - 1)
        start = self._clock()
        for number, batch in enumerate(itertools.islice(_batches(self.preparation.train), steps)):
            self.potential.check(batch.graph)
            self._train_on(batch)
            if number + 1 == warm_up:
                start = self._clock()
        self._confirm()  # waits for the last step
        return steps - warm_up, (self._clock() - start) / (steps - warm_up)

    def time_validation(self) -> float:
        """Time to predict all validation data, from a few batches."""
        batches = self.preparation.validation
        if batches is None:
            return 0.0
        total = batches.num_batches(0)
        timed = min(VALIDATED, total)
        with self._evaluated_weights():
            if self.compiled is not None:
                self.compiled.check_evaluation(batches)
            self._predict(batches, 1)
            start = self._clock()
            self._predict(batches, timed)
            return (self._clock() - start) * total / timed

    def _predict(self, batches: EpochBatches, count: int) -> None:
        self._compiled_or_eager(lambda: predict(self.potential, itertools.islice(batches.batches(0), count)))

    def _abort(self, report: Report) -> NoReturn:
        raise FloatingPointError(
            f"{self._not_finite(report)}. Look for wrong labels or atoms too close in the data, or lower "
            "training.learning_rate"
        )


def _warn_of_used_folder(folder: Path, console: Console) -> None:
    try:
        if folder.exists():
            check_unused(folder)
    except FileExistsError as error:
        console.print(f"a run would not start: {error}", style="yellow", markup=False, soft_wrap=True)


def _atoms(batches: EpochBatches) -> list[int]:
    """Number of atoms of each batch of the first epoch."""
    sizes = batches.dataset.num_atoms
    return [int(sizes[indices].sum()) for indices in batches.indices(0)]


def _batches(batches: EpochBatches) -> Iterator[Batch]:
    """Yield the largest batch of the first epoch, then the batches of all epochs."""
    atoms = _atoms(batches)
    yield from itertools.islice(batches.batches(0, start=atoms.index(max(atoms))), 1)
    for epoch in itertools.count():
        yield from batches.batches(epoch)


def duration(seconds: float) -> str:
    """Time span as text, such as "2 d 3 h", "4 h 5 min", "6 min", "7.8 s"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
