"""Logs of a training run: progress on the terminal, CSV files, TensorBoard."""

from pathlib import Path
from typing import Any

from rich.console import Console

from dpa4.output import CsvLog
from dpa4.progress import ProgressBar
from dpa4.system import install_command

TERMS = ("energy", "forces", "virial", "loss", "gradient_norm")
ERROR_UNITS = {"energy": "meV/atom", "forces": "meV/Å", "virial": "meV/atom"}
TRAIN_ERRORS = tuple(f"{name}_mae" for name in ERROR_UNITS)  # absent in files of earlier versions
TRAIN_COLUMNS = ("step", "epoch", "learning_rate", *TERMS, "seconds", *TRAIN_ERRORS)
ERROR_COLUMNS = tuple(f"{name}_{kind}" for name in ERROR_UNITS for kind in ("mae", "rmse"))
VALID_COLUMNS = ("step", "epoch", "score", "best", *ERROR_COLUMNS)
REPLAY_COLUMNS = ("step", "epoch", *ERROR_COLUMNS)
REPLAY_FILE = "valid_replay.csv"


class RunLog:
    """Progress and logs of one run; use as a context manager.

    Args:
        folder: Folder for train.csv, valid.csv and the TensorBoard files.
        console: Terminal.
        total: Number of steps of the run.
        resume_step: Continue the logs of an earlier run after this step; None starts new logs.
        tensorboard: Also write TensorBoard files.
        replays: Also write valid_replay.csv, the errors on data of the start.

    Raises:
        ModuleNotFoundError: If ``tensorboard`` is true and TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        total: int,
        resume_step: int | None,
        tensorboard: bool,
        replays: bool = False,
    ):
        self._console = console
        self._tensorboard = _summary_writer(folder, resume_step) if tensorboard else None
        self._train = CsvLog(folder / "train.csv", TRAIN_COLUMNS, resume_step, TRAIN_ERRORS)
        self._valid = CsvLog(folder / "valid.csv", VALID_COLUMNS, resume_step)
        self._replay = CsvLog(folder / REPLAY_FILE, REPLAY_COLUMNS, resume_step) if replays else None
        self._progress = ProgressBar("step", total, resume_step or 0, console=console)
        self._task = self._progress.task_ids[0]

    def __enter__(self) -> "RunLog":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        self._train.close()
        self._valid.close()
        if self._replay is not None:
            self._replay.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def flush_to_disk(self) -> None:
        """Wait until all rows are on the disk."""
        self._train.flush_to_disk()
        self._valid.flush_to_disk()
        if self._replay is not None:
            self._replay.flush_to_disk()

    def step(self, step: int) -> None:
        """Advance the progress."""
        self._progress.update(self._task, completed=step)

    def train(self, row: dict[str, Any]) -> None:
        """Log averages over the steps since the last row, named as in ``TRAIN_COLUMNS``."""
        self._train.write(row)
        self._scalars("train", row)
        status = f"loss {row['loss']:.4g}  lr {row['learning_rate']:.2e}"
        self._progress.update(self._task, status=status)

    def start(self, errors: dict[str, float]) -> None:
        """Log and print the errors of the start on the training data, named as in ``ERROR_COLUMNS``, as step 0."""
        row = {"step": 0, "epoch": 0, "seconds": 0.0} | {n: errors[n] for n in TRAIN_ERRORS if n in errors}
        self._train.write(row)
        self._scalars("train", row)
        line = f"step       0  start, on the training data  {_errors_text(errors)}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def validation(self, row: dict[str, Any], epochs: float) -> None:
        """Log and print the errors of a validation.

        Args:
            row: Errors, named as in ``VALID_COLUMNS``.
            epochs: Passes over the training data so far, with the part of the last one.
        """
        self._valid.write(row)
        self._scalars("validation", row)
        best = "  [green]best[/green]" if row["best"] else ""
        line = f"step {row['step']:>7}  epoch {epochs:>6.1f}  {_errors_text(row)}{best}"
        self._console.print(line, highlight=False, soft_wrap=True, markup=True)

    def replay(self, row: dict[str, Any]) -> None:
        """Log and print the errors on held-out data of the start, named as in ``REPLAY_COLUMNS``."""
        assert self._replay is not None
        self._replay.write(row)
        self._scalars("replay", row)
        line = f"step {row['step']:>7}  replayed    {_errors_text(row)}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def _scalars(self, prefix: str, row: dict[str, Any]) -> None:
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(f"{prefix}/{name}", value, row["step"])


def _errors_text(errors: dict[str, Any]) -> str:
    """MAE and RMSE of each quantity, such as "forces 12.1/15.9 meV/Å"."""
    return "  ".join(
        f"{name} {errors[f'{name}_mae']:.4g}/{errors[f'{name}_rmse']:.4g} {unit}"
        for name, unit in ERROR_UNITS.items()
        if errors.get(f"{name}_mae") is not None
    )


class NoLog:
    """Log of a process that leaves logging to another one."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def flush_to_disk(self) -> None:
        """Do nothing."""

    def step(self, step: int) -> None:
        """Do nothing."""

    def train(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def start(self, errors: dict[str, float]) -> None:
        """Do nothing."""

    def validation(self, row: dict[str, Any], epochs: float) -> None:
        """Do nothing."""

    def replay(self, row: dict[str, Any]) -> None:
        """Do nothing."""


def _summary_writer(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"training.tensorboard = true needs TensorBoard ({error}); {install_command('tensorboard')}"
        ) from None
    # Hides what the interrupted run logged after its last checkpoint.
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
