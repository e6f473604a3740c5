"""Blocks of docs/tutorial.md, one after the other in a fresh folder, as a reader pastes them."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ase.io import read
from matplotlib.image import imread
from typer.testing import CliRunner

import vasp_runs
from dpa4.cli import app
from dpa4.data import read_frames
from dpa4.training import load_run_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
WRAPPER = '#!/bin/sh\nexec "{python}" {arguments}"$@"\n'


def session(folder, blocks):
    """Run blocks in one shell, Python blocks in an interpreter of their own; write what they print to a file log."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in (("dpa4", "-m dpa4 "), ("python", "")):
        (programs / name).write_text(WRAPPER.format(python=sys.executable, arguments=arguments))
        (programs / name).chmod(0o755)
    script = "set -eu\n"
    for number, (language, body) in enumerate(blocks):
        script += body if language == "bash" else f"python - <<'BLOCK'\n{body}BLOCK\n"
        script += f"echo '### end of block {number} after' $SECONDS s\n"
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "MPLBACKEND": "Agg",
    }
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    assert done.returncode == 0, (folder / "log").read_text()[-5000:]


def test_python_blocks_are_valid():
    blocks = [body for language, body in BLOCKS if language == "python"]
    for body in blocks:
        compile(body, "docs/tutorial.md", "exec")
    assert len(blocks) == 2


def test_collection_and_run_file_of_the_page(tmp_path, monkeypatch):
    """The command finds the data, and the run file is valid; test_pages.py checks all commands and options."""
    monkeypatch.chdir(tmp_path)
    for name, run in itertools.islice(vasp_runs.script.runs(), 1):
        vasp_runs.script.write_run(Path("runs") / name, run)
    command = "data collect runs -o train.xyz"
    assert f"dpa4 {command}\n" in PAGE
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    (body,) = re.findall(r"<<'END'\n(.*?)^END$", PAGE, re.MULTILINE | re.DOTALL)
    Path("run.yaml").write_text(body)
    options = load_run_config("run.yaml")
    assert len(read_frames(options.data.train)) == 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_from_top_to_bottom(tmp_path):
    session(tmp_path, BLOCKS)
    folder = tmp_path / "tutorial"
    assert len(read(folder / "train.xyz", ":")) == 55
    assert len(read(folder / "select/selected.xyz", ":")) == 8
    assert len(list(folder.glob("runs-2/melt/*/POSCAR"))) == 8
    for picture in (
        "run/learning_curve.png",
        "eval/parity.png",
        "md/thermo.png",
        "rdf.png",
        "select/selection.png",
    ):
        assert imread(folder / picture).std() > 0.01, picture
