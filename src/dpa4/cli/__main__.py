"""Entry point of ``python -m dpa4.cli``."""

from dpa4.cli import app

app()
