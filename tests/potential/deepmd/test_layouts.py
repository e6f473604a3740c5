"""Layouts of deepmd-kit checkpoints: the second runtime, files of June 2026, averaged weights, files from a GPU."""

import copy
import io
import zipfile

import numpy as np
import pytest
import torch

from deepmd_files import as_june_2026, as_pt_expt, energies_of, parameter_names
from dpa4.potential import model_card
from dpa4.potential.checkpoint import convert, load_potential, read_checkpoint
from dpa4.potential.deepmd.layouts import is_derived
from helpers import SHARED, graph_of, molecule, shared
from parity import ParityCase, assert_float64

GENERATION_3 = "reference/fixtures-gen3"
MODEL = "model.Default."
ATOMIC = f"{MODEL}atomic_model."
SEED = f"{ATOMIC}descriptor.env_seed_embedding."


def refused(load, content, message, **options):
    """The import fails with one line that names the file."""
    with pytest.raises(ValueError, match=message) as caught:
        load(content, **options)
    assert "model.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def load_file(tmp_path):
    """Save the whole content of a checkpoint and import it."""

    def save_and_import(content, **options):
        torch.save(content, tmp_path / "model.pt")
        return load_potential(tmp_path / "model.pt", **options)

    return save_and_import


# Files of the reference


@pytest.mark.parametrize("name", ["E_june2026_mini", "E_pt_expt_layout"])
def test_layouts_of_the_reference_have_its_numbers(name):
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(shared(f"{GENERATION_3}/{name}/ref.npz")) as file:
        for key in file.files:
            structure, quantity = key.split("/")
            found.setdefault(structure, {})[quantity] = file[key]
    case = ParityCase(name, SHARED / GENERATION_3 / name / "model_f32.pt", found)
    assert_float64(case, in_a_batch=True)


# The second runtime and June 2026


@pytest.mark.parametrize("change", [as_pt_expt, as_june_2026])
def test_other_layouts_are_the_same_model(potential, state, load, change):
    changed = change(state)
    assert changed.keys() != state.keys()
    assert torch.equal(energies_of(load(changed)), energies_of(potential))


def test_charge_and_spin_of_the_second_runtime(load):
    from dpa4.potential.deepmd.writer import deepmd_state
    from helpers import random_potential

    potential = random_potential(charge_spin=True)
    graph = graph_of(molecule(), charge_spin=(1, 2))
    imported = load(as_pt_expt(deepmd_state(potential)))
    assert torch.equal(imported(graph).atomic_energies, potential(graph).atomic_energies)


def test_the_card_names_the_second_runtime(state, load, tmp_path):
    load(as_pt_expt(state))
    assert "descriptor format 1.2, runtime pt_expt" in model_card(tmp_path / "model.pt").text
    load(state)
    assert "pt_expt" not in model_card(tmp_path / "model.pt").text


@pytest.mark.parametrize("change", [as_pt_expt, as_june_2026])
def test_exported_files_keep_the_numbers_of_every_layout(potential, state, load, tmp_path, change):
    load(change(state))
    convert(tmp_path / "model.pt", tmp_path / "exported.pt")
    stored = torch.load(tmp_path / "exported.pt", weights_only=True)["model"]
    assert stored.keys() == state.keys()
    assert torch.equal(energies_of(load_potential(tmp_path / "exported.pt")), energies_of(potential))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (f"{SEED}g_layer1.w", f"{SEED}g_layer1.matrix"),
        (
            f"{ATOMIC}descriptor.radial_embedding.net.0.w",
            f"{ATOMIC}descriptor.radial_embedding.net.0.matrix",
        ),
        (
            f"{ATOMIC}fitting_net.nets.networks.0.output_layer.w",
            f"{ATOMIC}fitting_net.filter_layers.networks.0.output_layer.matrix",
        ),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_files_that_mix_the_names_of_both_runtimes_are_refused(state, load, name, other, both):
    mixed = as_pt_expt(state)
    mixed[other] = mixed[name] if both else mixed.pop(name)
    short = other.removeprefix(ATOMIC)
    refused(
        load, mixed, f"mixes the names of .*: {short} belongs to pt, .* to pt_expt; supported: files of one"
    )


def test_copies_of_the_energy_network_must_agree(state, load):
    changed = as_pt_expt(state)
    name = "fitting_net.nets._networks.0.output_layer.w"
    changed[ATOMIC + name] = changed[ATOMIC + name] * 2
    refused(load, changed, f"copies of fitting_net.filter_layers.*output_layer.matrix differ; .* {name}")


