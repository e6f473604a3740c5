"""Translation between the ``model_params`` of a deepmd-kit checkpoint and ``ModelConfig``.

Every option of deepmd-kit 3.2.0 and of the presets of version 20260911 is translated, ignored because it does not
influence the results of a trained model, or refused by name (docs/models.md, "What is not supported"). Absent options
have deepmd-kit's defaults.
"""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from pydantic import ValidationError

from dpa4.model.config import GridOperation, ModelConfig, PairBridging
from dpa4.parsing import problem, shown
from dpa4.potential.deepmd.bridging import (
    BRIDGING_OF_DESCRIPTOR,
    BRIDGING_OF_MODEL,
    MODEL_TYPES,
    bridging_of,
    concise_form,
)
from dpa4.potential.deepmd.option_types import (
    EDGE_NORM,
    ENERGIES,
    EXPONENTS,
    FLAG,
    NUMBER,
    OUTPUT_BIAS,
    SANDWICH_NORM,
    TEXT,
    WHOLE,
    WHOLES,
    Kind,
    check_kinds,
    is_list,
    is_number,
    is_one_of,
    pair,
    type_pairs,
    unsupported,
    whole,
    whole_numbers,
)
from dpa4.potential.deepmd.vacuum import has_vacuum_reference

FITTING_TYPES = ("dpa4_ener", "sezm_ener")

# Our field -> option of the descriptor with the same meaning and the same default.
_DESCRIPTOR_SAME = {
    "cutoff": "rcut",
    "channels": "channels",
    "n_radial": "n_radial",
    "basis": "basis_type",
    "radial_mlp": "radial_mlp",
    "env_exp": "env_exp",
    "edge_norm": "edge_norm",
    "use_env_seed": "use_env_seed",
    "kmax": "kmax",
    "n_focus": "n_focus",
    "focus_dim": "focus_dim",
    "n_atten_head": "n_atten_head",
    "radial_so2_mode": "radial_so2_mode",
    "message_node_so3": "message_node_so3",
    "layer_scale": "layer_scale",
    "ffn_blocks": "ffn_blocks",
    "ffn_neurons": "ffn_neurons",
    "sandwich_norm": "sandwich_norm",
    "mlp_bias": "mlp_bias",
    "so3_readout": "so3_readout",
    "readout_layers": "readout_layers",
}
# Types of these options; `ModelConfig` checks their values.
_DESCRIPTOR_KINDS = (
    {"rcut": NUMBER, "basis_type": TEXT, "radial_so2_mode": TEXT, "so3_readout": TEXT, "radial_mlp": WHOLES}
    | dict.fromkeys(("channels", "n_radial", "kmax", "n_focus", "focus_dim", "n_atten_head"), WHOLE)
    | dict.fromkeys(("ffn_blocks", "ffn_neurons", "readout_layers", "mixing_layers", "so2_layers"), WHOLE)
    | dict.fromkeys(("use_env_seed", "message_node_so3", "ffn_so3_grid", "layer_scale", "mlp_bias"), FLAG)
    | {"add_chg_spin_ebd": FLAG, "edge_norm": EDGE_NORM, "env_exp": EXPONENTS, "sandwich_norm": SANDWICH_NORM}
)
# Options translated one by one in _descriptor_fields.
_DESCRIPTOR_TRANSLATED = frozenset(
    "type lmax n_blocks l_schedule mmax m_schedule mixing_layers so2_layers radial_so2_rank "
    "grid_mlp grid_branch s2_activation ffn_so3_grid lebedev_quadrature precision add_chg_spin_ebd "
    "default_chg_spin exclude_types".split()
)
# Options without a counterpart here, with the accepted values. Export writes the first one.
_DESCRIPTOR_FIXED: dict[str, tuple[Any, ...]] = {
    "edge_cartesian": (False,),
    "node_cartesian": ("none", "", 0),
    "extra_node_l": (0,),
    "so2_norm": (False,),
    "so2_attn_res": ("none",),
    "full_attn_res": ("none",),
    "block_attn_res": ("none",),
    "atten_f_mix": (False,),
    "atten_v_proj": (False,),
    "atten_o_proj": (False,),
    "node_wise_s2": (False,),
    "node_wise_so3": (False,),
    "message_node_s2": (False,),
    "activation_function": ("silu",),
    "glu_activation": (True,),
    "eps": (1e-7,),
    "use_spin": (None,),
}
# Options without influence on a trained model: capacity of the neighbour search, training and compiler settings.
_DESCRIPTOR_IRRELEVANT = {"sel": 256, "random_gamma": True, "use_amp": True, "trainable": True, "seed": None}
# Entries that deepmd-kit adds when it builds a model; ignored as well.
_DESCRIPTOR_ADDED = frozenset(("ntypes", "type_map"))

