"""Numbers of deepmd-kit: every model of the large reference collection, and parameter gradients.

The structures of a model are evaluated in one batch; test_parity_shipped.py evaluates them one by one. Models whose
name starts with E have switches of generation 3 or an unusual layout of the file.
"""

import numpy as np
import pytest
import torch

from dpa4.execution.limits import TOLERANCES
from dpa4.execution.regions import compile_potential
from dpa4.ops import available
from dpa4.potential import load_potential
from helpers import shared
from parity import (
    assert_float32,
    assert_float64,
    assert_parameter_gradients,
    case_of,
    collection,
    deviations,
    folder_of,
)

INDEX = collection()
REFUSED = {
    "D_edge_cartesian": "edge_cartesian",
    "D_node_wise_so3": "node_wise_so3",
    "D_so2_attn_res_ind": "so2_attn_res",
}
SUPPORTED = [name for name in INDEX if name not in REFUSED]
# The series D and E vary one option at a time; in float32 these models stand for the others.
IN_FLOAT32 = {"D_base", "D_ffn_so3", "D_legacy_version1.0", "E_edge_norm_FTF"}
GENERATION_3 = [name for name in SUPPORTED if name.startswith("E_")]
# Published sizes, of which one stands for all in the quick tests.
LARGE = {name for name in GENERATION_3 if name.startswith(("E_v0", "E_max", "E_ultra"))} - {"E_v0911_mini"}
LARGE |= {"G1_neo"}  # C_neo is as large

if not INDEX:
    pytest.skip(
        "the large reference collection is absent; it is not part of the repository. A few of its models are checked "
        "by test_parity_shipped.py",
        allow_module_level=True,
    )


def slow_if(condition: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if condition else []


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if(name in LARGE)) for name in SUPPORTED])
def test_float64(name):
    assert_float64(case_of(name), in_a_batch=True)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=slow_if((name.startswith(("D_", "E_")) and name not in IN_FLOAT32) or name == "G1_neo"),
        )
        for name in SUPPORTED
    ],
)
def test_float32(name):
    assert_float32(case_of(name), in_a_batch=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATION_3)
def test_float64_without_kernels(monkeypatch, name):
    """With kernels in C++, where a compiler is found, the numbers are compared by `test_float64`."""
    monkeypatch.setattr(available, "cpp_compiled", lambda: False)
    assert_float64(case_of(name), in_a_batch=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATION_3)
def test_float64_compiled(compilations, name):
    """The compiler would take minutes, so the graphs that it would receive run in its place."""
    case = case_of(name)
    assert_float64(case, in_a_batch=True, prepare=compile_potential)
    assert compilations


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", GENERATION_3)
def test_float32_on_a_gpu(name, compiled):
    """Kernels in Triton, on Hopper GPUs also in CUDA C++, within the deviation allowed to compiled code."""
    case = case_of(name)

    def prepare(potential):
        potential.to("cuda")
        if compiled:
            compile_potential(potential)

    for deviation in deviations(case, torch.float32, in_a_batch=True, prepare=prepare):
        if deviation.quantity in ("energy", "forces"):
            deviation.assert_at_most(TOLERANCES[torch.float32] * max(deviation.largest, 1.0))


@pytest.mark.parametrize("name,option", REFUSED.items())
def test_switches_that_no_published_model_uses_are_refused_by_name(name, option):
    with pytest.raises(ValueError, match=option):
        load_potential(folder_of(name) / "model_f32.pt")


@pytest.mark.parametrize("name", SUPPORTED)
def test_parameter_counts(name):
    potential = load_potential(folder_of(name) / "model_f32.pt")
    assert sum(p.numel() for p in potential.parameters()) == INDEX[name]["n_params"]
    fixed = potential.config.n_radial if potential.config.basis.endswith("/fix") else 0
    trainable = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    assert trainable == INDEX[name]["n_params"] - fixed


@pytest.mark.parametrize("name,structure", [("D_base", "prim2"), ("A_water_mini", "ethanol")])
def test_parameter_gradients_of_a_force_loss(name, structure):
    with np.load(shared(f"reference/fixtures/{name}/grads_{structure}.npz")) as file:
        expected = {key.removeprefix("grad/"): file[key] for key in file.files}
    assert_parameter_gradients(case_of(name), structure, expected)
