"""Page of the results of a check: one self-contained HTML file with one picture."""

from pathlib import Path

from dpa4.output import atomic_write, svg_of
from dpa4.simulation import html
from dpa4.simulation.check.drawing import draw
from dpa4.simulation.check.result import ModelCheck
from dpa4.system import user_path

EXPLANATION = (
    "Deviations of energies, forces and virials are relative to the larger of 1 and the largest value; energies are "
    "those without free atoms. A warning is something to know, not a fault."
)


def write_check(check: ModelCheck, output: str | Path) -> Path:
    """Write the results of a check as one HTML page, which replaces an earlier one.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the file cannot be written.
    """
    file = user_path(output)
    caption = "Curves of pairs and triples, and response near the cutoff; red curves fail"
    sections = {
        "Verdict": f"<p>{html.escape(check.summary)}.</p>\n<p>{EXPLANATION}</p>\n{_results(check)}",
        "Curves": f"<p>{caption}.</p>\n{html.image(svg_of(draw(check.drawing)), caption)}",
        "Versions": html.name_table({"time of the check": f"{check.seconds:.0f} s"}) + html.versions(),
    }
    text = html.page(f"{check.model}: DPA4 check", f"DPA4 check of {check.model}", sections)
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def _results(check: ModelCheck) -> str:
    header = ["check", "verdict", "measured", "tolerance", "remarks", "tested", "reason for the tolerance"]
    rows = [
        [r.name, r.verdict, r.measured or "-", r.tolerance, r.remarks, r.tested, r.reason]
        for r in check.results
    ]
    return html.table(header, rows, marked=("fail",))
