r"""Stack of SO(2) layers as one operator per stage of training (docs/theory.md, "SO(2) layers"; docs/adr/0013).

Layer t maps edge features x (F, E, W), rows of the edge frame one after another in the last axis (`EdgeLayout`), by

.. math:: u = x W_t, \qquad x \leftarrow x + u \, \sigma(u)

with one matrix per order |m| and the gates of `dpa4.ops.gate`; the last layer has no gates. Matrices of orders above
zero have the form [[U, V], [-V, U]], since they commute with rotations about the edge. Kernels rely on this form, and
only the projection of a matrix gradient onto it is defined. Layers that commute with reflections as well have V = 0;
their matrices of orders above zero are U alone, and act on the rows of -m and of +m separately.

The four stages of `dpa4.ops.second_order` are written out here: one product and one gate kernel per layer and stage,
fewer passes over edge tensors than differentiating layer by layer. Outside of training, stages 0 and 1 run in
`dpa4.ops.hopper.so2_stack` where it is available, with one kernel for all layers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpa4.ops import available, gate, second_order
from dpa4.ops.cpp import so2_stack as cpp
from dpa4.ops.hopper import so2_stack as hopper
from dpa4.ops.layout import EdgeLayout
from dpa4.ops.registration import register
from dpa4.ops.second_order import Maybe
from dpa4.ops.split_matmul import columns_of, order_matmul, prepare, split
from dpa4.ops.weights import Weight

Matrices = Sequence[Tensor]
"""Matrices of one layer, one per order."""


def so2_stack(
    x: Tensor, matrices: Sequence[Matrices], gates: Sequence[Tensor], layout: EdgeLayout, training: bool
) -> Tensor:
    """Apply the layers; can be differentiated twice with respect to x.

    Args:
        x: Edge features, (F, E, W).
        matrices: For each layer, one matrix per order, (F, K_m, K_m); or, in all layers and for all orders above
            zero, U alone, (F, K_m / 2, K_m / 2).
        gates: Weights of the gates of each layer but the last, (F, C, lmax C).
        layout: Rows of the edge frame.
        training: Whether matrices and gates are differentiated as well.

    Returns:
        Edge features, (F, E, W).

    Raises:
        RuntimeError: In a backward pass that needs gradients of the weights although ``training`` is false.
    """
    weights = [w.to(x.dtype).contiguous() for w in (*(w for layer in matrices for w in layer), *gates)]
    if not training:
        weights = [_Constant.apply(w) for w in weights]
    separate = (
        layout.mmax > 0 and layout.copies(1, matrices[0][1].shape[-1], x.shape[-1] // layout.total) == 2
    )
    fused = not training and available.whole_stack(x, len(matrices), layout, separate)
    (y,) = second_order.apply(_Stack(len(matrices), layout, training, fused), [x, *weights])
    return y


class _Constant(torch.autograd.Function):
    """Identity on a weight outside of training; raises an error if its gradient is needed."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "a backward pass needs gradients of the parameters in evaluation mode, which has none; call "
            "potential.train() before the forward pass"
        )


