"""Training inputs of deepmd-kit become run files, and everything that is different there is listed."""

import copy
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.data import read_frames
from dpa4.model.presets import ALL_ELEMENTS, preset
from dpa4.potential import load_potential
from dpa4.potential.deepmd.options import config_from_deepmd
from dpa4.training import convert_input, load_run_config, train
from helpers import shared
from training_runs import SILENT

INPUT = {
    "_comment": "the recipe of the released Mini for OMat24",
    "model": {
        "type": "SeZM",
        "type_map": ["O", "H"],
        "descriptor": {
            "sel": 416,
            "edge_norm": False,
            "lmax": 2,
            "n_blocks": 2,
            "use_amp": False,
            "seed": 42,
        },
        "fitting_net": {"neuron": [0], "_note": "one hidden layer"},
    },
    "learning_rate": {
        "type": "cosine",
        "start_lr": 0.001,
        "stop_lr": 1e-6,
        "warmup_ratio": 0.003,
        "warmup_start_factor": 0.2,
    },
    "loss": {
        "type": "ener",
        "loss_func": "mae",
        "f_use_norm": True,
        "start_pref_e": 20,
        "limit_pref_e": 20,
        "start_pref_f": 20,
        "limit_pref_f": 20,
        "start_pref_v": 5,
        "limit_pref_v": 5,
    },
    "optimizer": {"type": "HybridMuon", "weight_decay": 0.002},
    "training": {
        "training_data": {"systems": ["water"], "batch_size": "mix:1000"},
        "num_epochs": 9,
        "gradient_max_norm": 5,
        "enable_ema": True,
        "ema_decay": 0.99,
        "seed": 7,
        "zero_stage": 1,
    },
}


def changed(section: str, **entries) -> dict:
    """Copy of the input with other entries in a section, such as "model.descriptor"; None removes an entry."""
    values = copy.deepcopy(INPUT)
    where = values
    for part in section.split("."):
        where = where.setdefault(part, {})
    where.update(entries)
    for key in [key for key, value in entries.items() if value is None]:
        del where[key]
    return values


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Function that converts an input in a folder with data; returns the run and the differences by option."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "water").mkdir()

    def run(values: dict):
        (tmp_path / "input.json").write_text(json.dumps(values))
        translated = convert_input("input.json", "run.yaml")
        return load_run_config("run.yaml"), {option: remark for option, _, remark in translated.differences}

    return run


def write_water(folder, frames: int = 6) -> None:
    """Write a deepmd system of water molecules in a box with energies, forces and virials of springs."""
    rng = np.random.default_rng(0)
    coord = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]) + 0.05 * rng.normal(size=(frames, 3, 3))
    (folder / "set.000").mkdir(parents=True)
    (folder / "type.raw").write_text("0\n1\n1\n")
    (folder / "type_map.raw").write_text("O\nH\n")
    arrays = {
        "coord": coord.reshape(frames, 9),
        "box": np.tile(8.0 * np.eye(3).reshape(9), (frames, 1)),
        "energy": 0.5 * (coord**2).sum((1, 2)),
        "force": -coord.reshape(frames, 9),
        "virial": 0.01 * rng.normal(size=(frames, 9)),
    }
    for name, array in arrays.items():
        np.save(folder / "set.000" / f"{name}.npy", array)


# --- the whole way


@pytest.mark.usefixtures("no_figures")
def test_a_translated_run_trains_the_network_of_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_water(tmp_path / "project" / "data" / "train")
    write_water(tmp_path / "project" / "data" / "valid", 2)
    values = INPUT | {
        "model": {"preset": "DPA4-Nano-v20260911", "type_map": ["O", "H"]},
        "training": {
            "training_data": {"systems": ["data/train"], "batch_size": 2},
            "validation_data": {"systems": "data/valid", "batch_size": 1},
            "numb_steps": 3,
            "seed": 1,
        },
    }
    (tmp_path / "project" / "input.json").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["convert", "project/input.json", "run.yaml"])
    assert result.exit_code == 0, result.output
    config = load_run_config("run.yaml", ["device=cpu", "training.precision=high"])
    assert len(read_frames(config.data.train)) == 6 and len(read_frames(config.data.validation)) == 2
    best = train(config, console=SILENT)
    assert load_potential(best).config == preset("dpa4-nano-v20260911", ("O", "H"))


