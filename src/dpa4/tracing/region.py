"""Compiled regions: methods of the network as compiled functions with compiled first and second derivatives.

Training on forces differentiates twice, which the autograd of torch.compile does not support. A region y = f(p, x) of
parameters p and arguments x is therefore traced once through everything a training step computes from it: the four
stages of `dpa4.ops.second_order`. The trace is a flat graph of ATen operators and kernels with nothing left to
differentiate. It is cut into the stages. Results of matrix products and of kernels over edges are computed once and
saved for later stages. Everything else is recomputed where it is needed, since reading it from memory would take as
long. Outside of training, the nodes that depend on weights alone (parameters and buffers) form a further stage, the
stage of constants, which is computed once for many calls (docs/adr/0011).

Traces and compiled stages are stored on disk, so that later runs need neither the tracer nor the compiler
(docs/adr/0016). The sources of `ops`, `tracing` and `model` are part of the key of these files: any change to them
invalidates the files.
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

from dpa4 import code_cache
from dpa4.ops import second_order
from dpa4.ops.second_order import Maybe
from dpa4.system import float32_by_default
from dpa4.tracing.sizes import COUNTED, INDEX_LIMIT, MIN_SIZE
from dpa4.tracing.stage import ONE_AT_A_TIME, Function, Stage
from dpa4.tracing.trace import Kind, Trace, from_structure, trace

Axis = Literal[
    "node", "node+1", "center", "center+1", "edge", "node data", "center data", "edge data", "static"
]
"""Meaning of the leading axis of an argument.

"center" are the nodes that receive messages. Arguments that are "static" have no variable axis and are treated like
parameters. "data" marks arguments that no parameter influences, such as the geometry: they have a derivative in
stage 1, for the forces, but none in stage 3. "+1" means one more entry than there are nodes or centres.
"""

_DATA = " data"


class RegionCode:
    """Compiled code that regions share if they differ in their parameters only. It is compiled at first use.

    Args:
        name: Name for messages.
        arguments: Axis of each tensor among the arguments, in the structure of the arguments.
        report: Called with the name and the seconds after each compilation.
        origin: Everything the code depends on besides its arguments and the sources of this package, such as the
            configuration of the model. If None, nothing is stored on disk.

    Attributes:
        programs: Program of each kind of call.
        compile_stage: Function that returns the compiled function of a stage.
        before_trace: Called before each trace, which takes seconds.
        after_trace: Called with the stages of each new program.
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
        self.compile_stage: Callable[[Stage], Function] = Stage.compile
        self.before_trace: Callable[[], None] = lambda: None
        self.after_trace: Callable[[list[Stage]], None] = lambda stages: None

    def stages(self) -> list[Stage]:
        """Stages of all programs."""
        return [s for program in self.programs.values() for s in (program.constants, *program.stages)]

    def folder(self, device: torch.device, kind: Any) -> Path | None:
        """Folder of a program in the cache, None without ``origin``; ``kind`` identifies the program."""
        if self.origin is None:
            return None
        text = repr([_surroundings(device), self.origin, self.name, self.axes, self.data, kind])
        return code_cache.folder() / hashlib.sha256(text.encode()).hexdigest()


def _surroundings(device: torch.device) -> list[Any]:
    """Everything the code for a device depends on besides its origin: versions, device, threads, sources."""
    if device.type == "cuda":
        machine: list[Any] = [torch.cuda.get_device_name(device)]
    else:
        machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    return [torch.__version__, *machine, _digest_of_sources()]


