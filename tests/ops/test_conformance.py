"""Every operator on every backend against its formula: values, derivatives, strides, registration, tracing.

The rows are in `operator_table`. Tests of a single backend are in the other files of this folder.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dpa4
from dpa4.graph import collate
from dpa4.ops.edge_products import edge_matmul, edge_outer, scatter_matmul
from dpa4.ops.hopper.so2_stack import CHANNELS, LAYOUT
from dpa4.ops.incidence import Incidence
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.segments import gather, segment_sum
from dpa4.ops.sparse_product import Terms
from dpa4.ops.split_matmul import precise_matmul
from helpers import assert_close, graph_of, molecule, random_potential
from operator_table import (
    BACKENDS,
    DEVICES,
    EDGES,
    OPERATORS,
    Operator,
    check,
    deviation,
    differentiate,
    ends,
    needs_cpp,
    needs_gpu,
    needs_hopper,
    needs_triton,
    normal,
    to,
)

MARKS = {
    "plain": [],
    "cpp": [needs_cpp],
    "triton": [needs_triton],
    "gpu": [pytest.mark.gpu, needs_gpu],
    "hopper": [pytest.mark.gpu, needs_hopper],
}
ON_CPU = ("plain", "cpp")


def rows() -> list[Any]:
    """All rows of the table: operator, backend, size."""
    return [
        pytest.param(
            name,
            backend,
            size,
            id=f"{name}-{backend}-{size}",
            marks=[
                *MARKS[backend],
                *([] if kernels.quick is None or size in kernels.quick else [pytest.mark.slow]),
            ],
        )
        for name, operator in OPERATORS.items()
        for backend, kernels in operator.backends.items()
        for size in operator.names(backend)
    ]


def operators(condition: Callable[[Operator], bool], backends: Sequence[str] = ON_CPU) -> list[Any]:
    """Operators that fulfil a condition, with each of their backends."""
    return [
        pytest.param(name, backend, id=f"{name}-{backend}", marks=MARKS[backend])
        for name, operator in OPERATORS.items()
        for backend in operator.backends
        if backend in backends and condition(operator)
    ]


@pytest.fixture
def run(request) -> Callable[..., Any]:
    """Function `check`, run in the interpreter's process for the backend Triton."""

    def checked(name: str, backend: str, size: str, strided: bool = False, bits: bool = False) -> Any:
        if backend != "triton":
            return check(name, backend, size, strided, bits)
        return request.getfixturevalue("interpreter")(check, name, backend, size, strided, bits)

    return checked


@pytest.mark.parametrize(("name", "backend", "size"), rows())
def test_operators_are_their_formulas(name, backend, size, run):
    """On a GPU, where threads finish in any order, two calls also agree to the last bit."""
    run(name, backend, size, strided=False, bits=backend in DEVICES)


@pytest.mark.parametrize(
    ("name", "backend"), operators(lambda o: o.strided, ("plain", "cpp", "triton", "gpu"))
)
def test_strides_do_not_matter(name, backend, run):
    run(name, backend, OPERATORS[name].small, strided=True)


@pytest.mark.parametrize(("name", "backend"), operators(lambda o: True))
def test_two_calls_agree_to_the_last_bit(name, backend, run):
    """The size "as mini" has several chunks of edges."""
    for size in {OPERATORS[name].small, "as mini"} & set(OPERATORS[name].names(backend)):
        run(name, backend, size, bits=True)


@pytest.mark.parametrize(("name", "backend"), operators(lambda o: o.order))
def test_derivatives_are_those_of_finite_differences(name, backend):
    """First and second derivatives, and third ones of operators that can be differentiated any number of times."""
    operator = OPERATORS[name]
    for inputs, others in operator.cases(operator.sizes[operator.small]):
        count = operator.last or len(inputs)  # in evaluation, weights have no gradients
        inputs = [t.requires_grad_(i < count) for i, t in enumerate(inputs)]
        varied = inputs if operator.first is None else inputs[:1]

        def function(*some, inputs=inputs, others=others):
            return operator.function(*some, *inputs[len(some) :], *others)

        def slope(*some, function=function):
            return torch.autograd.grad(function(*some).square().sum(), some, create_graph=True)

        with BACKENDS[backend]():
            assert torch.autograd.gradcheck(function, varied, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, varied, fast_mode=True)
            if operator.order > 2:
                assert torch.autograd.gradgradcheck(slope, varied, fast_mode=True)


