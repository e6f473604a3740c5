"""Stages of compiled regions: straight-line code on tensors, stored as text that any process can compile.

Compiled code is stored in a file of `dpa4.code_cache`. Another process may therefore compile a stage, and later runs
load it without tracing (docs/adr/0016).
"""

import inspect
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dpa4 import code_cache
from dpa4.system import float32_by_default

code_cache.confine_inductor()  # before functions import the compiler, which opens its cache at once

Function = Callable[..., Sequence[Tensor]]

Place = tuple[int, int]
"""Place of a tensor that exists before a stage: its group, as numbered in `dpa4.ops.second_order.FourStages.run`, and
its position in the group."""

_OPTIONS = {
    "comprehensive_padding": False,  # tensors that stages pass to each other must be contiguous
    "pattern_matcher": False,  # slow, and no pattern matches here
    "size_asserts": False,  # take more time on the host than some kernels on the device
    "alignment_asserts": False,
    "cpp_cache_precompile_headers": False,  # they would be read from a folder that other users can create
}

ONE_AT_A_TIME = threading.RLock()
"""Held while a thread traces or compiles; the compiler is not made for several threads."""

_NAMES = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
"""Global names that the text of a stage may use."""

_SIZE = re.compile(r"(\w+)(?: \+ (\d+))?")

_log = logging.getLogger(__name__)


class Spec(NamedTuple):
    """Shape, dtype and device of a contiguous tensor; a variable length is an expression of axis names."""

    shape: list[int | str]
    dtype: str
    device: str

    @classmethod
    def of(cls, t: Tensor, axes: Mapping[Any, str]) -> "Spec":
        """Describe a tensor with symbolic sizes; ``axes`` maps symbols to axis names."""
        names = {symbol: symbol.func(axis) for symbol, axis in axes.items()}
        sizes = [n if isinstance(n, int) else n.node.expr.xreplace(names) for n in t.shape]
        shape = [str(n) if getattr(n, "free_symbols", None) else int(n) for n in sizes]
        return cls(shape, str(t.dtype), str(t.device))

    def empty(self, sizes: Mapping[str, Any]) -> Tensor:
        """Create an uninitialised tensor for sizes of the axes."""
        shape = [n if isinstance(n, int) else eval(n, {}, dict(sizes)) for n in self.shape]
        dtype = getattr(torch, self.dtype.removeprefix("torch."))
        return torch.empty(shape, dtype=dtype, device=self.device)


class Recipe(NamedTuple):
    """Everything needed to compile a stage; can be stored as JSON."""

    source: str  # a Python function
    arguments: list[Spec]
    results: list[Spec]
    sizes: dict[str, int]  # size hints by axis

    @classmethod
    def read(cls, found: Any) -> "Recipe":
        """Build from JSON data."""
        source, arguments, results, sizes = found
        return cls(source, [Spec(*a) for a in arguments], [Spec(*r) for r in results], sizes)


def recipe_of(graph: fx.Graph, axes: Mapping[Any, str], sizes: Mapping[str, int]) -> Recipe:
    """Write a graph that returns a list of tensors as a recipe.

    Args:
        graph: Graph whose nodes carry fake tensors (``meta["val"]``).
        axes: Axis names of the symbolic sizes.
        sizes: Size hints by axis.

    Raises:
        NotImplementedError: If the code uses global names other than those of `_NAMES`.
    """
    code = graph.python_code("self")
    if unknown := [n for n in code.globals if n not in _NAMES and re.search(rf"\b{n}\b", code.src)]:
        raise NotImplementedError(f"traced code uses global names that its text cannot refer to: {unknown}")
    arguments = [Spec.of(n.meta["val"], axes) for n in graph.nodes if n.op == "placeholder"]
    results = [Spec.of(n.meta["val"], axes) for n in graph.output_node().args[0]]  # type: ignore[union-attr]
    return Recipe(code.src, arguments, results, dict(sizes))


def symbolic_sizes(mode: FakeTensorMode, sizes: Mapping[str, int]) -> dict[str, torch.SymInt]:
    """Create a symbolic size for each axis, with its size hint."""
    symbols = {}
    for axis, size in sizes.items():
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        fake: Any = mode.from_tensor(torch.empty(size, device="meta"), symbolic_context=context)
        symbols[axis] = fake.shape[0]
    return symbols


