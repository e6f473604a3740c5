"""Phonons: known springs, comparison with phonopy, sums, heat capacity, imaginary modes, resuming."""

import csv
import json
import signal
import sys

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import write
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.potential.checkpoint import save_potential
from dpa4.simulation import DPA4Calculator, phonons, relax
from dpa4.simulation.crystal_calculation import Stopped
from dpa4.simulation.phonon import supercell_of_length
from helpers import crystal, graph_of, random_potential

phonopy = pytest.importorskip("phonopy")

R = 8.31446261815324  # J/(K mol)
CELLS = {"supercell": (3, 3, 3), "mesh": 30.0}


def run(atoms, calculator, folder, **options):
    return phonons(atoms, calculator, folder, **({"progress": False} | CELLS | options))


def columns(path) -> dict[str, np.ndarray]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def frequencies(folder, *wave_vectors) -> np.ndarray:
    """Frequencies in THz of shape (Q, 3 N), from the file that phonopy loads."""
    phonon = phonopy.load(folder / "phonopy_params.yaml", log_level=0)
    return phonon.run_qpoints(wave_vectors).frequencies


GAMMA, X, L = (0, 0, 0), (0.5, 0.5, 0), (0.5, 0.5, 0.5)  # of the primitive vectors of a face-centred lattice


def springs() -> tuple[Atoms, LennardJones, float]:
    """Face-centred cubic crystal of springs between neighbours only, and the frequency sqrt(k/m) in THz."""
    sigma, epsilon = 2.5, 0.2
    distance = 2 ** (1 / 6) * sigma
    k = 72 * epsilon / 2 ** (1 / 3) / sigma**2  # curvature of the Lennard-Jones potential in its minimum
    calculator = LennardJones(sigma=sigma, epsilon=epsilon, rc=1.2 * distance, smooth=False)
    atoms = bulk("Ar", "fcc", a=distance * 2**0.5)
    omega = np.sqrt(k / atoms.get_masses()[0])  # in ASE's units of time
    return atoms, calculator, omega / (2 * np.pi) * units.fs * 1000


def test_springs_between_neighbours_of_a_cubic_lattice(tmp_path):
    """Squared frequencies m w^2: 8 k and twice 4 k at X; 8 k and twice 2 k at L; zero at Gamma."""
    atoms, calculator, unit = springs()
    result = run(atoms, calculator, tmp_path, supercell=(4, 4, 4), displacement=0.01, relax_first=False)
    gamma, x, low = frequencies(tmp_path, GAMMA, X, L)
    np.testing.assert_allclose(gamma, 0, atol=1e-4)
    # the potential is not harmonic: (0.01 Angstrom)^2 times its fourth derivative, 0.02 %
    np.testing.assert_allclose(x, unit * np.sqrt([4, 4, 8]), rtol=1e-3)
    np.testing.assert_allclose(low, unit * np.sqrt([2, 2, 8]), rtol=1e-3)
    assert result.max_frequency == pytest.approx(unit * 8**0.5, rel=1e-3)
    assert (result.displacements, result.atoms_of_primitive_cell, result.imaginary) == (1, 1, False)
    assert abs(result.min_frequency) < 1e-4 and result.residual_force < 1e-9


