"""The table of operators: formula, arguments, sizes and backends of each.

A new operator is an entry of `OPERATORS`; a new kernel is an entry of the ``backends`` of its operator. `check`
compares an operator on a backend with its formula. For kernels in Triton it runs in the process in which Triton
interprets them (fixture ``interpreter``).
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dpa4.ops import available, gate, segments
from dpa4.ops import edge_products as rotate
from dpa4.ops.cpp import build
from dpa4.ops.edge_products import edge_matmul, edge_outer, scatter_matmul
from dpa4.ops.hopper import so2_stack as hopper
from dpa4.ops.incidence import Incidence
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.segments import gather, materialized, pick, segment_max, segment_sum
from dpa4.ops.so2_stack import so2_stack
from dpa4.ops.sparse_product import Terms, sparse_product
from dpa4.ops.split_matmul import order_matmul, precise_matmul, prepare, split
from dpa4.ops.weights import Weight

needs_cpp = pytest.mark.skipif(available.cpp_missing() is not None, reason=f"{available.cpp_missing()}")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

# Arguments


class Case(NamedTuple):
    """Arguments of an operator.

    Attributes:
        inputs: Tensors of floating-point numbers, float64.
        others: All other arguments.
    """

    inputs: list[Tensor]
    others: tuple[Any, ...] = ()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed numbers, the same on every machine and in every type."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest expected entry; infinite if the deviation is not a number."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    found, expected = (t.detach().cpu().double() for t in (found, expected))
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def to(target: Any, device: str) -> Any:
    """Move the tensors in a nested structure of arguments to another device."""
    if isinstance(target, Tensor):
        return target.to(device)
    if isinstance(target, Incidence | Terms):
        return type(target)(*(to(t, device) for t in target))
    return [to(t, device) for t in target] if isinstance(target, list) else target


# Backends: contexts in which operators run on one kind of kernels; each yields the set of kernels that ran


@contextmanager
def on_plain() -> Iterator[set[str]]:
    """Run plain operations of PyTorch on a CPU, in several chunks of edges of which the last is partial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(available, "_on_cpu", lambda *tensors: False)
        patch.setattr(rotate, "CHUNK", 4)
        yield set[str]()


@contextmanager
def on_cpp() -> Iterator[set[str]]:
    """Run the kernels in C++ for a CPU."""
    launched, function = set[str](), build.function

    def noted(source: str, name: str, dtype: torch.dtype) -> Callable[..., None]:
        launched.add(name)
        return function(source, name, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "function", noted)
        yield launched


def triton_modules() -> list[Any]:
    from dpa4.ops.triton import edge_products as triton_rotate
    from dpa4.ops.triton import gate as triton_gate
    from dpa4.ops.triton import segments as triton_segments
    from dpa4.ops.triton import split_matmul as triton_matmul

    return [triton_gate, triton_matmul, triton_rotate, triton_segments]


@contextmanager
def noting_triton() -> Iterator[set[str]]:
    """Record which kernels in Triton are launched."""
    launched = set[str]()

    def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (launched.add(name), run(*args, **kwargs))[1]

    with pytest.MonkeyPatch.context() as patch:
        for module in triton_modules():
            for name, kernel in vars(module).items():
                if name.startswith("_") and hasattr(kernel, "run"):
                    patch.setattr(kernel, "run", noted(name, kernel.run))
        yield launched


@contextmanager
def on_triton() -> Iterator[set[str]]:
    """Interpret the kernels in Triton, with tiles so small that small matrices have several along every axis."""
    from dpa4.ops.triton import split_matmul as triton_matmul

    operators = {
        "edge_matmul": rotate._edge_matmul_cuda,
        "scatter_matmul": rotate._scatter_matmul_cuda,
        "edge_outer": rotate._edge_outer_cuda,
        "segment_sum": segments._segment_sum_cuda,
        "segment_max": segments._segment_max_cuda,
    }
    with noting_triton() as launched, pytest.MonkeyPatch.context() as patch:
        for name, kernel in operators.items():
            patch.setattr(torch.ops.dpa4, name, kernel)
        patch.setattr(available, "_on_cpu", lambda *tensors: False)
        patch.setattr(available, "triton", lambda x: x.dtype != torch.float64)
        patch.setattr(available, "split_product", lambda x: x.dtype == torch.float32)
        patch.setattr(triton_matmul, "default_tile", lambda columns: triton_matmul.Tile(32, 32, 16, 4, 1))
        yield launched


