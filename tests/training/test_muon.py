"""HybridMuon: update rule against a plain implementation, state, routing of parameters, moving average."""

import copy
import math

import pytest
import torch
from ase.data import chemical_symbols
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpa4.model import DPA4
from dpa4.model.presets import PRESETS, preset
from dpa4.potential.deepmd.names import deepmd_name
from dpa4.training.ema import MovingAverage
from dpa4.training.muon import HybridMuon, orthogonalize, update_magma_score
from dpa4.training.packing import MuonPacking, block_shape
from dpa4.training.routing import parameter_groups, parameter_routes

SHAPES = {
    "square": (48, 48),
    "wide": (16, 64),
    "tall": (64, 16),
    "stack": (3, 32, 16),
    "squares": (2, 24, 24),
    "ones": (1, 16, 32, 1),
    "adam": (4, 8),
    "adamw": (16, 2, 1),
    "vector": (7, 1),
}


def random_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()
    }


def route_of(name):
    return {"adam": "adam", "vector": "adam", "adamw": "adamw"}.get(name, "muon")


def optimizer_of(parameters, lr=1e-3):
    groups = [
        {"params": [p for name, p in parameters.items() if route_of(name) == route], "route": route}
        for route in ("muon", "adam", "adamw")
    ]
    return HybridMuon(groups, lr)


def gradients(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(s, generator=generator) ** 3 for n, s in SHAPES.items()} for _ in range(steps)]


def assign(parameters, gradient):
    for name, p in parameters.items():
        p.grad = gradient[name].clone()


# --- an independent implementation of the update rule, block by block, after its description


def plain_orthogonalize(u):
    if u.shape[0] > u.shape[1]:
        return plain_orthogonalize(u.T).T
    if u.shape[0] == u.shape[1]:
        x = u.bfloat16()
        x = x / max(x.norm(), torch.tensor(1e-7).bfloat16())
        for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2:
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.double()
    x = u.double() / (u.double().norm() + 1e-7)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ):
        gram = x @ x.T
        x = a / 1.05 * x + (b / 1.05**3 * gram + c / 1.05**5 * gram @ gram) @ x
    return x


