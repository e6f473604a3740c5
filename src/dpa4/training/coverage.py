"""Coverage of the training data of a run, collected while the first epoch builds its graphs."""

from pathlib import Path

from rich.console import Console

from dpa4.data import coverage_of
from dpa4.potential.checkpoint import add_coverage
from dpa4.training.prepare import Preparation

MISSING = 100_000
"""Largest number of structures whose graphs a run builds at its end only for the coverage: a minute or two."""

MISSING_WHEN_STOPPED = 5_000
"""The same for a run that was told to stop: a few seconds."""


class RunCoverage:
    """Passes the coverage of the training data to the potential of a run and to its files.

    Until every structure was used, they know the elements, but no distances: the shortest distances of a part of the
    data would be too long, and simulations would warn of atoms that are no closer than in the data.

    A resumed run starts again, because its graphs are built again as well.
    """

    def __init__(self, preparation: Preparation, folder: Path, console: Console):
        self.collector, self.dataset = preparation.coverage, preparation.train.dataset
        self.potential, self.folder, self.console = preparation.potential, folder, console
        self.potential.coverage = self.collector.coverage
        self._told = False

    def update(self) -> None:
        """Pass the distances on as soon as every structure was used; to be called in every step."""
        if self._told or not self.collector.complete:
            return
        self._told = True
        self.potential.coverage = self.collector.coverage
        for name in ("best.safetensors", "last.safetensors"):
            if (path := self.folder / name).is_file():
                add_coverage(path, self.potential.coverage)
        self._say(self.potential.coverage.text)

    def finish(self, stopped: bool) -> None:
        """Use the missing structures at the end of a run, unless there are too many.

        Args:
            stopped: Whether the run was told to stop, and can be resumed.
        """
        missing = len(self.collector.missing)
        if missing <= (MISSING_WHEN_STOPPED if stopped else MISSING):
            try:
                coverage_of(self.dataset, self.collector)
            except ValueError as error:
                self._say(f"not known ({error})")
            self.update()
        elif not stopped:
            self._say(
                f"not known, since training did not use {missing} of {len(self.dataset)} structures; simulations "
                "will not warn of closer atoms"
            )

    def _say(self, text: str) -> None:
        self.console.print(f"closest atoms of the training data: {text}", highlight=False, markup=False)
