"""Format of a file by its name and content, and the formats that hold results of calculations."""

import io
from pathlib import Path

from ase.io.formats import PEEK_BYTES, filetype, ioformats, match_magic

from dpa4.data.unpacking import encoding_of, name_without_compression, open_binary

EXTXYZ, TRAJECTORY, POSCAR = "extxyz", "traj", ("vasp", "vasp-xdatcar")  # ASE's names of the formats
OUTCAR, VASPRUN = "vasp-out", "vasp-xml"

STRUCTURE_SUFFIXES = (".xyz", ".extxyz", ".traj", ".db", ".aselmdb", ".castep")
"""Suffixes of the files that are read from a folder by their name."""

_BY_NAME = (OUTCAR, VASPRUN)
_BY_CONTENT = frozenset(
    (
        TRAJECTORY,
        "abinit-out",
        "aims-output",
        "espresso-out",
        "gamess-us-out",
        "gaussian-out",
        "gpaw-out",
        "nwchem-out",
        "onetep-out",
        "orca-output",
        "qbox",
    )
)
"""Outputs of calculations that are recognised by their first lines, whatever their names."""


def format_of(file: io.BufferedReader, path: Path) -> str:
    """Name of a file's format, from its name and the first bytes without byte-order mark."""
    head = file.read(PEEK_BYTES)
    if (encoding := encoding_of(head)) != "utf-8":
        head = head.decode(encoding, errors="ignore").encode()
    name = ""
    for guess in (True, False):  # ASE may guess a format that does not exist, such as that of run.xyz@0
        start = io.BytesIO(head)
        start.name = str(path.absolute())  # type: ignore[attr-defined]
        if (name := filetype(start, guess=guess)) in ioformats:
            break
    return name


def vasp_output(path: Path) -> str | None:
    """Format of a VASP output by its name, such as OUTCAR or vasprun.xml; None for other files."""
    name = name_without_compression(path).name
    return next((kind for kind in _BY_NAME if ioformats[kind].match_name(name)), None)


def holds_results(path: Path) -> bool:
    """Return whether a file in a folder is read as a data file, rather than an input or another file of a run."""
    if vasp_output(path) or name_without_compression(path).suffix in STRUCTURE_SUFFIXES:
        return True
    try:
        with open_binary(path) as file:
            return match_magic(file.read(PEEK_BYTES)).name in _BY_CONTENT
    except Exception:  # no format of ASE, or not readable, which concerns nobody who did not name the file
        return False
