"""Command that computes reaction barriers."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import (
    Model,
    ModelOptions,
    Output,
    Overwrite,
    Resume,
    console,
    last_image,
    user_errors,
    with_model_options,
)


@with_model_options()
def neb(
    model: Model,
    start: Annotated[Path, typer.Argument(help="Initial minimum; the last image of the file is used.")],
    end: Annotated[Path, typer.Argument(help="Final minimum, with the atoms in the same order.")],
    output: Output = Path("neb"),
    images: Annotated[int, typer.Option(help="Number of images between start and end.")] = 7,
    fmax: Annotated[float, typer.Option(help="Largest force of a converged band, in eV/Angstrom.")] = 0.05,
    steps: Annotated[
        int, typer.Option(help="Maximum number of steps, including those before --resume.")
    ] = 500,
    spring: Annotated[float, typer.Option(help="Spring constant between images, in eV/Angstrom^2.")] = 0.1,
    relax_ends: Annotated[bool, typer.Option("--relax-ends", help="Relax start and end first.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    *,
    options: ModelOptions,
) -> None:
    """Find a minimum energy path and its barrier with the climbing-image nudged elastic band method."""
    from dpa4.interfaces import DPA4Calculator
    from dpa4.simulation import run_neb

    with user_errors():
        first, last = (last_image(file) for file in (start, end))
        calculator = DPA4Calculator(model, **options)
        result = run_neb(
            first, last, calculator, output, images=images, fmax=fmax, steps=steps, spring=spring,
            relax_ends=relax_ends, resume=resume, overwrite=overwrite,
        )  # fmt: skip
    state = "converged" if result.converged else "interrupted" if result.interrupted else "not converged"
    console.print(f"{state} after {result.steps} steps, largest force {result.max_force:.3f} eV/Å")
    if result.interrupted:
        console.print("continue with --resume")
    console.print(
        f"barrier {result.barrier:.4f} eV, reverse barrier {result.reverse_barrier:.4f} eV, reaction energy "
        f"{round(result.reaction_energy, 4) + 0.0:.4f} eV",
        highlight=False,
    )
    console.print(f"path.xyz, path.csv, path.png and neb.csv are in {output}/")
