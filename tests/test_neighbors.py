"""Neighbour lists against a brute-force twin."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.geometry import complete_cell
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa4.graph import build_graph, neighbor_list, within_cutoff

Pair = tuple[int, int, int, int, int]  # source, destination, shift


def brute_force(positions, cell, pbc, cutoff) -> set[Pair]:
    """All pairs, by looking at every image that could be near enough."""
    lattice = np.where(np.asarray(pbc)[:, None], cell, 0.0)
    inverse = np.linalg.inv(complete_cell(lattice))
    spread = np.ptp(positions @ inverse, axis=0) + cutoff * np.linalg.norm(inverse, axis=0)
    most = np.where(pbc, np.ceil(spread), 0).astype(int)
    images = np.stack(np.meshgrid(*(np.arange(-k, k + 1) for k in most), indexing="ij"), -1).reshape(-1, 3)
    vectors = (
        positions[None, None] + (images @ lattice)[:, None, None] - positions[None, :, None]
    )  # image, i, j
    near = np.einsum("sijx,sijx->sij", vectors, vectors) <= cutoff**2
    near[(images == 0).all(1)] &= ~np.eye(len(positions), dtype=bool)
    return {(int(j), int(i), *map(int, images[s])) for s, i, j in np.argwhere(near)}


def pairs(neighbors) -> list[Pair]:
    return [
        (int(j), int(i), *map(int, s))
        for j, i, s in zip(neighbors.source, neighbors.destination, neighbors.shift, strict=True)
    ]


def assert_same(positions, cell, pbc, cutoff) -> int:
    """Pair-by-pair comparison; returns the number of pairs."""
    positions, cell, pbc = np.asarray(positions, float), np.asarray(cell, float), np.asarray(pbc, bool)
    found = neighbor_list(positions, cell, pbc, cutoff)
    listed = pairs(found)
    assert len(set(listed)) == len(listed), "a pair is listed twice"
    assert set(listed) == brute_force(positions, cell, pbc, cutoff)
    assert (np.diff(found.destination) >= 0).all()
    return len(listed)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_structures(seed):
    """Any periodicity, skewed and small cells, atoms outside the cell, any rows of non-periodic axes."""
    rng = np.random.default_rng(seed)
    pbc = rng.random(3) < 0.6
    cell = rng.normal(size=(3, 3)) * rng.uniform(1.5, 6)
    full = complete_cell(np.where(pbc[:, None], cell, 0.0))
    if (1 / np.linalg.norm(np.linalg.inv(full), axis=0)).min() < 0.5:
        cell = np.eye(3) * rng.uniform(1.5, 6)
    if rng.random() < 0.5:
        cell[~pbc] = 0
    positions = rng.normal(size=(rng.integers(1, 8), 3)) * rng.uniform(1, 15)
    assert_same(positions, cell, pbc, rng.uniform(1, 6))


@pytest.mark.parametrize(
    ("atoms", "cutoff", "count"),
    [
        # edge of the primitive cell 2.5 Angstrom: 12, 6, 24, 12, 24 atoms at 2.5 x 1, sqrt 2 .. sqrt 5
        (bulk("Cu", a=2.5 * 2**0.5), 6.0, 78),
        (bulk("Po", "sc", a=3.0), 3.1, 6),
        (Atoms("H", positions=[[1, 2, 3]]), 6.0, 0),
        (Atoms("HF", positions=[[0, 0, 0], [0, 0, 0.9]]), 6.0, 2),
        (Atoms("H", cell=[1.5, 0, 0], pbc=[True, False, False]), 4.0, 4),
        (Atoms("Si", cell=[[3, 0, 0], [9, 3, 0], [0, 9, 3]], pbc=True), 5.0, None),
        (fcc111("Al", (1, 1, 3), vacuum=5.0), 6.0, None),
    ],
    ids=["fcc", "sc", "atom", "molecule", "chain", "skewed", "slab"],
)
def test_known_structures(atoms, cutoff, count):
    found = assert_same(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    assert found == count or (count is None and found > 0)


@pytest.mark.parametrize("cutoff", [1.1, 3.3, 2**0.5, 6.0])
@pytest.mark.parametrize("periodic", [True, False])
def test_a_pair_at_the_cutoff_is_kept(cutoff, periodic):
    cell = np.diag([cutoff, 20, 20]) if periodic else np.zeros((3, 3))
    positions = [[0, 0, 0], [0, cutoff, 0]]
    expected = 6 if periodic else 2
    assert len(neighbor_list(positions, cell, [periodic] * 3, cutoff).source) == expected
    below = np.nextafter(cutoff, 0)
    assert len(neighbor_list(positions, cell, [periodic] * 3, below).source) == 0


@pytest.mark.parametrize("distance", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("pbc", [(False, False, False), (True, False, False), (True, True, False)])
def test_fragments_far_apart(pbc, distance):
    """An evaporated atom neither hangs nor aborts the search (vesin's cell list alone does)."""
    cell = np.diag([2.5, 3.0, 0.0]) * np.array(pbc)[:, None]
    far = distance * np.where(pbc, 0, 1)
    positions = np.array([[0, 0, 0], [0.3, 0.8, 0.1], [0.5, 0, 1], [0.5, 1, 1]])
    together = set(pairs(neighbor_list(positions, cell, pbc, 4.0)))
    positions[2:] += far
    apart = set(pairs(neighbor_list(positions, cell, pbc, 4.0)))
    assert apart == {p for p in together if (p[0] < 2) == (p[1] < 2)}
    assert apart


def test_very_flat_cells():
    """Many cells along one axis, one along the others: vesin's cell list divides by zero without help."""
    positions = np.array([[0, 0, 0], [0.1, 0.2, 0.3], [0.1, 0.3, 9000.0]])
    assert assert_same(positions, np.diag([1.0, 1.0, 12000.0]), [True] * 3, 0.1) == 0
    assert assert_same(positions, np.diag([0.5, 0.5, 60000.0]), [True] * 3, 0.51) > 12


def test_unwrapped_atoms_have_the_same_distances():
    atoms = bulk("NaCl", "rocksalt", a=5.0, cubic=True)
    atoms.rattle(0.1, seed=1)
    wrapped = build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 6.0)
    moved = atoms.positions + np.random.default_rng(0).integers(-3, 4, (8, 3)) @ atoms.cell.array
    unwrapped = build_graph(atoms.numbers, moved, atoms.cell.array, atoms.pbc, 6.0)
    lengths = [g.edge_vectors().norm(dim=1).sort().values for g in (wrapped, unwrapped)]
    torch.testing.assert_close(*lengths, rtol=0, atol=1e-12)