@contextmanager
def on_gpu() -> Iterator[set[str]]:
    """Run the kernels for a GPU: Triton, library products and, on Hopper, CUDA C++."""
    launch = hopper._launch
    with noting_triton() as launched, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "_launch", lambda name, *args: (launched.add(name), launch(name, *args))[1])
        yield launched


BACKENDS = {"plain": on_plain, "cpp": on_cpp, "triton": on_triton, "gpu": on_gpu, "hopper": on_gpu}
DEVICES = {"gpu": "cuda", "hopper": "cuda"}


# The table: every section below adds its operators


DOUBLE, SINGLE, BRAIN, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Backend:
    """Kernels of one kind for an operator.

    Attributes:
        tolerance: Largest error of the value, and of derivatives, for every type; relative to the largest entry.
            Types without a tolerance of derivatives are not differentiated.
        runs: Names of the kernels that must run unless inputs or results are empty.
        quick: Names of the sizes in the default run, the others being slow; None if all are quick.
        supports: Condition on the numbers of a size; None if there are kernels for all sizes.
    """

    tolerance: dict[torch.dtype, tuple[float, ...]]
    runs: Sequence[str] = ()
    quick: Sequence[str] | None = None
    supports: Callable[..., bool] | None = None


@dataclass(frozen=True)
class Operator:
    """An operator with its formula, arguments and backends.

    Attributes:
        function: The operator as a function of the inputs and the other arguments of a case. Returns one tensor, or
            several if ``order`` is 0.
        formula: The same function in plain operations, which autograd differentiates.
        cases: Function from a size to its cases.
        sizes: Sizes by name.
        backends: Backends by name.
        on_gpu: Further sizes for a GPU.
        order: Number of derivatives: 0, 2, or 3 for any number.
        first: Number of leading inputs with a first derivative; None for all.
        last: Number of leading inputs with a second derivative; None for all.
        strided: True if inputs may have any strides.
        small: Name of the size for finite differences.
    """

    function: Callable[..., Any]
    formula: Callable[..., Any]
    cases: Callable[[Any], list[Case]]
    sizes: dict[str, Any]
    backends: dict[str, Backend]
    on_gpu: dict[str, Any] = field(default_factory=dict)
    order: int = 3
    first: int | None = None
    last: int | None = None
    strided: bool = True
    small: str = "small"

    def names(self, backend: str) -> list[str]:
        """Names of the sizes for a backend."""
        sizes = self.sizes | (self.on_gpu if backend == "gpu" else {})
        supports = self.backends[backend].supports
        return [name for name, size in sizes.items() if supports is None or supports(*size)]

    def small_case(self) -> Case:
        """The first case of the small size."""
        return self.cases(self.sizes[self.small])[0]


OPERATORS: dict[str, Operator] = {}

# Low precision is accumulated in float32 and rounded once: half a unit in the last place, and float32's own rounding.
ROUNDED = {t: (0.51 * torch.finfo(t).eps,) for t in (BRAIN, HALF)}
# Sums of some hundred products in another order.
SUMS = {DOUBLE: (1e-14, 1e-13), SINGLE: (1e-6, 3e-6)}
# Sums of up to 700 products as three of TF32, and their derivatives.
GPU_SUMS = {DOUBLE: (1e-14, 1e-12), SINGLE: (3e-6, 3e-5)}


# Between nodes and edges


EDGES = {  # (N nodes, E edges, H heads, M rows, K coefficients, c channels per head)
    "degree 0": (4, 9, 1, 1, 1, 3),
    "degree 0, 16 channels": (11, 7, 1, 1, 1, 16),
    "degree 1": (5, 15, 1, 4, 4, 32),
    "degree 2, two heads": (4, 5, 2, 7, 9, 5),
    "degree 3": (3, 9, 1, 10, 16, 64),
    "degree 4": (3, 7, 1, 13, 25, 16),
    "degree 5": (2, 4, 1, 16, 36, 8),
    "several tiles": (2, 2, 1, 17, 40, 70),
    "several tiles, two heads": (2, 3, 2, 17, 72, 70),
    "one node": (1, 3, 1, 10, 16, 16),
    "no edges": (3, 0, 1, 10, 16, 16),
    "no nodes": (0, 0, 1, 4, 4, 16),
    "as nano": (11, 50, 1, 4, 4, 32),
    "as mini": (11, 131, 1, 7, 9, 32),
    "as neo": (11, 97, 2, 10, 16, 32),
    "as air": (11, 49, 1, 10, 16, 64),
    "as pro": (11, 33, 2, 16, 36, 64),
    "order 2": (11, 13, 1, 14, 16, 16),
    "three heads of 48": (11, 12, 3, 9, 9, 48),
    "one edge": (11, 1, 1, 7, 9, 16),
    "small": (4, 6, 2, 3, 4, 16),
}
LARGE_EDGES = {"2000 edges": (40, 2000, 1, 10, 16, 64), "900 edges, two heads": (40, 900, 2, 16, 72, 64)}


