"""The Verlet skin: along any path, the graphs equal those of a new search in every step."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa4.graph import SKIN, SkinnedNeighbors, build_graph
from helpers import crystal, molecule

CUTOFF = 4.0


def arguments(atoms: Atoms) -> tuple:
    return atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc


def assert_fresh(neighbors: SkinnedNeighbors, atoms: Atoms, charge_spin=(0, 1)) -> bool:
    """Compare the graph with that of a new search, to the last bit; return whether the skin searched, too."""
    before = neighbors.searches
    expected = build_graph(*arguments(atoms), neighbors.cutoff, charge_spin)
    found = neighbors.graph(*arguments(atoms), charge_spin)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    return neighbors.searches > before


def chain() -> Atoms:
    return Atoms("HC", [(0, 0, 0), (0.4, 1.1, 0.3)], cell=[1.5, 0, 0], pbc=[True, False, False])


STRUCTURES = {
    "molecule": molecule,
    "crystal": crystal,
    "slab": lambda: fcc111("Al", (2, 2, 2), vacuum=5.0),
    "small cell": lambda: bulk("Cu"),
    "chain": chain,
    "atom": lambda: Atoms("H", cell=[2.0] * 3, pbc=True),
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_random_walk(structure):
    atoms, neighbors, rng = structure(), SkinnedNeighbors(CUTOFF), np.random.default_rng(0)
    velocity = rng.normal(scale=0.01, size=atoms.positions.shape)
    for _ in range(150):
        velocity = 0.95 * velocity + rng.normal(scale=0.006, size=velocity.shape)
        atoms.positions += velocity
        assert_fresh(neighbors, atoms)
    assert neighbors.searches < 40
    assert neighbors.searches > 3 or len(atoms) == 1  # a lattice of single atoms only moves as a whole


def test_wrapped_positions():
    """An atom that reappears on the other side of the cell has moved by a lattice vector."""
    atoms, neighbors, rng = crystal(), SkinnedNeighbors(CUTOFF), np.random.default_rng(1)
    atoms.wrap()
    jumps = 0
    for _ in range(100):
        before = atoms.positions + rng.normal(scale=0.03, size=atoms.positions.shape)
        atoms.positions = before
        atoms.wrap()
        jumped = not np.allclose(atoms.positions, before)
        jumps += jumped
        assert assert_fresh(neighbors, atoms) or not jumped
    assert jumps > 3
    assert neighbors.searches < 60
    searches = neighbors.searches
    atoms.positions += atoms.cell.array[1]  # all of them: no distance changed
    assert not assert_fresh(neighbors, atoms)
    assert neighbors.searches == searches


@pytest.mark.parametrize("scale_atoms", [True, False])
def test_changing_cell(scale_atoms):
    """Anisotropic strain and shear with moving atoms, like at constant pressure."""
    atoms, neighbors, rng = crystal(), SkinnedNeighbors(CUTOFF), np.random.default_rng(2)
    start = atoms.cell.array.copy()
    for step in range(120):
        strain = 0.06 * np.sin(0.05 * step) * np.array([[1, 0.5, 0], [0, -0.7, 0.3], [0, 0.2, 0.8]])
        atoms.set_cell(start @ (np.eye(3) + strain), scale_atoms=scale_atoms)
        atoms.positions += rng.normal(scale=0.004, size=atoms.positions.shape)
        assert_fresh(neighbors, atoms)
    assert 1 < neighbors.searches < 60


def test_strained_lattice_needs_few_searches():
    """Atoms carried along by the cell do not count as moved, wherever the origin is."""
    atoms, neighbors = bulk("Cu", cubic=True) * 2, SkinnedNeighbors(CUTOFF, 0.5)
    atoms.positions += 100
    start = atoms.copy()
    # pairs beyond 4.5 stay beyond 4 down to a stretch of 4 / 4.5 = 0.889
    for stretch, searched in [
        (1.0, True),
        (0.95, False),
        (0.89, False),
        (0.888, True),
        (1.0, False),
        (1.2, False),
    ]:
        atoms = start.copy()
        atoms.set_cell(start.cell.array * stretch)
        atoms.positions = 100 + (start.positions - 100) * stretch
        assert assert_fresh(neighbors, atoms) == searched, stretch


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_small_change(seed):
    """Random deformations and displacements of random structures, many of them near the limit of the skin."""
    rng = np.random.default_rng(seed)
    atoms = molecule(int(seed % 1000), 8)
    atoms.set_cell(np.eye(3) * rng.uniform(2.5, 6) + rng.normal(scale=0.5, size=(3, 3)))
    atoms.pbc = rng.random(3) < 0.7
    positions, cell = atoms.positions.copy(), atoms.cell.array.copy()
    neighbors = SkinnedNeighbors(CUTOFF, 0.8)
    try:
        neighbors.graph(*arguments(atoms))
    except ValueError:  # images of the random molecule may coincide
        return
    for size in (0.2, 0.6, 1.0, 1.4):
        deformation = np.eye(3) + size * rng.normal(scale=0.05, size=(3, 3)) * rng.integers(0, 2)
        direction = rng.normal(size=positions.shape)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        atoms.set_cell(cell @ deformation)
        atoms.positions = positions @ deformation + 0.4 * size * direction
        assert_fresh(neighbors, atoms)


@pytest.mark.parametrize(("moved", "searched"), [(0.249, False), (0.2501, True)])
def test_two_atoms_that_approach(moved, searched):
    """The worst case: a pair just outside of the skin, each atom moving towards the other."""
    atoms = Atoms("HH", [(0, 0, 0), (CUTOFF + 0.5 + 1e-4, 0, 0)])
    neighbors = SkinnedNeighbors(CUTOFF, 0.5)
    assert neighbors.graph(*arguments(atoms)).num_edges == 0
    atoms.positions[0, 0] += moved
    atoms.positions[1, 0] -= moved
    assert assert_fresh(neighbors, atoms) == searched
    assert (neighbors.graph(*arguments(atoms)).num_edges == 2) == searched


@pytest.mark.parametrize("change", ["numbers", "pbc", "length", "none"])
def test_other_structures(change):
    atoms, neighbors = crystal(), SkinnedNeighbors(CUTOFF)
    assert_fresh(neighbors, atoms)
    assert not assert_fresh(neighbors, atoms)
    if change == "numbers":
        atoms.numbers[0] = 26
    elif change == "pbc":
        atoms.pbc[1] = False
    elif change == "length":
        del atoms[2]
    else:
        atoms = atoms[:0]
    assert assert_fresh(neighbors, atoms)
    assert not assert_fresh(neighbors, atoms)


def test_charge_and_spin_are_the_present_ones():
    atoms, neighbors = molecule(), SkinnedNeighbors(CUTOFF)
    for pair in [(0, 1), (1, 2), (0, 1), (-1, 4)]:
        assert_fresh(neighbors, atoms, pair)
    assert neighbors.searches == 1


def test_without_a_skin_every_step_searches():
    atoms, neighbors = crystal(), SkinnedNeighbors(CUTOFF, 0.0)
    assert [assert_fresh(neighbors, atoms) for _ in range(3)] == [True] * 3


def test_graphs_do_not_share_memory_with_the_structure():
    atoms, neighbors = crystal(), SkinnedNeighbors(CUTOFF)
    cell, places = torch.tensor(atoms.cell.array), torch.tensor(atoms.positions)
    for _ in range(2):
        graph = neighbors.graph(torch.tensor(atoms.numbers), places, cell, torch.tensor(atoms.pbc))
        places += 0.01
        cell *= 1.001
        assert not torch.equal(graph.positions, places)
        assert not torch.equal(graph.cell[0], cell)
    assert neighbors.searches == 1


def test_refused_structures_leave_no_list_behind():
    good, neighbors = crystal(), SkinnedNeighbors(CUTOFF)
    assert_fresh(neighbors, good)
    for field, message in [("positions", "position of atom 2 is not finite"), ("cell", "cell is not finite")]:
        bad = good.copy()
        getattr(bad, field)[2, 1] = np.nan
        with pytest.raises(ValueError, match=message):
            neighbors.graph(*arguments(bad))
        assert assert_fresh(neighbors, good)
    flat = good.copy()
    flat.cell[2] = flat.cell[1]
    with pytest.raises(ValueError, match="make the axis non-periodic"):
        neighbors.graph(*arguments(flat))


def test_atoms_that_meet_within_the_skin():
    atoms = Atoms("HH", [(0, 0, 0), (0, 0, 0.3)])
    neighbors = SkinnedNeighbors(CUTOFF, 1.0)
    neighbors.graph(*arguments(atoms))
    atoms.positions[1] = 0
    with pytest.raises(ValueError, match="atoms 0 and 1 coincide"):
        neighbors.graph(*arguments(atoms))


def test_arguments():
    with pytest.raises(ValueError, match=r"the skin must be a distance >= 0 in Angstrom, got -1"):
        SkinnedNeighbors(CUTOFF, -1)
    with pytest.raises(ValueError, match="the cutoff must be a positive length"):
        SkinnedNeighbors(0.0)
    with pytest.raises(ValueError, match=r"atomic_numbers \(1,\) do not match positions \(2, 3\)"):
        SkinnedNeighbors(CUTOFF).graph([1], np.eye(3)[:2], np.eye(3), [False] * 3)
    assert SkinnedNeighbors(CUTOFF).skin == SKIN


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("positions_on", ["cpu", "cuda"])
def test_random_walk_on_the_gpu(positions_on):
    atoms, rng = crystal(), np.random.default_rng(0)
    neighbors = SkinnedNeighbors(CUTOFF, device="cuda")
    for _ in range(60):
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
        atoms.set_cell(atoms.cell.array * 1.0005)
        numbers, positions, cell, pbc = arguments(atoms)
        found = neighbors.graph(
            torch.tensor(numbers).to(positions_on), torch.tensor(positions).to(positions_on), cell, pbc
        )
        for name, a, b in zip(found._fields, found, build_graph(*arguments(atoms), CUTOFF), strict=True):
            assert a.device.type == "cuda" and torch.equal(a.cpu(), b), name
    assert 1 < neighbors.searches < 30
