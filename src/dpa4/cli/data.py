"""Commands that prepare training data."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from dpa4.cli.options import Commands, Keys, OverwriteFile, console, label_keys, say_next, user_errors
from dpa4.output import counted

data = Commands(help="Prepare training data.", no_args_is_help=True)

LISTED_REASONS = 40


@data.callback()
def _group() -> None:
    """Make ``collect`` the name of a command although the group has no other command yet."""


@data.command()
def collect(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Files, folders or patterns such as 'runs/*/OUTCAR', in any format that ASE reads."
        ),
    ],
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


def _with_progress(paths: Sequence[Path]) -> Iterable[Path]:
    return track(paths, "reading", console=console, transient=True, disable=not console.is_terminal)
