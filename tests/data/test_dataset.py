"""Batches: labels and masks, packing, order, resuming, and the thread that prepares them."""

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa4.data import (
    Batch,
    EpochBatches,
    Frame,
    FrameDataset,
    charges_and_spins,
    frame_from_atoms,
    read_frames,
)
from dpa4.data.dataset import Budget, pack
from dpa4.graph import build_graph
from helpers import SHARED

DATA = SHARED / "data"
CUTOFF = 4.0


def chains(sizes: list[int]) -> list[Frame]:
    """Hydrogen chains with the energy -index; two edges per bond at 3 Angstrom."""
    frames = []
    for k, size in enumerate(sizes):
        atoms = Atoms(f"H{size}", positions=np.arange(size)[:, None] * [3.0, 0, 0])
        atoms.info["energy"] = -float(k)
        frames.append(frame_from_atoms(atoms, origin=f"chain {k}"))
    return frames


def members(batches: EpochBatches, epoch: int, start: int = 0) -> list[list[int]]:
    """Structures in the batches, identified by their energies."""
    return [(-batch.energy).int().tolist() for batch in batches.batches(epoch, start)]


def no_batch_thread() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("dpa4-batches")]


# Batch


def test_batch_holds_graphs_and_labels():
    rng = np.random.default_rng(0)
    water, copper, chlorine = molecule("H2O"), bulk("Cu"), molecule("Cl2")
    water.info |= {"energy": -2.0, "virial": rng.normal(size=9)}
    copper.arrays["forces"] = rng.normal(size=(1, 3))
    copper.info |= {"charge": 1, "spin": 2, "config_weight": 3.0}
    chlorine.info["energy"] = 0.0
    chlorine.arrays["forces"] = rng.normal(size=(2, 3))
    frames = [frame_from_atoms(a) for a in (water, copper, chlorine)]
    dataset = FrameDataset(frames, CUTOFF, charges_and_spins(frames, True, (0, 1)))
    batch = dataset.batch([1, 2, 0])
    assert batch.has_energy.tolist() == [False, True, True]
    assert batch.has_forces.tolist() == [True, True, False]
    assert batch.has_virial.tolist() == [False, False, True]
    assert batch.energy.tolist() == [0.0, 0.0, -2.0]
    assert batch.weight.tolist() == [3.0, 1.0, 1.0]
    forces = np.vstack([copper.arrays["forces"], chlorine.arrays["forces"], np.zeros((3, 3))])
    np.testing.assert_array_equal(batch.forces.numpy(), forces)
    np.testing.assert_array_equal(batch.virial[2].numpy().ravel(), water.info["virial"])
    assert not batch.virial[:2].any()
    assert batch.graph.atomic_numbers.tolist() == [29, 17, 17, *water.numbers]
    assert batch.graph.charge_spin.tolist() == [[1, 2], [0, 1], [0, 1]]
    expected = build_graph(copper.numbers, copper.positions, copper.cell.array, copper.pbc, CUTOFF)
    assert torch.equal(batch.graph.shift[: expected.num_edges], expected.shift)
    assert {t.dtype for t in (batch.energy, batch.forces, batch.virial, batch.weight)} == {torch.float64}
    assert batch.to("cpu").graph.num_edges == batch.graph.num_edges
    on_meta = batch.to("meta")
    assert on_meta.graph.source.is_meta and all(t.is_meta for t in on_meta[1:])


def test_default_charge_and_multiplicity():
    frame = frame_from_atoms(molecule("O2"))
    pairs = charges_and_spins([frame], True, (0, 3))
    assert FrameDataset([frame], CUTOFF, pairs).graph(0).charge_spin.tolist() == [[0, 3]]


@pytest.mark.parametrize("cache_bytes", [0, 700, 10**9])
def test_cache_changes_nothing_but_the_work(cache_bytes, monkeypatch):
    built = []

    def counted(*args):
        built.append(args)
        return build_graph(*args)

    monkeypatch.setattr("dpa4.data.dataset.build_graph", counted)
    frames = chains([2, 3, 2])
    dataset = FrameDataset(frames, CUTOFF, cache_bytes=cache_bytes)
    assert dataset.num_edges.tolist() == [2, 4, 2]
    assert dataset.num_edges.tolist() == [2, 4, 2]
    assert len(built) == 3
    graph = dataset.batch([0, 1, 2]).graph
    kept = {0: 0, 700: 2, 10**9: 3}[cache_bytes]  # of 248 + 368 + 248 bytes
    assert len(built) == 3 + 3 - kept
    assert graph.positions[:, 0].tolist() == [0, 3, 0, 3, 6, 0, 3]


def test_a_structure_without_neighbour_list_is_named():
    broken = frame_from_atoms(Atoms("H2", positions=np.zeros((2, 3))), origin="train.xyz, frame 7")
    with pytest.raises(ValueError, match="train.xyz, frame 7: atoms 0 and 1 coincide"):
        FrameDataset([broken], CUTOFF).graph(0)


