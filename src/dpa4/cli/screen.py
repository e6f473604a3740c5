"""Command that relaxes many structures in batches."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dpa4.cli.options import (
    Fmax,
    Model,
    ModelOptions,
    Output,
    Overwrite,
    Resume,
    Steps,
    console,
    user_errors,
    with_model_options,
)

if TYPE_CHECKING:
    from dpa4.simulation.screen import Screening

MaxEdges = Annotated[
    int, typer.Option(help="Maximum number of edges per batch, limited by the memory of the GPU.")
]
Rank = Annotated[int, typer.Option(help="Index of this process, from 0.")]
WorldSize = Annotated[int, typer.Option(help="Number of processes that share the work.")]


@with_model_options()
def screen(
    model: Model,
    structures: Annotated[list[Path], typer.Argument(help="Files of structures, in any format ASE reads.")],
    output: Output = Path("screen"),
    fmax: Fmax = 0.02,
    steps: Steps = 500,
    cell: Annotated[
        Literal["fixed", "full", "volume", "shape"], typer.Option(help="Cell degrees of freedom to relax.")
    ] = "fixed",
    pressure: Annotated[float, typer.Option(help="External pressure, in GPa.")] = 0.0,
    max_edges: MaxEdges = 200_000,
    rank: Rank = 0,
    world_size: WorldSize = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    *,
    options: ModelOptions,
) -> None:
    """Relax many structures in batches and list the outcome of each."""
    with user_errors():
        from dpa4.interfaces.torchsim import DPA4Model
        from dpa4.simulation.screen import screen as run

        potential = DPA4Model(model, **options)
        result = run(
            structures, potential, output, fmax=fmax, steps=steps, cell=cell, pressure=pressure, max_edges=max_edges,
            rank=rank, world_size=world_size, resume=resume, overwrite=overwrite,
        )  # fmt: skip
    print_screening(result, output, rank, world_size, "run the command with --resume to continue")


def print_screening(
    result: "Screening", output: Path, rank: int, world_size: int, how_to_continue: str
) -> None:
    """Print the outcome of a screening.

    Args:
        result: The screening.
        output: Its output folder.
        rank: Index of this process.
        world_size: Number of processes.
        how_to_continue: Advice to print if the run was interrupted.
    """
    console.print(", ".join(f"{count} {status}" for status, count in sorted(result.counts.items())) or "none")
    if result.joined:
        console.print(f"screen.csv and relaxed.xyz of {result.total} structures are in {output}/")
    elif result.finished:
        console.print(
            f"shard {rank} of {world_size} is finished, others are not; the last to finish joins all results"
        )
    else:
        console.print(f"interrupted; {how_to_continue}")
