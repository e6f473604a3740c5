"""Compiled regions: a trace cut into stages is the same function with the same derivatives, at every size.

Compilers take minutes on a CPU, so here the stages are run as the graphs that a compiler would get.
"""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional

from dpa4.graph import collate
from dpa4.kernels import matmul
from dpa4.kernels import region as regions
from dpa4.kernels import trace as tracing
from dpa4.kernels.incidence import Incidence
from dpa4.kernels.region import Region, RegionCode
from dpa4.kernels.segments import gather, segment_sum
from dpa4.kernels.stage import graph_of as recorded
from dpa4.model.config import Bridging
from dpa4.potential import Potential, precompile
from dpa4.potential.compiled import (
    compare_with_eager,
    compile_potential,
    keep_results,
    restore_eager,
)
from dpa4.potential.compiled import regions as regions_of
from helpers import assert_close, crystal, graph_of, molecule, random_potential

SOURCE = Incidence("edge", "edge", "node+1")
CENTER = Incidence("edge", None, "center+1")
WIDTH = 5


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """No test before has left traces there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


class Layer(nn.Module):
    """Messages with a parameter on nodes and one on edges, and a result of its own for the edges."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(WIDTH, WIDTH).double()
        self.outer = nn.Linear(WIDTH, WIDTH, bias=False).double()
        self.unused = nn.Parameter(torch.ones(3))

    def apply_to(self, x, length, source, center):
        states = self.inner(x)
        message = functional.silu(gather(states, source) * length[:, None])
        return segment_sum(self.outer(message), center), message.square().sum(-1)


def as_region(layer: Layer, code: RegionCode | None = None, **options) -> RegionCode:
    code = code or RegionCode("layer", ("node", "edge", SOURCE, CENTER))
    layer.region = Region(layer, "apply_to", ["inner", "outer"], code, **options)
    return code


def arguments(nodes: int, edges: int, centers: int | None = None):
    generator = torch.Generator().manual_seed(nodes)
    centers = nodes if centers is None else centers
    x = torch.randn(nodes, WIDTH, generator=generator, dtype=torch.float64)
    length = torch.rand(edges, generator=generator, dtype=torch.float64)
    source = torch.randint(nodes, (edges,), generator=generator)
    center = torch.randint(centers, (edges,), generator=generator).sort().values
    return x, length, Incidence.of(source, nodes), Incidence.of_sorted(center, centers)


def derivatives(function, layer: Layer, x, length, source, center, energy=1.0, forces=1.0):
    """Results, their derivative by the lengths, and gradients of a loss of both by all that has any."""
    x, length = x.clone().requires_grad_(), length.clone().requires_grad_()
    total, own = function(x.sin(), length.square(), source, center)
    value = total.sin().sum() + own.sum()
    (force,) = torch.autograd.grad(value, length, create_graph=layer.training)
    if not layer.training:
        return [total, own, force]
    loss = energy * value.square() + forces * force.square().sum()
    gradients = torch.autograd.grad(loss, [x, *layer.inner.parameters(), *layer.outer.parameters()])
    return [total, own, force, *gradients]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_kept": 0}])
def test_ten_sizes_one_compilation(compilations, training, options):
    layer = Layer().train(training)
    code = as_region(layer, **options)
    for n in range(2, 12):
        given = arguments(n, 4 * n + 3)
        found = derivatives(layer.region, layer, *given)
        for a, b in zip(found, derivatives(layer.apply_to, layer, *given), strict=True):
            assert_close(a, b)
    assert len(code.programs) == 1
    assert len(compilations) == (4 if training else 2)


