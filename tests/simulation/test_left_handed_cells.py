"""Crystals with a left-handed cell, whose determinant is negative, have the same properties as right-handed ones."""

from dataclasses import asdict

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from dpa4.leaderboards.conductivity import _phono3py
from dpa4.simulation import elastic_tensor, equation_of_state, phonons, relax, run_md, run_neb
from helpers import crystal, graph_of, random_potential

pytestmark = pytest.mark.usefixtures("no_figures")


def copper(repeat: int = 1) -> Atoms:
    atoms = bulk("Cu", a=3.6).repeat(repeat)
    atoms.rattle(0.02 if repeat > 1 else 0, seed=1)
    return atoms


def reversed_cell(atoms: Atoms) -> Atoms:
    """The same crystal with all cell vectors reversed."""
    atoms = atoms.copy()
    atoms.set_cell(-atoms.cell.array)
    return atoms


def exchanged_vectors(atoms: Atoms) -> Atoms:
    """The same crystal with the first two cell vectors exchanged."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


left = pytest.mark.parametrize("left", [reversed_cell, exchanged_vectors])


@left
def test_energy_forces_and_stress(left):
    potential = random_potential().double()
    atoms = crystal()
    found, expected = potential(graph_of(left(atoms))), potential(graph_of(atoms))
    for name in ("energy", "forces", "virial"):
        np.testing.assert_allclose(
            getattr(found, name).detach().numpy(), getattr(expected, name).detach().numpy(), atol=1e-10
        )


@left
@pytest.mark.parametrize("cell", ["full", "volume", "shape", "xy", "z"])
def test_relaxation(left, cell):
    def volume_and_energy(atoms: Atoms) -> tuple[float, float]:
        result = relax(atoms, EMT(), cell=cell, fmax=1e-3)
        return result.volume, result.energy

    found = left(copper())
    assert volume_and_energy(found) == pytest.approx(volume_and_energy(copper()), abs=1e-6)
    assert np.linalg.det(found.cell.array) < 0  # the user's cell keeps its orientation


@left
def test_elastic_tensor_and_equation_of_state(tmp_path, left):
    folders = iter(tmp_path / str(k) for k in range(4))
    stiffness = [
        elastic_tensor(a, EMT(), next(folders), progress=False).stiffness for a in (left(copper()), copper())
    ]
    np.testing.assert_allclose(*stiffness, atol=1e-3)
    curves = [
        asdict(equation_of_state(a, EMT(), next(folders), points=7, shape=True, progress=False))
        for a in (left(copper()), copper())
    ]
    assert curves[0].pop("lengths") == pytest.approx(curves[1].pop("lengths"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@left
@pytest.mark.parametrize("ensemble", [{"ensemble": "nvt"}, {"cell": "volume"}, {"cell": "full"}])
def test_dynamics(tmp_path, left, ensemble):
    def positions(name: str, atoms: Atoms) -> np.ndarray:
        settings = {
            "ensemble": "npt",
            "steps": 10,
            "temperature": 300,
            "seed": 1,
            "progress": False,
        } | ensemble
        run_md(atoms, EMT(), tmp_path / name, **settings)
        return atoms.positions

    np.testing.assert_allclose(positions("left", left(copper(2))), positions("right", copper(2)), atol=1e-6)


@left
def test_barrier(tmp_path, left):
    """A vacancy hops across the boundary of the cell: the path is the short one."""

    def barrier(name: str, turn) -> float:
        start = turn(bulk("Cu", a=3.6, cubic=True).repeat(2))
        end = start.copy()
        del start[0]
        neighbour = int(np.argmin(end.get_distances(0, range(1, len(end)), mic=True))) + 1
        end.positions[neighbour] = end.positions[0] + end.cell.array[0]
        del end[0]
        result = run_neb(start, end, EMT(), tmp_path / name, images=3, fmax=0.5, progress=False)
        return result.barrier

    assert barrier("left", left) == pytest.approx(barrier("right", Atoms.copy), abs=1e-4)


@left
def test_phonons(tmp_path, left):
    pytest.importorskip("phonopy")
    options = {"supercell": (2, 2, 2), "mesh": 20.0, "progress": False}
    found = asdict(phonons(left(copper()), EMT(), tmp_path / "left", **options))
    expected = asdict(phonons(copper(), EMT(), tmp_path / "right", **options))
    assert found.pop("supercell") == expected.pop("supercell")
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@left
def test_displacements_of_conductivities(left):
    pytest.importorskip("phono3py")
    numbers = [
        len(
            _phono3py(
                a, np.diag([2, 2, 2]), np.diag([2, 2, 2]), (3, 3, 3), 0.03
            ).supercells_with_displacements
        )
        for a in (left(copper()), copper())
    ]
    assert numbers[0] == numbers[1] > 0