def test_missing_and_unknown_parameters_of_the_second_runtime_are_named(state, load):
    changed = as_pt_expt(state)
    value = changed.pop(f"{SEED}g_layer1.w")
    refused(load, changed, "it misses descriptor.env_seed_embedding.g_layer1.matrix")
    changed[f"{SEED}g_layer1.w"] = value
    changed[f"{SEED}g_layer3.w"] = value
    refused(load, changed, "has the unknown entry descriptor.env_seed_embedding.g_layer3.matrix")


@pytest.mark.parametrize(
    "name",
    [
        "descriptor.blocks.0.so2_conv.weight",
        "descriptor.blocks.0.so2_conv.degree_index",
        "descriptor.gie.weight",
        "descriptor.projector.weight",
        "descriptor.blocks.0.so2_conv.mean",
        "fitting_net.graph_lower_disabled",
        "descriptor._empty_tensors",
    ],
)
def test_only_named_entries_are_derived(state, load, name):
    assert not is_derived(name)
    state[ATOMIC + name] = torch.zeros(3)
    refused(load, state, f"has the unknown entry {name}")


# Averaged weights


def with_averages(state, prefix="", factor=0.5):
    """Content of a checkpoint with averages, which are the parameters times a factor."""
    names = parameter_names(state)
    return {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "ema": {
            "decay": 0.999,
            "model": {prefix + name.removeprefix(MODEL): state[name] * factor for name in names},
            "validation_state": {},
        },
    }


def averaged(state, factor=0.5):
    """State with the averages as its ordinary weights."""
    return state | {name: state[name] * factor for name in parameter_names(state)}


def test_averages_are_imported_on_request(potential, state, load, load_file):
    expected = energies_of(load(averaged(state)))
    content = with_averages(state)
    assert torch.equal(energies_of(load_file(content)), energies_of(potential))
    assert torch.equal(energies_of(load_file(content, ema=True)), expected)
    assert not torch.equal(expected, energies_of(potential))


def test_averages_of_the_second_runtime(state, load, load_file):
    expected = energies_of(load(averaged(state)))
    content = with_averages(state)
    content["model"] = as_pt_expt(state)
    short = {name.removeprefix(MODEL): value for name, value in as_pt_expt(averaged(state)).items()}
    kept = {name.removeprefix(MODEL) for name in parameter_names(content["model"])}
    content["ema"]["model"] = {
        name: value
        for name, value in short.items()
        if name in kept and not is_derived(name.removeprefix("atomic_model."))
        and "_networks.0" not in name and not name.endswith("_min_nbor_dist")
    }  # fmt: skip
    assert torch.equal(energies_of(load_file(content, ema=True)), expected)


def test_exported_averages_are_ordinary_weights(state, load_file, tmp_path):
    expected = energies_of(load_file(with_averages(state), ema=True))
    convert(tmp_path / "model.pt", tmp_path / "exported.pt", ema=True)
    assert "ema" not in torch.load(tmp_path / "exported.pt", weights_only=True)
    assert torch.equal(energies_of(load_potential(tmp_path / "exported.pt")), expected)


def test_the_card_and_the_converted_file_say_whose_weights_they_are(state, load_file, tmp_path):
    load_file(with_averages(state))
    found = convert(tmp_path / "model.pt", tmp_path / "last.safetensors")
    assert found["averaged weights"].startswith("not imported; ")
    assert "dpa4 convert --ema imports" in model_card(tmp_path / "last.safetensors").text
    found = convert(tmp_path / "model.pt", tmp_path / "ema.safetensors", ema=True)
    assert found["averaged weights"] == "EMA of the weights, decay 0.999, imported from the entry ema"
    assert found["averaged weights"] in model_card(tmp_path / "ema.safetensors").text


def test_separate_files_of_averages_are_ordinary_ones(potential, state, tmp_path):
    path = tmp_path / "model_ema.ckpt-2000.pt"
    torch.save({"model": state}, path)
    assert torch.equal(energies_of(load_potential(path)), energies_of(potential))
    assert read_checkpoint(path).provenance["averaged weights"].startswith("imported; by its name")
    with pytest.raises(ValueError, match="model_ema.ckpt-2000.pt: it has no entry ema .* files with _ema in"):
        load_potential(path, ema=True)
    torch.save({"model": state}, tmp_path / "schema_emails.pt")
    assert "averaged weights" not in read_checkpoint(tmp_path / "schema_emails.pt").provenance


