"""Regions: a trace cut into stages is the same function with the same derivatives, at every size.

Compilation takes minutes on a CPU, so stages run as the graphs that the compiler would receive.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import gather, segment_sum
from dpa4.tracing import region as regions
from dpa4.tracing.region import Region, RegionCode
from helpers import assert_close, assert_only_views_of_weights

SOURCE = Incidence("edge", "edge", "node+1")
CENTER = Incidence("edge", None, "center+1")
WIDTH = 5


class Layer(nn.Module):
    """Layer with messages from parameters on nodes and on edges, and a result of its own for the edges."""

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
    """Results, their derivative by the lengths, and gradients of a loss on both by inputs and parameters."""
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


def test_modules_may_share_tensors(compilations):
    class Shifted(Layer):
        def apply_to(self, x, length, source, center):
            return super().apply_to(x + self.inner.shift, length + self.outer.shift, source, center)

    layer = Shifted()
    shared = torch.tensor(0.3, dtype=torch.float64)
    for part in (layer.inner, layer.outer):
        part.register_buffer("shift", shared)
    code = as_region(layer)
    given = arguments(6, 20)
    expected = derivatives(layer.apply_to, layer, *given)
    for a, b in zip(derivatives(layer.region, layer, *given), expected, strict=True):
        assert_close(a, b)
    assert all("_tensor_constant" not in stage.recipe.source for stage in code.stages())


@pytest.mark.parametrize(("energy", "forces"), [(1.0, 0.0), (0.0, 1.0)])
def test_losses_of_one_kind(compilations, energy, forces):
    layer = Layer()
    as_region(layer)
    given = arguments(6, 20)
    found = derivatives(layer.region, layer, *given, energy, forces)
    for a, b in zip(found, derivatives(layer.apply_to, layer, *given, energy, forces), strict=True):
        assert_close(a, b)


def test_loss_without_the_first_derivative(compilations):
    """Stage 3 runs although stages 1 and 2 never ran."""
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
    """Layer whose weights are multiplied with each other and with an argument, and transposed."""

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
    # the merged weight, and the sum; transposed weights are views
    assert len(program.constants.recipe.results) == 2
    assert_only_views_of_weights(program, 1 + len(layer.region.tensors))


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
    """A new tensor often reuses freed memory: same address, same version."""
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
    """Otherwise each consumer, such as each part of the edges, would copy them."""

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
        assert_close(a, b, 0.03)  # eight bits, sums in another order


def test_sizes_are_not_mistaken_for_fixed_ones(compilations):
    # The compiler compares the hints of nodes, centres and edges with lengths of axes.
    layer = Layer()
    code = as_region(layer)
    derivatives(layer.region, layer, *arguments(5, 20))
    (program,) = code.programs.values()
    recipe = program.stages[0].recipe
    fixed = {n for spec in recipe.arguments for n in spec.shape if isinstance(n, int)}
    assert len(set(recipe.sizes.values())) == 3 and min(recipe.sizes.values()) > 10 * max(fixed)


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
