"""Layers of the model, one by one in float64: first and second derivatives, equivariance, empty input.

Rotations are full Wigner matrices of two turns in a row, so that no axis is special.
"""

from functools import cache

import pytest
import torch
from test_harmonics import full_wigner
from torch.autograd import gradcheck, gradgradcheck

from dpa4.model import ModelConfig
from dpa4.model.attention import envelope_softmax
from dpa4.model.block import GatedActivation, feed_forward
from dpa4.model.config import Bridging
from dpa4.model.convolution import SO2Convolution
from dpa4.model.edges import EdgeGeometry, Neighborhood, clamp_length, openness
from dpa4.model.grid import GridActivation, MessageNodeProduct
from dpa4.model.harmonics import edge_frame
from dpa4.model.layers import DegreeLinear, EquivariantRMSNorm, degree_of
from dpa4.model.radial import RadialFeatures, envelope
from dpa4.model.so2 import (
    DegreeProduct,
    ElementwiseProduct,
    FusedSO2Stack,
    Gate,
    SO2Linear,
    SO2Stack,
    split_streams,
)
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import gather, segment_sum
from helpers import assert_close, randomize

BRIDGING = Bridging(r_inner=0.5, r_outer=0.8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def prepared(module: torch.nn.Module) -> torch.nn.Module:
    """Convert a module to float64 and randomise its parameters, so that none is zero or one."""
    module = module.double()
    randomize(module, seed=1, scale=0.3)
    return module


def config_of(**options) -> ModelConfig:
    defaults = {"elements": ("H",), "channels": 4, "lmax": 2, "n_blocks": 1, "cutoff": 3.0, "edge_norm": True}
    return ModelConfig(**(defaults | options))


def leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def check_derivatives(function, *inputs: torch.Tensor, module: torch.nn.Module | None = None) -> None:
    """Compare first and second derivatives by inputs and parameters with finite differences."""
    parameters = tuple(module.parameters()) if module else ()
    inputs = leaves(*inputs)

    def closed(*arguments):  # the parameters are varied in place
        return function(*arguments[: len(inputs)])

    assert gradcheck(closed, inputs + parameters, fast_mode=True)
    assert gradgradcheck(closed, inputs + parameters, fast_mode=True)


def rotation(lmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one rotation as matrices of packed coefficients (D, D) and of positions (3, 3)."""
    directions = torch.nn.functional.normalize(random(2, 3, seed=5), dim=1)
    frames = edge_frame(directions)
    wigner = [first @ second for first, second in full_wigner(frames, max(lmax, 1))]
    signs = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)  # Z_1 of (x, y, z) is (y, z, -x)
    positions = (signs[:, None] * wigner[1][[2, 0, 1]][:, [2, 0, 1]]) * signs
    return torch.block_diag(*wigner[: lmax + 1]), positions


def assert_equivariant(layer, *inputs: torch.Tensor, lmax: int) -> None:
    """Check that the layer commutes with a rotation of the coefficients, and that it changes them."""
    turn, _ = rotation(lmax)
    with torch.no_grad():
        out = layer(*inputs)
        assert out.abs().max() > 1e-2
        if lmax:
            assert (turn @ out - out).abs().max() > 1e-3
        assert_close(layer(*(turn @ x for x in inputs)), turn @ out)


# Segments


# Edges sorted by destination; node 2 receives nothing.
SOURCE = Incidence.of(torch.tensor([1, 2, 0, 0, 2]), 3)
DESTINATION = Incidence.of_sorted(torch.tensor([0, 0, 0, 1, 1]), 3)


def softmax_inputs(num_edges: int = 5, focus: int = 2, heads: int = 2) -> list[torch.Tensor]:
    """Logits, envelope, gate and null mass."""
    uniform = random(2, num_edges, seed=1).sigmoid()
    return [random(num_edges, focus, heads), uniform[0], uniform[1], random(focus, heads, seed=2).exp()]


def softmax(*inputs: torch.Tensor) -> torch.Tensor:
    return envelope_softmax(*inputs, DESTINATION)


def test_softmax_is_its_plain_definition():
    logits, weight, gate, null = softmax_inputs()
    mass = (weight.square() * gate)[:, None, None] * logits.exp()
    expected = mass / (null + segment_sum(mass, DESTINATION))[DESTINATION.index]
    alpha = softmax(logits, weight, gate, null)
    assert_close(alpha, expected)
    total = segment_sum(alpha, DESTINATION)
    assert (total[:2] > 0).all() and (total < 1).all() and (total[2] == 0).all()


def test_softmax_differentiates_twice():
    check_derivatives(softmax, *softmax_inputs())


def test_closed_edges_have_weight_zero_and_finite_derivatives():
    logits, weight, gate, null = softmax_inputs()
    weight[0], gate[1], weight[4], gate[4] = 0, 0, 0, 0
    inputs = leaves(logits, weight, gate, null)
    alpha = softmax(*inputs)
    assert (alpha[[0, 1, 4]] == 0).all() and (alpha[[2, 3]] > 0).all()
    first = torch.autograd.grad((alpha * random(*alpha.shape, seed=3)).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    assert all(g.isfinite().all() for g in (*first, *second))
    assert (first[0][[0, 1, 4]] == 0).all() and first[2][1] != 0
    opened = gate.clone()
    opened[1] = 1e-7  # the derivative by a closed gate is the slope at zero
    slope = ((softmax(logits, weight, opened, null) - alpha) * random(*alpha.shape, seed=3)).sum() / 1e-7
    assert_close(first[2][1], slope, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signs", [[1, 1, 1, 1, 1], [-1, -1, -1, -1, -1], [1, -1, 1, -1, -1]])
def test_large_logits_do_not_overflow(signs, dtype):
    _, weight, gate, null = softmax_inputs()
    logits = (800.0 * torch.tensor(signs, dtype=dtype))[:, None, None].expand(-1, 2, 2)
    inputs = leaves(logits, *(x.to(dtype) for x in (weight, gate, null)))
    alpha = softmax(*inputs)
    first = torch.autograd.grad(alpha.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    assert all(x.isfinite().all() for x in (alpha, *first, *second))
    share = segment_sum(alpha, DESTINATION)
    wins = segment_sum(torch.tensor(signs, dtype=dtype).clamp(min=0), DESTINATION) > 0
    assert_close(share, wins[:, None, None].expand_as(share).to(dtype), 1e-6)  # all attention or none


# Radial functions and bridging


@pytest.mark.parametrize("exponent", [1, 2, 5, 7])
def test_envelope_is_smooth_at_the_cutoff(exponent):
    r = torch.tensor([1e-9, 0.3, 1.7, 2.9, 3.0, 3.4], dtype=torch.float64).requires_grad_()
    value = envelope(r, 3.0, exponent)
    assert value[0].item() == pytest.approx(1.0, abs=1e-8) and (value[1:-2].diff() < 0).all()
    for _ in range(4):  # the value and three derivatives
        assert (value[-2:] == 0).all()
        (value,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    check_derivatives(lambda x: envelope(x, 3.0, exponent), r[1:4])


def test_clamp_length_freezes_below_and_leaves_above():
    outside = torch.tensor([0.8, 0.9, 2.0], dtype=torch.float64)
    assert torch.equal(clamp_length(outside, BRIDGING), outside)
    assert torch.equal(clamp_length(outside * 0.5, BRIDGING)[:2], torch.full((2,), 0.5).double())
    lengths = torch.tensor([0.3, 0.55, 0.65, 0.75, 1.1], dtype=torch.float64)
    assert (clamp_length(lengths, BRIDGING).diff() > 0).all()
    check_derivatives(lambda x: clamp_length(x, BRIDGING), lengths)


def test_freeze_gate_and_its_derivatives_where_it_is_zero():
    length = torch.tensor([0.6, 0.7, 0.45, 0.75, 1.2], dtype=torch.float64)  # edge 2 closes node 2
    source = Incidence.of(torch.tensor([0, 1, 2, 2, 0]), 3)

    def freeze_gate(length):
        return gather(openness(length, source, BRIDGING), source)

    gate = freeze_gate(length)
    assert (gate[[2, 3]] == 0).all() and (gate[[0, 1, 4]] > 0).all() and gate[0] == gate[4]
    t = (length[0] - 0.5) / 0.3
    assert_close(gate[0], t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3))  # other gates of node 0 are open
    check_derivatives(freeze_gate, length)
    for closing in (0.5, 0.2):  # exactly at the radius, and below
        (r,) = leaves(length.clone().index_fill(0, torch.tensor([2]), closing))
        first = torch.autograd.grad(freeze_gate(r).sum(), r, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), r)[0]
        assert first.isfinite().all() and second.isfinite().all() and (first[[2, 3]] == 0).all()


# Edge frame: SO(2) layers and the edge-node product


def groups_of(x: torch.Tensor, lmax: int, mmax: int, width: int) -> list[torch.Tensor]:
    sizes = [(lmax - m + 1) * width * min(m + 1, 2) for m in range(mmax + 1)]
    return list(x.split(sizes, dim=-1))


def so2_layer(kind: str, lmax: int, mmax: int, width: int = 2, focus: int = 2) -> torch.nn.Module:
    if kind == "linear":
        return prepared(SO2Linear(lmax, mmax, width, focus, bias=True))
    if kind == "linear without V":
        return prepared(SO2Linear(lmax, mmax, width, focus, bias=True, symmetry="O3"))
    if kind == "gate":
        return prepared(Gate(lmax, width, focus, bias=True))
    if kind == "fused stack":
        return prepared(FusedSO2Stack(lmax, mmax, width, focus, 3))
    return prepared(SO2Stack(lmax, mmax, width, focus, 3, bias=True, layer_scale=True))


def apply_so2(layer: torch.nn.Module, groups: list[torch.Tensor]) -> list[torch.Tensor]:
    if isinstance(layer, Gate):
        return layer(groups)
    if isinstance(layer, SO2Linear):
        return layer(groups, None)
    return list(layer(torch.cat(groups, -1), None).split([x.shape[-1] for x in groups], dim=-1))


def roll(groups: list[torch.Tensor], angle: torch.Tensor) -> list[torch.Tensor]:
    """Roll every edge frame about its edge by an angle a, which mixes orders -m and +m by the angle m a."""
    rolled = [groups[0]]
    for m, x in enumerate(groups[1:], start=1):
        cos, sin = (m * angle).cos()[:, None], (m * angle).sin()[:, None]
        minus, plus = x.chunk(2, dim=-1)
        rolled.append(torch.cat([cos * minus - sin * plus, sin * minus + cos * plus], dim=-1))
    return rolled


SO2_SIZES = [(0, 0), (1, 1), (3, 1), (3, 2), (4, 4)]


@pytest.mark.parametrize("kind", ["linear", "linear without V", "gate", "stack", "fused stack"])
@pytest.mark.parametrize(("lmax", "mmax"), SO2_SIZES)
def test_so2_layers_commute_with_turns_about_the_edge(kind, lmax, mmax):
    layer = so2_layer(kind, lmax, mmax)
    size = sum((lmax - m + 1) * 2 * min(m + 1, 2) for m in range(mmax + 1))
    groups, angle = groups_of(random(2, 4, size), lmax, mmax, 2), random(4, seed=4)
    out = apply_so2(layer, groups)
    for before, after, was in zip(
        apply_so2(layer, roll(groups, angle)), roll(out, angle), groups, strict=True
    ):
        assert (after - was).abs().max() > 1e-3
        assert_close(before, after)


@pytest.mark.parametrize("kind", ["linear", "linear without V", "gate"])
def test_so2_layers_differentiate_twice(kind):
    layer = so2_layer(kind, 2, 2)

    def outputs(x):
        return torch.cat(apply_so2(layer, groups_of(x, 2, 2, 2)), dim=-1)

    check_derivatives(outputs, random(2, 2, 18), module=layer)


def edges_of(
    vectors: torch.Tensor, config: ModelConfig, source=SOURCE, destination=DESTINATION
) -> Neighborhood:
    geometry = EdgeGeometry(config).double()
    return geometry(vectors, geometry.openness(vectors, source, destination), source, destination)


def radial_of(num_edges: int, config: ModelConfig) -> RadialFeatures:
    degrees = config.lmax + 1
    last = random(5, degrees, config.channels, seed=8)
    return RadialFeatures(random(num_edges, 5, seed=6), random(num_edges, config.channels, seed=7), last)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("mmax", [0, 1, 2])
def test_degree_product_is_the_matrix_over_degrees_in_the_edge_frame(mmax, rank):
    config = config_of(lmax=2, mmax=mmax)
    product = prepared(DegreeProduct(2, mmax, 4, rank))
    edges, radial = edges_of(random(5, 3), config), radial_of(5, config)
    x, identity = random(3, 9, 4), torch.eye(4, dtype=torch.float64)
    actual = groups_of(split_streams(product(product.spread(x), radial, identity, edges), 1), 2, mmax, 4)
    features = torch.einsum("ew,wlc->elc", radial.hidden, radial.last) + radial.pair[:, None]
    entries = (features.flatten(1) @ product.weight).unflatten(-1, (-1, rank or 1))
    basis = torch.ones(1, 4).double() if rank is None else product.channel_basis
    for m, kernel in enumerate(entries.split([(3 - m) ** 2 for m in range(mmax + 1)], dim=1)):
        n = 3 - m
        kernel = kernel.unflatten(1, (n, n))  # degree in, degree out
        coefficients = [x[SOURCE.index, l * l : (l + 1) ** 2] for l in range(m, 3)]
        by_degree = edges.edges.rows[m].split([2 * l + 1 for l in range(m, 3)], dim=-1)
        local = [row @ c for row, c in zip(by_degree, coefficients, strict=True)]
        local = torch.stack(local, dim=1)  # (E, degree, sign, C)
        expected = torch.einsum("eklr,rc,eksc->eslc", kernel, basis, local)
        assert_close(actual[m][0], expected.flatten(1))


@pytest.mark.parametrize("rank", [None, 2])
def test_degree_product_differentiates_twice(rank):
    config = config_of(channels=2, lmax=2, mmax=2)
    product, last = prepared(DegreeProduct(2, 2, 2, rank)), random(5, 3, 2, seed=8)

    def outputs(vectors, x, hidden, pair, last):
        radial = RadialFeatures(hidden, pair, last)
        return product(
            product.spread(x), radial, torch.eye(2, dtype=torch.float64), edges_of(vectors, config)
        )

    inputs = random(5, 3), random(3, 9, 2), random(5, 5, seed=6), random(5, 2, seed=7), last
    check_derivatives(outputs, *inputs, module=product)


@pytest.mark.parametrize("mode", ["none", "degree", "degree_channel"])
@pytest.mark.parametrize("mmax", [0, 1, 3])
def test_convolution_is_equivariant(mode, mmax):
    """Nodes and edges are rotated together; the arbitrary roll of the frames about the edges cancels."""
    options = {"radial_so2_mode": mode, "n_focus": 2, "mlp_bias": True, "mixing_layers": 2}
    config = config_of(lmax=3, mmax=mmax, **options)
    convolution, radial = prepared(SO2Convolution(config, 3)), radial_of(5, config)
    turn, positions = rotation(3)
    vectors, x = random(5, 3), random(3, 16, 4)
    with torch.no_grad():
        out = convolution(x, radial, edges_of(vectors, config))
        turned = convolution(turn @ x, radial, edges_of(vectors @ positions.T, config))
    assert (turn @ out - out).abs().max() > 1e-2
    assert_close(turned, turn @ out)


# Nodes: packed coefficients


class Activated(torch.nn.Module):
    """Linear layer of 4 channels followed by a non-linearity."""

    def __init__(self, lmax: int, width: int, activation: GatedActivation | GridActivation):
        super().__init__()
        self.linear, self.activation = DegreeLinear(lmax, 4, width, bias=True), activation

    def forward(self, x):
        return self.activation(x, self.linear)


def node_layer(name: str, lmax: int) -> torch.nn.Module:
    c = 4
    layers = {
        "DegreeLinear": lambda: DegreeLinear(lmax, c, 3, bias=True),
        "EquivariantRMSNorm": lambda: EquivariantRMSNorm(lmax, c),
        "GatedActivation": lambda: Activated(lmax, c, GatedActivation(lmax, c // 2, bias=True)),
        "feed-forward on degrees": lambda: feed_forward(config_of(ffn_on="degrees", mlp_bias=True), lmax),
    }
    return prepared(layers[name]())


NODE_LAYERS = ["DegreeLinear", "EquivariantRMSNorm", "GatedActivation", "feed-forward on degrees"]
GRIDS = [("glu", None), ("mlp", None), (3, None), ("glu", 1), ("mlp", 1), (3, 1), ("glu", 0), ("glu", 2)]


def grid_activation(lmax: int, operation, kmax: int | None) -> Activated:
    """Build an activation on a grid of SO(3), or on the sphere if ``kmax`` is None."""
    kmax = None if kmax is None else min(kmax, lmax)
    frames = 1 if kmax is None else 2 * kmax + 1
    return prepared(Activated(lmax, 4 * frames, GridActivation(lmax, kmax, 2, operation, bias=True)))


def message_product(lmax: int, operation) -> MessageNodeProduct:
    config = config_of(lmax=max(lmax, 1), n_focus=2, message_grid=operation, mlp_bias=True)
    return prepared(MessageNodeProduct(config, lmax))


@pytest.mark.parametrize("name", NODE_LAYERS)
@pytest.mark.parametrize("lmax", range(7))
def test_layers_are_equivariant(name, lmax):
    assert_equivariant(node_layer(name, lmax), 2 * random(3, (lmax + 1) ** 2, 4), lmax=lmax)


SIZES_OF_GRIDS = [
    pytest.param(lmax, operation, kmax, marks=[pytest.mark.slow] if lmax > 4 and kmax in (1, 2) else [])
    for lmax in range(1, 7)
    for operation, kmax in GRIDS
]
"""Grids on SO(3) of large degrees take seconds to build."""


@pytest.mark.parametrize(("lmax", "operation", "kmax"), SIZES_OF_GRIDS)
def test_grid_activations_are_equivariant_to_rounding(lmax, operation, kmax):
    assert_equivariant(grid_activation(lmax, operation, kmax), random(3, (lmax + 1) ** 2, 4), lmax=lmax)


@pytest.mark.parametrize(("operation", "kmax"), GRIDS)
def test_projected_weights_are_projected_fields(operation, kmax):
    layer = grid_activation(2, operation, kmax)
    operation, x = layer.activation.operation, random(3, 9, 4)
    fields = layer.linear(x).unflatten(-1, (2, layer.activation.frames, -1))
    left, right = (p.flatten(-2) for p in operation.project(*fields.unbind(2)))
    scalars = fields[:, 0, :, 0].flatten(1)
    gate, direct = layer.activation.scalar_gate(scalars[:, None]).sigmoid(), scalars.chunk(2, dim=1)
    one, zero = torch.ones_like(direct[0]), torch.zeros_like(direct[0])
    expected = operation(left, right, scalars, one, zero, zero).unflatten(-1, (-1, 2)) * gate[:, None]
    expected[:, 0, 0] += torch.nn.functional.silu(direct[0]) * direct[1]
    assert_close(layer(x), expected.flatten(2))


@pytest.mark.parametrize("options", [{"ffn_on": "s2"}, {"ffn_on": "so3"}, {"ffn_on": "degrees"}])
@pytest.mark.parametrize("operation", ["glu", "mlp", 1, 3])
def test_scalars_of_a_feed_forward_network_need_no_grid(options, operation):
    layer = prepared(feed_forward(config_of(lmax=2, ffn_grid=operation, mlp_bias=True, **options), 2))
    x = random(3, 9, 4)
    assert_close(layer.scalars(x), layer(x)[:, 0])


@pytest.mark.parametrize("operation", ["glu", "mlp", 3])
@pytest.mark.parametrize("lmax", [0, 1, 2, 3, 4])
def test_message_node_product_is_equivariant(lmax, operation):
    size = (lmax + 1) ** 2
    inputs = random(3, size, 8), random(3, size, 8, seed=1)
    assert_equivariant(message_product(lmax, operation), *inputs, lmax=lmax)


def test_norm_counts_every_degree_equally():
    x = random(4, 16, 8)
    x[:, 0] -= x[:, 0].mean(-1, keepdim=True)
    out = EquivariantRMSNorm(3, 8, eps=0.0).double()(x)
    per_degree = [out[:, degree_of(3) == l].square().mean((1, 2)) for l in range(4)]
    assert_close(torch.stack(per_degree).mean(0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("name", NODE_LAYERS[1:3])
def test_layers_differentiate_twice(name):
    layer = node_layer(name, 2)
    check_derivatives(layer, random(2, 9, 4), module=layer)


@pytest.mark.parametrize(("operation", "kmax"), GRIDS[:6])
def test_grid_activations_differentiate_twice(operation, kmax):
    layer = grid_activation(2, operation, kmax)
    check_derivatives(layer, random(2, 9, 4), module=layer)


def test_message_node_product_differentiates_twice():
    layer = message_product(1, "glu")
    check_derivatives(layer, random(2, 4, 8), random(2, 4, 8, seed=1), module=layer)


# Empty input


@cache
def empty_cases() -> dict[str, tuple]:
    """Functions with one empty input each, and the shape of the result."""
    config, none = config_of(lmax=2, mmax=1), Incidence.of_sorted(torch.zeros(0, dtype=torch.long), 3)
    nodes, edges = random(3, 9, 4), edges_of(random(0, 3), config, none, none)
    radial, identity = radial_of(0, config), torch.eye(4, dtype=torch.float64)
    grid, sphere = grid_activation(2, "mlp", 1), grid_activation(2, 3, None)
    message, convolution = message_product(2, 3), prepared(SO2Convolution(config_of(mmax=1), 2))
    linear, gate = so2_layer("linear", 2, 1), so2_layer("gate", 2, 1)
    none_of = softmax_inputs(num_edges=0)
    cases = {
        "gather": (lambda x: gather(x, none), nodes, (0, 9, 4)),
        "segment_sum": (lambda x: segment_sum(x, none), random(0, 4), (3, 4)),
        "envelope_softmax": (lambda x: envelope_softmax(x, *none_of[1:], none), none_of[0], (0, 2, 2)),
        "envelope": (lambda x: envelope(x, 3.0, 5), random(0), (0,)),
        "clamp_length": (lambda x: clamp_length(x, BRIDGING), random(0), (0,)),
        "openness": (lambda x: openness(x, none, BRIDGING), random(0), (3,)),
        "SO2Linear": (lambda x: linear(groups_of(x, 2, 1, 2), None)[1], random(2, 0, 14), (2, 0, 8)),
        "Gate": (lambda x: gate(groups_of(x, 2, 1, 2))[1], random(2, 0, 14), (2, 0, 8)),
        "GridActivation on SO(3)": (grid, random(0, 9, 4), (0, 9, 6)),
        "GridActivation on S2": (sphere, random(0, 9, 4), (0, 9, 2)),
        "MessageNodeProduct": (lambda x: message(x, x), random(0, 9, 8), (0, 9, 8)),
        "SO2Convolution": (lambda x: convolution(x, radial, edges), nodes, (3, 9, 4)),
    }
    for product in (DegreeProduct(2, 1, 4, 2), ElementwiseProduct(2, 1)):
        module = prepared(product)
        function = lambda x, module=module: module(module.spread(x), radial, identity, edges)  # noqa: E731
        cases[type(product).__name__] = (function, nodes, (0, 7, 4))
    for name in NODE_LAYERS:
        out = {"DegreeLinear": 3, "GatedActivation": 2}.get(name, 4)
        cases[name] = (node_layer(name, 2), random(0, 9, 4), (0, 9, out))
    return cases


@pytest.mark.parametrize("name", empty_cases())
def test_empty_input(name):
    function, x, shape = empty_cases()[name]
    (x,) = leaves(x)
    out = function(x)
    assert out.shape == shape and out.isfinite().all()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.shape == x.shape and gradient.isfinite().all()