_FITTING_TRANSLATED = frozenset(
    ("type", "neuron", "precision", "atom_ener", "dim_case_embd", "case_film_embd", "vacuum_ref")
)
_FITTING_KINDS = {
    "neuron": WHOLES,
    "atom_ener": ENERGIES,
    "dim_case_embd": WHOLE,
    "case_film_embd": FLAG,
    "vacuum_ref": FLAG,
}
_FITTING_FIXED: dict[str, tuple[Any, ...]] = {
    "numb_fparam": (0,),
    "numb_aparam": (0,),
    "activation_function": ("silu",),
    "bias_out": (False,),
}
_FITTING_IRRELEVANT = {
    "default_fparam": None,
    "resnet_dt": False,
    "trainable": True,
    "rcond": None,
    "use_aparam_as_mask": False,
    "seed": None,
}

_MODEL_TRANSLATED = frozenset(("type", "type_map", "descriptor", "fitting_net", "pair_exclude_types"))
_MODEL_KINDS = {"preset_out_bias": OUTPUT_BIAS}
_MODEL_FIXED: dict[str, tuple[Any, ...]] = {
    "atom_exclude_types": ([],),
    "use_srtab": (None, False),
    "spin": (None,),
    "modifier": (None,),
    "type_embedding": (None,),
}
_MODEL_IRRELEVANT: dict[str, Any] = {
    "use_compile": False,
    "enable_tf32": True,
    "data_stat_nbatch": 10,
    "data_stat_protect": 0.01,
    "data_bias_nsample": 10,
    "preset_out_bias": None,
    "srtab_add_bias": True,
    "model_branch_alias": [],
    "lora": None,  # the deltas are folded into the weights
}
_MODEL_ADDED = frozenset(("info", "smin_alpha", "sw_rmin", "sw_rmax", "finetune_head", "resuming"))

_PRECISIONS = {"float32": 32, "single": 32, "float64": 64, "double": 64, "default": 64}


def config_from_deepmd(model_params: Mapping[str, Any], version: float = 1.2) -> ModelConfig:
    """Translate the ``model_params`` of one branch of a checkpoint.

    Args:
        model_params: Model section of a single-task input of deepmd-kit, with bridging in either form.
        version: Format version of the descriptor.

    Raises:
        ValueError: If the model is not a DPA4 energy model or uses an unsupported option; the message names the
            option and its value.
    """
    model_params = concise_form(model_params)
    _require_dpa4(model_params)
    descriptor, fitting = model_params["descriptor"], model_params["fitting_net"]
    check_kinds(model_params, "model", _MODEL_KINDS)
    check_kinds(descriptor, "descriptor", _DESCRIPTOR_KINDS)
    check_kinds(fitting, "fitting_net", _FITTING_KINDS)
    _check_options(
        model_params,
        "model",
        _MODEL_TRANSLATED | BRIDGING_OF_MODEL,
        _MODEL_FIXED,
        _MODEL_IRRELEVANT,
        _MODEL_ADDED,
    )
    _check_options(
        descriptor,
        "descriptor",
        _DESCRIPTOR_TRANSLATED | set(_DESCRIPTOR_SAME.values()) | BRIDGING_OF_DESCRIPTOR,
        _DESCRIPTOR_FIXED,
        _DESCRIPTOR_IRRELEVANT,
        _DESCRIPTOR_ADDED,
    )
    _check_options(fitting, "fitting_net", _FITTING_TRANSLATED, _FITTING_FIXED, _FITTING_IRRELEVANT)
    has_vacuum_reference(model_params)
    precision_of(model_params)

    elements = tuple(model_params["type_map"])
    excluded = _excluded_pairs(model_params, len(elements))
    try:
        return ModelConfig(
            elements=elements,
            fitting=fitting.get("neuron", [0]),
            excluded_pairs=tuple((elements[a], elements[b]) for a, b in excluded),
            bridging=bridging_of(model_params),
            pre_release=version < 1.1,
            **_descriptor_fields(descriptor),
        )
    except ValidationError as error:
        raise ValueError(f"its options are not a supported model: {first_problem(error)}") from error


