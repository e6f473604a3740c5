"""dpa4 data, and folders and patterns as data of the other commands."""

import ase.io
import pytest
from ase import Atoms, units
from ase.build import bulk
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.data import read_frames
from vasp_runs import script, write_run

TINY = ["model.channels=8", "model.lmax=1", "model.n_blocks=1", "model.mixing_layers=1", "model.cutoff=4"]


def run(*arguments: object, ok: bool = True) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert (result.exit_code == 0) == ok, result.output
    return result.output


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Working directory with a folder of three runs, one with an ionic step that did not converge."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_run(
            tmp_path / f"runs/{number}", 4, 10 * number, unconverged=frozenset({2} if number == 1 else ())
        )


def test_collect(runs):
    output = run("data", "collect", "runs/*/OUTCAR", "-o", "train.xyz")
    assert "3 data files found" in output and "wrote train.xyz: 11 structures" in output
    assert "left out: runs/1/OUTCAR, frame 2: electronic loop not converged (60 of 60 steps)" in output
    assert max(map(len, output.splitlines())) <= 96
    assert len(read_frames("train.xyz")) == 11
    assert "train.xyz already exists" in run("data", "collect", "runs", "-o", "train.xyz", ok=False)
    shell = run("data", "collect", *(f"runs/{k}/OUTCAR" for k in range(3)), "-o", "same.xyz")
    assert shell.replace("same.xyz", "train.xyz") == output
    with open("train.xyz") as one, open("same.xyz") as two:
        assert one.read() == two.read()


def test_collect_checks_the_units(tmp_path, monkeypatch):
    """The energies of single calculations are in kcal/mol."""
    monkeypatch.chdir(tmp_path)
    for number in range(14):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=number)
        atoms = script.labelled(atoms)
        atoms.calc.results["energy"] *= units.mol / units.kcal
        script.write_run(tmp_path / "runs" / str(number), script.Run([atoms]))
    output = run("data", "collect", "runs", "-o", "train.xyz")
    assert "Implausible labels" in output and "energies in kcal/mol" in output
    assert "wrote train.xyz: 14 structures" in output  # nothing is dropped or converted


def test_collect_without_anything_to_collect(runs):
    assert "error: there is no" not in run("data", "collect", "--help")
    assert "error: no such file or directory: absent" in run("data", "collect", "absent", ok=False)
    output = run("data", "collect", "runs/0/POSCAR", "-o", "train.xyz", ok=False)
    assert "error: no structure to use in 1 file; train.xyz is not written" in output
    assert "runs/0/POSCAR: 1 without energy, forces and stress" in output


@pytest.mark.slow
def test_training_and_evaluation_on_a_folder_of_runs(runs):
    run("init", "run.yaml", "--train", "runs")
    settings = [
        *TINY,
        "training.steps=2",
        "training.batch_size=4",
        "device=cpu",
        "data.validation=runs/*/OUTCAR",
    ]
    output = run("train", "run.yaml", *(x for s in settings for x in ("--set", s)))
    assert "data.train: 3 data files found; 9 other files are not read (INCAR, POSCAR, OUTCAR)" in output
    assert "data.validation: 3 data files found" in output
    assert "warning: left out: runs/1/vasprun.xml, frame 2: electronic loop not converged" in output
    assert "11" in output
    output = run("eval", "run/best.safetensors", "runs", "--device", "cpu")
    assert "3 data files found; 9 other files" in output and "meV/atom" in output
    assert [f.group for f in read_frames("eval/predictions.xyz")] == ["runs"] * 11
    atom = script.labelled(Atoms("Cu", cell=[12, 12, 12]))
    atom.info["config_type"] = "IsolatedAtom"
    ase.io.write("atom.xyz", atom)
    output = run("eval", "run/best.safetensors", "runs", "atom.xyz", "--device", "cpu", "--overwrite")
    assert "free atoms are left out: 1" in output
    assert len(read_frames("eval/predictions.xyz")) == 11


def test_missing_files_are_named(runs):
    message = "error: no file or directory matches runs/*/vasp.xml; relative patterns start in the working"
    assert message in run("init", "run.yaml", "--train", "runs/*/vasp.xml", ok=False)
    run("init", "run.yaml", "--train", "runs")
    assert message in run("train", "run.yaml", "--set", "data.train=runs/*/vasp.xml", ok=False)
