"""Commands that run published benchmarks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpa4.cli.options import (
    Branch,
    Commands,
    Device,
    Dtype,
    Fmax,
    Keys,
    MaxAtoms,
    Model,
    ModelOptions,
    Output,
    Steps,
    console,
    eager_potential,
    label_keys,
    one_model,
    user_errors,
    with_model_options,
)
from dpa4.cli.screen import MaxEdges, Rank, WorldSize, print_screening

if TYPE_CHECKING:
    from dpa4.leaderboards import DiscoveryScore
    from dpa4.simulation.runs.store import RunState

bench = Commands(
    help="Published benchmarks: Matbench Discovery and SPICE-MACE-OFF. After Ctrl-C, the same command continues.",
    no_args_is_help=True,
)

Data = Annotated[Path, typer.Option(help="Folder with the published files.")]
Structures = Annotated[
    Path | None, typer.Option(help="File of structures to use instead of the published ones.")
]


SINGLE = one_model("published benchmarks rank single models; run it for each member")


@bench.command()
@SINGLE
@with_model_options(committee=False)
def discovery(
    model: Model,
    data: Data = Path("bench-data"),
    structures: Structures = None,
    output: Output = Path("bench-discovery"),
    fmax: Fmax = 0.02,
    steps: Steps = 500,
    max_edges: MaxEdges = 200_000,
    rank: Rank = 0,
    world_size: WorldSize = 1,
    *,
    options: ModelOptions,
) -> None:
    """Relax the WBM test set as dpa4 screen does; report F1, DAF and RMSD of Matbench Discovery."""
    from dpa4.leaderboards import files, score_structures

    with user_errors():
        source = structures or files.locate(data, files.WBM_INITIAL)
        for file in (files.WBM_SUMMARY, files.WBM_ENTRIES, files.MP_REFERENCES):
            files.locate(data, file)
        from dpa4.interfaces.torchsim import DPA4Model
        from dpa4.simulation.screen import screen

        potential = DPA4Model(model, **options)
        result = screen(
            [source], potential, output, fmax=fmax, steps=steps, cell="full", max_edges=max_edges,
            rank=rank, world_size=world_size, resume=True,
        )  # fmt: skip
        print_screening(result, output, rank, world_size, "run the same command to continue")
        if not result.joined:
            return
        state, score = score_structures(output, data)
    _print_state(state, "formation energies")
    if score is not None:
        _print_discovery(score, output)


@bench.command()
@SINGLE
@with_model_options(dtype="float64", precision=False, committee=False)
def kappa(
    model: Model,
    data: Data = Path("bench-data"),
    structures: Structures = None,
    output: Output = Path("bench-kappa"),
    fmax: Annotated[float, typer.Option(help="Largest force of a relaxed crystal, in eV/Angstrom.")] = 1e-4,
    steps: Annotated[int, typer.Option(help="Maximum number of steps per relaxation.")] = 300,
    displacement: Annotated[float, typer.Option(help="Displacement of atoms, in Angstrom.")] = 0.03,
    *,
    options: ModelOptions,
) -> None:
    """Compute lattice thermal conductivities of 103 crystals and the metric κ_SRME of Matbench Discovery."""
    from dpa4.interfaces import DPA4Calculator
    from dpa4.leaderboards import files, run_kappa, score_kappa
    from dpa4.leaderboards.kappa import read_reference

    with user_errors():
        source = structures or files.locate(data, files.KAPPA_STRUCTURES)
        reference = read_reference(files.locate(data, files.KAPPA_REFERENCE))
        state = run_kappa(
            source, DPA4Calculator(model, **options), output, fmax=fmax, steps=steps,
            displacement=displacement,
        )  # fmt: skip
        score = score_kappa(output, reference)
    _print_state(state, "crystals computed")
    console.print(
        f"κ_SRME {score.kappa_SRME:.4f}  κ_SRE {score.kappa_SRE:.4f}  "
        f"{score.failed} of {score.materials} count as 2, {score.missing} of them not computed",
        highlight=False,
    )
    _print_differences(score.differences)
    console.print(f"kappa.csv, summary.json and kappa.png are in {output}/")


@bench.command()
@SINGLE
@with_model_options(dtype="float64", precision=False, committee=False)
def diatomics(
    model: Model,
    data: Data = Path("bench-data"),
    output: Output = Path("bench-diatomics"),
    elements: Annotated[
        str | None, typer.Option(help="Elements, such as H,C,O; by default those of the model up to U.")
    ] = None,
    *,
    options: ModelOptions,
) -> None:
    """Compute energy curves of homonuclear diatomic molecules and their metrics of Matbench Discovery."""
    from ase.data import atomic_numbers

    from dpa4.interfaces import DPA4Calculator
    from dpa4.leaderboards import files, run_diatomics, score_diatomics
    from dpa4.leaderboards.diatomics import HEAVIEST, read_reference

    with user_errors():
        calculator = DPA4Calculator(model, **options)
        own = [e for e in calculator.potentials[0].elements if atomic_numbers[e] <= HEAVIEST]
        symbols = elements.split(",") if elements else own
        try:
            reference = read_reference(files.locate(data, files.DIATOMICS_REFERENCE))
        except FileNotFoundError as error:
            console.print(f"no comparison with DFT: {error}")
            reference = None
        state = run_diatomics(symbols, calculator, output)
        _print_state(state, "curves")
        score = score_diatomics(output, reference)
    for name, value in score.metrics.items():
        console.print(f"{name} {value:.4g}", highlight=False)
    console.print(f"coverage {score.coverage:.3f}  CDS {score.CDS:.4f}", highlight=False)
    console.print(f"curves.csv, metrics.csv, summary.json and diatomics.png are in {output}/")


@bench.command()
@SINGLE
def spice(
    model: Model,
    structures: Annotated[
        Path | None, typer.Argument(help="Labelled structures; by default the test set in --data.")
    ] = None,
    data: Data = Path("bench-data"),
    output: Output = Path("bench-spice"),
    keys: Keys = None,
    max_atoms: MaxAtoms = 2000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    branch: Branch = None,
) -> None:
    """Compute errors of energies and forces by subset (config_type), and their logarithmic mean."""
    from dpa4.data import read_frames
    from dpa4.leaderboards import files, run_spice, score_spice

    with user_errors():
        frames = read_frames(structures or files.locate(data, files.SPICE_TEST), label_keys(keys))
        potential = eager_potential(model, device, dtype, branch)
        state = run_spice(potential, frames, output, max_atoms=max_atoms)
        _print_state(state, "batches")
        if state.interrupted:
            return
        score = score_spice(output)
    console.print(score.to_rich())
    console.print(f"errors.csv, structures.csv, summary.json and errors.png are in {output}/")


@bench.command("yaml")
@SINGLE
def submission(
    model: Model,
    metadata: Annotated[
        Path, typer.Option(help="YAML file with names, authors and licences; see docs/bench.md.")
    ],
    discovery: Annotated[Path | None, typer.Option(help="Output folder of dpa4 bench discovery.")] = None,
    kappa: Annotated[Path | None, typer.Option(help="Output folder of dpa4 bench kappa.")] = None,
    diatomics: Annotated[Path | None, typer.Option(help="Output folder of dpa4 bench diatomics.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the submission.")] = Path(
        "submission"
    ),
    branch: Branch = None,
) -> None:
    """Write the YAML file and the artifacts of a submission to Matbench Discovery."""
    from dpa4.leaderboards.submission import read_metadata, write_submission
    from dpa4.potential import fingerprint_of, load_potential

    with user_errors():
        path, score = write_submission(
            model, read_metadata(metadata), output,
            discovery=discovery, kappa=kappa, diatomics=diatomics, branch=branch,
            fingerprint=fingerprint_of(load_potential(model, branch=branch))["model"],
        )  # fmt: skip
    console.print(f"wrote {path} and its artifacts")
    if score is not None:
        console.print(f"CPS {score:.4f}", highlight=False)


def _print_discovery(score: "DiscoveryScore", output: Path) -> None:
    for subset, found in score.stability.items():
        console.print(
            f"{subset}: F1 {found.F1:.3f}  DAF {found.DAF:.3f}  precision {found.Precision:.3f}  "
            f"recall {found.Recall:.3f}  MAE {1e3 * found.MAE:.1f} meV/atom  missing {found.missing_preds}",
            highlight=False,
        )
    console.print(f"RMSD {score.rmsd:.4f}", highlight=False)
    _print_differences(score.differences)
    console.print(f"discovery.csv, summary.json and hull.png are in {output}/")


def _print_differences(found: tuple[str, ...]) -> None:
    for difference in found:
        console.print(f"differs from the leaderboard: {difference}", highlight=False)


def _print_state(state: "RunState", items: str) -> None:
    failed = f"{state.failed} failed ({state.reason})" if state.failed else "none failed"
    end = ", interrupted; run the same command to continue" if state.interrupted else ""
    console.print(f"{state.done} {items}, {failed}{end}")
