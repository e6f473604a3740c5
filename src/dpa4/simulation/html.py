"""Self-contained HTML pages: the skeleton, and elements that escape their text."""

import base64
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dpa4 import __version__

STYLE = """
:root { color-scheme: light dark; --line: #ddd; --soft: #f4f4f4; --bad: #a40000; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #222; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1em; }
h2 { border-bottom: 1px solid var(--line); margin-top: 2em; }
nav a { margin-right: 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: 2px 16px 2px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: pre-line; }
td:first-child, .names th { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th.number { white-space: pre; }
pre { background: var(--soft); padding: 1em; white-space: pre-wrap; font-size: 13px; }
img { max-width: 100%; height: auto; background: white; }
.missing { color: var(--bad); }
@media (max-width: 700px) { img { max-width: 200%; } }
@media print {
  nav { display: none; }
  body { font-size: 9pt; max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  tr, img { break-inside: avoid; }
  th, td { padding-right: 8px; }
}
"""


def page(title: str, heading: str, sections: Mapping[str, str]) -> str:
    """Return a page with links to its sections, without scripts and without anything from elsewhere.

    Args:
        title: Title of the window.
        heading: First line of the page.
        sections: HTML of every section by its title.
    """
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = "\n".join(f'<a href="#{anchor}">{escape(name)}</a>' for name, anchor in ids.items())
    body = "\n".join(
        f'<section id="{ids[name]}">\n<h2>{escape(name)}</h2>\n{content}\n</section>'
        for name, content in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # No script, and nothing from elsewhere, whatever the files of the run contain.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(heading)}</h1>\n<nav>\n{links}\n</nav>\n{body}\n</body>\n</html>\n"
    )


def versions() -> str:
    """Return a table of the versions of the software and the time."""
    return name_table(
        {
            "report made": datetime.now(UTC).isoformat(timespec="seconds"),
            "dpa4": __version__,
            "PyTorch": torch.__version__,
            "NumPy": version("numpy"),
            "ASE": version("ase"),
            "Python": platform.python_version(),
            "system": platform.platform(),
        }
    )


def missing(what: str, command: str) -> str:
    """Return a paragraph that says what is missing and which command creates it."""
    return f'<p class="missing">{escape(what)}: <code>{escape(command)}</code></p>'


def image(content: bytes, text: str) -> str:
    """Return an image, which is part of the page, with its description.

    Args:
        content: PNG or SVG file. An image runs no script and loads nothing, whatever the file contains.
        text: Description.
    """
    kind = "png" if content.startswith(b"\x89PNG") else "svg+xml"
    encoded = base64.b64encode(content).decode()
    return f'<div class="wide"><img alt="{escape(text)}" src="data:image/{kind};base64,{encoded}"></div>'


def picture(folder: Path, name: str, text: str) -> str | None:
    """Return an image from a file of a folder, the SVG version if there is one; None without the file."""
    for file in (folder / f"{name}.svg", folder / f"{name}.png"):
        if file.is_file():
            return image(file.read_bytes(), text)
    return None


def name_table(lines: Mapping[str, str]) -> str:
    """Return a table of names and values."""
    rows = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>\n" for a, b in lines.items())
    return f'<table class="names">\n{rows}</table>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[str] = ()) -> str:
    """Return a table with a header; columns of numbers are aligned right, cells with a marked text are coloured.

    The names of columns of numbers may have several lines.
    """
    numeric = [
        bool(rows) and all(_is_number(row[k]) or row[k] == "-" for row in rows) for k in range(len(header))
    ]

    def cell(tag: str, text: str, number: bool) -> str:
        kind = "number" if number else "missing" if text in marked else None
        attribute = f' class="{kind}"' if kind else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(cell(tag, text, number) for text, number in zip(cells, numeric, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    head = f"<thead><tr>{line('th', header)}</tr></thead>"
    return f'<div class="wide"><table>\n{head}\n<tbody>\n{body}</tbody></table></div>'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def short(value: Any) -> str:
    """Text of a value; four significant digits for a number that is not an integer."""
    text = str(value)
    if not _is_number(text) or text.lstrip("-").isdecimal():
        return text
    number = float(text)
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:.0f}"


def duration(seconds: float) -> str:
    """Text of a duration, such as "12.3 s", "4.5 min" or "2.1 h"."""
    unit, size = next(
        u for u in (("s", 1.0), ("min", 60.0), ("h", 3600.0)) if seconds < 120 * u[1] or u[0] == "h"
    )
    return f"{seconds / size:.1f} {unit}"