def ends(num_edges: int, num_nodes: int, seed: int = 0) -> tuple[Incidence, Incidence]:
    """Unsorted and sorted ends of random edges; the last of several nodes has no edge."""
    random = torch.Generator().manual_seed(seed)
    one, two = torch.randint(0, max(num_nodes - 1, 1), (2, num_edges), generator=random)
    return Incidence.of(one, num_nodes), Incidence.of_sorted(two.sort().values, num_nodes)


def edge_cases(*names: str) -> Callable[[tuple[int, ...]], list[Case]]:
    """Cases with some of the inputs a (E, H, M, K), x (N, K, H c), g (E, M, H c); unsorted and sorted ends."""

    def cases(size: tuple[int, ...]) -> list[Case]:
        N, E, H, M, K, c = size
        shapes = {"a": (E, H, M, K), "x": (N, K, H * c), "g": (E, M, H * c)}
        inputs = [normal(*shapes[n], seed=ord(n)) for n in names]
        return [Case(inputs, (end, H)) for end in ends(E, N)]

    return cases


def one_hot(end: Incidence) -> Tensor:
    """Matrix of shape (N, E) with 1 where an edge belongs to a node."""
    nodes = torch.arange(end.num_nodes, device=end.index.device)
    return (end.index == nodes[:, None]).double()


def by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, x.shape[-1] // heads))


def edge_matmul_formula(a: Tensor, x: Tensor, end: Incidence, heads: int) -> Tensor:
    return torch.einsum("ehmk,ekhc->emhc", a, by_head(x[end.index], heads)).flatten(2)


def scatter_matmul_formula(a: Tensor, g: Tensor, end: Incidence, heads: int) -> Tensor:
    parts = torch.einsum("ehmk,emhc->ekhc", a, by_head(g, heads)).flatten(2)
    return torch.tensordot(one_hot(end), parts, 1)


def edge_outer_formula(g: Tensor, x: Tensor, end: Incidence, heads: int) -> Tensor:
    return torch.einsum("emhc,ekhc->ehmk", by_head(g, heads), by_head(x[end.index], heads))


def segment_max_cases(size: tuple[int, ...]) -> list[Case]:
    """Cases whose start exceeds all entries of some columns."""
    (g, start), others = edge_cases("g", "g")(size)[0].inputs, [c.others for c in edge_cases("g")(size)]
    start = torch.linspace(-1, 3, g.shape[1:].numel(), dtype=torch.float64).view(g.shape[1:])
    return [Case([g, start], o) for o in others]


def segment_max_formula(g: Tensor, start: Tensor, end: Incidence, heads: int) -> Tensor:
    parts = [torch.cat([start[None], g[end.index == n]]).amax(0) for n in range(end.num_nodes)]
    return torch.stack(parts) if parts else g.new_empty(0, *start.shape)


INTERPRETED_EDGES = ("degree 2, two heads", "several tiles", "one node", "no edges", "no nodes")
# The interpreter treats bfloat16 as integers in products, and stores it without rounding.
INTERPRETED = SUMS | {HALF: ROUNDED[HALF]}
INTERPRETED_SUM = INTERPRETED | {BRAIN: (1.01 * torch.finfo(BRAIN).eps,)}
EXACT = {t: (0,) for t in (DOUBLE, SINGLE, HALF)}


def few_edges(nodes: int, edges: int, *others: int) -> bool:
    """Return whether the interpreter can compute a size in seconds."""
    return edges < 20


def edge_operator(
    function: Callable[..., Any], formula: Callable[..., Any], inputs: str, kernel: str
) -> Operator:
    """Operator between nodes and edges with a kernel in Triton; edge products have one in C++, too."""
    backends = {
        "plain": Backend(SUMS | ROUNDED),
        "triton": Backend(
            INTERPRETED_SUM if kernel == "_reduce" else INTERPRETED, [kernel], INTERPRETED_EDGES, few_edges
        ),
        "gpu": Backend(GPU_SUMS | {BRAIN: ROUNDED[BRAIN]}, [kernel]),
    }
    if kernel != "_reduce":
        backends["cpp"] = Backend(SUMS, [kernel.removeprefix("_")], supports=lambda *size: size[-1] % 16 == 0)
    return Operator(function, formula, edge_cases(*inputs), EDGES, backends, LARGE_EDGES)


