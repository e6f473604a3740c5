"""Compilation of a potential: methods of its network are replaced by compiled regions.

A region is stored in the module's ``__dict__`` under the name of the method, where it takes precedence over the
method of the class. Removing it restores the method.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from dpa4.execution.limits import KEEP_POLICIES, KeepPolicy
from dpa4.model.config import PairBridging
from dpa4.model.edges import Edges, Neighborhood
from dpa4.model.radial import RadialFeatures
from dpa4.model.short_range import PairRange
from dpa4.ops.available import triton_version
from dpa4.ops.incidence import Incidence
from dpa4.potential.potential import Potential
from dpa4.tracing.region import Region, RegionCode

_METHODS_OF_MODEL = {
    "locate": ["geometry"],
    "input_features": ["basis", "radial", "types", "charge_spin", "seed"],
    "read_out": ["readout"],
}
"""Methods of the network that are compiled, and the submodules whose parameters and buffers each uses."""

_UPDATE = ["conv_norm_out", "ffns", "ffn_norms_in", "ffn_norms_out", "ffn_scales", "conv"]
_ON_EDGES = ["product", "stack", "focus", "attention", "radial_hidden", "frame", "scalar_degree"]
_METHODS_OF_BLOCK = {
    "states": ["conv.product", "conv.pre_mix", "conv.attention", "conv_norm_in"],
    "messages": [f"conv.{name}" for name in _ON_EDGES],
    "update": _UPDATE,
    "update_part": _UPDATE,
}
"""Methods of a block that are compiled, and the submodules whose parameters and buffers each uses."""


def compile_potential(
    potential: Potential,
    report: Callable[[str, float], None] = lambda name, seconds: None,
    kept: KeepPolicy = KEEP_POLICIES[0],
) -> None:
    """Replace methods of the network by compiled regions, in place; code is compiled at first use.

    The potential must be on its device and in its precision. Blocks of equal degree share their code. The second
    derivative, in training, is with respect to the parameters alone: second derivatives with respect to positions are
    not supported.

    Args:
        potential: The potential.
        report: Called with the name of a region and the seconds after each compilation.
        kept: Sizes for which intermediate results are kept for the derivatives, outside of training.
    """
    restore_eager(potential)
    model, config = potential.model, potential.config
    if isinstance(
        config.bridging, PairBridging
    ):  # windows are arguments of the code, the rest is outside of it
        config = config.model_copy(update={"bridging": None})
    origin = repr([config.model_dump_json(), triton_version()])
    code_of = partial(RegionCode, report=report, origin=origin)
    # The geometry does not depend on parameters. Declared as data, it needs no derivative in stage 3.
    rows = ("edge data",) * (model.geometry.wigner.mmax + 1)
    edges: Any = Edges("edge data", "edge data", "edge data", "edge data", rows)  # type: ignore[arg-type]
    source: Any = Incidence("edge", "edge", "node+1")  # type: ignore[arg-type]
    center: Any = Incidence("edge", None, "center+1")  # type: ignore[arg-type]
    radial: Any = RadialFeatures("edge", "edge", "static")  # type: ignore[arg-type]
    neighborhood: Any = Neighborhood(edges, source, center, "center data")  # type: ignore[arg-type]
    codes_of_model = {
        "locate": code_of("geometry", ("edge data", source, center, "node data")),
        "input_features": code_of("input features", ("node", "node", "center", "center", neighborhood)),
        "read_out": code_of("read-out", ("node",)),
    }
    for method, code in codes_of_model.items():
        model.__dict__[method] = Region(model, method, _METHODS_OF_MODEL[method], code)
    if isinstance(potential.short_range, PairRange):
        code = code_of("short range", ("edge data", source, center, "node data"))
        region = Region(potential.short_range, "forward", ["row", "windows"], code)
        potential.short_range.__dict__["forward"] = region
    codes: dict[int, dict[str, RegionCode]] = {}  # by degree
    for block, degree in zip(model.blocks, model.config.degrees, strict=True):
        if degree not in codes:
            update = ("node", "node", "node", "node data")
            codes[degree] = {
                "states": code_of(f"node states of degree {degree}", ("node",)),
                "messages": code_of(
                    f"messages of degree {degree}", ("node", "center", "node", radial, neighborhood)
                ),
                "update": code_of(f"node update of degree {degree}", update),
                "update_part": code_of(f"update in parts of degree {degree}", update),
            }
        for method, code in codes[degree].items():
            keeps = method != "update_part"
            block.__dict__[method] = Region(block, method, _METHODS_OF_BLOCK[method], code, keeps=keeps)
    keep_results(potential, kept)


def regions(potential: Potential) -> list[Region]:
    """Compiled regions of a potential; empty in eager mode."""
    return [region for _, _, region in _places(potential)]


def _methods(potential: Potential) -> list[tuple[nn.Module, str]]:
    """All methods that can be compiled, each with its module."""
    of_model = [(potential.model, name) for name in _METHODS_OF_MODEL]
    of_blocks = [(block, name) for block in potential.model.blocks for name in _METHODS_OF_BLOCK]
    return [(potential.short_range, "forward"), *of_model, *of_blocks]


def _places(potential: Potential) -> list[tuple[nn.Module, str, Region]]:
    """All methods that are compiled, each with its module and the region that replaces it."""
    found = [(module, method, vars(module).get(method)) for module, method in _methods(potential)]
    return [(module, method, part) for module, method, part in found if isinstance(part, Region)]


def keep_results(potential: Potential, kept: KeepPolicy) -> None:
    """Change the sizes for which regions keep intermediate results; compiled code is not discarded."""
    for module, method, region in _places(potential):
        early = method in ("messages", "update") and module is not potential.model.blocks[-1]
        region.max_kept = kept.everywhere if early else kept.last


def restore_eager(potential: Potential) -> None:
    """Undo `compile_potential`."""
    for module, method in _methods(potential):
        module.__dict__.pop(method, None)


@contextmanager
def in_eager_mode(potential: Potential) -> Iterator[None]:
    """Run the block with the potential in eager mode; the regions are restored afterwards."""
    places = _places(potential)
    restore_eager(potential)
    try:
        yield
    finally:
        for module, method, region in places:
            module.__dict__[method] = region
