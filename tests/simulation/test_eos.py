"""Equation of state: known curves, EMT copper, relaxed positions, interruption, refusals."""

import csv
import json
import signal

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.eos import birchmurnaghan
from ase.io import read, write
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.potential.checkpoint import save_potential
from dpa4.simulation import DPA4Calculator, equation_of_state
from dpa4.simulation.crystal_calculation import Stopped
from dpa4.simulation.eos import birch_murnaghan_pressure, fit_equation_of_state
from helpers import random_potential


def run(atoms, calculator, folder, **options):
    return equation_of_state(atoms, calculator, folder, progress=False, **options)


def rows(path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


class Counting(EMT):
    """EMT that counts evaluations and calls a function at one of them."""

    def __init__(self, at: int = 0, action=None):
        super().__init__()
        self.evaluations, self.at, self.action = 0, at, action

    def calculate(self, *arguments):
        self.evaluations += 1
        if self.evaluations == self.at:
            self.action()
        super().calculate(*arguments)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_known_curve_is_found():
    volumes = np.linspace(36, 44, 9)
    energies = birchmurnaghan(volumes, -7.5, 120 * units.GPa, 4.7, 40.3)
    assert fit_equation_of_state(volumes, energies) == pytest.approx((40.3, -7.5, 120, 4.7), rel=1e-5)
    # the pressure is minus the slope of the energy; differences over 2e-3 of 40 Angstrom^3 are good to 1e-8
    up, down = (birchmurnaghan(volumes + h, -7.5, 120, 4.7, 40.3) for h in (1e-3, -1e-3))
    np.testing.assert_allclose(
        birch_murnaghan_pressure(volumes, 40.3, 120, 4.7), (down - up) / 2e-3, atol=1e-5
    )


def test_copper(tmp_path):
    atoms = bulk("Cu", a=3.7)
    before = atoms.copy()
    result = run(atoms, EMT(), tmp_path)
    assert np.array_equal(atoms.positions, before.positions) and np.array_equal(atoms.cell, before.cell)
    assert atoms.calc is None
    # a third-order curve over 20 % of the volume is 1e-4 off in the volume, 1 % in the modulus
    assert result.lengths == pytest.approx([3.5899 / 2**0.5] * 3, rel=1e-4)
    assert result.volume == pytest.approx(3.5899**3 / 4, rel=3e-4)
    # B = -V dp/dV from stresses of EMT, without any curve
    pressures = []
    for factor in (0.998, 1.002):
        strained = bulk("Cu", a=3.5899 * factor ** (1 / 3))
        strained.calc = EMT()
        pressures.append(-strained.get_stress()[:3].mean() / units.GPa)
    assert result.bulk_modulus == pytest.approx((pressures[0] - pressures[1]) / 0.004, rel=0.01)
    assert 3 < result.bulk_modulus_derivative < 6
    assert result.rms < 0.1
    table = rows(tmp_path / "eos.csv")
    frames = read(tmp_path / "eos.xyz", ":")
    assert len(table) == len(frames) == 11
    ratio = np.array([row["volume_A3"] for row in table]) / table[5]["volume_A3"]
    np.testing.assert_allclose(ratio, np.linspace(0.9, 1.1, 11), rtol=1e-12)
    for row, frame in zip(table, frames, strict=True):
        assert frame.get_potential_energy() == pytest.approx(row["energy_eV"], abs=1e-7)
        frame.calc = EMT()
        assert frame.get_potential_energy() == pytest.approx(row["energy_eV"], abs=1e-6)
        assert -frame.get_stress()[0] / units.GPa == pytest.approx(row["pressure_GPa"], abs=1e-4)
        assert row["a_A"] == pytest.approx((row["volume_A3"] * 2**0.5) ** (1 / 3))
    saved = json.loads((tmp_path / "eos.json").read_text())
    assert saved["bulk_modulus"] == result.bulk_modulus and saved["lengths"] == [*result.lengths]
    assert (tmp_path / "eos.png").read_bytes().startswith(b"\x89PNG")


def test_positions_are_relaxed_at_every_volume(tmp_path):
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=0)
    result = run(atoms, EMT(), tmp_path, relax_first=False, fmax=1e-3, points=7)
    for frame in read(tmp_path / "eos.xyz", ":"):
        frame.calc = EMT()
        assert np.linalg.norm(frame.get_forces(), axis=1).max() < 1.01e-3
    assert result.lengths == pytest.approx([3.59] * 3, abs=2e-3)


