"""Import of checkpoints of deepmd-kit: same energies, parts folded into the weights, refused files."""

import json
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.nn import functional

from deepmd_files import energies_of
from dpa4.graph import build_graph
from dpa4.model import ModelConfig
from dpa4.potential.checkpoint import load_potential, read_checkpoint
from dpa4.potential.deepmd.writer import deepmd_state
from dpa4.potential.potential import Potential
from helpers import SHARED, shared

FIXTURES = SHARED / "reference" / "fixtures"
DESCRIPTOR = "model.Default.atomic_model.descriptor."
FITTING = "model.Default.atomic_model.fitting_net."
NETWORK = f"{FITTING}filter_layers.networks.0."


# Whole models of the reference


@pytest.mark.parametrize("name", ["A_water_mini", "D_atom_ener", "D_legacy_version1.0", "P_pretrained"])
def test_energies_and_forces_are_those_of_the_reference(name):
    potential = load_potential(shared(f"reference/fixtures/{name}/model_f32.pt"), dtype=torch.float64)
    with np.load(FIXTURES / name / "ref.npz") as reference:
        structure = "ethanol" if name != "P_pretrained" else "water192"
        get = {
            key.split("/")[1]: reference[key] for key in reference.files if key.startswith(f"{structure}/")
        }
    graph = build_graph(get["Z"], get["pos"], get["cell"], get["pbc"], potential.config.cutoff)
    result = potential(graph)
    assert result.energy.item() == pytest.approx(float(get["energy"]), rel=1e-10)
    np.testing.assert_allclose(result.forces.numpy(), get["forces"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("D_edge_cartesian", "descriptor.edge_cartesian = True"),
        ("D_node_wise_so3", "descriptor.node_wise_so3 = True"),
        ("D_so2_attn_res_ind", "descriptor.so2_attn_res = 'independent'"),
    ],
)
def test_models_with_switches_of_no_published_model_are_refused(name, option):
    with pytest.raises(ValueError, match=f"{option} is not supported"):
        load_potential(shared(f"reference/fixtures/{name}/model_f32.pt"))


def fill_by_rule(state):
    """Parameters of the analytic test models: sines of position and rank of name."""
    buffers = ("version_tensor", "mean", "stddev", "balance_weight", "l1_sign_outer")
    learned = [key for key in state if key.startswith((DESCRIPTOR, NETWORK)) and not key.endswith(buffers)]
    for j, key in enumerate(sorted(key for key in learned if state[key].is_floating_point())):
        k = torch.arange(state[key].numel(), dtype=torch.float64)
        values = 0.15 * torch.sin(0.37 * k + 0.91 * j + 0.5)
        values += 1.0 * key.endswith("adam_scale") + 0.5 * key.endswith("residual_scale")
        if key.endswith("adam_freqs"):
            values = (k + 1) * torch.pi / 6.0
        state[key] = values.reshape(state[key].shape)
    bias = torch.tensor([1.5, -0.75], dtype=torch.float64)
    state["model.Default.atomic_model.out_bias"] = bias.reshape(1, 2, 1)


def water_mini():
    """State of the water example of deepmd-kit."""
    config = ModelConfig(
        elements=("O", "H"),
        channels=32,
        lmax=2,
        n_blocks=2,
        mixing_layers=3,
        message_node_so3=True,
        ffn_on="so3",
        ffn_grid=1,
        so3_readout="mlp",
    )
    return deepmd_state(Potential(config).double())


