"""Command that writes the report of a training run or a simulation."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import Device, console, user_errors


def report(
    run: Annotated[
        Path, typer.Argument(help="Output folder of dpa4 train (or a committee), md, relax or phonon.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="HTML file; by default report.html in the folder of the run."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Output folder of dpa4 eval, for a training run or a committee."),
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option("--pairs/--no-pairs", help="Include pair curves of the elements in the training data."),
    ] = True,
    device: Device = "auto",
) -> None:
    """Write one HTML file about a training run, a committee, dynamics, relaxations or phonons."""
    from dpa4.simulation import write_report

    with user_errors():
        file = write_report(run, output, evaluation=evaluation, pairs=pairs, device=device)
    console.print(f"wrote {file}")
