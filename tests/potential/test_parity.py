"""Numbers of deepmd-kit: every model of the large reference collection, and parameter gradients.

The structures of a model are evaluated in one batch; test_parity_shipped.py evaluates them one by one.
"""

import json

import numpy as np
import pytest

from dpa4.potential import load_potential
from helpers import SHARED, shared
from parity import ParityCase, assert_float32, assert_float64, assert_parameter_gradients

FIXTURES = SHARED / "reference" / "fixtures"
INDEX = json.loads((FIXTURES / "index.json").read_text()) if FIXTURES.exists() else {}
REFUSED = {
    "D_edge_cartesian": "edge_cartesian",
    "D_node_wise_so3": "node_wise_so3",
    "D_so2_attn_res_ind": "so2_attn_res",
}
SUPPORTED = [name for name in INDEX if name not in REFUSED]
# The D series varies one option at a time; in float32 these models stand for the others, all of which run in float64.
IN_FLOAT32 = {"D_base", "D_ffn_so3", "D_legacy_version1.0"}

if not INDEX:
    pytest.skip(
        f"the large reference collection is absent ({FIXTURES}); it is not part of the repository. Ten of its models "
        "are checked by test_parity_shipped.py",
        allow_module_level=True,
    )


def case_of(name: str) -> ParityCase:
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FIXTURES / name / "ref.npz") as file:
        for key in file.files:
            structure, quantity = key.split("/")
            found.setdefault(structure, {})[quantity] = file[key]
    return ParityCase(name, FIXTURES / name / "model_f32.pt", found, INDEX[name].get("charge_spin"))


@pytest.mark.parametrize("name", SUPPORTED)
def test_float64(name):
    assert_float64(case_of(name), in_a_batch=True)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("D_") and name not in IN_FLOAT32 else [])
        for name in SUPPORTED
    ],
)
def test_float32(name):
    assert_float32(case_of(name), in_a_batch=True)


@pytest.mark.parametrize("name,option", REFUSED.items())
def test_switches_that_no_published_model_uses_are_refused_by_name(name, option):
    with pytest.raises(ValueError, match=option):
        load_potential(FIXTURES / name / "model_f32.pt")


@pytest.mark.parametrize("name", SUPPORTED)
def test_parameter_counts(name):
    potential = load_potential(FIXTURES / name / "model_f32.pt")
    assert sum(p.numel() for p in potential.parameters()) == INDEX[name]["n_params"]


@pytest.mark.parametrize("name,structure", [("D_base", "prim2"), ("A_water_mini", "ethanol")])
def test_parameter_gradients_of_a_force_loss(name, structure):
    with np.load(shared(f"reference/fixtures/{name}/grads_{structure}.npz")) as file:
        expected = {key.removeprefix("grad/"): file[key] for key in file.files}
    assert_parameter_gradients(case_of(name), structure, expected)
