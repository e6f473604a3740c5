"""Command that relaxes structures one by one."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpa4.cli.options import (
    Fmax,
    Model,
    ModelOptions,
    Output,
    Overwrite,
    Resume,
    Steps,
    Structures,
    Symprec,
    console,
    read_structures,
    user_errors,
    with_model_options,
)

MAX_PRINTED = 10
"""Largest number of structures that could not be relaxed whose reasons are printed."""


@with_model_options()
def relax(
    model: Model,
    structures: Structures,
    output: Output = Path("relax"),
    fmax: Fmax = 0.02,
    steps: Steps = 500,
    optimizer: Annotated[
        Literal["fire", "bfgs", "lbfgs"], typer.Option(help="Optimisation algorithm.")
    ] = "fire",
    cell: Annotated[
        Literal["fixed", "full", "volume", "shape", "xy", "z"],
        typer.Option(help="Cell degrees of freedom to relax; xy: in-plane strain, z: out-of-plane strain."),
    ] = "fixed",
    pressure: Annotated[float, typer.Option(help="External pressure, in GPa.")] = 0.0,
    symmetry: Annotated[bool, typer.Option("--symmetry", help="Preserve the space group.")] = False,
    symprec: Symprec = 0.01,
    resume: Resume = False,
    overwrite: Overwrite = False,
    *,
    options: ModelOptions,
) -> None:
    """Relax every structure of a file."""
    from dpa4.interfaces import DPA4Calculator
    from dpa4.simulation import relax_all

    with user_errors():
        images = read_structures(structures)
        calculator = DPA4Calculator(model, **options)
        results = relax_all(
            images, calculator, output, resume=resume, overwrite=overwrite, fmax=fmax, steps=steps,
            optimizer=optimizer, cell=cell, pressure=pressure, symmetry=symmetry, symprec=symprec,
        )  # fmt: skip
    failures = {number: result.failure for number, result in enumerate(results) if result.failure}
    for number in list(failures)[:MAX_PRINTED]:
        console.print(f"structure {number} not relaxed: {failures[number]}", highlight=False, soft_wrap=True)
    if len(failures) > MAX_PRINTED:
        console.print(f"{len(failures)} structures not relaxed; relax.csv has all reasons")
    converged = sum(result.converged for result in results)
    console.print(
        f"{converged} of {len(images)} structures converged; relaxed.xyz, relax.csv and relax.png are in {output}/"
    )
    if len(results) < len(images) or results[-1].interrupted:
        console.print("interrupted; continue with --resume")
    elif len(failures) == len(images):
        raise typer.Exit(1)