@cache
def _digest_of_sources() -> str:
    """Digest of the sources that a trace passes through."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for source in _traced_sources(package):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _traced_sources(package: Path) -> list[Path]:
    """Source files that a trace passes through, including those in sub-folders."""
    return sorted(path for folder in ("ops", "tracing", "model") for path in (package / folder).rglob("*.py"))


class Region:
    """Compiled replacement of a method of a module, called like the method.

    Arguments and results are tensors or (named) tuples of tensors. The method must be a function of its arguments and
    of the parameters and buffers of the named submodules alone. Sizes along node and edge axes may vary from call to
    call without recompilation; if a size is zero or one, the method itself runs. In training mode a region can be
    differentiated twice and yields gradients of parameters. In evaluation mode it can be differentiated once, with
    respect to its arguments.

    Args:
        module: The module.
        method: Name of the method.
        submodules: Names of the submodules and parameters that the method uses.
        code: Code, shared by all regions that differ in their parameters only.
        max_kept: Outside of training, the largest number of nodes for which stages save results for each other. With
            more nodes the derivatives recompute everything, to save memory; on a GPU also if not all nodes are
            centres.
        keeps: Whether stages may save results on a GPU at all; False for methods that are called for parts of the
            nodes.
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
        # Duplicates are included: modules may share a constant, and under a name that is missing here it would be
        # traced as a constant of the code.
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        named = [(n, t) for n, t in named if f"{n}.".startswith(prefixes)]
        self.names, self.tensors = [n for n, _ in named], [t for _, t in named]
        self.constants: dict[_Program, _Constants] = {}

    def __call__(self, *args: Any) -> Any:
        """Return the result of the method for these arguments."""
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
        """Return the result of the method with other parameters and buffers.

        Args:
            spec: Structure of the arguments.
            inputs: Parameters and buffers in the order of ``names``, then the leaves of the arguments.
        """
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
                self.code.after_trace([program.constants, *program.stages])
            # Compiled code has 32-bit indices if they suffice at the size hints. Larger tensors need the wide
            # program.
            if all(sizes[a] * n < INDEX_LIMIT for a, n in self.code.programs[kind].elements.items()):
                break
        return self.code.programs[kind]

    def _constants(self, program: "_Program", inputs: Sequence[Maybe]) -> list[Tensor]:
        """Results of the stage of constants of a program; recomputed if the weights have changed."""
        if program.constants.empty:
            return []
        weights = [t for _, i in program.constants.sources if (t := inputs[i]) is not None]
        # The code is part of the key because code for tracing returns tensors without values (`Stage.outline`).
        origin = program.code_of(program.constants), versions(weights)
        if program not in self.constants or self.constants[program].origin != origin:
            held = [t.detach() for t in weights]
            self.constants[program] = _Constants(origin, held, program.constants_of(inputs))
        return self.constants[program].values