def irrelevant_options(model_params: Mapping[str, Any]) -> dict[str, Any]:
    """Entries without influence on the results of a trained model, by their path, such as "descriptor.seed"."""
    sections = {
        "": (model_params, {**_MODEL_IRRELEVANT, **dict.fromkeys(_MODEL_ADDED)}),
        "descriptor.": (
            model_params.get("descriptor", {}),
            {**_DESCRIPTOR_IRRELEVANT, **dict.fromkeys(_DESCRIPTOR_ADDED)},
        ),
        "fitting_net.": (model_params.get("fitting_net", {}), _FITTING_IRRELEVANT),
    }
    return {
        prefix + option: value
        for prefix, (section, irrelevant) in sections.items()
        for option, value in section.items()
        if option in irrelevant
    }


def first_problem(error: ValidationError) -> str:
    """Describe the first problem of a configuration in one line: field, reason and value."""
    errors = error.errors()
    first, field = errors[0], errors[0]["loc"][:1]
    prefix = f"{field[0]}: " if field else ""
    if first["type"] == "value_error":  # a check of our own, whose message contains the value
        return prefix + problem(first)
    reasons = dict.fromkeys(problem(e) for e in errors if e["loc"][:1] == field)  # of all members of a union
    return f"{prefix}{' or '.join(list(reasons)[:3])} (value {shown(first['input'])})"


def precision_of(model_params: Mapping[str, Any]) -> int:
    """Bits of the network's floating-point numbers, 32 or 64; the larger of descriptor and fitting network.

    Raises:
        ValueError: If the precision of one of them is neither.
    """
    bits = []
    for section in ("descriptor", "fitting_net"):
        precision = str(model_params[section].get("precision", "float32")).lower()
        if precision not in _PRECISIONS:
            raise unsupported(f"{section}.precision", precision, "float32 and float64")
        bits.append(_PRECISIONS[precision])
    return max(bits)


def config_to_deepmd(config: ModelConfig, precision: str) -> dict[str, Any]:
    """``model_params`` from which deepmd-kit builds the same model.

    Args:
        config: The model.
        precision: "float32" or "float64".

    Raises:
        ValueError: If deepmd-kit has no model with the same results.
    """
    _require_released(config)
    return model_section(config, precision)


def model_section(config: ModelConfig, precision: str) -> dict[str, Any]:
    """``model_params`` as in `config_to_deepmd`, also of models that only unreleased versions of deepmd-kit read."""
    bridging = config.bridging
    if isinstance(bridging, PairBridging):
        raise ValueError(
            "deepmd-kit has no bridging with a window per pair of elements; dpa4 convert --drop-bridging exports the "
            "network alone, which is the same potential at all distances above the windows, but not safe below"
        )
    if bridging is not None and bridging.smooth_cutoff:
        raise ValueError(
            "bridging.smooth_cutoff = True has no counterpart in deepmd-kit, where the ZBL energy ends abruptly "
            "at the cutoff; only models without bridging or with bridging.smooth_cutoff = False can "
            "be exported"
        )
    schedule = config.l_schedule
    branch, mlp = _grid_options(config.message_grid, config.ffn_grid)
    index = {element: i for i, element in enumerate(config.elements)}
    excluded = [[index[a], index[b]] for a, b in config.excluded_pairs]
    values = config.model_dump()
    descriptor = (
        {theirs: _plain(values[ours]) for ours, theirs in _DESCRIPTOR_SAME.items()}
        | {option: accepted[0] for option, accepted in _DESCRIPTOR_FIXED.items()}
        | _DESCRIPTOR_IRRELEVANT
        | {
            "type": "dpa4",
            "lmax": config.degrees[0],
            "n_blocks": len(config.degrees),
            "l_schedule": None if schedule is None else list(schedule),
            "mmax": min(config.mmax, config.degrees[0]),
            "m_schedule": None,
            "mixing_layers": config.mixing_layers,
            "radial_so2_rank": config.radial_so2_rank,
            "grid_mlp": mlp,
            "grid_branch": branch,
            "s2_activation": [False, config.ffn_on != "degrees"],  # the SO(3) grid has precedence
            "ffn_so3_grid": config.ffn_on == "so3",
            "lebedev_quadrature": True,
            "precision": precision,
            "add_chg_spin_ebd": config.charge_spin,
            "default_chg_spin": _floats(config.default_charge_spin),
            "exclude_types": [],
        }
    )
    del descriptor["use_spin"]  # deepmd-kit's model builder sets it
    fitting = (
        {option: accepted[0] for option, accepted in _FITTING_FIXED.items() if option != "bias_out"}
        | _FITTING_IRRELEVANT
        | {
            "type": "dpa4_ener",
            "neuron": list(config.fitting),
            "precision": precision,
            "atom_ener": [],
            "dim_case_embd": 0,
            "case_film_embd": False,
        }
    )
    return _MODEL_IRRELEVANT | {
        "type": "dpa4",
        "type_map": list(config.elements),
        "descriptor": descriptor,
        "fitting_net": fitting,
        "atom_exclude_types": [],
        "pair_exclude_types": excluded,
        "bridging_method": "None" if bridging is None else "ZBL",
        "bridging_r_inner": 0.5 if bridging is None else bridging.r_inner,
        "bridging_r_outer": 0.8 if bridging is None else bridging.r_outer,
        "info": {"observed_type": list(config.elements)},
    }


