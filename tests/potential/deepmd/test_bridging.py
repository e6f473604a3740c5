"""ZBL bridging in the options of deepmd-kit: concise and composed form, radii, format 1.3."""

import copy

import pytest
import torch

from deepmd_files import composed_form, energies_of
from dpa4.model import Bridging
from dpa4.potential.checkpoint import convert, load_potential
from dpa4.potential.deepmd.bridging import concise_form
from dpa4.potential.deepmd.options import config_from_deepmd
from dpa4.potential.deepmd.writer import deepmd_state
from helpers import random_potential

VERSION = "model.Default.atomic_model.descriptor.version_tensor"


def network(**options):
    return {
        "type": "dpa4",
        "descriptor": {"type": "dpa4", "rcut": 4.0},
        "fitting_net": {"type": "dpa4_ener"},
    } | options


def composed(*models, **options):
    """The composed form, by default of a small model with the default radii."""
    models = models or (network(), {"type": "inner_potential", "mode": "ZBL"})
    return {
        "type": "linear_ener",
        "weights": "sum",
        "type_map": ["H", "C", "O"],
        "models": list(models),
    } | options


def test_both_forms_are_the_same_model():
    radii = {"r_inner": 0.4, "r_outer": 0.9}
    repulsion = {"type": "inner_potential", "mode": "zbl", "type_map": ["H", "C", "O"]} | radii
    common = {"type_map": ["H", "C", "O"], "pair_exclude_types": [[0, 1]]}
    expected = config_from_deepmd(
        network(
            bridging_method="ZBL", **{f"bridging_{name}": value for name, value in radii.items()}, **common
        )
    )
    assert expected.bridging == Bridging(**radii, smooth_cutoff=False)
    for part in (
        network(),
        network(type="SeZM"),
        network(type="standard"),
        network(bridging_method="none", **common),
    ):
        for models in ((part, repulsion), (repulsion, part)):
            assert (
                config_from_deepmd(
                    composed(*models, pair_exclude_types=[[0, 1]], info={}, preset_out_bias=None)
                )
                == expected
            )


def test_concise_models_are_returned_as_they_are():
    model = network(type_map=["H"])
    assert concise_form(model) is model


def test_a_composed_checkpoint_has_the_energies_of_the_concise_one(load, tmp_path):
    potential = random_potential(bridging=Bridging(smooth_cutoff=False))
    state = deepmd_state(potential)
    changed = copy.deepcopy(state)
    params = changed["_extra_state"]["model_params"]
    changed["_extra_state"]["model_params"] = composed_form(params)
    imported = load(changed)
    assert imported.config == potential.config
    assert torch.equal(energies_of(imported), energies_of(potential))
    convert(tmp_path / "model.pt", tmp_path / "exported.pt")
    exported = torch.load(tmp_path / "exported.pt", weights_only=True)["model"]
    assert exported["_extra_state"]["model_params"]["bridging_method"] == "ZBL"
    assert torch.equal(energies_of(load_potential(tmp_path / "exported.pt")), energies_of(potential))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (composed(weights="mean"), "linear_ener.weights = 'mean' is not supported; supported: 'sum'"),
        (composed(weights=[0.5, 0.5]), r"linear_ener.weights = \[0.5, 0.5\] is not supported"),
        (
            composed(network(), network()),
            r"linear_ener model of the types \['dpa4', 'dpa4'\]; supported: the",
        ),
        (composed(network()), r"linear_ener model of the types \['dpa4'\]"),
        (composed(network(), {"type": "pairtab"}), r"linear_ener model of the types \['dpa4', 'pairtab'\]"),
        (
            composed(network(), {"type": "inner_potential"}, {"type": "pairtab"}),
            "types .*pairtab.*supported: the sum of",
        ),
        (
            composed(network(), {"type": "inner_potential"}, 3),
            r"linear_ener model of the types .*'inner_potential'\]",
        ),
        (composed(models={"a": 1}), r"linear_ener model of the types \['standard'\]"),
        (composed(models=None), "linear_ener model of the types None"),
        (
            composed({"type": "standard", "descriptor": {}}, {"type": "inner_potential"}),
            r"\['standard', 'inner_potential'\]",
        ),
        (
            composed(network(), {"type": "inner_potential", "mode": "NLH"}),
            "inner_potential.mode = 'NLH' is not supported; supported: 'ZBL'",
        ),
        (
            composed(network(), {"type": "inner_potential", "mode": True}),
            "inner_potential.mode = True is not supported; supported: texts",
        ),
        (
            composed(network(), {"type": "inner_potential", "fraction_inner": 0.3}),
            "inner_potential.fraction_inner is not an option of the ZBL repulsion",
        ),
        (
            composed(network(), {"type": "inner_potential", "type_map": ["O", "H"]}),
            "the repulsion of its linear_ener model has the type_map .*; supported: that of the sum",
        ),
        (
            composed(network(type_map=["O"]), {"type": "inner_potential"}),
            "the network of its linear_ener model has the",
        ),
        (
            composed(network(pair_exclude_types=[[0, 1]]), {"type": "inner_potential"}),
            r"linear_ener.models.pair_exclude_types = \[\[0, 1\]\] is not supported",
        ),
        (
            composed(network(bridging_method="ZBL"), {"type": "inner_potential"}),
            "linear_ener.models.bridging_method = 'ZBL' is not supported",
        ),
        (composed(descriptor={}), "its linear_ener model has a descriptor, which belongs to one of its"),
        (composed(warp=1), "model.warp = 1 is not an option of a known DPA4 format"),
        (
            composed(network(), {"type": "inner_potential", "r_inner": "0.5"}),
            "model.bridging_r_inner = '0.5' is not supported; supported: numbers",
        ),
    ],
)
def test_other_sums_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        config_from_deepmd(model)