class _Constants(NamedTuple):
    """Cached results of the stage of constants."""

    origin: Any  # code and `versions` of the weights
    weights: list[Tensor]  # kept alive: if they were freed, other tensors could get the same address
    values: list[Tensor]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Numbers that differ from those of an earlier call if tensors were changed in place or assigned to ``.data``.

    As in autograd, changes in place through ``.data`` are not detected.
    """
    return [*map(operator.attrgetter("_version"), tensors), *map(Tensor.data_ptr, tensors)]


class _Program:
    """Stages of a region for one kind of call, as `dpa4.ops.second_order.FourStages`.

    Inputs are the parameters and buffers of the region, the arguments, and the results of the stage of constants.
    """

    def __init__(self, region: "Region", inputs: list[Maybe], spec: Any, kind: Kind):
        self.code, self.device = region.code, kind.device
        axes = ["static"] * len(region.tensors) + region.code.axes
        data = [False] * len(region.tensors) + region.code.data
        differentiable = [t is not None and t.requires_grad for t in inputs]
        # Stage 1 differentiates with respect to arguments, stage 3 with respect to everything but data.
        self.mask = [d and a != "static" for d, a in zip(differentiable, axes, strict=True)]
        self.last_mask = [d and not is_data for d, is_data in zip(differentiable, data, strict=True)]
        self.once = not kind.training
        shapes = [
            t if t is None else tuple(t.shape[a != "static" :]) for t, a in zip(inputs, axes, strict=True)
        ]
        folder = region.code.folder(kind.device, [region.eager.__qualname__, region.names, kind, shapes])
        found = self._trace(partial(region.called_with, spec), inputs, axes, kind, folder)
        self.exists, self.elements = found.exists, found.elements
        self.out_spec = pytree.tree_structure(from_structure(found.results))
        self.constants, *self.stages = [
            Stage(recipe, sources, folder and folder / f"stage-{i}")
            for i, (recipe, sources) in enumerate(found.stages)
        ]
        hoisted = [False] * len(self.constants.recipe.results)  # no derivatives with respect to constants
        self.num_inputs = len(inputs) + len(hoisted)
        self.mask, self.last_mask = self.mask + hoisted, self.last_mask + hoisted

    def _trace(
        self,
        function: Callable[[Sequence[Maybe]], Any],
        inputs: list[Maybe],
        axes: Sequence[str],
        kind: Kind,
        folder: Path | None,
    ) -> Trace:
        """Read the trace from a folder of the cache, or trace the function and store the trace there."""
        file = folder and folder / "trace.json"
        lock = code_cache.locked(file) if file else nullcontext()
        with ONE_AT_A_TIME, float32_by_default(), lock:
            if file is not None and (stored := Trace.read(file)) is not None:
                return stored
            self.code.before_trace()
            found = trace(function, inputs, axes, kind, self.mask, self.last_mask)
            if file is not None:
                found.write(file)
            return found

    def run(self, stage: int, groups: Sequence[Sequence[Maybe]]) -> tuple[list[Maybe], list[Tensor]]:
        """Run a stage, see `dpa4.ops.second_order.FourStages.run`."""
        compiled, exists = self.stages[stage], self.exists[stage]
        if compiled.empty:
            return [None for _ in exists], []
        found = iter(self._call(compiled, groups))
        return [next(found) if e else None for e in exists], list(found)

    def constants_of(self, inputs: Sequence[Maybe]) -> list[Tensor]:
        """Results of the stage of constants; contiguous, since otherwise every call would copy them."""
        with _memory_of_constants(self.device):
            return [t.contiguous() for t in self._call(self.constants, [inputs])]

    def code_of(self, stage: Stage) -> Function:
        """Compiled function of a stage; compiled or loaded at first use."""
        if stage.function is None:
            start = time.monotonic()
            stage.function = self.code.compile_stage(stage)
            self.code.report(self.code.name, time.monotonic() - start)
        return stage.function

    def _call(self, stage: Stage, groups: Sequence[Sequence[Maybe]]) -> Sequence[Tensor]:
        flat = [t.contiguous() for t in (groups[group][i] for group, i in stage.sources) if t is not None]
        function = self.code_of(stage)
        # The casts of autocast were traced and are part of the code.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return function(*flat)

    def without_first(self, groups: list[list[Maybe]], grads: Sequence[Tensor]) -> list[Maybe]:
        """Run stage 3 alone, see `dpa4.ops.second_order.FourStages.without_first`.

        There is no code for this case: stages 1 and 2 run with zeros in place of g and c.
        """
        groups = [*groups, [torch.zeros_like(g) for g in grads]]
        first, kept = self.run(1, groups)
        groups += [list(kept), second_order.with_zeros(self, groups[0], [None] * len(first))]
        groups.append(list(self.run(2, groups)[1]))
        return self.run(3, [*groups, grads])[0]


def _memory_of_constants(device: torch.device) -> AbstractContextManager[None]:
    """Memory pool for tensors that outlive a call, so that they do not pin large blocks of the caching allocator."""
    return nullcontext() if device.type != "cuda" else torch.cuda.use_mem_pool(_pool(device), device)


@cache
def _pool(device: torch.device) -> torch.cuda.MemPool:
    return torch.cuda.MemPool()


def _parts_bound_memory(device: torch.device) -> bool:
    """Return whether edges are cut into parts to bound memory, as on a GPU; on a CPU parts only serve the cache."""
    return device.type != "cpu"