# Packing


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 99)), min_size=1, max_size=40),
    st.integers(1, 60),
    st.integers(1, 200),
)
def test_pack(sizes, most_atoms, most_edges):
    """Nothing is lost, order is kept, only lone structures exceed a budget, no batch is needlessly short."""
    atoms, edges = np.array(sizes).T
    budgets = [Budget("atoms", atoms, most_atoms), Budget("edges", edges, most_edges)]
    order = np.random.default_rng(0).permutation(len(sizes)).tolist()
    batches = pack(order, budgets)
    assert [i for batch in batches for i in batch] == order
    fits = [atoms[b].sum() <= most_atoms and edges[b].sum() <= most_edges for b in batches]
    assert all(fit or len(b) == 1 for fit, b in zip(fits, batches, strict=True))
    for batch, following in zip(batches, batches[1:], strict=False):
        more = [*batch, following[0]]
        assert atoms[more].sum() > most_atoms or edges[more].sum() > most_edges


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"batch_size": 2}, [[0, 1], [2, 3], [4]]),
        ({"max_atoms": 6}, [[0, 1, 2], [3], [4]]),
        ({"max_edges": 10}, [[0, 1, 2], [3, 4]]),
        ({"max_atoms": 5, "max_edges": 10}, [[0, 1], [2, 3], [4]]),
        ({"max_atoms": 7, "max_edges": 6}, [[0, 1, 2], [3], [4]]),
    ],
)
def test_budgets(budget, expected):
    """Chains of 3, 2, 1, 4, 3 atoms with 4, 2, 0, 6, 4 edges in the order of the file."""
    batches = EpochBatches(FrameDataset(chains([3, 2, 1, 4, 3]), 3.5), shuffle=False, **budget)
    assert batches.indices(0) == members(batches, 0) == expected
    assert batches.num_batches(5) == len(expected)


def test_oversized_structure_goes_alone_and_is_named_once():
    dataset = FrameDataset(chains([2, 9, 2]), 3.5)
    message = (
        "1 structures exceed max_atoms = 5 and are batches of their own; the largest is chain 1 with 9 atoms"
    )
    with pytest.warns(UserWarning, match=message):
        batches = EpochBatches(dataset, max_atoms=5, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert members(batches, 0) == [[0], [1], [2]]
        EpochBatches(dataset, batch_size=5)
    with pytest.warns(UserWarning, match="exceed max_edges = 10 .* chain 1 with 16 edges"):
        EpochBatches(dataset, max_edges=10)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give either batch_size, or max_atoms and/or max_edges; got {}"),
        ({"batch_size": 2, "max_atoms": 9}, "give either batch_size, or .*'max_atoms': 9"),
        ({"max_edges": 0}, "max_edges must be at least 1, got 0"),
    ],
)
def test_budget_errors(budget, message):
    with pytest.raises(ValueError, match=message):
        EpochBatches(FrameDataset(chains([2]), 3.5), **budget)


def test_no_structures():
    with pytest.raises(ValueError, match="the data set has no structures"):
        EpochBatches(FrameDataset([], CUTOFF), batch_size=1)


# Epochs


def test_epochs_are_shuffled_and_reproducible():
    dataset = FrameDataset(chains([2, 3] * 10), 3.5)
    batches = EpochBatches(dataset, max_atoms=10, seed=3)
    epochs = [members(batches, epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2]
    again = EpochBatches(dataset, max_atoms=10, seed=3)
    assert members(again, 2) == epochs[2]  # independent of earlier epochs
    assert members(EpochBatches(dataset, max_atoms=10, seed=4), 0) != epochs[0]


@pytest.mark.parametrize("start", [0, 1, 5, 7, 8])
def test_resumed_epoch_is_the_rest_of_the_epoch(start):
    dataset = FrameDataset(chains([2, 3] * 10), 3.5)
    batches = EpochBatches(dataset, batch_size=3, seed=1)
    assert batches.num_batches(4) == 7
    assert members(batches, 4, start) == members(batches, 4)[start:]


# The background thread


class Spoiled(FrameDataset):
    """Data set that fails at one structure."""

    def batch(self, indices) -> Batch:
        if 3 in indices:
            raise OSError("disk on fire")
        return super().batch(indices)


def test_errors_of_the_thread_reach_the_caller():
    batches = EpochBatches(Spoiled(chains([2] * 9), CUTOFF), batch_size=1, shuffle=False)
    seen = []
    with pytest.raises(OSError, match="disk on fire"):
        for batch in batches.batches(0):
            seen.append(-int(batch.energy))
    assert seen == [0, 1, 2]
    assert no_batch_thread()


def test_leaving_early_ends_the_thread():
    batches = EpochBatches(FrameDataset(chains([2] * 50), CUTOFF), batch_size=1)
    for _ in batches.batches(0):
        assert not no_batch_thread()
        break
    assert no_batch_thread()
    iterator = batches.batches(0)
    next(iterator)
    del iterator
    assert no_batch_thread()
    assert len(list(batches.batches(0))) == 50
    assert no_batch_thread()


def test_batches_are_prepared_ahead_but_not_without_bound():
    made = threading.Semaphore(0)

    class Counted(FrameDataset):
        count = 0

        def batch(self, indices) -> Batch:
            self.count += 1
            made.release()
            return super().batch(indices)

    dataset = Counted(chains([2] * 20), CUTOFF)
    iterator = EpochBatches(dataset, batch_size=1).batches(0)
    next(iterator)
    for _ in range(4):  # the current batch, and three ahead
        assert made.acquire(timeout=10)
    time.sleep(0.05)
    assert dataset.count == 4
    iterator.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_for_the_gpu():
    (batch,) = EpochBatches(FrameDataset(chains([2]), CUTOFF), batch_size=1).batches(0)
    assert batch.energy.is_pinned() and batch.graph.positions.is_pinned()


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the reference data in {DATA}")
def test_real_mixed_sizes_stay_within_the_budget():
    dataset = FrameDataset(read_frames(DATA / "inorganic/mpf-alkali-TP.xyz")[:120], 5.0)
    batches = EpochBatches(dataset, max_atoms=64, max_edges=3000)
    total = 0
    for batch, indices in zip(batches.batches(0), batches.indices(0), strict=True):
        assert batch.graph.num_structures == len(indices)
        assert batch.graph.num_atoms <= 64
        assert batch.graph.num_edges <= 3000
        assert batch.has_virial.all()
        total += len(indices)
    assert total == 120
