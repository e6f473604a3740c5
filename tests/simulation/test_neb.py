"""Nudged elastic band: known barriers, comparison with ASE, periodicity, interruption and resuming."""

import signal

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read, write
from ase.mep import NEB
from ase.optimize import BFGS
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.output import read_csv
from dpa4.potential import save_potential
from dpa4.simulation import DPA4Calculator, run_neb
from helpers import molecule, random_potential

HEIGHT, TILT = 0.7, 0.1


class DoubleWell(Calculator):
    """Potential of one atom, E = 0.7 (x^2 - 1)^2 + 2 (y - (1 - x^2) / 2)^2 + z^2, whose valley is a parabola.

    Along the valley E = 0.7 (x^2 - 1)^2: minima at x = -1 and 1, and a saddle point of 0.7 eV at (0, 0.5, 0).
    """

    implemented_properties = ["energy", "free_energy", "forces"]

    def __init__(self, action=None):
        super().__init__()
        self.calls, self.action = 0, action

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        if self.action:
            self.action(self.calls)
        x, y, z = self.atoms.positions[0]
        off = y - (1 - x**2) / 2
        energy = HEIGHT * (x**2 - 1) ** 2 + 2 * off**2 + z**2
        force = [-4 * HEIGHT * x * (x**2 - 1) - 4 * off * x, -4 * off, -2 * z]
        self.results = {"energy": energy, "free_energy": energy, "forces": np.array([force])}


def wells() -> tuple[Atoms, Atoms]:
    """Both minima, in a box so large that periodic images do not matter."""
    return tuple(Atoms("H", [(x, 0, 0)], cell=[50] * 3, pbc=True) for x in (-1, 1))


def hop() -> tuple[Atoms, Atoms]:
    """Gold on aluminium (100), from one hollow site to the next."""
    slab = fcc100("Al", size=(2, 2, 2))
    add_adsorbate(slab, "Au", 1.7, "hollow")
    slab.center(axis=2, vacuum=4.0)
    slab.info = {}
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
    end = slab.copy()
    end.positions[-1, 0] += slab.cell[0, 0] / 2
    return slab, end


def run(start, end, calculator, folder, **options):
    return run_neb(start, end, calculator, folder, **({"progress": False} | options))


@pytest.mark.parametrize("images", [3, 4, 7])
def test_barrier_of_a_double_well(tmp_path, images):
    """The climbing image reaches the saddle point, even if symmetry puts no image near it."""
    start, end = wells()
    calculator = DoubleWell()
    found = run(start, end, calculator, tmp_path, images=images, fmax=0.002)
    # A force of 0.002 eV/Angstrom at curvatures of 2.8 eV/Angstrom^2 is an energy of 1e-6 eV.
    assert found.converged and found.max_force < 0.002
    assert found.barrier == pytest.approx(HEIGHT, abs=1e-5)
    assert found.reverse_barrier == pytest.approx(HEIGHT, abs=1e-5) and found.reaction_energy == 0
    saddle = read(tmp_path / "path.xyz", found.highest_image)
    np.testing.assert_allclose(saddle.positions[0], [0, 0.5, 0], atol=2e-3)
    # Each image once per step, and both ends once; only the start of climbing recomputes.
    assert calculator.calls == images * (found.steps + 2) + 2
    assert np.array_equal(start.positions, [[-1, 0, 0]]) and start.calc is None


def test_same_as_ase_by_hand(tmp_path):
    start, end = hop()
    for atoms in (start, end):
        atoms.calc = EMT()
        BFGS(atoms, logfile=None).run(fmax=0.01)
    images = [start.copy(), *(start.copy() for _ in range(3)), end.copy()]
    for atoms in images:
        atoms.calc = EMT()
    band = NEB(images, climb=True, method="improvedtangent")
    band.interpolate(mic=True)
    BFGS(band, logfile=None).run(fmax=0.01)
    by_hand = [atoms.get_potential_energy() for atoms in images]
    found = run(*hop(), EMT(), tmp_path, images=3, fmax=0.02, relax_ends=True)
    # Saddle points and minima are stationary: at forces of 0.02 eV/Angstrom, energies are exact to about 0.1 meV.
    assert found.barrier == pytest.approx(max(by_hand) - by_hand[0], abs=5e-4)
    assert found.highest_image == 2 and 0.3 < found.barrier < 0.45
    first = read(tmp_path / "path.xyz", 0)
    assert np.abs(first.positions - start.positions).max() < 0.01  # relaxed ends are the ends of the path
    assert np.array_equal(first.constraints[0].index, start.constraints[0].index)


