"""Options of deepmd-kit's models: each is translated, has no influence, or is refused by name."""

import itertools
import re

import pytest

from dpa4.model import Bridging, ModelConfig
from dpa4.potential.deepmd.options import config_from_deepmd, config_to_deepmd


def params(descriptor=None, fitting=None, **model):
    """The smallest model section of an input file, with options added."""
    return {
        "type": "dpa4",
        "type_map": ["H", "C", "O"],
        "descriptor": {"type": "dpa4"} | (descriptor or {}),
        "fitting_net": {"type": "dpa4_ener"} | (fitting or {}),
    } | model


def test_absent_options_have_the_defaults_of_deepmd_kit():
    assert config_from_deepmd(params()) == ModelConfig(elements=("H", "C", "O"), edge_norm=True)


@pytest.mark.parametrize(
    ("descriptor", "expected"),
    [
        ({"so2_layers": 2, "mixing_layers": 5}, {"mixing_layers": 2}),
        ({"type": "SeZM"}, {}),
        ({"lmax": 2, "mmax": None}, {"lmax": 2, "mmax": 2}),
        ({"l_schedule": [3, 2, 1], "lmax": 6, "n_blocks": 9}, {"l_schedule": (3, 2, 1)}),
        ({"l_schedule": [3, 2, 1], "m_schedule": [2, 2, 1]}, {"l_schedule": (3, 2, 1), "mmax": 2}),
        ({"ffn_so3_grid": True}, {"ffn_on": "so3"}),
        ({"s2_activation": [False, False]}, {"ffn_on": "degrees"}),
        ({"s2_activation": False, "grid_mlp": True}, {"ffn_on": "degrees"}),
        ({"grid_mlp": True}, {"ffn_grid": "mlp"}),
        (
            {"grid_mlp": [True, True, False], "message_node_so3": True},
            {"message_node_so3": True, "message_grid": "mlp"},
        ),
        ({"grid_branch": [0, 0, 2], "grid_mlp": True}, {"ffn_grid": 2}),
        (
            {"grid_branch": 1, "message_node_so3": True},
            {"message_node_so3": True, "message_grid": 1, "ffn_grid": 1},
        ),
        ({"lebedev_quadrature": None}, {}),
        ({"lebedev_quadrature": [False, True]}, {}),
        ({"lebedev_quadrature": [True, False]}, {}),
        ({"lebedev_quadrature": False}, {}),
        ({"edge_norm": [False, True, True]}, {"edge_norm": [False, True, True]}),
        ({"edge_norm": [False] * 3}, {"edge_norm": False}),
        ({"env_exp": 5, "basis_type": "Gaussian/FIX"}, {"env_exp": 5, "basis": "gaussian/fix"}),
        ({"env_exp": [7, 5], "basis_type": "bessel/fix"}, {"basis": "bessel/fix"}),
        ({"sandwich_norm": [True, False, True, False]}, {"sandwich_norm": (True, False, True, False)}),
        ({"lebedev_quadrature": False, "ffn_so3_grid": True}, {"ffn_on": "so3"}),
        ({"radial_so2_mode": "none", "radial_so2_rank": 3}, {"radial_so2_mode": "none"}),
        ({"radial_so2_rank": 3}, {"radial_so2_rank": 3}),
        ({"default_chg_spin": [1.0, 2.0]}, {}),
        (
            {"add_chg_spin_ebd": True, "default_chg_spin": [-2.7, 2.0]},
            {"charge_spin": True, "default_charge_spin": (-2, 2)},
        ),
        ({"exclude_types": [[0, 2]]}, {"excluded_pairs": (("H", "O"),)}),
        ({"node_cartesian": "", "activation_function": "SiLU", "full_attn_res": "None"}, {}),
        (
            {"sel": "auto:1.1", "seed": [1, 2], "random_gamma": False, "use_amp": False, "trainable": False},
            {},
        ),
        ({"edge_norm": False, "basis_type": "gaussian"}, {"edge_norm": False, "basis": "gaussian"}),
        ({"focus_dim": 16, "n_focus": 2, "rcut": 4.5}, {"focus_dim": 16, "n_focus": 2, "cutoff": 4.5}),
    ],
)
def test_descriptor_options_are_translated(descriptor, expected):
    assert config_from_deepmd(params(descriptor)) == ModelConfig(
        **({"elements": ("H", "C", "O"), "edge_norm": True} | expected)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fitting": {"type": "SeZM_ener", "neuron": [24, 0], "resnet_dt": True}}, {"fitting": (24, 0)}),
        (
            {"type": "SeZM", "pair_exclude_types": [[1, 2]], "lora": {"rank": 4}},
            {"excluded_pairs": (("C", "O"),)},
        ),
        (
            {"bridging_method": "ZBL", "bridging_r_inner": 0.4},
            {"bridging": Bridging(r_inner=0.4, r_outer=0.8, smooth_cutoff=False)},
        ),
        ({"bridging_method": "None", "use_compile": True, "info": {"observed_type": ["H"]}}, {}),
    ],
)
def test_model_and_fitting_options_are_translated(options, expected):
    assert config_from_deepmd(params(**options)) == ModelConfig(
        **({"elements": ("H", "C", "O"), "edge_norm": True} | expected)
    )


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        *(
            ("descriptor", option, True)
            for option in ("edge_cartesian", "so2_norm", "atten_f_mix", "atten_v_proj")
        ),
        *(("descriptor", option, True) for option in ("atten_o_proj", "node_wise_s2", "node_wise_so3")),
        *(
            ("descriptor", option, "dependent")
            for option in ("so2_attn_res", "full_attn_res", "block_attn_res")
        ),
        ("descriptor", "message_node_s2", True),
        ("descriptor", "node_cartesian", "parity:2"),
        ("descriptor", "extra_node_l", 1),
        ("descriptor", "activation_function", "tanh"),
        ("descriptor", "glu_activation", False),
        ("descriptor", "eps", 1e-5),
        ("descriptor", "use_spin", [True, False, False]),
        ("descriptor", "s2_activation", [True, True]),
        ("descriptor", "edge_norm", [False, True]),
        ("descriptor", "edge_norm", 1),
        ("descriptor", "env_exp", True),
        ("descriptor", "env_exp", [7, 5, 3]),
        ("descriptor", "sandwich_norm", True),
        ("descriptor", "radial_so2_rank", 0),
        ("descriptor", "m_schedule", [1, 0, 1]),
        ("descriptor", "n_blocks", 0),
        ("descriptor", "precision", "bfloat16"),
        ("fitting", "precision", "half"),
        ("fitting", "numb_fparam", 2),
        ("fitting", "numb_aparam", 1),
        ("fitting", "activation_function", "gelu"),
        ("fitting", "type", "property"),
        ("model", "atom_exclude_types", [1]),
        ("model", "spin", {"use_spin": [True]}),
        ("model", "bridging_method", "tab"),
        ("model", "use_srtab", "table.txt"),
    ],
)
def test_options_that_are_not_supported_are_named_with_their_value(section, option, value):
    options = {option: value} if section == "model" else {section: {option: value}}
    name = "fitting_net" if section == "fitting" else section
    shown = f"{value!r}".replace("[", r"\[")
    with pytest.raises(ValueError, match=f"{name}.{option} = {shown}.* is not supported; supported: "):
        config_from_deepmd(params(**options))


