"""Command that checks a model."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import Branch, Model, console, one_model, user_errors


@one_model("a check is about one file; run it for each member")
def check(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file for the results.")] = Path(
        "check.html"
    ),
    elements: Annotated[
        str | None, typer.Option(help="Elements to check, such as Si,O; by default all of the model.")
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Also compute on a GPU, and scan pairs and triples there.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compare compiled code; takes a minute on a CPU.")
    ] = True,
    branch: Branch = None,
) -> None:
    """Check numbers, symmetry, derivatives, cutoff and short range; exit with 1 if a check fails."""
    from dpa4.output import check_writable
    from dpa4.simulation.check import check_model, write_check
    from dpa4.simulation.html import duration

    with user_errors():
        check_writable(output)
        chosen = None if elements is None else [e.strip() for e in elements.split(",")]
        found = check_model(model, elements=chosen, gpu=gpu, compile=compile, branch=branch)
        file = write_check(found, output)
    console.print(found)
    console.print(f"\n{found.summary} ({duration(found.seconds)}); wrote {file}", highlight=False)
    if not found.finished:
        console.print("interrupted: the page holds the checks done so far", highlight=False)
    elif not found.passed:
        raise typer.Exit(1)