def test_same_as_phonopy_used_by_hand(tmp_path):
    """From the conventional cell, which the run relaxes and reduces to the primitive cell by its symmetry."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    result = run(bulk("Cu", a=3.6, cubic=True), EMT(), tmp_path, supercell=(2, 2, 2))
    atoms = bulk("Cu", a=3.6, cubic=True)
    relax(atoms, EMT(), fmax=1e-4, optimizer="bfgs", cell="full")
    cell = PhonopyAtoms(
        atoms.get_chemical_symbols(), cell=atoms.cell, scaled_positions=atoms.get_scaled_positions()
    )
    phonon = Phonopy(cell, np.diag([2, 2, 2]), primitive_matrix="F")
    phonon.generate_displacements(distance=0.01)
    forces = []
    for displaced in phonon.supercells_with_displacements:
        displaced = Atoms(displaced.symbols, cell=displaced.cell, positions=displaced.positions, pbc=True)
        displaced.calc = EMT()
        forces.append(displaced.get_forces())
    phonon.forces = forces
    phonon.produce_force_constants()
    wave_vectors = (X, L, (0.1, 0.2, 0.3))
    expected = phonon.run_qpoints(wave_vectors).frequencies
    # the two relaxed lattices differ by fmax: about 1e-5 of the lattice constant
    np.testing.assert_allclose(frequencies(tmp_path, *wave_vectors), expected, atol=2e-3)
    assert 7.5 < result.max_frequency < 8.5  # measured: 7.3 THz
    assert result.supercell == (2, 2, 2) and result.atoms_of_primitive_cell == 1


def test_sums_and_thermal_properties(tmp_path):
    atoms = bulk("Cu", "hcp", a=2.54, c=4.16)
    result = run(atoms, EMT(), tmp_path, max_temperature=3000.0)
    assert result.atoms_of_primitive_cell == 2 and not result.imaginary
    dos, thermal = columns(tmp_path / "dos.csv"), columns(tmp_path / "thermal.csv")
    grid, density = dos["frequency_THz"], dos["dos_per_THz"]
    assert np.trapezoid(density, grid) == pytest.approx(6, rel=0.01)  # 3 N modes; steps of a hundredth
    # zero-point energy: h nu / 2 for every mode
    planck = 6.62607015e-34 * 1e12 * 6.02214076e23 / 1000  # kJ/mol per THz
    zero = np.trapezoid(density * grid, grid) * planck / 2
    assert result.zero_point_energy == pytest.approx(zero, rel=0.01)
    assert thermal["free_energy_kJ_mol"][0] == result.zero_point_energy
    temperature, capacity = thermal["temperature_K"], thermal["heat_capacity_J_K_mol"]
    np.testing.assert_allclose(temperature, np.arange(0, 3001, 10))
    # 3 N k, less (h nu / kT)^2 / 12 of it, below 1e-3 at 3000 K, and the three modes at Gamma
    assert capacity[-1] == pytest.approx(6 * R, rel=5e-3)
    assert capacity[0] == 0 and np.all(np.diff(capacity) > -1e-9)
    assert result.heat_capacity == capacity[temperature == 300][0]
    # dF/dT = -S by central differences over 20 K, good to 1e-3 above 300 K
    slope = np.gradient(thermal["free_energy_kJ_mol"], temperature)[40:-1]
    np.testing.assert_allclose(-1000 * slope, thermal["entropy_J_K_mol"][40:-1], rtol=1e-3)
    np.testing.assert_allclose(frequencies(tmp_path, GAMMA)[0, :3], 0, atol=1e-4)  # acoustic sum rule
    saved = json.loads((tmp_path / "phonon.json").read_text())
    assert saved["heat_capacity"] == result.heat_capacity and saved["imaginary"] is False
    for name in ("phonon.png", "thermal.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "nqpoint" in (tmp_path / "band.yaml").read_text()


def test_imaginary_modes_are_told(tmp_path):
    """Body-centred EMT copper is unstable under shear, C11 < C12."""
    result = run(bulk("Cu", "bcc", a=2.87), EMT(), tmp_path)
    assert result.imaginary and result.min_frequency < -0.3
    assert result.heat_capacity < 3 * R


def test_symmetry_is_kept_while_the_crystal_is_relaxed(tmp_path):
    """Noise of 1e-5 Angstrom in the start does not cost displacements."""
    atoms = bulk("Cu", a=3.61, cubic=True)
    atoms.rattle(1e-5, seed=0)
    result = run(atoms, EMT(), tmp_path, supercell=(2, 2, 2))
    assert (result.displacements, result.atoms_of_primitive_cell) == (1, 1)


def test_supercell_of_a_length():
    # faces of the primitive cell of copper are 3.6 / sqrt(3) = 2.078 Angstrom apart
    assert supercell_of_length(bulk("Cu", a=3.6), 12.0) == (6, 6, 6)
    assert supercell_of_length(bulk("Cu", a=3.6), 3.6 / 3**0.5) == (1, 1, 1)
    assert supercell_of_length(Atoms("H", cell=[4, 6, 30], pbc=True), 12.0) == (3, 2, 1)


def test_a_potential_by_its_hessian(tmp_path):
    """Crystal without symmetry: force constants of one cell are the second derivatives of its energy."""
    from dpa4.potential import hessian

    potential = random_potential(n_blocks=1)
    atoms = crystal()
    calculator = DPA4Calculator(potential, device="cpu", dtype="float64")
    result = run(atoms, calculator, tmp_path, supercell=(1, 1, 1), relax_first=False)
    assert result.displacements == 36  # both ways along three axes
    phonon = phonopy.load(tmp_path / "phonopy_params.yaml", log_level=0)
    found = phonon.force_constants.transpose(0, 2, 1, 3).reshape(18, 18)
    expected = hessian(potential, graph_of(atoms))
    # differences over 0.01 Angstrom err by its square times the fourth derivative, here 8e-4
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3 * float(expected.abs().max()))
    atoms.calc = calculator
    assert result.residual_force == pytest.approx(np.linalg.norm(atoms.get_forces(), axis=1).max())


class Counting(EMT):
    """EMT calculator that counts evaluations of supercells and sends Ctrl-C at one of them."""

    def __init__(self, at: int = 0):
        super().__init__()
        self.evaluations, self.at = 0, at

    def calculate(self, atoms, *arguments):
        if len(atoms) > 2:
            self.evaluations += 1
            if self.evaluations == self.at:
                signal.raise_signal(signal.SIGINT)
        super().calculate(atoms, *arguments)


def test_interrupted_and_resumed(tmp_path):
    atoms = Atoms("CuAu", cell=[2.8, 2.8, 3.7], scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5)], pbc=True)
    whole = Counting()
    expected = run(atoms, whole, tmp_path / "whole")
    assert whole.evaluations == expected.displacements + 1
    with pytest.raises(Stopped, match=r"stopped; forces: 2 of 3 done; resume to continue"):
        run(atoms, Counting(2), tmp_path / "parts")
    rest = Counting()
    result = run(atoms, rest, tmp_path / "parts", resume=True)
    assert rest.evaluations == whole.evaluations - 2
    assert result.max_frequency == pytest.approx(expected.max_frequency, abs=1e-6)
    # another mesh and other temperatures do not need forces
    again = Counting()
    run(atoms, again, tmp_path / "parts", resume=True, mesh=10.0, max_temperature=100.0)
    assert again.evaluations == 0
    assert columns(tmp_path / "parts" / "thermal.csv")["temperature_K"][-1] == 100
    with pytest.raises(ValueError, match=r"displacement = 0.02, but .* displacement = 0.01"):
        run(atoms, EMT(), tmp_path / "parts", resume=True, displacement=0.02)
    with pytest.raises(FileExistsError, match="already holds a calculation"):
        run(atoms, EMT(), tmp_path / "parts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"supercell": (0, 2, 2)}, r"supercell must be three positive multiples, got \(0, 2, 2\)"),
        ({"displacement": 0.0}, "displacement must be positive, got 0.0"),
        ({"min_length": np.inf}, "min_length must be positive, got inf"),
        ({"mesh": -1.0}, "mesh must be positive, got -1.0"),
        ({"max_temperature": -1.0}, "max_temperature must be at least 0 K, got -1.0"),
    ],
)
def test_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(bulk("Cu"), EMT(), tmp_path, **options)


def test_refusals(tmp_path, monkeypatch):
    charged = bulk("Cu")
    charged.info["charge"] = 1
    with pytest.raises(ValueError, match="phonons need an uncharged crystal with spin 1"):
        run(charged, DPA4Calculator(random_potential(elements=("Cu", "H", "C"), charge_spin=True)), tmp_path)
    monkeypatch.setitem(sys.modules, "seekpath", None)
    with pytest.raises(ImportError, match=r"seekpath is not installed; pip install .*\[phonon\]'"):
        run(bulk("Cu"), EMT(), tmp_path)


def test_command_with_a_potential(tmp_path):
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "m.safetensors")
    write(tmp_path / "c.xyz", bulk("C", "fcc", a=3.2))
    files = [str(tmp_path / name) for name in ("m.safetensors", "c.xyz", "out")]
    arguments = ["phonon", *files[:2], "-o", files[2], "--no-relax", "--supercell", "2", "2", "2"]
    shown = CliRunner().invoke(app, [*arguments, "--mesh", "10", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    saved = json.loads((tmp_path / "out" / "phonon.json").read_text())
    assert "supercell 2 x 2 x 2, displacements: 1" in shown.output
    assert ("imaginary modes" in shown.output) == saved["imaginary"]
