"""Collection of many files in one: contents, record, and files that are unusable in part."""

import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

from dpa4.data import Frame, LabelKeys, find_sources, read_frames
from dpa4.data.collection import collect
from vasp_runs import write_run


def text_of(table, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def same(one: Frame, two: Frame) -> bool:
    arrays = ("atomic_numbers", "positions", "cell", "pbc", "forces", "virial")
    close = [np.allclose(getattr(one, n), getattr(two, n), rtol=0, atol=2e-7) for n in arrays]
    return all(close) and one.energy == pytest.approx(two.energy, abs=1e-9) and one.group == two.group


def test_collected_file_has_the_structures_of_the_runs(tmp_path):
    write_run(tmp_path / "runs/a/1", seed=0)
    write_run(tmp_path / "runs/a/2", seed=5)
    collection = collect(find_sources(tmp_path / "runs"), tmp_path / "train.xyz")
    frames, again = read_frames(tmp_path / "runs"), read_frames(tmp_path / "train.xyz")
    assert len(frames) == 6
    assert all(same(*pair) for pair in zip(frames, again, strict=True))
    assert all(same(*pair) for pair in zip(frames, collection.frames, strict=True))
    atoms = ase.io.read(tmp_path / "train.xyz", 4)
    assert atoms.info["source"] == f"{tmp_path / 'runs/a/2/vasprun.xml'}, frame 1"
    assert {"REF_energy", "REF_stress", "config_type"} <= set(atoms.info)
    assert atoms.calc is None  # no label could be taken for a prediction


def test_molecules_keep_charge_weight_and_virial(tmp_path):
    atoms = molecule("H2O")
    atoms.info |= {"charge": -1, "spin": 2, "config_weight": 0.5, "config_type": "anion", "virial": np.eye(3)}
    atoms.calc = SinglePointCalculator(atoms, energy=-1.5)
    ase.io.write(tmp_path / "a.xyz", atoms)
    collect(find_sources(tmp_path / "a.xyz"), tmp_path / "b.xyz")
    (one,), (two,) = read_frames(tmp_path / "a.xyz"), read_frames(tmp_path / "b.xyz")
    assert (two.energy, two.forces, two.weight, two.group) == (-1.5, None, 0.5, "anion")
    assert two.charge_spin == {"charge": -1, "spin": 2} == one.charge_spin
    np.testing.assert_allclose(two.virial, one.virial)


def test_whatever_is_left_out_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/1", 4, unconverged=frozenset({1}), only="OUTCAR")
    write_run(tmp_path / "runs/2", 4, seed=7, killed=True, only="vasprun.xml")
    write_run(tmp_path / "runs/3", 3, seed=9, only="OUTCAR")
    path = tmp_path / "runs/3/OUTCAR"
    before, row, after = path.read_text().rpartition("TOTAL-FORCE (eV/Angst)")
    path.write_text(before + row + after.replace("0.", "*.", 9))  # numbers that do not fit in their columns
    (tmp_path / "runs/4").mkdir()
    (tmp_path / "runs/4/OUTCAR").write_text(" vasp.6.0.0, killed before the first step\n")
    atoms = molecule("H2O")
    bad = molecule("H2O")
    bad.info["REF_energy"] = np.nan
    good = molecule("H2O")
    good.info["REF_energy"] = -3.0
    ase.io.write(tmp_path / "runs/5.xyz", [atoms, bad, good])
    found = collect(find_sources("runs"), tmp_path / "train.xyz")
    kept = {str(file.path): file.frames for file in found.files}
    expected = {
        "runs/1/OUTCAR": 3,
        "runs/2/vasprun.xml": 3,
        "runs/3/OUTCAR": 2,
        "runs/4/OUTCAR": 0,
        "runs/5.xyz": 1,
    }
    assert kept == expected
    reasons = [(str(s.path), s.number, s.reason) for s in found.skipped]
    assert reasons[0] == ("runs/1/OUTCAR", 1, "electronic loop not converged (60 of 60 steps)")
    assert reasons[1] == ("runs/2/vasprun.xml", None, "the file ends within ionic step 4")
    assert reasons[2][:2] == ("runs/3/OUTCAR", None) and "frame 2 cannot be read by ASE" in reasons[2][2]
    assert reasons[3][:2] == ("runs/4/OUTCAR", None) and "Incomplete OUTCAR" in reasons[3][2]
    assert reasons[4] == ("runs/5.xyz", 1, "frame 1: energy not finite; correct or remove the structure")
    assert reasons[5] == ("runs/5.xyz", None, "1 without energy, forces and stress")
    assert len(read_frames("train.xyz")) == 9
    text = text_of(found.table())
    assert max(map(len, text.splitlines())) <= 80
    assert "runs/2/vasprun.xml" in text
    assert "all 5" in text and "E, F 8, S 8" in text


def test_long_lists_show_the_files_with_troubles(tmp_path):
    atoms = molecule("H2O")
    atoms.info["REF_energy"] = -3.0
    for k in range(60):
        ase.io.write(tmp_path / f"{k:02d}.xyz", [atoms, molecule("H2")] if k == 55 else atoms)
    text = text_of(collect(find_sources(tmp_path), tmp_path / "train.xyz").table(), 200)
    assert "39.xyz" in text and "40.xyz" not in text and "55.xyz" in text
    assert "and 19 more files" in text


def test_long_names_break_after_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a_long_name/of_a_folder/of_runs", 1)
    text = text_of(collect(find_sources("a_long_name"), tmp_path / "train.xyz").table())
    assert "│ a_long_name/of_a_folder/" in text and "│ of_runs/vasprun.xml " in text


def test_nothing_is_overwritten_and_nothing_empty_is_written(tmp_path):
    ase.io.write(tmp_path / "bare.xyz", molecule("H2O"))
    target = tmp_path / "train.xyz"
    assert not collect(find_sources(tmp_path / "bare.xyz"), target).frames
    assert not target.exists()
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="train.xyz already exists; replace it with --overwrite"):
        collect(find_sources(tmp_path / "bare.xyz"), target)


def test_names_of_labels(tmp_path):
    atoms = molecule("H2O")
    atoms.info["dft_energy"] = -3.0
    ase.io.write(tmp_path / "a.xyz", atoms)
    collect(find_sources(tmp_path / "a.xyz"), tmp_path / "b.xyz", LabelKeys(energy="dft_energy"))
    assert read_frames(tmp_path / "b.xyz")[0].energy == -3.0
    with pytest.raises(ValueError, match="data.keys.energy = 'other' is in no structure"):
        collect(find_sources(tmp_path / "a.xyz"), tmp_path / "c.xyz", LabelKeys(energy="other"))
    assert not (tmp_path / "c.xyz").exists()