EXACT = {
    "flag": (
        "use_env_seed",
        "message_node_so3",
        "ffn_so3_grid",
        "layer_scale",
        "mlp_bias",
        "add_chg_spin_ebd",
    ),
    "whole number": (
        *(
            "channels",
            "n_radial",
            "kmax",
            "n_focus",
            "focus_dim",
            "n_atten_head",
            "ffn_blocks",
            "ffn_neurons",
        ),
        *("readout_layers", "mixing_layers", "so2_layers", "lmax", "n_blocks", "mmax", "radial_so2_rank"),
    ),
    "number": ("rcut",),
    "text": ("basis_type", "radial_so2_mode", "so3_readout"),
    "list of numbers": ("radial_mlp", "l_schedule", "m_schedule"),
    "flags": ("edge_norm", "sandwich_norm", "s2_activation", "lebedev_quadrature", "grid_mlp"),
    "numbers": ("env_exp", "grid_branch"),
}
VALUES = {
    "flag": (0, 1, "true", [True], [], {}, 1.0),
    "whole number": (True, False, "2", 2.0, [2], [], {}),
    "number": (True, "6.0", [6.0], []),
    "text": (True, 1, ["bessel"], [], {}),
    "list of numbers": (True, 4, "4", [True], [2.0], ["2"], [[2]]),
    "flags": (0, 1, "true", [0, 1], [1, 1, 1, 1], [True, 1, True], [[True]], {}),
    "numbers": (True, 5.0, "5", [7.0, 5.0], [True, True, True], ["7", "5"], [[1]], {}),
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for kind, options in EXACT.items() for option in options for value in VALUES[kind]],
)
def test_options_of_another_type_are_refused_by_name(option, value):
    active = {"message_node_so3": True, "ffn_so3_grid": True}  # so that every option acts
    with pytest.raises(ValueError, match=rf"descriptor.{option} = .* is not supported; supported: "):
        config_from_deepmd(params(active | {option: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fitting": {"neuron": True}}, "fitting_net.neuron = True"),
        ({"fitting": {"neuron": [24.0]}}, r"fitting_net.neuron = \[24.0\]"),
        ({"fitting": {"dim_case_embd": [2]}}, r"fitting_net.dim_case_embd = \[2\]"),
        ({"fitting": {"case_film_embd": 1}}, "fitting_net.case_film_embd = 1"),
        ({"fitting": {"atom_ener": [True]}}, r"fitting_net.atom_ener = \[True\]"),
        ({"fitting": {"atom_ener": {}}}, "fitting_net.atom_ener = {}"),
        ({"fitting": {"numb_fparam": False}}, "fitting_net.numb_fparam = False"),
        ({"descriptor": {"extra_node_l": False}}, "descriptor.extra_node_l = False"),
        ({"descriptor": {"so2_norm": 0}}, "descriptor.so2_norm = 0"),
        ({"descriptor": {"node_wise_s2": []}}, r"descriptor.node_wise_s2 = \[\]"),
        ({"descriptor": {"glu_activation": 1}}, "descriptor.glu_activation = 1"),
        ({"descriptor": {"exclude_types": [[True, 0]]}}, r"descriptor.exclude_types = \[\[True, 0\]\]"),
        ({"pair_exclude_types": 0}, "pair_exclude_types = 0"),
        (
            {"pair_exclude_types": [[0, 1]], "descriptor": {"exclude_types": [[0, 2]]}},
            r"exclude_types = \[\(0, 2\)\]",
        ),
        ({"atom_exclude_types": False}, "model.atom_exclude_types = False"),
        ({"bridging_method": True}, "model.bridging_method = True"),
        ({"bridging_method": "ZBL", "bridging_r_inner": "0.4"}, "model.bridging_r_inner = '0.4'"),
        ({"bridging_method": "ZBL", "bridging_r_outer": [0.9]}, r"model.bridging_r_outer = \[0.9\]"),
    ],
)
def test_no_option_is_taken_for_a_truth_value(options, message):
    with pytest.raises(ValueError, match=f"{message} is not supported; supported: "):
        config_from_deepmd(params(**options))


def test_pairs_excluded_by_model_and_descriptor_may_be_the_same():
    config = config_from_deepmd(params({"exclude_types": [[1, 0]]}, pair_exclude_types=[[0, 1]]))
    assert config.excluded_pairs == (("H", "C"),)


def test_sections_of_a_model_need_no_type():
    section = {"type": "SeZM", "type_map": ["H", "C", "O"], "descriptor": {}, "fitting_net": {}}
    assert config_from_deepmd(section) == config_from_deepmd(params())


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="descriptor.warp = 9 is not an option of a known DPA4 format"):
        config_from_deepmd(params({"warp": 9}))


