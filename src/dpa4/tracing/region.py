"""Compiled regions: parts of the model as compiled functions with compiled first and second derivatives.

Training on forces differentiates twice, which the compiler's own autograd does not do. A region y = f(p, x) of
parameters p and arguments x is therefore traced once through all that such a step asks of it, the four stages of
`dpa4.ops.second_order`. The trace is a flat graph of ATen operators and kernels in which nothing is left to
differentiate. It is cut into the stages: products of matrices and kernels over edges are computed once and kept for
later stages, everything else is computed again where it is needed, since reading it from memory would take as long.
Outside of training, what depends on weights alone (parameters and buffers) is a stage of its own, computed once for
many calls (docs/adr/0011).

Traces and compiled stages are kept on disk, so that later runs need neither the tracer nor the compiler
(docs/adr/0016).
"""

import hashlib
import operator
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from dpa4.ops import second_order
from dpa4.ops.second_order import Maybe
from dpa4.tracing.sizes import COUNTED, INDEX_LIMIT, MIN_SIZE
from dpa4.tracing.stage import Function, Stage
from dpa4.tracing.trace import Kind, Trace, built, trace

Axis = Literal[
    "node", "node+1", "center", "center+1", "edge", "node data", "center data", "edge data", "static"
]
"""What the leading axis of an argument counts.

"center" are the nodes that receive; "static" does not vary, and such arguments are taken for parameters. Data are
what no parameter influences, such as the geometry: they have a derivative in stage 1, that of the forces, but none
in stage 3.
"""

_DATA = " data"


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
        return [s for program in self.programs.values() for s in (program.constants, *program.stages)]

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
    package = Path(__file__).parents[1]
    for source in _traced_sources(package):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _traced_sources(package: Path) -> list[Path]:
    """Files whose code a trace passes through, in sub-folders, too."""
    return sorted(path for folder in ("ops", "tracing", "model") for path in (package / folder).rglob("*.py"))


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
        # Every name: modules may share a constant, and one left out would be taken for part of the code.
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        named = [(n, t) for n, t in named if f"{n}.".startswith(prefixes)]
        self.names, self.tensors = [n for n, _ in named], [t for _, t in named]
        self.constants: dict[_Program, _Constants] = {}

    def __call__(self, *args: Any) -> Any:
        """The method's result for its arguments."""
        leaves, spec = pytree.tree_flatten(args)
        sizes = {}
        for axis, t in zip(self.code.axes, leaves, strict=True):
            if (counted := axis.removesuffix("+1")) in COUNTED:
                sizes[counted] = len(t) - (axis != counted)
        if min(sizes.values()) < MIN_SIZE:
            return self.eager(*args)
        program = self._program(leaves, spec, sizes)
        inputs = [*self.tensors, *leaves]
        results = second_order.apply(program, [*inputs, *self._constants(program, inputs)])
        return pytree.tree_unflatten(results, program.out_spec)

    def called_with(self, spec: Any, inputs: Sequence[Maybe]) -> Any:
        """The method's result for other tensors of the region, and leaves of arguments of a structure."""
        state: dict[str, Any] = dict(zip(self.names, inputs, strict=False))
        args = pytree.tree_unflatten(list(inputs[len(state) :]), spec)
        with _reparametrize_module(self.module, state):
            return self.eager(*args)

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
            kind = Kind(kinds, device, autocast, training, keep, wide)
            if kind not in self.code.programs:
                start = time.monotonic()
                program = self.code.programs[kind] = _Program(self, inputs, spec, kind)
                self.code.report(self.code.name, time.monotonic() - start)
                self.code.added([program.constants, *program.stages])
            # The compiler takes for granted that indices have 32 bits if they do at the sizes it sees.
            if all(sizes[a] * n < INDEX_LIMIT for a, n in self.code.programs[kind].elements.items()):
                break
        return self.code.programs[kind]

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

    def __init__(self, region: "Region", inputs: list[Maybe], spec: Any, kind: Kind):
        self.code, self.device = region.code, kind.device
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
            found = Trace.read(file)
        else:
            region.code.tracing()
            function = partial(region.called_with, spec)
            found = trace(function, inputs, axes, kind, self.mask, self.last_mask)
            if file is not None:
                found.write(file)
        self.exists, self.elements = found.exists, found.elements
        self.out_spec = pytree.tree_structure(built(found.results))
        self.constants, *self.stages = [
            Stage(recipe, takes, folder and folder / f"piece-{i}")
            for i, (recipe, takes) in enumerate(found.stages)
        ]
        hoisted = [False] * len(self.constants.recipe.results)  # nothing is differentiated by them
        self.num_inputs = len(inputs) + len(hoisted)
        self.mask, self.last_mask = self.mask + hoisted, self.last_mask + hoisted

    def run(self, stage: int, given: Sequence[Sequence[Maybe]]) -> tuple[list[Maybe], list[Tensor]]:
        """See `dpa4.ops.second_order.FourStages`."""
        piece, exists = self.stages[stage], self.exists[stage]
        if piece.empty:
            return [None for _ in exists], []
        found = iter(self._call(piece, given))
        return [next(found) if e else None for e in exists], list(found)

    def constants_of(self, inputs: Sequence[Maybe]) -> list[Tensor]:
        """Results of the stage of constants; contiguous, else every call would copy them."""
        with _memory_of_constants(self.device):
            return [t.contiguous() for t in self._call(self.constants, [inputs])]

    def code_of(self, piece: Stage) -> Function:
        """Code of a stage, made when first needed."""
        if piece.function is None:
            start = time.monotonic()
            piece.function = self.code.make(piece)
            self.code.report(self.code.name, time.monotonic() - start)
        return piece.function

    def _call(self, piece: Stage, given: Sequence[Sequence[Maybe]]) -> Sequence[Tensor]:
        flat = [t.contiguous() for t in (given[group][i] for group, i in piece.takes) if t is not None]
        function = self.code_of(piece)
        # The casts are part of the code.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return function(*flat)

    def without_first(self, given: list[list[Maybe]], grads: Sequence[Tensor]) -> list[Maybe]:
        """See `dpa4.ops.second_order.FourStages`; stages 1 and 2 of zeros."""
        given = [*given, [torch.zeros_like(g) for g in grads]]
        first, kept = self.run(1, given)
        given += [list(kept), second_order.with_zeros(self, given[0], [None] * len(first))]
        given.append(list(self.run(2, given)[1]))
        return self.run(3, [*given, grads])[0]


def _memory_of_constants(device: torch.device) -> AbstractContextManager[None]:
    """Where tensors are that outlive a call: not in a corner of what was allocated for large ones, which would keep
    all of that.
    """
    return nullcontext() if device.type != "cuda" else torch.cuda.use_mem_pool(_pool(device), device)


@cache
def _pool(device: torch.device) -> torch.cuda.MemPool:
    return torch.cuda.MemPool()


def _parts_bound_memory(device: torch.device) -> bool:
    """Whether edges are worked on in parts so that they fit; on a CPU they are so that they stay in its cache."""
    return device.type != "cpu"
