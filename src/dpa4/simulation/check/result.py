"""Results of the checks of a model, as text, as a table for the terminal, and as a verdict."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dpa4.simulation.check.advice import advice
from dpa4.simulation.check.drawing import Drawing

Verdict = Literal["pass", "warn", "fail"]
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
NOT_ACCURACY = (
    "The checks look for faults that spoil a simulation. They say nothing about accuracy: for that, compare the "
    "model with reference calculations (dpa4 eval)."
)


@dataclass(frozen=True)
class Figure:
    """Measured number with its tolerance.

    Attributes:
        value: The number; NaN exceeds every tolerance.
        unit: Unit, or the word that is counted.
        limit: Largest allowed value; None for a number that is only reported.
        severe: Exceeding the limit is a failure; otherwise it is a warning.
        label: Words before the number, such as "deepest well".
    """

    value: float
    unit: str
    limit: float | None = None
    severe: bool = True
    label: str = ""

    @property
    def exceeded(self) -> bool:
        """True if the value is above its limit or NaN."""
        return self.limit is not None and not self.value <= self.limit

    @property
    def text(self) -> str:
        """The number with its unit."""
        unit = re.sub("^(curve|structure)s ", r"\1 ", self.unit) if self.value == 1 else self.unit
        return f"{self.label} {_short(self.value)} {unit}".strip()

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

    @property
    def meaning(self) -> str:
        """Meaning for a simulation, and a remedy; empty for a check that passed."""
        return "" if self.verdict == "pass" else advice(self.name, self.verdict == "fail")


@dataclass(frozen=True)
class ModelCheck:
    """Results of all checks of a model. Print it with rich for a table.

    Attributes:
        model: Name of the file or of the potential.
        results: Results in the order of the checks.
        seconds: Time of all checks.
        drawing: Curves for the picture of the page.
        complete: False if a signal has ended the work; the results are those of the checks before.
    """

    model: str
    results: tuple[CheckResult, ...]
    seconds: float
    drawing: Drawing = field(default_factory=Drawing, repr=False)
    complete: bool = True

    @property
    def passed(self) -> bool:
        """True if all checks were made and none failed; warnings are allowed."""
        return self.complete and not self.of("fail")

    @property
    def summary(self) -> str:
        """Verdict of the model in one sentence."""
        failed, warned, count = self.of("fail"), self.of("warn"), len(self.results)
        if failed:
            verdict = f"FAIL: {len(failed)} of {count} checks failed ({_names(failed)})"
        elif self.complete:
            verdict = f"PASS: none of {count} checks failed"
        else:
            verdict = f"none of {count} checks failed so far"
        warnings = f"; {len(warned)} {'warns' if len(warned) == 1 else 'warn'} ({_names(warned)})"
        return ("" if self.complete else "INTERRUPTED: ") + verdict + (warnings if warned else "")

    def of(self, verdict: Verdict) -> list[CheckResult]:
        """Return the results with a verdict."""
        return [result for result in self.results if result.verdict == verdict]

    @property
    def meanings(self) -> dict[str, list[CheckResult]]:
        """The results that did not pass, failures first, by their common meaning for a simulation."""
        found: dict[str, list[CheckResult]] = {}
        for result in [*self.of("fail"), *self.of("warn")]:
            found.setdefault(result.meaning, []).append(result)
        return found

    def __rich__(self) -> Group:
        """The results as a table for the terminal, and paragraphs on those that did not pass."""
        table = Table(title=f"dpa4 check {self.model}", title_justify="left")
        for column in ("check", "verdict", "measured", "tolerance"):
            table.add_column(column, overflow="fold")
        for result in self.results:
            verdict = Text(result.verdict, style=COLOURS[result.verdict])
            table.add_row(Text(result.name), verdict, Text(result.measured or "-"), Text(result.tolerance))
        paragraphs = []
        for meaning, results in self.meanings.items():
            for r in results:
                paragraphs.append(Text.assemble((r.verdict, COLOURS[r.verdict]), f" {r.name}: {r.remarks}"))
            paragraphs.append(Text(f"This means: {meaning}.\n"))
        return Group(table, *paragraphs, Text(f"{NOT_ACCURACY} docs/checking.md explains every check."))


def _names(results: Sequence[CheckResult]) -> str:
    return ", ".join(result.name for result in results)


def _short(value: float) -> str:
    whole = float(value).is_integer() and abs(value) < 1e6
    return f"{value:,.0f}" if whole else f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
