"""Commands that train and evaluate a potential."""

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
    console,
    eager_potential,
    label_keys,
    user_errors,
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
) -> None:
    """Write a commented configuration file for a training run that suits the data."""
    from dpa4.data.sampling import matching_paths, read_sample
    from dpa4.system import choose_device
    from dpa4.training import default_config_text, recipe_for, recipe_text, summary_of
    from dpa4.training.recipes import choice_table

    with user_errors():
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another name or remove it")
        if train is None and not Path("train.xyz").exists():
            text = default_config_text("train.xyz", preset or "mini")
            console.print(
                "no --train and no train.xyz here: the file has the defaults, whatever the data are"
            )
        else:
            files = matching_paths(train or ["train.xyz"])
            summary = summary_of(read_sample(files))
            device = choose_device("auto").type
            choice = recipe_for(summary, device, preset)
            text = recipe_text(files, choice)
            console.print(choice_table(summary, choice, device))
            for warning in choice.warnings:
                console.print(f"note: {warning}")
        path.write_text(text, encoding="utf-8")
    console.print(f"wrote {path}; edit it, then run: dpa4 train {path}")


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
) -> None:
    """Train a potential."""
    from dpa4.training import load_run_config
    from dpa4.training import train as run

    with user_errors():
        run(load_run_config(config, set_ or []), resume=resume, new_data=new_data, console=console)


def evaluate_command(
    model: Model,
    data: Annotated[list[Path], typer.Argument(help="Labelled structures.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for table, plots and predictions.")
    ] = Path("eval"),
    keys: Keys = None,
    max_atoms: MaxAtoms = 2000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
) -> None:
    """Compare predictions with labels; write an error table, parity plots and predictions as extxyz."""
    from dpa4.data import read_frames, warn_of_implausible_labels, without_isolated_atoms
    from dpa4.training import evaluate

    with user_errors():
        potential = eager_potential(model, device, dtype, branch)
        frames = read_frames(data, label_keys(keys))
        if implausible := warn_of_implausible_labels(without_isolated_atoms(frames)):
            console.print(implausible)
        table = evaluate(potential, frames, max_atoms=max_atoms, output=output, device=potential.device)
    if table.rows:
        console.print(table.to_rich())
        console.print(f"table, plots and predictions are in {output}/")
    else:
        console.print(f"no structure has a label, so there are no errors; predictions are in {output}/")