@pytest.mark.parametrize(("energy", "forces"), [(1.0, 0.0), (0.0, 1.0), (None, None)])
@pytest.mark.parametrize("backend", [pytest.param(b, marks=MARKS[b]) for b in ON_CPU])
def test_losses_of_one_kind(backend, energy, forces):
    """Losses of energies alone, of forces alone, and without a first derivative."""
    operator = OPERATORS["so2_stack"]
    ((inputs, others),) = operator.cases(operator.sizes["order 2"])

    def gradients(function):
        if energy is not None:
            return differentiate(operator, function, inputs, others, energy, forces)[1]
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves, *others).square().sum(), leaves)

    with BACKENDS[backend]():
        found = gradients(operator.function)
    for one, other in zip(found, gradients(operator.formula), strict=True):
        assert deviation(one, other) < 1e-13


# Gradients that are not needed are not computed


class Calls(TorchDispatchMode):
    """Mode that records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@cache
def products_of_two() -> list[str]:
    return [
        name
        for name, operator in OPERATORS.items()
        if operator.order > 2 and len(operator.small_case().inputs) == 2
    ]


@pytest.mark.parametrize("name", products_of_two())
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("way", ["grad", "backward"])
def test_one_gradient_costs_one_product(name, leaves, way):
    operator = OPERATORS[name]
    made, others = operator.small_case()
    made = [t.requires_grad_() for t in made]
    inputs = made if leaves else [2 * t for t in made]
    y = operator.function(*inputs, *others).sin().sum()
    expected = torch.autograd.grad(y, inputs, retain_graph=True)
    for which in (0, 1):
        asked = made[which] if leaves or way == "backward" else inputs[which]
        with Calls() as calls:
            if way == "grad":
                (found,) = torch.autograd.grad(y, asked, retain_graph=True)
            else:
                y.backward(inputs=[asked], retain_graph=True)
                found, asked.grad = asked.grad, None
        assert_close(found, expected[which] * (1 if asked is inputs[which] else 2))
        products = [n for n in calls.names if n.startswith("dpa4::") or n.endswith(("::mm", "::bmm"))]
        unknown = leaves and way == "grad"  # unknown to PyTorch, so both may be computed
        assert len(products) == 1 or unknown


def test_training_computes_no_gradient_of_the_geometry():
    """Gradients of parameters alone are equal, and cost fewer operations."""
    potential = random_potential().train()
    graph = collate([graph_of(molecule()), graph_of(molecule(1))])
    parameters = list(potential.parameters())
    found, counts = [], []
    for inputs in (None, parameters):
        prediction = potential(graph)
        value = prediction.energy.square().sum() + prediction.forces.square().sum()
        with Calls() as calls:
            value.backward(inputs=inputs)
        found.append([p.grad for p in parameters])
        counts.append(len(calls.names))
        for p in parameters:
            p.grad = None
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other)
    assert counts[1] < 0.95 * counts[0]


# Registration with PyTorch


def registered() -> dict[str, list[tuple]]:
    """Arguments of every operator that PyTorch knows by name."""
    end, there = ends(5, 3)[0], torch.tensor([0, 2, 2])
    a, x, g = normal(5, 2, 3, 4), normal(3, 4, 32), normal(5, 3, 32)
    rows, terms = EdgeLayout(2, 1), Terms.of(normal(3, 4, 5))
    matrices, gates = [normal(1, n * 16, n * 16) for _ in range(3) for n in (3, 4)], [normal(1, 16, 32)] * 2
    edges = normal(1, 4, rows.total * 16)
    weights, us = (matrices, gates, [], 2, 1), [edges, edges]
    halves = [w if i % 2 == 0 else w[:, :32, :32] for i, w in enumerate(matrices)]
    separate = halves, gates, [], 2, 1
    left, right = normal(2, 7, 6, dtype=torch.float32), normal(2, 6, 5, dtype=torch.float32)
    widths = (LAYOUT.lmax + 1) * CHANNELS, 2 * LAYOUT.lmax * CHANNELS
    fused = [normal(1, n, n, dtype=torch.float32) for _ in range(2) for n in widths]
    fused_gates = [normal(1, CHANNELS, LAYOUT.lmax * CHANNELS, dtype=torch.float32)]
    return {
        "edge_matmul": [(a, x, end.index)],
        "scatter_matmul": [(a, g, *end), (a, g, *ends(5, 3)[1])],
        "edge_outer": [(g, x, end.index, 2)],
        "segment_sum": [(g, *end), (g, *ends(5, 3)[1])],
        "segment_max": [(g, g[0], *end)],
        "materialized": [(a,)],
        "put_back": [(normal(2, 3, 4), 1, there, 5)],
        "bilinear": [(normal(2, 4, 16), normal(2, 5, 16), *terms, 0, 1, 2, 3)],
        "precise_matmul": [(x, right, []) for x in (left, left.transpose(0, 1).contiguous().transpose(0, 1))],
        "so2_value": [(edges, *w, keep) for w in (weights, separate) for keep in (False, True)],
        "so2_vjp": [(edges, us, *w, keep) for w in (weights, separate) for keep in (False, True)],
        "so2_tangent": [(edges, us, *weights), (edges, us, *separate)],
        "so2_joint": [
            (edges, us, us, [edges] * 3, us, us, *weights),
            (edges, [], us, [edges] * 3, us, us, *weights),
            (edges, us, us, [edges] * 3, us, us, *separate),
        ],
        "so2_pack": [(fused, fused_gates, backward) for backward in (False, True)],
    }


ONLY_ON_A_GPU = {"split_weights", "so2_fused_value", "so2_fused_vjp"}


@pytest.mark.parametrize("backend", [pytest.param(b, marks=MARKS[b]) for b in ON_CPU])
@pytest.mark.parametrize("name", registered())
def test_operators_are_registered_consistently(name, backend):
    """Schemas, and the fake tensors of tracing."""
    with BACKENDS[backend]():
        for arguments in registered()[name]:
            operator = getattr(torch.ops.dpa4, name).default
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def called_by(operator: Operator) -> set[str]:
    """Names of our operators that a row of the table calls."""
    inputs, others = operator.small_case()
    if operator.function is precise_matmul:
        inputs = [t.float() for t in inputs]  # other types use the ordinary product
    with BACKENDS["plain"](), Calls() as calls:
        if operator.order:
            differentiate(operator, operator.function, inputs, others)
        else:
            operator.function(*inputs, *others)
    return {n.split("::")[1].split(".")[0] for n in calls.names if n.startswith("dpa4::")}


def test_the_table_has_every_operator():
    """A new operator needs arguments in `registered`, and a row with a GPU if it has kernels for CUDA."""
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("dpa4::")}
    assert names == set(registered()) | ONLY_ON_A_GPU
    assert set().union(*map(called_by, OPERATORS.values())) == names - ONLY_ON_A_GPU - {"so2_pack"}
    on_cuda = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"dpa4::{n}", "CUDA")}
    assert {"edge_matmul", "segment_sum", "so2_value"} <= on_cuda
    for backend in ("triton", "gpu"):
        computed = (called_by(operator) for operator in OPERATORS.values() if backend in operator.backends)
        assert on_cuda <= set().union(*computed)


def test_the_table_has_every_kernel_in_cpp():
    sources = Path(dpa4.__file__).parent.rglob("*.cpp")
    functions = {name for file in sources for name in re.findall(r"void (\w+)_##T\(", file.read_text())}
    rows = [operator.backends["cpp"] for operator in OPERATORS.values() if "cpp" in operator.backends]
    assert functions and functions == {name for kernels in rows for name in kernels.runs}


# Tracing and mixed precision


def energy(a, x, g, source: Incidence, destination: Incidence):
    """Scalar that goes through all functions on edges with both kinds of incidence."""
    count = a.shape[-2] * a.shape[-1]  # numbers stay near one
    y = edge_matmul(a, x, source) * g
    n = scatter_matmul(a, y, destination) / count
    b = edge_outer(g, gather(n, source)[:0].sum() + n, destination, a.shape[1]).tanh() + a
    z = segment_sum(edge_matmul(b, n, destination), source) / count
    w = scatter_matmul(b, gather(z, destination).tanh(), source)
    return w.square().sum() + edge_outer(y, x, source, a.shape[1]).square().sum() / count


def gradients_of_energy(a, x, g, *ends: Incidence):
    """Energy, its gradients, and the gradients of a loss on these, like in training on forces."""
    inputs = [t.detach().requires_grad_() for t in (a, x, g)]
    value = energy(*inputs, *ends)
    first = torch.autograd.grad(value, inputs, create_graph=True)
    loss = torch.stack([f.square().sum() for f in first]).sum()
    return [value.detach(), *(f.detach() for f in first), *torch.autograd.grad(loss, inputs)]


def training_step(a, x, g, source, destination):
    """Derivatives of the energy; the trace includes incidences."""
    num_nodes = x.shape[0]  # symbolic, where len() would be a number
    return gradients_of_energy(
        a, x, g, Incidence.of(source, num_nodes), Incidence.of_sorted(destination, num_nodes)
    )


def arguments_of_step(nodes: int, edges: int) -> list[torch.Tensor]:
    tensors = [normal(edges, 2, 7, 9), normal(nodes, 9, 10, seed=1), normal(edges, 7, 10, seed=2)]
    return [*tensors, *(end.index for end in ends(edges, nodes))]


@cache
def traced_step() -> torch.fx.GraphModule:
    return make_fx(training_step, tracing_mode="symbolic")(*arguments_of_step(5, 14))


def test_one_trace_serves_all_sizes():
    graph = traced_step()
    for nodes, edges in ((5, 14), (8, 31), (4, 11)):
        arguments = arguments_of_step(nodes, edges)
        for one, other in zip(graph(*arguments), training_step(*arguments), strict=True):
            assert deviation(one, other) < 1e-12  # the same operators, uncompiled
    names = {str(node.target) for node in graph.graph.nodes}
    operators = {f"dpa4.{n}.default" for n in ("edge_matmul", "scatter_matmul", "edge_outer", "segment_sum")}
    assert operators <= names
    assert not any("index_add" in name or "index_put" in name or "scatter_add" in name for name in names)


@pytest.mark.slow
def test_one_compilation_serves_all_sizes():
    graph = traced_step()
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    artifact = torch._inductor.standalone_compile(graph, placeholders, dynamic_shapes="from_graph")
    for nodes, edges in ((8, 31), (4, 11)):
        arguments = arguments_of_step(nodes, edges)
        for one, other in zip(artifact(*arguments), training_step(*arguments), strict=True):
            assert deviation(one, other) < 1e-12  # the same sums in another order


def test_a_map_traced_with_kernels_runs_without(monkeypatch):
    """Traces may be moved to a machine without a compiler."""
    ((inputs, (terms, coefficients)),) = OPERATORS["bilinear"].cases((13, 16))
    arguments = *inputs, *terms, 0, 1, 2, len(coefficients)
    with BACKENDS["plain"]():
        found = torch.ops.dpa4.bilinear(*arguments)
    assert deviation(found, OPERATORS["bilinear"].formula(*inputs, terms, coefficients)) < 1e-14


def test_autocast_leaves_the_type_to_the_caller():
    for name in ("edge_matmul", "scatter_matmul", "edge_outer", "gather", "segment_sum"):
        operator = OPERATORS[name]
        for inputs, others in operator.cases(EDGES["degree 2, two heads"]):
            inputs = [t.float() for t in inputs]
            expected = operator.formula(*(t.double() for t in inputs), *others)
            with BACKENDS["plain"](), torch.autocast("cpu", torch.bfloat16):
                assert deviation(operator.function(*inputs, *others), expected) < 1e-6, name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("nodes", "edges"), [(5, 14), (1, 7), (40, 900)])
def test_operators_work_together_on_a_device(nodes, edges):
    arguments = arguments_of_step(nodes, edges)
    expected = training_step(*arguments)
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.float64, 1e-12)):
        tensors = [to(t, "cuda").to(dtype) for t in arguments[:3]]
        found = training_step(*tensors, *(to(t, "cuda") for t in arguments[3:]))
        for one, other in zip(found, expected, strict=True):
            assert deviation(one, other) < tolerance