def test_native_files_have_no_averages(state, load_file, tmp_path):
    load_file(with_averages(state))
    convert(tmp_path / "model.pt", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: a model file of dpa4 holds one set of weights"):
        load_potential(tmp_path / "model.safetensors", ema=True)


@pytest.fixture
def branches(state):
    """Two branches that share their descriptor, as deepmd-kit stores them, and averages of both."""
    content = {"_extra_state": {"model_params": {"model_dict": {}}}}
    averages = {}
    for factor, name in ((0.5, "first"), (0.25, "second")):
        own = copy.deepcopy(state)
        if name == "second":
            own[f"{ATOMIC}fitting_net.filter_layers.networks.0.output_layer.matrix"] *= 3
        section = own.pop("_extra_state")["model_params"]
        content["_extra_state"]["model_params"]["model_dict"][name] = section
        for key in parameter_names(own):
            shared_one = "descriptor" in key
            averages[f"{name}.{key.removeprefix(MODEL)}"] = own[key] * (0.5 if shared_one else factor)
        content |= {key.replace("Default", name): value for key, value in own.items()}
    return {"model": content, "ema": {"decay": 0.99, "model": averages, "validation_state": {}}}


def test_averages_of_a_branch(branches, state, load, load_file):
    weights = averaged(state)
    assert torch.equal(energies_of(load_file(branches, branch="first", ema=True)), energies_of(load(weights)))
    for name in [name for name in parameter_names(state) if "fitting_net" in name]:
        weights[name] = state[name] * 0.25
    weights[f"{ATOMIC}fitting_net.filter_layers.networks.0.output_layer.matrix"] *= 3
    second = energies_of(load(weights))
    assert torch.equal(energies_of(load_file(branches, branch="second", ema=True)), second)
    means = branches["ema"]["model"]  # shared parameters once, under the name of the first branch
    for name in [name for name in means if name.startswith("second.atomic_model.descriptor")]:
        del means[name]
    assert torch.equal(energies_of(load_file(branches, branch="second", ema=True)), second)
    output = "second.atomic_model.fitting_net.filter_layers.networks.0.output_layer.matrix"
    del means[output]  # not shared: the values of the branches differ
    refused(load_file, branches, f"ema does not fit .*lacks {output[20:]}", branch="second", ema=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ema: ema.clear(), r"its entry ema is \{\}, not a map with the averages"),
        (
            lambda ema: ema["model"].popitem(),
            "does not fit its model: it lacks fitting_net.*output_layer.matrix",
        ),
        (lambda ema: ema["model"].update({"atomic_model.x": torch.ones(1)}), "it has the unknown entry x"),
        (
            lambda ema: ema["model"].update({"atomic_model.x": 1}),
            "ema has 1 for atomic_model.x, not a tensor",
        ),
        (
            lambda ema: ema["model"].update(
                {"atomic_model.descriptor.type_embedding.adam_type_embedding": torch.ones(4)}
            ),
            r"ema has descriptor.type_embedding.adam_type_embedding of shape \(4,\), its model of shape \(4, 8\)",
        ),
        (
            lambda ema: ema["model"].update(
                {"atomic_model.descriptor.type_embedding.adam_type_embedding": torch.full((4, 8), torch.nan)}
            ),
            "adam_type_embedding is not finite",
        ),
    ],
)
def test_averages_that_do_not_fit_are_refused(state, load_file, change, message):
    content = with_averages(state)
    change(content["ema"])
    refused(load_file, content, message, ema=True)


# Devices, sections without types


@pytest.mark.parametrize("device", ["cuda:0", "cuda:7", "xpu:1", "npu:0"])
def test_files_saved_on_another_device_are_read(potential, state, tmp_path, device):
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    tag = b"X\x03\x00\x00\x00cpu"
    new = b"X" + len(device).to_bytes(4, "little") + device.encode()
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as archive:
        for entry in old.namelist():
            data = old.read(entry)
            if entry.endswith("data.pkl"):
                assert tag in data
                data = data.replace(tag, new)
            archive.writestr(entry, data)
    assert torch.equal(energies_of(load_potential(path)), energies_of(potential))


def test_parameters_instead_of_tensors_are_read(potential, state, load):
    for name in parameter_names(state):
        state[name] = torch.nn.Parameter(state[name])
    assert torch.equal(energies_of(load(state)), energies_of(potential))