@pytest.mark.parametrize("shape", [False, True])
def test_shape_is_relaxed_on_request(tmp_path, shape):
    """The c/a of hexagonal copper keeps its stretched value, or finds the optimum near 1.64 at every volume."""
    atoms = bulk("Cu", "hcp", a=2.5, c=4.4)
    result = run(atoms, EMT(), tmp_path, shape=shape, relax_first=False, fmax=1e-3, points=5, span=0.08)
    anisotropy = []
    for frame in read(tmp_path / "eos.xyz", ":"):
        frame.calc = EMT()
        stress = frame.get_stress()
        anisotropy.append(abs(stress[2] - stress[0]))
        ratio = frame.cell.lengths()[2] / frame.cell.lengths()[0]
        assert ratio == pytest.approx(1.64 if shape else 4.4 / 2.5, abs=0.02 if shape else 1e-6)
    # fmax bounds virials per atom: 2 * 1e-3 eV / 23 Angstrom^3 = 1e-4
    assert (max(anisotropy) < 2e-4) == shape
    a, _, c = result.lengths
    assert a**2 * c * 3**0.5 / 2 == pytest.approx(result.volume, rel=1e-5)


def test_interrupted_and_resumed(tmp_path):
    whole, parted, rest = Counting(), Counting(12, ctrl_c), Counting()
    expected = run(bulk("Cu"), whole, tmp_path / "whole")
    with pytest.raises(Stopped, match=r"stopped; volumes: \d+ of 11 done; resume to continue"):
        run(bulk("Cu"), parted, tmp_path / "parts")
    finished = len((tmp_path / "parts" / "volumes.jsonl").read_text().splitlines())
    assert 2 < finished < 11 and not (tmp_path / "parts" / "eos.csv").exists()
    with pytest.raises(FileExistsError, match="already holds a calculation; continue it with --resume"):
        run(bulk("Cu"), EMT(), tmp_path / "parts")
    result = run(bulk("Cu"), rest, tmp_path / "parts", resume=True)
    assert rest.evaluations < whole.evaluations - finished + 1
    # EMT sums in an order that depends on what it computed before
    assert result.bulk_modulus == pytest.approx(expected.bulk_modulus, rel=1e-6)
    done = Counting()
    assert run(bulk("Cu"), done, tmp_path / "parts", resume=True) == result
    assert done.evaluations == 1  # the energy that identifies the calculator


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no calculation to resume in"):
        run(bulk("Cu"), EMT(), tmp_path / "none", resume=True)
    run(bulk("Cu"), EMT(), tmp_path)
    with pytest.raises(ValueError, match=r"points = 7, but .* points = 11"):
        run(bulk("Cu"), EMT(), tmp_path, points=7, resume=True)
    with pytest.raises(ValueError, match=r"structure = 'Cu .*', but"):
        run(bulk("Cu", a=3.6), EMT(), tmp_path, resume=True)

    class Shifted(EMT):
        def calculate(self, *arguments):
            super().calculate(*arguments)
            self.results["energy"] += 0.01

    with pytest.raises(ValueError, match="energy_eV = "):
        run(bulk("Cu"), Shifted(), tmp_path, resume=True)


