"""The dpa4 command; every command is a thin layer over a library function."""

import typer

from dpa4.cli.dynamics import md
from dpa4.cli.models import convert, info
from dpa4.cli.relax import relax
from dpa4.cli.training import evaluate_command, init, train

app = typer.Typer(
    help="Train and run DPA4 interatomic potentials. Units: eV and Angstrom.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(init)
app.command()(train)
app.command("eval")(evaluate_command)
app.command()(convert)
app.command()(info)
app.command()(md)
app.command()(relax)
