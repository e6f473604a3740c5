"""Command that selects structures to label."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import (
    Branch,
    Device,
    Dtype,
    MaxAtoms,
    Output,
    Overwrite,
    check_unused,
    console,
    eager_potentials,
    sources_and_structures,
    user_errors,
)


def select(
    structures: Annotated[
        list[Path], typer.Argument(help="Files of candidates, such as trajectories, in any format ASE reads.")
    ],
    model: Annotated[
        list[Path],
        typer.Option("--model", help="Model; repeat it, or give the output folder of a committee."),
    ],
    number: Annotated[int, typer.Option("--number", "-n", help="Number of structures to select.")],
    output: Output = Path("select"),
    above: Annotated[
        float, typer.Option(help="Smallest force deviation of a candidate, in eV/Angstrom.")
    ] = 0.0,
    below: Annotated[
        float | None, typer.Option(help="Largest force deviation of a candidate, in eV/Angstrom.")
    ] = None,
    known: Annotated[
        list[Path] | None,
        typer.Option(help="File of structures with labels, to differ from; may be repeated."),
    ] = None,
    max_atoms: MaxAtoms = 2000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
    overwrite: Overwrite = False,
) -> None:
    """Select structures to label, by the deviation of a committee and by diversity."""
    from dpa4.simulation.selection import select as run

    with user_errors():
        check_unused(output, "selected.xyz", overwrite)
        sources, candidates = sources_and_structures(structures)
        _, labelled = sources_and_structures(known or [])
        potentials = eager_potentials(model, device, dtype, branch)
        found = run(
            candidates, potentials, output, number=number, above=above, known=labelled, sources=sources,
            below=float("inf") if below is None else below, max_atoms=max_atoms,
        )  # fmt: skip
    count = len(found.chosen)
    if found.deviations is None:
        console.print("one model has no deviation: selected by diversity alone")
    else:
        chosen = found.deviations[found.chosen]
        console.print(
            f"largest force deviations {chosen.min():.3f} to {chosen.max():.3f} eV/Å, of all candidates "
            f"{found.deviations.min():.3f} to {found.deviations.max():.3f} eV/Å",
            highlight=False,
        )
    if count < number:
        console.print(f"{count} instead of {number}: there are no more different candidates")
    console.print(
        f"{count} of {found.candidates} candidates are in {output}/selected.xyz; selection.csv and selection.png are "
        "beside it",
        highlight=False,
    )
