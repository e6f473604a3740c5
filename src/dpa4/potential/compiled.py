"""Compilation of a potential, and the check that it changed nothing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpa4.graph import Graph, first_atoms
from dpa4.kernels.incidence import Incidence
from dpa4.kernels.region import Region, RegionCode
from dpa4.model.edges import Edges, Neighborhood
from dpa4.model.radial import RadialFeatures
from dpa4.potential.kernel_report import triton_version
from dpa4.potential.potential import Potential
from dpa4.potential.replay import MAX_ATOMS

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Largest deviation of compiled results, relative to the largest entry: rounding, amplified by sums that cancel."""

BF16_TOLERANCE = 0.1
"""The same with bfloat16 products, whose rounding (0.4 %) depends on how operations are fused."""


def tolerance(potential: Potential) -> float:
    """Largest relative deviation of a compiled potential from its eager form that rounding explains."""
    return BF16_TOLERANCE if potential.model.block_autocast else TOLERANCES[potential.dtype]


COMPARED = 512
"""Atoms that are compared with eager mode, which may not have the memory for all."""


class Kept(NamedTuple):
    """Atoms up to which energies and forces keep results of the forward pass for the derivatives."""

    last: int  # outside of the blocks, and in the last one: its derivative comes first, so they are not in the way
    everywhere: int


KINDS = Kept(MAX_ATOMS, 2048), Kept(MAX_ATOMS, 0), Kept(0, 0)
"""Kinds of code, from small systems to large ones. Keeping results everywhere takes 3 MiB per atom of paper-air and
saves a sixth of the time."""


def kind_of(atoms: int) -> int:
    """Which of `KINDS` so many atoms take."""
    small = KINDS[0]
    return (atoms > small.everywhere) + (atoms > small.last)


def compile_potential(
    potential: Potential,
    report: Callable[[str, float], None] = lambda name, seconds: None,
    kept: Kept = KINDS[0],
) -> None:
    """Replace the parts of the network by compiled ones, in place; code is made when first needed.

    Call it when the potential is on its device and in its precision. Blocks of equal degree share their code. The
    last derivative, which training takes, is with respect to the parameters alone: there is no Hessian.

    Args:
        potential: The potential.
        report: Called with the name of a part and the seconds it took to compile.
        kept: Which results are kept for the derivatives, outside of training.
    """
    restore_eager(potential)
    model = potential.model
    origin = repr([potential.config.model_dump_json(), triton_version()])
    code_of = partial(RegionCode, report=report, origin=origin)
    # No parameter influences the geometry: that it is data spares the last stage a derivative by it.
    rows = ("edge data",) * (model.geometry.wigner.mmax + 1)
    edges: Any = Edges("edge data", "edge data", "edge data", "edge data", rows)  # type: ignore[arg-type]
    source: Any = Incidence("edge", "edge", "node+1")  # type: ignore[arg-type]
    center: Any = Incidence("edge", None, "center+1")  # type: ignore[arg-type]
    radial: Any = RadialFeatures("edge", "edge", "static")  # type: ignore[arg-type]
    hood: Any = Neighborhood(edges, source, center, "center data")  # type: ignore[arg-type]
    whole = {
        "locate": ("geometry", ["geometry"], ("edge data", source, center, "node data")),
        "embed": (
            "embedding",
            ["basis", "radial", "types", "charge_spin", "seed"],
            ("node", "node", "center", "center", hood),
        ),
        "read_out": ("read-out", ["readout"], ("node",)),
    }
    for method, (name, parts, arguments) in whole.items():
        model.__dict__[method] = Region(model, method, parts, code_of(name, arguments))
    codes: dict[int, list[RegionCode]] = {}
    update = [
        f"{name}" for name in ("conv_norm_out", "ffns", "ffn_norms_in", "ffn_norms_out", "ffn_scales", "conv")
    ]
    for block, degree in zip(model.blocks, model.config.degrees, strict=True):
        if degree not in codes:
            update_of = ("node", "node", "node", "node data")
            codes[degree] = [
                code_of(f"node states of degree {degree}", ("node",)),
                code_of(f"messages of degree {degree}", ("node", "center", "node", radial, hood)),
                code_of(f"node update of degree {degree}", update_of),
                code_of(f"update in parts of degree {degree}", update_of),
            ]
        states, messages, updates, updates_in_parts = codes[degree]
        own = ["conv.product", "conv.pre_mix", "conv.attention", "conv_norm_in"]
        on_edges = ["product", "stack", "focus", "attention", "radial_hidden", "frame", "scalar_degree"]
        block.states = Region(block, "states", own, states)  # type: ignore
        block.messages = Region(block, "messages", [f"conv.{n}" for n in on_edges], messages)  # type: ignore
        block.update = Region(block, "update", update, updates)  # type: ignore
        block.update_some = Region(block, "update_some", update, updates_in_parts, keeps=False)  # type: ignore
    keep_results(potential, kept)


