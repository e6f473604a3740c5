"""Command that computes pair curves."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import (
    Branch,
    Device,
    Dtype,
    Model,
    Output,
    console,
    eager_potential,
    one_model,
    user_errors,
)


@one_model("pair curves show faults of one network, which a mean would hide; run the command for each member")
def pairs(
    model: Model,
    output: Output = Path("pairs"),
    pairs: Annotated[
        str | None,
        typer.Option(help="Pairs, such as Si-O,O-O; by default every pair of elements of the model."),
    ] = None,
    start: Annotated[
        float, typer.Option(help="Shortest distance, in Angstrom; the longest is the cutoff.")
    ] = 0.2,
    step: Annotated[float, typer.Option(help="Spacing of the distances, in Angstrom.")] = 0.02,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
) -> None:
    """Compute energy, force and curvature of two isolated atoms over their distance, and flag problems."""
    from dpa4.simulation.pair_curves import ADVICE, parse_pairs, scan_pairs

    with user_errors():
        chosen = None if pairs is None else parse_pairs(pairs)
        potential = eager_potential(model, device, dtype, branch)
        scan = scan_pairs(potential, output, chosen, start=start, step=step)
    for diagnosis in scan.flagged:
        console.print(f"{diagnosis.pair}: {', '.join(diagnosis.flags)}")
    for flag in dict.fromkeys(flag for diagnosis in scan.flagged for flag in diagnosis.flags):
        console.print(f"{flag}: {ADVICE[flag]}")
    console.print(
        f"{len(scan.flagged)} of {len(scan.curves)} pairs flagged; pairs.csv, pairs.json and figures are in "
        f"{output}/"
    )
    if not scan.finished:
        console.print("interrupted; run the same command to continue")