def test_centres_may_be_some_of_the_nodes(compilations):
    layer = Layer()
    as_region(layer)
    given = arguments(9, 20, centers=4)
    expected = derivatives(layer.apply_to, layer, *given)
    for a, b in zip(derivatives(layer.region, layer, *given), expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(("energy", "forces"), [(1.0, 0.0), (0.0, 1.0)])
def test_losses_of_one_kind(compilations, energy, forces):
    layer = Layer()
    as_region(layer)
    given = arguments(6, 20)
    found = derivatives(layer.region, layer, *given, energy, forces)
    for a, b in zip(found, derivatives(layer.apply_to, layer, *given, energy, forces), strict=True):
        assert_close(a, b)


def test_loss_without_the_first_derivative(compilations):
    """Stages 1 and 2 never ran when stage 3 is asked for."""
    layer = Layer()
    as_region(layer)
    x, length, source, center = arguments(6, 20)
    found, expected = [
        torch.autograd.grad(f(x, length, source, center)[0].sin().sum(), list(layer.inner.parameters()))
        for f in (layer.region, layer.apply_to)
    ]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_backward_twice_and_interleaved_calls(compilations):
    layer = Layer()
    as_region(layer)
    losses = []
    for n in (5, 7):
        x, length, source, center = arguments(n, 20)
        length.requires_grad_()
        total, own = layer.region(x, length, source, center)
        (force,) = torch.autograd.grad(total.sum() + own.sum(), length, create_graph=True)
        losses.append(force.square().sum())
    parameters = list(layer.inner.parameters())
    once = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    again = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in reversed(losses)]
    both = torch.autograd.grad(losses[0] + losses[1], parameters)
    for k, total in enumerate(both):
        assert torch.equal(once[0][k], again[1][k]) and torch.equal(once[1][k], again[0][k])
        assert_close(total, once[0][k] + once[1][k])


def test_code_is_shared_and_gradients_are_not(compilations):
    layers = [Layer(0), Layer(1)]
    code = None
    for layer in layers:
        code = as_region(layer, code)
    given = arguments(6, 20)
    for layer in layers:
        for a, b in zip(
            derivatives(layer.region, layer, *given), derivatives(layer.apply_to, layer, *given), strict=True
        ):
            assert_close(a, b)
    assert len(compilations) == 4


def test_small_sizes_run_eagerly(compilations):
    layer = Layer()
    as_region(layer)
    for nodes, edges in [(1, 3), (3, 1), (3, 0)]:
        derivatives(layer.region, layer, *arguments(nodes, edges))
    assert not compilations


def test_kept_products_are_not_computed_again(compilations):
    counts = []
    for max_kept in (100, 0):
        layer = Layer().eval()
        as_region(layer, max_kept=max_kept)
        derivatives(layer.region, layer, *arguments(6, 20))
        nodes = [n for graph in compilations for n in graph.graph.nodes if n.op == "call_function"]
        targets = [str(n.target) for n in nodes]
        counts.append(sum("mm" in t or "segment_sum" in t for t in targets))
        compilations.clear()
    assert counts[0] < counts[1]


class Merged(Layer):
    """A layer whose weights are multiplied with each other, with an argument that is one, and transposed."""

    def apply_to(self, x, length, source, center, last):
        merged = self.inner.weight @ self.outer.weight @ last.mT
        message = functional.silu(gather(x @ merged.mT, source) * length[:, None] * last.exp().sum())
        return segment_sum(message @ self.inner.weight.mT, center), message.square().sum(-1)


def as_merged_region(layer: Merged, code: RegionCode | None = None) -> RegionCode:
    code = code or RegionCode("merged", ("node", "edge", SOURCE, CENTER, "static"))
    layer.region = Region(layer, "apply_to", ["inner", "outer"], code)
    return code


def energy_and_forces(function, last, x, length, source, center):
    length = length.clone().requires_grad_()
    total, own = function(x, length, source, center, last)
    return [total, own, *torch.autograd.grad(total.sin().sum() + own.sum(), length)]


def assert_as_eager(layer: Merged, last, given) -> None:
    found, expected = (energy_and_forces(f, last, *given) for f in (layer.region, layer.apply_to))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_what_depends_on_weights_alone_is_computed_once(compile_as):
    runs = []

    def counted(graph):
        def run(*flat):
            runs.append(graph)
            return graph(*flat)

        return run

    graphs = compile_as(counted)
    layer, last = Merged().eval(), torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    code = as_merged_region(layer)
    for n in (5, 7):
        assert_as_eager(layer, last, arguments(n, 20))
    (program,) = code.programs.values()
    assert code.stages() == [program.constants, *program.stages]
    assert [runs.count(graph) for graph in graphs] == [1, 2, 2]
    # the merged weight, and the sum; what is transposed is a view of a weight
    assert len(program.constants.recipe.results) == 2
    assert_only_views_of_weights(program, 1 + len(layer.region.tensors))


def assert_only_views_of_weights(program, fixed_inputs: int) -> None:
    """Stages compute nothing of constants and weights alone, whose sizes are all fixed."""
    for stage in program.stages:
        nodes = list(recorded(stage.recipe).nodes)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        fixed = {
            n
            for n, spec in zip(placeholders, stage.recipe.arguments, strict=True)
            if all(isinstance(length, int) for length in spec.shape)
        }
        assert len(fixed) <= fixed_inputs + len(program.constants.recipe.results)
        for n in nodes:
            if n.op == "call_function" and n.all_input_nodes and fixed.issuperset(n.all_input_nodes):
                assert n.target.is_view, n.format_node()
                fixed.add(n)