def test_files(tmp_path):
    found = run(*wells(), DoubleWell(), tmp_path / "a" / "out", images=3, fmax=0.01)
    folder = tmp_path / "a" / "out"
    images = read(folder / "path.xyz", ":")
    energies = np.array([atoms.get_potential_energy() for atoms in images])
    assert [atoms.info["image"] for atoms in images] == [0, 1, 2, 3, 4]
    assert energies.max() - energies[0] == pytest.approx(found.barrier, abs=1e-7)
    for atoms in images:
        copy = atoms.copy()
        copy.calc = DoubleWell()
        assert atoms.get_potential_energy() == pytest.approx(copy.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), copy.get_forces(), atol=1e-6)
    table, log = read_csv(folder / "path.csv"), read_csv(folder / "neb.csv")
    places = np.array([atoms.positions[0] for atoms in images])
    lengths = np.linalg.norm(np.diff(places, axis=0), axis=1)
    np.testing.assert_allclose([float(r["path_A"]) for r in table], [0, *np.cumsum(lengths)], atol=1e-6)
    np.testing.assert_allclose([float(r["energy_eV"]) for r in table], energies - energies[0], atol=1e-6)
    assert int(log[-1]["step"]) == found.steps and log[0]["climbing"] == "0" and log[-1]["climbing"] == "1"
    assert float(log[-1]["barrier_eV"]) == found.barrier
    assert (folder / "path.png").read_bytes().startswith(b"\x89PNG")


def test_atoms_move_the_short_way_through_the_boundary(tmp_path):
    """Vacancy next to the boundary: the end is given wrapped to the other side of the cell."""
    start = bulk("Cu", cubic=True).repeat(2)
    del start[0]
    hopping = int(np.argmin(np.linalg.norm(start.positions - [0, 1.805, 1.805], axis=1)))
    end = start.copy()
    end.positions[hopping] = (0, 0, 0)
    wrapped = end.copy()
    wrapped.positions += wrapped.cell.array.sum(axis=0)
    wrapped.positions[3] -= wrapped.cell.array[1]
    options = {"images": 3, "fmax": 0.1, "relax_ends": True}
    inside = run(start, end, EMT(), tmp_path / "a", **options)
    outside = run(start, wrapped, EMT(), tmp_path / "b", **options)
    assert inside.converged and inside.barrier == pytest.approx(outside.barrier, abs=1e-6)
    assert 0.3 < inside.barrier < 1.0  # of the order of migration barriers in fcc metals
    last = read_csv(tmp_path / "b" / "path.csv")[-1]
    assert float(last["path_A"]) < 4  # the hop of 2.55 Angstrom, and the displacement of the neighbours


def test_isolated_molecules_do_not_rotate(tmp_path):
    """Inversion of ammonia: a rotated end gives the same barrier."""
    calculator = DPA4Calculator(random_potential(elements=("H", "C", "N")), device="cpu", dtype="float64")
    start = Atoms("NHHH", [(0, 0, 0.3), (0.94, 0, 0), (-0.47, 0.81, 0), (-0.47, -0.81, 0)])
    end = start.copy()
    end.positions[0, 2] = -0.3
    turned = end.copy()
    turned.rotate(50, (1, 2, 3))
    turned.positions += (1, 2, 3)
    options = {"images": 3, "steps": 5}
    results = [
        run(start, atoms, calculator, tmp_path / name, **options)
        for name, atoms in (("a", end), ("b", turned))
    ]
    assert results[1].reaction_energy == pytest.approx(results[0].reaction_energy, abs=1e-12)
    lengths = [float(read_csv(tmp_path / name / "path.csv")[-1]["path_A"]) for name in "ab"]
    assert lengths[1] < 1.2 * lengths[0] < 1.5


def interrupt_at(call: int):
    return lambda calls: signal.raise_signal(signal.SIGINT) if calls == call else None


