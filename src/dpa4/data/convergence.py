"""Electronic convergence of the ionic steps in outputs of VASP."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dpa4.data.formats import OUTCAR, VASPRUN, vasp_output
from dpa4.data.unpacking import lines_of, open_binary, open_text

_ITERATION = re.compile(r"Iteration\s+\d+\(\s*(\d+)\)")
_NELM = re.compile(r"\bNELM\s*=\s*(\d+)")
_LABELLED_SINCE = 6  # version of VASP that writes why an electronic loop ended


class Steps(NamedTuple):
    """Reasons to leave out the ionic steps of an output, by their number, and an unfinished last step."""

    unconverged: dict[int, str]
    unfinished: str | None


def ionic_steps(path: Path) -> Steps:
    """Find ionic steps of a VASP output whose electronic loop did not converge, and a last step that is cut off.

    A step counts as not converged if VASP 6 says so in the OUTCAR, or if it used all of its NELM electronic steps,
    which is all that vasprun.xml and earlier versions tell.

    Args:
        path: Any file; outputs of other programs have no such steps here.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it unpacks to far more than its size, or is no text.
    """
    found = {OUTCAR: _in_outcar, VASPRUN: _in_vasprun}.get(vasp_output(path) or "")
    if found is None:
        return Steps({}, None)
    unconverged: dict[int, str] = {}
    number, finished = 0, True
    for reason, finished in found(path):
        if finished:
            if reason:
                unconverged[number] = reason
            number += 1
    return Steps(unconverged, None if finished else f"the file ends within ionic step {number + 1}")


def _in_outcar(path: Path) -> Iterator[tuple[str | None, bool]]:
    """Reason to leave out each ionic step of an OUTCAR, or None, and whether the step is complete."""
    limit, used, version, exit_line = 0, 0, 0, ""
    with open_text(path) as file:
        for number, line in enumerate(lines_of(file)):
            if number == 0 and (start := re.search(r"vasp\.(\d+)", line)):
                version = int(start[1])
            elif not limit and "NELM" in line and (declared := _NELM.search(line)):
                limit = int(declared[1])
            elif "Iteration" in line and (iteration := _ITERATION.search(line)):
                used = int(iteration[1])
            elif "aborting loop" in line:
                exit_line = line
            elif "FREE ENERGIE OF THE ION-ELECTRON SYSTEM" in line:
                yield _outcar_reason(version, exit_line, used, limit), True
                used, exit_line = 0, ""
    if used:
        yield None, False


def _outcar_reason(version: int, exit_line: str, used: int, limit: int) -> str | None:
    if version >= _LABELLED_SINCE and exit_line:
        return None if "EDIFF is reached" in exit_line else _reason(used, limit)
    return _exhausted(used, limit)


def _in_vasprun(path: Path) -> Iterator[tuple[str | None, bool]]:
    """Reason to leave out each ionic step of a vasprun.xml, or None, and whether the step is complete."""
    limit, used, inside, in_electronic_step, complete = 0, 0, False, False, False
    with open_binary(path) as file:
        try:
            for event, element in ET.iterparse(file, events=("start", "end")):
                if event == "start":
                    inside = inside or element.tag == "calculation"
                    in_electronic_step = in_electronic_step or element.tag == "scstep"
                    continue
                if element.tag == "i" and element.get("name") == "NELM":
                    limit = int(element.text or 0)
                elif element.tag == "scstep":
                    used, in_electronic_step = used + 1, False
                elif element.tag == "energy":
                    complete = inside and not in_electronic_step  # written after forces and stress
                elif element.tag == "calculation":
                    yield _exhausted(used, limit), True
                    used, inside, complete = 0, False, False
                element.clear()  # the tree of a long run would fill the memory
        except ET.ParseError:  # the file is cut off
            if inside:
                yield _exhausted(used, limit), complete


def _exhausted(used: int, limit: int) -> str | None:
    """Reason to leave out a step that used all allowed electronic steps, or None; a limit of 1 has no loop."""
    return _reason(used, limit) if 1 < limit <= used else None


def _reason(used: int, limit: int) -> str:
    return f"electronic loop not converged ({used} of {limit or '?'} steps)"
