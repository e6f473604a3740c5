"""Options with a short and a long form: reading, writing, and no truth value."""

import pytest
from pydantic import ValidationError

from dpa4.model import ModelConfig
from dpa4.model.switches import EdgeNorm, EnvelopeExponents


def config_of(**options) -> ModelConfig:
    return ModelConfig(elements=("H",), **options)


@pytest.mark.parametrize(
    ("value", "expected", "stored"),
    [
        (True, EdgeNorm(True, True, True), "true"),
        ([False, False, False], EdgeNorm(False, False, False), "false"),
        ((False, True, True), EdgeNorm(False, True, True), "[false,true,true]"),
        (EdgeNorm(True, False, False), EdgeNorm(True, False, False), "[true,false,false]"),
    ],
)
def test_forms_of_edge_norm(value, expected, stored):
    config = config_of(edge_norm=value)
    assert config.edge_norm == expected
    assert f'"edge_norm":{stored},' in config.model_dump_json()
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("value", "expected", "stored"),
    [
        ([6, 4], EnvelopeExponents(6, 4), "[6,4]"),
        ((5, 5), EnvelopeExponents(5, 5), "[5,5]"),
        (5, EnvelopeExponents(None, 5), "5"),
    ],
)
def test_forms_of_env_exp(value, expected, stored):
    config = config_of(env_exp=value)
    assert config.env_exp == expected
    assert f'"env_exp":{stored},' in config.model_dump_json()
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("option", ["edge_norm", "env_exp"])
def test_options_with_several_entries_have_no_truth_value(option):
    with pytest.raises(TypeError, match=f"{option} has .* entries"):
        assert getattr(config_of(), option)


@pytest.mark.parametrize(
    "value", ["x", None, 1, 2, [1, 0, 1], [True, True], [True] * 4, [True, True, "x"], {"radial": True}]
)
def test_other_values_of_edge_norm_are_refused(value):
    with pytest.raises(
        ValidationError, match="edge_norm must be true, false, or a list of three of these .*, got "
    ):
        config_of(edge_norm=value)


@pytest.mark.parametrize(
    "value", [True, None, 0, 65, 5.5, "5", [7.0, 5.0], [True, 5], [5], [7, 0], [7, 65], [7, 5, 3], [None, 5]]
)
def test_other_values_of_env_exp_are_refused(value):
    with pytest.raises(
        ValidationError, match="env_exp must be a positive whole number, at most 64, or .*, got "
    ):
        config_of(env_exp=value)


def test_the_first_format_needs_an_envelope_in_the_basis():
    with pytest.raises(
        ValidationError, match="env_exp = 5 with model.pre_release = True .* name two exponents"
    ):
        config_of(env_exp=5, pre_release=True)


def test_cutoff_of_the_edge_weight():
    assert config_of(cutoff=4.6).weight_cutoff == 4.6
    assert config_of(cutoff=4.6, float32_cutoff=True).weight_cutoff == 4.599999904632568
    assert config_of(cutoff=4.5, float32_cutoff=True).weight_cutoff == 4.5
