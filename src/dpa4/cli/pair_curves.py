"""Pair curves on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from dpa4.cli.options import Branch, Device, Dtype, Model, Output, console, eager_potential, user_errors


def dimer(
    model: Model,
    output: Output = Path("dimer"),
    pairs: Annotated[
        str | None, typer.Option(help="Such as Si-O,O-O; by default every pair of the model.")
    ] = None,
    start: Annotated[
        float, typer.Option(help="Shortest distance, in Angstrom; the longest is the cutoff.")
    ] = 0.2,
    step: Annotated[float, typer.Option(help="Between distances, in Angstrom.")] = 0.02,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
) -> None:
    """Pair curves: energy, force, curvature of two atoms against distance (not the dimer saddle-point method)."""
    from dpa4.simulation.pair_curves import parse_pairs, scan_pairs

    with user_errors():
        wanted = None if pairs is None else parse_pairs(pairs)
        potential = eager_potential(model, device, dtype, branch)
        scan = scan_pairs(potential, output, wanted, start=start, step=step)
    for diagnosis in scan.flagged:
        console.print(f"{diagnosis.pair}: {', '.join(diagnosis.flags)}")
    console.print(
        f"{len(scan.flagged)} of {len(scan.curves)} pairs flagged; pairs.csv, pairs.json and figures are in "
        f"{output}/"
    )
    if not scan.finished:
        console.print("interrupted; the same command goes on")