def plain_steps(start, gradient_steps, lr=1e-3, decay=1e-3):
    """Parameters after each step, in float64."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    theta = {name: p.detach().double() for name, p in start.items()}
    first = {name: torch.zeros_like(t) for name, t in theta.items()}
    second = {name: torch.zeros_like(t) for name, t in theta.items()}
    score: dict = {}
    history = []
    for k, gradient in enumerate(gradient_steps, 1):
        for name in theta:
            g = gradient[name].double()
            if route_of(name) != "adam":
                theta[name] = theta[name] * (1 - lr * decay)
            if route_of(name) != "muon":
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.95 * second[name] + 0.05 * g**2
                denominator = (second[name] / (1 - 0.95**k)).sqrt() + 1e-20
                theta[name] = theta[name] - lr / (1 - 0.9**k) * first[name] / denominator
                continue
            first[name] = 0.95 * first[name] + 0.05 * g
            effective = [n for n in g.shape if n > 1]
            rows, columns = effective[-2:]
            update = torch.zeros_like(g).view(-1, rows, columns)
            for i, (m, b) in enumerate(
                zip(first[name].view(-1, rows, columns), g.view(-1, rows, columns), strict=True)
            ):
                cosine = float((m * b).sum() / max(m.norm() * b.norm(), 1e-12))
                raw = (sigmoid(cosine / 2) - sigmoid(-0.5)) / (sigmoid(0.5) - sigmoid(-0.5))
                s = score[name, i] = 0.9 * score.get((name, i), 0.5) + 0.1 * min(max(raw, 0), 1)
                orthogonal = plain_orthogonalize((0.95 * m + 0.05 * b).float())
                update[i] = 0.18 * math.sqrt(max(rows, columns)) * (0.1 + 0.9 * s) * orthogonal
            theta[name] = theta[name] - lr * update.view(g.shape)
        history.append({name: t.clone() for name, t in theta.items()})
    return history


def test_the_update_agrees_with_a_plain_implementation():
    parameters = random_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = optimizer_of(parameters)
    steps = gradients(5)
    for gradient, expected in zip(steps, plain_steps(start, steps), strict=True):
        assign(parameters, gradient)
        optimizer.step()
        for name, p in parameters.items():
            moved = (expected[name] - start[name]).norm()
            # wide blocks are iterated in float16, the plain implementation in float64
            allowed = {"adam": 1e-5, "adamw": 1e-5, "muon": 1e-2}[route_of(name)]
            assert (p.detach() - expected[name]).norm() < allowed * moved, name


def test_agrees_with_deepmd_kit():
    reference = pytest.importorskip("deepmd.pt.optimizer", reason="deepmd-kit is not installed")
    parameters, theirs = random_parameters(), random_parameters()
    names = {name: f"x.{route_of(name)}_{name}" if route_of(name) != "muon" else name for name in SHAPES}
    named = [(names[name], p) for name, p in theirs.items()]
    other = reference.HybridMuonOptimizer(list(theirs.values()), lr=1e-3, named_parameters=named)
    optimizer = optimizer_of(parameters)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for gradient in gradients(5):
        assign(parameters, gradient)
        assign(theirs, gradient)
        optimizer.step()
        other.step()
    for name, p in parameters.items():
        moved = (theirs[name] - start[name]).norm()
        assert (p - theirs[name]).norm() < (1e-2 if route_of(name) == "muon" else 1e-5) * moved, name


# --- properties


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (32, 96), (96, 96), (13, 96)])
def test_orthogonalized_blocks_have_singular_values_near_one(rows, columns):
    torch.manual_seed(0)
    blocks = torch.randn(5, rows, columns)
    singular = torch.linalg.svdvals(orthogonalize(blocks).double())
    assert 0.6 < singular.min() and singular.max() < 1.2
    # right and left singular vectors are those of the input
    u, _, vh = torch.linalg.svd(blocks.double(), full_matrices=False)
    assert (orthogonalize(blocks).double() - u @ vh).norm() < 0.25 * (u @ vh).norm()


def test_orthogonalization_ignores_the_scale_and_keeps_zeros():
    torch.manual_seed(0)
    for shape in ((2, 8, 24), (2, 24, 24)):
        blocks = torch.randn(shape)
        torch.testing.assert_close(orthogonalize(1e3 * blocks), orthogonalize(blocks), atol=0.03, rtol=0)
        assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32), (4, 16, 48)])
def test_root_mean_square_of_the_first_update(shape):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    start = p.detach().clone()
    p.grad = torch.randn(shape)
    HybridMuon([{"params": [p], "route": "muon"}], lr=0.1, weight_decay=0.0).step()
    # momentum and gradient agree in the first step: the Magma factor is 0.1 + 0.9 (0.9 * 0.5 + 0.1)
    rms = (p.detach() - start).square().mean().sqrt() / 0.1
    assert rms == pytest.approx(0.18 * 0.595, rel=0.1)


def test_magma_factor_is_between_a_tenth_and_one_and_follows_agreement():
    torch.manual_seed(0)
    gradient = torch.randn(2, 8, 8)
    momentum = gradient * torch.tensor([1.0, -1.0])[:, None, None]
    score = torch.full((2,), 0.5)
    dot = (momentum * gradient).sum((-2, -1))
    norms = momentum.norm(dim=(-2, -1)) * gradient.norm(dim=(-2, -1))
    factors = torch.stack([update_magma_score(score, dot, norms) for _ in range(200)])
    assert factors.min() >= 0.1 and factors.max() <= 1.0
    torch.testing.assert_close(factors[-1], torch.tensor([1.0, 0.1]))
    assert torch.isfinite(update_magma_score(score, torch.zeros(2), torch.zeros(2))).all()


def test_parameters_without_gradient_are_left_alone():
    parameters = random_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = optimizer_of(parameters)
    assign(parameters, gradients(1)[0])
    frozen = ("square", "stack", "adam", "adamw")
    for name in frozen:
        parameters[name].grad = None
    optimizer.step()
    for name, p in parameters.items():
        assert torch.equal(p, start[name]) == (name in frozen), name


def test_weights_padded_and_iterated_together_move_as_each_alone():
    together, alone = random_parameters(), random_parameters()
    start = {name: p.detach().clone() for name, p in together.items()}
    optimizer = optimizer_of(together)
    singles = [HybridMuon([{"params": [p], "route": route_of(name)}], 1e-3) for name, p in alone.items()]
    for gradient in gradients(4):
        assign(together, gradient)
        assign(alone, gradient)
        for one in (optimizer, *singles):
            one.step()
    (packing,) = (p for p in optimizer._packings.values() if isinstance(p, MuonPacking))
    assert [tuple(index.shape) for index in packing.indices] == [(3, 48, 48), (6, 16, 64)]
    for name, p in together.items():
        if name in ("wide", "tall", "stack", "ones"):  # float16, sums in another order
            assert (p - alone[name]).norm() < 2e-3 * (p - start[name]).norm(), name
        else:
            assert torch.equal(p, alone[name]), name


def test_a_gradient_that_comes_and_goes_keeps_the_momentum():
    parameters, twins = random_parameters(), random_parameters()
    a, b = optimizer_of(parameters), HybridMuon([{"params": [twins["square"]], "route": "muon"}], 1e-3)
    for step, gradient in enumerate(gradients(6)):
        assign(parameters, gradient)
        parameters["squares"].grad = None if step % 2 else parameters["squares"].grad
        parameters["square"].grad = None if step == 3 else parameters["square"].grad
        a.step()
        if step != 3:
            twins["square"].grad = gradient["square"].clone()
            b.step()
    assert torch.equal(parameters["square"], twins["square"])


def test_a_copied_optimizer_steps_its_own_parameters():
    parameters = random_parameters()
    optimizer = optimizer_of(parameters)
    steps = gradients(3)
    assign(parameters, steps[0])
    optimizer.step()
    twins, twin = copy.deepcopy((parameters, optimizer))
    for gradient in steps[1:]:
        for p, o in ((parameters, optimizer), (twins, twin)):
            assign(p, gradient)
            o.step()
    for name, p in parameters.items():
        assert torch.equal(p, twins[name]), name


def test_saved_state_holds_the_momentum_once(tmp_path):
    p = nn.Parameter(torch.randn(64, 256))
    optimizer = HybridMuon([{"params": [p], "route": "muon"}], 1e-3)
    p.grad = torch.randn(64, 256)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.1 * p.numel() * p.element_size()


class Operations(TorchDispatchMode):
    """Mode that records the names of all operations that reach a device; views launch no kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["nano", "mini", "paper-neo", "paper-air"])
