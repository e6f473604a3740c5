"""Compiled regions: parts of the model as compiled functions with compiled first and second derivatives.

Training on forces differentiates twice, which the compiler's own autograd does not do. A region y = f(p, x) of
parameters p and arguments x is therefore traced once through all that such a step asks of it, the four stages of
`dpa4.kernels.twice`. The trace is a flat graph of ATen operators and kernels in which nothing is left to
differentiate. It is cut into the stages: products of matrices and kernels over edges are computed once and kept for
later stages, everything else is computed again where it is needed, since reading it from memory would take as long.
Outside of training, what depends on weights alone (parameters and buffers) is a stage of its own, computed once for
many calls (docs/adr/0011).
"""

import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch._inductor
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from dpa4.kernels import twice
from dpa4.kernels.twice import Maybe

Axis = Literal[
    "node", "node+1", "center", "center+1", "edge", "node data", "center data", "edge data", "static"
]
"""What the leading axis of an argument counts.

"center" are the nodes that receive; "static" does not vary, and such arguments are taken for weights. Data are
what no parameter influences, such as the geometry: they have a derivative in stage 1, that of the forces, but none
in stage 3.
"""

_COUNTED = ("node", "center", "edge")
_DATA = " data"

_OPTIONS = {
    "comprehensive_padding": False,  # what stages keep for each other is contiguous
    "pattern_matcher": False,  # finds nothing here, and takes long to do so
    "size_asserts": False,  # cost more time on the host than some kernels on the device
    "alignment_asserts": False,
}

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
    """

    def __init__(
        self, name: str, arguments: Any, report: Callable[[str, float], None] = lambda name, seconds: None
    ):
        self.name, self.report = name, report
        axes: list[str] = [a or "" for a in pytree.tree_leaves(arguments)]  # of `Axis`
        self.axes = [a.removesuffix(_DATA) for a in axes]
        self.data = [a.endswith(_DATA) for a in axes]
        self.programs: dict[Any, _Program] = {}
        self.make: Callable[[Stage], Callable[..., Sequence[Tensor]]] = Stage.compile

    def stages(self) -> list["Stage"]:
        """Of all programs."""
        return [s for program in self.programs.values() for s in (program.constants, *program.stages)]


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
        self.constants: dict[_Program, _Constants] = {}

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
        inputs = [*self.tensors, *leaves]
        results = twice.apply(program, [*inputs, *self._constants(program, inputs)])
        return pytree.tree_unflatten(results, program.out_spec)

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
            key = (kinds, device, autocast, training, keep, wide)
            if key not in self.code.programs:
                start = time.monotonic()
                self.code.programs[key] = _Program(self, inputs, spec, wide, device.type, autocast, keep)
                self.code.report(self.code.name, time.monotonic() - start)
            # The compiler takes for granted that indices have 32 bits if they do at the sizes it sees.
            if all(sizes[a] * n < _INDEX_LIMIT for a, n in self.code.programs[key].elements.items()):
                break
        return self.code.programs[key]

    def _constants(self, program: "_Program", inputs: Sequence[Maybe]) -> list[Tensor]:
        """What a program computes of the weights alone, anew where they have changed."""
        if program.constants.empty:
            return []
        weights = [t for _, i in program.constants.takes if (t := inputs[i]) is not None]
        # With the code: some is for tracing only and returns no values (`Stage.outline`).
        origin = program.code_of(program.constants), versions(weights)
        if program not in self.constants or self.constants[program].origin != origin:
            held = [t.detach() for t in weights]
            self.constants[program] = _Constants(origin, held, program.constants_of(inputs))
        return self.constants[program].values


class _Constants(NamedTuple):
    """What a region remembers between calls of a program."""

    origin: Any  # code and `versions` of the weights
    weights: list[Tensor]  # held, since the memory of others could have the same address
    values: list[Tensor]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Differs from what it was if tensors have changed, in place or by an assignment to ``.data``.

    Like autograd, it does not see what is changed in place through ``.data``.
    """
    return [*map(operator.attrgetter("_version"), tensors), *map(Tensor.data_ptr, tensors)]


