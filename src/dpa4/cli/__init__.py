"""The dpa4 command line; each command is a thin layer over a library function."""

from dpa4.cli.bench import bench
from dpa4.cli.check import check
from dpa4.cli.crystal import elastic, eos, phonon
from dpa4.cli.data import data
from dpa4.cli.dynamics import md
from dpa4.cli.embed import embed
from dpa4.cli.finetune import finetune
from dpa4.cli.lammps import lammps
from dpa4.cli.models import convert, info
from dpa4.cli.neb import neb
from dpa4.cli.options import Commands, exit_after_signal, prepare_terminal
from dpa4.cli.pair_curves import pairs
from dpa4.cli.relax import relax
from dpa4.cli.report import report
from dpa4.cli.screen import screen
from dpa4.cli.select import select
from dpa4.cli.training import evaluate_command, init, train

app = Commands(
    help="Train and run DPA4 interatomic potentials. Units: eV and Angstrom.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
    callback=prepare_terminal,
    result_callback=exit_after_signal,
)
app.command()(init)
app.command()(finetune)
app.command()(train)
app.command("eval")(evaluate_command)
app.command()(convert)
app.command()(info)
app.command()(check)
app.command()(md)
app.command()(relax)
app.command()(eos)
app.command()(elastic)
app.command()(phonon)
app.command()(embed)
app.command()(select)
app.command()(pairs)
app.command("dimer", hidden=True)(pairs)  # earlier name
app.command()(neb)
app.command()(lammps)
app.command()(report)
app.command()(screen)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