class _Stack:
    """The stack as `dpa4.ops.second_order.FourStages`. Inputs: x, the matrices of all layers, the gates.

    Every stage saves lists over layers, flattened into one list. With L layers these are

    * stage 0 (group 1): the products u of the L - 1 gated layers; in training also the input of the last layer. The
      fused kernel saves the products in its own order, and the largest entries of each edge.
    * stage 1 (group 3): the gradients of the results of the L - 1 gated layers.
    * stage 2 (group 5): the changes v of the L - 1 products, and the change of the input of the last layer.

    The last layer saves nothing if it is the only one: its input is x.
    """

    once = False

    def __init__(self, layers: int, layout: EdgeLayout, training: bool, fused: bool):
        self.layout, self.layers, self.training, self.fused = layout, layers, training, fused
        self.num_inputs = 1 + layers * (layout.mmax + 1) + layers - 1
        self.mask = [True] + [False] * (self.num_inputs - 1)
        self.last_mask = [True] + [training] * (self.num_inputs - 1)

    def run(self, stage: int, groups: Sequence[Sequence[Maybe]]) -> tuple[list[Maybe], list[Tensor]]:
        """Run a stage, see `dpa4.ops.second_order.FourStages.run`."""
        ops = torch.ops.dpa4
        if stage == 0 and self.fused:
            y, *kept = ops.so2_fused_value(groups[0][0], self._packed(groups[0], backward=False), True)
            return [y], kept
        x, (us, xs) = groups[0][0], self._kept(groups)
        shared = self._shared(groups[0], backward=stage in (1, 3))
        if stage == 0:
            y, *kept = ops.so2_value(x, *shared, self.training)
            return [y], kept
        if stage == 1:
            dx, *kept = ops.so2_vjp(groups[2][0], us, *shared, True)
            return [dx], kept
        c = groups[4][0]  # cotangent of dx; as a change of x it is the input of stage 2
        if stage == 2:
            y, *kept = ops.so2_tangent(c, us, *shared)
            return [y], kept
        # Group 5: changes of the products, then that of the last layer's input. The first layer's input changes by c.
        vs, ds = groups[5][: self.layers - 1], [c, *groups[5][self.layers - 1 :]]
        # Group 3: gradients of the results of the gated layers. That of the last layer's result is g.
        grads = [*groups[3], groups[2][0]]
        return list(ops.so2_joint(groups[6][0], xs, us, grads, ds, vs, *shared)), []

    def without_first(self, groups: list[list[Maybe]], grads: Sequence[Tensor]) -> list[Maybe]:
        """Run stage 3 alone, see `dpa4.ops.second_order.FourStages.without_first`."""
        if self.fused:
            return [torch.ops.dpa4.so2_fused_vjp(grads[0], groups[1], self._packed(groups[0], backward=True))]
        shared, (us, xs) = self._shared(groups[0], backward=True), self._kept(groups)
        if not self.training:
            return list(torch.ops.dpa4.so2_vjp(grads[0], us, *shared, False))
        return list(torch.ops.dpa4.so2_joint(grads[0], xs, us, [], [], [], *shared))

    def _shared(self, inputs: Sequence[Maybe], backward: bool) -> tuple[Any, ...]:
        """Arguments that all operators have in common: the weights, their split parts, lmax and mmax."""
        x, matrices, gates = self._inputs(inputs)
        parts = split(x, _weights(matrices, self.layout, backward))
        return matrices, gates, parts, *self.layout

    def _packed(self, inputs: Sequence[Maybe], backward: bool) -> list[Tensor]:
        """Weights as the kernels of `dpa4.ops.hopper.so2_stack` read them."""
        _, matrices, gates = self._inputs(inputs)
        packed: list[Tensor] = torch.ops.dpa4.so2_pack(matrices, gates, backward)
        return packed

    def _inputs(self, inputs: Sequence[Maybe]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Split the flat inputs into x, the matrices of all layers, and the gates."""
        x, *weights = [t for t in inputs if t is not None]
        count = self.layers * (self.layout.mmax + 1)
        return x, weights[:count], weights[count:]

    def _kept(self, groups: Sequence[Sequence[Maybe]]) -> tuple[Any, ...]:
        """Products u of the gated layers; and in training the inputs of the first and the last layer."""
        x, kept = groups[0][0], groups[1] if len(groups) > 1 else []
        # For a second derivative outside of training the other kernels continue, with features in rows.
        if self.fused and x is not None:
            kept = [hopper.in_rows(u, x.shape[1]) for u in kept[:-1] if u is not None]
        # The first layers - 1 tensors are products. In training the input of the last layer follows, if it is not x.
        return kept[: self.layers - 1], [x, *kept[self.layers - 1 :]] if self.training else []


# The stages. Lists have one entry per layer. The last layer has no gate, so lists of gates and products are shorter.


Layer = list[Weight]
"""Weights of one layer, one per order."""


def _weights(matrices: Sequence[Tensor], layout: EdgeLayout, backward: bool) -> list[Weight]:
    """Weights of the products, transposed for backward passes; the last layer is residual."""
    orders, channels = layout.mmax + 1, matrices[0].shape[-1] // (layout.lmax + 1)
    return [
        Weight(
            w.mT if backward else w,
            residual=i >= len(matrices) - orders,
            copies=layout.copies(i % orders, w.shape[-1], channels),
        )
        for i, w in enumerate(matrices)
    ]


def _layers(
    x: Tensor,
    matrices: Sequence[Tensor],
    parts: Sequence[Tensor],
    layout: EdgeLayout,
    backward: bool = False,
) -> list[Layer]:
    """Group the weights into layers and prepare them for products with features like x."""
    weights, orders = prepare(x, _weights(matrices, layout, backward), parts), layout.mmax + 1
    return [weights[i : i + orders] for i in range(0, len(weights), orders)]


def _value(
    x: Tensor,
    matrices: list[Tensor],
    gates: list[Tensor],
    parts: list[Tensor],
    lmax: int,
    mmax: int,
    keep: bool,
) -> list[Tensor]:
    """Stage 0: y, the products u of the gated layers, and with ``keep`` the input of the last layer.

    Inputs of the layers in between are recomputed backwards from the last one, which takes less time and memory than
    saving them.
    """
    layout, us = EdgeLayout(lmax, mmax), []
    *gated, last = _layers(x, matrices, parts, layout)
    for layer, g in zip(gated, gates, strict=True):
        us.append(order_matmul(x, layer))
        x = gate.value(x, us[-1], g, layout)
    return [order_matmul(x, last), *us, *([x] if keep and gated else [])]


def _vjp(
    a: Tensor,
    us: list[Tensor],
    matrices: list[Tensor],
    gates: list[Tensor],
    parts: list[Tensor],
    lmax: int,
    mmax: int,
    keep: bool,
) -> list[Tensor]:
    """Stage 1: the gradient of x, and with ``keep`` the gradients of the results of the gated layers."""
    layout = EdgeLayout(lmax, mmax)
    *gated, last = _layers(a, matrices, parts, layout, backward=True)
    a = order_matmul(a, last)
    kept = []
    for layer, g, u in zip(reversed(gated), reversed(gates), reversed(us), strict=True):
        kept.append(a)
        du, _ = gate.vjp(a, u, g, layout, sums=False)
        a = order_matmul(du, layer, add=a, overwrite=not keep)
        del du  # frees memory for the next layer's
    return [a, *(kept[::-1] if keep else [])]


def _tangent(
    d: Tensor,
    us: list[Tensor],
    matrices: list[Tensor],
    gates: list[Tensor],
    parts: list[Tensor],
    lmax: int,
    mmax: int,
) -> list[Tensor]:
    """Stage 2: the changes of y, of the products u and of the last layer's input, if x changes by d."""
    layout, vs = EdgeLayout(lmax, mmax), []
    *gated, last = _layers(d, matrices, parts, layout)
    for layer, g, u in zip(gated, gates, us, strict=True):
        vs.append(order_matmul(d, layer))
        d = gate.tangent(d, vs[-1], u, g, layout)
    return [order_matmul(d, last), *vs, *([d] if gated else [])]


def _joint(
    b: Tensor,
    xs: list[Tensor],
    us: list[Tensor],
    grads: list[Tensor],
    ds: list[Tensor],
    vs: list[Tensor],
    matrices: list[Tensor],
    gates: list[Tensor],
    parts: list[Tensor],
    lmax: int,
    mmax: int,
) -> list[Tensor]:
    """Stage 3: the gradient of x and, if ``xs`` is not empty, those of the matrices and the gates.

    If ``grads``, ``ds`` and ``vs`` are empty, <b, y> alone is differentiated.

    Args:
        b: Gradient of y in the last backward pass.
        xs: Inputs of the first and the last layer; one tensor if there is one layer.
        us: Products of the gated layers.
        grads: Gradients of the results of the layers in the backward pass that yields the forces.
        ds: Changes of the inputs ``xs`` in stage 2.
        vs: Changes of the products in stage 2.
        matrices: Matrices of all layers, one per order.
        gates: Weights of the gates.
        parts: Split parts of the matrices, see `dpa4.ops.split_matmul.split`; empty for ordinary products.
        lmax: Largest degree.
        mmax: Largest order.

    Returns:
        The gradient of x; then, if ``xs`` is not empty, those of the matrices and of the gates, each from the first
        layer to the last.
    """
    layout, c = EdgeLayout(lmax, mmax), b.shape[-1] // EdgeLayout(lmax, mmax).total
    layers = _layers(b, matrices, parts, layout, backward=True)
    of_matrices: list[list[Tensor]] = []
    of_gates: list[Tensor] = []
    inputs = _inputs_backwards(xs, ds, us, vs, gates, layout) if xs else None
    for t in reversed(range(len(layers))):
        x, d = (None, None) if inputs is None else next(inputs)
        # Pairs of tensors whose products, summed over the edges, are the gradients of the weights. The term <b, y>
        # gives (x, du), the term <c, g J> gives (d, da).
        for_matrices: list[tuple[Tensor, Tensor]] = []
        if t == len(layers) - 1:
            du, for_gates = b, []
            for_matrices += [(d, grads[t])] if d is not None else []
        elif ds:
            du, da, q, p = gate.joint(b, vs[t], grads[t], us[t], gates[t], layout)
            for_gates = [(us[t][..., :c], q), (vs[t][..., :c], p)]
            for_matrices += [(d, da)] if d is not None else []
        else:
            du, sums = gate.vjp(b, us[t], gates[t], layout, sums=bool(xs))
            for_gates = [(us[t][..., :c], sums)] if sums is not None else []
        if x is not None:
            of_matrices.append(_gradients(layers[t], [(x, du), *for_matrices]))
            of_gates += [_sum_of_products(for_gates)] if for_gates else []
        last = t == len(layers) - 1
        b = order_matmul(du, layers[t], add=None if last else b, overwrite=not last)
    return [b, *(w for layer in reversed(of_matrices) for w in layer), *reversed(of_gates)]


def _gradients(layer: Layer, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Gradients of the matrices of a layer: sums over pairs of edge features, edges and copies of a matrix."""
    found = []
    for run, w in zip(columns_of(layer), layer, strict=True):
        blocks = [[t[..., run].chunk(w.copies, -1) for t in pair] for pair in pairs]
        found.append(_sum_of_products([b for left, right in blocks for b in zip(left, right, strict=True)]))
    return found


def _inputs_backwards(
    xs: list[Tensor],
    ds: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    gates: list[Tensor],
    layout: EdgeLayout,
) -> Iterator[tuple[Tensor, Maybe]]:
    """Inputs of the layers and their changes, from the last layer to the first.

    The inputs of the first and the last layer were saved. Inputs of the layers in between are recovered by inverting
    the gated updates; all but the first such step may overwrite the tensors of the step before.
    """
    last = len(gates)
    x, d = xs[-1], ds[-1] if ds else None
    yield x, d
    for t in reversed(range(1, last)):
        x, d = gate.undo(x, d, vs[t] if vs else None, us[t], gates[t], layout, overwrite=t + 1 != last)
        yield x, d
    if last:
        yield xs[0], ds[0] if ds else None


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of x^T y over the pairs and the edges, (F, K, N)."""
    (x, y), *others = pairs
    total = torch.bmm(x.mT, y)
    for x, y in others:
        total.baddbmm_(x.mT, y)
    return total


# The operators. Tracing calls the functions `_new_...`, which return uninitialised results.


def _new_value(x: Tensor, matrices: list[Tensor], gates: list[Tensor], *others: Any) -> list[Tensor]:
    *_, keep = others
    return [x.new_empty(x.shape) for _ in range(1 + len(gates) + (keep and bool(gates)))]


def _new_vjp(
    a: Tensor, us: list[Tensor], matrices: list[Tensor], gates: list[Tensor], *others: Any
) -> list[Tensor]:
    *_, keep = others
    return [a.new_empty(a.shape) for _ in range(1 + keep * len(gates))]


def _new_tangent(
    d: Tensor, us: list[Tensor], matrices: list[Tensor], gates: list[Tensor], *others: Any
) -> list[Tensor]:
    return [d.new_empty(d.shape) for _ in range(1 + len(gates) + bool(gates))]


def _new_joint(
    b: Tensor,
    xs: list[Tensor],
    us: list[Tensor],
    grads: list[Tensor],
    ds: list[Tensor],
    vs: list[Tensor],
    matrices: list[Tensor],
    gates: list[Tensor],
    parts: list[Tensor],
    lmax: int,
    mmax: int,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (b, *matrices, *gates)][: None if xs else 1]


def _on_cpu(
    stage: Callable[..., list[Tensor]], new: Callable[..., list[Tensor]]
) -> Callable[..., list[Tensor]]:
    """Wrap a stage so that its C++ kernel runs where it is available."""

    def run(x: Tensor, *others: Any) -> list[Tensor]:
        *_, lmax, mmax = (o for o in others if type(o) is int)  # `keep`, which may follow, is a bool
        if not available.cpp(x.shape[-1] // EdgeLayout(lmax, mmax).total, x):
            return stage(x, *others)
        out = new(x, *others)
        getattr(cpp, stage.__name__[1:])(out, x, *others)
        return out

    return run


_WEIGHTS = "Tensor[] matrices, Tensor[] gates, Tensor[] parts, int lmax, int mmax"
for _schema, _stage, _new in (
    ("so2_value(Tensor x, {weights}, bool keep)", _value, _new_value),
    ("so2_vjp(Tensor a, Tensor[] us, {weights}, bool keep)", _vjp, _new_vjp),
    ("so2_tangent(Tensor d, Tensor[] us, {weights})", _tangent, _new_tangent),
    ("so2_joint(Tensor b, Tensor[] xs, Tensor[] us, Tensor[] grads, Tensor[] ds, Tensor[] vs, {weights})",
     _joint, _new_joint),
):  # fmt: skip
    register(
        f"{_schema.format(weights=_WEIGHTS)} -> Tensor[]",
        _new,
        {
            "CPU": torch.autocast("cpu", enabled=False)(_on_cpu(_stage, _new)),
            "CUDA": torch.autocast("cuda", enabled=False)(_stage),
        },
    )
