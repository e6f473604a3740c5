"""Published files that the benchmarks need: name, content and source of each."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from dpa4.data.unpacking import open_text, reason
from dpa4.system import user_path


class PublishedFile(NamedTuple):
    """Published file to download."""

    path: str  # within the data folder, named as by Matbench Discovery
    content: str
    source: str


WBM_INITIAL = PublishedFile(
    "wbm/2024-08-04-wbm-initial-atoms.extxyz.zip",
    "256,963 crystals of the WBM test set before relaxation",
    "https://figshare.com/files/48169597",
)
WBM_SUMMARY = PublishedFile(
    "wbm/2023-12-13-wbm-summary.csv.gz",
    "formation energies, energies above the hull and unique prototypes of the WBM test set by DFT",
    "https://figshare.com/files/64706751",
)
WBM_ENTRIES = PublishedFile(
    "wbm/2022-10-19-wbm-computed-structure-entries.jsonl.gz",
    "relaxed structures and settings of the DFT calculations, for energy corrections and RMSD",
    "https://figshare.com/files/53161832",
)
MP_REFERENCES = PublishedFile(
    "mp/2023-02-07-mp-elemental-reference-entries.json.gz",
    "the entry of lowest energy of every element in the Materials Project, for formation energies",
    "https://figshare.com/files/40387775",
)
KAPPA_STRUCTURES = PublishedFile(
    "phonons/2024-11-09-phononDB-PBE-103-structures.extxyz",
    "103 crystals of PhononDB with supercells and meshes of q-points",
    "https://figshare.com/files/52179965",
)
KAPPA_REFERENCE = PublishedFile(
    "phonons/2024-11-09-kappas-phononDB-PBE-noNAC.json.gz",
    "mode-resolved conductivities of the 103 crystals by DFT",
    "https://figshare.com/files/59988539",
)
DIATOMICS_REFERENCE = PublishedFile(
    "diatomics/diatomics-dft.json.gz",
    "curves of diatomic molecules by DFT (PBE and r2SCAN)",
    "https://github.com/janosh/matbench-discovery, site/src/lib/diatomics-dft.json.gz",
)
SPICE_TEST = PublishedFile(
    "spice/test_large_neut_all.xyz",
    "50,195 structures of the MACE-OFF23 test set with energies, forces and config_type",
    "https://doi.org/10.17863/CAM.107498",
)


def locate(folder: str | Path, file: PublishedFile) -> Path:
    """Find a published file in a data folder, either in the subfolder named by ``file.path`` or directly.

    Raises:
        FileNotFoundError: If the file is missing; the message says where to get it and where to save it.
    """
    path = user_path(folder) / file.path
    for candidate in (path, user_path(folder) / path.name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{path.name} is missing ({file.content}). Download it from {file.source} and save it as {path}"
    )


@contextmanager
def open_published(path: Path) -> Iterator[TextIO]:
    """Open a text file, compressed if its name ends in .gz, .bz2 or .xz; errors while it is read name the file.

    Raises:
        ValueError: If the content is damaged, malformed or unpacks to more than ``unpacked_limit``.
    """
    try:
        with open_text(path) as file:
            yield file
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file, compressed with gzip if its name ends in .gz.

    Raises:
        ValueError: If the content is damaged, is not JSON or unpacks to more than ``unpacked_limit``.
    """
    with open_published(path) as file:
        return json.load(file)
