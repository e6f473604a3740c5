"""Sphinx: HTML pages from the Markdown files of this folder and from the docstrings of dpa4."""

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import dpa4

project = "dpa4"
author = "The dpa4 developers"
copyright = author
version = release = dpa4.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
smartquotes = False  # options are quoted as in code
html_theme = "furo"
html_title = f"dpa4 {release}"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4  # the anchors that GitHub gives to headings

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

# numpy's types of arrays are written out in full otherwise
ARRAY_LIKE = re.compile(r"[\w.~]*_Buffer \| .*?_NestedSequence\[complex \| bytes \| str\]")
ARRAY = re.compile(r"ndarray\[tuple\[[\w.~]*Any, \.\.\.\], [\w.~]*dtype\[[\w.~]+\]\]")


def offer_files_of_the_repository(app: Sphinx, doctree: nodes.document) -> None:
    """Turn links to Markdown files outside of this folder, such as ../benchmarks/README.md, into downloads."""
    page = Path(app.env.doc2path(app.env.docname))
    for link in list(doctree.findall(addnodes.pending_xref)):
        file = Path(f"{link['reftarget']}.md")
        if link["refdomain"] == "doc" and file.is_absolute() and file.is_file():
            target = os.path.relpath(file, page.parent)
            link.replace_self(
                addnodes.download_reference("", "", *link.children, reftarget=target, refdoc=app.env.docname)
            )


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Name the types of arrays as the source does."""
    return signature and ARRAY.sub("ndarray", ARRAY_LIKE.sub("ArrayLike", signature)), result


def setup(app: Sphinx) -> None:
    """Connect the functions above; links are changed before Sphinx collects the files to copy."""
    app.connect("doctree-read", offer_files_of_the_repository, priority=100)
    app.connect("autodoc-process-signature", shorten_signature)
