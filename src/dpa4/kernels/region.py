"""Compiled regions: parts of the model as compiled functions with compiled first and second derivatives.

Training on forces differentiates twice, which the compiler's own autograd does not do. A region is therefore
traced three times: its value, its vector-Jacobian product, and the vector-Jacobian product of that. Each is a flat
graph of ATen operators and kernels in which nothing is left to differentiate. Two ``torch.autograd.Function`` tie
them together, so ``torch.autograd.grad(..., create_graph=True)`` and ``loss.backward()`` work as in eager mode.
Derivatives recompute the region from its arguments: only those are kept in memory (docs/adr/0011).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch._inductor
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

Axis = Literal["node", "node+1", "center", "center+1", "edge", "static"]
"""What the leading axis of an argument counts; "center" are the nodes that receive, "static" does not vary."""

_COUNTED = ("node", "center", "edge")
Mask = tuple[bool, ...]


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
        self.axes: list[Axis] = pytree.tree_leaves(arguments)
        self.compiled: dict[Any, Callable[[list[Tensor]], list[Tensor | None]]] = {}
        self.out_spec: Any = None


class Region:
    """Stands for a method of a module, and is called like it.

    Arguments and results are tensors or (named) tuples of them. The method must be a function of its arguments and of
    the parameters and buffers of the named submodules alone. Sizes along node and edge axes may differ from call to
    call without compiling again; where a size is zero or one, the method itself runs. Gradients of parameters are
    computed in training mode, and only by a backward pass that is not itself differentiated.
    """

    def __init__(self, module: nn.Module, method: str, submodules: Sequence[str], code: RegionCode):
        self.module, self.eager, self.code = module, getattr(module, method), code
        prefixes = tuple(f"{name}." for name in submodules)
        named = [*module.named_parameters(), *module.named_buffers()]
        named = [(n, t) for n, t in named if n.startswith(prefixes)]
        self.names, self.tensors = [n for n, _ in named], [t for _, t in named]

    def __call__(self, *args: Any) -> Any:
        """The method's result for its arguments."""
        leaves, spec = pytree.tree_flatten(args)
        call = _Call(self, spec, leaves)
        if min(call.sizes.values()) < 2:  # compilers treat sizes 0 and 1 as special
            return self.eager(*args)
        results = _Value.apply(call, *self.tensors, *leaves)
        return pytree.tree_unflatten(results, self.code.out_spec)


