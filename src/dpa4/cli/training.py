"""Commands that train and evaluate a potential."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import (
    Branch,
    Device,
    Dtype,
    Keys,
    MaxAtoms,
    Model,
    Overwrite,
    OverwriteFile,
    check_unused,
    console,
    eager_potentials,
    exit_after_signal,
    label_keys,
    say_next,
    user_errors,
    with_committee,
)


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="Training data, from which the options are chosen: file, folder or pattern in quotes; may be "
            "repeated.",
            show_default="train.xyz",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Model to start from, as listed in docs/models.md; without it, the data decide."),
    ] = None,
    overwrite: OverwriteFile = False,
) -> None:
    """Write a commented configuration file for a training run that suits the data."""
    from dpa4.data import find_sources
    from dpa4.data.sampling import read_sample
    from dpa4.output import atomic_write, check_replaceable
    from dpa4.system import choose_device
    from dpa4.training import default_config_text, recipe_for, recipe_text, summary_of
    from dpa4.training.recipes import choice_table

    with user_errors():
        check_replaceable(path, overwrite)
        if train is None and not Path("train.xyz").exists():
            text = default_config_text("train.xyz", preset or "mini")
            console.print(
                "no --train and no train.xyz here: the file has the defaults, whatever the data are"
            )
        else:
            entries = train or ["train.xyz"]
            sources = find_sources(entries)
            if sources.searched:
                console.print(sources.text, soft_wrap=True)
            summary = summary_of(read_sample(sources.paths))
            device = choose_device("auto").type
            choice = recipe_for(summary, device, preset)
            text = recipe_text(entries, choice)
            console.print(choice_table(summary, choice, device, choice.options["model.preset"]))
            for warning in choice.warnings:
                console.print(f"note: {warning}")
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    console.print(f"wrote {path}; look through it", soft_wrap=True, highlight=False)
    say_next(f"dpa4 train {path} --dry-run", f"time and memory of the run; then dpa4 train {path}")


def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration file, as written by dpa4 init.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override an option of the file, as training.seed=3; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in its output folder.")] = False,
    new_data: Annotated[
        bool, typer.Option("--new-data", help="With --resume: continue on other data than before.")
    ] = False,
    dry: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Do ten steps and print the time and memory of the run; write nothing."
        ),
    ] = False,
    committee: Annotated[
        int | None,
        typer.Option(
            help="Train this many models with different seeds and splits, in the folders member-0, member-1, ..."
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(help="Members of a committee trained at the same time; by default one after the other."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a potential, or a committee of potentials."""
    from dpa4.training import dry_run, load_run_config, train_committee
    from dpa4.training import train as run
    from dpa4.training.launcher import launched

    with user_errors():
        console.quiet = (place := launched()) is not None and place.rank > 0
        if at_once is not None and committee is None:
            raise ValueError(
                f"--at-once {at_once} is for the members of a committee; give --committee as well"
            )
        options = load_run_config(config, set_ or [])
        command = ["dpa4", "train", str(config), *(part for one in set_ or [] for part in ("--set", one))]
        for option, number in (("--committee", committee), ("--at-once", at_once)):
            command += [option, str(number)] if number is not None else []
        command += ["--overwrite"] if overwrite else []
        if dry and (resume or new_data):
            raise ValueError("--dry-run estimates a new run; leave out --resume and --new-data")
        if dry:
            if committee is not None:
                console.print(f"estimate of one of {committee} members:", highlight=False)
            console.print(dry_run(options, console))
            say_next(shlex.join(command))
        elif committee is None:
            best = run(options, resume=resume, new_data=new_data, overwrite=overwrite, console=console)
            exit_after_signal()
            say_next(f"dpa4 eval {best} TEST.xyz", "structures of other calculations than the training data")
            say_next(f"dpa4 report {options.output}", "the run on one page")
        else:
            folder = train_committee(
                options, committee, at_once=at_once or 1, resume=resume, new_data=new_data, overwrite=overwrite,
                console=console,
            )  # fmt: skip
            exit_after_signal()
            say_next(
                f"dpa4 eval {folder} TEST.xyz", "structures of other calculations than the training data"
            )


@with_committee
def evaluate_command(
    model: Model,
    data: Annotated[
        list[Path], typer.Argument(help="Labelled structures: files, folders or patterns, as for data.train.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for table, plots and predictions.")
    ] = Path("eval"),
    keys: Keys = None,
    max_atoms: MaxAtoms = 2000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare predictions with labels; write error tables, parity plots, predictions and the worst structures.

    Of several models the mean is compared; a plot shows how their deviation is related to its error.
    """
    from dpa4.data import find_sources, read_frames, warn_of_implausible_labels, without_isolated_atoms
    from dpa4.training import evaluate
    from dpa4.training.calibration import calibration_lines
    from dpa4.training.errors import worst_table

    with user_errors():
        check_unused(output, "predictions.xyz", overwrite)
        potentials = eager_potentials(model, device, dtype, branch)
        sources = find_sources(data)
        if sources.searched:
            console.print(sources.text, soft_wrap=True)
        frames = read_frames(sources, label_keys(keys))
        if (fitted := without_isolated_atoms(frames)) and len(fitted) < len(frames):
            # Training does not fit free atoms either.
            console.print(f"free atoms are left out: {len(frames) - len(fitted)}", highlight=False)
            frames = fitted
        if implausible := warn_of_implausible_labels(fitted):
            console.print(implausible)
        name = f"{len(potentials)} models" if len(potentials) > 1 else model
        table = evaluate(
            potentials, frames, max_atoms=max_atoms, output=output, device=potentials[0].device, model=name,
            data=", ".join([*map(str, data[:3]), *["..."][: len(data) - 3]]),
        )  # fmt: skip
    if table.rows:
        console.print(table.to_rich(), highlight=False)
        console.print("the structures with the largest errors, also in worst.xyz:", highlight=False)
        console.print(worst_table(table.worst), highlight=False)
        for line in calibration_lines(output):
            console.print(f"deviation of the committee, {line}", highlight=False)
        console.print(f"tables, plots and predictions are in {output}/")
    else:
        console.print(f"no structure has a label, so there are no errors; predictions are in {output}/")
