"""Files of structures that simulations write: readable, without labels of the initial structure, by one writer."""

import ast
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read

import dpa4
from dpa4.data import with_results
from dpa4.potential.descriptors import write_embeddings
from dpa4.simulation import equation_of_state, relax_all, run_md, run_neb
from dpa4.simulation.runs.shards import Shard, join_shards
from helpers import crystal, random_potential

OPTIONS = {"progress": False}


def start() -> Atoms:
    """Crystal with labels of another calculation, and with entries that break the format."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.02, seed=0)
    for name in ("REF_forces", "forces", "dft_forces", "magmoms"):
        atoms.arrays[name] = np.full((4, 3), 9.0)
    atoms.arrays |= {"born": np.ones((4, 3, 3)), "label": np.array(["a b", "", "c", "d"])}
    atoms.info |= dict.fromkeys(("REF_energy", "energy", "dft_energy", "REF_virial", "stress"), 999.0)
    atoms.info |= {"note": "first\nsecond", "empty": "", "Å": "Å", "odd key=": {"a": None}, "step": "user's"}
    return atoms


def check(path: Path, count: int, energy: bool = True) -> None:
    images = read(path, ":")
    assert len(images) == count
    for atoms in images:
        assert atoms.info["note"] == "first\nsecond" and atoms.info["empty"] == "" and atoms.info["_"] == "Å"
        assert not {"REF_energy", "dft_energy", "REF_virial", "virial", "energy"} & set(atoms.info)
        assert not {"REF_forces", "dft_forces", "forces"} & set(atoms.arrays)
        assert atoms.arrays["born"].shape == (4, 9) and atoms.arrays["label"].tolist() == [
            "a_b",
            "_",
            "c",
            "d",
        ]
        assert energy == (atoms.calc is not None)
        if energy:
            assert abs(atoms.get_potential_energy()) < 10  # that of the simulation
            assert "magmoms" not in atoms.calc.results


def test_dynamics(tmp_path):
    run_md(start(), EMT(), tmp_path, steps=2, interval=1, **OPTIONS)
    check(tmp_path / "trajectory.xyz", 3)
    assert [atoms.info["step"] for atoms in read(tmp_path / "trajectory.xyz", ":")] == [0, 1, 2]


def test_relaxation(tmp_path):
    relax_all([start(), start()], EMT(), tmp_path, fmax=0.1, **OPTIONS)
    check(tmp_path / "relaxed.xyz", 2)


def test_path(tmp_path):
    end = start()
    end.positions[0] += [0.3, 0, 0]
    run_neb(start(), end, EMT(), tmp_path, images=1, steps=1, **OPTIONS)
    check(tmp_path / "path.xyz", 3)
    run_neb(start(), end, EMT(), tmp_path, images=1, steps=2, resume=True, **OPTIONS)
    check(tmp_path / "path.xyz", 3)


def test_equation_of_state(tmp_path):
    equation_of_state(start(), EMT(), tmp_path, points=5, fmax=0.05, **OPTIONS)
    check(tmp_path / "eos.xyz", 5)


def test_embeddings(tmp_path):
    """The structures are the given ones, whose labels stay, except for results that belong in a calculator."""
    atoms = crystal(1)
    atoms.info = {"note": "a\nb", "REF_energy": 3.0, "energy": 1.0}
    write_embeddings(random_potential(), [atoms], tmp_path / "a.xyz", progress=False)
    found = read(tmp_path / "a.xyz")
    assert found.info == {"note": "a\nb", "REF_energy": 3.0}
    assert found.arrays["embedding"].shape == (len(atoms), 8)


def test_screening(tmp_path):
    """A text that looks like the number of a structure does not take its place."""
    shard = Shard(tmp_path, ("structure", "status"), {})
    for number in range(2):
        frame = with_results(start(), energy=-1.0)
        frame.info = (
            {"note": "first\nsecond", "odd": "screen_structure=7"} | frame.info | {"screen_structure": 9}
        )
        shard.record({"structure": number, "status": "converged"}, frame)
    shard.finish(2)
    shard.close()
    assert join_shards(tmp_path, 1)
    check(tmp_path / "relaxed.xyz", 2)
    assert [atoms.info["screen_structure"] for atoms in read(tmp_path / "relaxed.xyz", ":")] == [0, 1]


def test_structures_are_written_at_one_place():
    """Nothing but the writer uses ASE's writers, or attaches results to a structure."""
    writing = {"write", "write_xyz", "Trajectory", "SinglePointCalculator"}
    for file in Path(dpa4.__file__).parent.rglob("*.py"):
        imports = (n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.ImportFrom))
        names = {
            alias.name for node in imports if (node.module or "").startswith("ase") for alias in node.names
        }
        assert file.name == "writers.py" or not names & writing, file
        assert "ase.io.write" not in file.read_text("utf-8"), file
