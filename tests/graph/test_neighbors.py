"""Neighbour lists: both searches against a brute-force twin and each other."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.geometry import complete_cell
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa4.graph import build_graph, collate, neighbor_list, neighbor_list_torch, within_cutoff
from dpa4.graph.lattice import MAX_COORDINATE
from dpa4.graph.neighbors import Neighbors

Pair = tuple[int, int, int, int, int]  # source, destination, shift


def brute_force(positions, cell, pbc, cutoff) -> set[Pair]:
    """All pairs, found by checking every image that could be near enough."""
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


def torch_search(positions, cell, pbc, cutoff) -> Neighbors:
    """The search for accelerators, on the CPU."""
    tensors = (torch.tensor(np.asarray(x, float)) for x in (positions, cell))
    found = neighbor_list_torch(*tensors, torch.tensor(np.asarray(pbc, bool)), cutoff)
    return Neighbors(*(t.numpy().astype(np.int64) for t in found))


def search(positions, cell, pbc, cutoff) -> Neighbors:
    """Neighbour list of one search, after a comparison with the other search, order included."""
    found = neighbor_list(positions, cell, pbc, cutoff)
    for name, ours, theirs in zip(
        found._fields, found, torch_search(positions, cell, pbc, cutoff), strict=True
    ):
        assert np.array_equal(ours, theirs), name
    return found


def assert_same(positions, cell, pbc, cutoff) -> int:
    """Compare two lists pair by pair; returns the number of pairs."""
    positions, cell, pbc = np.asarray(positions, float), np.asarray(cell, float), np.asarray(pbc, bool)
    found = search(positions, cell, pbc, cutoff)
    listed = pairs(found)
    assert len(set(listed)) == len(listed), "a pair is listed twice"
    assert set(listed) == brute_force(positions, cell, pbc, cutoff)
    key = [(i, j, *s) for j, i, *s in listed]
    assert key == sorted(key)
    return len(listed)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_structures(seed):
    """Any periodicity, skewed and small cells, atoms outside the cell, any vectors along non-periodic axes."""
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
    assert len(search(positions, cell, [periodic] * 3, cutoff).source) == expected
    below = np.nextafter(cutoff, 0)
    assert len(search(positions, cell, [periodic] * 3, below).source) == 0


@pytest.mark.parametrize("distance", [1e3, 1e6, 9e7])
@pytest.mark.parametrize("pbc", [(False, False, False), (True, False, False), (True, True, False)])
def test_fragments_far_apart(pbc, distance):
    """An evaporated atom neither hangs nor aborts the search, as it does vesin's cell list by itself."""
    cell = np.diag([2.5, 3.0, 0.0]) * np.array(pbc)[:, None]
    far = distance * np.where(pbc, 0, 1)
    positions = np.array([[0, 0, 0], [0.3, 0.8, 0.1], [0.5, 0, 1], [0.5, 1, 1]])
    together = set(pairs(search(positions, cell, pbc, 4.0)))
    positions[2:] += far
    apart = set(pairs(search(positions, cell, pbc, 4.0)))
    assert apart == {p for p in together if (p[0] < 2) == (p[1] < 2)}
    assert apart


@pytest.mark.parametrize("pbc", [False, True])
def test_atoms_at_the_largest_coordinate(pbc):
    cell = np.diag([0.2, 30, 30]) * pbc
    positions = np.array([[0, 0, 0], [0, 1.5, 0], [0, 0, 1.0]])
    near = len(search(positions, cell, [pbc] * 3, 4.0).source)
    moved = positions - [0.9 * MAX_COORDINATE, 0, 0]
    assert len(search(moved, cell, [pbc] * 3, 4.0).source) == near > 0


@pytest.mark.parametrize("value", [1e306, -2e8, np.nan, np.inf])
@pytest.mark.parametrize("find", [neighbor_list, torch_search])
def test_coordinates_beyond_the_search_are_refused(value, find):
    """vesin divides by zero at 1e306, and finds too few neighbours when cell vectors are counted beyond 2**31."""
    reason = "beyond 1e[+]08 Angstrom" if np.isfinite(value) else "not finite"
    with pytest.raises(ValueError, match=rf"position of atom 1 is {reason}: \[0.0, 0.0, .*\]; correct"):
        find([[0, 0, 0], [0, 0, value]], np.zeros((3, 3)), [False] * 3, 4.0)


