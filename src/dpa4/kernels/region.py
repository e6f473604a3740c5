"""Compiled regions: parts of the model as compiled functions with compiled first and second derivatives.

Training on forces differentiates twice, which the compiler's own autograd does not do. A region y = f(p, x) of
parameters p and arguments x is therefore traced once through all that such a step asks of it, the four stages of
`dpa4.kernels.twice`. The trace is a flat graph of ATen operators and kernels in which nothing is left to
differentiate. It is cut into the stages: products of matrices and kernels over edges are computed once and kept for
later stages, everything else is computed again where it is needed, since reading it from memory would take as long
(docs/adr/0011).

Traces and compiled stages are kept on disk, so that later runs need neither the tracer nor the compiler.
"""

import hashlib
import json
import math
import operator
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from dpa4.kernels import twice
from dpa4.kernels.stage import Function, Recipe, Stage, recipe_of, symbolic_sizes
from dpa4.kernels.twice import Maybe

Axis = Literal[
    "node", "node+1", "center", "center+1", "edge", "node data", "center data", "edge data", "static"
]
"""What the leading axis of an argument counts.

"center" are the nodes that receive; "static" does not vary, and such arguments are taken for parameters. Data are
what no parameter influences, such as the geometry: they have a derivative in stage 1, that of the forces, but none
in stage 3.
"""

_COUNTED = ("node", "center", "edge")
_DATA = " data"

_INDEX_LIMIT = 2**31
"""Elements beyond which an index needs 64 bits."""

_HINTS = {"node": 20_001, "center": 20_005, "edge": 100_009}
"""Sizes the compiler is told to expect. Always the same, so that code depends on the model alone; odd, different, and
larger than any fixed axis: where it was told 221 nodes and a fixed axis had as many columns, code was made on a GPU
that took the number of nodes for fixed."""

_EXPENSIVE = {"mm", "bmm", "addmm", "baddbmm", "scatter_reduce", "index_add", "index_put"}
_REDUCTIONS = {"sum", "mean", "amax"}


