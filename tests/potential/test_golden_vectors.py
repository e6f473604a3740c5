"""Golden vectors of the specification: initial node features, convolutions and a block, small whole models.

They localise errors that the models of ``test_parity`` only reveal: in features, in the interaction, and in energies
and their derivatives with weights filled by a rule.
"""

import json
import math

import numpy as np
import pytest
import torch

from dpa4.graph import build_graph
from dpa4.model import ModelConfig
from dpa4.model.block import Block
from dpa4.model.convolution import SO2Convolution
from dpa4.model.edges import EdgeGeometry, Neighborhood
from dpa4.model.layers import EquivariantRMSNorm
from dpa4.model.radial import RadialFeatures
from dpa4.ops.incidence import Incidence
from dpa4.potential import Potential, load_potential
from dpa4.potential.deepmd.names import deepmd_name
from helpers import SHARED, assert_close, shared

VECTORS = SHARED / "reference" / "vectors"
if not VECTORS.exists():
    pytest.skip(f"needs the reference collection: {VECTORS} is absent", allow_module_level=True)


def golden(values) -> torch.Tensor:
    return torch.tensor(np.array(values, dtype=np.float64))


# Initial node features

FILL_NUMBER = {
    "types.table": 1, "seed.basis_in.weight": 2, "seed.basis_out.weight": 3, "seed.types.table": 4,
    "seed.pair_in.weight": 5, "seed.pair_out.weight": 6, "seed.output.weight": 7, "radial.hidden.0.weight": 8,
    "radial.last.weight": 9, "radial.norms.0.scale": 10, "seed.scale_norm.scale": 11,
    "seed.shift_norm.scale": 12, "charge_spin.charge.table": 13, "charge_spin.spin.table": 14,
    "charge_spin.mix.weight": 15, "charge_spin.mix.bias": 16,
}  # fmt: skip
FEATURE_OPTIONS = {
    "base": {},
    "edge_norm": {"edge_norm": True},
    "gaussian": {"basis": "gaussian"},
    "bridging": {"bridging": {"r_inner": 0.5, "r_outer": 0.8}},
    "chgspin": {"charge_spin": True},
}
FEATURE_CASES = json.loads(shared("reference/vectors/A_testvec.json").read_text())
SPIN_CASES = {case for case in FEATURE_CASES if "spin" in case} - set(FEATURE_OPTIONS)  # not supported


def first_block_input(case: str) -> tuple[torch.Tensor, RadialFeatures, Neighborhood, Potential]:
    """Input of the first block for the four atoms of the golden cases."""
    options = {"elements": ("H", "O"), "channels": 8, "n_radial": 4, "lmax": 2, "n_blocks": 1, "cutoff": 6.0}
    potential = Potential(ModelConfig(**(options | FEATURE_OPTIONS[case]))).double().eval()
    filled = set()
    with torch.no_grad():
        for name, parameter in potential.model.named_parameters():
            if name in FILL_NUMBER:
                k = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
                values = 0.3 * torch.sin(0.7 * k + 0.1 * FILL_NUMBER[name]) + name.endswith(".scale")
                parameter.copy_(values.view_as(parameter))
                filled.add(name)
        potential.model.seed.scale_strength.fill_(math.log(0.5))
        potential.model.seed.shift_strength.fill_(math.log(0.5))
        exact = [n * math.pi / 6 for n in range(1, 5)] if case != "gaussian" else [0.0, 2.0, 4.0, 6.0]
        assert_close(potential.model.basis.frequencies, golden(exact), 1e-6)  # float32 before .double()
        potential.model.basis.frequencies.copy_(golden(exact))
    expected = {name for name in FILL_NUMBER if case == "edge_norm" or "norm" not in name}
    assert filled == {name for name in expected if case == "chgspin" or not name.startswith("charge_spin")}
    caught = []
    potential.model.blocks[0].register_forward_pre_hook(lambda module, arguments: caught.append(arguments))
    positions = [[0, 0, 0], [0.55, 0.3, -0.1], [-0.4, 1.1, 0.5], [0.3, -0.7, 2.2]]
    charge_spin = (-1, 2) if case == "chgspin" else (0, 1)
    graph = build_graph([1, 8, 8, 1], positions, np.zeros((3, 3)), [False] * 3, 6.0, charge_spin)
    assert graph.num_edges == 12
    with torch.no_grad():
        potential.atomic_energies(graph, graph.edge_vectors())
    x, (radial,), (hood,), _ = caught[0]
    return x, radial, hood, potential


