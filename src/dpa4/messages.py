"""Messages for users: warnings that point to their own line, and names that were probably meant."""

import difflib
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable
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


def not_allowed(name: str, value: object, allowed: Iterable[str]) -> ValueError:
    """Error about an option whose value is none of the allowed ones, with the one that was probably meant."""
    names = list(allowed)
    return ValueError(
        f"{name} must be one of {', '.join(names)}, got {value!r}{did_you_mean(str(value), names)}"
    )


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """End of a message, such as "; did you mean npt?"; empty if no allowed name is near."""
    near = difflib.get_close_matches(name.lower(), list(allowed), n=1)
    return f"; did you mean {near[0]}?" if near else ""