class RegionCode:
    """Compiled code of regions that differ in their parameters only, made when first needed.

    Args:
        name: For messages.
        arguments: Axis of every tensor among the arguments, in the structure of the arguments.
        report: Called with the name and the seconds after something was compiled.
        origin: Everything that the code depends on besides its arguments and the sources of this package, such as
            the configuration of the model. With None it is not kept on disk.

    Attributes:
        make: Makes the function of a stage.
        tracing: Called before a trace, which takes seconds.
        added: Called with the stages of a new program.
    """

    def __init__(
        self,
        name: str,
        arguments: Any,
        report: Callable[[str, float], None] = lambda name, seconds: None,
        origin: str | None = None,
    ):
        self.name, self.report, self.origin = name, report, origin
        axes: list[str] = [a or "" for a in pytree.tree_leaves(arguments)]  # of `Axis`
        self.axes = [a.removesuffix(_DATA) for a in axes]
        self.data = [a.endswith(_DATA) for a in axes]
        self.programs: dict[Any, _Program] = {}
        self.make: Callable[[Stage], Function] = Stage.compile
        self.tracing: Callable[[], None] = lambda: None
        self.added: Callable[[list[Stage]], None] = lambda stages: None

    def stages(self) -> list[Stage]:
        """Of all programs."""
        return [stage for program in self.programs.values() for stage in program.stages]

    def folder(self, device: torch.device, kind: Any) -> Path | None:
        """Where a program is kept, for one kind of arguments; in the compiler's cache."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        if self.origin is None:
            return None
        text = repr([_surroundings(device), self.origin, self.name, self.axes, self.data, kind])
        return Path(cache_dir()) / "dpa4" / hashlib.sha256(text.encode()).hexdigest()


def _surroundings(device: torch.device) -> list[Any]:
    """What code on a device depends on besides its origin."""
    if device.type == "cuda":
        machine: list[Any] = [torch.cuda.get_device_name(device)]
    else:
        machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    return [torch.__version__, torch.get_default_dtype(), *machine, _digest_of_sources()]


@cache
def _digest_of_sources() -> str:
    """Of all that a trace passes through."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].glob("[km]*/*.py")):  # kernels, model
        digest.update(source.read_bytes())
    return digest.hexdigest()


class Region:
    """Stands for a method of a module, and is called like it.

    Arguments and results are tensors or (named) tuples of them. The method must be a function of its arguments and of
    the parameters and buffers of the named submodules alone. Sizes along node and edge axes may differ from call to
    call without compiling again; where a size is zero or one, the method itself runs. In training mode a region can
    be differentiated twice and has gradients of parameters; else once, with respect to its arguments.

    Args:
        module: The module.
        method: Name of the method.
        submodules: Names of the submodules and parameters that the method uses.
        code: Shared by all regions of the same code.
        max_kept: Nodes up to which stages keep results for each other outside of training. With more nodes, or, on a
            GPU, where the centres are not all nodes, the derivatives compute everything again: memory stays small.
        keeps: Whether stages keep results on a GPU at all; not for methods that are called for parts of the nodes.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        submodules: Sequence[str],
        code: RegionCode,
        max_kept: int = 2**62,
        keeps: bool = True,
    ):
        self.module, self.eager, self.code = module, getattr(module, method), code
        self.max_kept, self.keeps = max_kept, keeps
        prefixes = tuple(f"{name}." for name in submodules)
        named = [*module.named_parameters(), *module.named_buffers()]
        named = [(n, t) for n, t in named if f"{n}.".startswith(prefixes)]
        self.names, self.tensors = [n for n, _ in named], [t for _, t in named]

    def __call__(self, *args: Any) -> Any:
        """The method's result for its arguments."""
        leaves, spec = pytree.tree_flatten(args)
        sizes = {}
        for axis, t in zip(self.code.axes, leaves, strict=True):
            if (counted := axis.removesuffix("+1")) in _COUNTED:
                sizes[counted] = len(t) - (axis != counted)
        if min(sizes.values()) < 2:  # compilers treat sizes 0 and 1 as special
            return self.eager(*args)
        program = self._program(leaves, spec, sizes)
        return pytree.tree_unflatten(twice.apply(program, [*self.tensors, *leaves]), program.out_spec)

    def _program(self, leaves: list[Maybe], spec: Any, sizes: dict[str, int]) -> "_Program":
        inputs = [*self.tensors, *leaves]
        device = next(t.device for t in leaves if t is not None)
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        training = self.module.training
        whole = sizes.get("center", sizes["node"]) == sizes["node"]
        bounded = _parts_bound_memory(device) and not (whole and self.keeps)
        keep = not bounded and (training or sizes["node"] <= self.max_kept)
        kinds = tuple(t if t is None else (t.dtype, t.requires_grad) for t in inputs)
        for wide in (False, True):
            kind = _Kind(kinds, device, autocast, training, keep, wide)
            if kind not in self.code.programs:
                start = time.monotonic()
                program = self.code.programs[kind] = _Program(self, inputs, spec, kind)
                self.code.report(self.code.name, time.monotonic() - start)
                self.code.added(program.stages)
            # The compiler takes for granted that indices have 32 bits if they do at the sizes it sees.
            if all(sizes[a] * n < _INDEX_LIMIT for a, n in self.code.programs[kind].elements.items()):
                break
        return self.code.programs[kind]


class _Kind(NamedTuple):
    """What the programs of a region differ in."""

    inputs: tuple[Any, ...]
    device: torch.device
    autocast: torch.dtype | None
    training: bool
    keep: bool
    wide: bool


class _Trace(NamedTuple):
    """What tracing a region finds; made of what JSON can hold."""

    stages: list[tuple[Recipe, list[tuple[int, int]]]]  # and where the arguments are, see `_Program.run`
    exists: list[list[bool]]  # which results each stage has
    results: Any  # their structure in stage 0
    elements: dict[str, int]  # most of them per entry of an axis

    @classmethod
    def read(cls, file: Path) -> "_Trace":
        """From a file."""
        stages, *others = json.loads(file.read_text())
        return cls([(Recipe.read(r), [(g, i) for g, i in takes]) for r, takes in stages], *others)

    def write(self, file: Path) -> None:
        """To a file, at once or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_name(f"{file.name}-{os.getpid()}")
        own.write_text(json.dumps(self))
        own.replace(file)


class _Program:
    """The stages of a region for one kind of arguments."""

    def __init__(self, region: "Region", inputs: list[Maybe], spec: Any, kind: _Kind):
        self.code, self.device = region.code, kind.device.type
        self.num_inputs = len(inputs)
        axes = ["static"] * len(region.tensors) + region.code.axes
        data = [False] * len(region.tensors) + region.code.data
        differentiable = [t is not None and t.requires_grad for t in inputs]
        # What stages 1 and 3 differentiate with respect to.
        self.mask = [d and a != "static" for d, a in zip(differentiable, axes, strict=True)]
        self.last_mask = [d and not given for d, given in zip(differentiable, data, strict=True)]
        self.once = not kind.training
        shapes = [
            t if t is None else tuple(t.shape[a != "static" :]) for t, a in zip(inputs, axes, strict=True)
        ]
        folder = region.code.folder(kind.device, [region.eager.__qualname__, region.names, kind, shapes])
        file = folder and folder / "trace.json"
        if file is not None and file.exists():
            trace = _Trace.read(file)
        else:
            region.code.tracing()
            trace = _traced(region, inputs, spec, kind, axes, self.mask, self.last_mask)
            if file is not None:
                trace.write(file)
        self.exists, self.elements = trace.exists, trace.elements
        self.out_spec = pytree.tree_structure(_built(trace.results))
        self.stages = [
            Stage(recipe, takes, folder and folder / f"stage-{i}")
            for i, (recipe, takes) in enumerate(trace.stages)
        ]

    def run(self, stage: int, given: Sequence[Sequence[Maybe]]) -> tuple[list[Maybe], list[Tensor]]:
        """See `dpa4.kernels.twice.Stages`."""
        piece, exists = self.stages[stage], self.exists[stage]
        if piece.empty:
            return [None for _ in exists], []
        flat = [t.contiguous() for t in (given[group][i] for group, i in piece.takes) if t is not None]
        if piece.function is None:
            start = time.monotonic()
            piece.function = self.code.make(piece)
            self.code.report(self.code.name, time.monotonic() - start)
        with torch.no_grad(), torch.autocast(self.device, enabled=False):  # the casts are part of the code
            results = piece.function(*flat)
        found = iter(results)
        return [next(found) if e else None for e in exists], list(found)

    def without_first(self, given: list[list[Maybe]], grads: Sequence[Tensor]) -> list[Maybe]:
        """See `dpa4.kernels.twice.Stages`; stages 1 and 2 of zeros."""
        given = [*given, [torch.zeros_like(g) for g in grads]]
        first, kept = self.run(1, given)
        given += [list(kept), twice.with_zeros(self, given[0], [None] * len(first))]
        given.append(list(self.run(2, given)[1]))
        return self.run(3, [*given, grads])[0]


def _traced(
    region: Region,
    inputs: list[Maybe],
    spec: Any,
    kind: _Kind,
    axes: list[str],
    mask: list[bool],
    last_mask: list[bool],
) -> _Trace:
    """Trace a region through all its stages.

    Args:
        region: The region.
        inputs: Its tensors and the leaves of its arguments.
        spec: Structure of the arguments.
        kind: Of the program.
        axes: Of the inputs.
        mask: Inputs that stage 1 differentiates with respect to.
        last_mask: The same of stage 3.
    """
    device, training = kind.device.type, kind.training
    differentiable = [t is not None and t.requires_grad for t in inputs]
    structure: Any = None

    def value(inputs: Sequence[Maybe]) -> list[Tensor]:
        nonlocal structure
        state: dict[str, Any] = dict(zip(region.names, inputs, strict=False))
        args = pytree.tree_unflatten(list(inputs[len(state) :]), spec)
        with torch.autocast(device, kind.autocast, enabled=kind.autocast is not None, cache_enabled=False):
            with _reparametrize_module(region.module, state):
                results = region.eager(*args)
        structure = _described(results)
        # Else every region that takes one would copy it, once for each part of the edges.
        return [t.contiguous() for t in pytree.tree_leaves(results)]

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # with symbolic sizes it takes twice the time it saves
    sizes = {a: _INDEX_LIMIT + 1 + 4 * k if kind.wide else _HINTS[a] for k, a in enumerate(_COUNTED)}
    symbols = symbolic_sizes(mode, sizes)
    fakes = _fakes(mode, inputs, axes, symbols)
    with mode, enable_python_dispatcher(), torch.no_grad():
        grads = [_contiguous_like(r) for r in value(fakes)]
    with mode:
        cotangents = [_contiguous_like(f) for f, m in zip(fakes, mask, strict=True) if m and f is not None]
        last_grads = [_contiguous_like(g) for g in grads]
    # What becomes available one after another; between them, what each stage keeps.
    groups: list[Any] = [fakes, grads, cotangents, last_grads] if training else [fakes, grads]
    layout: list[tuple[int, int]] = []
    exists: list[list[bool]] = []

    @torch.enable_grad()
    def traced(*flat: Tensor) -> list[list[Tensor]]:
        rest = iter(flat)
        given = [[None if t is None else next(rest) for t in group] for group in groups]
        wanted = differentiable if training else mask
        x = [
            None if t is None else t.detach().requires_grad_(w) for t, w in zip(given[0], wanted, strict=True)
        ]
        g = [t.detach().requires_grad_(training and t.is_floating_point()) for t in given[1] if t is not None]
        y = value(x)
        first = _gradient(y, [t for t, m in zip(x, mask, strict=True) if m and t is not None], g, training)
        stages: list[list[Maybe]] = [list(y), first]
        if training:
            own = [t for t, w in zip(x, last_mask, strict=True) if w and t is not None]
            gradient = _gradient([*first, *y], [*g, *own], [*given[2], *given[3]])
            stages += [gradient[: len(g)], gradient[len(g) :]]
        exists[:] = [[r is not None for r in stage] for stage in stages]
        return [[r.detach() for r in stage if r is not None] for stage in stages]

    for k, group in enumerate(groups):
        layout += [(2 * k, i) for i, t in enumerate(group) if t is not None]
    flat: list[Any] = [t for group in groups for t in group if t is not None]
    with enable_python_dispatcher():  # decompositions that keep symbolic sizes
        graph = make_fx(traced)(*flat).graph
    # Every stage gets an argument of each axis, so that it knows all symbolic sizes.
    shaped = [(0, axes.index(a)) for a in _COUNTED if a in axes]
    names = {size.node.expr: axis for axis, size in symbols.items()}
    pieces = _cut(graph, layout, shaped, kind.keep)
    return _Trace(
        [(recipe_of(piece, names, sizes), takes) for piece, takes in pieces],
        exists,
        structure,
        _elements(graph, {s: a for s, a in names.items() if a in axes}),
    )


def _described(value: Any) -> Any:
    """Structure of (named) tuples, for JSON."""
    if not isinstance(value, tuple):
        return None
    return [type(value).__module__, type(value).__qualname__, [_described(v) for v in value]]


def _built(structure: Any) -> Any:
    """The tuples of a structure, with numbers as leaves."""
    if structure is None:
        return 0
    module, name, children = structure
    kind = getattr(import_module(module), name)
    values = [_built(child) for child in children]
    return tuple(values) if kind is tuple else kind(*values)


def _parts_bound_memory(device: torch.device) -> bool:
    """Whether edges are worked on in parts so that they fit; on a CPU they are so that they stay in its cache."""
    return device.type != "cpu"


def _cut(
    joint: fx.Graph, layout: list[tuple[int, int]], shaped: list[tuple[int, int]], keep: bool
) -> list[tuple[fx.Graph, list[tuple[int, int]]]]:
    """Cut a graph that returns the results of all stages into the stages.

    Args:
        joint: Its placeholders are the original inputs, its output the lists of results.
        layout: Group and position of every placeholder, see `_Program.run`.
        shaped: Placeholders that every stage gets.
        keep: Whether stages keep results for later ones.

    Returns:
        Graphs of the stages, and where their arguments are found.
    """
    joint = fx_graph_cse(joint)
    nodes = list(joint.nodes)
    place = dict(zip([n for n in nodes if n.op == "placeholder"], layout, strict=True))
    outputs: list[list[fx.Node]] = nodes[-1].args[0]  # type: ignore[assignment]
    order = {n: i for i, n in enumerate(nodes)}
    made: dict[fx.Node, int] = {}  # stage that computes a node first
    kept: list[list[fx.Node]] = [[] for _ in outputs]
    needed: list[tuple[set[fx.Node], set[fx.Node]]] = []
    for stage, results in enumerate(outputs):
        taken, inside, todo = set(), set(), list(results)
        while todo:
            n = todo.pop()
            if n in taken or n in inside:
                continue
            if n in place:
                taken.add(n)
            elif keep and (maker := made.get(_kernel(n), stage)) < stage and _worth_keeping(n):
                taken.add(n)
                if n not in kept[maker]:
                    kept[maker].append(n)
                    needed[maker][1].add(n)
            else:
                inside.add(n)
                todo += n.all_input_nodes
        for n in inside:
            made.setdefault(n, stage)
        needed.append((taken, inside))
    for stage, members in enumerate(kept):
        place |= {n: (2 * stage + 1, i) for i, n in enumerate(members)}
    position = {p: n for n, p in place.items()}
    stages = []
    for (taken, inside), results, members in zip(needed, outputs, kept, strict=True):
        graph, copies = fx.Graph(), {}
        arguments = sorted(taken | {position[p] for p in shaped}, key=order.__getitem__)
        for n in arguments:
            copies[n] = graph.placeholder(n.name)
            copies[n].meta["val"] = n.meta["val"]
        for n in sorted(inside, key=order.__getitem__):
            copies[n] = graph.node_copy(n, copies.__getitem__)
        graph.output([copies[n] for n in (*results, *members)])
        stages.append((graph, [place[n] for n in arguments]))
    return stages


def _worth_keeping(n: fx.Node) -> bool:
    """Whether reading a result takes less time than computing it again in one pass over its arguments."""
    if not isinstance(n.meta["val"], Tensor):
        return False
    target = _kernel(n).target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target.overloadpacket.__name__
    if target.namespace == "dpa4" or name in _EXPENSIVE:
        return True
    return name in _REDUCTIONS and 8 * _size(n) <= _size(n.all_input_nodes[0])


def _kernel(n: fx.Node) -> fx.Node:
    """What computes a node: another one, if the node is one of several results."""
    return n.all_input_nodes[0] if n.target is operator.getitem else n


def _size(n: fx.Node) -> int:
    return math.prod(int(s) if isinstance(s, int) else s.node.hint for s in n.meta["val"].shape)


def _elements(graph: fx.Graph, axes: dict[Any, str]) -> dict[str, int]:
    """Most elements per entry of each axis that any tensor of the graph has; axes by their symbols."""
    elements = dict.fromkeys(axes.values(), 1)
    for n in graph.nodes:
        size: Any = n.meta["val"].numel() if isinstance(n.meta.get("val"), Tensor) else 0
        if isinstance(size, torch.SymInt):
            for symbol in size.node.expr.free_symbols & axes.keys():
                per_entry = int(size.node.expr.subs(symbol, 2) - size.node.expr.subs(symbol, 1))
                elements[axes[symbol]] = max(elements[axes[symbol]], per_entry)
    return elements


def _fakes(
    mode: FakeTensorMode, inputs: Sequence[Maybe], axes: Sequence[str], sizes: dict[str, torch.SymInt]
) -> list[Maybe]:
    """The inputs without their data, symbolic along node and edge axes."""
    lengths: dict[str, Any] = {
        name: n for axis, size in sizes.items() for name, n in ((axis, size), (f"{axis}+1", size + 1))
    }
    fakes: list[Maybe] = []
    with mode:
        for t, a in zip(inputs, axes, strict=True):
            if t is None:
                fakes.append(None)
            else:
                shape = t.shape if a == "static" else (lengths[a], *t.shape[1:])
                fakes.append(torch.empty(shape, dtype=t.dtype, device=t.device))
    return fakes


def _contiguous_like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _gradient(
    results: Sequence[Maybe], inputs: Sequence[Tensor], grads: Sequence[Maybe], create_graph: bool = False
) -> list[Maybe]:
    """Gradients of the results that depend on the inputs; None for inputs without influence."""
    pairs = [
        (r, g)
        for r, g in zip(results, grads, strict=True)
        if r is not None and g is not None and r.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True)
    )