OPERATORS |= {
    "edge_matmul": edge_operator(
        lambda a, x, end, heads: edge_matmul(a, x, end), edge_matmul_formula, "ax", "_edge_matmul"
    ),
    "scatter_matmul": edge_operator(
        lambda a, g, end, heads: scatter_matmul(a, g, end), scatter_matmul_formula, "ag", "_scatter_matmul"
    ),
    "edge_outer": edge_operator(edge_outer, edge_outer_formula, "gx", "_edge_outer"),
    "gather": edge_operator(
        lambda x, end, heads: gather(x, end), lambda x, end, heads: x[end.index], "x", "_reduce"
    ),
    "segment_sum": edge_operator(
        lambda g, end, heads: segment_sum(g, end),
        lambda g, end, heads: torch.tensordot(one_hot(end), g, 1),
        "g",
        "_reduce",
    ),
    "segment_sum of scalars": edge_operator(
        lambda g, end, heads: segment_sum(g[:, 0, 0], end),
        lambda g, end, heads: one_hot(end) @ g[:, 0, 0],
        "g",
        "_reduce",
    ),
    "segment_max": Operator(
        lambda g, start, end, heads: segment_max(g, start, end),
        segment_max_formula,
        segment_max_cases,
        EDGES,
        {
            "plain": Backend(EXACT | {BRAIN: (0,)}),
            "triton": Backend(EXACT, ["_reduce"], INTERPRETED_EDGES, few_edges),
            "gpu": Backend(EXACT | {BRAIN: (0,)}, ["_reduce"]),
        },
        LARGE_EDGES,
        order=0,
    ),
}


# Copies of entries, and sums of at most two


INDEX = torch.tensor([0, 2, 2, 0, 2])  # repeats some entries, omits one
COPIES = {DOUBLE: (1e-14, 1e-14), SINGLE: (3e-7, 1e-6)}

OPERATORS |= {
    "pick": Operator(
        lambda x, dim: pick(x, dim, INDEX),
        lambda x, dim: x.index_select(dim, INDEX),
        lambda size: [Case([normal(*size)], (len(size) - 2,))],
        {"small": (3, 5), "an axis in the middle": (2, 3, 4)},
        {"plain": Backend(COPIES)},
    ),
    "materialized": Operator(
        materialized,
        torch.clone,
        lambda size: [Case([normal(*size)])],
        {"small": (3, 5)},
        {"plain": Backend(COPIES)},
    ),
}


# Products of few terms


SPARSE = {  # (items, width)
    f"{items} items of {width}": (items, width) for items in (0, 1, 13) for width in (1, 16, 96)
}


def bilinear_cases(size: tuple[int, ...]) -> list[Case]:
    items, width = size
    coefficients = normal(7, 4, 5) * (normal(7, 4, 5, seed=1) > 0.8)
    return [
        Case(
            [normal(items, 4, width), normal(items, 5, width, seed=2)], (Terms.of(coefficients), coefficients)
        )
    ]


def bilinear_formula(a: Tensor, b: Tensor, terms: Terms, coefficients: Tensor) -> Tensor:
    return torch.einsum("gij,nic,njc->ngc", coefficients, a, b)


OPERATORS |= {
    "bilinear": Operator(
        lambda a, b, terms, coefficients: sparse_product(a, b, terms, len(coefficients)),
        bilinear_formula,
        bilinear_cases,
        SPARSE,
        {"plain": Backend(SUMS), "cpp": Backend(SUMS, ["bilinear"])},
        small="1 items of 16",
    ),
}


# Products with weights


PRODUCTS = {  # (batch, E rows, K terms, N columns); a batch of 0 is a product of two matrices
    "several tiles": (0, 70, 48, 80),
    "partial tiles": (0, 33, 35, 19),
    "one row, one column": (0, 1, 16, 1),
    "less than a tile": (0, 5, 1, 3),
    "batches": (3, 40, 32, 20),
    "no rows": (0, 0, 32, 16),
    "no terms": (0, 4, 0, 16),
    "batches of no rows": (2, 0, 32, 16),
    "small": (2, 7, 6, 5),
}
LARGE_PRODUCTS = {
    "256 columns": (2, 1000, 256, 256),
    "384 columns": (2, 515, 384, 384),
    "40 terms": (2, 77, 40, 24),
    "128 columns": (2, 300, 96, 128),
}


def product_cases(size: tuple[int, ...]) -> list[Case]:
    batch, E, K, N = size
    lead = [batch] if batch else []
    return [Case([normal(*lead, E, K), normal(*lead, K, N, seed=1)])]


