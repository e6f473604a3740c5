"""Messages: warnings point to the user's own line, or to none; no module issues them in another way."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from ase.build import molecule

from dpa4.data.coverage import Coverage
from dpa4.interfaces import DPA4Calculator
from dpa4.messages import warn
from dpa4.potential import save_potential
from helpers import random_potential

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "dpa4"


def narrow_model():
    """Tiny potential of H, C and O whose training data had no oxygen, and no short C-H distance."""
    potential = random_potential(n_blocks=1, lmax=1)
    potential.coverage = Coverage(potential.config.cutoff, ("H", "C"), {("H", "C"): 3.0, ("H", "H"): 0.5})
    return potential


def test_warnings_through_ase_point_to_the_line_that_asks():
    atoms = molecule("CH3OH")
    atoms.calc = DPA4Calculator(narrow_model(), device="cpu")
    with pytest.warns(RuntimeWarning) as caught:
        atoms.get_potential_energy()
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and "training data" in texts[0] and "closer than any H-C pair" in texts[1], texts
    assert {w.filename for w in caught} == {__file__}


def test_a_warning_is_shown_once_per_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("the same line")
        warn("the same line")
    assert len(caught) == 2 and {w.filename for w in caught} == {__file__}


def test_a_program_and_the_command_show_no_line_of_the_package(tmp_path):
    save_potential(narrow_model(), tmp_path / "model.safetensors")
    molecule("CH3OH").write(tmp_path / "start.xyz")
    program = """
        import ase.io
        from dpa4 import DPA4Calculator
        atoms = ase.io.read("start.xyz")
        atoms.calc = DPA4Calculator("model.safetensors", device="cpu")
        print(atoms.get_forces().shape)
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program), encoding="utf-8")
    command = ["-m", "dpa4", "relax", "model.safetensors", "start.xyz", "--steps", "1", "--device", "cpu"]
    for arguments, beginning in ((["program.py"], "program.py:6: RuntimeWarning: "), (command, "warning: ")):
        found = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        lines = [line for line in found.stderr.splitlines() if "training data" in line]
        assert len(lines) == 2 and all(beginning in line for line in lines), found.stderr
        assert "dpa4/interfaces" not in found.stderr and "ase/" not in found.stderr, found.stderr


def test_no_module_warns_in_another_way():
    found = [p for p in PACKAGE.rglob("*.py") if "warnings.warn(" in p.read_text(encoding="utf-8")]
    assert found == []
