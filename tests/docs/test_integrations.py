"""Blocks of the page about other programs run as written, where the program is installed."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ase.build import bulk
from ase.io import write

from dpa4.potential import save_potential
from helpers import molecule, random_potential

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
SHORTER = {
    "steps=200": "steps=2",
    "run_mesh(20.0)": "run_mesh(2.0)",
    "supercell_matrix=[2, 2, 2]": "supercell_matrix=[1, 1, 1]",
    "n_steps=100": "n_steps=2",
    ".run(1000)": ".run(2)",
    "<total_steps>1000": "<total_steps>2",
    "ensure_success=True": "ensure_success=True, log=False",
}
SLOW = {"matcalc", "atomate2", "ALCHEMI Toolkit"}  # their imports take seconds


def blocks(section: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    for long, short in SHORTER.items():
        found = [block.replace(long, short) for block in found]
    return found


def packages(block: str) -> set[str]:
    """Top-level packages that a block imports."""
    nodes = list(ast.walk(ast.parse(block)))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return {name.partition(".")[0] for name in names} - {"dpa4"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    elements = ("H", "C", "O", "Si")
    save_potential(random_potential(elements=elements, n_blocks=1, lmax=1), tmp_path / "model.safetensors")
    write("start.xyz", molecule(0, 5))
    write("crystal.xyz", bulk("Si"))
    return tmp_path


def require_plumed() -> None:
    plumed = pytest.importorskip("plumed")
    try:
        plumed.Plumed()
    except Exception as error:  # RuntimeError or OSError, from the loader of the library
        pytest.skip(f"no PLUMED library: {error}")


@pytest.fixture
def ipi_server(folder):
    """Server of i-PI on the input file of the page, with a socket of its own."""
    program = shutil.which(
        "i-pi", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if program is None:
        pytest.skip("i-PI is not installed")
    (text,) = blocks("i-PI", "xml")
    name = f"dpa4-{os.getpid()}"
    (folder / "input.xml").write_text(text.replace("<address>dpa4<", f"<address>{name}<"), encoding="utf-8")
    server = subprocess.Popen([program, "input.xml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    socket = Path(f"/tmp/ipi_{name}")
    try:
        for _ in range(600):
            if socket.exists() or server.poll() is not None:
                break
            time.sleep(0.1)
        yield name
        server.wait(timeout=30)
    finally:
        server.kill()
        socket.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "section", [pytest.param(s, marks=[pytest.mark.slow] if s in SLOW else []) for s in SECTIONS]
)
def test_blocks_run(section, folder, request):
    code = blocks(section, "python")
    assert code, section
    for name in sorted(set().union(*map(packages, code))):
        pytest.importorskip(name)
    if section == "PLUMED":
        require_plumed()
    if section == "i-PI":
        name = request.getfixturevalue("ipi_server")
        code = [block.replace('unixsocket="dpa4"', f'unixsocket="{name}"') for block in code]
    known: dict = {}
    for number, block in enumerate(code):
        exec(compile(block, f"{section}, block {number}", "exec"), known)
    if section == "i-PI":
        rows = [line for line in (folder / "ipi.out").read_text().splitlines() if not line.startswith("#")]
        assert len(rows) >= 2


def test_every_program_of_the_table_has_a_section():
    named = re.findall(r"^\| \[(.*?)\]\(#", TEXT, re.MULTILINE)
    assert named == list(SECTIONS)