@pytest.mark.parametrize("call", [20, 60])  # without and with climbing
def test_interrupted_and_resumed(tmp_path, call):
    handler = signal.getsignal(signal.SIGINT)
    options = {"images": 4, "fmax": 0.005}
    stopped = run(*wells(), DoubleWell(interrupt_at(call)), tmp_path, **options)
    assert stopped.interrupted and not stopped.converged
    assert stopped.steps == pytest.approx(call / 4, abs=2)
    assert signal.getsignal(signal.SIGINT) is handler
    path = read(tmp_path / "path.xyz", ":")
    calculator = DoubleWell()
    again = run(*wells(), calculator, tmp_path, resume=True, steps=stopped.steps, **options)
    assert again.steps == stopped.steps and calculator.calls == 6  # evaluated once, without further steps
    for before, after in zip(path, read(tmp_path / "path.xyz", ":"), strict=True):
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-7)
    resumed = run(*wells(), DoubleWell(), tmp_path, resume=True, **options)
    assert resumed.converged and resumed.barrier == pytest.approx(HEIGHT, abs=1e-4)
    steps = [int(row["step"]) for row in read_csv(tmp_path / "neb.csv")]
    assert steps == sorted(steps) and set(steps) == set(range(resumed.steps + 1))
    climbing = [row["climbing"] for row in read_csv(tmp_path / "neb.csv")]
    assert climbing == sorted(climbing)  # once begun it goes on


def test_interruption_while_the_ends_relax(tmp_path):
    start, end = wells()
    start.positions += 0.1
    with pytest.raises(KeyboardInterrupt):
        run(start, end, DoubleWell(interrupt_at(3)), tmp_path / "out", relax_ends=True)
    assert not (tmp_path / "out").exists()


def test_steps_are_a_limit(tmp_path):
    found = run(*wells(), DoubleWell(), tmp_path, images=3, steps=2)
    assert (found.converged, found.interrupted, found.steps) == (False, False, 2)


def test_an_end_that_does_not_relax(tmp_path):
    start, end = wells()
    end.positions += 0.3
    with pytest.raises(RuntimeError, match="end is not relaxed to 0.025 eV/Angstrom after 2 steps"):
        run(start, end, DoubleWell(), tmp_path, relax_ends=True, steps=2)


def test_refusals(tmp_path):
    start, end = wells()
    with pytest.raises(FileNotFoundError, match="there is no path to resume"):
        run(start, end, DoubleWell(), tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="start and end are the same structure"):
        run(start, start, DoubleWell(), tmp_path)
    with pytest.raises(ValueError, match="start and end are the same structure"):
        run(Atoms(), Atoms(), DoubleWell(), tmp_path)
    run(start, end, DoubleWell(), tmp_path, images=2, steps=1)
    with pytest.raises(FileExistsError, match="already holds path.xyz; continue it with --resume"):
        run(start, end, DoubleWell(), tmp_path)
    with pytest.raises(ValueError, match="images = 3, but the path to resume has 2"):
        run(start, end, DoubleWell(), tmp_path, images=3, resume=True)
    other = [Atoms("C", atoms.positions, cell=atoms.cell, pbc=True) for atoms in (start, end)]
    with pytest.raises(ValueError, match="the atoms of start are not those of the path to resume"):
        run(*other, DoubleWell(), tmp_path, images=2, resume=True)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"images": 0}, "images must be at least 1, got 0"),
        ({}, {"fmax": 0}, r"fmax must be positive \(in eV/Angstrom\), got 0"),
        ({}, {"spring": -1}, r"spring must be positive \(in eV/Angstrom\^2\), got -1"),
        ({}, {"steps": -1}, "steps must be at least 0, got -1"),
        ({"numbers": [6]}, {}, r"start \(H\) and end \(C\) must have the same atoms in the same order"),
        (
            {"pbc": (True, True, False)},
            {},
            r"start has pbc \[True, True, True\], but end has \[True, True, False\]",
        ),
        ({"cell": [50, 50, 50.1]}, {}, "cells of start and end differ by up to 0.1 Angstrom"),
    ],
)
def test_arguments(tmp_path, change, options, message):
    start, end = wells()
    for name, value in change.items():
        setattr(end, name, value)
    with pytest.raises(ValueError, match=message):
        run(start, end, DoubleWell(), tmp_path, **options)


def test_command(tmp_path):
    save_potential(random_potential(), tmp_path / "m.safetensors")
    start, end = molecule(0, 5), molecule(0, 5)
    end.positions[0] += (0.2, 0.1, 0.3)
    write(tmp_path / "start.xyz", start)
    write(tmp_path / "end.xyz", end)
    arguments = ["neb", tmp_path / "m.safetensors", tmp_path / "start.xyz", tmp_path / "end.xyz"]
    options = ["-o", tmp_path / "out", "--images", 2, "--steps", 2, "--fmax", 1e-4, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, *options)])
    assert result.exit_code == 0, result.output
    assert "barrier" in result.output and "after 2 steps" in result.output
    assert len(read(tmp_path / "out" / "path.xyz", ":")) == 4