def test_values_outside_our_range_are_refused_by_name():
    with pytest.raises(ValueError, match="not a supported model: n_radial: .*greater than 0.*value 0"):
        config_from_deepmd(params({"n_radial": 0}))
    with pytest.raises(ValueError, match="not a supported model: env_exp: .* positive whole number.*, got 0"):
        config_from_deepmd(params({"env_exp": 0}))
    with pytest.raises(ValueError, match="basis: .*'bessel/fix' or 'gaussian/fix' .value 'bessel/free'"):
        config_from_deepmd(params({"basis_type": "bessel/free"}))
    with pytest.raises(ValueError, match="not a supported model: r_inner: .*greater than 0.*value -1"):
        config_from_deepmd(params(bridging_method="zbl", bridging_r_inner=-1))
    with pytest.raises(ValueError, match="not a supported model: elements: .*'Foo'"):
        config_from_deepmd(params(type_map=["H", "Foo"]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"descriptor": {"type": "se_e2_a"}, "fitting_net": {}, "type_map": ["H"]},
            "with descriptor 'se_e2_a'",
        ),
        (
            params() | {"type": "linear_ener"},
            "linear_ener model of the types None; supported: the sum",
        ),
        (params() | {"type_map": []}, "its model has no type_map"),
        ({"type": "pairtab"}, "of type 'pairtab' with descriptor 'none'"),
        (
            params({"type": "dpa4c"}),
            "one of type 'dpa4' with descriptor 'dpa4c'; only models and descriptors of type 'dpa4' .or 'SeZM'. can",
        ),
        (params() | {"type": "dpa4c"}, "one of type 'dpa4c' with descriptor 'dpa4'"),
        (params() | {"type": "standard"}, "one of type 'standard' with descriptor 'dpa4'"),
    ],
)
def test_models_of_another_kind_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        config_from_deepmd(model)


