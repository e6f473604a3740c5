"""Results of the checks of a model: records, sentences for a reader, a table for the terminal, and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dpa4.simulation.check.drawing import Drawing
from dpa4.simulation.check.explanations import EXPLANATIONS

Verdict = Literal["pass", "warn", "fail"]
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
NO_ACCURACY = (
    "A pass means that the model computes what it should and can be simulated with. It says nothing about accuracy: "
    "for that, compare the model with structures it was not trained on (dpa4 eval)."
)
PAGE_OF_DOCS = "docs/checking.md"


@dataclass(frozen=True)
class Figure:
    """Measured number with its tolerance.

    Attributes:
        label: Name of the number, such as "deepest well".
        value: The number; NaN exceeds every tolerance.
        unit: Unit; empty for a count.
        limit: Largest allowed value; None for a number that is only reported.
        severe: Exceeding the limit is a failure; otherwise it is a warning.
    """

    label: str
    value: float
    unit: str = ""
    limit: float | None = None
    severe: bool = True

    @property
    def exceeded(self) -> bool:
        """True if the value is above its limit or NaN."""
        return self.limit is not None and not self.value <= self.limit

    @property
    def text(self) -> str:
        """The number with its name and unit."""
        separator = " " if self.unit else ": "
        return f"{self.label}{separator}{_short(self.value)} {self.unit}".rstrip()

    @property
    def tolerance(self) -> str:
        """The limit in words; empty without one."""
        if self.limit is None:
            return ""
        limit = f"≤ {_short(self.limit)} {self.unit}".rstrip() if self.limit else "0"
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
    def finding(self) -> str:
        """Trial and finding, in sentences."""
        found = [f"{f.text} (allowed: {f.tolerance.split(' (')[0]})" for f in self.figures if f.exceeded]
        found += filter(None, (self.warning, self.detail))
        return f"{EXPLANATIONS[self.name].tried} Tested: {self.tested}. Found: {'; '.join(found)}."

    @property
    def meaning(self) -> str:
        """Consequences of a failure or warning for a simulation, in sentences."""
        known = EXPLANATIONS[self.name]
        return known.warned if self.verdict == "warn" and known.warned else known.failed

    @property
    def remedy(self) -> str:
        """Advice for a failure or warning, in sentences."""
        return EXPLANATIONS[self.name].remedy


@dataclass(frozen=True)
class ModelCheck:
    """Results of all checks of a model. Print it with rich for a table, followed by what was found.

    Attributes:
        model: Name of the file or of the potential.
        results: Results in the order of the checks.
        seconds: Time of all checks.
        drawing: Curves for the picture of the page.
        finished: False after an interruption; the results are those of the checks before it.
    """

    model: str
    results: tuple[CheckResult, ...]
    seconds: float
    drawing: Drawing = field(default_factory=Drawing, repr=False)
    finished: bool = True

    @property
    def passed(self) -> bool:
        """True if no check failed; warnings are allowed."""
        return all(result.verdict != "fail" for result in self.results)

    @property
    def findings(self) -> list[tuple[Verdict, list[CheckResult]]]:
        """Failures, then warnings; results with the same meaning and remedy are together."""
        groups: dict[tuple[Verdict, str, str], list[CheckResult]] = {}
        for wanted in ("fail", "warn"):
            for r in self.results:
                if r.verdict == wanted:
                    groups.setdefault((r.verdict, r.meaning, r.remedy), []).append(r)
        return [(verdict, results) for (verdict, _, _), results in groups.items()]

    @property
    def summary(self) -> str:
        """Verdict of the model in one line, which counts failures and warnings."""
        failed, warned = (_names(self.results, verdict) for verdict in ("fail", "warn"))
        passed = len(self.results) - len(failed) - len(warned)
        verdict = "FAIL" if failed else "PASS WITH WARNINGS" if warned else "PASS"
        parts = [f"{passed} of {len(self.results)} checks passed"]
        parts += [
            f"{len(names)} {verb} ({', '.join(names)})"
            for names, verb in ((failed, "failed"), (warned, "gave a warning"))
            if names
        ]
        return f"{'' if self.finished else 'INTERRUPTED, so far '}{verdict}: {', '.join(parts)}"

    def __rich__(self) -> Group:
        """The results as a table for the terminal, and sentences about warnings and failures."""
        table = Table(title=f"dpa4 check {self.model}", title_justify="left")
        for column in ("check", "", "measured", "allowed"):
            table.add_column(column, overflow="fold")
        for result in self.results:
            verdict = Text(result.verdict, style=COLOURS[result.verdict])
            if not result.figures:
                table.add_row(Text(result.name), verdict, Text(result.remarks), "")
            for number, figure in enumerate(result.figures):
                first = ("", "") if number else (Text(result.name), verdict)
                table.add_row(*first, Text(figure.text), Text(figure.tolerance or "reported"))
        parts: list[Table | Text] = [table]
        for kind, results in self.findings:
            parts += [Text(), Text.assemble((kind, COLOURS[kind]), f"  {', '.join(r.name for r in results)}")]
            grid = Table.grid(padding=(0, 1))
            grid.add_column(no_wrap=True)
            grid.add_column(overflow="fold")
            for heading, sentence in explained(results).items():
                grid.add_row(Text(f"  {heading}:"), Text(sentence))
            parts.append(grid)
        return Group(*parts, Text(f"\n{NO_ACCURACY} {PAGE_OF_DOCS} describes every check."))


def explained(results: Sequence[CheckResult]) -> dict[str, str]:
    """Sentences about failures or warnings of the same meaning and remedy, by their headings."""
    found = {r.name: r.finding for r in results} if len(results) > 1 else {"What": results[0].finding}
    return found | {"Meaning": results[0].meaning, "To do": results[0].remedy}


def _names(results: Sequence[CheckResult], verdict: Verdict) -> list[str]:
    return [result.name for result in results if result.verdict == verdict]


def _short(value: float) -> str:
    whole = float(value).is_integer() and abs(value) < 1e6
    return f"{value:,.0f}" if whole else f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
