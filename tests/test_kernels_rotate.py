"""Gather, segment sum and the products of edge matrices: values, derivatives, tracing, and the Triton kernels.

Run as a program, this file checks the Triton kernels in Triton's interpreter, which must be chosen before Triton
is imported: a test starts it in a process of its own.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from itertools import cycle

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dpa4.ops import edge_products as rotate
from dpa4.ops.edge_products import edge_matmul, edge_outer, scatter_matmul
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import gather, segment_max, segment_sum
from helpers import run_in_the_interpreter

SIZES = {  # (N, E, H, M, K, c)
    "degree 0": (4, 9, 1, 1, 1, 3),
    "degree 1": (5, 15, 1, 4, 4, 32),
    "degree 2, two heads": (4, 9, 2, 7, 9, 5),
    "degree 3": (3, 9, 1, 10, 16, 64),
    "degree 4": (3, 7, 1, 13, 25, 16),
    "spread over several tiles": (2, 2, 1, 17, 72, 70),
    "several tiles, two heads": (2, 3, 2, 17, 72, 70),
    "degree 5": (2, 4, 1, 16, 36, 8),
    "one node": (1, 7, 1, 10, 16, 8),
    "no edges": (3, 0, 1, 10, 16, 8),
    "no nodes": (0, 0, 1, 4, 4, 8),
}
FEW = ("degree 2, two heads", "spread over several tiles", "one node", "no edges", "no nodes")
"""Sizes for the interpreter, which takes seconds for each; the others are for a slow test."""
FLOAT32 = 3e-6
"""Sums of up to 700 float32 products, relative to the largest value; ten times this for derivatives."""


def edges(num_edges: int, num_nodes: int, seed: int = 0) -> tuple[Incidence, Incidence]:
    """An unsorted and a sorted end of random edges; the last node (of several) has none."""
    random = torch.Generator().manual_seed(seed)
    one, two = torch.randint(0, max(num_nodes - 1, 1), (2, num_edges), generator=random)
    return Incidence.of(one, num_nodes), Incidence.of_sorted(two.sort().values, num_nodes)


def tensors(size: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Random a, x, g."""
    N, E, H, M, K, c = size
    random = torch.Generator().manual_seed(seed)
    shapes = (E, H, M, K), (N, K, H * c), (E, M, H * c)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def energy(a: Tensor, x: Tensor, g: Tensor, source: Incidence, destination: Incidence) -> Tensor:
    """A scalar that goes through all functions with both kinds of incidence."""
    count = max(a.shape[-2] * a.shape[-1], 1)
    y = edge_matmul(a, x, source) * g
    n = scatter_matmul(a, y, destination) / count
    b = edge_outer(g, gather(n, source)[:0].sum() + n, destination, a.shape[1]).tanh() + a
    z = segment_sum(edge_matmul(b, n, destination), source) / count
    w = scatter_matmul(b, gather(z, destination).tanh(), source)
    return w.square().sum() + edge_outer(y, x, source, a.shape[1]).square().sum() / count


def derivatives(a: Tensor, x: Tensor, g: Tensor, *ends: Incidence) -> list[Tensor]:
    """The energy, its gradients, and the gradients of a loss of these, as in training on forces."""
    inputs = [t.detach().requires_grad_() for t in (a, x, g)]
    value = energy(*inputs, *ends)
    first = torch.autograd.grad(value, inputs, create_graph=True)
    loss = torch.stack([f.square().sum() for f in first]).sum()
    return [value.detach(), *(f.detach() for f in first), *torch.autograd.grad(loss, inputs)]


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest expected value."""
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (found.detach().cpu().double() - expected.detach().cpu().double()).abs().max()
    return (difference / expected.abs().max().clamp(min=1e-30)).item()


def products(
    size: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Every function with its arguments."""
    a, x, g = tensors(size, dtype)
    found: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {}
    for name, end in zip(("unsorted", "sorted"), edges(size[1], size[0]), strict=True):
        found |= {
            f"edge_matmul {name}": (lambda a, x, end=end: edge_matmul(a, x, end), [a, x]),
            f"scatter_matmul {name}": (lambda a, g, end=end: scatter_matmul(a, g, end), [a, g]),
            f"edge_outer {name}": (lambda g, x, end=end: edge_outer(g, x, end, size[2]), [g, x]),
            f"gather {name}": (lambda x, end=end: gather(x, end), [x]),
            f"segment_sum {name}": (lambda g, end=end: segment_sum(g, end), [g]),
            f"segment_sum of scalars {name}": (lambda g, end=end: segment_sum(g[:, 0, 0], end), [g]),
        }
    return found