def _require_released(config: ModelConfig) -> None:
    """Refuse switches that no release of deepmd-kit can read.

    Raises:
        ValueError: If there is such a switch.
    """
    newer = {
        "edge_norm": len(set(astuple(config.edge_norm))) > 1,
        "env_exp": config.env_exp.basis is None,
        "basis": config.basis.endswith("/fix"),
    }
    values = config.model_dump(mode="json")
    if found := [f"{option} = {shown(values[option])}" for option, is_newer in newer.items() if is_newer]:
        raise ValueError(
            f"deepmd-kit 3.2.0 cannot read models with {' and '.join(found)}; the version after 3.2.0 can (its "
            "source since September 2026), but dpa4 writes files for 3.2.0 only"
        )


def _require_dpa4(model_params: Mapping[str, Any]) -> None:
    model_type = str(model_params.get("type", "standard"))
    sections = [(model_params.get("descriptor"), "dpa4"), (model_params.get("fitting_net"), "dpa4_ener")]
    descriptor_type, fitting_type = (  # deepmd-kit's defaults in a model of type dpa4
        str(section.get("type", default)) if isinstance(section, Mapping) else "none"
        for section, default in sections
    )
    if model_type.lower() not in MODEL_TYPES or descriptor_type.lower() not in MODEL_TYPES:
        raise ValueError(
            f"it is not a DPA4 model but one of type {shown(model_type)} with descriptor {shown(descriptor_type)}; "
            "only models and descriptors of type 'dpa4' (or 'SeZM') can be read"
        )
    if fitting_type.lower() not in FITTING_TYPES:
        raise unsupported("fitting_net.type", fitting_type, "'dpa4_ener', the energy model")
    if (types := model_params.get("type_map")) in (None, [], ()):
        raise ValueError("its model has no type_map, so the elements are unknown")
    if not is_list(types) or not all(isinstance(element, str) for element in types):
        raise unsupported("type_map", types, "a list of chemical symbols")


def _check_options(
    options: Mapping[str, Any],
    section: str,
    translated: frozenset[str] | set[str],
    fixed: Mapping[str, tuple[Any, ...]],
    irrelevant: Mapping[str, Any],
    added: frozenset[str] = frozenset(),
) -> None:
    """Refuse unknown options, and values of ``fixed`` options that are not accepted."""
    for option, value in options.items():
        if option.startswith("_") or option in translated or option in irrelevant or option in added:
            continue
        if option not in fixed:
            raise ValueError(
                f"{section}.{option} = {shown(value)} is not an option of a known DPA4 format; it may change the "
                "results, so the model is refused"
            )
        if not is_one_of(value, fixed[option]) and not (value is None and fixed[option][0] in ("none", [])):
            raise unsupported(f"{section}.{option}", value, repr(fixed[option][0]))