def regions(potential: Potential) -> list[Region]:
    """The compiled parts."""
    return [region for _, _, region in _places(potential)]


def _methods(potential: Potential) -> list[tuple[nn.Module, str]]:
    """Modules, and the methods of theirs that are compiled."""
    whole = [(potential.model, name) for name in ("locate", "embed", "read_out")]
    of_block = ("states", "messages", "update", "update_some")
    return [*whole, *((block, name) for block in potential.model.blocks for name in of_block)]


def _places(potential: Potential) -> list[tuple[nn.Module, str, Region]]:
    """The same where they are compiled, and what stands in their place."""
    found = [(module, method, vars(module).get(method)) for module, method in _methods(potential)]
    return [(module, method, part) for module, method, part in found if isinstance(part, Region)]


def keep_results(potential: Potential, kept: Kept) -> None:
    """Change which results the compiled parts keep for the derivatives; code that exists stays."""
    for module, method, region in _places(potential):
        early = method in ("messages", "update") and module is not potential.model.blocks[-1]
        region.max_kept = kept.everywhere if early else kept.last


def restore_eager(potential: Potential) -> None:
    """Undo `compile_potential`."""
    for module, method in _methods(potential):
        module.__dict__.pop(method, None)


def compare_with_eager(potential: Potential, graph: Graph) -> dict[str, float]:
    """Deviation of a compiled potential from its eager form on a graph, and on the same without its last atom.

    Code that was made for the sizes of one graph and serves no others is thereby found.

    Returns:
        Largest deviations relative to the largest eager entry: of the energy, the forces, and, in training mode, of
        the parameter gradients of the mean square force, in which second derivatives would be wrong first.
    """
    smaller = first_atoms(graph, graph.num_atoms - 1)
    graphs = [graph, smaller] if smaller.num_edges > 1 else [graph]
    compiled = [probe(potential, g) for g in graphs]
    with in_eager_mode(potential):
        eager = [probe(potential, g) for g in graphs]
    pairs = list(zip(compiled, eager, strict=True))
    return {name: _worst([_deviation(c[name], e[name]) for c, e in pairs]) for name in eager[0]}


@contextmanager
def in_eager_mode(potential: Potential) -> Iterator[None]:
    """Within the block nothing of the potential is compiled."""
    places = _places(potential)
    restore_eager(potential)
    try:
        yield
    finally:
        for module, method, region in places:
            module.__dict__[method] = region


def probe(potential: Potential, graph: Graph) -> dict[str, list[Tensor]]:
    """What is compared: energy, forces, and in training mode the parameter gradients of the mean square force."""
    prediction = potential(graph)
    found = {"energy": [prediction.energy.detach()], "forces": [prediction.forces.detach()]}
    if potential.training and graph.num_edges:
        parameters = list(potential.parameters())
        loss = prediction.forces.square().mean()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        zipped = zip(gradients, parameters, strict=True)
        found["parameter gradients"] = [torch.zeros_like(p) if g is None else g for g, p in zipped]
    return found


def _deviation(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest expected entry; not a number if an entry is not."""
    scale = _largest(expected)
    worst = _largest([a - b for a, b in zip(actual, expected, strict=True)])
    return worst / scale if scale and math.isfinite(scale) else worst


def _worst(deviations: list[float]) -> float:
    return float(torch.tensor(deviations, dtype=torch.float64).max())  # keeps what is not a number


def _largest(tensors: list[Tensor]) -> float:
    sizes = [t.abs().max() for t in tensors if t.numel()]
    return (
        float(torch.stack(sizes).max()) if sizes else 0.0
    )  # unlike Python's max, keeps what is not a number
