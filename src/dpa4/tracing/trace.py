"""Traces of regions: one graph of a function with its first and second derivatives, cut into stages.

`dpa4.tracing.region` explains their purpose. Results of matrix products, of kernels over edges and of reductions to
an eighth of the size or less are computed by the first stage that needs them and saved for later stages. Everything
else is recomputed where it is needed, since reading it from memory would take as long (docs/adr/0011).
"""

import json
import math
import operator
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from dpa4 import code_cache
from dpa4.ops.second_order import Maybe
from dpa4.tracing.sizes import COUNTED, HINTS, INDEX_LIMIT
from dpa4.tracing.stage import Place, Recipe, recipe_of, symbolic_sizes

_EXPENSIVE = {"mm", "bmm", "addmm", "baddbmm", "index_add", "index_put"}
_REDUCTIONS = {"sum", "mean", "amax"}


class Kind(NamedTuple):
    """Kind of call. A region has one program per kind, which serves all sizes along the counted axes."""

    inputs: tuple[Any, ...]  # of each input: dtype and whether it requires a gradient, or None
    device: torch.device
    autocast: torch.dtype | None  # dtype of autocast, None without autocast
    training: bool
    keep: bool  # whether stages save results for later stages
    wide: bool  # whether indices may need 64 bits


class TracedStage(NamedTuple):
    """Stage that was traced but not compiled."""

    recipe: Recipe
    sources: list[Place]  # place of each argument


class Trace(NamedTuple):
    """Result of tracing a region; can be stored as JSON."""

    stages: list[TracedStage]  # the stage of constants, which depends on weights alone; then stages 0, 1, ...
    exists: list[list[bool]]  # for stages 0, 1, ...: whether each possible result exists
    results: Any  # structure of the results of stage 0
    elements: dict[str, int]  # by axis: the most elements per entry of the axis that any tensor has

    @classmethod
    def read(cls, file: Path) -> "Trace | None":
        """Read a trace from a file of `dpa4.code_cache`; None if there is none that is intact."""
        if (text := code_cache.read(file)) is None:
            return None
        stages, *others = json.loads(text)
        return cls(
            [TracedStage(Recipe.read(r), [(g, i) for g, i in sources]) for r, sources in stages], *others
        )

    def write(self, file: Path) -> None:
        """Write the trace to a file of `dpa4.code_cache`; creates the folder."""
        with code_cache.write(file) as own:
            own.write_text(json.dumps(self), encoding="utf-8")


def trace(
    function: Callable[[Sequence[Maybe]], Any],
    inputs: Sequence[Maybe],
    axes: Sequence[str],
    kind: Kind,
    mask: Sequence[bool],
    last_mask: Sequence[bool],
) -> Trace:
    """Trace a function through all stages of `dpa4.ops.second_order`.

    Args:
        function: Function of tensors like the inputs that returns a tensor or (named) tuples of tensors.
        inputs: Example inputs; an input may be None.
        axes: Axis of each input, see `dpa4.tracing.region.Axis`.
        kind: Kind of call.
        mask: For each input, whether stage 1 differentiates with respect to it.
        last_mask: For each input, whether stage 3 differentiates with respect to it.
    """
    device, training = kind.device.type, kind.training
    requires = [t is not None and t.requires_grad for t in inputs] if training else mask
    structure: Any = None

    def value(inputs: Sequence[Maybe]) -> list[Tensor]:
        nonlocal structure
        with torch.autocast(device, kind.autocast, enabled=kind.autocast is not None, cache_enabled=False):
            results = function(inputs)
        structure = _structure_of(results)
        # Otherwise every region that uses a result would copy it, once for each part of the edges.
        return [t.contiguous() for t in pytree.tree_leaves(results)]

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # with symbolic sizes the cache costs twice the time it saves
    sizes = {a: INDEX_LIMIT + 1 + 4 * k if kind.wide else HINTS[a] for k, a in enumerate(COUNTED)}
    symbols = symbolic_sizes(mode, sizes)
    fakes = _fake_inputs(mode, inputs, axes, symbols)
    with mode, enable_python_dispatcher(), torch.no_grad():
        grads = [_contiguous_like(r) for r in value(fakes)]
    with mode:
        cotangents = [_contiguous_like(f) for f, m in zip(fakes, mask, strict=True) if m and f is not None]
        last_grads = [_contiguous_like(g) for g in grads]
    # Groups 0, 2, 4 and 6 of `FourStages.run`; the odd groups, which stages save, follow from the cut.
    groups: list[Any] = [fakes, grads, cotangents, last_grads] if training else [fakes, grads]
    layout = [(2 * k, i) for k, group in enumerate(groups) for i, t in enumerate(group) if t is not None]
    exists: list[list[bool]] = []

    @torch.enable_grad()
    def traced(*flat: Tensor) -> list[list[Tensor]]:
        """Results of all stages, from the flat list of the tensors of all groups."""
        rest = iter(flat)
        given = [[None if t is None else next(rest) for t in group] for group in groups]
        x = [
            None if t is None else t.detach().requires_grad_(r)
            for t, r in zip(given[0], requires, strict=True)
        ]
        g = [t.detach().requires_grad_(training and t.is_floating_point()) for t in given[1] if t is not None]
        y = value(x)
        first = _gradient(y, [t for t, m in zip(x, mask, strict=True) if m and t is not None], g, training)
        stages: list[list[Maybe]] = [list(y), first]
        if training:
            own = [t for t, m in zip(x, last_mask, strict=True) if m and t is not None]
            # Derivatives of <c, first> + <G, y> with respect to g, which is stage 2, and to the inputs, stage 3.
            gradient = _gradient([*first, *y], [*g, *own], [*given[2], *given[3]])
            stages += [gradient[: len(g)], gradient[len(g) :]]
        exists[:] = [[r is not None for r in stage] for stage in stages]
        return [[r.detach() for r in stage if r is not None] for stage in stages]

    flat: list[Any] = [t for group in groups for t in group if t is not None]
    with enable_python_dispatcher():  # uses decompositions that preserve symbolic sizes
        graph = make_fx(traced)(*flat).graph
    # Every stage has an argument with each axis, so that all symbolic sizes are known in it.
    shaped = [(0, axes.index(a)) for a in COUNTED if a in axes]
    names = {size.node.expr: axis for axis, size in symbols.items()}
    fixed = {(0, i) for i, a in enumerate(axes) if a == "static" and not training}
    cut = _cut(graph, layout, shaped, kind.keep, fixed, len(inputs))
    return Trace(
        [TracedStage(recipe_of(stage, names, sizes), sources) for stage, sources in cut],
        exists,
        structure,
        _elements(graph, {s: a for s, a in names.items() if a in axes}),
    )


