"""The documentation as HTML: built without a warning, with every page in the contents and every public name."""

import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpa4

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def words(markup: str) -> str:
    """Text without markup and line breaks, so that a docstring and its rendering compare equal."""
    return " ".join(re.sub(r"[`*]", "", html.unescape(re.sub(r"<[^>]+>", "", markup))).split())


@pytest.fixture(scope="module")
def python_page(tmp_path_factory):
    """HTML of the page docs/python.md."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("html")
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(str(dpa4.__file__)).parents[1])},  # the dpa4 of this process
    )
    assert run.returncode == 0, run.stderr
    return (folder / "python.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_contents():
    entries = re.findall(r"^[\w/*-]+$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert sorted(entries) == sorted([*pages, "adr/*"])
    assert {path.parent.name for path in DOCS.rglob("*.md")} == {"docs", "adr"}


@pytest.mark.parametrize("name", dpa4.__all__)
def test_public_names_have_a_signature_and_a_description(python_page, name):
    found = re.search(
        rf'<dt class="[^"]*" id="dpa4\.{name}">(.*?)</dt>\s*<dd>(.*?)</dd>', python_page, re.DOTALL
    )
    assert found, f"docs/python.md has no directive for {name}"
    value = getattr(dpa4, name)
    signature, description = words(found[1]), words(found[2])
    for parameter in inspect.signature(value).parameters:
        assert re.search(rf"\b{parameter}: ", signature), parameter
    assert description.startswith(words(inspect.getdoc(value).splitlines()[0]))


def test_python_page_says_what_is_internal(python_page):
    assert "Everything else is internal and may change in any version." in words(python_page)
