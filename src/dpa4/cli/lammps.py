"""Command that runs LAMMPS."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import Model, ModelOptions, Skin, console, user_errors, with_model_options


@with_model_options()
def lammps(
    model: Model,
    script: Annotated[
        Path, typer.Argument(help="LAMMPS input script with the line: fix dpa4 all external pf/callback 1 1")
    ],
    elements: Annotated[str, typer.Option(help="Element of each atom type, in order, such as Si,O.")],
    var: Annotated[
        list[str] | None, typer.Option(help="LAMMPS variable, as NAME=VALUE; may be repeated.")
    ] = None,
    charge: Annotated[
        int | None, typer.Option(help="Total charge in e, for models conditioned on it.")
    ] = None,
    spin: Annotated[
        int | None, typer.Option(help="Spin multiplicity 2S + 1, for models conditioned on it.")
    ] = None,
    skin: Skin = 1.0,
    *,
    options: ModelOptions,
) -> None:
    """Run a LAMMPS input script; Ctrl-C ends the run after the current step."""
    from dpa4.interfaces import DPA4Calculator, run_lammps

    with user_errors():
        pairs = [pair.partition("=") for pair in var or []]
        if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
            raise ValueError(f"--var must be NAME=VALUE, got {', '.join(wrong)}")
        calculator = DPA4Calculator(model, **options, neighbor_skin=skin)
        finished = run_lammps(
            script,
            calculator,
            elements.replace(",", " ").split(),
            variables={name: value for name, _, value in pairs},
            info={k: v for k, v in (("charge", charge), ("spin", spin)) if v is not None},
        )
    console.print("finished" if finished else "stopped; later run commands of the script were skipped")