def test_the_command_lists_what_is_different_and_what_has_no_influence(convert, tmp_path):
    (tmp_path / "input.json").write_text(json.dumps(changed("loss", start_pref_f=1000)))
    output = CliRunner().invoke(app, ["convert", "input.json", "run.yaml"], env={"COLUMNS": "200"}).output
    assert "loss.start_pref_f" in output and "weights are constant here" in output
    assert "training.zero_stage = 1" in output and "model.descriptor.sel = 416" in output
    assert "then run: dpa4 train run.yaml" in output
    text = (tmp_path / "run.yaml").read_text()
    assert "# * loss.start_pref_f = 1000: weights are constant here" in text
    assert "exists" in CliRunner().invoke(app, ["convert", "input.json", "run.yaml"]).output
    wrong = CliRunner().invoke(app, ["convert", "input.json", "model.safetensors"])
    assert wrong.exit_code == 1 and "must end in .yaml" in wrong.output.replace("\n", " ")


def test_every_entry_is_translated_listed_or_named_as_unused(tmp_path, convert):
    """No key of the published recipe disappears; the keys that are translated have another value in the run file."""
    run, differences = convert(INPUT)
    assert differences == {}
    training = run.training
    assert (training.epochs, training.max_atoms, training.batch_size) == (9, 1000, None)
    assert (training.schedule, training.learning_rate, training.final_learning_rate) == ("cosine", 1e-3, 1e-6)
    assert (training.warmup_fraction, training.warmup_factor) == (0.003, 0.2)
    assert (training.optimizer, training.weight_decay) == ("hybrid_muon", 0.002)
    assert (training.loss, training.energy_weight, training.forces_weight, training.virial_weight) == (
        "mae",
        20,
        20,
        5,
    )
    assert (training.gradient_clip, training.ema_decay, training.seed) == (5, 0.99, 7)
    assert training.precision == "high"
    assert (run.data.validation, run.data.validation_fraction) == ((), 0)  # deepmd-kit splits nothing off
    assert [str(path) for path in run.data.train] == ["water"]


# --- the model


@pytest.mark.parametrize("name", ["dpa4-mini-v20260820", "dpa4-neo-v20260901", "dpa4-Ultra-V20260911"])
def test_presets_fill_in_what_the_input_leaves_out(convert, name):
    run, _ = convert(INPUT | {"model": {"preset": name}})
    assert run.model.build(()) == preset(name, ALL_ELEMENTS)


def test_entries_of_the_input_have_precedence_over_the_preset(convert):
    model = {
        "preset": "dpa4-mini-v20260911",
        "type_map": ["Cu"],
        "descriptor": {"rcut": 5.0, "ffn_so3_grid": False, "so3_readout": "none", "edge_norm": False},
        "fitting_net": {"neuron": [32]},
        "bridging_method": "ZBL",
        "bridging_r_inner": 0.6,
    }
    run, _ = convert(INPUT | {"model": model})
    changes = {"cutoff": 5.0, "ffn_on": "s2", "so3_readout": "none", "edge_norm": False, "fitting": (32,)}
    bridging = {"r_inner": 0.6, "r_outer": 0.8, "smooth_cutoff": False}
    assert run.model.build(()) == preset("dpa4-mini-v20260911", ("Cu",), bridging=bridging, **changes)