def _structure_of(value: Any) -> Any:
    """Structure of nested (named) tuples, in a form for JSON; None stands for a leaf."""
    if not isinstance(value, tuple):
        return None
    return [type(value).__module__, type(value).__qualname__, [_structure_of(v) for v in value]]


def from_structure(structure: Any) -> Any:
    """Build the nested tuples that a trace describes as the structure of its results, with zeros as leaves."""
    if structure is None:
        return 0
    module, name, children = structure
    kind = getattr(import_module(module), name)
    values = [from_structure(child) for child in children]
    return tuple(values) if kind is tuple else kind(*values)


def _cut(
    joint: fx.Graph, layout: list[Place], shaped: list[Place], keep: bool, fixed: set[Place], num_inputs: int
) -> list[tuple[fx.Graph, list[Place]]]:
    """Cut a graph that computes the results of all stages into one graph per stage, and one for constants.

    Stages are cut in the order in which they run. From its results, each stage is followed backwards. The walk ends
    at nodes that need not be computed in the stage: inputs, constants, and expensive nodes that an earlier stage has
    computed and can save. All nodes passed on the way are computed in the stage, even if an earlier stage has
    computed them as well.

    Args:
        joint: Graph whose placeholders are the tensors of all groups and whose output is one list of results per
            stage.
        layout: Place of each placeholder.
        shaped: Places of placeholders that are arguments of every stage.
        keep: Whether stages save results for later stages.
        fixed: Places of placeholders that rarely change, the weights outside of training. Nodes that depend on them
            alone become constants, computed once for many calls.
        num_inputs: Number of inputs, group 0. The constants are added to that group.

    Returns:
        Graph, and place of each of its arguments: for the stage of constants, then for stages 0, 1, ... The tensors
        that a stage saves follow its results.
    """
    joint = fx_graph_cse(joint)
    nodes = list(joint.nodes)
    # Places of nodes that exist before a stage runs: first the placeholders.
    place = dict(zip([n for n in nodes if n.op == "placeholder"], layout, strict=True))
    outputs: list[list[fx.Node]] = nodes[-1].args[0]  # type: ignore[assignment]
    order = {n: i for i, n in enumerate(nodes)}
    constants = _constant_nodes(nodes, {n for n, p in place.items() if p in fixed})
    hoisted: set[fx.Node] = set()  # constants that a stage needs
    computed_by: dict[fx.Node, int] = {}  # first stage that computes a node
    kept: list[list[fx.Node]] = [[] for _ in outputs]  # nodes that each stage saves
    # Arguments of each stage, and nodes that are computed inside.
    needed: list[tuple[set[fx.Node], set[fx.Node]]] = []
    for stage, results in enumerate(outputs):
        arguments, inside, todo = set(), set(), list(results)
        while todo:
            n = todo.pop()
            if n in arguments or n in inside:
                continue
            if n in place:
                arguments.add(n)
            elif n in constants:
                arguments.add(n)
                hoisted.add(n)
            elif keep and (earlier := computed_by.get(_kernel(n), stage)) < stage and _worth_keeping(n):
                arguments.add(n)
                if n not in kept[earlier]:
                    kept[earlier].append(n)
                    # If n is one of several results of a kernel, the earlier stage may not have used that result.
                    needed[earlier][1].add(n)
            else:
                inside.add(n)
                todo += n.all_input_nodes
        for n in inside:
            computed_by.setdefault(n, stage)
        needed.append((arguments, inside))

    # The stage of constants. Its results become further inputs, in group 0.
    members = sorted(hoisted, key=order.__getitem__)
    before = _ancestors(members)
    first = _graph_of_stage(before & place.keys(), before - place.keys(), members, place, order)
    place |= {n: (0, num_inputs + i) for i, n in enumerate(members)}
    # The tensors that stage s saves are group 2 s + 1. All places are known now, and the graphs can be written.
    for stage, members in enumerate(kept):
        place |= {n: (2 * stage + 1, i) for i, n in enumerate(members)}
    position = {p: n for n, p in place.items()}
    everywhere = {position[p] for p in shaped}
    return [
        first,
        *(
            _graph_of_stage(arguments | everywhere, inside, [*results, *members], place, order)
            for (arguments, inside), results, members in zip(needed, outputs, kept, strict=True)
        ),
    ]