def test_an_update_launches_less_than_300_kernels_and_waits_for_none(name):
    # "meta" stands for a GPU: a CPU needs additional conversions of float16
    model = DPA4(preset(name, elements=tuple(chemical_symbols[1:90]))).to("meta")
    optimizer = HybridMuon(parameter_groups(model), 1e-3)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.receive()
    scale, active = torch.ones((), device="meta"), torch.ones((), dtype=torch.bool, device="meta")
    with Operations() as operations:
        optimizer.update(scale, active)
    assert 100 < len(operations.names) < 300
    assert not [n for n in operations.names if "_local_scalar_dense" in n or "lift_fresh" in n]


def test_saved_and_loaded_state_continues_bit_for_bit(tmp_path):
    steps = gradients(6)
    parameters = random_parameters()
    optimizer = optimizer_of(parameters)
    for gradient in steps[:3]:
        assign(parameters, gradient)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    twin = optimizer_of(twins)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gradient in steps[3:]:
        assign(parameters, gradient)
        assign(twins, gradient)
        optimizer.step()
        twin.step()
    for name, p in parameters.items():
        assert torch.equal(p, twins[name]), name


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"route 'muon' needs a matrix, got a parameter of shape \(1, 5\)"):
        HybridMuon([{"params": [nn.Parameter(torch.ones(1, 5))], "route": "muon"}], lr=0.1)


def test_block_shapes():
    assert block_shape((3, 4)) == (1, 3, 4)
    assert block_shape((2, 1, 3, 4)) == (2, 3, 4)
    assert block_shape((2, 3, 1, 4, 1)) == (2, 3, 4)
    assert block_shape((1, 4)) is block_shape((4,)) is block_shape(()) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu():
    parameters = random_parameters()
    others = {name: nn.Parameter(p.detach().cuda()) for name, p in parameters.items()}
    a, b = optimizer_of(parameters), optimizer_of(others)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for gradient in gradients(3):
        assign(parameters, gradient)
        assign(others, {name: g.cuda() for name, g in gradient.items()})
        a.step()
        b.step()
    for name, p in parameters.items():
        assert (p - others[name].cpu()).norm() < 1e-2 * (p - start[name]).norm(), name