class _Program:
    """The stages of a region for one kind of arguments.

    Inputs are the tensors of the region, the arguments, and the results of the stage of constants.
    """

    def __init__(
        self,
        region: Region,
        inputs: list[Maybe],
        spec: Any,
        wide: bool,
        device: str,
        autocast: torch.dtype | None,
        keep: bool,
    ):
        self.code, self.device = region.code, device
        axes = ["static"] * len(region.tensors) + region.code.axes
        data = [False] * len(region.tensors) + region.code.data
        differentiable = [t is not None and t.requires_grad for t in inputs]
        # What stages 1 and 3 differentiate with respect to.
        self.mask = [d and a != "static" for d, a in zip(differentiable, axes, strict=True)]
        self.last_mask = [d and not given for d, given in zip(differentiable, data, strict=True)]
        training = region.module.training

        def value(inputs: Sequence[Maybe]) -> list[Tensor]:
            state: dict[str, Any] = dict(zip(region.names, inputs, strict=False))
            args = pytree.tree_unflatten(list(inputs[len(state) :]), spec)
            enabled = autocast is not None
            with torch.autocast(device, autocast, enabled=enabled, cache_enabled=False):
                with _reparametrize_module(region.module, state):
                    leaves, self.out_spec = pytree.tree_flatten(region.eager(*args))
            # Else every region that takes one would copy it, once for each part of the edges.
            return [t.contiguous() for t in leaves]

        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        mode.cache_enabled = False  # with symbolic sizes it takes twice the time it saves
        fakes, symbols = _fakes(mode, inputs, axes, wide)
        with mode, enable_python_dispatcher(), torch.no_grad():
            grads = [_contiguous_like(r) for r in value(fakes)]
        with mode:
            cotangents = [
                _contiguous_like(f) for f, m in zip(fakes, self.mask, strict=True) if m and f is not None
            ]
            last_grads = [_contiguous_like(g) for g in grads]
        # What becomes available one after another; between them, what each stage keeps.
        groups: list[Any] = [fakes, grads, cotangents, last_grads] if training else [fakes, grads]
        layout: list[tuple[int, int]] = []
        self.exists: list[list[bool]] = []

        @torch.enable_grad()
        def traced(*flat: Tensor) -> list[list[Tensor]]:
            rest = iter(flat)
            given = [[None if t is None else next(rest) for t in group] for group in groups]
            wanted = differentiable if training else self.mask
            x = [
                None if t is None else t.detach().requires_grad_(w)
                for t, w in zip(given[0], wanted, strict=True)
            ]
            g = [
                t.detach().requires_grad_(training and t.is_floating_point())
                for t in given[1]
                if t is not None
            ]
            y = value(x)
            first = _gradient(
                y, [t for t, m in zip(x, self.mask, strict=True) if m and t is not None], g, training
            )
            stages: list[list[Maybe]] = [list(y), first]
            if training:
                own = [t for t, w in zip(x, self.last_mask, strict=True) if w and t is not None]
                gradient = _gradient([*first, *y], [*g, *own], [*given[2], *given[3]])
                stages += [gradient[: len(g)], gradient[len(g) :]]
            self.exists[:] = [[r is not None for r in stage] for stage in stages]
            return [[r.detach() for r in stage if r is not None] for stage in stages]

        for k, group in enumerate(groups):
            layout += [(2 * k, i) for i, t in enumerate(group) if t is not None]
        flat: list[Any] = [t for group in groups for t in group if t is not None]
        with enable_python_dispatcher():  # decompositions that keep symbolic sizes
            graph = make_fx(traced)(*flat).graph
        # Every stage gets an argument of each axis, so that it knows all symbolic sizes.
        shaped = [(0, axes.index(a)) for a in _COUNTED if a in axes]
        fixed = {(0, i) for i, a in enumerate(axes) if a == "static" and not training}
        self.constants, self.stages = _cut(graph, layout, shaped, keep, fixed, len(inputs))
        hoisted = [False] * len(self.constants.results)  # nothing is differentiated by them
        self.num_inputs = len(inputs) + len(hoisted)
        self.mask, self.last_mask = self.mask + hoisted, self.last_mask + hoisted
        self.once = not training
        self.elements = _elements(graph, {s: a for s, a in symbols.items() if a in axes})

    def run(self, stage: int, given: Sequence[Sequence[Maybe]]) -> tuple[list[Maybe], list[Tensor]]:
        """See `dpa4.kernels.twice.Stages`."""
        piece, exists = self.stages[stage], self.exists[stage]
        if piece.empty:
            return [None for _ in exists], []
        found = iter(self._call(piece, given))
        return [next(found) if e else None for e in exists], list(found)

    def constants_of(self, inputs: Sequence[Maybe]) -> list[Tensor]:
        """Results of the stage of constants; contiguous, else every call would copy them."""
        return [t.contiguous() for t in self._call(self.constants, [inputs])]

    def code_of(self, piece: "Stage") -> Callable[..., Sequence[Tensor]]:
        """Code of a stage, made when first needed."""
        if piece.function is None:
            start = time.monotonic()
            piece.function = self.code.make(piece)
            self.code.report(self.code.name, time.monotonic() - start)
        return piece.function

    def _call(self, piece: "Stage", given: Sequence[Sequence[Maybe]]) -> Sequence[Tensor]:
        flat = [t.contiguous() for t in (given[group][i] for group, i in piece.takes) if t is not None]
        function = self.code_of(piece)
        with torch.no_grad(), torch.autocast(self.device, enabled=False):  # the casts are part of the code
            return function(*flat)

    def without_first(self, given: list[list[Maybe]], grads: Sequence[Tensor]) -> list[Maybe]:
        """See `dpa4.kernels.twice.Stages`; stages 1 and 2 of zeros."""
        given = [*given, [torch.zeros_like(g) for g in grads]]
        first, kept = self.run(1, given)
        given += [list(kept), twice.with_zeros(self, given[0], [None] * len(first))]
        given.append(list(self.run(2, given)[1]))
        return self.run(3, [*given, grads])[0]