BLOCKS = {  # (F foci, E edges, columns of every block)
    "one block": (1, 20, (48,)),
    "two blocks": (2, 33, (64, 96)),
    "three blocks": (1, 5, (16, 32, 8)),
    "no edges": (2, 0, (16, 32)),
}
LARGE_BLOCKS = {"edges of a crystal": (2, 8192, (128, 192)), "no multiple of a tile": (1, 20_001, (96, 128))}


def order_matmul_cases(size: tuple[Any, ...]) -> list[Case]:
    """Cases with transposed weights, like in a backward pass; every block once, and all but the first twice."""
    F, E, columns = size
    weights = [normal(F, k, k, seed=k).mT * k**-0.5 for k in columns]
    cases = []
    for copies in (1, 2):
        width = columns[0] + copies * sum(columns[1:])
        cases.append(Case([normal(F, E, width), normal(F, E, width, seed=1), *weights], (copies,)))
    return cases


def order_matmul_ways(x: Tensor, add: Tensor, *others: Any) -> list[Tensor]:
    """Products by themselves, with an added tensor, written to that tensor, and with residual weights."""
    *matrices, copies = others
    weights, residual = (
        [Weight(m, residual=r, copies=copies if i else 1) for i, m in enumerate(matrices)]
        for r in (False, True)
    )
    weights, residual = (prepare(x, w, split(x, w)) for w in (weights, residual))
    return [
        order_matmul(x, weights),
        order_matmul(x, weights, add=add),
        order_matmul(x, weights, add=add.clone(), overwrite=True),
        order_matmul(x, residual),
    ]


def order_matmul_formula(x: Tensor, add: Tensor, *others: Any) -> list[Tensor]:
    *matrices, copies = others
    matrices = [m for i, m in enumerate(matrices) for _ in range(copies if i else 1)]
    parts = x.split([m.shape[-1] for m in matrices], -1)
    product = torch.cat([part @ m for part, m in zip(parts, matrices, strict=True)], -1)
    return [product, product + add, product + add, product + x]


BLOCK_SUMS = {DOUBLE: (1e-14,), SINGLE: (1e-6,)}
OPERATORS |= {
    "precise_matmul": Operator(
        precise_matmul,
        torch.matmul,
        product_cases,
        PRODUCTS,
        {
            "plain": Backend(SUMS),
            "triton": Backend(SUMS, ["_matmul", "_split_weights"]),
            "gpu": Backend(GPU_SUMS, ["_split_weights"]),
        },
        LARGE_PRODUCTS,
    ),
    "order_matmul": Operator(
        order_matmul_ways,
        order_matmul_formula,
        order_matmul_cases,
        BLOCKS,
        {
            "plain": Backend(BLOCK_SUMS),
            "triton": Backend(BLOCK_SUMS, ["_matmul"], ("one block", "three blocks", "no edges")),
            "gpu": Backend(BLOCK_SUMS | {SINGLE: (3e-6,)}, ["_split_weights"]),
        },
        LARGE_BLOCKS,
        order=0,
        strided=False,
        small="three blocks",
    ),
}


# Stacks of SO(2) layers


STACKS = {  # (lmax, mmax, c channels, F foci, layers, E edges)
    "degree 0": (0, 0, 3, 1, 2, 5),
    "degree 0, 16 channels": (0, 0, 16, 1, 2, 7),
    "degree 2": (2, 1, 32, 1, 3, 9),
    "degree 4": (4, 1, 16, 1, 2, 9),
    "degree 5, two foci": (5, 1, 8, 2, 2, 17),
    "order 0": (2, 0, 6, 1, 3, 4),
    "order 2": (3, 2, 16, 1, 2, 13),
    "order 2, four foci": (3, 2, 5, 4, 3, 6),
    "odd multiples of 16": (2, 2, 48, 3, 2, 12),
    "one layer": (2, 1, 4, 2, 1, 5),
    "one layer, 32 channels": (2, 1, 32, 1, 1, 48),
    "no edges": (2, 1, 16, 1, 3, 0),
    "one edge": (2, 1, 16, 1, 3, 1),
    "as nano": (1, 1, 32, 1, 3, 50),
    "as mini": (2, 1, 32, 1, 3, 131),
    "as neo": (3, 1, 32, 2, 3, 97),
    "as air": (3, 1, 64, 1, 4, 49),
    "as pro": (5, 1, 64, 2, 2, 33),
    "small": (1, 1, 16, 1, 2, 3),
}
SEPARATE_STACKS = ("order 2", "order 2, four foci", "one layer", "no edges", "as mini", "as neo", "small")
"""Sizes of stacks whose matrices of orders above zero act on the rows of -m and of +m separately."""

