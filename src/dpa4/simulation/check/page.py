"""Page of the results of a check: one self-contained HTML file with one picture."""

from html import escape
from pathlib import Path

from dpa4.output import atomic_write, svg_of
from dpa4.simulation import html
from dpa4.simulation.check.drawing import draw
from dpa4.simulation.check.result import NO_ACCURACY, PAGE_OF_DOCS, ModelCheck, explained
from dpa4.system import user_path

EXPLANATION = (
    "Deviations of energies, forces and virials are relative to the larger of 1 and the largest value; energies are "
    "those without free atoms."
)
COLUMNS = ("check", "verdict", "measured", "tolerance", "remarks", "tested", "reason for the tolerance")


def write_check(check: ModelCheck, output: str | Path) -> Path:
    """Write the results of a check as one HTML page, which replaces an earlier one.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the file cannot be written.
    """
    file = user_path(output)
    caption = (
        "Energies of two and of three free atoms while they are pushed together, and response of forces near the "
        "cutoff; red curves fail. A good curve is a wall on the left, at most one well, and zero on the right."
    )
    sections = {
        "Verdict": _verdict(check),
        "Findings": _findings(check),
        "Curves": f"<p>{caption}</p>\n{html.image(svg_of(draw(check.drawing)), caption)}",
        "All checks": f"<p>{EXPLANATION}</p>\n{_results(check)}",
        "Versions": html.name_table({"time of the check": html.duration(check.seconds)}) + html.versions(),
    }
    text = html.page(f"{check.model}: DPA4 check", f"DPA4 check of {check.model}", sections)
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def _verdict(check: ModelCheck) -> str:
    """Summary, and what it does not say."""
    about = (
        f"<p>{escape(NO_ACCURACY)} The page {PAGE_OF_DOCS} of the documentation describes every check.</p>"
    )
    if not check.finished:
        stopped = "The check was interrupted: checks that are not listed were not done."
        about = f'<p class="missing">{stopped}</p>\n{about}'
    return f"<p><strong>{escape(check.summary)}.</strong></p>\n{about}"


def _findings(check: ModelCheck) -> str:
    """Sentences about failures and warnings."""
    if not check.findings:
        return "<p>No check failed or gave a warning.</p>"
    return "\n".join(
        f"<h3{' class=missing' if verdict == 'fail' else ''}>{verdict}: "
        f"{escape(', '.join(result.name for result in results))}</h3>\n{html.name_table(explained(results))}"
        for verdict, results in check.findings
    )


def _results(check: ModelCheck) -> str:
    rows = [
        [
            r.name,
            r.verdict,
            *(t.replace("; ", "\n") for t in (r.measured, r.tolerance)),
            r.remarks,
            r.tested,
            r.reason,
        ]
        for r in check.results
    ]
    return html.table(COLUMNS, rows, marked=("fail",))
