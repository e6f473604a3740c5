"""Entry point of ``python -m dpa4``."""

from dpa4.cli import app

app(prog_name="dpa4")