def add_film(state, num_tasks, task):
    """Give a state the task embedding of branch ``task`` with FiLM, in place."""
    hidden, (channels, width) = (
        32 * -(-4 * num_tasks // 32),
        state[f"{NETWORK}hidden_layers.0.linear.matrix"].shape,
    )
    film = {
        "case_layer1.matrix": (num_tasks, hidden),
        "case_layer2.matrix": (hidden, 4 * channels),
        "projectors.0": (4 * channels, 2 * channels),
        "projectors.1": (4 * channels, width),
        "adam_case_film_scale_strength_log": (2,),
        "adam_case_film_shift_strength_log": (2,),
    }
    for key, shape in film.items():
        state[f"{NETWORK}case_film.{key}"] = torch.zeros(shape, dtype=torch.float64)
    state[f"{FITTING}case_embd"] = functional.one_hot(torch.tensor(task), num_tasks).double()
    fitting = state["_extra_state"]["model_params"]["fitting_net"]
    fitting |= {"dim_case_embd": num_tasks, "case_film_embd": True}


@pytest.mark.parametrize(
    "name", ["analytic:input", "analytic:multitask:water_1", "analytic:multitask:water_2"]
)
def test_analytic_models_have_the_energies_of_the_reference(name, load):
    vectors = json.loads(shared("reference/vectors/C_testvec.json").read_text())
    state = water_mini()
    if "multitask" in name:
        add_film(state, 2, int(name[-1]) - 1)
    fill_by_rule(state)
    inputs, expected = vectors["_inputs"], vectors[name]["pbc"]
    numbers = [8 if kind == 0 else 1 for kind in inputs["atype"]]
    cell = np.reshape(inputs["box"], (3, 3))
    result = load(state)(build_graph(numbers, inputs["coord"], cell, [True] * 3, 6.0))
    assert result.energy.item() == pytest.approx(expected["energy"], rel=1e-12)
    np.testing.assert_allclose(result.atomic_energies.numpy(), np.ravel(expected["atom_energy"]), rtol=1e-11)
    np.testing.assert_allclose(result.forces.numpy().ravel(), np.ravel(expected["force"]), atol=1e-10)


# Format versions and precision


def test_formats_below_1_1_are_pre_release_models(state, load):
    del state[f"{DESCRIPTOR}version_tensor"]  # a missing entry means 1.0
    assert load(state).config.pre_release
    state[f"{DESCRIPTOR}version_tensor"] = torch.tensor(1.1, dtype=torch.float64)
    assert not load(state).config.pre_release


def test_newer_formats_are_refused(state, load):
    state[f"{DESCRIPTOR}version_tensor"] = torch.tensor(1.4, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="its descriptor has format 1.4; this version of dpa4 reads formats up to 1.3"
    ):
        load(state)


@pytest.mark.parametrize(("precision", "expected"), [("float32", torch.float32), ("double", torch.float64)])
def test_precision_is_that_of_the_options(state, load, precision, expected):
    sections = state["_extra_state"]["model_params"]
    sections["descriptor"]["precision"] = sections["fitting_net"]["precision"] = precision
    assert load(state).dtype == expected
    assert load(state, dtype=torch.float64).dtype == torch.float64


def test_the_wider_precision_wins(state, load):
    state["_extra_state"]["model_params"]["descriptor"]["precision"] = "float32"
    assert load(state).dtype == torch.float64


# Files


def test_a_state_without_the_outer_dictionary_is_read(potential, state, tmp_path):
    torch.save(OrderedDict(state), tmp_path / "old.pt")
    torch.testing.assert_close(energies_of(load_potential(tmp_path / "old.pt")), energies_of(potential))


def test_averaged_weights_and_steps_are_mentioned(state, tmp_path):
    state["_extra_state"]["train_infos"]["step"] = 499
    torch.save({"model": state, "ema": {"decay": 0.999, "model": {}}, "optimizer": {}}, tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert checkpoint.provenance["training steps"] == "500"
    assert "EMA" in checkpoint.provenance["averaged weights"]


@pytest.mark.parametrize(
    "key", [f"{DESCRIPTOR}type_embedding.adam_type_embedding", f"{NETWORK}output_layer.matrix"]
)
def test_missing_weights_are_named(state, load, key):
    del state[key]
    name = key.removeprefix("model.Default.atomic_model.")
    with pytest.raises(ValueError, match=f"it misses {name}"):
        load(state)


@pytest.mark.parametrize("key", ["model.Default.atomic_model.out_bias", f"{FITTING}bias_atom_e"])
def test_missing_energies_are_named(state, load, key):
    del state[key]
    with pytest.raises(
        ValueError, match="it has no entry " + key.removeprefix("model.Default.atomic_model.")
    ):
        load(state)


def test_unknown_weights_are_refused(state, load):
    state[f"{DESCRIPTOR}blocks.0.so2_conv.so2_layer_attn_res.0.key_norm.adam_scale"] = torch.ones(1, 8)
    with pytest.raises(
        ValueError, match="it has the unknown entry descriptor.blocks.0.so2_conv.so2_layer_attn_res"
    ):
        load(state)


def test_unknown_parts_of_the_model_are_refused(state, load):
    state["model.Default.other_model.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="it has an unknown entry model.Default.other_model.weight"):
        load(state)
    del state["model.Default.other_model.weight"]
    state["model.Default.atomic_model.dens_fitting_net.weight"] = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"dens_fitting_net \(direct forces and denoising\) is not supported"
    ):
        load(state)


def test_weights_of_another_shape_are_refused(state, load):
    state["_extra_state"]["model_params"]["fitting_net"]["neuron"] = [24, 48]
    with pytest.raises(
        ValueError, match=r"hidden_layers.1.linear.matrix has shape \(24, 80\), .* require \(24, 96\)"
    ):
        load(state)


def test_derived_buffers_may_be_absent(potential, state, load):
    for key in [key for key in state if key.endswith(("expand_index", "l1_perm", "stddev", "out_std"))]:
        del state[key]
    torch.testing.assert_close(energies_of(load(state)), energies_of(potential))


class Harmful:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_python_objects_are_not_read(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="Python objects besides tensors, which are not read"):
        load_potential(tmp_path / "model.pt")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [2, 30, 4000, -100])
def test_truncated_files_are_refused(state, tmp_path, keep):
    path = tmp_path / "model.pt"
    torch.save({"model": state}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot read .*model.pt: .*(damaged|cut off)"):
        load_potential(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"weight": torch.zeros(1)}},
            "it is not a deepmd-kit checkpoint: its _extra_state has no model_params",
        ),
        ({"model": {"_extra_state": {}}}, "its _extra_state has no model_params"),
        (torch.zeros(3), "it holds a Tensor, not a deepmd-kit checkpoint"),
        (
            {"model": {"_extra_state": {"model_params": {"type": "dpa3"}}}},
            "not a DPA4 model but one of type 'dpa3'",
        ),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_potential(tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore")
def test_frozen_models_are_recognised(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)), tmp_path / "frozen.pth")
    with pytest.raises(ValueError, match="a frozen TorchScript model; use the checkpoint it was frozen from"):
        load_potential(tmp_path / "frozen.pth")