def _descriptor_fields(descriptor: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``ModelConfig`` that follow from the options of the descriptor."""
    fields = {ours: descriptor[theirs] for ours, theirs in _DESCRIPTOR_SAME.items() if theirs in descriptor}
    for option in ("basis", "radial_so2_mode", "so3_readout"):
        if option in fields:
            fields[option] = fields[option].lower()
    fields |= _degrees(descriptor)

    fields.setdefault("edge_norm", True)  # as in deepmd-kit, also before the option existed
    fields["mixing_layers"] = descriptor.get("so2_layers", descriptor.get("mixing_layers", 4))
    if fields.get("radial_so2_mode", "degree_channel") == "degree_channel":
        fields["radial_so2_rank"] = whole("radial_so2_rank", descriptor.get("radial_so2_rank", 1), 1)

    on_so2, on_s2 = pair("s2_activation", descriptor.get("s2_activation", [False, True]))
    if on_so2:
        raise unsupported("descriptor.s2_activation", [on_so2, on_s2], "[false, true] and [false, false]")
    fields["ffn_on"] = "so3" if descriptor.get("ffn_so3_grid", False) else "s2" if on_s2 else "degrees"
    if (quadrature := descriptor.get("lebedev_quadrature")) is not None:
        pair("lebedev_quadrature", quadrature)  # both grids of deepmd-kit are exact, as is ours
    if fields.get("message_node_so3", False):
        fields["message_grid"] = _grid_operation(descriptor, 1)
    if fields["ffn_on"] != "degrees":
        fields["ffn_grid"] = _grid_operation(descriptor, 2)

    fields["charge_spin"] = descriptor.get("add_chg_spin_ebd", False)
    default = descriptor.get("default_chg_spin")
    if fields["charge_spin"] and default is not None:
        if not is_list(default) or len(default) != 2 or not all(is_number(value) for value in default):
            raise unsupported("descriptor.default_chg_spin", default, "charge and multiplicity")
        fields["default_charge_spin"] = tuple(int(value) for value in default)  # deepmd-kit truncates as well
    return fields


def _degrees(descriptor: Mapping[str, Any]) -> dict[str, Any]:
    """Fields lmax, n_blocks, l_schedule and mmax."""
    fields: dict[str, Any] = {}
    if (schedule := descriptor.get("l_schedule")) is not None:
        degrees = whole_numbers("l_schedule", schedule)
        fields["l_schedule"] = tuple(degrees)
    else:
        lmax = whole("lmax", descriptor.get("lmax", 3), 0)
        blocks = whole("n_blocks", descriptor.get("n_blocks", 3), 1)
        fields = {"lmax": lmax, "n_blocks": blocks}
        degrees = [lmax] * blocks
    mmax = descriptor.get("mmax", 1)
    fields["mmax"] = degrees[0] if mmax is None else whole("mmax", mmax, 0)
    if (schedule := descriptor.get("m_schedule")) is not None:
        orders = whole_numbers("m_schedule", schedule)
        fields["mmax"] = max(orders)
        if orders != [min(max(orders), degree) for degree in degrees]:
            raise unsupported(
                "descriptor.m_schedule", orders, "one mmax, limited by the degree of each block"
            )
    return fields


def _grid_operation(descriptor: Mapping[str, Any], which: int) -> GridOperation:
    """Operation on a grid; ``which`` is 1 for the message-node product and 2 for the feed-forward networks."""

    def entry(option: str, default: int | bool, kind: Kind) -> Any:
        value = descriptor.get(option, default)
        values = value if is_list(value) else [value] * 3
        if len(values) != 3 or not all(kind.matches(v) for v in values):
            raise unsupported(f"descriptor.{option}", value, f"one value, or three: {kind.text}")
        return values[which]

    if branches := entry("grid_branch", 0, WHOLE):
        return branches
    return "mlp" if entry("grid_mlp", False, FLAG) else "glu"


def _grid_options(message: GridOperation, ffn: GridOperation) -> tuple[list[int], list[bool]]:
    """Options grid_branch and grid_mlp, each for [node-wise, message-node, feed-forward]."""
    operations: tuple[GridOperation, ...] = ("glu", message, ffn)
    branch = [operation if isinstance(operation, int) else 0 for operation in operations]
    return branch, [operation == "mlp" for operation in operations]


def _excluded_pairs(model_params: Mapping[str, Any], types: int) -> list[tuple[int, int]]:
    """Pairs of indices of elements that do not interact.

    Raises:
        ValueError: If an option is not a list of pairs, or model and descriptor name different pairs.
    """
    of_model = type_pairs("pair_exclude_types", model_params.get("pair_exclude_types"), types)
    own = type_pairs("descriptor.exclude_types", model_params["descriptor"].get("exclude_types"), types)
    if of_model and own and {frozenset(pair) for pair in of_model} != {frozenset(pair) for pair in own}:
        raise unsupported("descriptor.exclude_types", own, f"pair_exclude_types of the model, {of_model}")
    return of_model or own


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _floats(values: tuple[int, int] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]
