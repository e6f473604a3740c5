"""ZBL bridging in the options of deepmd-kit.

A bridged model has two forms in the options. The concise one is a model of type "dpa4" with the keys
``bridging_method``, ``bridging_r_inner`` and ``bridging_r_outer``. The composed one, to which deepmd-kit expands it,
is a sum (type "linear_ener") of a DPA4 model and the analytic repulsion (type "inner_potential"). Both have the same
energy and the same tensors.
"""

from collections.abc import Mapping
from typing import Any

from dpa4.model.config import Bridging
from dpa4.parsing import shown
from dpa4.potential.deepmd.option_types import NUMBER, TEXT, check_kinds, is_list, unsupported

MODEL_TYPES = ("dpa4", "sezm")

# Radii of the bridging in the options of the model and, with the same meaning, of its descriptor.
_RADII = ("bridging_r_inner", "bridging_r_outer")
_CLAMP = ("inner_clamp_r_inner", "inner_clamp_r_outer")
# Options of the bridging of format 1.3, which has other formulas.
_MODEL_1_3 = ("bridging_fraction_inner", "bridging_fraction_outer")
_DESCRIPTOR_1_3 = ("inner_clamp_f_inner", "inner_clamp_f_outer", "inner_clamp_scale")

BRIDGING_OF_MODEL = frozenset(("bridging_method", *_RADII, *_MODEL_1_3))
BRIDGING_OF_DESCRIPTOR = frozenset((*_CLAMP, *_DESCRIPTOR_1_3))
_SUM = "linear_ener"
_REPULSION = "inner_potential"
_OPTIONS_OF_REPULSION = ("type", "type_map", "mode", "r_inner", "r_outer")


def concise_form(model_params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Translate a composed model to its concise form; other models are returned as they are.

    Raises:
        ValueError: If a sum consists of other parts than a DPA4 model and the ZBL repulsion, or weights them.
    """
    if model_params.get("type") != _SUM:
        return model_params
    network, repulsion = _parts(model_params)
    common = {
        key: value
        for key, value in model_params.items()
        if key not in ("type", "models", "weights") and value is not None
    }
    _check_common(common, network, repulsion)
    check_kinds(repulsion, _REPULSION, {"mode": TEXT})
    if (mode := repulsion.get("mode", "ZBL")).lower() != "zbl":
        raise unsupported(f"{_REPULSION}.mode", mode, "'ZBL'")
    if unknown := [key for key in repulsion if key not in _OPTIONS_OF_REPULSION]:
        raise ValueError(
            f"{_REPULSION}.{unknown[0]} is not an option of the ZBL repulsion of deepmd-kit 3.2.0"
        )
    radii = {f"bridging_{key}": repulsion[key] for key in ("r_inner", "r_outer") if key in repulsion}
    return {**network, **common, "type": "dpa4", "bridging_method": "ZBL", **radii}


def _parts(model_params: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """DPA4 model and repulsion of a sum, in this order.

    Raises:
        ValueError: If the sum has other parts, or other weights than one.
    """
    models = model_params.get("models")
    models = models if is_list(models) else [models]
    parts = [part for part in models if isinstance(part, Mapping)]
    networks = [part for part in parts if _is_dpa4(part)]
    repulsions = [part for part in parts if part.get("type") == _REPULSION]
    if not len(networks) == len(repulsions) == 1 or len(models) != 2:
        found = [part.get("type", "standard") for part in parts] or model_params.get("models")
        raise ValueError(
            f"it is a linear_ener model of the types {shown(found)}; supported: the sum of a DPA4 model and an "
            "inner_potential (ZBL)"
        )
    if (weights := model_params.get("weights", "mean")) != "sum":
        raise unsupported("linear_ener.weights", weights, "'sum'")
    return networks[0], repulsions[0]


def _is_dpa4(part: Mapping[str, Any]) -> bool:
    kind, descriptor = str(part.get("type", "standard")).lower(), part.get("descriptor")
    if kind != "standard":
        return kind in MODEL_TYPES
    return isinstance(descriptor, Mapping) and str(descriptor.get("type")).lower() in MODEL_TYPES


def _check_common(
    common: Mapping[str, Any], network: Mapping[str, Any], repulsion: Mapping[str, Any]
) -> None:
    """Compare the parts of a sum with the options of the sum.

    Raises:
        ValueError: If a part has other elements or excluded atoms than the sum, or the network its own bridging.
    """
    for option in ("descriptor", "fitting_net"):
        if option in common:
            raise ValueError(f"its linear_ener model has a {option}, which belongs to one of its models")
    for name, part in (("network", network), ("repulsion", repulsion)):
        if part.get("type_map", common.get("type_map")) != common.get("type_map"):
            raise ValueError(
                f"the {name} of its linear_ener model has the type_map {shown(part['type_map'])}; supported: that of "
                "the sum"
            )
    for option in ("atom_exclude_types", "pair_exclude_types"):
        if network.get(option) not in (None, [], common.get(option)):
            raise unsupported(f"linear_ener.models.{option}", network[option], "the value of the sum")
    if str(method := network.get("bridging_method", "none")).lower() != "none":
        raise unsupported("linear_ener.models.bridging_method", method, "'none' beside an inner_potential")


def bridging_of(model_params: Mapping[str, Any]) -> Bridging | None:
    """Bridging of a model in the concise form.

    Raises:
        ValueError: If the method is not ZBL, an option belongs to format 1.3, or radii disagree.
    """
    check_kinds(model_params, "model", {"bridging_method": TEXT} | dict.fromkeys(_RADII, NUMBER))
    descriptor = model_params["descriptor"]
    method = model_params.get("bridging_method", "none")
    clamp = [descriptor.get(option) for option in _CLAMP]
    if method.lower() == "none":
        if None not in clamp:
            raise unsupported(f"descriptor.{_CLAMP[0]}", clamp[0], "null in a model without bridging")
        return None
    if method.lower() != "zbl":
        raise unsupported("model.bridging_method", method, "'none' and 'ZBL'")
    radii = [model_params.get(option, default) for option, default in zip(_RADII, (0.5, 0.8), strict=True)]
    if None not in clamp and clamp != radii:
        raise unsupported(
            f"descriptor.{_CLAMP[0]} and {_CLAMP[1]}", clamp, f"the radii of the model, {radii}"
        )
    for name, section, options in (
        ("model", model_params, _MODEL_1_3),
        ("descriptor", descriptor, _DESCRIPTOR_1_3),
    ):
        for option in options:
            if section.get(option) is not None:
                raise unsupported(
                    f"{name}.{option}", section[option], "null; the bridging of format 1.3 cannot be read"
                )
    return Bridging(r_inner=radii[0], r_outer=radii[1], smooth_cutoff=False)