def test_incidence_lists_the_edges_of_every_node():
    index = torch.tensor([4, 1, 1, 4, 0, 1])
    end = Incidence.of(index, 6)
    bounds = end.offsets.tolist()
    listed = [end.order[s:t].tolist() for s, t in zip(bounds, bounds[1:], strict=False)]
    assert listed == [[4], [1, 2, 5], [], [], [0, 3], []]
    assert end.num_nodes == 6
    ordered = Incidence.of_sorted(index.sort().values, 6)
    assert ordered.order is None
    assert torch.equal(ordered.offsets, end.offsets)
    assert Incidence.of(index[:0], 2).offsets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_products_are_the_einsums(size, monkeypatch):
    monkeypatch.setattr(rotate, "CHUNK", 4)  # several chunks, the last one partial
    N, E, H, M, K, c = size
    a, x, g = tensors(size)
    for end in edges(E, N):
        rows, nodes = g.unflatten(-1, (H, c)), x[end.index].unflatten(-1, (H, c))
        applied = torch.einsum("ehmk,ekhc->emhc", a, nodes).flatten(2)
        back = torch.einsum("ehmk,emhc->ekhc", a, rows).flatten(2)
        one_hot = (end.index == torch.arange(N)[:, None]).double()
        # Sums of at most 72 float64 products, in another order.
        assert deviation(edge_matmul(a, x, end), applied) < 1e-14
        assert deviation(scatter_matmul(a, g, end), torch.tensordot(one_hot, back, 1)) < 1e-14
        assert deviation(edge_outer(g, x, end, H), torch.einsum("emhc,ekhc->ehmk", rows, nodes)) < 1e-14
        assert torch.equal(gather(x, end), x[end.index])
        assert deviation(segment_sum(g, end), torch.tensordot(one_hot, g, 1)) < 1e-14


@pytest.mark.parametrize("name", products((4, 6, 2, 3, 4, 2), torch.float64))
def test_derivatives_are_those_of_finite_differences(name):
    f, arguments = products((4, 6, 2, 3, 4, 2), torch.float64)[name]
    arguments = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(f, arguments)
    assert torch.autograd.gradgradcheck(f, arguments)


def test_third_derivatives():
    size = (3, 4, 1, 2, 2, 2)
    ends = edges(4, 3)
    inputs = [t.requires_grad_() for t in tensors(size)]

    def slope(*inputs):
        return torch.autograd.grad(energy(*inputs, *ends), inputs, create_graph=True)

    assert torch.autograd.gradgradcheck(slope, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype):
    for name, (f, arguments) in products((3, 40, 2, 7, 9, 5), dtype).items():
        found = f(*arguments)
        assert found.dtype == dtype
        expected = f(*(t.double() for t in arguments))
        # Half a unit in the last place, and float32's own rounding.
        assert deviation(found, expected) < 0.51 * torch.finfo(dtype).eps, name


def test_autocast_leaves_the_dtype_to_the_caller():
    for name, (f, arguments) in products((3, 12, 1, 10, 16, 8), torch.float32).items():
        expected = f(*(t.double() for t in arguments))
        with torch.autocast("cpu", torch.bfloat16):
            assert deviation(f(*arguments), expected) < FLOAT32, name