WIDE_STACKS = {  # one gated layer of the largest published models, with few edges
    "as max": (6, 1, 96, 2, 2, 5),
    "as ultra": (6, 1, 128, 3, 2, 3),
}
FUSED = {  # edges below, at and above multiples of the 64 of a block, and more blocks than multiprocessors
    f"{layers} layers, {edges} edges": (3, 1, 64, 1, layers, edges)
    for layers in (1, 2, 4, 5)
    for edges in (0, 1, 63, 64, 65, 8447, 20_001)
}


def degrees(layout: EdgeLayout) -> list[int]:
    """Degree of every row of the edge frame."""
    zero = list(range(layout.lmax + 1))
    return zero + [l for m in range(1, layout.mmax + 1) for _ in range(2) for l in range(m, layout.lmax + 1)]


def on_rows(z: Tensor, layout: EdgeLayout) -> Tensor:
    """Repeat the entry of every degree and channel for all rows of the degree."""
    return z.unflatten(-1, (layout.lmax + 1, -1))[..., degrees(layout), :].flatten(-2)


def logits(u: Tensor, w: Tensor) -> Tensor:
    """Arguments of the gates: scalars, and linear maps of them for the higher degrees."""
    s = u[..., : w.shape[1]]
    return torch.cat([s, s @ w], -1)


