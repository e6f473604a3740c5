"""Presets have the sizes and options of the published models."""

import json

import pytest

from dpa4.model import DPA4
from dpa4.model.presets import (
    ALL_ELEMENTS,
    DEEPMD_PRESETS,
    PRESETS,
    closest_preset,
    generation,
    preset,
)
from dpa4.model.shapes import count_parameters
from dpa4.model.switches import EdgeNorm
from dpa4.potential.deepmd.options import config_from_deepmd
from helpers import shared

PUBLISHED_COUNTS = {
    "paper-neo": 1_596_356,
    "paper-air": 2_762_885,
    "paper-plus": 5_394_502,
    "paper-pro": 20_906_830,
    "nano": 480_268,
    "mini": 655_084,
    "neo": 1_124_910,
    "air": 5_148_101,
    "plus": 8_848_710,
    "pro": 25_210_702,
}
PUBLISHED_INPUTS = {
    "paper-neo": "matbench_v3_neo",
    "paper-air": "matbench_v3_air",
    "paper-plus": "matbench_v3_plus",
    "paper-pro": "matbench_v3_pro",
    "nano": "preset_nano",
    "mini": "omat24_v4_mini",
    "neo": "omat24_v4_neo",
    "air": "omat24_v4_air",
    "plus": "omat24_v4_plus",
    "pro": "omat24_v4_pro",
}


DEEPMD_COUNTS = {  # of the versions v20260820, v20260901 and v20260911, whose 16 radial centres are fixed
    "nano": (480_364, 480_332, 480_332),
    "mini": (655_084, 655_052, 655_052),
    "neo": (1_124_910, 1_124_878, 1_124_878),
    "air": (5_148_101, 5_148_037, 5_148_037),
    "plus": (8_848_710, 8_848_646, 8_848_646),
    "pro": (25_210_702, 25_210_638, 25_210_638),
    "max": (None, 99_009_450, 99_009_450),
    "ultra": (None, 281_122_224, 281_122_224),
}
VERSIONS = ("v20260820", "v20260901", "v20260911")


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert sum(p.numel() for p in DPA4(preset(name)).parameters()) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_switches_are_those_of_the_published_inputs(name):
    path = shared(f"reference/deepmd_configs/{PUBLISHED_INPUTS[name]}.json")
    assert preset(name) == config_from_deepmd(json.loads(path.read_text())["model"])


@pytest.mark.parametrize("grade", DEEPMD_COUNTS)
def test_parameter_counts_of_the_presets_of_deepmd(grade):
    for version, count in zip(VERSIONS, DEEPMD_COUNTS[grade], strict=True):
        name = f"dpa4-{grade}-{version}"
        assert (name in DEEPMD_PRESETS) == (count is not None)
        if count is not None:
            fixed = 16 if version == "v20260911" else 0
            assert count_parameters(preset(name)) == (count, count - fixed), name


def test_parameters_are_counted_as_in_a_network():
    for name in ("dpa4-nano-v20260911", "dpa4-mini-v20260901"):
        parameters = list(DPA4(preset(name)).parameters())
        trainable = [p.numel() for p in parameters if p.requires_grad]
        assert count_parameters(preset(name)) == (sum(p.numel() for p in parameters), sum(trainable))


def test_switches_of_the_versions_of_deepmd():
    norms = {"edge_norm": (False, True, True), "sandwich_norm": (True, False, True, False)}
    earlier, september, newest = (
        preset(f"dpa4-pro-{version}").model_dump(exclude={"elements"}) for version in VERSIONS
    )
    assert earlier == preset("pro").model_dump(exclude={"elements"})
    assert september == earlier | norms
    assert newest == earlier | norms | {"env_exp": 5, "basis": "gaussian/fix"}
    on_s2 = {"message_node_so3": False, "ffn_on": "s2", "ffn_grid": "glu", "so3_readout": "mlp"}
    assert preset("dpa4-ultra-v20260911").model_dump(include=set(on_s2)) == on_s2


@pytest.mark.parametrize("grade", ["max", "ultra"])
def test_switches_of_the_largest_grades_are_those_of_published_inputs(grade):
    path = shared(f"reference/deepmd_configs/preset_{grade}.json")
    assert preset(f"dpa4-{grade}-v20260901") == config_from_deepmd(json.loads(path.read_text())["model"])


def test_names_may_have_any_case():
    assert preset("DPA4-Neo-v20260911") == preset("dpa4-neo-V20260911")


@pytest.mark.parametrize("name", DEEPMD_PRESETS)
def test_models_are_recognised_as_their_preset(name):
    config = preset(name, elements=("O", "H"), bridging={"r_inner": 0.5, "r_outer": 0.8})
    assert closest_preset(config) == (name, {})
    assert generation(config) == (2 if name.endswith("v20260820") else 3)


def test_the_closest_preset_and_the_differences():
    assert closest_preset(preset("mini", edge_norm=False)) == ("dpa4-mini-v20260820", {"edge_norm": False})
    assert closest_preset(preset("paper-air")) == ("paper-air", {})
    assert generation(preset("paper-air")) == generation(preset("paper-air", edge_norm=False)) == 1


def test_elements_default_to_the_118_of_the_published_models():
    assert preset("mini").elements == ALL_ELEMENTS
    assert (len(ALL_ELEMENTS), ALL_ELEMENTS[0], ALL_ELEMENTS[-1]) == (118, "H", "Og")


def test_elements_and_overrides_replace_the_published_values():
    config = preset("air", elements=("H", "O"), cutoff=5.0, edge_norm=False)
    assert (config.elements, config.cutoff, config.channels) == (("H", "O"), 5.0, 64)
    assert config.edge_norm == EdgeNorm(False, False, False)


def test_unknown_names_get_a_suggestion_and_the_list():
    with pytest.raises(
        ValueError, match="unknown preset 'papr-air'; did you mean 'paper-air'.*paper-neo, paper-air"
    ):
        preset("papr-air")
    with pytest.raises(ValueError, match="unknown preset 'xyz'; Available: paper-neo"):
        preset("xyz")
    with pytest.raises(
        ValueError, match="nano, mini, neo, air, plus, pro only; max exists as dpa4-max-v20260901 and"
    ):
        preset("dpa4-max-v20260820")
    with pytest.raises(
        ValueError, match="a grade of nano, .* and a version of v20260820, v20260901, v20260911"
    ):
        preset("dpa4-mini-v20260704")


def test_invalid_overrides_are_refused():
    with pytest.raises(ValueError, match="lmax"):
        preset("air", lmax=-1)