def test_every_supported_feature_case_is_checked():
    assert set(FEATURE_CASES) - SPIN_CASES == set(FEATURE_OPTIONS)


@pytest.mark.parametrize("case", FEATURE_OPTIONS)
def test_features_before_the_first_block(case):
    expected = FEATURE_CASES[case]
    x, radial, hood, _ = first_block_input(case)
    assert_close(x[0, :, 0], golden(expected["x_atom0_ch0"]))
    assert_close(x[2, :, 3], golden(expected["x_atom2_ch3"]))
    assert_close(x.square().sum(), golden(expected["x_sumsq"]))
    features = torch.einsum("ew,wlc->elc", radial.hidden, radial.last) + radial.pair[:, None]
    edge = (hood.source.index == 1) & (hood.destination.index == 0)
    assert_close(features[edge][0, :, 0], golden(expected["radial_edge_1to0_ch0"]))


@pytest.mark.parametrize("case", FEATURE_OPTIONS)
def test_geometry_of_the_edges(case):
    expected = FEATURE_CASES[case]
    _, _, hood, potential = first_block_input(case)
    edges = hood.edges
    edge = (hood.source.index == 1) & (hood.destination.index == 0)
    assert_close(edges.vector[edge][0], golden(expected["edge_vec_1to0"]))
    assert_close(edges.weight[edge][0], golden(expected["edge_env_1to0"]))
    assert_close(potential.model.basis(edges.length)[edge][0].detach(), golden(expected["edge_rbf_1to0"]))
    assert_close(hood.degree_norm**-2 - 0.25, golden(expected["deg"]))
    gates = expected.get("gate_by_src", dict.fromkeys("0123", 1.0))
    assert_close(edges.gate, golden([gates[str(int(atom))] for atom in hood.source.index]))


# Convolutions and the block


def interaction_case(case: str) -> tuple[dict, dict, dict, torch.Tensor]:
    """Options, inputs, parameters and output of one case."""
    with np.load(VECTORS / "B_golden.npz") as file:
        stored = {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(f"{case}/")}
    inputs = {key[3:]: torch.from_numpy(value) for key, value in stored.items() if key.startswith("in/")}
    derived = ("index", "indices", "idx", "balance_weight")  # follow from the options
    weights = {key[2:]: torch.from_numpy(stored[key]) for key in stored if key.startswith("p/")}
    weights = {key: value for key, value in weights.items() if not key.endswith(derived)}
    return json.loads(str(stored["cfg"])), inputs, weights, torch.from_numpy(stored["out"])


def config_of(options: dict) -> ModelConfig:
    """Configuration whose first block has the golden options; options that it cannot express must be off."""
    same = ("lmax", "mmax", "kmax", "channels", "n_focus", "focus_dim", "mixing_layers", "layer_scale")
    same += ("n_atten_head", "mlp_bias", "radial_so2_mode", "radial_so2_rank", "message_node_so3")
    off = ("so2_attn_res", "atten_f_mix", "atten_v_proj", "atten_o_proj", "s2_activation", "node_wise_s2")
    assert all(options[name] in (False, "none") for name in (*off, "node_wise_so3", "message_node_s2"))
    chosen = {name: options[name] for name in same}
    chosen["message_grid"] = options["message_node_grid_branch"] or "glu"
    if "ffn_blocks" in options:  # a whole block
        assert options["so2_post_norm_eps"] == 1.0 and options["ffn_so3_grid"]
        chosen |= {name: options[name] for name in ("ffn_blocks", "ffn_neurons", "sandwich_norm")}
        chosen |= {"ffn_on": "so3", "ffn_grid": options["ffn_grid_branch"], "edge_norm": False}
    else:
        chosen["edge_norm"] = options["focus_norm"]
    return ModelConfig(elements=("H",), n_blocks=1, **chosen)


