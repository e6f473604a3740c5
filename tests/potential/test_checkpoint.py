"""Native checkpoints: nothing is lost, a crash destroys nothing, and files that do not fit are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpa4.model import Bridging, ModelConfig
from dpa4.potential import fingerprint_of
from dpa4.potential.checkpoint import convert, load_potential, read_checkpoint, save_potential
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
    monkeypatch.setattr("dpa4.output.flush_to_disk", crash)
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
    with pytest.raises(ValueError, match=r"checkpoints end in \.safetensors, got 'model\.pt'"):
        save_potential(make_potential(), saved.with_suffix(".pt"))
    with pytest.raises(
        ValueError, match=r"cannot convert to 'model\.onnx'; the target must end in \.safetensors or"
    ):
        convert(saved, saved.with_suffix(".onnx"))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*absent\.safetensors"):
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
        ValueError, match="neither a .safetensors checkpoint nor a PyTorch file of deepmd-kit"
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
