"""Texts for tables, figures, notebooks and terminals."""

import re
import sys
from collections.abc import Mapping
from html import escape


def counted(number: int, noun: str) -> str:
    """Number and noun, such as "1 structure" and "1,200 structures"."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def short(number: float) -> str:
    """Write a number in at most eight characters, with four significant digits or three decimals."""
    size = abs(number)
    if size < 0.001 or size >= 1e6:
        return f"{number:.1e}" if size else "0"
    return f"{number:.3f}" if size < 1 else f"{number:#.4g}".rstrip(".") if size < 9999.5 else f"{number:.0f}"


def wrapped(text: str, width: int) -> str:
    """Break a name into lines of at most ``width`` characters, after blanks and punctuation.

    A part without either that is longer than a line is cut.
    """
    lines = [""]
    for part in re.findall(rf"[^\W_]{{1,{width}}}[\W_]?|[\W_]", text):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def wrapped_path(path: str, width: int) -> str:
    """Break the path of a file into lines that end after a "/"; parts that are too long are broken by `wrapped`."""
    lines = [""]
    for part in path.replace("/", "/\0").split("\0"):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(wrapped(line, width) for line in lines)


def plain_text(text: str) -> str:
    """Escape a name for a figure.

    Dollar signs would start a formula, and SVG files cannot hold control characters.
    """
    return "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")


def html_table(title: str, sections: Mapping[str, Mapping[str, str]]) -> str:
    """HTML table with a title and sections of labels and values, for ``_repr_html_``; all texts are escaped."""
    left = 'style="text-align: left"'  # notebooks align to the right
    rows = []
    for section, lines in sections.items():
        rows.append(f'<tr><th colspan="2" {left}>{escape(section)}</th></tr>')
        for label, value in lines.items():
            rows.append(f"<tr><td {left}>{escape(label)}</td><td {left}>{escape(value)}</td></tr>")
    return f"<p><b>{escape(title)}</b></p><table>{''.join(rows)}</table>"


def tolerate_any_encoding() -> None:
    """Replace characters that standard output and standard error cannot encode, such as Å in GBK, by "?".

    By default, such a character ends the program.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
