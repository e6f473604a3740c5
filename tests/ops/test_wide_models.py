"""The largest published shapes, max and ultra, at full width: all fast paths of a GPU against float64.

    python -m pytest tests/ops/test_wide_models.py -m "gpu or slow" -s

prints which kernels ran, and the deviations.
"""

import copy
import warnings
from typing import Any

import pytest
import torch
from ase.build import bulk

from dpa4.execution import check
from dpa4.execution.evaluator import Evaluator
from dpa4.graph import Graph, build_graph, first_atoms
from dpa4.model import ModelConfig
from dpa4.model.presets import preset
from dpa4.ops import available
from dpa4.ops.layout import EdgeLayout
from dpa4.potential import Potential, Prediction
from dpa4.potential.card import cpu_kernels, gpu_kernels, has_whole_stacks
from helpers import randomize
from operator_table import GATE_KERNELS, needs_cpp, needs_gpu, needs_triton, on_cpp, on_gpu, on_plain

GENERATION_3: dict[str, Any] = {
    "edge_norm": [False, True, True],
    "sandwich_norm": (True, False, True, False),
    "env_exp": 5,
    "basis": "gaussian/fix",
}
SIZES = {"lmax": 6, "radial_so2_rank": 4, "n_blocks": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "max": SIZES | {"channels": 96, "n_focus": 2, "so3_readout": "none"},
    "ultra": SIZES
    | {"channels": 128, "n_focus": 3, "message_node_so3": False, "ffn_on": "s2", "ffn_grid": "glu"},
    "256 channels": {"channels": 256, "lmax": 2, "n_blocks": 1},
}
"""Switches on the preset plus; fewer blocks than published. The last shape is too wide for the Triton gates."""


def configuration(name: str) -> ModelConfig:
    return preset("plus", ("Cu", "Au"), **(GENERATION_3 | SHAPES[name]))


def wide_potential(name: str) -> Potential:
    torch.manual_seed(0)
    potential = Potential(configuration(name)).float()
    randomize(potential.model)
    return potential


def alloy(cells: int) -> Graph:
    """Rattled face-centred cubic alloy of four atoms per cell."""
    atoms = bulk("Cu", cubic=True) * (cells, cells, cells)
    atoms.numbers[::3] = 79
    atoms.rattle(0.1, seed=0)
    return build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 6.0)


def results(prediction: Prediction) -> dict[str, list[torch.Tensor]]:
    return {"energy": [prediction.energy.detach()], "forces": [prediction.forces.detach()]}


def largest_deviations(
    found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]
) -> dict[str, float]:
    """Largest deviation of each quantity, relative to its largest entry."""
    deviations = {}
    for name, tensors in expected.items():
        errors = [float((a - b).abs().max()) for a, b in zip(found[name], tensors, strict=True)]
        deviations[name] = max(errors) / max(float(b.abs().max()) for b in tensors)
    return deviations


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_fast_paths_of_a_gpu(name, capsys):
    """Compiled and replayed energies and forces at both precisions, and gradients of training, against float64."""
    potential, graph, small = wide_potential(name).cuda(), alloy(3).to("cuda"), alloy(2).to("cuda")
    exact = copy.deepcopy(potential).double()
    cases = []
    with on_gpu() as launched, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a return to eager mode
        for precision, tolerance in (("high", 1e-4), ("fast", 0.1)):
            fast = copy.deepcopy(potential).eval()
            fast.precision = precision
            found, wanted = Evaluator(fast, compile=True)(graph), exact.eval()(graph)
            cases.append((precision, largest_deviations(results(found), results(wanted)), tolerance))
        found, wanted = (check.probe(p.train(), small) for p in (potential, exact))
        cases.append(("training", largest_deviations(found, wanted), 1e-3))
    with capsys.disabled():
        print(f"\n{name}: {torch.cuda.get_device_name()}, kernels {', '.join(sorted(launched))}")
        for case, deviations, _ in cases:
            print(f"  {case}: " + ", ".join(f"{n} {d:.1e}" for n, d in deviations.items()))
    for case, deviations, tolerance in cases:
        assert all(d < tolerance for d in deviations.values()), (case, deviations)
    assert {"_edge_matmul", "_scatter_matmul", "_edge_outer", "_matmul"} <= launched
    has_gates = available.triton_gate_width(potential.config.focus_width)
    assert (launched & set(GATE_KERNELS)) == (set(GATE_KERNELS) if has_gates else set())
    assert has_whole_stacks(potential.config) == ("so2_value" in launched)


@pytest.mark.slow
@needs_triton
def test_gates_fit_into_the_shared_memory_of_every_gpu():
    """The largest gate kernel, compiled for a GPU that need not be there; 99 KiB are the least since Ampere."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dpa4.ops.triton import gate

    c, (block_e, warps) = available.GATE_CHANNELS, gate._WIDE_TILE
    layout = EdgeLayout(1, 1)
    constants = {"LMAX": 1, "MMAX": 1, "C": c, "WIDTH": layout.total * c, "BLOCK_E": block_e, "BLOCK_C": c}
    constants |= {"PRECISION": "tf32x3"}
    names = gate._gate_joint.arg_names
    kinds = {n: "constexpr" if n in constants else "i32" if n == "num_edges" else "*fp32" for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if kinds[n] == "*fp32"}
    source = ASTSource(gate._gate_joint, kinds, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps})
    assert 0 < kernel.metadata.shared <= 99 * 1024


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("name", SHAPES)
def test_fast_paths_of_a_cpu(name):
    potential, graph = wide_potential(name), first_atoms(alloy(1), 2)
    exact = copy.deepcopy(potential).double()
    with on_plain():
        expected = exact.eval()(graph)
    with on_cpp() as launched:
        found, doubled = potential.eval()(graph), exact(graph)
    assert launched == {"edge_matmul", "scatter_matmul", "edge_outer", "bilinear", "so2_value", "so2_vjp"}
    for prediction, tolerance in ((doubled, 1e-10), (found, 5e-5)):
        deviations = largest_deviations(results(prediction), results(expected))
        assert all(d < tolerance for d in deviations.values()), deviations


def test_shapes_are_those_of_the_card():
    """At full width and depth the card says the same as at the depth of these tests."""
    for name in SHAPES:
        config = configuration(name)
        deep = config.model_copy(update={"n_blocks": 10})
        assert gpu_kernels(config, "3.6.0") == gpu_kernels(deep, "3.6.0")
        assert cpu_kernels(config) == cpu_kernels(deep)
