"""Command that runs molecular dynamics."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpa4.cli.options import (
    Model,
    ModelOptions,
    Output,
    Overwrite,
    Resume,
    Skin,
    console,
    last_image,
    user_errors,
    with_model_options,
)


@with_model_options()
def md(
    model: Model,
    structure: Annotated[
        Path, typer.Argument(help="Initial structure, in any format ASE reads; the last image is used.")
    ],
    steps: Annotated[
        int, typer.Option(help="Number of steps of the whole run, including those before --resume.")
    ],
    output: Output = Path("md"),
    ensemble: Annotated[
        Literal["nve", "langevin", "nvt", "npt"],
        typer.Option(help="nve, langevin, nvt (Nose-Hoover chains) or npt (Martyna-Tobias-Klein)."),
    ] = "nve",
    temperature: Annotated[
        float, typer.Option(help="Temperature of the initial velocities and the thermostat, in K.")
    ] = 300.0,
    timestep: Annotated[float, typer.Option(help="Time step, in fs.")] = 0.5,
    friction: Annotated[float, typer.Option(help="Friction of the Langevin thermostat, in 1/fs.")] = 0.01,
    tdamp: Annotated[float, typer.Option(help="Time constant of the thermostat (nvt, npt), in fs.")] = 100.0,
    pressure: Annotated[float, typer.Option(help="External pressure (npt), in GPa.")] = 0.0,
    pdamp: Annotated[float, typer.Option(help="Time constant of the barostat (npt), in fs.")] = 1000.0,
    cell: Annotated[
        Literal["volume", "full"],
        typer.Option(help="Cell degrees of freedom of npt: volume only, or full (all lengths and angles)."),
    ] = "volume",
    interval: Annotated[int, typer.Option(help="Steps between frames and between rows of thermo.csv.")] = 10,
    skin: Skin = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    save_above: Annotated[
        float | None,
        typer.Option(
            help="Committee: save frames whose largest force deviation is above this, in eV/Angstrom."
        ),
    ] = None,
    stop_above: Annotated[
        float | None,
        typer.Option(help="Committee: stop when the largest force deviation is above this, in eV/Angstrom."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    *,
    options: ModelOptions,
) -> None:
    """Run molecular dynamics at constant energy, temperature or pressure."""
    from dpa4.interfaces import DPA4Calculator
    from dpa4.simulation import run_md

    with user_errors():
        atoms = last_image(structure)
        calculator = DPA4Calculator(model, **options, neighbor_skin=skin)
        result = run_md(
            atoms, calculator, output, steps=steps, ensemble=ensemble, temperature=temperature, timestep=timestep,
            friction=friction, tdamp=tdamp, pressure=pressure, pdamp=pdamp, cell=cell, interval=interval, seed=seed,
            save_above=save_above, stop_above=stop_above, resume=resume, overwrite=overwrite,
        )  # fmt: skip
    end = "finished" if result.finished else "stopped"
    if result.exceeded is not None:
        console.print(
            f"largest force deviation {result.exceeded:.3f} eV/Å, above --stop-above {stop_above:g}",
            highlight=False,
        )
    how_to_continue = "" if result.finished else "; continue with --resume"
    console.print(f"{end} after {result.steps} steps{how_to_continue}")
    console.print(f"mean temperature {result.temperature:.1f} K", highlight=False)
    if result.density is not None:
        console.print(f"mean density {result.density:.4f} g/cm3", highlight=False)
    if result.drift is not None:
        console.print(
            f"energy drift {result.drift:+.4f} meV/atom/ps, largest deviation {result.deviation:.3f} meV/atom"
        )
    if result.max_force_std is not None:
        console.print(f"largest force deviation {result.max_force_std:.3f} eV/Å", highlight=False)
    if result.saved:
        console.print(f"{result.saved} uncertain frames are in {output}/uncertain.xyz", highlight=False)
    console.print(f"trajectory.xyz, thermo.csv and thermo.png are in {output}/")