@pytest.mark.parametrize("find", [neighbor_list, torch_search])
def test_cell_vectors_beyond_the_search_are_refused(find):
    """With a single vector of 1e8 Angstrom vesin's cell list does not end."""
    with pytest.raises(ValueError, match=r"component -1e\+08, beyond 1e\+06 Angstrom; correct it"):
        find(np.zeros((1, 3)), np.diag([5, 5, -1e8]), [True] * 3, 4.0)
    find(np.zeros((1, 3)), np.diag([5, 5, 1e300]), [True, True, False], 4.0)  # ignored


def test_very_flat_cells():
    """Many cells along one axis and one along the others make vesin's cell list divide by zero, unless prevented."""
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
    assert all(torch.equal(a, b) for a, b in zip(moved, fresh, strict=True))
    assert moved.num_edges < skinned.num_edges
    both = within_cutoff(collate([skinned, skinned]), 5.0)
    assert torch.equal(both.source, collate([within_cutoff(skinned, 5.0)] * 2).source)


def test_within_cutoff_refuses_coincident_atoms():
    graph = build_graph([1, 1], [[0, 0, 0], [0, 0, 0.3]], np.zeros((3, 3)), [False] * 3, 3.0)
    with pytest.raises(ValueError, match="atoms 0 and 1 coincide"):
        within_cutoff(graph._replace(positions=torch.zeros(2, 3, dtype=torch.float64)), 2.0)


def test_order_of_atoms_very_many_cells_apart():
    """Numbers of cells too large for a common sort key do not change the list."""
    positions = np.array([[0, 0, 0], [1.0, 0, 0], [0, 1.2, 0]])
    far = np.array([[0, 0, 0], [1e6, -1e6, 1e6], [-1e6, 1e6, 1e6]])
    near, apart = (
        np.sort(lengths(p, search(p, CUBE, [True] * 3, 5.0))) for p in (positions, positions + 4 * far)
    )
    np.testing.assert_allclose(near, apart, atol=1e-8)  # coordinates of 4e6 are exact to 5e-10


def lengths(positions, found) -> np.ndarray:
    vectors = positions[found.source] - positions[found.destination] + found.shift @ CUBE
    return np.linalg.norm(vectors, axis=1)


def test_graph_of_tensors():
    """Tensors are accepted like arrays, and copied."""
    atoms = bulk("NaCl", "rocksalt", a=5.0, cubic=True)
    arguments = (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 5.0, (1, 2))
    expected = build_graph(*arguments)
    tensors = [torch.tensor(np.asarray(a)) for a in arguments[:4]]
    for a, b in zip(build_graph(*tensors, *arguments[4:], device="cpu"), expected, strict=True):
        assert torch.equal(a, b)
    assert tensors[1].data_ptr() != build_graph(*tensors, 5.0).positions.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(5))
def test_graph_on_the_gpu_is_that_on_the_cpu(seed):
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True) * (3, 2, 1)
    atoms.rattle(0.2, seed=seed)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(scale=0.1, size=(3, 3))), scale_atoms=True)
    atoms.pbc = rng.random(3) < 0.7
    arguments = (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 6.0)
    on_gpu, on_cpu = build_graph(*arguments, device="cuda"), build_graph(*arguments)
    for name, a, b in zip(on_gpu._fields, on_gpu, on_cpu, strict=True):
        assert a.device.type == "cuda" and torch.equal(a.cpu(), b), name


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
        (
            [[0, 0, 0]],
            [4, 4, 4],
            [1, 1, 1],
            3,
            r"cell must have shape \(3, 3\) and pbc shape \(3,\), got \(3,\)",
        ),
        (
            [[0, 0, 0]],
            CUBE,
            True,
            3,
            r"cell must have shape \(3, 3\) and pbc shape \(3,\), got \(3, 3\) and \(\)",
        ),
        ([[0, 0, 0]], CUBE, [1, 1, 1], 0, "cutoff must be a positive length in Angstrom, got 0"),
        ([[0, 0, 0]], CUBE, [1, 1, 1], np.nan, "cutoff must be a positive length in Angstrom, got nan"),
    ],
)
@pytest.mark.parametrize("function", [neighbor_list, torch_search])
def test_errors(function, positions, cell, pbc, cutoff, message):
    with pytest.raises(ValueError, match=message):
        function(positions, cell, pbc, cutoff)


def test_atomic_numbers_must_fit():
    with pytest.raises(ValueError, match=r"atomic_numbers \(1,\) do not match positions \(2, 3\)"):
        build_graph([1], np.eye(3)[:2], CUBE, [False] * 3, 3.0)