@pytest.mark.parametrize("kind", ["step", "load", "copy", "data", "argument"])
def test_changed_weights_are_seen(compilations, kind):
    layer = Merged().eval()
    owner = nn.Linear(WIDTH, WIDTH).double()
    as_merged_region(layer)
    given = arguments(6, 20)
    assert_as_eager(layer, owner.weight.mT, given)
    before = energy_and_forces(layer.region, owner.weight.mT, *given)[0]
    other = Merged(1)
    if kind == "step":
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD(layer.parameters(), 0.1).step()
    elif kind == "load":
        layer.load_state_dict(other.state_dict())
    elif kind == "copy":
        torch._foreach_copy_([p.detach() for p in layer.parameters()], [*other.parameters()])
    elif kind == "data":
        layer.inner.weight.data = other.inner.weight.data
    else:
        with torch.no_grad():
            owner.weight.mul_(1.1)
    assert_as_eager(layer, owner.weight.mT, given)
    after = energy_and_forces(layer.region, owner.weight.mT, *given)[0]
    assert not torch.allclose(before, after)


def test_arguments_that_come_and_go_are_not_mistaken_for_each_other(compilations):
    """Memory that is given back is often taken by the next tensor: same address, same version."""
    layer, given = Merged().eval(), arguments(6, 20)
    as_merged_region(layer)
    for k in range(5):
        assert_as_eager(layer, torch.full((WIDTH, WIDTH), 0.1 * k, dtype=torch.float64), given)


def test_code_is_shared_and_constants_are_not(compilations):
    layers, code, given = [Merged(0).eval(), Merged(1).eval()], None, arguments(6, 20)
    last = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    for layer in layers:
        code = as_merged_region(layer, code)
    for _ in range(2):
        for layer in layers:
            assert_as_eager(layer, last, given)
    assert len(compilations) == 3


def test_training_computes_everything_of_its_weights(compilations):
    potential = random_potential(n_blocks=1).train()
    compile_potential(potential)
    potential(batches(1)[0])
    programs = [p for region in regions_of(potential) for p in region.code.programs.values()]
    assert programs and all(p.constants.empty for p in programs)
    assert not any(region.constants for region in regions_of(potential))


@pytest.mark.parametrize("options", [{}, {"n_focus": 2, "radial_so2_rank": 2, "ffn_on": "s2"}])
def test_evaluation_of_a_potential_computes_nothing_of_weights_alone(compilations, options):
    potential = random_potential(**options).eval()
    compile_potential(potential)
    assert compare_with_eager(potential, batches(1)[0])["forces"] < 1e-11
    with torch.no_grad():
        for p in potential.parameters():
            p.mul_(1.1)
    assert compare_with_eager(potential, batches(1)[0])["forces"] < 1e-11
    for region in regions_of(potential):
        for program in region.code.programs.values():
            assert_only_views_of_weights(program, len(region.tensors) + 1)


def test_weights_are_split_once(compilations, own_files, monkeypatch):
    """As on a GPU, where products in float32 are those of pieces of weights."""
    monkeypatch.setattr(matmul, "_is_split", lambda x: True)
    potential = random_potential(n_blocks=1).float().eval()
    compile_potential(potential)
    precompile._outline(potential, precompile.Mode(training=False), precompile._Workshop(0))

    def splits(stage) -> int:
        return sum(n.target is torch.ops.dpa4.split_weights.default for n in recorded(stage.recipe).nodes)

    programs = [p for region in regions_of(potential) for p in region.code.programs.values()]
    assert sum(splits(stage) for p in programs for stage in p.stages) == 0
    assert sum(splits(p.constants) for p in programs) >= 4
    assert compilations == []


@pytest.mark.parametrize(("max_kept", "calls"), [(100, 1), (0, 2)])
def test_kernels_with_several_results(compilations, max_kept, calls):
    """All that is needed of the results of one call is kept, or computed again."""
    potential = random_potential(n_blocks=1).eval()
    compile_potential(potential, max_kept=max_kept)
    assert compare_with_eager(potential, batches(1)[0])["forces"] < 1e-11
    nodes = [n for graph in compilations for n in graph.graph.nodes if "so2_value" in str(n.target)]
    assert len(nodes) == calls