@pytest.mark.parametrize(
    "parts", [["model/archive_format", "model/models/model.json"], ["data/aotinductor/model/wrapper.so"]]
)
def test_frozen_models_of_the_second_runtime_are_recognised(tmp_path, parts):
    with zipfile.ZipFile(tmp_path / "frozen.pt2", "w") as archive:
        for part in parts:
            archive.writestr(part, b"pt2")
    with pytest.raises(
        ValueError, match="frozen.pt2: it is a frozen AOTInductor .* use the checkpoint it was"
    ):
        load_potential(tmp_path / "frozen.pt2")


def test_other_archives_and_frozen_formats_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("a.txt", b"text")
    with pytest.raises(
        ValueError, match="model.pt: .*not a PyTorch checkpoint .it has 0 parts named data.pkl"
    ):
        load_potential(tmp_path / "model.pt")
    for start in (b"\x89HDF\r\n\x1a\n", b"\nS\n\x05Const", b"", b"{}"):
        (tmp_path / "model.dp").write_bytes(start + bytes(20))
        with pytest.raises(
            ValueError, match="model.dp: it is neither .* Models frozen by deepmd-kit .* checkpoint$"
        ):
            load_potential(tmp_path / "model.dp")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model file .*model.pt"):
        load_potential(tmp_path / "model.pt")


# Damaged and hostile files


