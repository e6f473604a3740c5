"""What the training data cover, found while the first epoch builds its graphs."""

from pathlib import Path

from rich.console import Console

from dpa4.data import coverage_of
from dpa4.potential.checkpoint import add_coverage
from dpa4.training.prepare import Preparation

FEW = 5000
"""Structures whose graphs are built at the end of a run that was over before it used them."""


class RunCoverage:
    """Gives the potential of a run, and its files, the coverage of the training data when that is known.

    Until then they have the elements, but no distances: the shortest of a part of the data would be too long, and
    simulations would warn of atoms that are no closer than in the data.
    """

    def __init__(self, preparation: Preparation, folder: Path, console: Console):
        self.collector, self.dataset = preparation.coverage, preparation.train.dataset
        self.potential, self.folder, self.console = preparation.potential, folder, console
        self.potential.coverage = self.collector.coverage
        self._told = False

    def update(self) -> None:
        """Tell the distances if every structure was looked at; to be called in every step."""
        if self._told or not self.collector.complete:
            return
        self._told = True
        self.potential.coverage = self.collector.coverage
        for name in ("best.safetensors", "last.safetensors"):
            if (path := self.folder / name).is_file():
                add_coverage(path, self.potential.coverage)
        self._say(self.potential.coverage.text)

    def finish(self, stopped: bool) -> None:
        """At the end of a run, look at the rest if that is little work, else say that distances are not known."""
        rest = len(self.collector.missing)
        if rest <= FEW:
            try:
                coverage_of(self.dataset, self.collector)
            except ValueError as error:
                self._say(f"not known ({error})")
            self.update()
        elif not stopped:
            self._say(
                f"not known, since training did not come to {rest} of {len(self.dataset)} structures; simulations "
                "will not warn of closer ones"
            )

    def _say(self, text: str) -> None:
        self.console.print(f"closest atoms of the training data: {text}", highlight=False, markup=False)