def test_a_composed_model_with_bridging_and_preset(convert):
    network = {"type": "dpa4", "preset": "dpa4-mini-v20260820", "descriptor": {"rcut": 5.0}}
    repulsion = {"type": "inner_potential", "mode": "ZBL", "r_inner": 0.4, "r_outer": 0.7}
    model = {"type": "linear_ener", "weights": "sum", "type_map": ["Cu"], "models": [network, repulsion]}
    run, _ = convert(INPUT | {"model": model})
    bridging = {"r_inner": 0.4, "r_outer": 0.7, "smooth_cutoff": False}
    assert run.model.build(()) == preset("dpa4-mini-v20260820", ("Cu",), cutoff=5.0, bridging=bridging)


def test_a_model_without_preset_is_that_of_the_importer(convert):
    complete = INPUT["model"] | {
        "descriptor": INPUT["model"]["descriptor"] | {"type": "dpa4"},
        "fitting_net": INPUT["model"]["fitting_net"] | {"type": "dpa4_ener"},
    }
    assert convert(INPUT)[0].model.build(()) == config_from_deepmd(complete)


@pytest.mark.parametrize(
    ("section", "entries", "message"),
    [
        (
            "model.descriptor",
            {"nonsense": 3},
            "descriptor.nonsense = 3 is not an option of a known DPA4 format",
        ),
        ("model.descriptor", {"edge_cartesian": True}, "descriptor.edge_cartesian = True is not supported"),
        ("model", {"type": "standard"}, "it is not a DPA4 model but one of type 'standard'"),
        ("model", {"preset": "dpa4-max-v20260820"}, "max exists as dpa4-max-v20260901"),
        ("model", {"preset": 3}, "model.preset = 3 must be the name of a preset"),
        ("model", {"model_dict": {}}, "an input with several branches cannot be translated"),
        (
            "model",
            {"descriptor": None},
            "it is not a DPA4 model but one of type 'SeZM' with descriptor 'none'",
        ),
        ("model", {"descriptor": [1]}, r"model.descriptor = \[1\] must be a map of options"),
        (
            "model.fitting_net",
            {"dim_case_embd": 2},
            "fitting_net.dim_case_embd = 2 is not supported for training",
        ),
        ("loss", {"type": "dens"}, "loss.type = 'dens' is not supported; supported: 'ener'"),
        ("loss", {"start_pref_e": "big"}, "loss.start_pref_e = 'big' must be a number"),
        ("loss", {"limit_pref_e": 0, "limit_pref_f": 0, "limit_pref_v": 0}, "are all 0: nothing to learn"),
        (
            "training.training_data",
            {"systems": 3},
            "training.training_data.systems = 3 must be a folder or a list",
        ),
        ("training", {"seed": "x"}, "training.seed = 'x': input should be a valid integer"),
        ("learning_rate", {"type": "exp", "decay_rate": -1}, "learning_rate.decay_rate = -1 must be above 0"),
    ],
)
def test_inputs_that_are_refused(convert, section, entries, message):
    with pytest.raises(ValueError, match=message) as error:
        convert(changed(section, **entries))
    assert str(error.value).startswith("cannot translate input.json: ")


def test_files_that_are_no_input(convert, tmp_path):
    with pytest.raises(ValueError, match="input.json: it is not a training input of deepmd-kit"):
        convert({"model": {}})
    (tmp_path / "input.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no input .*input\.json"):
        convert_input(tmp_path / "input.json", tmp_path / "run.yaml")
    (tmp_path / "input.json").write_text("{1")
    with pytest.raises(ValueError, match=r"input\.json is not valid JSON"):
        convert_input(tmp_path / "input.json", tmp_path / "run.yaml")
    (tmp_path / "input.json").write_text('{"a":' * 50 + "1" + "}" * 50)
    with pytest.raises(ValueError, match="nested too deeply"):
        convert_input(tmp_path / "input.json", tmp_path / "run.yaml")


# --- the recipe: an entry of the input, options of the run, entries that are listed

