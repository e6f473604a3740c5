"""Commands that convert and describe model files."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import Branch, OverwriteFile, console, one_model, user_errors


@one_model("a file holds one model; convert each member to a file of its own")
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Model (.pt, .safetensors) or training input of deepmd-kit (.json) to read."),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            help="File to write: .safetensors, .pt for deepmd-kit, or run file (.yaml) of an input."
        ),
    ],
    branch: Branch = None,
    drop_bridging: Annotated[
        bool, typer.Option(help="Leave out a bridging per pair of elements, which deepmd-kit lacks.")
    ] = False,
    ema: Annotated[
        bool,
        typer.Option("--ema", help="Read the averaged weights that a deepmd-kit checkpoint may also hold."),
    ] = False,
    overwrite: OverwriteFile = False,
) -> None:
    """Convert between model files of dpa4 and of deepmd-kit, or a training input of deepmd-kit to a run file."""
    from dpa4 import potential
    from dpa4.output import check_replaceable
    from dpa4.training.deepmd_input import INPUT_SUFFIXES

    with user_errors():
        check_replaceable(target, overwrite)
        if source.suffix in INPUT_SUFFIXES:
            if branch or drop_bridging or ema:
                raise ValueError(
                    f"{source} is a training input; --branch, --drop-bridging and --ema are for models"
                )
            _convert_input(source, target)
            return
        provenance = potential.convert(source, target, branch, drop_bridging=drop_bridging, ema=ema)
    console.print(f"wrote {target}")
    if averages := provenance.get("averaged weights"):
        console.print(f"averaged weights: {averages}")


def _convert_input(source: Path, target: Path) -> None:
    """Translate a training input, and print what is different in the run file."""
    from dpa4.training import convert_input

    if target.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"{source} is a training input, which becomes a run file; {target} must end in .yaml"
        )
    translated = convert_input(source, target)
    if translated.differences:
        console.print(translated)
    if translated.unused:
        console.print(
            f"without influence on the model, left out: {'; '.join(translated.unused)}", highlight=False
        )
    console.print(f"wrote {target}; check it, then run: dpa4 train {target}", soft_wrap=True)


@one_model("a card describes one file; print that of each member")
def info(
    source: Annotated[
        str,
        typer.Argument(
            help="Model file, hf:organisation/repository/file, or name of a preset such as paper-air."
        ),
    ],
    branch: Branch = None,
) -> None:
    """Print the model card: parameters, elements, switches, units, GPU kernels, provenance."""
    from dpa4.potential import model_card

    with user_errors():
        console.print(model_card(source, branch))
