"""SPICE-MACE-OFF: errors by subset whose sizes are known, and their logarithmic mean."""

import pytest
from ase.io import write

from bench_cases import POTENTIAL, command, rows, saved_model
from dpa4.data import Frame, read_frames
from dpa4.leaderboards import run_spice, score_spice
from dpa4.leaderboards.metrics import log_mean
from dpa4.simulation import DPA4Calculator
from helpers import molecule


def test_log_mean():
    assert log_mean([1, 100]) == pytest.approx(10)
    assert log_mean([2, 4, 8]) == pytest.approx(4)
    with pytest.raises(ValueError, match=r"positive values, got \[1.0, 0.0\]"):
        log_mean([1, 0])


def frames(tmp_path) -> list[Frame]:
    """Molecules in two subsets whose labels are the predictions plus known errors."""
    images = []
    for seed in range(6):
        atoms = molecule(seed, 5 + seed)
        atoms.calc = DPA4Calculator(POTENTIAL, device="cpu", dtype="float64")
        subset, shift = ("water", 0.001) if seed % 2 else ("dipeptides", 0.004)
        energy = atoms.get_potential_energy() + shift * len(atoms)
        forces = atoms.get_forces() - 10 * shift
        atoms.calc = None
        atoms.info |= {"config_type": subset, "REF_energy": energy}
        atoms.arrays["REF_forces"] = forces
        images.append(atoms)
    write(tmp_path / "test.xyz", images, format="extxyz")
    return read_frames(tmp_path / "test.xyz")


def test_errors_by_subset_and_their_log_mean(tmp_path):
    structures = frames(tmp_path)
    state = run_spice(POTENTIAL, structures, tmp_path / "run", max_atoms=16, progress=False)
    assert state.done == 4 and state.failed == 0  # 5 + 6 | 7 + 8 | 9 | 10 atoms
    score = score_spice(tmp_path / "run")
    found = {row.subset: row for row in score.subsets}
    assert {n: row.structures for n, row in found.items()} == {"dipeptides": 3, "water": 3}
    # eight decimals in the file: errors of 1e-5 meV/Angstrom
    assert (found["water"].energy, found["water"].forces) == pytest.approx((1, 10), abs=1e-4)
    assert (found["dipeptides"].energy, found["dipeptides"].forces) == pytest.approx((4, 40), abs=1e-4)
    # sqrt(1 * 4), sqrt(10 * 40)
    assert (score.energy, score.forces) == pytest.approx((2, 20), abs=1e-4)
    table = rows(tmp_path / "run" / "errors.csv")
    assert [row["subset"] for row in table] == ["dipeptides", "water", "log mean"]
    assert len(rows(tmp_path / "run" / "structures.csv")) == 6
    assert (tmp_path / "run" / "errors.png").stat().st_size > 1000
    # a second call finds everything done; other batches are another run
    assert run_spice(POTENTIAL, structures, tmp_path / "run", max_atoms=16, progress=False).done == 4
    with pytest.raises(ValueError, match="max_atoms = 30, but .* holds results with max_atoms = 16"):
        run_spice(POTENTIAL, structures, tmp_path / "run", max_atoms=30, progress=False)


def test_structures_without_labels_are_refused(tmp_path):
    write(tmp_path / "plain.xyz", molecule(), format="extxyz")
    with pytest.raises(ValueError, match="plain.xyz, frame 0 lacks energy"):
        run_spice(POTENTIAL, read_frames(tmp_path / "plain.xyz"), tmp_path / "run", progress=False)


def test_command(tmp_path):
    frames(tmp_path)
    arguments = (saved_model(tmp_path), tmp_path / "test.xyz", "-o", tmp_path / "run", "--dtype", "float64")
    output = command("spice", *arguments, "--device", "cpu")
    assert "log mean" in output and "20.000" in output