def graph_of(recipe: Recipe) -> fx.Graph:
    """Rebuild the graph of a recipe, by calling its source with recording arguments."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    names: dict[str, Any] = _NAMES | {"torch": _OpRecorder(torch, tracer)}
    exec(recipe.source, names)
    _, *arguments = inspect.signature(function := names["forward"]).parameters
    results = function(None, *(fx.Proxy(graph.placeholder(name), tracer) for name in arguments))
    graph.output(tracer.create_arg(results))
    return graph


class _OpRecorder:
    """Proxy of a module or function whose calls become nodes of a graph, even calls without arguments."""

    def __init__(self, target: Any, tracer: fx.proxy.TracerBase):
        self._target, self._tracer = target, tracer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        is_value = isinstance(found, torch.dtype | torch.layout | torch.memory_format)
        return found if is_value else _OpRecorder(found, self._tracer)

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self._tracer.create_proxy("call_function", self._target, args, kwargs)


def compile_recipe(recipe: Recipe) -> Any:
    """Compile a stage to a ``CompiledArtifact`` of the compiler."""
    import torch._inductor

    graph = fx.GraphModule({}, graph_of(recipe))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = symbolic_sizes(mode, recipe.sizes)
    with mode:
        arguments: list[Any] = [a.empty(sizes) for a in recipe.arguments]
    with torch.no_grad():
        return torch._inductor.standalone_compile(
            graph, arguments, dynamic_shapes="from_graph", options={"config_patches": _OPTIONS}
        )


def compile_to_file(recipe: Recipe, file: Path) -> Function:
    """Compile a stage and store it in a file; if that is impossible, only return it."""
    function = compile_recipe(recipe)
    try:
        with code_cache.write(file) as own:
            function.save(path=str(own), format="binary")
    except (OSError, RuntimeError, AssertionError) as error:  # the next run will compile it again
        _log.info("compiled code cannot be stored in %s: %s", file, error)
    return function


def _loaded(file: Path) -> Function | None:
    """Load compiled code from a file; None if that is impossible."""
    import torch._inductor

    if code_cache.read(file) is None:
        return None
    try:
        function: Function = torch._inductor.CompiledArtifact.load(path=str(file), format="binary")
    except Exception as error:  # written by another version
        _log.info("compiled code in %s cannot be loaded and is compiled again: %r", file, error)
        return None
    return function


class Stage:
    """Stage that is compiled at first use.

    Args:
        recipe: Text and types of the stage.
        sources: Place of each argument.
        file: File of the compiled code; None to store none.

    Attributes:
        function: Compiled code, or None before the first use.
        empty: Whether the stage has no results, so that it need not run.
    """

    def __init__(self, recipe: Recipe, sources: Sequence[Place], file: Path | None = None):
        self.recipe, self.sources, self.file = recipe, sources, file
        self.function: Function | None = None
        self.empty = not recipe.results

    def is_cached(self) -> bool:
        """Return whether the compiled code exists as a file that is intact."""
        return self.file is not None and code_cache.read(self.file) is not None

    def compile(self) -> Function:
        """Load the compiled code from its file, or compile it."""
        with ONE_AT_A_TIME, float32_by_default():
            if self.file is None:
                return compile_recipe(self.recipe)
            with code_cache.locked(self.file):
                return _loaded(self.file) or compile_to_file(self.recipe, self.file)

    def outline(self) -> Function:
        """Function that returns uninitialised results of the right shapes, for tracing."""

        def function(*arguments: Tensor) -> list[Tensor]:
            # Sizes of the axes from the shapes of the arguments: an axis, or an axis + n.
            sizes = {}
            for spec, t in zip(self.recipe.arguments, arguments, strict=True):
                for expected, n in zip(spec.shape, t.shape, strict=True):
                    if isinstance(expected, str) and (found := _SIZE.fullmatch(expected)):
                        sizes[found[1]] = n - int(found[2] or 0)
            return [r.empty(sizes) for r in self.recipe.results]

        return function