def block_columns(layout: EdgeLayout, c: int) -> list[slice]:
    """Columns of every order |m|."""
    widths = [count * c for _, count in layout.orders()]
    return [slice(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]


def stack_cases(training: bool, separate: bool = False) -> Callable[[tuple[int, ...]], list[Case]]:
    """Cases with inputs x, the free blocks of the matrices of every layer, and the weights of the gates."""

    def cases(size: tuple[int, ...]) -> list[Case]:
        lmax, mmax, c, F, layers, E = size
        layout = EdgeLayout(lmax, mmax)
        blocks = []
        for t in range(layers):
            for m, (_, count) in enumerate(layout.orders()):
                n = count * c
                # Order 0 has one block; the matrices of the others are [[U, V], [-V, U]], or U for both signs.
                blocks += [
                    normal(F, n // (2 if m else 1), n // (2 if m else 1), seed=10 * t + m + i) * n**-0.5
                    for i in range(2 if m and not separate else 1)
                ]
        gates = [normal(F, c, lmax * c, seed=t) * c**-0.5 for t in range(layers - 1)]
        return [Case([normal(F, E, layout.total * c, seed=99), *blocks, *gates], (layout, layers, training))]

    return cases


def weights_of_stack(
    flat: Sequence[Tensor], layout: EdgeLayout, layers: int
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Matrices of every layer, one per order, and the weights of the gates."""
    rest, matrices = iter(flat), []
    separate = len(flat) == layers * (layout.mmax + 1) + layers - 1
    for _ in range(layers):
        matrices.append([next(rest)])
        for _ in range(layout.mmax):
            if separate:
                matrices[-1].append(next(rest))
                continue
            u, v = next(rest), next(rest)
            matrices[-1].append(torch.cat([torch.cat([u, v], 2), torch.cat([-v, u], 2)], 1))
    return matrices, list(rest)


def stack(x: Tensor, *others: Any) -> Tensor:
    *flat, layout, layers, training = others
    matrices, gates = weights_of_stack(flat, layout, layers)
    return so2_stack(x, matrices, gates, layout, training)


def stack_formula(x: Tensor, *others: Any) -> Tensor:
    *flat, layout, layers, _ = others
    matrices, gates = weights_of_stack(flat, layout, layers)
    columns = block_columns(layout, x.shape[-1] // layout.total)
    for t, layer in enumerate(matrices):
        parts = [x[..., s].split(w.shape[-1], -1) for s, w in zip(columns, layer, strict=True)]
        u = torch.cat([part @ w for signs, w in zip(parts, layer, strict=True) for part in signs], -1)
        x = x + (u * on_rows(logits(u, gates[t]).sigmoid(), layout) if t < layers - 1 else u)
    return x


def gate_cases(size: tuple[int, ...]) -> list[Case]:
    """Cases with the tensors x, b, v, a, u of the functions in `gate`, and the weights."""
    lmax, mmax, c, F, _, E = size
    layout = EdgeLayout(lmax, mmax)
    tensors = [normal(F, E, layout.total * c, seed=i) for i in range(5)]
    return [Case([*tensors, 0.3 * normal(F, c, lmax * c, seed=9)], (layout,))]


def gates(
    x: Tensor, b: Tensor, v: Tensor, a: Tensor, u: Tensor, weight: Tensor, layout: EdgeLayout
) -> list[Tensor]:
    """Results of all functions of `gate`."""
    w = weight.contiguous()
    du, none = gate.vjp(a, u, w, layout, sums=False)
    assert none is None
    return [
        gate.value(x, u, w, layout),
        *gate.vjp(a, u, w, layout, sums=True),
        du,
        gate.tangent(b, v, u, w, layout),
        *gate.joint(b, v, a, u, w, layout),
        *gate.undo(x, b, v, u, w, layout, overwrite=False),
        gate.undo(x, None, None, u, w, layout, overwrite=False)[0],
        *gate.undo(x.clone(), b.clone(), v, u, w, layout, overwrite=True),
    ]


def gates_formula(
    x: Tensor, b: Tensor, v: Tensor, a: Tensor, u: Tensor, weight: Tensor, layout: EdgeLayout
) -> list[Tensor]:
    """Compute `gates` by autograd from y = x + u sigma(z); p and q are derivatives by z and by its change zeta."""
    c, u = weight.shape[1], u.detach().requires_grad_()
    z, zeta = (logits(t, weight).detach().requires_grad_() for t in (u, v))

    def gated(u: Tensor, z: Tensor) -> Tensor:
        return u * on_rows(z.sigmoid(), layout)

    def change(u: Tensor, z: Tensor, zeta: Tensor) -> Tensor:
        slope = z.sigmoid() * (1 - z.sigmoid())
        return v * on_rows(z.sigmoid(), layout) + u * on_rows(slope * zeta, layout)

    def both(u: Tensor, z: Tensor, zeta: Tensor) -> Tensor:
        return (b * gated(u, z)).sum() + (a * change(u, z, zeta)).sum()

    whole = logits(u, weight)
    (da,) = torch.autograd.grad((a * gated(u, whole)).sum(), u, retain_graph=True)
    (du,) = torch.autograd.grad(both(u, whole, logits(v, weight)), u)
    q, p = (t[..., c:] for t in torch.autograd.grad(both(u.detach(), z, zeta), [z, zeta]))
    y, d = (t.detach() for t in (gated(u, z), change(u, z, zeta)))
    back = [x - y, b - d]
    return [x + y, da, p, da, b + d, du, da, q, p, *back, back[0], *back]


# Rounding of products of up to 400 terms, amplified by up to four layers and two derivatives.
STACK_SUMS = {DOUBLE: (1e-13, 1e-13), SINGLE: (5e-6, 1e-5)}
GPU_STACK_SUMS = {DOUBLE: (1e-13, 1e-11), SINGLE: (5e-6, 1e-4)}
STAGES = ["so2_value", "so2_vjp", "so2_tangent", "so2_joint"]
GATE_KERNELS = ["_gate_value", "_gate_vjp", "_gate_tangent", "_gate_joint", "_gate_undo"]
INTERPRETED_GATES = ("degree 0", "degree 2", "order 2, four foci", "order 0", "one layer", "no edges")


def stack_operator(training: bool, separate: bool = False) -> Operator:
    """SO(2) stack, differentiated by the features; in training, second derivatives include the weights.

    Args:
        training: Whether the weights are differentiated.
        separate: Whether the rows of -m and +m are multiplied separately.
    """
    backends = {
        "plain": Backend(STACK_SUMS, quick=tuple(STACKS)),
        "cpp": Backend(
            STACK_SUMS,
            STAGES,
            tuple(STACKS) if training else None,
            supports=lambda lmax, mmax, c, *_: c % 16 == 0,
        ),
        # Other sizes are too large for the interpreter.
        "triton": Backend(
            {SINGLE: (2e-6, 1e-5)},
            ["_matmul"],
            ("one layer", "small"),
            lambda lmax, mmax, c, F, layers, E: lmax * c <= 64 and E < 20,
        ),
        "gpu": Backend(GPU_STACK_SUMS),
    }
    large = {"many edges": (3, 1, 64, 1, 4, 5000)}
    last = None if training else 1
    sizes = {name: STACKS[name] for name in SEPARATE_STACKS} if separate else STACKS | WIDE_STACKS
    cases = stack_cases(training, separate)
    return Operator(stack, stack_formula, cases, sizes, backends, large, order=2, first=1, last=last)


OPERATORS |= {
    "gates": Operator(
        gates,
        gates_formula,
        gate_cases,
        STACKS | WIDE_STACKS,
        {
            "plain": Backend({DOUBLE: (1e-13,), SINGLE: (3e-6,)}),
            "triton": Backend({SINGLE: (3e-6,), HALF: (4e-3,)}, GATE_KERNELS, INTERPRETED_GATES),
            "gpu": Backend({DOUBLE: (1e-13,), SINGLE: (3e-6,), BRAIN: (3e-2,)}, GATE_KERNELS),
        },
        order=0,
        strided=False,
    ),
    "so2_stack": stack_operator(training=True),
    "so2_stack in evaluation": stack_operator(training=False),
    "so2_stack of separate signs": stack_operator(training=True, separate=True),
    "so2_stack of separate signs in evaluation": stack_operator(training=False, separate=True),
    "so2_stack in one kernel": Operator(
        stack,
        stack_formula,
        stack_cases(training=False),
        FUSED,
        # Split numbers hold 22 bits, and up to five layers add rounding; second derivatives use Triton kernels.
        {"hopper": Backend({SINGLE: (2e-6, 1e-5)}, ["so2_value", "so2_vjp"])},
        order=2,
        first=1,
        last=1,
        small="2 layers, 63 edges",
    ),
}


# The comparison


def differentiate(
    operator: Operator,
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    others: Sequence[Any],
    energy: float = 1.0,
    forces: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the value, and derivatives: gradients of an energy and of a training loss on energy and forces."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs, *others)
    value = y.square().sum() / max(y.shape[-1], 1) if y.dim() else y.square()
    first = torch.autograd.grad(value, inputs[: operator.first], create_graph=True)
    loss = energy * value.square() + forces * torch.stack([f.square().sum() for f in first]).sum()
    last = torch.autograd.grad(loss, inputs[: operator.last], materialize_grads=True)
    return [y.detach()], [*(f.detach() for f in first), *last]


def strided_as_transposed(t: Tensor) -> Tensor:
    """Copy a tensor into the strides of a transposed one."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def results(
    operator: Operator, function: Callable[..., Any], inputs: list[Tensor], others: Sequence[Any], order: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Values and derivatives of a function."""
    if order:
        return differentiate(operator, function, inputs, others)
    with torch.no_grad() if function is operator.function else torch.enable_grad():
        found = function(*inputs, *others)
    return ([found] if isinstance(found, Tensor) else list(found)), []


def check(name: str, backend: str, size: str, strided: bool = False, bits: bool = False) -> dict[str, float]:
    """Compare an operator on a backend with its formula, in all types and for all cases of a size.

    Args:
        name: Name of the operator.
        backend: Name of the backend.
        size: Name of the size.
        strided: True if the inputs have the strides of transposed tensors.
        bits: True to compute everything twice; results must agree to the last bit.

    Returns:
        Errors of value and derivatives by type.
    """
    operator = OPERATORS[name]
    kernels, device = operator.backends[backend], DEVICES.get(backend, "cpu")
    errors: dict[str, float] = {}
    with BACKENDS[backend]() as launched:
        for dtype, tolerance in kernels.tolerance.items():
            order = operator.order if len(tolerance) > 1 else 0
            for inputs, others in operator.cases((operator.sizes | operator.on_gpu)[size]):
                inputs = [t.to(dtype) for t in inputs]
                others = [to(o, device) for o in others]
                exactly = [to(t, device).double() for t in inputs]
                expected = results(operator, operator.formula, exactly, others, order)
                if strided:
                    inputs = [strided_as_transposed(t) for t in inputs]
                    assert not all(t.is_contiguous() for t in inputs)
                arguments = [to(t, device) for t in inputs], others
                found = results(operator, operator.function, *arguments, order)
                kinds = zip(("value", "derivatives"), found, expected, tolerance, strict=False)
                for kind, some, exact, allowed in kinds:
                    for i, (one, other) in enumerate(zip(some, exact, strict=True)):
                        where = f"{name} on {backend}, {size}, {dtype}: {kind} {i}"
                        assert one.dtype == dtype, f"{where} is of {one.dtype}"
                        error = deviation(one, other)
                        assert error <= allowed, f"{where} is wrong by {error:.2g}, allowed are {allowed:.2g}"
                        key = f"{dtype} {kind}"
                        errors[key] = max(errors.get(key, 0.0), error)
                if bits:
                    again = results(operator, operator.function, *arguments, order)
                    for one, other in zip([*found[0], *found[1]], [*again[0], *again[1]], strict=True):
                        assert torch.equal(one, other), (
                            f"{name}, {size}, {dtype}: other bits at the second call"
                        )
    if any(t.numel() for t in expected[0]) and all(t.numel() for t in inputs):
        missing = set(kernels.runs) - launched
        assert not missing, f"{name} on {backend}, {size}: {missing} did not run"
    return errors