class Stage:
    """One stage: its graph, where its arguments are found, examples of them, and its code once it was needed."""

    def __init__(self, graph: fx.GraphModule, takes: list[tuple[int, int]], examples: list[Any]):
        self.graph, self.takes, self.examples = graph, takes, examples
        self.function: Callable[..., Sequence[Tensor]] | None = None
        self.results: Any = graph.graph.output_node().args[0]
        self.empty = not self.results  # nothing is asked of it

    def compile(self) -> Callable[..., Sequence[Tensor]]:
        """Its code, from the compiler's cache on disk if it is there."""
        with torch.no_grad():
            function: Callable[..., Sequence[Tensor]] = torch._inductor.standalone_compile(
                self.graph,
                self.examples,
                dynamic_shapes="from_graph",
                options={"config_patches": _OPTIONS},
            )
        return function

    def outline(self) -> Callable[..., Sequence[Tensor]]:
        """A function that returns results of the right shapes without values."""
        results = [n.meta["val"] for n in self.results]

        def function(*given: Tensor) -> list[Tensor]:
            sizes: dict[Any, int] = {}
            for example, t in zip(self.examples, given, strict=True):
                for e, n in zip(example.shape, t.shape, strict=True):
                    if isinstance(e, torch.SymInt) and len(e.node.expr.free_symbols) == 1:
                        (symbol,) = e.node.expr.free_symbols
                        if (more := e.node.expr - symbol).is_number:  # the symbol, or one plus a number
                            sizes[symbol] = n - int(more)
            shapes = [
                [n if isinstance(n, int) else int(n.node.expr.subs(sizes)) for n in r.shape] for r in results
            ]
            return [
                torch.empty(s, dtype=r.dtype, device=r.device) for s, r in zip(shapes, results, strict=True)
            ]

        return function


def _parts_bound_memory(device: torch.device) -> bool:
    """Whether edges are worked on in parts so that they fit; on a CPU they are so that they stay in its cache."""
    return device.type != "cpu"


