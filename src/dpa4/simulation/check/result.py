"""Results of the checks of a model, as text, as a table for the terminal, and as a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table
from rich.text import Text

from dpa4.simulation.check.drawing import Drawing

Verdict = Literal["pass", "warn", "fail"]
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Figure:
    """Measured number with its tolerance.

    Attributes:
        value: The number; NaN exceeds every tolerance.
        unit: Unit, or the word that is counted.
        limit: Largest allowed value; None for a number that is only reported.
        severe: Exceeding the limit is a failure; otherwise it is a warning.
    """

    value: float
    unit: str
    limit: float | None = None
    severe: bool = True

    @property
    def exceeded(self) -> bool:
        """True if the value is above its limit or NaN."""
        return self.limit is not None and not self.value <= self.limit

    @property
    def text(self) -> str:
        """The number with its unit."""
        return f"{_short(self.value)} {self.unit}"

    @property
    def tolerance(self) -> str:
        """The limit in words; empty without one."""
        if self.limit is None:
            return ""
        limit = f"≤ {_short(self.limit)} {self.unit}" if self.limit else "0"
        return limit + ("" if self.severe else " (else warn)")


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name: Name of the check.
        tested: Structures, pairs or distances that were tested.
        figures: Measured numbers with their tolerances.
        reason: Reason for the tolerances.
        detail: Places of the worst numbers, and remarks.
        warning: Reason for a warning that is not a number; empty if there is none.
    """

    name: str
    tested: str
    figures: tuple[Figure, ...]
    reason: str
    detail: str = ""
    warning: str = ""

    @property
    def verdict(self) -> Verdict:
        """Verdict: "fail", "warn" or "pass"."""
        exceeded = [figure for figure in self.figures if figure.exceeded]
        if any(figure.severe for figure in exceeded):
            return "fail"
        return "warn" if exceeded or self.warning else "pass"

    @property
    def measured(self) -> str:
        """The measured numbers."""
        return "; ".join(figure.text for figure in self.figures)

    @property
    def tolerance(self) -> str:
        """The tolerances."""
        return "; ".join(filter(None, (figure.tolerance for figure in self.figures))) or "none: reported"

    @property
    def remarks(self) -> str:
        """Warning and detail."""
        return "; ".join(filter(None, (self.warning, self.detail)))


@dataclass(frozen=True)
class ModelCheck:
    """Results of all checks of a model. Print it with rich for a table.

    Attributes:
        model: Name of the file or of the potential.
        results: Results in the order of the checks.
        seconds: Time of all checks.
        drawing: Curves for the picture of the page.
    """

    model: str
    results: tuple[CheckResult, ...]
    seconds: float
    drawing: Drawing = field(default_factory=Drawing, repr=False)

    @property
    def passed(self) -> bool:
        """True if no check failed; warnings are allowed."""
        return all(result.verdict != "fail" for result in self.results)

    @property
    def summary(self) -> str:
        """Verdict of the model in one sentence."""
        failed = _names(self.results, "fail")
        warned = _names(self.results, "warn")
        verdict = f"FAIL: {failed}" if failed else f"PASS: {len(self.results)} checks"
        return verdict + (f"; warnings: {warned}" if warned else "")

    def __rich__(self) -> Table:
        """The results as a table for the terminal."""
        table = Table(title=f"dpa4 check {self.model}", title_justify="left")
        for column in ("check", "measured", "tolerance", "", "remarks"):
            table.add_column(column, overflow="fold")
        for result in self.results:
            verdict = Text(result.verdict, style=COLOURS[result.verdict])
            texts = (result.name, result.measured, result.tolerance)
            table.add_row(*map(Text, texts), verdict, Text(result.remarks))
        return table


def _names(results: Sequence[CheckResult], verdict: Verdict) -> str:
    return ", ".join(result.name for result in results if result.verdict == verdict)


def _short(value: float) -> str:
    whole = float(value).is_integer() and abs(value) < 1e6
    return f"{value:,.0f}" if whole else f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