def test_strided_arguments():
    a, x, g = tensors((4, 9, 1, 4, 4, 6), torch.float64)
    source, destination = edges(9, 4)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (a, x, g)]
    assert not any(t.is_contiguous() for t in strided)
    expected = derivatives(a, x, g, source, destination)
    for one, other in zip(derivatives(*strided, source, destination), expected, strict=True):
        assert deviation(one, other) < 1e-12  # elementwise operations keep the strides, sums follow them


def traced(size: tuple[int, ...]) -> torch.fx.GraphModule:
    """Training on forces, traced with symbolic sizes; incidences from plain indices inside."""

    def step(a, x, g, source, destination):
        num_nodes = x.shape[0]  # symbolic, where len() would be a number
        ends = Incidence.of(source, num_nodes), Incidence.of_sorted(destination, num_nodes)
        return derivatives(a, x, g, *ends)

    one, two = edges(size[1], size[0])
    return make_fx(step, tracing_mode="symbolic")(*tensors(size), one.index, two.index)


def test_traced_with_symbolic_sizes():
    graph = traced((5, 14, 2, 7, 9, 5))
    for size in ((5, 14, 2, 7, 9, 5), (8, 31, 2, 7, 9, 5), (4, 11, 2, 7, 9, 5)):
        ends = edges(size[1], size[0])
        found = graph(*tensors(size), *(end.index for end in ends))
        for one, other in zip(found, derivatives(*tensors(size), *ends), strict=True):
            assert deviation(one, other) < 1e-12  # the same operators; the compiler of none has touched them
    names = {str(node.target) for node in graph.graph.nodes}
    operators = {f"dpa4.{n}.default" for n in ("edge_matmul", "scatter_matmul", "edge_outer", "segment_sum")}
    assert operators <= names
    assert not any("index_add" in name or "index_put" in name or "scatter_add" in name for name in names)


@pytest.mark.slow
def test_compiled_for_all_sizes():
    graph = traced((5, 14, 2, 7, 9, 5))
    placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    artifact = torch._inductor.standalone_compile(graph, placeholders, dynamic_shapes="from_graph")
    for size in ((8, 31, 2, 7, 9, 5), (4, 11, 2, 7, 9, 5)):
        ends = edges(size[1], size[0])
        found = artifact(*tensors(size), *(end.index for end in ends))
        for one, other in zip(found, derivatives(*tensors(size), *ends), strict=True):
            assert deviation(one, other) < 1e-12  # the same sums, in an order of the compiler's


def test_twice_the_same_bits():
    a, x, g = tensors((5, 3000, 1, 4, 4, 8), torch.float32)
    ends = edges(3000, 5)
    results = zip(derivatives(a, x, g, *ends), derivatives(a, x, g, *ends), strict=True)
    assert all(torch.equal(one, other) for one, other in results)


