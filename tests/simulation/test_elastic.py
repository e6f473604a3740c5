"""Elastic tensor: known values, energies, relaxed positions; moduli; stability; interruption."""

import csv
import json
import signal

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import write
from ase.stress import voigt_6_to_full_3x3_strain
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.potential.checkpoint import save_potential
from dpa4.simulation import DPA4Calculator, elastic_tensor, relax
from dpa4.simulation.crystal_calculation import Stopped
from dpa4.simulation.elastic import elasticity, moduli
from helpers import random_potential


def run(atoms, calculator, folder, **options):
    return elastic_tensor(atoms, calculator, folder, progress=False, **options)


def cubic(c11: float, c12: float, c44: float) -> np.ndarray:
    stiffness = np.diag([c11 - c12] * 3 + [c44] * 3)
    stiffness[:3, :3] += c12
    return stiffness


def curvature(atoms: Atoms, calculator, voigt: list[float], relaxed: bool = False) -> float:
    """Second derivative of the energy with respect to a strain, per volume, in GPa."""
    energies = []
    for sign in (-1, 0, 1):
        strained = atoms.copy()
        strained.set_cell(
            atoms.cell.array @ voigt_6_to_full_3x3_strain(sign * np.array(voigt)), scale_atoms=True
        )
        if relaxed:
            relax(strained, calculator, fmax=1e-4, optimizer="bfgs")
        strained.calc = calculator
        energies.append(strained.get_potential_energy())
    length = np.linalg.norm(voigt)
    return (energies[0] - 2 * energies[1] + energies[2]) / length**2 / atoms.get_volume() / units.GPa


def test_moduli_of_an_isotropic_solid():
    """Lame constants of 60 and 40 GPa: K = 60 + 80/3, E = 40 (180 + 80) / 100, nu = 60 / 200."""
    found = moduli(cubic(140.0, 60.0, 40.0))
    assert (found.bulk_voigt, found.bulk_reuss) == pytest.approx((260 / 3, 260 / 3))
    assert found.shear_voigt == pytest.approx(40) and found.shear_reuss == pytest.approx(40)
    assert (found.young, found.poisson) == pytest.approx((104, 0.3))
    assert found.anisotropy == pytest.approx(0, abs=1e-12)


def test_moduli_of_a_cubic_crystal():
    """Textbook formulas for C11 = 170, C12 = 120, C44 = 75 GPa."""
    found = moduli(cubic(170.0, 120.0, 75.0))
    assert found.bulk_voigt == pytest.approx(410 / 3) and found.bulk_reuss == pytest.approx(410 / 3)
    assert found.shear_voigt == pytest.approx((50 + 225) / 5)
    assert found.shear_reuss == pytest.approx(5 * 50 * 75 / (300 + 150))
    assert found.shear == pytest.approx((55 + 125 / 3) / 2)
    assert found.anisotropy == pytest.approx(5 * 55 / (125 / 3) - 5)


def test_moduli_do_not_depend_on_the_axes(tmp_path):
    atoms = bulk("Cu")
    atoms.rotate(37, (1, 2, 3), rotate_cell=True)
    one, two = run(bulk("Cu"), EMT(), tmp_path / "1").moduli, run(atoms, EMT(), tmp_path / "2").moduli
    # terms of third order in a strain of 1 % depend on its direction
    assert two.bulk == pytest.approx(one.bulk, rel=2e-3)
    assert two.young == pytest.approx(one.young, rel=2e-3)
    assert two.shear_reuss == pytest.approx(one.shear_reuss, rel=2e-3)


def test_least_squares_find_a_law():
    rng = np.random.default_rng(0)
    stiffness, rest = rng.normal(size=(6, 6)), rng.normal(size=6)
    stiffness = stiffness + stiffness.T
    strains = np.concatenate([np.zeros((1, 6)), rng.normal(size=(12, 6))])
    found = elasticity(strains, rest + strains @ stiffness.T)
    np.testing.assert_allclose(found.stiffness, stiffness, atol=1e-10)
    np.testing.assert_allclose(found.stress, rest, atol=1e-10)
    assert found.asymmetry < 1e-10
    assert not found.stable and found.moduli is None  # random symmetric matrices have negative eigenvalues
    skew = stiffness.copy()
    skew[0, 1] += 2
    found = elasticity(strains, rest + strains @ skew.T)
    assert found.asymmetry == pytest.approx(2)
    assert found.stiffness[0, 1] == found.stiffness[1, 0] == pytest.approx(stiffness[0, 1] + 1)


def test_springs_between_neighbours_of_a_cubic_lattice(tmp_path):
    """Face-centred cubic crystal of springs k at rest: C11 = 2 k/a and C12 = C44 = k/a."""
    sigma, epsilon = 2.5, 0.2
    distance = 2 ** (1 / 6) * sigma
    k = 72 * epsilon / 2 ** (1 / 3) / sigma**2  # curvature of the Lennard-Jones potential in its minimum
    calculator = LennardJones(sigma=sigma, epsilon=epsilon, rc=1.2 * distance, smooth=False)
    a = distance * 2**0.5
    result = run(bulk("Ar", "fcc", a=a), calculator, tmp_path, strain=0.001, fmax=1e-6)
    # the potential is not harmonic: errors of second order in a strain of 1e-3, times a few hundred
    np.testing.assert_allclose(result.stiffness, cubic(2, 1, 1) * k / a / units.GPa, rtol=1e-3, atol=1e-3)
    assert result.stable and result.asymmetry < 1e-6
    np.testing.assert_allclose(result.stress, 0, atol=1e-6)