E, LR, T = "loss", "learning_rate", "training"
CASES = [
    # loss
    (E, {"loss_func": "mse"}, {"loss": "mse"}, ["loss.intensive_ener_virial"]),
    (E, {"loss_func": "mse", "intensive_ener_virial": True, "f_use_norm": None}, {"loss": "mse"}, []),
    (E, {"f_use_norm": False}, {"loss": "mae"}, ["loss.f_use_norm"]),
    (E, {"loss_func": "mse", "use_huber": True, "huber_delta": 0.02}, {"loss": "huber", "huber_delta": 0.02}, []),
    (E, {"loss_func": "mse", "use_huber": True, "huber_delta": [0.1, 0.2, 0.3]}, {"huber_delta": 0.1},
     ["loss.huber_delta"]),
    (E, {"loss_func": "mse", "use_huber": True, "f_use_norm": False}, {"loss": "huber"}, ["loss.f_use_norm"]),
    (E, {"use_huber": True}, {"loss": "mae"}, ["loss.use_huber"]),
    (E, {"loss_func": "cosh"}, {"loss": "mae"}, ["loss.loss_func"]),
    (E, {"start_pref_e": 0.02, "limit_pref_e": 1}, {"energy_weight": 1}, ["loss.start_pref_e"]),
    (E, {"start_pref_v": 0, "limit_pref_v": 1}, {"virial_weight": 0}, []),
    (E, {"start_pref_h": 1, "limit_pref_h": 1}, {}, ["loss.start_pref_h", "loss.limit_pref_h"]),
    (E, {"start_pref_ae": 0.0, "relative_f": None, "surprise": 1}, {}, ["loss.surprise"]),
    # optimiser
    ("optimizer", {"type": "AdamW", "weight_decay": 0.01, "adam_beta2": 0.95},
     {"optimizer": "adamw", "weight_decay": 0.01}, []),
    ("optimizer", {"type": "Adam", "weight_decay": None}, {"optimizer": "adamw", "weight_decay": 0},
     ["optimizer.adam_beta2"]),
    ("optimizer", {"type": "LKF"}, {"optimizer": "hybrid_muon"}, ["optimizer.type", "optimizer.weight_decay"]),
    ("optimizer", {"momentum": 0.9, "magma_muon": True, "muon_mode": "2d"}, {},
     ["optimizer.momentum", "optimizer.muon_mode"]),
    # learning rate
    (LR, {"type": "wsd", "decay_phase_ratio": 0.65, "decay_type": "cosine"},
     {"schedule": "wsd", "decay_fraction": 0.65}, []),
    (LR, {"type": "wsd"}, {"decay_fraction": 0.1}, ["learning_rate.decay_type"]),
    (LR, {"type": "exp", "smooth": True}, {"schedule": "exp", "final_learning_rate": 1e-6}, []),
    (LR, {"type": "exp", "decay_steps": 100}, {"schedule": "exp"}, ["learning_rate.decay_steps"]),
    (LR, {"type": "exp", "smooth": True, "decay_rate": 0.9}, {}, ["learning_rate.decay_rate"]),
    (LR, {"type": "step"}, {"schedule": "wsd"}, ["learning_rate.type"]),
    (LR, {"stop_lr": None, "stop_lr_ratio": 0.01}, {"final_learning_rate": 1e-5}, []),
    (LR, {"stop_lr": None}, {"final_learning_rate": 1e-8}, ["learning_rate.stop_lr"]),
    (LR, {"warmup_ratio": None, "warmup_steps": 100}, {"warmup_fraction": 0}, ["learning_rate.warmup_steps"]),
    (LR, {"warmup_ratio": None}, {"warmup_fraction": 0}, []),
    (LR, {"warmup_steps": 3}, {"warmup_fraction": 0}, ["learning_rate.warmup_ratio", "learning_rate.warmup_steps"]),
    (LR, {"stop_lr_ratio": 0.1}, {"final_learning_rate": 1e-6}, ["learning_rate.stop_lr_ratio"]),
    # length and loop
    (T, {"num_epochs": None, "numb_epoch": 2.5}, {"epochs": 3}, ["training.numb_epoch"]),
    (T, {"numb_epoch": 2}, {"epochs": 2}, ["training.num_epochs"]),
    (T, {"numb_steps": 50}, {"steps": 50, "epochs": None}, ["training.num_epochs"]),
    (T, {"num_epochs": None}, {"steps": None, "epochs": None}, ["training.numb_steps"]),
    (T, {"gradient_max_norm": 0, "enable_ema": False}, {"gradient_clip": None, "ema_decay": None}, []),
    (T, {"disp_freq": 10, "save_freq": 200, "tensorboard": True},
     {"log_interval": 10, "checkpoint_interval": 200, "tensorboard": True}, []),
    (T, {"change_bias_after_training": True, "mystery": 1}, {},
     ["training.change_bias_after_training", "training.mystery"]),
    ("validating", {"full_validation": True}, {}, ["validating.full_validation"]),
    ("nvnmd", {"version": 1}, {}, ["nvnmd"]),
    # what the model section says about training
    ("model", {"use_compile": True, "lora": {"rank": 4}}, {"compile": True}, ["model.lora"]),
    ("model.descriptor", {"use_amp": None}, {"precision": "fast"}, ["model.descriptor.use_amp"]),
    ("model.descriptor", {"precision": "float64", "trainable": False}, {},
     ["model.descriptor.precision", "model.descriptor.trainable"]),
    ("model.fitting_net", {"atom_ener": [None, 1.0]}, {}, ["model.fitting_net.atom_ener"]),
    ("model", {"preset_out_bias": {"energy": [-1.0, None]}}, {}, ["model.preset_out_bias"]),
    ("model.fitting_net", {"vacuum_ref": True}, {}, []),  # no effect without preset_out_bias, in deepmd-kit either
]  # fmt: skip


