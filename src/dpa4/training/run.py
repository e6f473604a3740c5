"""A training run: its output folder, new or continued."""

from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from dpa4.output import (
    LEFTOVERS_OF_SAFETENSORS,
    OutputFolder,
    already_there,
    atomic_write,
    check_start,
    read_csv,
    remove_files,
    remove_leftovers,
    tolerate_any_encoding,
)
from dpa4.system import float32_by_default, own_settings
from dpa4.training.logs import REPLAY_FILE
from dpa4.training.options import RunConfig
from dpa4.training.prepare import prepare
from dpa4.training.processes import Processes, launched_processes
from dpa4.training.state import STATE, load_state
from dpa4.training.trainer import Trainer

_FILES_OF_A_RUN = (
    STATE, "best.safetensors", "last.safetensors", "train.csv", "valid.csv", REPLAY_FILE, "learning_curve.*",
    "run.yaml", "report.html", "tensorboard/*",
)  # fmt: skip


@own_settings
@float32_by_default()
@torch.enable_grad()
def train(
    config: RunConfig,
    *,
    resume: bool = False,
    new_data: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Train a potential, from random weights or from a trained model (``model.start_from``).

    Files written to the output folder of the run:

    * best.safetensors: model with the lowest validation score, with averaged weights.
    * last.safetensors: newest model.
    * last.pt: everything needed to resume.
    * train.csv, valid.csv and learning_curve.png: losses and errors; valid_replay.csv: errors on replayed data.
    * run.yaml: options of the run.

    At SIGINT or SIGTERM, the current step is finished, the state is saved, and the function returns. On a CPU, a run
    that is killed at any moment and resumed yields the same numbers as an uninterrupted one.

    In each of several processes that torchrun or Slurm has started, the function trains the same model on its part of
    every batch. The first process prints and writes; in the others an error ends the process.

    Args:
        config: Options of the run.
        resume: Continue the run in the output folder. If no step is left to do, nothing in it changes.
        new_data: Continue on other training or validation data than before. The model keeps its elements and
            reference energies, and the best score starts anew.
        overwrite: Replace the run in the output folder. Its files are removed once data and options of the new run
            have been checked; files of other names stay.
        console: Console to print to; standard output by default.

    Returns:
        Path of the best model so far.

    Raises:
        BlockingIOError: If another process is working in the output folder.
        FileExistsError: If the output folder is not empty and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is no state to resume from.
        ValueError: If data and options do not fit together, or the state belongs to another model or, without
            ``new_data``, to other data; also if the neighbour list of a structure cannot be built, after saving the
            state before it.
        FloatingPointError: If the loss or the gradient is not finite; the state before that step is saved.
        TimeoutError: If not all processes of a launcher have started.
    """
    tolerate_any_encoding()
    check_start(resume, overwrite)
    if new_data and not resume:
        raise ValueError("new data are for a run to resume; give --resume, too, or neither")
    processes = launched_processes()
    console = (console or Console()) if processes.first else Console(quiet=True)
    processes.join(processes.device(config.device))
    with processes.failures():
        path = _train(config, processes, console, resume=resume, new_data=new_data, overwrite=overwrite)
    processes.leave()
    return path


def _train(
    config: RunConfig,
    processes: Processes,
    console: Console,
    *,
    resume: bool,
    new_data: bool,
    overwrite: bool,
) -> Path:
    file = config.output / STATE
    if resume and not file.is_file():
        raise FileNotFoundError(f"no training state {file} to resume from; train without --resume first")
    with OutputFolder(config.output) if processes.first else nullcontext():
        processes.wait("the output folder")
        state = load_state(file) if resume else None
        if processes.first:
            if state is None and not overwrite:
                check_unused(config.output)
            elif state is not None:
                remove_leftovers(config.output, LEFTOVERS_OF_SAFETENSORS)
        with processes.busy("reading the data"):
            preparation = prepare(config, console, state, processes)
        processes.check_same(
            "data and options", repr((preparation.data, preparation.run_text, state is None))
        )
        trainer = Trainer(config, preparation, console, processes)
        if state is not None:
            trainer.load(state, new_data)
            if (model := trainer.finished()) is not None:
                return model
        if processes.first:
            if state is None:
                remove_files(config.output, *_FILES_OF_A_RUN)
                trainer.save_state()  # before all other files, so that a run killed at any time can be resumed
            with atomic_write(config.output / "run.yaml") as temporary:
                temporary.write_text(preparation.run_text, encoding="utf-8")
        return trainer.run()


def check_unused(folder: Path) -> None:
    """Check that a folder can receive a new run.

    A run of an earlier version that was killed before its first state has left options and empty tables, which may
    be replaced.

    Raises:
        FileExistsError: If the folder holds anything else.
    """
    names = {path.name for path in folder.iterdir() if path.name != ".lock"}
    unfinished = "train.csv" in names and names <= {"run.yaml", "train.csv", "valid.csv"}
    if names and not (unfinished and not read_csv(folder / "valid.csv")):
        raise already_there(folder, "a run" if STATE in names else "files", resumable=STATE in names)
