"""What the commands share: kinds of arguments, the console, errors for people."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

console = Console(markup=False)  # names of files and options may hold square brackets

Model = Annotated[Path, typer.Argument(help="Model: .safetensors, or a deepmd-kit checkpoint .pt.")]
Branch = Annotated[str | None, typer.Option(help="Branch of a multitask deepmd-kit checkpoint.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")]
Dtype = Annotated[
    Literal["float32", "float64"], typer.Option(help="Precision of the network: float32 or float64.")
]
Precision = Annotated[
    Literal["high", "fast"],
    typer.Option(help="high: of the dtype. fast: products in bfloat16, for screening."),
]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Compile first; by default on a GPU in float32.")
]
Structures = Annotated[Path, typer.Argument(help="Structures in any format ASE reads.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what is wrong with the input instead of a traceback, and exit with status 1."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        message = Text.assemble(("error:", "bold red"), f" {error}")
        Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(1) from error