def test_a_model_is_told_by_its_digest(tmp_path):
    """A run refuses to resume after any change of the energies: weights, precision, order of elements, charge."""

    def carbide() -> Atoms:
        return Atoms("CO", cell=3.2 * np.eye(3), scaled_positions=[(0, 0, 0), (0.4, 0.5, 0.5)], pbc=True)

    def attempt(atoms=None, seed=0, dtype="float64", models=1, **options) -> None:
        potential = random_potential(seed, n_blocks=1, lmax=1, charge_spin=True, default_charge_spin=(0, 1))
        calculator = DPA4Calculator([potential] * models, device="cpu", dtype=dtype)
        # stops within the first relaxation, which is far from converged after zero steps
        run(atoms or carbide(), calculator, tmp_path, steps=0, **options)

    with pytest.raises(RuntimeError, match="not relaxed"):
        attempt()
    with pytest.raises(RuntimeError, match="not relaxed"):
        attempt(resume=True)
    for message, options in (
        (r"model = '\w+', but .* holds results with model = '\w+'; choose another folder", {"seed": 1}),
        (r"model = '(\w+) \1', but .* holds results with model = '\w+'", {"models": 2}),
        ("dtype = 'float32', but .* holds results with dtype = 'float64'", {"dtype": "float32"}),
    ):
        with pytest.raises(ValueError, match=message):
            attempt(resume=True, **options)
    swapped, charged = carbide(), carbide()
    swapped.symbols = "OC"
    charged.info["charge"] = 1
    for atoms in (swapped, charged):
        with pytest.raises(ValueError, match="structure = 'CO .*', but .* structure = 'CO .*'"):
            attempt(atoms, resume=True)


def test_failures_and_arguments(tmp_path):
    with pytest.raises(RuntimeError, match=r"no minimum between .* relax first"):
        run(bulk("Cu", a=3.2), EMT(), tmp_path / "far", relax_first=False, points=5)
    assert len(rows(tmp_path / "far" / "eos.csv")) == 5
    rattled = bulk("Cu", cubic=True)
    rattled.rattle(0.1, seed=0)
    with pytest.raises(RuntimeError, match=r"start: .*not relaxed to fmax = 0.0001 .* in 2 steps"):
        run(rattled, EMT(), tmp_path / "few", steps=2)
    for options, message in (
        ({"points": 4}, "points must be at least 5, one more than the curve has parameters, got 4"),
        ({"span": 1.0}, "span must be a fraction of the volume between 0 and 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(bulk("Cu"), EMT(), tmp_path, **options)
    with pytest.raises(ValueError, match="must be periodic along all three axes"):
        run(Atoms("Cu"), EMT(), tmp_path / "atom")
    held = bulk("Cu")
    held.set_constraint(FixAtoms([0]))
    with pytest.raises(ValueError, match="must have no constraints, but has FixAtoms"):
        run(held, EMT(), tmp_path / "held")


def test_failed_relaxations_are_tried_again(tmp_path):
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=0)
    options = {"relax_first": False, "fmax": 1e-3, "points": 5}
    with pytest.raises(RuntimeError, match="0.9000: .*resume with more steps"):
        run(atoms, EMT(), tmp_path, steps=2, **options)
    assert run(atoms, EMT(), tmp_path, steps=200, resume=True, **options).lengths[0] == pytest.approx(
        3.59, abs=2e-3
    )


def test_command_with_a_potential(tmp_path):
    """The table of the command holds the energies of the model, with or without a minimum."""
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "m.safetensors")
    write(tmp_path / "c.xyz", bulk("C", "fcc", a=4.0))
    arguments = [
        "eos",
        "m.safetensors",
        "c.xyz",
        "-o",
        "out",
        "--no-relax",
        "--points",
        "5",
        "--device",
        "cpu",
    ]
    arguments = [str(tmp_path / a) if a in ("m.safetensors", "c.xyz", "out") else a for a in arguments]
    output = CliRunner().invoke(app, arguments).output
    assert "bulk modulus" in output or "no minimum" in output
    calculator = DPA4Calculator(tmp_path / "m.safetensors", device="cpu", dtype="float64")
    for row, frame in zip(
        rows(tmp_path / "out" / "eos.csv"), read(tmp_path / "out" / "eos.xyz", ":"), strict=True
    ):
        frame.calc = calculator
        assert frame.get_potential_energy() == pytest.approx(row["energy_eV"], abs=1e-6)
    output = CliRunner().invoke(app, [*arguments[:-2], "--device", "cpu"]).output
    assert "already holds a calculation" in output
