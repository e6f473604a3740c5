"""Coverage of the training data of a run, collected while the first epoch builds its graphs."""

from pathlib import Path

from rich.console import Console

from dpa4.data import coverage_of
from dpa4.data.coverage import Coverage
from dpa4.potential.checkpoint import add_coverage
from dpa4.training.prepare import Preparation

MISSING = 100_000
"""Maximum number of graphs that a finished run builds for the coverage alone, which takes a minute or two."""

MISSING_WHEN_STOPPED = 5_000
"""Maximum number of graphs that a stopped run builds for the coverage, which takes a few seconds."""


class RunCoverage:
    """Stores the coverage of the training data in the potential of a run and in its files.

    Until every structure was used, only the elements are stored. The shortest distances of a part of the data would
    be too long, and simulations would warn of atoms that are no closer than in the data.

    A resumed run collects the coverage anew, because it builds its graphs anew. If it continues on other data, the
    coverage includes the earlier data.
    """

    def __init__(self, preparation: Preparation, folder: Path, console: Console):
        self.collector, self.dataset = preparation.coverage, preparation.train.dataset
        self.potential, self.folder, self.console = preparation.potential, folder, console
        self._earlier: Coverage | None = None
        self._stored = False
        self.potential.coverage = self._coverage()

    @property
    def earlier(self) -> Coverage | None:
        """Coverage of the data that the run used before its present data; None if there were none."""
        return self._earlier

    @earlier.setter
    def earlier(self, coverage: Coverage | None) -> None:
        self._earlier = coverage
        self.potential.coverage = self._coverage()

    def _coverage(self) -> Coverage:
        found = self.collector.coverage
        return found if self._earlier is None else found.union(self._earlier)

    def update(self) -> None:
        """Store the distances as soon as every structure was used; to be called in every step."""
        if self._stored or not self.collector.complete:
            return
        self._stored = True
        self.potential.coverage = self._coverage()
        for name in ("best.safetensors", "last.safetensors"):
            if (path := self.folder / name).is_file():
                add_coverage(path, self.potential.coverage)
        self._say(self.potential.coverage.text)

    def finish(self, stopped: bool) -> None:
        """Add the missing structures at the end of a run, unless there are too many.

        Args:
            stopped: True if the run was stopped early and can be resumed.
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
