"""The dpa4 command; every command is a thin layer over a library function."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Train and run DPA4 interatomic potentials. Units: eV and Angstrom.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

Model = Annotated[Path, typer.Argument(help="Model: .safetensors, or a deepmd-kit checkpoint .pt.")]
Branch = Annotated[str | None, typer.Option(help="Branch of a multitask deepmd-kit checkpoint.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="Precision of the network: float32 or float64.")]
Structures = Annotated[Path, typer.Argument(help="Structures in any format ASE reads.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what is wrong with the input instead of a traceback, and exit with status 1."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True, emoji=False
        )
        raise typer.Exit(1) from error


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    train: Annotated[str, typer.Option(help="Training data to name in it.")] = "train.xyz",
) -> None:
    """Write a commented starting file for a training run."""
    from dpa4.training import default_config_text

    with user_errors():
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another name or remove it")
        path.write_text(default_config_text(train), encoding="utf-8")
    console.print(f"wrote {path}; edit it, then run: dpa4 train {path}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see dpa4 init.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Replace an option: training.seed=3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in its output folder.")] = False,
) -> None:
    """Train a potential."""
    from dpa4.training import load_run_config
    from dpa4.training import train as run

    with user_errors():
        best = run(load_run_config(config, set_ or []), resume=resume, console=console)
    console.print(f"best model: {best}")


@app.command("eval")
def evaluate_command(
    model: Model,
    data: Annotated[list[Path], typer.Argument(help="Labelled structures.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for table, plots, predictions.")
    ] = Path("eval"),
    max_atoms: Annotated[int, typer.Option(help="Atoms per batch.")] = 2000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
) -> None:
    """Compare predictions with labels: error table, parity plots, predictions as extxyz."""
    from dpa4.data import read_frames
    from dpa4.potential import load_potential
    from dpa4.training import choose_device, evaluate

    with user_errors():
        chosen = choose_device(device)
        potential = load_potential(model, device=chosen, dtype=_dtype(dtype), branch=branch)
        frames = [frame for path in data for frame in read_frames(path)]
        table = evaluate(potential, frames, max_atoms=max_atoms, output=output, device=chosen)
    console.print(table)
    console.print(f"table, plots and predictions are in {output}/")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Model to read: .pt or .safetensors.")],
    target: Annotated[Path, typer.Argument(help="File to write: .safetensors, or .pt for deepmd-kit.")],
    branch: Branch = None,
) -> None:
    """Convert between deepmd-kit checkpoints and native files."""
    from dpa4 import potential

    with user_errors():
        if target.exists():
            raise FileExistsError(f"{target} exists; choose another name or remove it")
        potential.convert(source, target, branch)
    console.print(f"wrote {target}")


@app.command()
def info(
    source: Annotated[str, typer.Argument(help="A model file, or the name of a preset such as paper-air.")],
    branch: Branch = None,
) -> None:
    """Print the model card: parameters, elements, switches, units, provenance."""
    from dpa4.potential import model_card

    with user_errors():
        console.print(model_card(source, branch))


def _dtype(name: str):  # type: ignore[no-untyped-def]
    import torch

    known = {"float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise ValueError(f"--dtype must be float32 or float64, got {name}")
    return known[name]


if __name__ == "__main__":
    app()