class _Call:
    """One call of a region: the three functions of flat lists of tensors, and how to run them compiled.

    Inputs are parameters, buffers and arguments, in this order.
    """

    def __init__(self, region: Region, spec: Any, leaves: list[Any]):
        self.region, self.code, self.spec = region, region.code, spec
        axes = self.code.axes
        self.sizes = {a: len(t) for a, t in zip(axes, leaves, strict=True) if a in _COUNTED}
        self.device = leaves[0].device.type
        enabled = torch.is_autocast_enabled(self.device)
        self.autocast = torch.get_autocast_dtype(self.device) if enabled else None

    def value(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Results of the module."""
        state = dict(zip(self.region.names, inputs, strict=False))
        args = pytree.tree_unflatten(list(inputs[len(state) :]), self.spec)
        with torch.autocast(
            self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False
        ):
            with _reparametrize_module(self.region.module, state):
                result = self.region.eager(*args)
        leaves, self.code.out_spec = pytree.tree_flatten(result)
        return leaves

    @torch.enable_grad()
    def vjp(self, mask: Mask, inputs: Sequence[Any], grads: Sequence[Any]) -> list[Tensor | None]:
        """Gradients of the inputs in the mask, given those of the results."""
        inputs = _require_grad(inputs, mask)
        return _gradient(self.value(inputs), _chosen(inputs, mask), grads)

    @torch.enable_grad()
    def second_vjp(
        self, mask: Mask, wanted: Mask, inputs: Sequence[Any], grads: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[Tensor | None]:
        """Gradients of the wanted ones of inputs and grads, given cotangents of what ``vjp`` returns."""
        needed = [w or m for w, m in zip(wanted, [*mask, *[False] * len(grads)], strict=True)]
        both = _require_grad([*inputs, *grads], needed)
        inputs, grads = both[: len(inputs)], both[len(inputs) :]
        first = _gradient(self.value(inputs), _chosen(inputs, mask), grads, create_graph=True)
        return _gradient(first, _chosen(both, wanted), cotangents)

    def run(
        self,
        inputs: Sequence[Any],
        grads: Sequence[Any] = (),
        cotangents: Sequence[Any] = (),
        mask: Mask = (),
        wanted: Mask = (),
    ) -> list[Any]:
        """``value``, ``vjp`` (with a mask) or ``second_vjp`` (with wanted ones) in compiled form."""
        flat = [t.detach().contiguous() for t in (*inputs, *grads, *cotangents) if t is not None]
        exists = tuple(t is not None for t in (*inputs, *cotangents))
        key = (mask, wanted, exists, tuple(t.dtype for t in flat), self.autocast, flat[0].device)
        if key not in self.code.compiled:
            start = time.monotonic()
            self.code.compiled[key] = self._compile(inputs, grads, cotangents, mask, wanted)
            self.code.report(self.code.name, time.monotonic() - start)
        with torch.autocast(self.device, enabled=False):  # the casts are part of the compiled code
            return self.code.compiled[key](flat)

    def _compile(
        self, inputs: Sequence[Any], grads: Sequence[Any], cotangents: Sequence[Any], mask: Mask, wanted: Mask
    ) -> Callable[[list[Tensor]], list[Tensor | None]]:
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fakes = self._fakes(mode, inputs)
        groups: list[list[Tensor | None]] = [fakes]
        if grads:
            with mode, enable_python_dispatcher(), torch.no_grad():
                groups.append([_contiguous_like(r) for r in self.value(fakes)])
        if cotangents:
            chosen = zip(_chosen(fakes, mask), cotangents, strict=True)
            with mode:
                groups.append([None if c is None else _contiguous_like(f) for f, c in chosen])
        exists: list[bool] = []

        def traced(*flat: Tensor) -> list[Tensor]:
            rest = iter(flat)
            given = [[None if t is None else next(rest) for t in group] for group in groups]
            if wanted:
                results: Sequence[Tensor | None] = self.second_vjp(mask, wanted, *given)
            else:
                results = self.vjp(mask, *given) if mask else self.value(*given)
            exists[:] = [r is not None for r in results]
            return [r for r in results if r is not None]

        flat: list[Any] = [t for group in groups for t in group if t is not None]
        with enable_python_dispatcher():  # decompositions that keep symbolic sizes
            graph = make_fx(traced)(*flat)
        graph.graph.eliminate_dead_code()
        with torch.no_grad():
            artifact = torch._inductor.standalone_compile(graph, flat, dynamic_shapes="from_graph")

        def compiled(flat: list[Tensor]) -> list[Tensor | None]:
            results = iter(artifact(*flat))
            return [next(results) if e else None for e in exists]

        return compiled

    def _fakes(self, mode: FakeTensorMode, inputs: Sequence[Any]) -> list[Tensor | None]:
        """The inputs without their data, symbolic along node and edge axes."""
        axis: dict[str, Any] = {}
        for k, name in enumerate(("node", "center", "edge")):
            # Odd and different: nothing may be concluded from the sizes at hand.
            hint = (self.sizes.get(name, 0) | 1) + 4 * k  # type: ignore[call-overload]
            context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            size = mode.from_tensor(torch.empty(hint), symbolic_context=context).shape[0]
            axis |= {name: size, f"{name}+1": size + 1}
        axes = ["static"] * len(self.region.tensors) + self.code.axes
        fakes: list[Tensor | None] = []
        with mode:
            for t, a in zip(inputs, axes, strict=True):
                if t is None:
                    fakes.append(None)
                else:
                    shape = t.shape if a == "static" else (axis[a], *t.shape[1:])
                    fakes.append(torch.empty(shape, dtype=t.dtype, device=t.device))
        return fakes


def _contiguous_like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _chosen(tensors: Sequence[Any], mask: Mask) -> list[Any]:
    return [t for t, m in zip(tensors, mask, strict=True) if m]


def _require_grad(tensors: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """Leaves of a new graph, differentiable where the mask says so."""
    return [t if t is None else t.detach().requires_grad_(m) for t, m in zip(tensors, mask, strict=True)]


def _gradient(
    results: Sequence[Any], inputs: Sequence[Tensor], grads: Sequence[Any], create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of the results that depend on the inputs; None for inputs without influence."""
    pairs = [
        (r, g)
        for r, g in zip(results, grads, strict=True)
        if r is not None and g is not None and r.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True)
    )


class _Value(torch.autograd.Function):
    """Value of a region; its derivative is `_Vjp`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return tuple(call.run(inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        call, inputs = ctx.call, ctx.saved_tensors
        region = call.region
        # Forces are a gradient of arguments, taken in evaluation or differentiated again.
        parameters = region.module.training and not torch.is_grad_enabled()
        own = len(region.tensors)
        mask = tuple(n and (parameters or i >= own) for i, n in enumerate(ctx.needs_input_grad[1:]))
        found = iter(_Vjp.apply(call, mask, *inputs, *grads))
        return None, *(next(found) if m else None for m in mask)


class _Vjp(torch.autograd.Function):
    """Vector-Jacobian product of a region; its derivative is the last that there is."""

    @staticmethod
    def forward(ctx: Any, call: _Call, mask: Mask, *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.call, ctx.mask = call, mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(call.run(tensors[: len(mask)], tensors[len(mask) :], mask=mask))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        tensors, mask, wanted = ctx.saved_tensors, ctx.mask, ctx.needs_input_grad[2:]
        inputs, grads = tensors[: len(mask)], tensors[len(mask) :]
        found = iter(ctx.call.run(inputs, grads, cotangents, mask, wanted))
        return None, None, *(next(found) if w else None for w in wanted)
