"""Command that writes embeddings of atoms."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import (
    Branch,
    Device,
    Dtype,
    MaxAtoms,
    Model,
    OverwriteFile,
    Structures,
    console,
    eager_potential,
    one_model,
    read_structures,
    user_errors,
)


@one_model("the axes of embeddings differ from model to model")
def embed(
    model: Model,
    structures: Structures,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Output file: .npz, or .xyz for structures with their embeddings."
        ),
    ] = Path("embeddings.npz"),
    mean: Annotated[
        bool, typer.Option("--mean", help="Write one vector per structure, the mean over its atoms.")
    ] = False,
    max_atoms: MaxAtoms = 2000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
    overwrite: OverwriteFile = False,
) -> None:
    """Write the embedding of every atom: its invariant features after the last block."""
    from dpa4.output import check_replaceable, counted
    from dpa4.potential import write_embeddings

    with user_errors():
        check_replaceable(output, overwrite)
        images = read_structures(structures)
        potential = eager_potential(model, device, dtype, branch)
        write_embeddings(potential, images, output, mean=mean, max_atoms=max_atoms)
    what = counted(len(images), "structure") if mean else counted(sum(map(len, images)), "atom")
    console.print(f"{potential.config.channels} features of {what} are in {output}")
