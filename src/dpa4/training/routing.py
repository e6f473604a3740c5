"""Optimiser route of each parameter, decided by the type of the module that owns it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dpa4.model.attention import EnvelopeGatedAttention, FocusCompetition
from dpa4.model.block import Block
from dpa4.model.grid import MessageNodeProduct
from dpa4.model.layers import ChannelLinear, DegreeLinear, EquivariantRMSNorm, FocusLinear, Linear, RMSNorm
from dpa4.model.radial import BesselBasis, GaussianBasis, RadialNetwork
from dpa4.model.seed import Embedding, EnvironmentSeed
from dpa4.model.so2 import DegreeProduct, SO2Linear, SO2Stack
from dpa4.training.muon import Route
from dpa4.training.packing import block_shape

# deepmd-kit decides by parameter names; this table yields the same routes (docs/theory.md, "HybridMuon"). Scales,
# biases and embedding rows are not matrices in any useful sense and must not decay. The small attention weights
# do decay.
ROUTES: dict[type[nn.Module], dict[str, Route]] = {
    Linear: {"weight": "muon", "bias": "adam"},
    ChannelLinear: {"weight": "muon"},
    FocusLinear: {"weight": "muon", "bias": "adam"},
    DegreeLinear: {"weight": "muon", "bias": "adam"},
    SO2Linear: {"weight_m0": "muon", "weight_m": "muon", "bias": "adam"},
    SO2Stack: {"scales": "adam"},
    DegreeProduct: {"weight": "muon", "channel_basis": "muon"},
    MessageNodeProduct: {"residual_scale": "muon"},
    EnvelopeGatedAttention: {"radial_logit": "adamw", "gate_logit": "adamw", "null_logit": "adam"},
    FocusCompetition: {"weight": "adamw", "bias": "adam"},
    Block: {"ffn_scales": "adam"},
    RMSNorm: {"scale": "adam"},
    EquivariantRMSNorm: {"scale": "adam", "bias": "adam"},
    Embedding: {"table": "adam"},
    EnvironmentSeed: {"scale_strength": "adam", "shift_strength": "adam"},
    BesselBasis: {"frequencies": "adam"},
    GaussianBasis: {"frequencies": "adam"},
}


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Module that owns a parameter, and the name there of the parameter or of the list that holds it."""
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, nn.ParameterList):
        path, _, own = path.rpartition(".")
        owner = model.get_submodule(path)
    return owner, own


def basis_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices that multiply the radial basis: of the radial network and of the environment seed."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, RadialNetwork):
            names.add(f"{path}.hidden.0.weight" if len(module.hidden) else f"{path}.last.weight")
        elif isinstance(module, EnvironmentSeed):
            names.add(f"{path}.basis_in.weight")
    return names


def parameter_routes(model: nn.Module, *, adam_for_basis: bool = False) -> dict[str, Route]:
    """Optimiser route of every parameter, by the name of the parameter.

    A weight with the route muon that is not a matrix (fewer than two axes longer than one) is moved to adam.

    Args:
        model: The network.
        adam_for_basis: Whether the matrices of `basis_matrices` have the route adamw instead of muon.

    Raises:
        ValueError: If ``ROUTES`` has no entry for a parameter and the type of its module.
    """
    routes: dict[str, Route] = {}
    moved = basis_matrices(model) if adam_for_basis else set()
    for name, parameter in model.named_parameters():
        owner, own = owner_of(model, name)
        route = ROUTES.get(type(owner), {}).get(own)
        if route is None:
            raise ValueError(
                f"parameter {name} of a {type(owner).__name__} has no optimiser route; "
                "add it to dpa4.training.routing.ROUTES"
            )
        if route == "muon" and block_shape(parameter.shape) is None:
            route = "adam"
        routes[name] = "adamw" if name in moved else route
    return routes


def parameter_groups(
    model: nn.Module,
    *,
    adam_for_basis: bool = False,
    factors: Mapping[str, Sequence[nn.Parameter]] | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for ``HybridMuon``, with each trainable parameter once, in the order of the model.

    Args:
        model: The network.
        adam_for_basis: As in `parameter_routes`.
        factors: Parameters that are trained in place of a parameter of the network, by its name. They have its route,
            except that vectors have the route adam.
        rates: Factor of the learning rate of each parameter of the network, by name; 1 without.

    Raises:
        ValueError: As ``parameter_routes``.
    """
    parameters, factors = dict(model.named_parameters()), factors or {}
    groups: dict[Route, list[nn.Parameter]] = {"muon": [], "adam": [], "adamw": []}
    found: dict[Route, list[float]] = {"muon": [], "adam": [], "adamw": []}
    for name, route in parameter_routes(model, adam_for_basis=adam_for_basis).items():
        for p in factors.get(name, [parameters[name]]):
            if p.requires_grad:
                own: Route = "adam" if route == "muon" and block_shape(p.shape) is None else route
                groups[own].append(p)
                found[own].append(1.0 if rates is None else rates[name])
    trained = [p for name, p in parameters.items() if p.requires_grad and name not in factors]
    trained += [p for pair in factors.values() for p in pair]
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(map(id, trained)), "not a partition"
    with_rates = {} if rates is None else {route: {"rates": found[route]} for route in groups}
    return [
        {"params": group, "route": route} | with_rates.get(route, {})
        for route, group in groups.items()
        if group
    ]
