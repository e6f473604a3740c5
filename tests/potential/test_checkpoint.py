"""Native checkpoints: nothing is lost, a crash destroys nothing, and files that do not fit are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpa4.model import DPA4, Bridging, ModelConfig
from dpa4.model.presets import PRESETS, preset
from dpa4.model.shapes import check_size, shapes_of
from dpa4.potential import Potential, fingerprint_of, model_card
from dpa4.potential.checkpoint import (
    convert,
    load_potential,
    read_checkpoint,
    save_potential,
)
from helpers import graph_of, molecule, random_potential, randomize

ENERGIES = {"H": -13.587654321098765, "C": -1029.5, "O": -2041.123456789012345}


def make_potential(dtype=torch.float32, **options):
    """Small potential with weights in which every digit of ``dtype`` is used."""
    potential = random_potential(**options).to(dtype)
    randomize(potential.model, seed=7, scale=0.1)
    energies = [ENERGIES[element] for element in potential.elements]
    potential.reference_energies.copy_(torch.tensor(energies, dtype=torch.float64))
    return potential


def energy_of(potential):
    """Energy of one structure, in eV."""
    return potential(graph_of(molecule())).energy


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_potential(make_potential(), path, {"data": "water.xyz"})
    return path


def rewrite(path, metadata=None, drop=(), **tensors):
    """Change a checkpoint: new metadata entries, left-out tensors, new tensors."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    content = {key: value for key, value in load_file(path).items() if key not in drop}
    save_file(content | tensors, path, old | (metadata or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact(tmp_path, dtype):
    potential = make_potential(dtype)
    save_potential(potential, tmp_path / "model.safetensors")
    loaded = load_potential(tmp_path / "model.safetensors")
    assert loaded.config == potential.config
    assert loaded.dtype == dtype
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == potential.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in potential.state_dict().items())
    assert loaded.reference_energies.dtype == torch.float64
    assert torch.equal(energy_of(loaded), energy_of(potential))


def test_configuration_with_nested_options_survives(tmp_path):
    bridging = Bridging(r_inner=0.6, r_outer=0.9)
    potential = make_potential(bridging=bridging, excluded_pairs=(("H", "H"),), l_schedule=(2, 1))
    save_potential(potential, tmp_path / "model.safetensors")
    config = load_potential(tmp_path / "model.safetensors").config
    assert config == potential.config
    assert (config.bridging, config.excluded_pairs, config.l_schedule) == (bridging, (("H", "H"),), (2, 1))


def test_precision_can_be_chosen(saved):
    double = load_potential(saved, dtype="float64")
    assert double.dtype == load_potential(saved, dtype=torch.float64).dtype == torch.float64
    for wrong in ("float16", torch.bfloat16):
        with pytest.raises(ValueError, match="dtype must be float32 or float64, got"):
            load_potential(saved, dtype=wrong)
    torch.testing.assert_close(energy_of(double), energy_of(load_potential(saved)), rtol=1e-6, atol=0)


def test_a_model_is_the_same_in_any_precision_and_file(saved, tmp_path):
    found = fingerprint_of(load_potential(saved))
    assert found == {"model": found["model"], "dtype": "float32", "precision": "high"}
    assert fingerprint_of(load_potential(saved, dtype=torch.float64)) == found | {"dtype": "float64"}
    convert(saved, tmp_path / "other.pt")
    assert fingerprint_of(load_potential(tmp_path / "other.pt")) == found
    fast = load_potential(saved)
    fast.model.block_autocast = torch.bfloat16
    assert fingerprint_of(fast) == found | {"precision": "fast"}


def test_new_options_do_not_change_the_fingerprint_of_earlier_models():
    """The digest is that of the version before symmetry and float32_cutoff."""
    sizes = {"channels": 4, "lmax": 1, "n_blocks": 1}
    potential = Potential(ModelConfig(elements=("H", "O"), edge_norm=True, **sizes)).float()
    with torch.no_grad():
        for p in potential.model.parameters():
            p.fill_(0.5)
    assert fingerprint_of(potential)["model"] == "8e73b2144e245dc2"
    same_shapes = potential.config.model_copy(update={"float32_cutoff": True})
    other = Potential(same_shapes).float()
    other.load_state_dict(potential.state_dict())
    assert fingerprint_of(other)["model"] != "8e73b2144e245dc2"


def test_another_model_is_told_apart():
    models = [make_potential() for _ in range(3)]
    with torch.no_grad():
        next(reversed(list(models[0].parameters()))).flatten()[0] *= 1 + 1e-6  # rounding is 6e-8
    models[1].reference_energies[2] += 1e-9
    models.append(make_potential(excluded_pairs=(("H", "H"),)))
    assert len({fingerprint_of(model)["model"] for model in models}) == 4


def test_metadata_describe_the_model_without_the_weights(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "dpa4"
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["elements"]) == ["H", "C", "O"]
    assert json.loads(metadata["reference_energies"]) == ENERGIES
    assert ModelConfig.model_validate_json(metadata["config"]) == make_potential().config
    provenance = json.loads(metadata["provenance"])
    assert provenance["data"] == "water.xyz"
    assert {"dpa4 version", "date"} < provenance.keys()


def test_a_crash_while_saving_leaves_the_old_file(saved, monkeypatch):
    def crash(path):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    old = saved.read_bytes()
    monkeypatch.setattr("dpa4.output.files.flush_to_disk", crash)
    with pytest.raises(OSError, match="disk full"):
        save_potential(make_potential(), saved)
    assert saved.read_bytes() == old
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_conversion_to_deepmd_and_back_keeps_energies_and_records_the_parent(saved):
    exported, back = saved.with_suffix(".pt"), saved.with_name("back.safetensors")
    convert(saved, exported)
    convert(exported, back)
    assert torch.equal(energy_of(load_potential(back)), energy_of(load_potential(saved)))
    provenance = read_checkpoint(back).provenance
    assert provenance["parent file"] == "model.pt"
    assert provenance["parent format"] == "deepmd-kit checkpoint, descriptor format 1.2"


def test_the_content_decides_not_the_suffix(saved):
    convert(saved, saved.with_suffix(".pt"))
    renamed = saved.with_suffix(".pt").rename(saved.with_name("renamed.safetensors"))
    assert torch.equal(energy_of(load_potential(renamed)), energy_of(load_potential(saved)))


def test_unknown_suffixes_are_refused(saved):
    with pytest.raises(ValueError, match=r"model files end in \.safetensors, got 'model\.pt'"):
        save_potential(make_potential(), saved.with_suffix(".pt"))
    with pytest.raises(
        ValueError, match=r"cannot convert to 'model\.onnx'; the target must end in \.safetensors or"
    ):
        convert(saved, saved.with_suffix(".onnx"))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model file .*absent\.safetensors"):
        load_potential(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder .*absent; create it first"):
        save_potential(make_potential(), tmp_path / "absent" / "model.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -40])
def test_truncated_files_are_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot read .*(damaged or incomplete|cut off)"):
        load_potential(saved)


def test_other_files_are_refused(tmp_path, saved):
    text = tmp_path / "notes.safetensors"
    text.write_text("not a checkpoint at all")
    with pytest.raises(
        ValueError, match=r"neither a model file of dpa4 \(.safetensors\) nor a checkpoint of deepmd-kit"
    ):
        load_potential(text)
    save_file({"weight": torch.zeros(3)}, text, {"format": "pt"})
    with pytest.raises(ValueError, match="a safetensors file, but not of a DPA4 potential"):
        load_potential(text)
    save_file({"weight": torch.zeros(3)}, text)
    with pytest.raises(ValueError, match="a safetensors file, but not of a DPA4 potential"):
        load_potential(text)


def test_newer_and_unreadable_formats_are_refused(saved):
    rewrite(saved, {"format_version": "2"})
    with pytest.raises(
        ValueError, match="has format 2, written by a newer dpa4; this version reads formats up to 1"
    ):
        load_potential(saved)
    rewrite(saved, {"format_version": "new"})
    with pytest.raises(ValueError, match="its format_version is 'new', not a number"):
        load_potential(saved)


def test_an_invalid_configuration_is_refused(saved):
    rewrite(saved, {"config": make_potential().config.model_dump_json().replace('"lmax"', '"lmxa"')})
    with pytest.raises(ValueError, match="its configuration is not valid: .*lmxa"):
        load_potential(saved)


def test_weights_that_do_not_fit_are_named(saved):
    rewrite(saved, drop=["model.types.table"])
    with pytest.raises(ValueError, match="types.table is missing"):
        load_potential(saved)
    rewrite(saved, **{"model.types.table": torch.zeros(2, 8), "model.extra": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"extra is unknown, types.table has shape \(2, 8\) instead of \(4, 8\)"
    ):
        load_potential(saved)
    rewrite(saved, drop=["reference_energies"])
    with pytest.raises(ValueError, match="it has no entry reference_energies"):
        load_potential(saved)
    rewrite(saved, reference_energies=torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"reference_energies has shape \(5,\) instead of \(3,\)"):
        load_potential(saved)


def test_many_problems_are_counted(saved):
    keys = [key for key in load_file(saved) if key.startswith("model.blocks")]
    rewrite(saved, drop=keys)
    with pytest.raises(ValueError, match=f"is missing and {len(keys) - 5} more"):
        load_potential(saved)


def test_branches_belong_to_multitask_models(saved):
    with pytest.raises(ValueError, match="holds a single model, so there is no branch 'water'"):
        load_potential(saved, branch="water")


# Damaged, edited and hostile files


def edited(path, **options):
    """Change options in the configuration of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(path, {"config": json.dumps(config | options)})


def every_reader_refuses(path, message):
    """Loading, describing and converting a file fail with one line, which names the file."""
    readers = (load_potential, model_card, lambda file: convert(file, path.with_name("out.safetensors")))
    for reader in readers:
        with pytest.raises(ValueError, match=message) as caught:
            reader(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not path.with_name("out.safetensors").exists()


def test_an_edited_file_is_told(saved):
    untouched = saved.read_bytes()
    key = "model.types.table"
    weight = load_file(saved)[key]
    rewrite(saved, **{key: weight * (1 + 1e-6)})
    every_reader_refuses(
        saved, "not those that dpa4 wrote .* edited.*remove the entry digest from the metadata"
    )
    for metadata in ({"provenance": '{"data": "other.xyz"}'}, {"elements": '["H", "C", "N"]'}):
        saved.write_bytes(untouched)
        rewrite(saved, metadata)
        every_reader_refuses(saved, "the digest differs")
    saved.write_bytes(untouched)
    edited(saved, cutoff=4.5)
    every_reader_refuses(saved, "the digest differs")
    saved.write_bytes(untouched)
    rewrite(saved, {"digest": "0"})
    every_reader_refuses(saved, "the digest differs")


def test_the_digest_is_that_of_the_content_and_the_card_shows_it(saved):
    digest = read_checkpoint(saved).digest
    assert digest is not None and "weights and options are those that were written" in model_card(saved).text
    rewrite(saved)
    assert read_checkpoint(saved).digest == digest  # the order in the file does not matter


def test_files_without_a_digest_are_read(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "digest"}
    save_file(load_file(saved), saved, metadata)
    assert read_checkpoint(saved).digest is None
    assert "integrity" not in model_card(saved).sections["Provenance"]
    load_potential(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, value):
    key = "model.blocks.1.conv.pre_mix.weight"
    weight = load_file(saved)[key]
    weight.view(-1)[3] = value
    rewrite(saved, **{key: weight})
    every_reader_refuses(saved, f"{key} is not finite: 1 of its {weight.numel()} values")


def test_absurd_weights_are_refused_by_name(saved):
    key = "model.types.table"
    rewrite(saved, **{key: load_file(saved)[key] - 1e30})
    every_reader_refuses(saved, f"{key} has a value of 1e\\+30; allowed are weights up to 1e\\+08")


def test_weights_that_are_not_finite_are_not_written(saved):
    potential, before = make_potential(), saved.read_bytes()
    with torch.no_grad():
        potential.model.types.table[0, 0] = float("nan")
    with pytest.raises(ValueError, match="cannot write .*model.types.table is not finite"):
        save_potential(potential, saved)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_types_are_refused(saved, dtype):
    rewrite(saved, **{"model.types.table": torch.zeros(4, 8).to(dtype)})
    every_reader_refuses(saved, "model.types.table has values of type .*; allowed are F64, F32, F16, BF16")


def test_half_precision_is_widened(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "digest"}
    half = {key: v.half() if key.startswith("model.") else v for key, v in load_file(saved).items()}
    save_file(half, saved, metadata)
    assert load_potential(saved).dtype == torch.float32


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_blocks", 10**6),
        ("mixing_layers", 10**6),
        ("ffn_blocks", 10**6),
        ("radial_mlp", [64] * 200_000),
        ("fitting", [64] * 200_000),
        ("channels", 16384),
        ("n_radial", 10**7),
        ("n_focus", 10**6),
        ("message_grid", 10**20),
        ("cutoff", 4500.0),
        ("cutoff", 1e200),
        ("env_exp", [10**9, 5]),
        ("elements", ["H"] * 10**5),
        ("kmax", 10**6),
        ("readout_layers", 10**6),
        ("excluded_pairs", [["H", "H"]] * 8000),
        ("default_charge_spin", [10**6, 1]),
    ],
)
def test_huge_options_are_refused_by_name(saved, option, value):
    edited(saved, **{option: value})
    every_reader_refuses(saved, f"its configuration is not valid: {option}: .* at most|less than or equal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_blocks": 64}, "64 blocks with mixing_layers = 4 and ffn_blocks = 1 need at least 385 tensors"),
        ({"ffn_blocks": 16, "mixing_layers": 32, "n_blocks": 2}, "need at least 99 tensors|is missing"),
        ({"channels": 1024}, r"has shape .* instead of .* and \d+ more"),
        ({"lmax": 10}, r"has shape .* instead of .* and \d+ more"),
        ({"n_focus": 16, "focus_dim": 1024}, r"has shape .* instead of .* and \d+ more"),
    ],
)
def test_options_within_the_limits_are_compared_with_the_weights_before_anything_is_built(
    saved, monkeypatch, options, message
):
    """No constant of the network is computed: those of degree 10 need 4 GB."""
    monkeypatch.setattr("dpa4.model.grid.grid_matrices", None)
    monkeypatch.setattr("dpa4.model.harmonics.coupling", None)
    edited(saved, **options)
    every_reader_refuses(saved, message)


def test_the_published_models_and_larger_ones_are_within_the_limits():
    ultra = preset("pro", channels=128, lmax=6, n_blocks=10, n_focus=3)
    assert len(ultra.elements) == 118
    check_size(ultra)
    check_size(preset("pro", lmax=10))
    with pytest.raises(
        ValueError, match="parameters, at most 1,000,000,000 are supported; lower model.channels"
    ):
        check_size(preset("pro", channels=1024, lmax=10))


@pytest.mark.parametrize("name", [*PRESETS])
def test_shapes_are_those_of_the_network(name):
    config = preset(
        name,
        elements=("H", "C"),
        n_blocks=1,
        channels=16,
        charge_spin=True,
        mlp_bias=name == "mini",
        basis="gaussian",
    )
    assert shapes_of(config) == {key: value.shape for key, value in DPA4(config).state_dict().items()}


@pytest.mark.parametrize("text", ["", "x", "[" * 100_000, "null", "[]", '"x"', '{"data": 1}', '{"data": {}}'])
def test_malformed_provenance_is_refused(saved, text):
    rewrite(saved, {"provenance": text})
    every_reader_refuses(saved, "its entry provenance (is|has) ")


@pytest.mark.parametrize("version", ["1" * 5000, "²", "-1", "1.5", ""])
def test_malformed_versions_are_refused(saved, version):
    rewrite(saved, {"format_version": version})
    every_reader_refuses(saved, "its format_version is '.*', not a number")


@pytest.mark.parametrize(
    ("energies", "message"),
    [
        (torch.zeros(3, 1, dtype=torch.float64), r"has shape \(3, 1\) instead of \(3,\)"),
        (torch.zeros(2, dtype=torch.float64), r"has shape \(2,\) instead of \(3,\)"),
        (torch.tensor([0.0, float("nan"), 0.0]), "reference energy of C is nan eV; allowed are finite"),
        (torch.tensor([0.0, 0.0, 1e300], dtype=torch.float64), r"reference energy of O is 1e\+300 eV"),
        (torch.zeros(3, dtype=torch.complex64), "reference_energies has values of type C64"),
        (torch.zeros(3, dtype=torch.float16), "reference_energies has values of type float16, not float64"),
    ],
)
def test_malformed_reference_energies_are_refused(saved, energies, message):
    rewrite(saved, reference_energies=energies)
    every_reader_refuses(saved, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cutoff": 1%s, "elements": ["H"], "shortest": null}' % ("0" * 400), "has 401 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"cutoff": 4, "elements": "H", "shortest": null}', "elements = 'H', not a list"),
        ('{"cutoff": 4, "elements": ["H"], "shortest": {"H-H": NaN}}', "H-H = nan, not a length"),
        ('{"cutoff": true, "elements": ["H"], "shortest": null}', "cutoff = True, not a length"),
    ],
)
def test_malformed_coverage_is_refused(saved, text, message):
    rewrite(saved, {"coverage": text})
    every_reader_refuses(saved, f"its entry coverage is not a description of training data: .*{message}")


def test_control_characters_in_the_provenance_do_not_reach_the_terminal(saved):
    save_potential(make_potential(), saved, {"data": "a\x1b[2Jb\nc"})
    assert model_card(saved).sections["Provenance"]["data"] == r"a\x1b[2Jb\nc"