# --- routing


def rule_by_name(name, shape):
    """Route of a parameter in the reference, which decides by the parameter's path."""
    leaf = [part for part in name.split(".") if not part.isdigit()][-1].lower()
    if leaf == "b" or "bias" in leaf or leaf.startswith("adam_"):
        return "adam"
    if leaf.startswith("adamw_"):
        return "adamw"
    return "muon" if len([n for n in shape if n > 1]) >= 2 else "adam"


EVERYTHING = {
    "mlp_bias": True,
    "layer_scale": True,
    "charge_spin": True,
    "edge_norm": True,
    "n_focus": 2,
    "focus_dim": 8,
    "channels": 16,
    "ffn_grid": 3,
    "message_grid": "mlp",
    "radial_so2_rank": 2,
    "readout_layers": 2,
    "fitting": (8, 0),
    "ffn_blocks": 2,
}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, {}) for name in PRESETS),
        ("neo", EVERYTHING),
        ("paper-neo", EVERYTHING | {"ffn_on": "degrees", "ffn_grid": "glu", "basis": "gaussian"}),
    ],
)
def test_routes_by_type_are_the_reference_routes_by_name(name, overrides):
    model = DPA4(preset(name, elements=("H", "O"), **overrides))
    routes = parameter_routes(model)
    parameters = dict(model.named_parameters())
    assert set(routes) == set(parameters)
    assert {"muon", "adam", "adamw"} == set(routes.values())
    for key, route in routes.items():
        theirs = deepmd_name(key, model.config)
        assert route == rule_by_name(theirs, parameters[key].shape), f"{key} = {theirs}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {"radial.hidden.0.weight", "seed.basis_in.weight"}),
        ({"radial_mlp": (8, 8), "mlp_bias": True}, {"radial.hidden.0.weight", "seed.basis_in.weight"}),
        ({"radial_mlp": ()}, {"radial.last.weight", "seed.basis_in.weight"}),
        ({"use_env_seed": False}, {"radial.hidden.0.weight"}),
    ],
)
def test_adam_for_basis_moves_the_matrices_that_multiply_the_basis(overrides, expected):
    model = DPA4(preset("nano", elements=("H", "O"), **overrides))
    before, after = parameter_routes(model), parameter_routes(model, adam_for_basis=True)
    assert {name for name in before if before[name] != after[name]} == expected
    assert {before[name] for name in expected} == {"muon"} and {after[name] for name in expected} == {"adamw"}
    theirs = {"radial_embedding.net.0.matrix", "env_seed_embedding.rbf_proj_layer1.matrix"}
    assert {deepmd_name(name, model.config).partition("descriptor.")[2] for name in expected} <= theirs
    (adamw,) = (g for g in parameter_groups(model, adam_for_basis=True) if g["route"] == "adamw")
    named = {id(p): name for name, p in model.named_parameters()}
    assert expected <= {named[id(p)] for p in adamw["params"]}


def test_groups_partition_the_trainable_parameters():
    model = DPA4(preset("nano", elements=("H",)))
    model.types.table.requires_grad_(False)
    grouped = [p for group in parameter_groups(model) for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_parameter_without_route_is_an_error():
    model = DPA4(preset("nano", elements=("H",)))
    model.types.extra = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameter types\.extra of a Embedding has no optimiser route"):
        parameter_groups(model)


# --- moving average


def test_moving_average_follows_and_swaps_back_exactly():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4))
    average = MovingAverage([p], 0.25)
    expected = p.detach().clone()
    for count, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.25, 0.25)):
        with torch.no_grad():
            p += torch.randn(4)
        average.receive(count)
        average.update(torch.tensor(count != 2))
        if count == 2:
            continue
        expected = decay * expected + (1 - decay) * p.detach()
    own = copy.deepcopy(p.detach())
    with average.applied():
        torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(p, own)
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert torch.equal(p, own)
