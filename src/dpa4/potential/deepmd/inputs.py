"""Model section of a training input of deepmd-kit: what its user may leave out, and the configuration it means."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpa4.model.config import ModelConfig
from dpa4.model.presets import preset
from dpa4.parsing import shown
from dpa4.potential.deepmd.options import (
    FITTING_TYPES,
    MODEL_TYPES,
    config_from_deepmd,
    irrelevant_options,
    model_section,
    precision_of,
)


class InputModel(NamedTuple):
    """Model that an input describes."""

    config: ModelConfig
    preset: str | None  # name in the input
    bits: int  # of the floating-point numbers of the network
    irrelevant: dict[str, Any]
    """Options of the input without influence on the results of a trained model, by their path in the section."""


def read_model_section(section: Mapping[str, Any]) -> InputModel:
    """Translate the model section of an input, which a checkpoint stores in full.

    deepmd-kit fills in the options of a preset, and the types of descriptor and fitting network, below the entries of
    the user.

    Raises:
        ValueError: If the model is not a DPA4 energy model, has several branches, or uses an unsupported option.
    """
    if "model_dict" in section:
        raise ValueError(
            "model.model_dict: an input with several branches cannot be translated; write an input with the model, "
            "loss and data of one branch"
        )
    name = section.get("preset")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"model.preset = {shown(name)} must be the name of a preset")
    own = {key: value for key, value in section.items() if key != "preset"}
    base = model_section(preset(name), "float32") if name else {}
    complete = (
        base
        | own
        | {
            part: {"type": kind} | base.get(part, {}) | _map(own, part)
            for part, kind in (("descriptor", MODEL_TYPES[0]), ("fitting_net", FITTING_TYPES[0]))
        }
    )
    _refuse_branches(complete["fitting_net"])
    config = config_from_deepmd(complete)
    return InputModel(config, name, precision_of(complete), irrelevant_options(own))


def _map(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = section.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"model.{key} = {shown(value)} must be a map of options")
    return value


def _refuse_branches(fitting: Mapping[str, Any]) -> None:
    """Refuse the embedding of branches; a checkpoint has it folded into its weights, a new model cannot."""
    if size := fitting.get("dim_case_embd"):
        raise ValueError(
            f"fitting_net.dim_case_embd = {shown(size)} is not supported for training; supported: 0, one data set"
        )