@pytest.mark.parametrize(
    "options",
    [
        {"l_schedule": (3, 2, 1), "mmax": 2},
        {"message_node_so3": True, "message_grid": "mlp", "ffn_on": "so3", "ffn_grid": 3},
        {
            "ffn_on": "degrees",
            "edge_norm": True,
            "n_focus": 2,
            "focus_dim": 8,
            "layer_scale": True,
            "mlp_bias": True,
        },
        {
            "charge_spin": True,
            "default_charge_spin": (-1, 2),
            "excluded_pairs": (("H", "C"),),
            "fitting": (8, 16),
        },
        {
            "bridging": Bridging(smooth_cutoff=False),
            "so3_readout": "glu",
            "readout_layers": 2,
            "basis": "gaussian",
        },
    ],
)
def test_options_survive_the_way_there_and_back(options):
    config = ModelConfig(elements=("H", "C", "O"), **options)
    assert config_from_deepmd(config_to_deepmd(config, "float64")) == config


@pytest.mark.parametrize(
    "option", ({"edge_norm": [False, True, True]}, {"env_exp": 5}, {"basis": "bessel/fix"})
)
def test_export_refuses_switches_newer_than_the_release(option):
    (name, value), *_ = option.items()
    with pytest.raises(
        ValueError, match=re.escape(f"deepmd-kit 3.2.0 cannot read models with {name} = {value!r}")
    ):
        config_to_deepmd(ModelConfig(elements=("H",), **option), "float32")


def test_export_names_all_switches_newer_than_the_release_at_once():
    config = ModelConfig(elements=("H",), edge_norm=[False, True, True], env_exp=5, basis="gaussian/fix")
    message = "[False, True, True] and env_exp = 5 and basis = 'gaussian/fix'; the version after 3.2.0 can"
    with pytest.raises(ValueError, match=re.escape(message)):
        config_to_deepmd(config, "float32")


@pytest.mark.parametrize("norms", list(itertools.product((False, True), repeat=4)))
def test_every_combination_of_norms_survives_the_way_there_and_back(norms):
    config = ModelConfig(elements=("H",), sandwich_norm=norms)
    assert config_from_deepmd(config_to_deepmd(config, "float32")) == config