def test_copper_from_energies(tmp_path):
    atoms = bulk("Cu", a=3.5899)
    result = run(atoms, EMT(), tmp_path)
    c = result.stiffness
    # energies over strains of 0.5 % and slopes over 1 % differ by terms of fourth order: below 0.5 %
    assert c[0, 0] == pytest.approx(curvature(atoms, EMT(), [0.005, 0, 0, 0, 0, 0]), rel=5e-3)
    assert c[3, 3] == pytest.approx(curvature(atoms, EMT(), [0, 0, 0, 0.005, 0, 0]), rel=5e-3)
    both = curvature(atoms, EMT(), [0.005, 0.005, 0, 0, 0, 0])
    assert c[0, 0] + c[0, 1] == pytest.approx(both, rel=5e-3)
    np.testing.assert_allclose(c, cubic(c[0, 0], c[0, 1], c[3, 3]), atol=1e-3)
    assert result.stable and np.abs(result.stress).max() < 0.01
    with (tmp_path / "elastic.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["GPa"] for row in rows] == ["xx", "yy", "zz", "yz", "xz", "xy"]
    np.testing.assert_array_equal([[float(row[n["GPa"]]) for n in rows] for row in rows], c)
    assert len((tmp_path / "stresses.csv").read_text().splitlines()) == 26
    saved = json.loads((tmp_path / "elastic.json").read_text())
    assert saved["stable"] is True and saved["moduli"]["bulk"] == result.moduli.bulk
    assert (tmp_path / "elastic.png").read_bytes().startswith(b"\x89PNG")


def test_positions_are_relaxed(tmp_path):
    """Atoms of hexagonal copper move under shear in the plane; only then C66 = (C11 - C12) / 2 holds."""
    start = bulk("Cu", "hcp", a=2.54, c=4.16)
    relax(start, EMT(), fmax=1e-4, optimizer="bfgs", cell="full")
    c = run(start, EMT(), tmp_path).stiffness
    shear = [0, 0, 0, 0, 0, 0.005]
    relaxed, clamped = curvature(start, EMT(), shear, relaxed=True), curvature(start, EMT(), shear)
    assert c[5, 5] == pytest.approx((c[0, 0] - c[0, 1]) / 2, rel=0.01)  # strains of 1 %, forces to 1e-4
    assert c[5, 5] == pytest.approx(relaxed, rel=0.01)
    assert clamped > 1.05 * relaxed


def test_an_unstable_crystal_is_told(tmp_path):
    """EMT copper has no minimum in the body-centred structure: C11 < C12."""
    result = run(bulk("Cu", "bcc", a=2.87), EMT(), tmp_path)
    assert result.stiffness[0, 0] < result.stiffness[0, 1]
    assert not result.stable and result.moduli is None
    assert json.loads((tmp_path / "elastic.json").read_text())["moduli"] is None


def test_stress_without_strain_is_reported(tmp_path):
    atoms = bulk("Cu", a=3.5)
    result = run(atoms, EMT(), tmp_path, relax_first=False)
    atoms.calc = EMT()
    np.testing.assert_allclose(result.stress, atoms.get_stress() / units.GPa, atol=1e-9)
    assert result.stress[0] < -5


class Interrupting(EMT):
    """Calculator that sends Ctrl-C at the 20th evaluation."""

    evaluations = 0

    def calculate(self, *arguments):
        self.evaluations += 1
        if self.evaluations == 20:
            signal.raise_signal(signal.SIGINT)
        super().calculate(*arguments)


def test_interrupted_and_resumed(tmp_path):
    expected = run(bulk("Cu"), EMT(), tmp_path / "whole")
    with pytest.raises(Stopped, match=r"strains: \d+ of 25 done; resume to continue"):
        run(bulk("Cu"), Interrupting(), tmp_path / "parts")
    result = run(bulk("Cu"), EMT(), tmp_path / "parts", resume=True)
    np.testing.assert_allclose(result.stiffness, expected.stiffness, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"strain = 0.02, but .* strain = 0.01"):
        run(bulk("Cu"), EMT(), tmp_path / "parts", strain=0.02, resume=True)


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="strain must be positive and at most 0.1, got 0.2"):
        run(bulk("Cu"), EMT(), tmp_path, strain=0.2)


def test_command_with_a_potential(tmp_path):
    """A cubic crystal of one atom per cell has no positions to relax; its tensor follows from stress differences."""
    atoms = bulk("C", "fcc", a=3.2)
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "m.safetensors")
    write(tmp_path / "c.xyz", atoms)
    model, crystal, out = tmp_path / "m.safetensors", tmp_path / "c.xyz", tmp_path / "out"
    arguments = ["elastic", model, crystal, "-o", out, "--no-relax", "--strain", "0.001", "--device", "cpu"]
    shown = CliRunner().invoke(app, [str(a) for a in arguments])
    assert shown.exit_code == 0, shown.output
    assert "GPa" in shown.output and ("Hill" in shown.output or "not stable" in shown.output)
    found = np.array(json.loads((out / "elastic.json").read_text())["stiffness"])
    atoms.calc = DPA4Calculator(model, device="cpu", dtype="float64")
    slopes = []
    for sign in (1, -1):
        strained = atoms.copy()
        deformation = voigt_6_to_full_3x3_strain(np.array([sign * 1e-4, 0, 0, 0, 0, 0]))
        strained.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
        strained.calc = atoms.calc
        slopes.append(sign * strained.get_stress() / units.GPa / 2e-4)
    # differences over 1e-3 and 1e-4 differ by terms of second order
    np.testing.assert_allclose(found[:, 0], sum(slopes), rtol=1e-3, atol=1e-3 * np.abs(found).max())
    np.testing.assert_allclose(
        found, cubic(found[0, 0], found[0, 1], found[3, 3]), atol=1e-6 * np.abs(found).max()
    )