def test_a_cpu_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from dpa4.ops.incidence import Incidence
from dpa4.ops.edge_products import edge_matmul, edge_outer, scatter_matmul
end = Incidence.of(torch.tensor([1, 0]), 2)
y = edge_matmul(torch.ones(2, 1, 3, 4), torch.ones(2, 4, 5), end)
edge_outer(y, scatter_matmul(torch.ones(2, 1, 3, 4), y, end), end, 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("names", [FEW, pytest.param([*SIZES], marks=pytest.mark.slow)], ids=["few", "all"])
def test_triton_kernels_in_the_interpreter(names):
    assert run_in_the_interpreter(__file__, *names).split() == [str(len(names)), "sizes"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [*SIZES.values(), (40, 2000, 1, 10, 16, 64), (40, 900, 2, 16, 72, 64)])
class TestDevice:
    """The kernels on a device against the twins in float64 on the CPU."""

    def test_values(self, size):
        for dtype, tolerance in (
            (torch.float32, FLOAT32),
            (torch.bfloat16, 0.51 * 2**-7),
            (torch.float64, 1e-14),
        ):
            for name, (f, arguments) in products(size, dtype).items():
                expected = f(*(t.double() for t in arguments))
                index = [
                    c.cell_contents for c in f.__closure__ or () if isinstance(c.cell_contents, Incidence)
                ]
                end = on_device((f.__defaults__ or index)[0])
                found = f(*(t.cuda() for t in arguments), end=end)
                assert found.dtype == dtype
                assert deviation(found, expected) < tolerance, (name, dtype)

    def test_derivatives(self, size):
        ends = edges(size[1], size[0])
        expected = derivatives(*tensors(size), *ends)
        for dtype, tolerance in ((torch.float32, 10 * FLOAT32), (torch.float64, 1e-12)):
            inputs = [t.to("cuda", dtype) for t in tensors(size)]
            found = derivatives(*inputs, *map(on_device, ends))
            for one, other in zip(found, expected, strict=True):
                assert deviation(one, other) < tolerance

    def test_twice_the_same_bits(self, size):
        ends = [on_device(end) for end in edges(size[1], size[0])]
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            inputs = [t.to("cuda", dtype) for t in tensors(size)]
            results = zip(derivatives(*inputs, *ends), derivatives(*inputs, *ends), strict=True)
            assert all(torch.equal(one, other) for one, other in results)


def on_device(end: Incidence) -> Incidence:
    return Incidence(*(None if t is None else t.cuda() for t in end))


@contextmanager
def triton_for_the_cpu():
    """Sends the operators' calls to the Triton kernels; yields the names of those called."""
    from dpa4.ops import segments

    called: set[str] = set()
    kernels = {
        "edge_matmul": rotate._edge_matmul_cuda,
        "scatter_matmul": rotate._scatter_matmul_cuda,
        "edge_outer": rotate._edge_outer_cuda,
        "segment_sum": segments._cuda,
        "segment_max": segments._cuda_max,
    }

    def noted(name, kernel):
        return lambda *arguments: (called.add(name), kernel(*arguments))[1]

    patch = pytest.MonkeyPatch()
    with patch.context() as p:
        for name, kernel in kernels.items():
            p.setattr(torch.ops.dpa4, name, noted(name, kernel))
        yield called


def check_largest(g: Tensor, ends: Iterable[Incidence]) -> None:
    """Exactly; from a start that is sometimes the largest."""
    start = (
        torch.linspace(-1, 1, g[0].numel()).view(g.shape[1:]).to(g) if len(g) else g.new_zeros(g.shape[1:])
    )
    for end in ends:
        with triton_for_the_cpu() as called:
            found = segment_max(g, start, end)
        assert called == {"segment_max"}
        assert torch.equal(found, segment_max(g, start, end))


def check_in_the_interpreter(names: Sequence[str]) -> None:
    """Some sizes: derivatives in float32; values in low precision; sums in float64; largest entries."""
    sizes = [SIZES[name] for name in names]
    for size, dtype in zip(sizes, cycle((torch.float32, torch.float64, torch.float16)), strict=False):
        ends = edges(size[1], size[0])
        check_largest(tensors(size, dtype)[2], ends)
        expected = derivatives(*tensors(size), *ends)
        with triton_for_the_cpu() as called:
            found = derivatives(*tensors(size, torch.float32), *ends)
        assert called == {"edge_matmul", "scatter_matmul", "edge_outer", "segment_sum"}
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert one.dtype == torch.float32
            assert deviation(one, other) < 10 * FLOAT32, (size, i, deviation(one, other))
        # The interpreter cannot multiply bfloat16 (it takes its bits for integers) and stores it without rounding.
        for dtype, tolerance in (
            (torch.float16, 0.51),
            (torch.bfloat16, 1.01),
            (torch.float64, 1e-14 * 2**52),
        ):
            for name, (f, arguments) in products(size, dtype).items():
                if dtype == torch.bfloat16 and "segment_sum" not in name:
                    continue
                with triton_for_the_cpu():
                    one = f(*arguments)
                assert one.dtype == dtype
                error = deviation(one, f(*(t.double() for t in arguments)))
                assert error <= tolerance * torch.finfo(dtype).eps, (size, name, dtype, error)
    print(len(sizes), "sizes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_in_the_interpreter(sys.argv[1:])
