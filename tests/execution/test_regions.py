"""Compiled potentials: numbers and derivatives of eager mode, from code that is found again on disk.

Compilation takes minutes on a CPU, so stages run as the graphs that the compiler would receive. Tracing takes
seconds for each kind of network, so most tests share the traces of `small_potential`.
"""

import gc
import itertools

import pytest
import torch

from dpa4.execution import precompile
from dpa4.execution.check import compare_with_eager
from dpa4.execution.limits import KEEP_POLICIES, KeepPolicy
from dpa4.execution.regions import compile_potential, keep_results, restore_eager
from dpa4.execution.regions import regions as regions_of
from dpa4.graph import collate
from dpa4.model.config import Bridging, PairBridging
from dpa4.model.presets import preset
from dpa4.ops import available
from dpa4.potential import Potential
from dpa4.tracing import region as regions
from dpa4.tracing import trace as tracing
from dpa4.tracing.region import Region
from dpa4.tracing.stage import graph_of as recorded
from helpers import (
    assert_close,
    assert_only_views_of_weights,
    crystal,
    graph_of,
    molecule,
    random_potential,
    small_potential,
)

PAIRS = ["H-H", "H-C", "H-O", "C-C", "C-O", "O-O"]
WINDOWS = PairBridging(outer=dict.fromkeys(PAIRS, 1.5), frozen=0.6, full=dict.fromkeys(PAIRS, 0.6))
GENERATIONS = {
    "S2 grid": {"ffn_on": "s2", "n_blocks": 1, "lmax": 1},
    "SO(3) grid": {"message_node_so3": True, "ffn_on": "so3", "ffn_grid": 1, "so3_readout": "mlp"},
    "foci": {"n_focus": 2, "radial_so2_rank": 2},
    "bridging": {"n_blocks": 1, "bridging": Bridging(r_inner=0.8, r_outer=1.4)},
    "bridging of pairs, O3": {"n_blocks": 1, "bridging": WINDOWS, "symmetry": "O3"},
}
GENERATIONS["generation 3"] = {
    "n_blocks": 1,
    "n_focus": 2,
    "basis": "gaussian/fix",
    "env_exp": 5,
    "edge_norm": (False, True, True),
    "sandwich_norm": (True, False, True, False),
}
GENERATIONS["SO(3) grid, O3"] = {**GENERATIONS["SO(3) grid"], "symmetry": "O3", "n_blocks": 1, "channels": 16}
GENERATIONS["everything"] = {**GENERATIONS["SO(3) grid"], **GENERATIONS["foci"], **GENERATIONS["bridging"]}
# With 16 channels, compiled code contains the C++ kernels; the others have 8 channels and plain operations.
GENERATIONS["everything, C++"] = {**GENERATIONS["everything"], "channels": 16}


@pytest.mark.slow
def test_training_computes_everything_of_its_weights(compilations):
    potential = small_potential().train()
    compile_potential(potential)
    potential(batches(1)[0])
    programs = [p for region in regions_of(potential) for p in region.code.programs.values()]
    assert programs and all(p.constants.empty for p in programs)
    assert not any(region.constants for region in regions_of(potential))


@pytest.mark.parametrize("name", ["S2 grid", pytest.param("everything, C++", marks=pytest.mark.slow)])
def test_evaluation_of_a_potential_computes_nothing_of_weights_alone(compilations, name):
    potential = random_potential(**GENERATIONS[name]).eval()
    compile_potential(potential)
    assert compare_with_eager(potential, batches(1)[0])["forces"] < 1e-11
    with torch.no_grad():
        for p in potential.parameters():
            p.mul_(1.1)
    assert compare_with_eager(potential, batches(1)[0])["forces"] < 1e-11
    for region in regions_of(potential):
        for program in region.code.programs.values():
            assert_only_views_of_weights(program, len(region.tensors) + 1)


def test_weights_are_split_once(compilations, empty_cache, monkeypatch):
    """Simulates a GPU, where float32 products use split weights."""
    monkeypatch.setattr(available, "split_product", lambda x: True)
    potential = small_potential().float().eval()
    compile_potential(potential)
    precompile._outline(potential, precompile.Mode(training=False), precompile.WorkerPool(0))

    def splits(stage) -> int:
        return sum(n.target is torch.ops.dpa4.split_weights.default for n in recorded(stage.recipe).nodes)

    programs = [p for region in regions_of(potential) for p in region.code.programs.values()]
    assert sum(splits(stage) for p in programs for stage in p.stages) == 0
    assert sum(splits(p.constants) for p in programs) >= 4
    assert compilations == []


@pytest.mark.parametrize(("max_kept", "calls"), [(100, 1), (0, 2)])
def test_kernels_with_several_results(compilations, max_kept, calls):
    """Results of one call that are needed later are either all stored, or computed again."""
    potential = small_potential().eval()
    compile_potential(potential, kept=KeepPolicy(max_kept, max_kept))
    assert compare_with_eager(potential, batches(1)[0])["forces"] < 1e-11
    nodes = [n for graph in compilations for n in graph.graph.nodes if "so2_value" in str(n.target)]
    assert len(nodes) == calls