@pytest.mark.parametrize(("section", "entries", "expected", "listed"), CASES)
def test_entries_and_their_options(convert, section, entries, expected, listed):
    run, differences = convert(changed(section, **entries))
    assert {name: getattr(run.training, name) for name in expected} == expected
    assert sorted(differences) == sorted(listed)


BATCHES = [
    ("auto", {"max_atoms": 32}, False),
    ("auto:256", {"max_atoms": 256}, False),
    ("max:100", {"max_atoms": 100}, False),
    ("mix:10000", {"max_atoms": 10000}, False),
    ("filter:300", {"max_atoms": 300}, True),
    ("mixed:4", {"batch_size": 4}, False),
    (3, {"batch_size": 3}, False),
    ([2, 2], {"batch_size": 2}, False),
    ([1, 4], {"batch_size": 4}, True),
    ("auto:many", {"batch_size": None, "max_atoms": None}, True),
    (-1, {"batch_size": None, "max_atoms": None}, True),
]


@pytest.mark.parametrize(("size", "expected", "listed"), BATCHES)
def test_sizes_of_batches(convert, size, expected, listed):
    run, differences = convert(changed("training.training_data", batch_size=size))
    assert {name: getattr(run.training, name) for name in expected} == expected
    assert bool(differences) == listed


@pytest.mark.parametrize(
    ("steps", "warmup"), [(2_000_000, 5000), (3_000_000, 5000), (7, 3), (999_983, 77_777)]
)
def test_steps_of_the_warm_up_are_exact(convert, steps, warmup):
    values = changed("learning_rate", warmup_ratio=None, warmup_steps=warmup)
    values["training"] |= {"num_epochs": None, "numb_steps": steps}
    run, _ = convert({**values, "training": {k: v for k, v in values["training"].items() if v is not None}})
    assert int(run.training.warmup_fraction * steps) == warmup


def test_a_given_decay_rate_becomes_the_final_learning_rate(convert):
    values = changed(
        "learning_rate", type="exp", smooth=True, decay_rate=0.5, decay_steps=100, warmup_ratio=None
    )
    values["training"]["numb_steps"] = 300
    del values["training"]["num_epochs"]
    run, differences = convert(values)
    assert run.training.final_learning_rate == pytest.approx(1e-3 / 8)
    assert differences == {}
    values["learning_rate"]["stop_lr"] = 1e-3 / 4
    run, differences = convert(values)
    assert run.training.final_learning_rate == 1e-3 / 4 and [*differences] == ["learning_rate.decay_rate"]