def _cut(
    joint: fx.Graph,
    layout: list[tuple[int, int]],
    shaped: list[tuple[int, int]],
    keep: bool,
    fixed: set[tuple[int, int]],
    num_inputs: int,
) -> tuple[Stage, list[Stage]]:
    """Cut a graph that returns the results of all stages into the stages.

    Args:
        joint: Its placeholders are the original inputs, its output the lists of results.
        layout: Group and position of every placeholder, see `_Program.run`.
        shaped: Placeholders that every stage gets.
        keep: Whether stages keep results for later ones.
        fixed: Placeholders that change so rarely that what depends on them alone is cut off.
        num_inputs: Original inputs.

    Returns:
        The stage of what was cut off, whose results are further inputs of the others; and those.
    """
    joint = fx_graph_cse(joint)
    nodes = list(joint.nodes)
    place = dict(zip([n for n in nodes if n.op == "placeholder"], layout, strict=True))
    outputs: list[list[fx.Node]] = nodes[-1].args[0]  # type: ignore[assignment]
    order = {n: i for i, n in enumerate(nodes)}
    constants = _of_weights_alone(nodes, {n for n, p in place.items() if p in fixed})
    hoisted: set[fx.Node] = set()
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
            elif n in constants:
                taken.add(n)
                hoisted.add(n)
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

    members = sorted(hoisted, key=order.__getitem__)
    before = _ancestors(members)
    first = _stage(before & place.keys(), before - place.keys(), members, place, order)
    place |= {n: (0, num_inputs + i) for i, n in enumerate(members)}
    for stage, members in enumerate(kept):
        place |= {n: (2 * stage + 1, i) for i, n in enumerate(members)}
    position = {p: n for n, p in place.items()}
    everywhere = {position[p] for p in shaped}
    return first, [
        _stage(taken | everywhere, inside, [*results, *members], place, order)
        for (taken, inside), results, members in zip(needed, outputs, kept, strict=True)
    ]


def _stage(
    taken: set[fx.Node],
    inside: set[fx.Node],
    results: Sequence[fx.Node],
    place: dict[fx.Node, tuple[int, int]],
    order: dict[fx.Node, int],
) -> Stage:
    """A stage that is given some nodes and computes others."""
    graph, copies, examples = fx.Graph(), {}, []
    arguments = sorted(taken, key=order.__getitem__)
    for n in arguments:
        copies[n] = graph.placeholder(n.name)
        with n.meta["val"].fake_mode:
            examples.append(_contiguous_like(n.meta["val"]))
        copies[n].meta["val"] = examples[-1]
    for n in sorted(inside, key=order.__getitem__):
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output([copies[n] for n in results])
    return Stage(fx.GraphModule({}, graph), [place[n] for n in arguments], examples)


def _of_weights_alone(nodes: Sequence[fx.Node], weights: set[fx.Node]) -> set[fx.Node]:
    """What is computed of weights alone. Views of them are not: they cost nothing."""
    if not weights:
        return set()
    fixed, found = set(weights), set()
    for n in nodes:
        if n.op == "call_function" and fixed.issuperset(n.all_input_nodes):
            fixed.add(n)
            is_view = getattr(_kernel(n).target, "is_view", False) if n.all_input_nodes else True
            if not is_view and isinstance(n.meta["val"], Tensor):
                found.add(n)
    return found


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes and all that they are computed from."""
    found, todo = set(), list(nodes)
    while todo:
        if (n := todo.pop()) not in found:
            found.add(n)
            todo += n.all_input_nodes
    return found


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
    mode: FakeTensorMode, inputs: Sequence[Maybe], axes: Sequence[str], wide: bool
) -> tuple[list[Maybe], dict[Any, str]]:
    """The inputs without their data, symbolic along node and edge axes, and the symbols of the axes."""
    axis: dict[str, Any] = {}
    symbols = {}
    for k, name in enumerate(_COUNTED):
        hint = _INDEX_LIMIT + 1 + 4 * k if wide else _HINTS[name]
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        size: Any = mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context).shape[0]
        axis |= {name: size, f"{name}+1": size + 1}
        symbols[size.node.expr] = name
    fakes: list[Maybe] = []
    with mode:
        for t, a in zip(inputs, axes, strict=True):
            if t is None:
                fakes.append(None)
            else:
                shape = t.shape if a == "static" else (axis[a], *t.shape[1:])
                fakes.append(torch.empty(shape, dtype=t.dtype, device=t.device))
    return fakes, symbols


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
