"""Traces of regions: a function, its first derivatives and theirs, as one graph that is cut into stages.

See `dpa4.tracing.region` for what they are for. Products of matrices, kernels over edges and reductions to an eighth
of their size are computed by the first stage that needs them and kept for later ones; everything else is computed
again where it is needed, since reading it from memory would take as long (docs/adr/0011).
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

from dpa4.ops.second_order import Maybe
from dpa4.output import atomic_write
from dpa4.tracing.sizes import COUNTED, HINTS, INDEX_LIMIT
from dpa4.tracing.stage import Recipe, recipe_of, symbolic_sizes

_EXPENSIVE = {"mm", "bmm", "addmm", "baddbmm", "index_add", "index_put"}
_REDUCTIONS = {"sum", "mean", "amax"}


class Kind(NamedTuple):
    """What the programs of a region differ in."""

    inputs: tuple[Any, ...]
    device: torch.device
    autocast: torch.dtype | None
    training: bool
    keep: bool
    wide: bool


class Piece(NamedTuple):
    """What becomes a stage."""

    recipe: Recipe
    takes: list[tuple[int, int]]  # group and position of every argument, see `_Program.run`


class Trace(NamedTuple):
    """What tracing a region finds; made of what JSON can hold."""

    stages: list[Piece]  # that of what depends on weights alone is the first
    exists: list[list[bool]]  # which results each stage has
    results: Any  # their structure in stage 0
    elements: dict[str, int]  # most of them per entry of an axis

    @classmethod
    def read(cls, file: Path) -> "Trace":
        """From a file."""
        stages, *others = json.loads(file.read_text())
        return cls([Piece(Recipe.read(r), [(g, i) for g, i in takes]) for r, takes in stages], *others)

    def write(self, file: Path) -> None:
        """To a file, at once or not at all; its folder is made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as own:
            own.write_text(json.dumps(self))


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
        function: Takes tensors like the inputs, and returns a tensor or (named) tuples of them.
        inputs: Examples; None is passed on.
        axes: What the leading axis of each counts, see `dpa4.tracing.region`.
        kind: Of the program.
        mask: Inputs that stage 1 differentiates with respect to.
        last_mask: The same of stage 3.
    """
    device, training = kind.device.type, kind.training
    differentiable = [t is not None and t.requires_grad for t in inputs]
    structure: Any = None

    def value(inputs: Sequence[Maybe]) -> list[Tensor]:
        nonlocal structure
        with torch.autocast(device, kind.autocast, enabled=kind.autocast is not None, cache_enabled=False):
            results = function(inputs)
        structure = _described(results)
        # Else every region that takes one would copy it, once for each part of the edges.
        return [t.contiguous() for t in pytree.tree_leaves(results)]

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # with symbolic sizes it takes twice the time it saves
    sizes = {a: INDEX_LIMIT + 1 + 4 * k if kind.wide else HINTS[a] for k, a in enumerate(COUNTED)}
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
    shaped = [(0, axes.index(a)) for a in COUNTED if a in axes]
    names = {size.node.expr: axis for axis, size in symbols.items()}
    fixed = {(0, i) for i, a in enumerate(axes) if a == "static" and not training}
    pieces = _cut(graph, layout, shaped, kind.keep, fixed, len(inputs))
    return Trace(
        [Piece(recipe_of(piece, names, sizes), takes) for piece, takes in pieces],
        exists,
        structure,
        _elements(graph, {s: a for s, a in names.items() if a in axes}),
    )


def _described(value: Any) -> Any:
    """Structure of (named) tuples, for JSON."""
    if not isinstance(value, tuple):
        return None
    return [type(value).__module__, type(value).__qualname__, [_described(v) for v in value]]


def built(structure: Any) -> Any:
    """The tuples that a trace describes as the structure of its results, with numbers as leaves."""
    if structure is None:
        return 0
    module, name, children = structure
    kind = getattr(import_module(module), name)
    values = [built(child) for child in children]
    return tuple(values) if kind is tuple else kind(*values)


def _cut(
    joint: fx.Graph,
    layout: list[tuple[int, int]],
    shaped: list[tuple[int, int]],
    keep: bool,
    fixed: set[tuple[int, int]],
    num_inputs: int,
) -> list[tuple[fx.Graph, list[tuple[int, int]]]]:
    """Cut a graph that returns the results of all stages into the stages.

    Args:
        joint: Its placeholders are the original inputs, its output the lists of results.
        layout: Group and position of every placeholder, see `_Program.run`.
        shaped: Placeholders that every stage gets.
        keep: Whether stages keep results for later ones.
        fixed: Placeholders that change so rarely that what depends on them alone is cut off.
        num_inputs: Original inputs.

    Returns:
        Graphs of the stages and where their arguments are found: first of what was cut off, whose results are
        further inputs of the others.
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
    return [
        first,
        *(
            _stage(taken | everywhere, inside, [*results, *members], place, order)
            for (taken, inside), results, members in zip(needed, outputs, kept, strict=True)
        ),
    ]


def _stage(
    taken: set[fx.Node],
    inside: set[fx.Node],
    results: Sequence[fx.Node],
    place: dict[fx.Node, tuple[int, int]],
    order: dict[fx.Node, int],
) -> tuple[fx.Graph, list[tuple[int, int]]]:
    """A stage that is given some nodes and computes others."""
    graph, copies = fx.Graph(), {}
    arguments = sorted(taken, key=order.__getitem__)
    for n in arguments:
        copies[n] = graph.placeholder(n.name)
        copies[n].meta["val"] = n.meta["val"]
    for n in sorted(inside, key=order.__getitem__):
        copies[n] = graph.node_copy(n, copies.__getitem__)
        if _keeps_in_vain(n, inside):
            copies[n].args = (*copies[n].args[:-1], False)
    graph.output([copies[n] for n in results])
    return graph, [place[n] for n in arguments]


def _keeps_in_vain(n: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a kernel is told to keep results (its last argument) that nothing of a stage takes."""
    arguments = n.target._schema.arguments if isinstance(n.target, torch._ops.OpOverload) else []
    if not arguments or arguments[-1].name != "keep" or n.args[-1] is not True:
        return False
    return all(user.args[1] == 0 for user in n.users if user in inside)


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
