"""The cell list in torch operations: batches of structures, bounded memory, limits of bin numbers."""

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from torch.utils._python_dispatch import TorchDispatchMode

import dpa4.graph.cell_list as module
from dpa4.graph import Graph, build_graph, collate, neighbor_list_torch
from dpa4.graph.lattice import completed, periodic_lattice

CUTOFF = 5.0


def structures() -> list[Graph]:
    """Graphs of a molecule, small and skewed crystals, a slab, and an empty structure."""
    skewed = bulk("Si")
    skewed.set_cell(skewed.cell.array @ [[1, 0.4, 0], [0, 1, -0.3], [0.2, 0, 1]], scale_atoms=True)
    many = [molecule("CH3CH2OH"), bulk("Po", "sc", a=2.1), skewed, fcc111("Al", (2, 1, 2), vacuum=5.0)]
    many.insert(2, many[0][:0])
    return [build_graph(a.numbers, a.positions, a.cell.array, a.pbc, CUTOFF) for a in many]


PBC = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()


def assert_found(batch: Graph) -> None:
    found = neighbor_list_torch(batch.positions, batch.cell, PBC, CUTOFF, batch.structure)
    for ours, expected in zip(found, (batch.source, batch.destination, batch.shift), strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


def test_many_structures_at_once():
    batch = collate(structures())
    assert batch.num_edges > 200
    assert_found(batch)


@pytest.mark.parametrize("atoms", [1, 3])
def test_chunks(monkeypatch, atoms):
    monkeypatch.setattr(module, "ATOMS_AT_ONCE", atoms)
    assert_found(collate(structures()))


@pytest.mark.parametrize("reach", [(1, 1, 1), (1, 2, 3), (3, 3, 8)])
def test_size_of_bins_does_not_matter(monkeypatch, reach):
    monkeypatch.setattr(module, "REACH", reach)
    assert_found(collate(structures()))


@pytest.mark.parametrize(("name", "value"), [("MOST_BINS", 2000), ("FARTHEST_BIN", 2)])
def test_limits_of_bin_numbers(monkeypatch, name, value):
    """Larger bins, or a common one for the farthest atoms, find the same pairs."""
    monkeypatch.setattr(module, name, value)
    assert_found(collate(structures()))


class Largest(TorchDispatchMode):
    """Mode that records the largest number of elements of any result."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        many = result if isinstance(result, tuple | list) else [result]
        self.elements = max([self.elements, *(t.numel() for t in many if isinstance(t, torch.Tensor))])
        return result


def gas(n: int, spacing: float) -> torch.Tensor:
    """Positions of atoms along the diagonal, whose extent along each axis grows with their number."""
    rng = np.random.default_rng(0)
    return torch.tensor(np.arange(n)[:, None] * spacing + rng.uniform(-0.2, 0.2, (n, 3)))


@pytest.mark.parametrize("spacing", [1.0, 1e4])
def test_memory_grows_with_the_number_of_atoms(monkeypatch, spacing):
    monkeypatch.setattr(module, "ATOMS_AT_ONCE", 100)
    largest, edges = [], []
    for n in (1000, 4000):
        with Largest() as mode:
            source, _, _ = neighbor_list_torch(gas(n, spacing), torch.zeros(3, 3), torch.zeros(3).bool(), 2.5)
        largest.append(mode.elements)
        edges.append(len(source))
    columns = 25 * 100
    assert largest[1] <= 4 * max(largest[0], columns)
    assert largest[1] < 4000 * 30  # not 4000^2, let alone (4000 * spacing)^3
    assert edges[1] == pytest.approx(4 * edges[0], rel=0.02)  # the ends of the line have fewer


def test_structures_must_fit():
    positions, cell, pbc = torch.zeros(2, 3), torch.eye(3)[None], torch.zeros(1, 3).bool()
    with pytest.raises(ValueError, match=r"structure \(1,\), cell \(1, 3, 3\) and pbc \(1, 3\) do not match"):
        neighbor_list_torch(positions, cell, pbc, 2.0, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pbc \(2, 3\) do not match"):
        neighbor_list_torch(positions, cell, pbc.expand(2, 3), 2.0, torch.zeros(2, dtype=torch.int64))


def test_cells_of_every_periodicity_are_completed_together():
    """Batched results equal single ones. Missing axes are orthogonal unit vectors, heights are distances of faces."""
    rng = np.random.default_rng(0)
    pbc = np.array(list(np.ndindex(2, 2, 2)), dtype=bool)
    lattice, periodic = periodic_lattice(3 * np.eye(3) + rng.normal(0, 0.4, (8, 3, 3)), pbc)
    full, heights = completed(lattice, periodic)
    for one in range(8):
        for together, alone in zip((full, heights), completed(lattice[one], periodic[one]), strict=True):
            assert np.array_equal(together[one], alone)
        gram, missing = full[one] @ full[one].T, ~pbc[one]
        np.testing.assert_allclose(full[one][pbc[one]], lattice[one][pbc[one]], rtol=1e-14)
        np.testing.assert_allclose(gram[missing], np.eye(3)[missing], atol=1e-12)  # rounding of an SVD
        for axis in range(3):
            a, b = np.delete(full[one], axis, axis=0)
            area = np.linalg.norm(np.cross(a, b))
            assert heights[one, axis] == pytest.approx(abs(np.linalg.det(full[one])) / area, rel=1e-12)


@pytest.mark.parametrize("rows", [[[3, 0, 0], [0, 0, 0], [0, 0, 3]], [[3, 0, 0], [0, 3, 0], [3, 3, 0.01]]])
def test_a_bad_cell_is_found_among_good_ones(rows):
    cells = np.stack([np.eye(3), np.asarray(rows, dtype=float), np.eye(3)])
    with pytest.raises(ValueError, match=r"axis \d is periodic but its cell vector") as error:
        completed(*periodic_lattice(cells, np.ones((3, 3), dtype=bool)))
    with pytest.raises(ValueError, match=r"axis \d is periodic but its cell vector") as alone:
        completed(*periodic_lattice(cells[1], np.ones(3, dtype=bool)))
    assert str(error.value) == str(alone.value)
