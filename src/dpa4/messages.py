"""Messages for users: warnings that point to their own line."""

import os
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

_LIBRARIES = (
    str(Path(__file__).parent) + os.sep,
    *(str(Path(sysconfig.get_path(name))) + os.sep for name in ("purelib", "platlib", "stdlib")),
    "<frozen ",
)
"""Beginnings of the names of files that are not the user's own."""


_SHOWN: dict[Any, Any] = {}  # kept by Python: warnings without a line, each of which it shows once


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line of the user's own program, such as the one that asks ASE for an energy.

    Lines of this package, and of the packages between it and the program, would tell the reader nothing. If the
    program is the ``dpa4`` command or another package, the warning names no line.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_LIBRARIES) and frame.f_back is not None:
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(_LIBRARIES):
        warnings.warn_explicit(message, category, "dpa4", 1, "dpa4", _SHOWN)
    else:
        known = frame.f_globals.setdefault("__warningregistry__", {})
        module = frame.f_globals.get("__name__", "<unknown>")
        warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, known)
