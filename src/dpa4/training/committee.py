"""Training of a committee: several runs of one configuration that differ in seeds and splits, and its calibration."""

import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dpa4.output import OutputFolder, already_there, check_start, counted, tolerate_any_encoding
from dpa4.potential.checkpoint import add_provenance, load_potential
from dpa4.potential.committee import MEMBER, member_files, member_folders
from dpa4.system import caught_signals, choose_device, stop_requests
from dpa4.training.calibration import Calibration, calibrations, write_calibration
from dpa4.training.evaluation import batches_for, predict_committee
from dpa4.training.launcher import refuse_several
from dpa4.training.options import RunConfig
from dpa4.training.run import train
from dpa4.training.run_data import calibration_frames
from dpa4.training.state import STATE

MAX_ATOMS = 2000  # evaluated at once for the calibration
POLL_SECONDS = 0.2


def train_committee(
    config: RunConfig,
    members: int,
    *,
    at_once: int = 1,
    resume: bool = False,
    new_data: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Train several models that differ in the seed of weights and batches and in the split of the data.

    Member k (0, 1, ...) is an ordinary run in the folder member-k of the output folder, with ``training.seed`` and
    ``data.split_seed`` larger by k. If the run has no validation file, all members leave out one more random share of
    the data, ``data.calibration_fraction``, by default as large as ``data.validation_fraction``.

    At the end, deviations of the committee are compared with its errors on the validation file or on the share that
    all have left out. The result is in calibration.json and calibration.png, and in the card of every member's best
    model.

    At SIGINT or SIGTERM the running members save their states, and the function returns.

    Args:
        config: Options of the runs.
        members: Number of members, at least two.
        at_once: Number of members trained at the same time, each in a process of its own with an equal share of the
            processor cores and with the next GPU, if there are several. More than one write what they print to
            member-k.log.
        resume: Continue every member that has a state and start the others; ``members`` may be larger than before.
        new_data: Continue on other data than before, see ``train``.
        overwrite: Replace the members in the output folder.
        console: Console to print to; standard output by default.

    Returns:
        The output folder, which can be used in place of a list of models.

    Raises:
        BlockingIOError: If another process is working in the output folder.
        FileExistsError: If the output folder is not empty and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: If there is no committee to resume.
        RuntimeError: If a member that runs in another process fails.
        ValueError: If ``members`` or ``at_once`` is not allowed, or as in ``train``.
    """
    tolerate_any_encoding()
    refuse_several("training of a committee")
    console = console or Console()
    if members < 2:
        raise ValueError(
            f"a committee needs at least 2 members, got {members}; a single model needs no committee"
        )
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    check_start(resume, overwrite)
    folder = config.output
    with OutputFolder(folder):
        _check_folder(folder, members, resume, overwrite)
        tasks = [_Task(config, number, resume, new_data, overwrite) for number in range(members)]
        finished = _one_by_one(tasks, console) if at_once == 1 else _at_once(tasks, at_once, console)
        if finished:
            for line in calibrate(config, console):
                console.print(line, highlight=False, soft_wrap=True)
            console.print(f"committee of {members} models: {folder}", markup=False)
        else:
            console.print("stopped; continue with --resume")
    return folder


def member_config(config: RunConfig, number: int) -> RunConfig:
    """Options of a member: those of the committee with another output, seed and split."""
    data, training = config.data, config.training
    split: dict[str, Any] = {"split_seed": data.split_seed + number}
    if not data.validation:
        split["calibration_fraction"] = data.calibration_fraction or data.validation_fraction
    return config.model_copy(
        update={
            "data": data.model_copy(update=split),
            "training": training.model_copy(update={"seed": training.seed + number}),
            "output": config.output / f"{MEMBER}{number}",
        }
    )


def calibrate(config: RunConfig, console: Console) -> list[str]:
    """Compare deviations and errors of a trained committee; write files and cards, return the result in words.

    Args:
        config: Options of the committee.
        console: Console to print to.
    """
    files = member_files(config.output)
    frames = calibration_frames(member_config(config, 0))
    if not frames:
        return ["no calibration: there are no data that no member was trained on"]
    device = choose_device(config.device)
    potentials = [load_potential(file, device=device) for file in files]
    batches = batches_for(potentials, frames, MAX_ATOMS)
    found = calibrations(frames, predict_committee(potentials, batches.batches(0)))
    write_calibration(found, config.output)
    _write_cards(files, found, len(frames))
    return [
        f"calibration on {counted(len(frames), 'structure')}, {one.quantity}: {one.text}" for one in found
    ]


def _write_cards(files: Sequence[Path], found: Sequence[Calibration], structures: int) -> None:
    for number, file in enumerate(files, start=1):
        entries = {"committee": f"member {number} of {len(files)}, calibrated on {structures} structures"}
        add_provenance(file, entries | {f"calibration, {one.quantity}": one.text for one in found})


def _check_folder(folder: Path, members: int, resume: bool, overwrite: bool) -> None:
    """Check that a folder can receive a new committee, or holds one to resume.

    Raises:
        FileExistsError: If it is not empty and nothing is to be resumed.
        FileNotFoundError: If there is nothing to resume.
        ValueError: If it holds more members than are to be trained.
    """
    known = member_folders(folder)
    if not (resume or overwrite) and any(path.name != ".lock" for path in folder.iterdir()):
        raise already_there(folder, "a committee" if known else "files", resumable=bool(known))
    if resume and not known:
        raise FileNotFoundError(f"there is no committee to resume in {folder}; train without --resume first")
    if len(known) > members:
        raise ValueError(
            f"{folder} holds a committee of {len(known)} members; give --committee {len(known)} or more"
        )


class _Task:
    """Training of one member."""

    def __init__(self, config: RunConfig, number: int, resume: bool, new_data: bool, overwrite: bool):
        self.config, self.number = member_config(config, number), number
        self.folder = self.config.output
        self.log = self.folder.with_name(f"{self.folder.name}.log")
        self.resume = resume and (self.folder / STATE).is_file()
        self.new_data, self.overwrite = new_data and self.resume, overwrite

    def run(self, console: Console) -> None:
        """Train in this process."""
        options = {"resume": self.resume, "new_data": self.new_data, "overwrite": self.overwrite}
        train(self.config, **options, console=console)

    def run_alone(self, threads: int) -> None:
        """Train in a process of its own."""
        with suppress(AttributeError):  # on Windows
            os.setpgrp()  # so that Ctrl-C reaches the parent alone, which passes it on
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            torch.cuda.set_device(self.number % torch.cuda.device_count())
        with self.log.open("a", encoding="utf-8") as file:
            console = Console(file=file, width=120)
            warnings.showwarning = lambda message, *_, **__: console.print(
                f"warning: {message}", markup=False, highlight=False, soft_wrap=True
            )
            try:
                self.run(console)
            except Exception as error:
                console.print(f"error: {error}", markup=False, soft_wrap=True)
                raise SystemExit(1) from None


def _one_by_one(tasks: Sequence[_Task], console: Console) -> bool:
    """Train one member after the other; return False if a signal ended that."""
    for task in tasks:
        seed = task.config.training.seed
        console.rule(f"member {task.number + 1} of {len(tasks)}: seed {seed}, {task.folder}", align="left")
        caught = len(caught_signals)
        task.run(console)
        if len(caught_signals) > caught:
            return False
    return True


def _at_once(tasks: Sequence[_Task], at_once: int, console: Console) -> bool:
    """Train several members at the same time; return False if a signal ended that.

    Raises:
        RuntimeError: If a member fails; raised once all others have ended.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    threads = max(1, torch.get_num_threads() // min(at_once, len(tasks)))
    waiting, running, failed = list(tasks), dict[SpawnProcess, _Task](), list[_Task]()
    with stop_requests() as stopped:
        told = False
        while running or (waiting and not stopped):
            while waiting and len(running) < at_once and not stopped:
                task = waiting.pop(0)
                process = context.Process(target=task.run_alone, args=(threads,))
                process.start()
                running[process] = task
                console.print(
                    f"member {task.number + 1} of {len(tasks)} is training; it prints to {task.log}"
                )
            if stopped and not told:
                told = True
                for process in running:
                    process.terminate()  # SIGTERM, after which a member saves its state
            time.sleep(POLL_SECONDS)
            for process in [p for p in running if not p.is_alive()]:
                task = running.pop(process)
                if process.exitcode and not stopped:
                    failed.append(task)
                elif not stopped:
                    console.print(f"member {task.number + 1} of {len(tasks)} has finished")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(tasks)} members failed; see {', '.join(str(task.log) for task in failed)}, then "
            "continue with --resume"
        )
    return not stopped