def test_build_graph_fields():
    atoms = bulk("Si", cubic=True)
    graph = build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 4.0, (1, 2))
    assert graph.positions.dtype == graph.cell.dtype == graph.shift.dtype == torch.float64
    assert graph.source.dtype == graph.destination.dtype == graph.structure.dtype == torch.int64
    assert graph.charge_spin.tolist() == [[1, 2]]
    assert graph.atomic_numbers.tolist() == [14] * 8
    assert (graph.destination.diff() >= 0).all()
    lengths = graph.edge_vectors().norm(dim=1)
    assert lengths.max() <= 4.0
    assert graph.num_edges == 8 * 16  # 4 + 12 neighbours
    from_tensors = build_graph(*(t for t in graph[:2]), graph.cell[0], torch.ones(3, dtype=torch.bool), 4.0)
    assert torch.equal(from_tensors.source, graph.source)


def test_build_graph_copies_its_input():
    positions = np.zeros((1, 3))
    graph = build_graph([1], positions, np.zeros((3, 3)), [False] * 3, 4.0)
    positions += 1
    assert not graph.positions.any()


def test_no_atoms():
    graph = build_graph([], np.zeros((0, 3)), np.zeros((3, 3)), [False] * 3, 4.0)
    assert (graph.num_atoms, graph.num_edges, graph.num_structures) == (0, 0, 1)
    assert graph.edge_vectors().shape == (0, 3)


def test_within_cutoff_of_a_larger_list():
    """A list with a skin, filtered after the atoms moved, equals a new list."""
    atoms = bulk("Al", cubic=True) * (2, 1, 1)
    skinned = build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 6.0)
    atoms.positions += np.random.default_rng(1).uniform(-0.25, 0.25, (8, 3))  # at most 0.433 < 1.0 / 2
    moved = within_cutoff(skinned._replace(positions=torch.tensor(atoms.positions)), 5.0)
    fresh = build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 5.0)
    as_set = [
        {tuple(edge) for edge in torch.column_stack((g.source, g.destination, g.shift)).tolist()}
        for g in (moved, fresh)
    ]
    assert as_set[0] == as_set[1]
    assert moved.num_edges < skinned.num_edges
    assert (moved.destination.diff() >= 0).all()


CUBE = np.eye(3) * 4


@pytest.mark.parametrize(
    ("positions", "cell", "pbc", "cutoff", "message"),
    [
        ([[0, 0, 0], [0, np.nan, 0]], CUBE, [1, 1, 1], 3, "position of atom 1 is not finite"),
        ([[0, 0, 0]], np.full((3, 3), np.inf), [1, 1, 1], 3, "the cell is not finite"),
        ([[0, 0, 0], [1, 1, 1], [4, 0, 1e-6]], CUBE, [1, 1, 1], 3, "atoms 0 and 2 coincide"),
        ([[0, 0, 0]], np.diag([4, 4, 0]), [1, 1, 1], 3, r"axis 2 is periodic .*, 0.0\] is zero"),
        ([[0, 0, 0]], [[4, 0, 0], [8, 0, 0], [0, 0, 4]], [1, 1, 0], 3, "axis 0 is periodic .* nearly in the"),
        ([[0, 0, 0]], [[4, 0, 0], [0, 4, 0], [4, 4, 0.01]], [1, 1, 1], 3, "make the axis non-periodic"),
        ([[0, 0]], CUBE, [1, 1, 1], 3, r"positions must have the shape \(atoms, 3\), got \(1, 2\)"),
        ([[0, 0, 0]], [4, 4, 4], [1, 1, 1], 3, r"cell must be \(3, 3\) and pbc \(3,\), got \(3,\)"),
        ([[0, 0, 0]], CUBE, True, 3, r"cell must be \(3, 3\) and pbc \(3,\), got \(3, 3\) and \(\)"),
        ([[0, 0, 0]], CUBE, [1, 1, 1], 0, "cutoff must be a positive length in Angstrom, got 0"),
        ([[0, 0, 0]], CUBE, [1, 1, 1], np.nan, "cutoff must be a positive length in Angstrom, got nan"),
    ],
)
def test_errors(positions, cell, pbc, cutoff, message):
    with pytest.raises(ValueError, match=message):
        neighbor_list(positions, cell, pbc, cutoff)


def test_atomic_numbers_must_fit():
    with pytest.raises(ValueError, match=r"atomic_numbers \(1,\) do not fit positions \(2, 3\)"):
        build_graph([1], np.eye(3)[:2], CUBE, [False] * 3, 3.0)
