"""Relaxation: minima are reached, cells too, constraints hold, and what is written."""

import csv
import os
import signal

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read

from dpa4.simulation import DPA4Calculator, relax, relax_all
from helpers import crystal, molecule, random_potential


def squeezed() -> Atoms:
    """A rattled, strained cell of copper."""
    atoms = bulk("Cu", a=3.5, cubic=True)
    atoms.rattle(0.08, seed=1)
    atoms.set_cell(atoms.cell.array @ np.diag([1.0, 1.03, 0.98]), scale_atoms=True)
    return atoms


@pytest.mark.parametrize("optimizer", ["fire", "bfgs", "lbfgs"])
def test_reaches_a_minimum(optimizer):
    atoms = squeezed()
    cell = atoms.cell.array.copy()
    result = relax(atoms, EMT(), fmax=0.01, optimizer=optimizer)
    forces = np.linalg.norm(atoms.get_forces(), axis=1).max()
    assert result.converged and not result.interrupted
    assert result.max_force == pytest.approx(forces) and forces < 0.01
    assert result.energy == pytest.approx(atoms.get_potential_energy())
    assert result.energy < result.initial_energy - 0.05
    assert 0 < result.steps < 500
    assert np.array_equal(atoms.cell.array, cell)


def test_relaxes_the_cell():
    atoms = squeezed()
    result = relax(atoms, EMT(), fmax=1e-3, optimizer="lbfgs", cell=True)
    assert result.converged
    np.testing.assert_allclose(atoms.cell.lengths(), 3.59, atol=0.01)  # the lattice constant of EMT
    np.testing.assert_allclose(atoms.get_stress(), 0, atol=1e-4)


@pytest.mark.parametrize(("structure", "cell"), [(molecule, False), (crystal, True)])
def test_lowers_the_energy_and_forces_of_a_potential(structure, cell):
    atoms = structure()
    calculator = DPA4Calculator(random_potential(), device="cpu", dtype="float64")
    atoms.calc = calculator
    before = np.linalg.norm(atoms.get_forces(), axis=1).max()
    result = relax(atoms, calculator, fmax=before / 3, steps=150, optimizer="bfgs", cell=cell)
    assert result.converged
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() == pytest.approx(result.max_force)
    assert result.max_force < before / 2
    assert result.energy < result.initial_energy


def test_constraints_and_momenta_are_kept():
    atoms = squeezed()
    atoms.set_constraint(FixAtoms([0]))
    atoms.set_momenta(np.ones((4, 3)), apply_constraint=False)
    fixed = atoms.positions[0].copy()
    assert relax(atoms, EMT(), fmax=0.01).converged
    assert np.array_equal(atoms.positions[0], fixed)
    assert np.all(atoms.get_momenta() == 1)
    assert np.linalg.norm(atoms.get_forces(apply_constraint=False)[0]) > 0


def test_too_few_steps_are_reported():
    result = relax(squeezed(), EMT(), fmax=0.001, steps=2)
    assert (result.converged, result.steps) == (False, 2)
    start = squeezed()
    assert relax(start, EMT(), steps=0).steps == 0
    assert np.array_equal(start.positions, squeezed().positions)


def test_trajectory(tmp_path):
    atoms = squeezed()
    path = tmp_path / "path.xyz"
    path.write_text("leftover")
    result = relax(atoms, EMT(), fmax=0.01, trajectory=path)
    frames = read(path, ":")
    assert len(frames) == result.steps + 1
    assert frames[0].get_potential_energy() == pytest.approx(result.initial_energy)
    assert frames[-1].get_potential_energy() == pytest.approx(result.energy)
    np.testing.assert_allclose(frames[-1].get_stress(), atoms.get_stress(), atol=1e-7)


class Interrupting(EMT):
    """Sends Ctrl-C at the fifth evaluation."""

    evaluations = 0

    def calculate(self, *arguments):
        self.evaluations += 1
        if self.evaluations == 5:
            os.kill(os.getpid(), signal.SIGINT)
        super().calculate(*arguments)


def test_interruption_keeps_what_was_reached(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    results = relax_all([squeezed(), squeezed()], Interrupting(), tmp_path, fmax=1e-6, progress=False)
    assert len(results) == 1 and results[0].interrupted and not results[0].converged
    assert 1 <= results[0].steps <= 5
    assert len(read(tmp_path / "relaxed.xyz", ":")) == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_many_structures(tmp_path):
    structures = [squeezed(), bulk("Cu", a=3.6)]
    results = relax_all(structures, EMT(), tmp_path / "out", fmax=0.01, progress=False)
    frames = read(tmp_path / "out" / "relaxed.xyz", ":")
    rows = list(csv.DictReader((tmp_path / "out" / "relax.csv").open()))
    assert [r.steps > 0 for r in results] == [True, False]
    for number, (atoms, frame, row, result) in enumerate(zip(structures, frames, rows, results, strict=True)):
        np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-7)
        assert float(row["energy"]) == result.energy == pytest.approx(frame.get_potential_energy())
        assert (row["structure"], row["converged"]) == (str(number), "True")
    assert (rows[0]["formula"], rows[1]["formula"]) == ("Cu4", "Cu")


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="optimizer must be one of fire, bfgs, lbfgs, got 'newton'"):
        relax(squeezed(), EMT(), optimizer="newton")
    with pytest.raises(ValueError, match="fmax must be a positive force in eV/Angstrom, got 0"):
        relax(squeezed(), EMT(), fmax=0)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        relax(squeezed(), EMT(), steps=-1)
    with pytest.raises(
        ValueError, match="structure 0: cell = True needs a cell periodic along all three axes"
    ):
        relax_all([molecule()], EMT(), tmp_path, cell=True, progress=False)
