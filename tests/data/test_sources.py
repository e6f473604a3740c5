"""Files, patterns and folders as data: what is found, in which order, and what is refused."""

import gzip
import shutil

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from dpa4.data import find_sources, implausible_labels, is_isolated_atom, read_frames
from vasp_runs import script, write_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Working directory with the runs bulk/01, bulk/02 and slab/700K, one of them without a vasprun.xml."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/bulk/01", seed=0)
    write_run(tmp_path / "runs/bulk/02", seed=10)
    write_run(tmp_path / "runs/slab/700K", seed=20, only="OUTCAR")
    (tmp_path / "runs/README").write_text("three runs\n")
    (tmp_path / "runs/.hidden").mkdir()
    (tmp_path / "runs/.hidden/OUTCAR").write_text("a copy of an editor")
    return tmp_path


def names(*entries) -> list[str]:
    return [str(path) for path in find_sources(entries).paths]


ALL = ["runs/bulk/01/vasprun.xml", "runs/bulk/02/vasprun.xml", "runs/slab/700K/OUTCAR"]


def test_folder_of_runs(runs):
    assert names("runs") == ALL
    found = find_sources("runs")
    ignored = {str(path) for path in found.ignored}
    assert {"runs/README", "runs/bulk/01/INCAR", "runs/bulk/01/POSCAR", "runs/bulk/01/OUTCAR"} <= ignored
    assert found.text == "3 data files found; 7 other files are not read (README, INCAR, POSCAR, OUTCAR)"


@pytest.mark.parametrize("pattern", ["runs/**", "runs/*", "runs/*/*", "run[s]", "runs/*/*/*"])
def test_patterns_find_what_the_folder_has(runs, pattern):
    assert sorted(names(pattern)) == ALL


def test_entries_of_every_kind_are_equal(runs):
    """A file, the pattern that matches it, its folder and its absolute path give the same structures."""
    entries = ["runs/slab/700K/OUTCAR", "runs/slab/*/OUTCAR", "runs/slab", runs / "runs/slab/700K"]
    frames = [read_frames(entry) for entry in entries]
    for other in frames[1:]:
        for one, two in zip(frames[0], other, strict=True):
            np.testing.assert_array_equal(one.forces, two.forces)
            assert (one.energy, one.group) == (two.energy, two.group)


def test_files_alone_are_no_search(runs):
    assert not find_sources(ALL).searched
    assert find_sources("runs/bulk").searched
    assert find_sources("runs/*/*/OUTCAR").searched


def test_only_the_outcars_if_only_they_are_named(runs):
    assert names("runs/*/*/OUTCAR") == [name.replace("vasprun.xml", "OUTCAR") for name in ALL]


def test_a_file_that_is_found_twice_is_read_once(runs):
    (runs / "link").symlink_to("runs/bulk")
    (runs / "runs/bulk/again").symlink_to(runs / "runs")  # does not lead to an endless search
    assert names("runs/bulk/02/vasprun.xml", "link", "runs") == [ALL[1], "link/01/vasprun.xml", ALL[2]]


def test_a_name_with_brackets_is_a_file_if_it_exists(runs):
    ase.io.write("a[1].xyz", molecule("H2O"))
    ase.io.write("a1.xyz", molecule("H2O"))
    assert names("a[1].xyz") == ["a[1].xyz"]
    (runs / "a[1].xyz").unlink()
    assert names("a[1].xyz") == ["a1.xyz"]


def test_pattern_of_files_that_are_no_results(runs):
    """Structures without labels can be evaluated; no data file among the matches would hint at another wish."""
    for name in ("a", "b"):
        ase.io.write(f"{name}.cif", molecule("H2O", vacuum=3, pbc=True))
    assert names("*.cif") == ["a.cif", "b.cif"]


def test_databases_trajectories_and_other_programs(tmp_path):
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((3, 3)))
    for name in ("a.xyz", "b.traj", "c.db", "d.extxyz"):
        ase.io.write(tmp_path / name, atoms)
    with (tmp_path / "a.xyz").open("rb") as file, gzip.open(tmp_path / "e.xyz.gz", "wb") as packed:
        shutil.copyfileobj(file, packed)
    ase.io.write(tmp_path / "no_suffix", atoms, format="traj")
    (tmp_path / "slurm.out").write_text("no output of Quantum ESPRESSO, whatever its suffix suggests\n")
    (tmp_path / "notes.log").write_text("no output of Gaussian\n")
    (tmp_path / "pw.out").write_text("\n     Program PWSCF v.7.2 starts on  1Jan2026 at 12: 0: 0 \n")
    found = find_sources(tmp_path)
    expected = ["a.xyz", "b.traj", "c.db", "d.extxyz", "e.xyz.gz", "no_suffix", "pw.out"]
    assert [path.name for path in found.paths] == expected
    assert [path.name for path in found.ignored] == ["notes.log", "slurm.out"]
    (tmp_path / "pw.out").unlink()
    assert [f.energy for f in read_frames(tmp_path)] == [-1.0] * 6


def test_refused_entries(runs):
    with pytest.raises(FileNotFoundError, match="no such file or directory: absent"):
        find_sources(["runs", "absent"])
    with pytest.raises(
        FileNotFoundError, match=r"no file or directory matches runs/\*.xyz; relative patterns start in"
    ):
        find_sources("runs/*.xyz")
    (runs / "empty/deep").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"^empty is a directory with neither deepmd systems .* name the files to read$"
    ):
        find_sources("empty")
    with pytest.raises(ValueError, match=r"^emp\* matches 1 directories with neither"):
        find_sources("emp*")
    (runs / "runs/system").mkdir()
    (runs / "runs/system/type.raw").touch()
    with pytest.raises(
        ValueError, match=r"runs has both deepmd systems \(runs/system\) and other data \(runs/bulk/01/"
    ):
        find_sources("runs")
    assert names("runs/system", "runs/slab") == ["runs/system", ALL[2]]


def test_groups_of_runs_are_folders_that_are_no_numbers(runs):
    assert [f.group for f in read_frames("runs")] == ["bulk"] * 6 + ["700K"] * 3


def test_free_atoms_in_a_folder_of_that_name(tmp_path):
    """A run of VASP is periodic, so that only the name tells a free atom in a box from a crystal."""
    for folder in ("isolated_atoms/Cu", "crystal/Cu"):
        atoms = Atoms("Cu", cell=[9, 9, 9], pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=-0.2, forces=np.zeros((1, 3)), stress=np.zeros(6))
        script.write_run(tmp_path / folder, script.Run([atoms]))
    crystal, free = read_frames(tmp_path)
    assert (crystal.group, free.group) == ("Cu", "isolated_atoms")
    assert (is_isolated_atom(crystal), is_isolated_atom(free)) == (False, True)


def test_labels_of_single_calculations_are_compared_with_each_other(tmp_path):
    """Each run has one structure, so that no file alone shows that its energies are in kcal/mol."""
    for number in range(14):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=number)
        atoms = script.labelled(atoms)
        atoms.calc.results["energy"] *= units.mol / units.kcal
        script.write_run(tmp_path / str(number), script.Run([atoms]))
    findings = implausible_labels(read_frames(tmp_path))
    assert [f.label for f in findings] == ["energy"]
    assert "energies in kcal/mol" in findings[0].text