def test_whole_stacks_keep_only_what_their_derivative_takes(monkeypatch, empty_cache):
    """Trace with the kernels for Hopper GPUs, without one. The last block stores products; earlier ones recompute."""
    monkeypatch.setattr(available, "whole_stack", lambda x, layers, layout, separate: True)
    potential = Potential(preset("paper-air", ("H", "C"), n_blocks=2)).float().eval()
    compile_potential(potential, kept=KEEP_POLICIES[1])
    for method in ("locate", "input_features", "read_out"):  # tracing the messages alone saves time
        del vars(potential.model)[method]
    for block in potential.model.blocks:
        del block.__dict__["states"], block.__dict__["update"]
    precompile._outline(potential, precompile.Mode(training=False), precompile.WorkerPool(0))
    code = potential.model.blocks[0].messages.code
    calls, edge_features = {}, {}
    for kind, program in code.programs.items():
        nodes = [n for stage in program.stages for n in recorded(stage.recipe).nodes]
        calls[kind.keep] = [n.args[-1] for n in nodes if "so2_fused_value" in str(n.target)]
        taken = program.stages[1].recipe.arguments
        edge_features[kind.keep] = [a.shape for a in taken if a.shape[-1] == 640]
    # True for every call, in stages 0 and 1, that stores products.
    assert calls == {True: [True], False: [False, True]}
    # Products of three gated layers with some rows of padding, and the result, which the gradient of attention needs.
    assert edge_features == {True: [[1, "edge", 640], *3 * [["edge + 63", 640]]], False: []}


def batches(count: int):
    return [
        collate([graph_of(molecule(k, 3 + k)), graph_of(crystal(k)), graph_of(molecule(k + 1, 1))])
        for k in range(count)
    ]


# Evaluation with everything, but without parts, is in the test of constants.
QUICK_CASES = (
    ("bridging of pairs, O3", False, True),
    ("S2 grid", False, True),
    ("S2 grid", False, False),
)


@pytest.mark.parametrize(
    ("name", "split", "training"),
    [
        pytest.param(*case, marks=[] if case in QUICK_CASES else pytest.mark.slow)
        for case in itertools.product(GENERATIONS, (False, True), (False, True))
    ],
)
def test_potential_and_its_parameter_gradients(compilations, name, split, training):
    """With bridging, freeze gates depend on the same edges and are an argument of compiled code."""
    potential: Potential = random_potential(**GENERATIONS[name])
    graphs = [*batches(2), graph_of(molecule())]
    lengths = graphs[-1].edge_vectors().norm(dim=1)
    assert ((lengths > 0.8) & (lengths < 1.4)).any()
    if split:
        potential.model.max_edges = {"cpu": 60}
    compile_potential(potential.train(training))
    for graph in graphs:
        for quantity, deviation in compare_with_eager(potential, graph).items():
            assert deviation < 1e-11, quantity  # float64, sums in another order


def test_a_fixed_basis_has_no_derivative_in_compiled_code(compilations):
    """The region with the basis is the only compiled one, which saves time."""
    options = GENERATIONS["generation 3"] | {"n_focus": 1}
    potential = small_potential(**options).train()
    compile_potential(potential)
    for module in (potential.model, *potential.model.blocks):
        for method in [name for name, entry in vars(module).items() if isinstance(entry, Region)]:
            if method != "input_features":
                del module.__dict__[method]
    for quantity, deviation in compare_with_eager(potential, batches(1)[0]).items():
        assert deviation < 1e-11, quantity
    assert len(compilations) > 0
    potential(batches(1)[0]).forces.square().mean().backward()
    assert potential.model.basis.frequencies.grad is None
    assert potential.model.radial.hidden[0].weight.grad is not None


def test_potential_compiles_once_for_ten_batches(compilations):
    potential = small_potential().train()
    compile_potential(potential)
    for k, graph in enumerate(batches(10)):
        potential(graph).forces.square().mean().backward()
        if k == 0:
            count = len(compilations)
    # At most six parts of four stages.
    assert len(compilations) == count and 0 < count <= 24


def test_wrong_code_is_detected(compilations):
    potential = small_potential().train()
    compile_potential(potential)
    graph = batches(1)[0]
    right = potential.model.read_out
    potential.model.__dict__["read_out"] = Wrong(lambda x: right(x) + 1e-3 * (x[:, 0] - x[:, 0].detach()))
    found = compare_with_eager(potential, graph)
    assert found["energy"] < 1e-11  # only derivatives are wrong
    assert found["forces"] > 1e-6 and found["parameter gradients"] > 1e-6


