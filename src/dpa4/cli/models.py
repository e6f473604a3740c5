"""Commands that convert and describe model files."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import Branch, console, user_errors


def convert(
    source: Annotated[Path, typer.Argument(help="Model to read: .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(help="File to write: .safetensors, or .pt for deepmd-kit.")],
    branch: Branch = None,
    drop_bridging: Annotated[
        bool, typer.Option(help="Leave out a bridging per pair of elements, which deepmd-kit lacks.")
    ] = False,
    ema: Annotated[
        bool,
        typer.Option("--ema", help="Read the averaged weights that a deepmd-kit checkpoint may also hold."),
    ] = False,
) -> None:
    """Convert between deepmd-kit checkpoints and native files."""
    from dpa4 import potential

    with user_errors():
        if target.exists():
            raise FileExistsError(f"{target} exists; choose another name or remove it")
        provenance = potential.convert(source, target, branch, drop_bridging=drop_bridging, ema=ema)
    console.print(f"wrote {target}")
    if averages := provenance.get("averaged weights"):
        console.print(f"averaged weights: {averages}")


def info(
    source: Annotated[str, typer.Argument(help="Model file, or name of a preset such as paper-air.")],
    branch: Branch = None,
) -> None:
    """Print the model card: parameters, elements, switches, units, GPU kernels, provenance."""
    from dpa4.potential import model_card

    with user_errors():
        console.print(model_card(source, branch))