def _graph_of_stage(
    arguments: set[fx.Node],
    inside: set[fx.Node],
    results: Sequence[fx.Node],
    place: dict[fx.Node, Place],
    order: dict[fx.Node, int],
) -> tuple[fx.Graph, list[Place]]:
    """Write the graph of a stage that computes the nodes inside from its arguments; return it and its sources.

    Both sets are put into the order of the joint graph, so that the text of a stage is the same in every process.
    """
    graph, copies = fx.Graph(), {}
    placeholders = sorted(arguments, key=order.__getitem__)
    for n in placeholders:
        copies[n] = graph.placeholder(n.name)
        copies[n].meta["val"] = n.meta["val"]
    for n in sorted(inside, key=order.__getitem__):
        copies[n] = graph.node_copy(n, copies.__getitem__)
        if _saves_unused(n, inside):
            copies[n].args = (*copies[n].args[:-1], False)
    graph.output([copies[n] for n in results])
    return graph, [place[n] for n in placeholders]


def _saves_unused(n: fx.Node, inside: set[fx.Node]) -> bool:
    """Return whether a kernel has ``keep=True`` (its last argument) although the stage uses its first result only."""
    arguments = n.target._schema.arguments if isinstance(n.target, torch._ops.OpOverload) else []
    if not arguments or arguments[-1].name != "keep" or n.args[-1] is not True:
        return False
    return all(user.args[1] == 0 for user in n.users if user in inside)


def _constant_nodes(nodes: Sequence[fx.Node], weights: set[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on weights alone, except views, which cost nothing."""
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
    """Nodes and all nodes they are computed from."""
    found, todo = set(), list(nodes)
    while todo:
        if (n := todo.pop()) not in found:
            found.add(n)
            todo += n.all_input_nodes
    return found


def _worth_keeping(n: fx.Node) -> bool:
    """Return whether a result is read from memory faster than recomputed in one pass over its arguments."""
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
    """Node that computes n: n itself, or the call of which n is one of several results."""
    return n.all_input_nodes[0] if n.target is operator.getitem else n


def _size(n: fx.Node) -> int:
    return math.prod(int(s) if isinstance(s, int) else s.node.hint for s in n.meta["val"].shape)


def _elements(graph: fx.Graph, axes: dict[Any, str]) -> dict[str, int]:
    """By axis, the largest number of elements per entry of the axis among the tensors of a graph.

    Args:
        graph: The graph.
        axes: Axis names by symbol.
    """
    elements = dict.fromkeys(axes.values(), 1)
    for n in graph.nodes:
        size: Any = n.meta["val"].numel() if isinstance(n.meta.get("val"), Tensor) else 0
        if isinstance(size, torch.SymInt):
            for symbol in size.node.expr.free_symbols & axes.keys():
                per_entry = int(size.node.expr.subs(symbol, 2) - size.node.expr.subs(symbol, 1))
                elements[axes[symbol]] = max(elements[axes[symbol]], per_entry)
    return elements


def _fake_inputs(
    mode: FakeTensorMode, inputs: Sequence[Maybe], axes: Sequence[str], sizes: dict[str, torch.SymInt]
) -> list[Maybe]:
    """Fake tensors like the inputs, with symbolic sizes along the counted axes."""
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
    """Gradients with respect to the inputs; None for inputs without influence on any result."""
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
