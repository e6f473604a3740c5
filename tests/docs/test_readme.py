"""README, its picture, and the tables of the costs of presets."""

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from matplotlib.image import imread

from dpa4.model.presets import PRESETS, preset
from dpa4.model.shapes import count_parameters
from helpers import molecule

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SIZES = (ROOT / "docs/sizes.md").read_text(encoding="utf-8")


def script(path: str) -> ModuleType:
    """Script of the repository as a module."""
    spec = spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_five_lines_a_picture_and_two_commands():
    introduction, picture = re.match(r"# dpa4\n\n(.*?)\n\n!\[[^\]]+\]\(([^)]+)\)", README, re.DOTALL).groups()
    assert len(introduction.splitlines()) == 5
    assert imread(ROOT / picture).shape[1] > 1000
    assert re.findall(r"^make (\w+)", README, re.MULTILINE) == ["demo", "test"]
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 5


def test_model_of_the_example_is_that_of_the_demo():
    (model,) = re.findall(r'DPA4Calculator\("([^"]+)"\)', README)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    folder = re.search(r"^DEMO := (.*)$", makefile, re.MULTILINE).group(1)
    assert f"--set output=$(DEMO){Path(model).parent.as_posix().removeprefix(folder)}" in makefile
    assert model.startswith(f"{folder}/") and Path(model).name == "best.safetensors"


def test_picture_is_drawn_from_the_folder_of_the_demo(tmp_path, monkeypatch):
    folder = tmp_path / "demo-run"
    for name in ("training", "evaluation", "md"):
        (folder / name).mkdir(parents=True)
    (folder / "training/valid.csv").write_text(
        "step,energy_mae,forces_mae\n100,50,300\n200,20,100\n", encoding="utf-8"
    )
    frames = []
    for seed, group in enumerate(["ethane", "acetamide"]):
        atoms = molecule(seed, 4)
        atoms.info["config_type"] = group
        atoms.arrays["REF_forces"] = np.full((4, 3), 1.0)
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.full((4, 3), 0.5))
        frames.append(atoms)
    write(folder / "evaluation/predictions.xyz", frames)
    (folder / "md/thermo.csv").write_text(
        "step,time_ps,potential_eV,kinetic_eV,total_eV,temperature_K\n0,0,1,2,3,300\n1,0.5,1.5,1.5,3,200\n"
    )
    settings = {"settings": {"ensemble": "nve"}, "system": {"elements": ["C", "H"]}}
    (folder / "md/restart.json").write_text(json.dumps(settings), encoding="utf-8")
    picture = tmp_path / "demo.png"
    monkeypatch.setattr(sys, "argv", ["make_readme_figure.py", str(folder), "--output", str(picture)])
    script("scripts/make_readme_figure.py").main()
    assert imread(picture).shape[1] > 1000


def record(**entries: object) -> dict:
    """Measurement of nano on one thread of a CPU."""
    return {
        "model": "nano", "symmetry": "O3", "device": "CPU, threads: 1", "work": "train", "atoms": 64,
        "precision": "high", "ms": 900.0, "min_ms": 800.0, "min_processor_ms": 400.0, "peak_gib": 0.5,
        "before_gib": 0.375,
    } | entries  # fmt: skip


def test_table_of_sizes_has_the_shortest_time_and_the_memory_per_atom():
    sizes = script("benchmarks/sizes.py")
    records = [
        record(min_processor_ms=500.0),
        record(),
        record(model="mini", error="out of memory") | {"min_ms": 1.0},
        record(work="energy+forces", min_processor_ms=86.4),
    ]
    del records[2]["min_ms"]
    heading, table = sizes.tables(records).split("\n\n")
    assert heading == "CPU, threads: 1, symmetry O3:"
    assert table.splitlines()[-1] == "| nano | 410,636 | 0.4; 2 | 86.4; 1; 2 |"
    gpu = record(device="NVIDIA H200", reserved_gib=1.0)
    del gpu["before_gib"], gpu["min_processor_ms"]
    assert "| 0.8; 16 |" in sizes.tables([gpu])


@pytest.mark.parametrize("name", PRESETS)
def test_page_of_sizes_has_every_preset_and_its_parameters(name):
    count = f"{count_parameters(preset(name, symmetry='O3')).total:,}"
    assert re.search(rf"^\| {name} \| {count} \| ", SIZES, re.MULTILINE)
