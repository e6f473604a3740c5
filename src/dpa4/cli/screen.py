"""Relaxation of many structures at once on the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dpa4.cli.options import Model, ModelOptions, Output, console, user_errors, with_model_options

if TYPE_CHECKING:
    from dpa4.simulation.screen import Screening

MaxEdges = Annotated[int, typer.Option(help="Edges of a batch: what the memory of the GPU allows.")]
Rank = Annotated[int, typer.Option(help="Number of this process among all, from 0.")]
WorldSize = Annotated[int, typer.Option(help="How many processes share the work.")]


@with_model_options()
def screen(
    model: Model,
    structures: Annotated[list[Path], typer.Argument(help="Files with structures, in any format ASE reads.")],
    output: Output = Path("screen"),
    fmax: Annotated[float, typer.Option(help="Largest force of a relaxed structure, in eV/Angstrom.")] = 0.02,
    steps: Annotated[int, typer.Option(help="Most steps per structure.")] = 500,
    cell: Annotated[
        Literal["fixed", "full", "volume", "shape"], typer.Option(help="What of the cell is relaxed.")
    ] = "fixed",
    pressure: Annotated[float, typer.Option(help="External pressure, in GPa.")] = 0.0,
    max_edges: MaxEdges = 200_000,
    rank: Rank = 0,
    world_size: WorldSize = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in the output folder.")] = False,
    *,
    options: ModelOptions,
) -> None:
    """Relax many structures, in batches; list what happened to each."""
    with user_errors():
        from dpa4.simulation.screen import screen as run
        from dpa4.simulation.torchsim import DPA4Model

        potential = DPA4Model(model, **options)
        result = run(
            structures, potential, output, fmax=fmax, steps=steps, cell=cell, pressure=pressure, max_edges=max_edges,
            rank=rank, world_size=world_size, resume=resume,
        )  # fmt: skip
    report(result, output, rank, world_size, "go on with --resume")


def report(result: "Screening", output: Path, rank: int, world_size: int, how_to_go_on: str) -> None:
    """Tell what became of the structures."""
    console.print(", ".join(f"{count} {status}" for status, count in sorted(result.counts.items())) or "none")
    if result.joined:
        console.print(f"screen.csv and relaxed.xyz of {result.total} structures are in {output}/")
    elif result.finished:
        console.print(f"shard {rank} of {world_size} is finished, others are not; the last one joins them")
    else:
        console.print(f"interrupted; {how_to_go_on}")
