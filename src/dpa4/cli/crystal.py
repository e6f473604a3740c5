"""Commands that compute properties of crystals: equation of state, elastic tensor, phonons."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dpa4.cli.options import (
    Model,
    ModelOptions,
    Output,
    Overwrite,
    Symprec,
    console,
    last_image,
    user_errors,
    with_model_options,
)

Crystal = Annotated[Path, typer.Argument(help="Crystal, in any format ASE reads; the last image is used.")]
RelaxFirst = Annotated[bool, typer.Option("--relax/--no-relax", help="Relax positions and cell first.")]
Fmax = Annotated[float, typer.Option(help="Largest force of relaxed structures, in eV/Angstrom.")]
Steps = Annotated[int, typer.Option(help="Maximum number of steps per relaxation.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Reuse results of an earlier run in the output folder.")
]


@with_model_options(dtype="float64", precision=False)
def eos(
    model: Model,
    crystal: Crystal,
    output: Output = Path("eos"),
    points: Annotated[int, typer.Option(help="Number of volumes.")] = 11,
    span: Annotated[float, typer.Option(help="Largest change of the volume, as a fraction.")] = 0.1,
    shape: Annotated[
        bool, typer.Option("--shape", help="Relax the shape of the cell at every volume.")
    ] = False,
    relax: RelaxFirst = True,
    fmax: Fmax = 1e-4,
    steps: Steps = 500,
    resume: Resume = False,
    overwrite: Overwrite = False,
    *,
    options: ModelOptions,
) -> None:
    """Fit the Birch-Murnaghan equation of state to energies at several volumes."""
    from dpa4.interfaces import DPA4Calculator
    from dpa4.simulation import equation_of_state

    with user_errors():
        atoms = last_image(crystal)
        calculator = DPA4Calculator(model, **options)
        result = equation_of_state(
            atoms, calculator, output, points=points, span=span, shape=shape, relax_first=relax, fmax=fmax,
            steps=steps, resume=resume, overwrite=overwrite,
        )  # fmt: skip
    lengths = ", ".join(f"{length:.4f}" for length in result.lengths)
    console.print(f"volume {result.volume:.3f} Å³, cell vectors {lengths} Å", highlight=False)
    console.print(
        f"energy {result.energy:.6f} eV, {result.rms:.3f} meV/atom rms deviation from the curve",
        highlight=False,
    )
    console.print(
        f"bulk modulus {result.bulk_modulus:.1f} GPa, its derivative {result.bulk_modulus_derivative:.2f}",
        highlight=False,
    )
    console.print(f"eos.csv, eos.json, eos.png and eos.xyz are in {output}/")


@with_model_options(dtype="float64", precision=False)
def elastic(
    model: Model,
    crystal: Crystal,
    output: Output = Path("elastic"),
    strain: Annotated[float, typer.Option(help="Largest strain.")] = 0.01,
    relax: RelaxFirst = True,
    fmax: Fmax = 1e-4,
    steps: Steps = 500,
    resume: Resume = False,
    overwrite: Overwrite = False,
    *,
    options: ModelOptions,
) -> None:
    """Compute the elastic tensor and the elastic moduli of a polycrystal."""
    from dpa4.interfaces import DPA4Calculator
    from dpa4.simulation import elastic_tensor

    with user_errors():
        atoms = last_image(crystal)
        calculator = DPA4Calculator(model, **options)
        result = elastic_tensor(
            atoms, calculator, output, strain=strain, relax_first=relax, fmax=fmax, steps=steps, resume=resume,
            overwrite=overwrite,
        )  # fmt: skip
    names = ("xx", "yy", "zz", "yz", "xz", "xy")
    table = Table("GPa", *names)
    for name, row in zip(names, result.stiffness, strict=True):
        table.add_row(name, *(f"{value + 0.0:.1f}" for value in row.round(1)))  # no -0.0
    console.print(table)
    if result.moduli is None:
        console.print("not stable: the stiffness matrix is not positive definite")
    else:
        moduli = result.moduli
        console.print(
            f"bulk {moduli.bulk:.1f}, shear {moduli.shear:.1f}, Young {moduli.young:.1f} GPa, Poisson "
            f"{moduli.poisson:.3f} (Hill)",
            highlight=False,
        )
    console.print(f"elastic.csv, stresses.csv, elastic.json and elastic.png are in {output}/")


@with_model_options(dtype="float64", precision=False)
def phonon(
    model: Model,
    crystal: Crystal,
    output: Output = Path("phonon"),
    supercell: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Multiples of the cell vectors; by default chosen by --min-length."),
    ] = None,
    min_length: Annotated[float, typer.Option(help="Smallest width of the supercell, in Angstrom.")] = 12.0,
    displacement: Annotated[float, typer.Option(help="Displacement of atoms, in Angstrom.")] = 0.01,
    mesh: Annotated[
        float, typer.Option(help="Length that sets the density of the q-point mesh, in Angstrom.")
    ] = 100.0,
    max_temperature: Annotated[
        float, typer.Option(help="Highest temperature of the thermal properties, in K.")
    ] = 1000.0,
    symprec: Symprec = 1e-3,
    relax: RelaxFirst = True,
    fmax: Fmax = 1e-4,
    steps: Steps = 500,
    resume: Resume = False,
    overwrite: Overwrite = False,
    *,
    options: ModelOptions,
) -> None:
    """Compute phonon bands, density of states and thermal properties."""
    from dpa4.interfaces import DPA4Calculator
    from dpa4.simulation import phonons

    with user_errors():
        atoms = last_image(crystal)
        calculator = DPA4Calculator(model, **options)
        result = phonons(
            atoms, calculator, output, supercell=supercell, min_length=min_length, displacement=displacement,
            mesh=mesh, max_temperature=max_temperature, symprec=symprec, relax_first=relax, fmax=fmax, steps=steps,
            resume=resume, overwrite=overwrite,
        )  # fmt: skip
    size = " x ".join(map(str, result.supercell))
    console.print(f"supercell {size}, displacements: {result.displacements}", highlight=False)
    lowest = round(result.min_frequency, 3) + 0.0  # no -0.000
    console.print(f"frequencies {lowest:.3f} to {result.max_frequency:.3f} THz", highlight=False)
    if result.imaginary:
        console.print("imaginary modes: the crystal is not dynamically stable, or the supercell is too small")
    if result.heat_capacity is not None:
        console.print(f"heat capacity {result.heat_capacity:.2f} J/(K mol) at 300 K", highlight=False)
    console.print(
        f"phonon.png, thermal.png, band.yaml, dos.csv, thermal.csv and phonopy_params.yaml are in {output}/"
    )