def test_sizes_beyond_32_bits_get_their_own_code(compilations, monkeypatch):
    monkeypatch.setattr(regions, "INDEX_LIMIT", 30 * WIDTH)
    layer = Layer().eval()
    code = as_region(layer)
    derivatives(layer.region, layer, *arguments(6, 20))
    assert len(code.programs) == 1
    given = arguments(6, 40)
    for a, b in zip(
        derivatives(layer.region, layer, *given), derivatives(layer.apply_to, layer, *given), strict=True
    ):
        assert_close(a, b)
    assert len(code.programs) == 2
    derivatives(layer.region, layer, *arguments(6, 50))
    assert len(code.programs) == 2


def test_results_are_contiguous(compilations):
    """Else everyone who takes them, such as each part of the edges, makes a copy."""

    class Turned(nn.Module):
        def turn(self, x):
            return (x[:, None].square() * torch.ones(3, 1)).transpose(1, 2)

    module, x = Turned(), torch.randn(5, WIDTH, requires_grad=True)
    region = Region(module, "turn", [], RegionCode("turned", ("node",)))
    assert not module.turn(x).is_contiguous() and region(x).is_contiguous()
    assert torch.equal(region(x), module.turn(x))


def test_mixed_precision(compilations):
    layer = Layer().float()
    as_region(layer)
    x, length, source, center = arguments(6, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivatives(layer.region, layer, x.float(), length.float(), source, center)
        expected = derivatives(layer.apply_to, layer, x.float(), length.float(), source, center)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 0.03)  # eight bits, in another order


GENERATIONS = {
    "S2 grid": {"ffn_on": "s2"},
    "SO(3) grid": {"message_node_so3": True, "ffn_on": "so3", "ffn_grid": 1, "so3_readout": "mlp"},
    "foci": {"n_focus": 2, "radial_so2_rank": 2},
}


def batches(count: int):
    return [
        collate([graph_of(molecule(k, 3 + k)), graph_of(crystal(k)), graph_of(molecule(k + 1, 1))])
        for k in range(count)
    ]


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize("split", [False, True])
def test_potential_and_its_parameter_gradients(compilations, options, split):
    potential: Potential = random_potential(**options)
    if split:
        potential.model.max_edges = {"cpu": 60}
    for training in (True, False):
        compile_potential(potential.train(training))
        for graph in batches(2):
            for name, deviation in compare_with_eager(potential, graph).items():
                assert deviation < 1e-11, name  # float64, another order of sums


def test_freeze_gates_are_an_argument_of_compiled_code(compilations):
    """Computed before it, they depend on the same edges: both ways to the forces count."""
    potential = random_potential(n_blocks=1, bridging=Bridging(r_inner=0.8, r_outer=1.4)).train()
    graph = graph_of(molecule())
    lengths = graph.edge_vectors().norm(dim=1)
    assert ((lengths > 0.8) & (lengths < 1.4)).any()
    compile_potential(potential)
    for name, deviation in compare_with_eager(potential, graph).items():
        assert deviation < 1e-11, name


def test_potential_compiles_once_for_ten_batches(compilations):
    potential = random_potential(n_blocks=1).train()
    compile_potential(potential)
    for k, graph in enumerate(batches(10)):
        potential(graph).forces.square().mean().backward()
        if k == 0:
            count = len(compilations)
    assert len(compilations) == count == 23  # six regions of four stages, but the geometry has no parameters


def test_wrong_code_is_detected(compilations):
    potential = random_potential().train()
    compile_potential(potential)
    graph = batches(1)[0]
    right = potential.model.read_out
    potential.model.__dict__["read_out"] = Wrong(lambda x: right(x) + 1e-3 * (x[:, 0] - x[:, 0].detach()))
    found = compare_with_eager(potential, graph)
    assert found["energy"] < 1e-11  # only derivatives are wrong
    assert found["forces"] > 1e-6 and found["parameter gradients"] > 1e-6


def test_keeping_results_can_be_changed(compilations):
    potential, graph = random_potential(n_blocks=1).eval(), batches(1)[0]
    expected, counts = potential(graph).forces, []
    compile_potential(potential)
    for max_kept in (graph.num_atoms, graph.num_atoms - 1, graph.num_atoms):
        keep_results(potential, max_kept)
        assert_close(potential(graph).forces, expected)
        counts.append(len(compilations))
    # Six regions of two stages, and one of constants, which the geometry has not; of two kinds.
    assert counts == [17, 34, 34]