@pytest.mark.parametrize(("name", "expected"), [("v20260911", True), ("v20260901", False)])
def test_the_optimiser_is_that_of_the_version_that_reads_the_model(convert, name, expected):
    run, differences = convert(
        INPUT | {"model": {"preset": f"dpa4-mini-{name}", "descriptor": {"use_amp": False}}}
    )
    assert run.training.adam_for_basis == expected and differences == {}


def test_the_reference_of_an_isolated_atom_is_listed(convert):
    values = changed("model", preset_out_bias={"energy": [-2.0, -1.0]})
    values["model"]["fitting_net"]["vacuum_ref"] = True
    run, differences = convert(values)
    assert run.data.reference_energies == {"O": -2.0, "H": -1.0}
    assert [*differences] == ["model.fitting_net.vacuum_ref"]


def test_energies_of_all_elements_become_reference_energies(convert):
    run, differences = convert(changed("model", preset_out_bias={"energy": [-2.0, -1]}))
    assert run.data.reference_energies == {"O": -2.0, "H": -1.0} and differences == {}


# --- data


def test_systems_are_relative_to_the_folder_of_the_input(convert, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "input.json").write_text(json.dumps(INPUT))
    translated = convert_input("elsewhere/input.json", "run.yaml")
    assert translated.options["data"]["train"] == ["elsewhere/water"]
    assert [d.remark for d in translated.differences] == ["does not exist; correct the path in the run file"]
    (tmp_path / "elsewhere" / "input.json").write_text(
        json.dumps(changed("training.training_data", systems=[str(tmp_path / "water")]))
    )
    translated = convert_input("elsewhere/input.json", "run.yaml")
    assert translated.options["data"]["train"] == [str(tmp_path / "water")] and not translated.differences


def test_data_that_are_not_read_or_not_left_out_are_listed(convert):
    systems = ["water", "omat.lmdb", "set.hdf5#/a", "set.hdf5#/b"]
    values = changed("training.training_data", systems=systems, min_pair_dist=0.5, auto_prob="prob_uniform")
    _, differences = convert(values)
    assert sorted(differences) == [
        f"training.training_data.{key}" for key in ("auto_prob", "min_pair_dist", "systems")
    ]


def test_names_of_options_cannot_add_lines_to_the_run_file(convert, tmp_path):
    run, differences = convert(changed("training", **{"a\noutput: elsewhere\x07": 1}))
    assert [*differences] == ["training.a\\noutput: elsewhere\\x07"] and str(run.output) == "run"


def test_a_refusal_has_one_line(convert):
    with pytest.raises(
        ValueError, match="the run file is not valid: training.seed = 'x': .*; training.log_interval"
    ):
        convert(changed("training", seed="x", disp_freq=0))


def test_inputs_in_yaml(convert, tmp_path):
    (tmp_path / "input.yaml").write_text(json.dumps(INPUT))  # JSON is YAML
    convert_input("input.yaml", "run.yaml")
    assert load_run_config("run.yaml").model.build(()).elements == ("O", "H")


def test_all_published_inputs_are_translated(tmp_path):
    files = sorted(shared("reference/deepmd_configs").glob("*.json"))
    assert len(files) > 20
    for file in files:
        translated = convert_input(file, tmp_path / "run.yaml")
        model = json.loads(file.read_text())["model"]
        model["descriptor"].setdefault("type", "dpa4")
        model["fitting_net"].setdefault("type", "dpa4_ener")
        built = load_run_config(tmp_path / "run.yaml").model.build(())
        assert built == config_from_deepmd(model), file.name
        listed = {difference.option for difference in translated.differences}
        assert listed <= {
            "model.descriptor.use_amp",
            "training.training_data.systems",
            "training.training_data.batch_size",
            "training.validation_data.systems",
        }
