"""Data of docs/silicon.md, made by scripts/make_silicon_data.py from small stand-ins for the files of mlearn."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from dpa4.data import read_frames

ROOT = Path(__file__).resolve().parents[2]
KILOBARS = [-12.75580023, -24.16122787, -8.04767554, -3.98085608, -3.05354453, -1.6561368]
"""Stress of a structure of mlearn: xx, yy, zz, xy, yz, xz, positive under compression."""
STRESS = [
    [0.007961544354348876, 0.0024846549552147855, 0.0010336792950911098],
    [0.0024846549552147855, 0.015080252424314993, 0.0019058726050285907],
    [0.0010336792950911098, 0.0019058726050285907, 0.0050229640325057485],
]
"""The same stress in eV/Angstrom^3, positive under tension."""


def make(monkeypatch, *arguments):
    script = ROOT / "scripts/make_silicon_data.py"
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def entry(group, energy):
    atoms = bulk("Si", cubic=True)
    sites = [
        {"species": [{"element": "Si", "occu": 1}], "xyz": position.tolist()} for position in atoms.positions
    ]
    return {
        "structure": {"lattice": {"matrix": atoms.cell.tolist()}, "sites": sites},
        "group": group,
        "outputs": {
            "energy": energy,
            "forces": (0.1 * np.arange(24).reshape(8, 3)).tolist(),
            "virial_stress": KILOBARS,
        },
    }


@pytest.mark.parametrize("folder", ["Si", "."])
def test_json_files_of_mlearn(tmp_path, monkeypatch, folder):
    source = tmp_path / "data" / folder
    source.mkdir(parents=True)
    for name, groups in {"training": ["Vacancy", "Elastic"], "test": ["Surface"]}.items():
        entries = [entry(group, -40.0 - k) for k, group in enumerate(groups)]
        (source / f"{name}.json").write_text(json.dumps(entries))
    make(monkeypatch, tmp_path / "data", tmp_path / "out")

    frames = read_frames(tmp_path / "out/Si_train.xyz")
    assert [frame.energy for frame in frames] == [-40.0, -41.0]
    assert [frame.group for frame in frames] == ["Vacancy", "Elastic"]
    np.testing.assert_allclose(frames[0].forces, 0.1 * np.arange(24).reshape(8, 3), atol=1e-8)
    volume = 5.43**3
    np.testing.assert_allclose(frames[0].virial, -volume * np.array(STRESS), rtol=1e-6)
    assert len(read_frames(tmp_path / "out/Si_test.xyz")) == 1
    assert len(read(tmp_path / "out/si64.xyz")) == 64
    assert len(read(tmp_path / "out/si.xyz")) == 8
    assert len(read(tmp_path / "out/si-primitive.xyz")) == 2


@pytest.mark.parametrize("folder", ["mlearn", "."])
def test_extended_xyz(tmp_path, monkeypatch, folder):
    source = tmp_path / "data" / folder
    source.mkdir(parents=True)
    atoms = bulk("Si", cubic=True)
    atoms.info["group"] = "Surface"
    stress = np.array(STRESS)[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    atoms.calc = SinglePointCalculator(atoms, energy=-43.0, forces=np.full((8, 3), 0.25), stress=stress)
    for name in ("Si_train.xyz", "Si_test.xyz"):
        write(source / name, atoms)
    make(monkeypatch, tmp_path / "data", tmp_path / "out")

    (frame,) = read_frames(tmp_path / "out/Si_train.xyz")
    assert (frame.energy, frame.group) == (-43.0, "Surface")
    np.testing.assert_allclose(frame.forces, 0.25)
    np.testing.assert_allclose(frame.virial, -(5.43**3) * np.array(STRESS), rtol=1e-6)


def test_another_folder_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        make(monkeypatch, tmp_path, tmp_path / "out")
    assert "neither Si/training.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_shared_data_have_the_structures_of_the_page(tmp_path, monkeypatch, capsys):
    shared = ROOT.parent / "shared/data"
    if not (shared / "mlearn").is_dir():
        pytest.skip("needs the shared data")
    make(monkeypatch, shared, tmp_path)
    printed = capsys.readouterr().out
    assert "214 structures" in printed and "25 structures" in printed
