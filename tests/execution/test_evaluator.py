"""Evaluator: padding and replay, failing or deviating compilation, precision."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.build import bulk

from dpa4.execution import limits, regions, trial
from dpa4.execution.cuda_graph import Replay
from dpa4.execution.evaluator import Evaluator
from dpa4.execution.limits import MAX_REPLAYED_ATOMS
from dpa4.execution.padding import Buffers, pad, replayed_size, rounded_up
from dpa4.graph import build_graph, collate, first_atoms
from dpa4.model import DPA4
from dpa4.model.network import MAX_EDGES, max_edges
from dpa4.model.presets import PRESETS, preset
from dpa4.potential import Potential
from dpa4.simulation import DPA4Calculator
from helpers import crystal, graph_of, molecule, random_potential, randomize

CUTOFF = 4.0  # of random_potential


def test_rounded_up_wastes_little_and_has_few_values():
    for digits, most in ((5, 250), (6, 500)):
        sizes = {n: rounded_up(n, digits) for n in range(100_000)}
        assert all(n <= s <= n + n / 2 ** (digits - 1) for n, s in sizes.items())
        assert len(set(sizes.values())) < most


def test_what_is_replayed_keeps_its_results():
    """The keep policy depends on the number of atoms with padding: 4096 atoms become 4352."""
    assert all(kept.last in (MAX_REPLAYED_ATOMS, 0) for kept in limits.KEEP_POLICIES)
    assert replayed_size(4096) == rounded_up(4097) <= MAX_REPLAYED_ATOMS
    assert replayed_size(MAX_REPLAYED_ATOMS) is None
    assert [limits.keep_policy(n, limits.KEEP_POLICIES) for n in (1, 2048, 2049, 4224, 4225)] == [
        0,
        0,
        1,
        1,
        2,
    ]


def test_wide_and_deep_models_keep_the_results_of_fewer_atoms():
    for name in PRESETS:
        config = preset(name)
        limited = name in ("pro", "paper-pro")
        assert (tuple(limits.keep_policies(config)) != limits.KEEP_POLICIES) == limited, name
        assert (max_edges(config) != MAX_EDGES) == limited, name
    ultra = preset("plus", channels=128, lmax=6, n_blocks=10, n_focus=3)
    small, medium, large = limits.keep_policies(ultra)
    assert ultra.edge_widths == (3 * 128 * 19,) * 10
    assert small == (4224 * 1024 // 7296, 2048 * 4 * 1024 // 72960) and medium == (small.last, 0)
    assert large == limits.KEEP_POLICIES[2]
    assert max_edges(ultra) == {"cpu": MAX_EDGES["cpu"], "cuda": 262_144 * 1024 // 7296}
    assert DPA4(preset("pro", ("H",), n_blocks=1)).max_edges["cuda"] == 262_144 // 2
    (one, *_) = limits.keep_policies(ultra.model_copy(update={"n_blocks": 1}))
    assert one.everywhere <= one.last


@pytest.mark.parametrize("structure", [molecule, crystal])
def test_padding_changes_nothing(structure):
    potential = random_potential()
    graph = graph_of(structure())
    padded = pad(graph, CUTOFF)
    assert padded.num_atoms == rounded_up(graph.num_atoms + 1)
    assert padded.num_edges == rounded_up(graph.num_edges)
    assert (padded.destination.diff() >= 0).all()
    expected, found = potential(graph), potential(padded)
    n = graph.num_atoms
    # float64, sums in another order
    torch.testing.assert_close(found.energy[:1], expected.energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.forces[:n], expected.forces, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.virial[:1], expected.virial, rtol=1e-10, atol=1e-11)
    assert not found.forces[n:].any() and not found.virial[1:].any()


def test_padding_of_several_structures():
    graph = collate([graph_of(molecule(1)), graph_of(molecule(2))])
    padded = pad(graph, CUTOFF)
    assert padded.num_structures == 3
    assert torch.equal(padded.structure[: graph.num_atoms], graph.structure)
    more = pad(graph, CUTOFF, 4)
    assert more.num_structures == 6 and more.charge_spin.shape == (6, 2)
    assert torch.equal(more.structure, padded.structure)  # the other structures are empty


def test_systems_in_parts_are_not_recorded(monkeypatch):
    potential, recorded = random_potential().eval(), []
    replay = Replay(potential)
    monkeypatch.setattr(replay, "_record", lambda buffers: recorded.append(buffers) or 1 / 0)
    graph = graph_of(crystal())
    padded = rounded_up(graph.num_edges)
    potential.model.max_edges = {"cpu": padded - 1}
    assert torch.equal(replay(graph).forces, potential(graph).forces)
    assert not recorded
    potential.model.max_edges = {"cpu": padded}
    with pytest.raises(ZeroDivisionError):
        replay(graph)
    assert recorded[0].graph.num_edges == padded


def test_buffers_hold_one_structure_after_the_other():
    """Buffers hold the same graph as `pad` returns, whatever they held before, NaN included."""
    seeds = [(3, 64), (10, 64), (11, 64), (0, 65), (5, 65), (4, 64), (3, 64)]
    graphs = [graph_of(molecule(seed, n)) for seed, n in seeds]
    graphs[1] = graphs[1]._replace(charge_spin=torch.tensor([[1, 2]]))
    graphs[2] = graphs[2]._replace(atomic_numbers=graphs[2].atomic_numbers.flip(0))  # another first atom
    assert {(rounded_up(g.num_atoms + 1), rounded_up(g.num_edges)) for g in graphs} == {(66, 3136)}
    edges = [g.num_edges for g in graphs[:3]]
    assert edges[0] > edges[1] < edges[2]
    buffers = Buffers(graphs[2], CUTOFF)
    for graph in graphs:
        buffers.copy(graphs[0]._replace(positions=torch.full_like(graphs[0].positions, torch.nan)))
        for _ in range(2):
            buffers.copy(graph)
            for name, expected in pad(graph, CUTOFF)._asdict().items():
                assert torch.equal(getattr(buffers.graph, name), expected), name


@pytest.mark.parametrize("edges", [3073, 3074, 3100, 3135, 3136])
def test_added_edges_are_spread_and_sorted(edges):
    graph = graph_of(molecule(3, 64))
    assert graph.num_edges >= edges - 4
    graph = graph._replace(
        source=graph.source[:1].expand(edges),
        destination=graph.destination[:1].expand(edges),
        shift=graph.shift[:1].expand(edges, 3),
    )
    added = pad(graph, CUTOFF).destination[edges:]
    assert len(added) == 3136 - edges
    assert bool((added >= 64).all() and (added < 66).all() and (added.diff() >= 0).all())
    counts = added.bincount(minlength=66)[64:]
    assert counts.max() <= 32  # half of the 64 edges that can be added at most


def test_failed_compilation_is_a_warning(monkeypatch):
    def fail(potential):
        raise OSError("no compiler found")

    monkeypatch.setattr(regions, "compile_potential", fail)
    potential, graph = random_potential(), graph_of(molecule())
    expected, evaluate = potential(graph), Evaluator(potential, compile=True)
    with pytest.warns(RuntimeWarning, match="OSError: no compiler found"):
        found = evaluate(graph)
    assert torch.equal(found.forces, expected.forces)
    assert torch.equal(evaluate(graph).forces, expected.forces)  # without another warning


def test_first_atoms_are_a_structure():
    atoms = molecule(n=12)
    found = first_atoms(graph_of(atoms), 7)
    for a, b in zip(found, graph_of(atoms[:7]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_deviating_code_is_not_used(monkeypatch, factor):
    def wrong(potential):
        network = potential.model
        network.read_out = lambda x: factor * type(network).read_out(network, x)

    monkeypatch.setattr(regions, "compile_potential", wrong)
    monkeypatch.setattr(trial, "compare_with_eager", lambda *_: {"energy": abs(factor - 1)})
    potential, graph = random_potential(), graph_of(molecule())
    expected = potential(graph)
    with pytest.warns(RuntimeWarning, match="relative deviations from eager mode"):
        found = Evaluator(potential, compile=True)(graph)
    assert torch.equal(found.energy, expected.energy)


SMALL, MEDIUM, LARGE = limits.KeepPolicy(12, 8), limits.KeepPolicy(12, 0), limits.KeepPolicy(0, 0)


class Comparisons:
    """Stub for the compiler that records which keep policies are compared; one of them may deviate."""

    def __init__(self, monkeypatch, deviating: limits.KeepPolicy | None = None):
        self.made, self.kept, self.limit, self.deviating = 0, [], None, deviating
        monkeypatch.setattr(limits, "KEEP_POLICIES", (SMALL, MEDIUM, LARGE))
        monkeypatch.setattr(regions, "compile_potential", self._compile)
        monkeypatch.setattr(regions, "keep_results", lambda potential, limit: setattr(self, "limit", limit))
        monkeypatch.setattr(trial, "compare_with_eager", self._compare)

    def _compile(self, potential):
        self.made += 1

    def _compare(self, potential, graph):
        self.kept.append(self.limit)
        return {"forces": float(self.limit == self.deviating)}


def test_each_kind_of_code_is_compared_once(monkeypatch):
    seen = Comparisons(monkeypatch)
    evaluate = Evaluator(random_potential(), compile=True)
    for n, kinds in [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (14, 3), (6, 3), (10, 3)]:
        evaluate(graph_of(molecule(n=n)))
        assert seen.kept == [SMALL, MEDIUM, LARGE][:kinds] and seen.limit == SMALL
    assert seen.made == 1


def test_a_large_system_first_does_not_slow_down_small_ones(monkeypatch):
    seen = Comparisons(monkeypatch)
    evaluate = Evaluator(random_potential(), compile=True)
    evaluate(graph_of(molecule(n=13)))
    assert seen.kept == [LARGE] and seen.limit == SMALL
    evaluate(graph_of(molecule(n=5)))
    assert seen.kept == [LARGE, SMALL]


def test_code_that_keeps_nothing_stands_in_for_code_that_deviates(monkeypatch):
    seen = Comparisons(monkeypatch, deviating=SMALL)
    evaluate = Evaluator(random_potential(), compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (5, 13, 6, 10):
            evaluate(graph_of(molecule(n=n)))
    assert seen.kept == [SMALL, LARGE] and seen.limit == LARGE


def test_large_systems_that_deviate_end_compilation(monkeypatch):
    Comparisons(monkeypatch, deviating=LARGE)
    evaluate = Evaluator(random_potential(), compile=True)
    evaluate(graph_of(molecule(n=5)))
    with pytest.warns(RuntimeWarning, match="relative deviations"):
        evaluate(graph_of(molecule(n=13)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(graph_of(molecule(n=5)))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forces_of_degree_four_and_many_edges():
    # Triton 3.6 compiled the sum over the entries of the rotation matrix wrongly (docs/adr/0014).
    potential = Potential(preset("paper-plus", ("Cu",)).model_copy(update={"n_blocks": 1}))
    randomize(potential.model, scale=0.02)
    potential.cuda()
    atoms = bulk("Cu", cubic=True) * (6, 6, 6)
    atoms.rattle(0.1, seed=0)
    graph = build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 6.0).to("cuda")
    assert graph.num_edges > 56_000
    expected = copy.deepcopy(potential).eval().double()(graph).forces
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # eager mode would be right, too
        found = Evaluator(potential, compile=True)(graph).forces
    # float32 deviates by 3e-6 of the largest force, the wrong code by 5e-2
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_compilation_waits_for_a_structure_with_edges(monkeypatch):
    calls = []
    monkeypatch.setattr(regions, "compile_potential", lambda *_: calls.append(1))
    evaluate = Evaluator(random_potential(), compile=True)
    evaluate(graph_of(molecule(n=1)))
    assert not calls
    evaluate(graph_of(molecule()))
    evaluate(graph_of(molecule()))
    assert len(calls) == 1


def test_fast_is_close_to_high_and_not_the_same():
    atoms, potential = crystal(), random_potential(channels=16)
    high, fast = (DPA4Calculator(potential, device="cpu", precision=p) for p in ("high", "fast"))
    expected, found = high.get_forces(atoms), fast.get_forces(atoms)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.1  # bfloat16 has a relative rounding of 4e-3, amplified by sums that cancel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "low"}, "precision must be high or fast, got 'low'"),
        ({"precision": "fast", "dtype": "float64"}, "precision 'fast' needs dtype float32, got 'float64'"),
    ],
)
def test_precision_that_does_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        DPA4Calculator(random_potential(), device="cpu", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replay_follows_the_structure():
    potential = random_potential().float().cuda()
    replay = Replay(potential, max_recordings=2)
    for seed, n in [(0, 9), (1, 9), (2, 10), (3, 12), (4, 14), (0, 9)]:
        graph = graph_of(molecule(seed, n)).to("cuda")
        expected, found = potential(graph), replay(graph)
        # float32, sums in another order
        torch.testing.assert_close(found.energy, expected.energy, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(found.forces, expected.forces, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.virial, expected.virial, rtol=1e-4, atol=1e-4)
        assert len(replay.recordings) <= 2


def test_recordings_are_given_up_when_weights_change(monkeypatch):
    """A recording does not recompute constants, which depend on weights alone. Here results stand for recordings."""
    potential, recorded = random_potential(), []
    replay = Replay(potential)

    def record(buffers):
        recorded.append(buffers)
        return SimpleNamespace(
            graph=SimpleNamespace(replay=lambda: None), buffers=buffers, prediction=potential(buffers.graph)
        )

    monkeypatch.setattr(replay, "_record", record)
    graph = graph_of(molecule())
    parameter = next(potential.parameters())
    for count, change in enumerate((torch.zero_, lambda p: p.add_(1)), start=1):
        for _ in range(2):
            torch.testing.assert_close(replay(graph).forces, potential(graph).forces)
        assert len(recorded) == count
        with torch.no_grad():
            change(parameter)
    next(potential.buffers()).mul_(1)
    replay(graph)
    assert len(recorded) == 3 and len(replay.recordings) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replay_sees_changed_weights(compilations):
    """Constants of compiled code are computed before a recording, outside the memory that it overwrites."""
    potential = random_potential().float().cuda()
    eager = copy.deepcopy(potential)
    regions.compile_potential(potential)
    replay, graph = Replay(potential), graph_of(molecule()).to("cuda")
    for factor in (1.0, 1.1, 0.9):
        for p in (*potential.parameters(), *eager.parameters()):
            p.detach().mul_(factor)
        expected = eager(graph)
        for _ in range(3):
            found = replay(graph)
            # float32, sums in another order
            torch.testing.assert_close(found.energy, expected.energy, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.forces, expected.forces, rtol=1e-4, atol=1e-5)
    (recording,) = replay.recordings.values()
    values = [t for region in recording.constants for made in region.values() for t in made.values]
    pool = tuple(recording.graph.pool())
    own = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == pool]
    assert values and own
    for t in values:
        assert not any(s["address"] <= t.data_ptr() < s["address"] + s["total_size"] for s in own)