# Radii, in the options of the model and of the descriptor


def clamped(descriptor, **options):
    return config_from_deepmd(
        network(descriptor={"type": "dpa4", "rcut": 4.0} | descriptor, type_map=["H"], **options)
    )


def test_radii_of_the_descriptor_agree_with_the_model():
    radii = {"inner_clamp_r_inner": 0.5, "inner_clamp_r_outer": 0.8}
    assert clamped(radii, bridging_method="ZBL").bridging == Bridging(smooth_cutoff=False)
    assert clamped(dict.fromkeys(radii)).bridging is None
    with pytest.raises(ValueError, match=r"= \[0.5, 0.8\] is not supported; supported: the radii of the mod"):
        clamped(radii, bridging_method="ZBL", bridging_r_outer=0.9)
    with pytest.raises(ValueError, match="inner_clamp_r_inner = 0.5 is not supported; supported: null in a"):
        clamped(radii)


# Format 1.3


LATER = {"inner_clamp_f_inner": 0.26, "inner_clamp_f_outer": 0.8, "inner_clamp_scale": "covalent"}


def test_format_1_3_without_bridging_is_read(potential, state, load, tmp_path):
    state[VERSION] = torch.tensor(1.3, dtype=torch.float64)
    params = state["_extra_state"]["model_params"]
    params |= {"bridging_fraction_inner": 0.26, "bridging_fraction_outer": 0.8}
    params["descriptor"] |= LATER
    assert torch.equal(energies_of(load(state)), energies_of(potential))
    convert(tmp_path / "model.pt", tmp_path / "exported.pt")  # as format 1.2, with the same results
    assert torch.load(tmp_path / "exported.pt", weights_only=True)["model"][VERSION].item() == 1.2
    assert torch.equal(energies_of(load_potential(tmp_path / "exported.pt")), energies_of(potential))


@pytest.mark.parametrize("form", ["concise", "composed"])
def test_format_1_3_with_bridging_is_refused(load, form):
    state = deepmd_state(random_potential(bridging=Bridging(smooth_cutoff=False)))
    state[VERSION] = torch.tensor(1.3, dtype=torch.float64)
    if form == "composed":
        state["_extra_state"]["model_params"] = composed_form(state["_extra_state"]["model_params"])
    with pytest.raises(
        ValueError, match="has format 1.3 and its model ZBL bridging; .* up to format 1.2, others up to 1.3"
    ):
        load(state)


@pytest.mark.parametrize("option", ["bridging_fraction_inner", *LATER])
def test_options_of_the_later_bridging_are_refused_by_name(option):
    value = LATER.get(option, 0.3)
    with pytest.raises(
        ValueError, match=f"{option} = {value!r} is not supported; supported: null; the bridging of f"
    ):
        if option in LATER:
            clamped({option: value}, bridging_method="ZBL")
        else:
            clamped({}, bridging_method="ZBL", **{option: value})


def test_the_later_potential_is_refused_by_name():
    with pytest.raises(ValueError, match="bridging_method = 'NLH' is not supported; supported: 'none' and"):
        clamped({}, bridging_method="NLH")
