"""Commands that prepare training data."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import track

from dpa4.cli.options import Commands, Keys, OverwriteFile, console, label_keys, say_next, user_errors
from dpa4.output import counted

if TYPE_CHECKING:
    from dpa4.data import Frame
    from dpa4.data.conversion import Entry, Written

data = Commands(help="Prepare training data.", no_args_is_help=True)

LISTED_REASONS = 40

Files = Annotated[
    list[Path],
    typer.Argument(help="Files, folders or patterns such as 'runs/*/OUTCAR', in any format that ASE reads."),
]
Database = Annotated[Path, typer.Option("--output", "-o", help="File .aselmdb to write; must not exist.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Write without asking.")]


@data.command()
def collect(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="Extended XYZ file to write.")] = Path(
        "train.xyz"
    ),
    keys: Keys = None,
    overwrite: OverwriteFile = False,
) -> None:
    """Collect the labelled structures of many calculations in one extended XYZ file, and list what was found."""
    from dpa4.data import warn_of_implausible_labels, without_isolated_atoms
    from dpa4.data.collection import collect as run
    from dpa4.data.readers import skipped_lines
    from dpa4.data.sources import find_sources

    with user_errors():
        sources = find_sources(files)
        console.print(sources.text, soft_wrap=True)
        found = run(sources, output, label_keys(keys), _with_progress, overwrite)
        console.print(found.table())
        for line in skipped_lines(found.skipped, LISTED_REASONS):
            console.print(f"left out: {line}", soft_wrap=True, highlight=False)
        if implausible := warn_of_implausible_labels(without_isolated_atoms(found.frames)):
            console.print(implausible)
        if not found.frames:
            raise ValueError(
                f"no structure to use in {counted(len(found.files), 'file')}; {output} is not written"
            )
    console.print(
        f"wrote {output}: {counted(len(found.frames), 'structure')}", soft_wrap=True, highlight=False
    )
    say_next(f"dpa4 init run.yaml --train {output}")


@data.command()
def info(files: Files, keys: Keys = None) -> None:
    """Show size, elements, labels, charges and spins of data; of .aselmdb files from their index."""
    from dpa4.data import are_streamed, open_streamed, read_frames, summarize, unusable_text
    from dpa4.data.sources import find_sources
    from dpa4.data.summary import charge_spin_text

    with user_errors():
        sources = find_sources(files)
        frames: Sequence[Frame]
        if are_streamed(sources.paths):
            frames = opened = open_streamed(sources.paths, label_keys(keys))
            if lost := unusable_text(opened):
                console.print(lost, style="yellow", highlight=False, markup=False, soft_wrap=True)
        else:
            frames = read_frames(sources, label_keys(keys))
        console.print(summarize({"all": frames}))
        console.print(charge_spin_text(frames), highlight=False, soft_wrap=True)


@data.command()
def convert(
    files: Files, output: Database, keys: Keys = None, overwrite: OverwriteFile = False, yes: Yes = False
) -> None:
    """Convert the labelled structures of one or more files to one .aselmdb file, which merges them."""
    from dpa4.data.conversion import write_lmdb
    from dpa4.data.sources import find_sources
    from dpa4.output import check_replaceable

    with user_errors():
        check_replaceable(output, overwrite)
        sources = find_sources(files)
        console.print(sources.text, soft_wrap=True)
        _confirm(f"write the labelled structures of {len(sources.paths)} files to {output}", yes)
        _report(write_lmdb(sources.paths, [output], keys=label_keys(keys), progress=_entries))


@data.command()
def split(
    files: Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for train.aselmdb and validation.aselmdb.")
    ],
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the structures, formulas or values for validation.")
    ] = 0.1,
    by: Annotated[
        str, typer.Option(help="structure, formula, or an entry of atoms.info whose values stay together.")
    ] = "structure",
    seed: Annotated[int, typer.Option(help="Seed of the random choice.")] = 0,
    keys: Keys = None,
    overwrite: OverwriteFile = False,
    yes: Yes = False,
) -> None:
    """Split data at random into two .aselmdb files, for training and validation."""
    from dpa4.data.conversion import entries, is_labelled, part_by, write_lmdb
    from dpa4.data.sources import find_sources
    from dpa4.output import check_replaceable

    with user_errors():
        outputs = [output / "train.aselmdb", output / "validation.aselmdb"]
        for file in outputs:
            check_replaceable(file, overwrite)
        paths = find_sources(files).paths
        rule = part_by(by, fraction, seed)
        counts = [0, 0]
        for number, entry in enumerate(_entries(entries(paths, label_keys(keys)))):
            if is_labelled(entry):
                counts[rule(number, entry)] += 1
        _confirm(f"write {counts[0]} structures to {outputs[0]} and {counts[1]} to {outputs[1]}", yes)
        output.mkdir(parents=True, exist_ok=True)
        _report(write_lmdb(paths, outputs, rule, label_keys(keys), _entries))


@data.command()
def check(
    files: Files,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File .aselmdb for the structures without a finding; by default none."
        ),
    ] = None,
    keys: Keys = None,
    overwrite: OverwriteFile = False,
    yes: Yes = False,
) -> None:
    """Look for duplicates, outliers, short distances, labels that disagree or have wrong units; changes nothing."""
    from dpa4.data.checking import check as run
    from dpa4.data.conversion import write_lmdb
    from dpa4.data.sources import find_sources
    from dpa4.output import check_replaceable

    with user_errors():
        if output is not None:
            check_replaceable(output, overwrite)
        paths = find_sources(files).paths
        found = run(paths, label_keys(keys), _entries)
        console.print(found.table() if found.reasons else "no structure needs to be left out")
        if found.implausible:
            console.print(found.implausible)
        console.print(
            f"{len(found.reasons)} of {found.structures} structures would be left out; fit of energies and search "
            f"for wrong units with {found.sample} structures",
            soft_wrap=True,
            highlight=False,
        )
        if output is not None:
            _confirm(f"write the {found.structures - len(found.reasons)} others to {output}", yes)
            _report(write_lmdb(paths, [output], found.part, label_keys(keys), _entries))


def _confirm(change: str, yes: bool) -> None:
    """Say what will be written; ask if somebody can answer."""
    console.print(change, soft_wrap=True, highlight=False)
    if not yes and sys.stdin.isatty() and not typer.confirm("continue?", default=True):
        raise typer.Exit(1)


def _report(written: "Written") -> None:
    for path, count in written.files.items():
        console.print(f"wrote {path}: {count} structures", soft_wrap=True, highlight=False)
    if written.left_out:
        console.print(
            f"left out: {written.left_out} structures; the first: {written.first_reason}",
            style="yellow",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def _entries(found: "Iterable[Entry]") -> "Iterable[Entry]":
    return track(found, "structures", console=console, transient=True, disable=not console.is_terminal)


def _with_progress(paths: Sequence[Path]) -> Iterable[Path]:
    return track(paths, "reading", console=console, transient=True, disable=not console.is_terminal)
