"""Presets have the sizes and options of the published models."""

import json

import pytest

from dpa4.model import DPA4
from dpa4.model.presets import ALL_ELEMENTS, PRESETS, preset
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


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert sum(p.numel() for p in DPA4(preset(name)).parameters()) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_switches_are_those_of_the_published_inputs(name):
    path = shared(f"reference/deepmd_configs/{PUBLISHED_INPUTS[name]}.json")
    assert preset(name) == config_from_deepmd(json.loads(path.read_text())["model"])


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


def test_invalid_overrides_are_refused():
    with pytest.raises(ValueError, match="lmax"):
        preset("air", lmax=-1)