def load_weights(module: torch.nn.Module, weights: dict, ours: str, theirs: str, config: ModelConfig) -> None:
    """Copy golden parameters; every one has exactly one place."""
    names = {deepmd_name(ours + name, config): p for name, p in module.named_parameters()}
    assert set(names) == {theirs + key for key in weights}
    with torch.no_grad():
        for key, value in weights.items():
            parameter = names[theirs + key]
            parameter.copy_(value.view_as(parameter))


def edges_and_radial(inputs: dict, config: ModelConfig) -> tuple[Neighborhood, RadialFeatures]:
    """Put the given envelope, gate, normalisation and radial features on the geometry of the edge vectors.

    Edges are sorted by destination.
    """
    order = torch.argsort(inputs["dst"], stable=True)
    source = Incidence.of(inputs["src"][order], len(inputs["x"]))
    destination = Incidence.of_sorted(inputs["dst"][order], len(inputs["x"]))
    geometry, vectors = EdgeGeometry(config).double(), inputs["edge_vec"][order]
    open_ = geometry.openness(vectors, source, destination)
    hood = geometry(vectors, open_, source, destination)
    edges = hood.edges._replace(weight=inputs["edge_env"][order, 0])
    if "edge_src_gate" in inputs:
        edges = edges._replace(gate=inputs["edge_src_gate"].flatten()[order])
    hood = hood._replace(edges=edges)
    if "inv_sqrt_deg" in inputs:
        hood = hood._replace(degree_norm=inputs["inv_sqrt_deg"].flatten())
    radial = inputs["radial"][order]
    identity = torch.eye(radial[0].numel(), dtype=torch.float64).unflatten(1, radial.shape[1:])
    return hood, RadialFeatures(radial.flatten(1), torch.zeros_like(radial[:, 0]), identity)


with np.load(VECTORS / "B_golden.npz") as _file:
    INTERACTION_CASES = sorted({key.split("/")[0] for key in _file.files})


@pytest.mark.parametrize("case", [case for case in INTERACTION_CASES if case.startswith("conv")])
def test_convolution(case):
    options, inputs, weights, expected = interaction_case(case)
    if options["so2_norm"]:
        pytest.skip("so2_norm (norms inside the SO(2) stack) is used by no published model and not built")
    config = config_of(options)
    convolution = SO2Convolution(config, config.lmax).double()
    load_weights(convolution, weights, "blocks.0.conv.", "descriptor.blocks.0.so2_conv.", config)
    hood, radial = edges_and_radial(inputs, config)
    with torch.no_grad():
        assert_close(convolution(inputs["x"], radial, hood), expected)


def test_block():
    options, inputs, weights, expected = interaction_case("block_water")
    config = config_of(options)
    block = Block(config, config.lmax).double()
    load_weights(block, weights, "blocks.0.", "descriptor.blocks.0.", config)
    hood, radial = edges_and_radial(inputs, config)
    caught = []
    block.conv_norm_out.register_forward_hook(lambda module, arguments, output: caught.append(output))
    with torch.no_grad():
        out = block(inputs["x"].squeeze(2), [radial], [hood])
    assert_close(caught[0], inputs["so2_unit_out"].squeeze(2))
    assert_close(out, expected.squeeze(2))


# Whole models

MODELS = json.loads(shared("reference/vectors/C_testvec.json").read_text())
INPUTS = MODELS["_inputs"]