def refused(load, state, message):
    """The import fails with one line that names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        load(state)
    assert "model.pt" in str(caught.value) and "\n" not in str(caught.value)


SHARED_PARTS: list = ["x"]
for _ in range(30):
    SHARED_PARTS = [SHARED_PARTS] * 9


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "n_blocks",
            10**10,
            "n_blocks = 10000000000 is not supported; supported: whole numbers from 1 to 64",
        ),
        ("n_blocks", "2", "n_blocks = '2' is not supported"),
        ("lmax", None, "lmax = None is not supported"),
        ("lmax", True, "lmax = True is not supported"),
        ("l_schedule", 3, "l_schedule = 3 is not supported"),
        ("l_schedule", [], r"l_schedule = \[\] is not supported"),
        ("l_schedule", [2, "a"], "l_schedule = 'a' is not supported"),
        ("l_schedule", [1] * 10**5, "l_schedule = .* a list of 1 to 64|too many entries"),
        ("m_schedule", {"a": 1}, "m_schedule = {'a': 1} is not supported"),
        ("mmax", "x", "descriptor.mmax = 'x' is not supported; supported: whole numbers"),
        ("radial_so2_rank", None, "radial_so2_rank = None is not supported"),
        ("radial_so2_rank", 10**6, "radial_so2_rank = 1000000 is not supported"),
        ("grid_branch", [0, 0], r"grid_branch = \[0, 0\] is not supported; supported: one value, or three"),
        ("grid_branch", [0, 0, "many"], r"grid_branch = \[0, 0, 'many'\] is not supported; supported: one"),
        ("s2_activation", "ab", "s2_activation = 'ab' is not supported; supported: true, false"),
        ("s2_activation", [1, 2, 3], "s2_activation = .* is not supported"),
        ("lebedev_quadrature", [], r"lebedev_quadrature = \[\] is not supported"),
        (
            "exclude_types",
            [[0, 99]],
            r"descriptor.exclude_types = \[\[0, 99\]\] is not supported; supported: pairs",
        ),
        ("exclude_types", [1], r"descriptor.exclude_types = \[1\] is not supported"),
        ("ffn_blocks", 10**6, "ffn_blocks: .*less than or equal to 16"),
        ("rcut", 1e200, "cutoff: .*less than or equal to 30"),
        ("channels", 16384, "channels: .*less than or equal to 1024"),
        ("channels", torch.ones(2), "model_params.descriptor.channels has a value of type Tensor"),
        ("use_spin", SHARED_PARTS, "nested too deeply or have too many entries"),
        (3, 4, "model_params.descriptor has keys that are not texts"),
    ],
)
def test_malformed_options_are_refused_by_name(state, load, option, value, message):
    descriptor = state["_extra_state"]["model_params"]["descriptor"]
    descriptor[option] = value
    refused(load, state, message)


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("fitting_net", "atom_ener", 3, "fitting_net.atom_ener = 3 is not supported"),
        ("fitting_net", "neuron", [10**9], "fitting: .*less than or equal to 4096"),
        ("fitting_net", "precision", [1], "fitting_net.precision"),
        (None, "type_map", "HCO", "type_map = 'HCO' is not supported; supported: a list of chemical symbols"),
        (None, "type_map", [1, 2, 3], "type_map = .* is not supported"),
        (None, "model_dict", [1], r"its model_dict is \[1\], not a map of models"),
        (None, "bridging_method", ["ZBL"], "bridging_method"),
    ],
)
def test_malformed_sections_are_refused_by_name(state, load, section, option, value, message):
    params = state["_extra_state"]["model_params"]
    (params[section] if section else params)[option] = value
    refused(load, state, message)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (
            f"{NETWORK}output_layer.matrix",
            torch.tensor(float("nan")),
            r"matrix is not finite: 1 of its 1 values",
        ),
        (
            f"{NETWORK}output_layer.matrix",
            torch.zeros(40, 1, dtype=torch.int8),
            "has values of type int8; weights",
        ),
        (
            f"{NETWORK}output_layer.matrix",
            torch.zeros(1).expand(10**6, 10**6),
            "but the file stores 4 bytes for it",
        ),
        (f"{NETWORK}output_layer.matrix", torch.zeros(2, 2).to_sparse(), "only dense tensors are read"),
        (f"{NETWORK}output_layer.matrix", torch.empty(3, device="meta"), "only dense tensors are read"),
        (f"{DESCRIPTOR}version_tensor", torch.zeros(2), r"the format \[0.0, 0.0\], not a number"),
        (f"{DESCRIPTOR}version_tensor", torch.tensor(float("nan")), r"the format \[nan\], not a number"),
        (f"{DESCRIPTOR}version_tensor", "1.2", "has an unknown entry .*version_tensor"),
        (
            "model.Default.atomic_model.out_bias",
            torch.zeros(2),
            r"out_bias has shape \(2,\), its options require",
        ),
        (
            f"{FITTING}bias_atom_e",
            torch.zeros(1, 1),
            r"bias_atom_e has shape \(1, 1\), its options require \(3, 1\)",
        ),
        (
            f"{FITTING}bias_atom_e",
            torch.full((3, 1), 1e300, dtype=torch.float64),
            r"bias_atom_e has a value of 1e\+300; allowed",
        ),
        (f"{FITTING}case_embd", torch.zeros(5), "types or shapes|does not fit"),
    ],
)
def test_malformed_tensors_are_refused_by_name(state, load, entry, value, message):
    state[entry] = value
    refused(load, state, message)


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(state, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": state}, path)
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
        bomb.writestr("archive/data/zeros", bytes(10**7))
    (tmp_path / "bomb").rename(path)
    with pytest.raises(ValueError, match=r"model.pt: its [0-9,]+ bytes would unpack to [0-9,]+ bytes"):
        load_potential(path)


def test_a_flipped_bit_of_a_weight_is_told_by_the_checksum(state, tmp_path):
    path = tmp_path / "model.pt"
    key = f"{NETWORK}output_layer.matrix"
    state[key] = torch.full_like(state[key], 0.123456789)
    torch.save({"model": state}, path)
    content = bytearray(path.read_bytes())
    at = content.index(state[key][0].numpy().tobytes())
    content[at + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.pt: it is damaged, the checksum of its part '.*' is wrong"):
        load_potential(path)


def test_the_format_without_checksums_is_refused(state, tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="model.pt: it is damaged, or in the format of PyTorch before 1.6"):
        load_potential(path)


def test_training_infos_of_another_type_are_ignored(state, load):
    for infos in (None, 3, {"step": "7"}):
        state["_extra_state"]["train_infos"] = infos
        load(state)