@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_parts_keep_nothing_on_a_gpu(compilations, monkeypatch, on_a_gpu):
    """Where the edges are worked on in parts, memory decides there, whatever the number of nodes of a part."""
    monkeypatch.setattr(regions, "_parts_bound_memory", lambda device: on_a_gpu)
    potential, graph = random_potential(n_blocks=1).eval(), batches(1)[0]
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
    potential, graph = random_potential().eval(), batches(1)[0]
    compile_potential(potential)
    right, size = potential.model.read_out, graph.num_atoms

    def fixed(x):
        return right(x) if len(x) == size else 0.9 * right(x)

    potential.model.__dict__["read_out"] = Wrong(fixed)
    assert compare_with_eager(potential, graph)["forces"] > 1e-3


def test_sizes_are_not_mistaken_for_fixed_ones(compilations):
    # The hints of nodes, centres and edges are what the compiler compares with lengths of axes.
    layer = Layer()
    code = as_region(layer)
    derivatives(layer.region, layer, *arguments(5, 20))
    (program,) = code.programs.values()
    recipe = program.stages[0].recipe
    fixed = {n for spec in recipe.arguments for n in spec.shape if isinstance(n, int)}
    assert len(set(recipe.sizes.values())) == 3 and min(recipe.sizes.values()) > 10 * max(fixed)


def test_traces_are_kept_on_disk(compilations, own_files, monkeypatch):
    """A second potential of the same kind is not traced; one of another kind is."""
    graph = batches(1)[0]
    for seed in range(2):  # of the weights
        potential = random_potential(seed, n_blocks=1)
        compile_potential(potential)
        for training in (True, False):
            for name, deviation in compare_with_eager(potential.train(training), graph).items():
                assert deviation < 1e-11, name
        monkeypatch.setattr(tracing, "make_fx", not_to_be_called)
    others = [
        lambda: random_potential(n_blocks=1, lmax=1),
        lambda: random_potential(n_blocks=1).float(),
    ]
    for other in others:
        compile_potential(potential := other())
        with pytest.raises(AssertionError, match="is traced"):
            potential(graph)
    monkeypatch.setattr(regions, "_digest_of_sources", lambda: "another version")
    compile_potential(potential := random_potential(n_blocks=1))
    with pytest.raises(AssertionError, match="is traced"):
        potential(graph)


def not_to_be_called(*_):
    raise AssertionError("is traced")


@pytest.mark.parametrize("damage", [b"", b"no code"])
def test_damaged_files_of_code_are_replaced(compilations, own_files, damage):
    potential, graph = random_potential(n_blocks=1).eval(), batches(1)[0]
    for _ in range(2):
        compile_potential(potential)
        for stage in [s for r in regions_of(potential) for s in r.code.stages()]:
            stage.file.write_bytes(damage)
        assert compare_with_eager(potential, graph)["forces"] < 1e-11
    assert len(compilations) == 34


class Wrong(Region):
    """A region with the right value and wrong derivatives."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def test_compiling_twice_and_back(compilations):
    potential = random_potential()
    graph = batches(1)[0]
    expected = potential(graph)
    compile_potential(potential)
    compile_potential(potential)
    assert_close(potential(graph).forces, expected.forces)
    restore_eager(potential)
    assert torch.equal(potential(graph).forces, expected.forces)


@pytest.mark.slow
def test_the_real_compiler():
    layer = Layer().float()
    as_region(layer)
    for n in (4, 9, 17):
        x, length, source, center = arguments(n, 4 * n)
        given = x.float(), length.float(), source, center
        for a, b in zip(
            derivatives(layer.region, layer, *given), derivatives(layer.apply_to, layer, *given), strict=True
        ):
            assert_close(a, b, 1e-5)  # float32


@pytest.mark.slow
def test_the_real_compiler_with_constants():
    layer = Merged().eval()
    as_merged_region(layer)
    last = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    for n in (4, 9, 17):
        assert_as_eager(layer, last, arguments(n, 4 * n))
        with torch.no_grad():
            layer.inner.weight.mul_(1.1)


def test_nothing_of_a_step_stays_alive(compilations):
    """What stages hand to each other must not keep a step's graph, and with it its memory, alive."""
    from dpa4.kernels.twice import _Call

    potential = random_potential(n_blocks=1).train()
    compile_potential(potential)
    for graph in batches(2):
        potential(graph).forces.square().mean().backward()
        assert not [o for o in gc.get_objects() if type(o) is _Call]