def evaluate(potential: Potential, periodic: bool, coordinates=INPUTS["coord"]):
    """Prediction for the water dimer."""
    numbers = [8 if kind == 0 else 1 for kind in INPUTS["atype"]]
    cell = np.reshape(INPUTS["box"], (3, 3)) if periodic else np.zeros((3, 3))
    return potential(build_graph(numbers, coordinates, cell, [periodic] * 3, potential.config.cutoff))


def assert_prediction(result, expected: dict, energy: float, force: float) -> None:
    """Compare energies relative to the largest atomic one, forces and virial to their largest entry."""
    atomic = golden(expected["atom_energy"]).flatten()
    assert abs(result.energy.item() - expected["energy"]) <= energy * len(atomic) * atomic.abs().max()
    for actual, name, tolerance in (
        (result.atomic_energies, "atom_energy", energy),
        (result.forces, "force", force),
        (result.virial, "virial", force),
    ):
        reference = golden(expected[name]).view_as(actual)
        difference = (actual - reference).abs().max() / reference.abs().max()
        assert difference <= tolerance, f"{name}: relative difference {difference:.2e}"


def filled_by_rule(fixture: str) -> Potential:
    """New model of a fixture's configuration, with weights filled by sines of position and rank of name."""
    config = load_potential(shared(f"reference/fixtures/{fixture}/model_f32.pt")).config
    potential = Potential(config, dict(zip(config.elements, (1.5, -0.75), strict=True))).double().eval()
    assert config.elements == ("O", "H")
    parameters = {deepmd_name(name, config): p for name, p in potential.model.named_parameters()}
    with torch.no_grad():
        for j, (name, parameter) in enumerate(sorted(parameters.items())):
            k = torch.arange(parameter.numel(), dtype=torch.float64)
            values = 0.15 * torch.sin(0.37 * k + 0.91 * j + 0.5)
            values += 1.0 * name.endswith("adam_scale") + 0.5 * name.endswith("residual_scale")
            if name.endswith("adam_freqs"):  # keep their initial values
                values = (k + 1) * torch.pi / config.cutoff
            parameter.copy_(values.view_as(parameter))
    return potential


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_pretrained_model(precision, periodic):
    dtype = {"f64": torch.float64, "f32": torch.float32}[precision]
    potential = load_potential(shared("reference/fixtures/P_pretrained/model_f32.pt"), dtype=dtype)
    expected = MODELS[f"pretrained_{precision}_{'pbc' if periodic else 'nopbc'}"]
    tolerance = {"f64": (1e-14, 1e-12), "f32": (2e-9, 1e-6)}[precision]  # 2e-9 of 187 eV is 4e-7 eV per atom
    for (
        module
    ) in potential.modules():  # the reference's came from the checkpoint, rounded to float32; ours are
        if isinstance(module, EquivariantRMSNorm):  # exact, which changes forces by 2e-8 of their size
            module.balance.copy_(module.balance.float())
    assert_prediction(evaluate(potential, periodic), expected, *tolerance)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize(
    ("name", "fixture"),
    [("input", "A_water_mini"), ("input-zbl", "B_water_zbl"), ("lmp/input", "P_pretrained")],
)
def test_analytic_model(name, fixture, periodic):
    potential, expected = filled_by_rule(fixture), MODELS[f"analytic:{name}"]
    assert sum(p.numel() for p in potential.parameters()) == expected["nparam"]
    boundary = "pbc" if periodic else "nopbc"
    assert_prediction(evaluate(potential, periodic), expected[boundary], 1e-13, 1e-11)


def test_analytic_model_with_a_short_contact():
    expected = MODELS["analytic:input-zbl"]["short_contact"]
    result = evaluate(filled_by_rule("B_water_zbl"), False, expected["coord"])
    assert_prediction(result, expected, 1e-13, 1e-11)