def test_keeping_results_can_be_changed(compilations):
    potential, graph = small_potential().eval(), batches(1)[0]
    expected, counts = potential(graph).forces, []
    compile_potential(potential)
    for max_kept in (graph.num_atoms, graph.num_atoms - 1, graph.num_atoms):
        keep_results(potential, KeepPolicy(max_kept, max_kept))
        assert_close(potential(graph).forces, expected)
        counts.append(len(compilations))
    # At most six parts of two stages and a stage of constants, for each of two policies.
    assert 0 < counts[0] < counts[1] == counts[2] <= 36


@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_parts_keep_nothing_on_a_gpu(compilations, monkeypatch, on_a_gpu):
    """On a GPU, memory decides when edges are processed in parts, whatever the number of nodes of a part."""
    monkeypatch.setattr(regions, "_parts_bound_memory", lambda device: on_a_gpu)
    potential, graph = small_potential().eval(), batches(1)[0]
    compile_potential(potential)
    made = {}
    for max_edges in (10**6, 60):
        potential.model.max_edges = {"cpu": max_edges}
        potential(graph)
        for region in regions_of(potential):
            kinds = [keep for *_, keep, _ in region.code.programs]
            made.setdefault(region.code.name.split(" of degree")[0], []).append(kinds)
    assert made["messages"] == [[True], [True, False] if on_a_gpu else [True]]
    assert made["node update"] == [[True], [True]]
    assert made["update in parts"] == [[], [not on_a_gpu]]


def test_code_for_one_size_only_is_detected(compilations):
    potential, graph = small_potential().eval(), batches(1)[0]
    compile_potential(potential)
    right, size = potential.model.read_out, graph.num_atoms

    def fixed(x):
        return right(x) if len(x) == size else 0.9 * right(x)

    potential.model.__dict__["read_out"] = Wrong(fixed)
    assert compare_with_eager(potential, graph)["forces"] > 1e-3


def test_traces_are_kept_on_disk(compilations, monkeypatch):
    """A second potential of the same kind is not traced; one of another kind is."""
    graph = batches(1)[0]
    for seed in range(2):  # seed of the weights
        potential = small_potential(seed)
        compile_potential(potential)
        for training in (True, False):
            for name, deviation in compare_with_eager(potential.train(training), graph).items():
                assert deviation < 1e-11, name
        monkeypatch.setattr(tracing, "make_fx", not_to_be_called)
    others = [
        lambda: small_potential(n_radial=5),  # unlike in any other test
        lambda: small_potential().to(torch.bfloat16),
    ]
    for other in others:
        compile_potential(potential := other())
        with pytest.raises(AssertionError, match="is traced"):
            potential(graph)
    monkeypatch.setattr(regions, "_digest_of_sources", lambda: "another version")
    compile_potential(potential := small_potential())
    with pytest.raises(AssertionError, match="is traced"):
        potential(graph)


def not_to_be_called(*_):
    raise AssertionError("is traced")


@pytest.mark.parametrize("damage", [b"", b"no code"])
def test_damaged_files_of_code_are_replaced(compilations, damage):
    potential, graph = small_potential().eval(), batches(1)[0]
    counts = []
    for _ in range(2):
        compile_potential(potential)
        stages = [s for r in regions_of(potential) for s in r.code.stages()]
        for stage in stages:
            stage.file.write_bytes(damage)
        assert compare_with_eager(potential, graph)["forces"] < 1e-11
        counts.append(len(compilations))
    assert counts[1] == 2 * counts[0] > 0  # all of them were compiled again
    for stage in stages:
        stage.file.unlink()


class Wrong(Region):
    """Stub for a region with the right value and wrong derivatives."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def test_compiling_twice_and_back(compilations):
    potential = small_potential()
    graph = batches(1)[0]
    expected = potential(graph)
    compile_potential(potential)
    compile_potential(potential)
    assert_close(potential(graph).forces, expected.forces)
    restore_eager(potential)
    assert torch.equal(potential(graph).forces, expected.forces)


def test_nothing_of_a_step_stays_alive(compilations):
    """Objects passed between stages must not keep a step's graph, and with it its memory, alive."""
    from dpa4.ops.second_order import _Call

    potential = small_potential().train()
    compile_potential(potential)
    for graph in batches(2):
        potential(graph).forces.square().mean().backward()
        assert not [o for o in gc.get_objects() if type(o) is _Call]


@pytest.mark.skipif(available.cpp_missing() is not None, reason=f"{available.cpp_missing()}")
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_for_a_cpu_are_part_of_compiled_code(compilations, training):
    """Float64, with enough channels for the kernels to run."""
    potential = random_potential(**GENERATIONS["everything, C++"]).train(training)
    compile_potential(potential)
    for name, deviation in compare_with_eager(potential, batches(1)[0]).items():
        assert deviation < 1e-11, name
    called = {
        str(n.target).split(".")[1]
        for graph in compilations
        for n in graph.graph.nodes
        if "dpa4." in str(n.target)
    }
    assert called >= {
        "so2_value",
        "so2_vjp",
        "edge_matmul",
        "scatter_matmul",
        "edge_outer",
        "bilinear",
    }
    assert not training or called >= {"so2_tangent", "so2_joint"}
