"""Stages of compiled regions: pieces of straight-line code on tensors, as text that any process can compile.

What is compiled is kept in a file beside the compiler's cache, so another process may make it, and the next run loads
it without a trace.
"""

import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dpa4.output import atomic_write

Function = Callable[..., Sequence[Tensor]]

_OPTIONS = {
    "comprehensive_padding": False,  # what stages keep for each other is contiguous
    "pattern_matcher": False,  # finds nothing here, and takes long to do so
    "size_asserts": False,  # cost more time on the host than some kernels on the device
    "alignment_asserts": False,
}

_NAMES = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
"""What the text of a stage refers to."""

_SIZE = re.compile(r"(\w+)(?: \+ (\d+))?")

_log = logging.getLogger(__name__)


class Spec(NamedTuple):
    """A contiguous tensor without values; a length that may vary is an expression of the axes."""

    shape: list[int | str]
    dtype: str
    device: str

    @classmethod
    def of(cls, t: Tensor, axes: Mapping[Any, str]) -> "Spec":
        """Of a tensor with symbolic sizes; ``axes``: names of the symbols."""
        names = {symbol: symbol.func(axis) for symbol, axis in axes.items()}
        sizes = [n if isinstance(n, int) else n.node.expr.xreplace(names) for n in t.shape]
        shape = [str(n) if getattr(n, "free_symbols", None) else int(n) for n in sizes]
        return cls(shape, str(t.dtype), str(t.device))

    def empty(self, sizes: Mapping[str, Any]) -> Tensor:
        """Such a tensor, with unspecified values."""
        shape = [n if isinstance(n, int) else eval(n, {}, dict(sizes)) for n in self.shape]
        dtype = getattr(torch, self.dtype.removeprefix("torch."))
        return torch.empty(shape, dtype=dtype, device=self.device)


class Recipe(NamedTuple):
    """What it takes to compile a stage; made of what JSON can hold."""

    source: str  # a Python function
    arguments: list[Spec]
    results: list[Spec]
    sizes: dict[str, int]  # to expect, by axis

    @classmethod
    def read(cls, found: Any) -> "Recipe":
        """From JSON."""
        source, arguments, results, sizes = found
        return cls(source, [Spec(*a) for a in arguments], [Spec(*r) for r in results], sizes)


def recipe_of(graph: fx.Graph, axes: Mapping[Any, str], sizes: Mapping[str, int]) -> Recipe:
    """Of a graph that returns a list of tensors.

    Args:
        graph: Its nodes have tensors without values (``meta["val"]``).
        axes: Names of its symbolic sizes.
        sizes: To expect.
    """
    code = graph.python_code("self")
    if unknown := [n for n in code.globals if n not in _NAMES and re.search(rf"\b{n}\b", code.src)]:
        raise NotImplementedError(f"names in compiled code that its text does not explain: {unknown}")
    arguments = [Spec.of(n.meta["val"], axes) for n in graph.nodes if n.op == "placeholder"]
    results = [Spec.of(n.meta["val"], axes) for n in graph.output_node().args[0]]  # type: ignore[union-attr]
    return Recipe(code.src, arguments, results, dict(sizes))


def symbolic_sizes(mode: FakeTensorMode, sizes: Mapping[str, int]) -> dict[str, torch.SymInt]:
    """A symbol for every axis, and the size that the compiler is told to expect."""
    symbols = {}
    for axis, size in sizes.items():
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        fake: Any = mode.from_tensor(torch.empty(size, device="meta"), symbolic_context=context)
        symbols[axis] = fake.shape[0]
    return symbols


def graph_of(recipe: Recipe) -> fx.Graph:
    """The graph that a recipe was made of, by a call of the source that records."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names: dict[str, Any] = _NAMES | {"torch": _Recorder(torch, tracer)}
    exec(recipe.source, names)
    _, *arguments = inspect.signature(function := names["forward"]).parameters
    results = function(None, *(fx.Proxy(graph.placeholder(name), tracer) for name in arguments))
    graph.output(tracer.create_arg(results))
    return graph


class _Recorder:
    """Stands for a module or function; calls become nodes of a graph, also of functions without arguments."""

    def __init__(self, target: Any, tracer: fx.proxy.TracerBase):
        self._target, self._tracer = target, tracer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        is_value = isinstance(found, torch.dtype | torch.layout | torch.memory_format)
        return found if is_value else _Recorder(found, self._tracer)

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_function", self._target, args, kwargs)


def make(recipe: Recipe) -> Any:
    """Compile a stage; the compiler's ``CompiledArtifact``."""
    graph = fx.GraphModule({}, graph_of(recipe))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = symbolic_sizes(mode, recipe.sizes)
    with mode:
        arguments: list[Any] = [a.empty(sizes) for a in recipe.arguments]
    with torch.no_grad():
        return torch._inductor.standalone_compile(
            graph, arguments, dynamic_shapes="from_graph", options={"config_patches": _OPTIONS}
        )


def make_file(recipe: Recipe, file: Path) -> Function:
    """Compile a stage and keep it in a file, if its folder is there."""
    function = make(recipe)
    try:
        with atomic_write(file) as own:
            function.save(path=str(own), format="binary")
    except (OSError, RuntimeError, AssertionError) as error:  # it will be compiled again
        _log.info("compiled code is not kept: %s", error)
    return function


class Stage:
    """A stage, and its code once it was needed.

    Args:
        recipe: How it is compiled.
        takes: Where its arguments are found.
        file: Where its code is kept; None keeps it nowhere.
    """

    def __init__(self, recipe: Recipe, takes: Sequence[tuple[int, int]], file: Path | None = None):
        self.recipe, self.takes, self.file = recipe, takes, file
        self.function: Function | None = None
        self.empty = not recipe.results  # nothing is asked of it

    def is_made(self) -> bool:
        """Whether its code is in its file."""
        return self.file is not None and self.file.exists()

    def compile(self) -> Function:
        """Its code, from the file if it is there."""
        if self.file is None:
            return make(self.recipe)
        if self.file.exists():
            try:
                loaded: Function = torch._inductor.CompiledArtifact.load(path=str(self.file), format="binary")
                return loaded
            except Exception as error:  # of another version, or damaged
                _log.info("compiled code is made again, %s cannot be loaded: %r", self.file, error)
        return make_file(self.recipe, self.file)

    def outline(self) -> Function:
        """A function that returns results of the right shapes without values."""

        def function(*given: Tensor) -> list[Tensor]:
            sizes = {}
            for spec, t in zip(self.recipe.arguments, given, strict=True):
                for expected, n in zip(spec.shape, t.shape, strict=True):
                    if isinstance(expected, str) and (found := _SIZE.fullmatch(expected)):
                        sizes[found[1]] = n - int(found[2] or 0)
            return [r.empty(sizes) for r in self.recipe.results]

        return function
