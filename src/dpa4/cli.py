"""The dpa4 command; every command is a thin layer over a library function."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    help="Train and run DPA4 interatomic potentials. Units: eV and Angstrom.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
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
    key: Annotated[
        list[str] | None, typer.Option(help="Name of a label in the data: energy=dft_energy.")
    ] = None,
    max_atoms: Annotated[int, typer.Option(help="Atoms per batch.")] = 2000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
) -> None:
    """Compare predictions with labels: error table, parity plots, predictions as extxyz."""
    import torch

    from dpa4.data import LabelKeys, read_frames
    from dpa4.potential import load_potential
    from dpa4.system import choose_device
    from dpa4.training import evaluate

    with user_errors():
        chosen = choose_device(device)
        potential = load_potential(model, device=chosen, dtype=getattr(torch, dtype), branch=branch)
        frames = read_frames(data, LabelKeys(**_label_keys(key or [])))
        table = evaluate(potential, frames, max_atoms=max_atoms, output=output, device=chosen)
    console.print(table.to_rich())
    console.print(f"table, plots and predictions are in {output}/")


def _label_keys(pairs: list[str]) -> dict[str, str]:
    """Map of label to name from pairs such as energy=dft_energy."""
    known = ("energy", "forces", "stress", "virial")
    keys = dict(pair.partition("=")[::2] for pair in pairs)
    for name, value in keys.items():
        if name not in known or not value:
            raise ValueError(
                f"--key must be LABEL=NAME with a label of {', '.join(known)}, got {name}={value}"
            )
    return keys


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
    """Print the model card: parameters, elements, switches, units, kernels on a GPU, provenance."""
    from dpa4.potential import model_card

    with user_errors():
        console.print(model_card(source, branch))


@app.command()
def md(
    model: Model,
    structure: Annotated[
        Path, typer.Argument(help="Start, in any format ASE reads; the last image is taken.")
    ],
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("md"),
    ensemble: Annotated[Literal["nve", "langevin"], typer.Option(help="nve or langevin.")] = "nve",
    temperature: Annotated[float, typer.Option(help="Of the initial velocities and the bath, in K.")] = 300.0,
    timestep: Annotated[float, typer.Option(help="In fs.")] = 0.5,
    friction: Annotated[float, typer.Option(help="Of the Langevin bath, in 1/fs.")] = 0.01,
    interval: Annotated[int, typer.Option(help="Steps between rows of the table and frames.")] = 10,
    skin: Annotated[float, typer.Option(help="Verlet skin of the neighbour list, in Angstrom.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "high",
    compile: Compile = None,
    branch: Branch = None,
) -> None:
    """Run molecular dynamics: NVE or Langevin."""
    from ase.io import iread

    from dpa4.simulation import DPA4Calculator, run_md

    with user_errors():
        atoms = next(iread(structure, index=-1))
        calculator = DPA4Calculator(
            model,
            device=device,
            dtype=dtype,
            precision=precision,
            compile=compile,
            branch=branch,
            neighbor_skin=skin,
        )
        result = run_md(
            atoms, calculator, output, steps=steps, ensemble=ensemble, temperature=temperature, timestep=timestep,
            friction=friction, interval=interval, seed=seed, resume=resume,
        )  # fmt: skip
    console.print(f"{'finished' if result.finished else 'stopped'} after {result.steps} steps")
    console.print(f"mean temperature {result.temperature:.1f} K", highlight=False)
    if result.drift is not None:
        console.print(
            f"energy drift {result.drift:+.4f} meV/atom/ps, largest deviation {result.deviation:.3f} meV/atom"
        )
    console.print(f"trajectory.xyz, thermo.csv and thermo.png are in {output}/")


@app.command()
def relax(
    model: Model,
    structures: Structures,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("relax"),
    fmax: Annotated[float, typer.Option(help="Largest force of a relaxed structure, in eV/Angstrom.")] = 0.02,
    steps: Annotated[int, typer.Option(help="Most steps per structure.")] = 500,
    optimizer: Annotated[Literal["fire", "bfgs", "lbfgs"], typer.Option(help="Method.")] = "fire",
    cell: Annotated[bool, typer.Option("--cell", help="Relax the cell too.")] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    precision: Precision = "high",
    compile: Compile = None,
    branch: Branch = None,
) -> None:
    """Relax every structure of a file."""
    from ase.io import iread

    from dpa4.simulation import DPA4Calculator, relax_all

    with user_errors():
        images = list(iread(structures))
        calculator = DPA4Calculator(
            model, device=device, dtype=dtype, precision=precision, compile=compile, branch=branch
        )
        results = relax_all(
            images, calculator, output, fmax=fmax, steps=steps, optimizer=optimizer, cell=cell
        )
    converged = sum(result.converged for result in results)
    console.print(
        f"{converged} of {len(images)} structures converged; relaxed.xyz and relax.csv are in {output}/"
    )


if __name__ == "__main__":
    app()
