"""Model section of a training input of deepmd-kit: what its user may leave out, and the configuration it means."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpa4.model.config import ModelConfig
from dpa4.model.presets import preset
from dpa4.parsing import shown
from dpa4.potential.deepmd.bridging import concise_form
from dpa4.potential.deepmd.options import (
    config_from_deepmd,
    irrelevant_options,
    model_section,
    precision_of,
)
from dpa4.potential.deepmd.vacuum import has_atom_energies, has_vacuum_reference


class InputModel(NamedTuple):
    """Model that an input describes."""

    config: ModelConfig
    preset: str | None  # name in the input
    bits: int  # of the floating-point numbers of the network
    atom_energies: list[float | None] | None  # fitting_net.atom_ener, if it fixes the energy of an element
    vacuum_reference: bool | None  # effect of fitting_net.vacuum_ref; None if the input does not set it
    irrelevant: dict[str, Any]
    """Options of the input without influence on the results of a trained model, by their path in the section."""


def read_model_section(section: Mapping[str, Any]) -> InputModel:
    """Translate the model section of an input, which a checkpoint stores in full.

    deepmd-kit fills in the options of a preset below the entries of the user.

    Raises:
        ValueError: If the model is not a DPA4 energy model, has several branches, or uses an unsupported option.
    """
    if "model_dict" in section:
        raise ValueError(
            "model.model_dict: an input with several branches cannot be translated; write an input with the model, "
            "loss and data of one branch"
        )
    own = dict(concise_form(section))
    name = own.pop("preset", None)
    if name is not None and not isinstance(name, str):
        raise ValueError(f"model.preset = {shown(name)} must be the name of a preset")
    own = {"fitting_net": {}} | own
    for part in ("descriptor", "fitting_net"):
        if not isinstance(own.get(part, {}), Mapping):
            raise ValueError(f"model.{part} = {shown(own[part])} must be a map of options")
    complete = own if name is None else _filled_in(own, model_section(preset(name), "float32"))
    config, fitting = config_from_deepmd(complete), complete["fitting_net"]
    if size := fitting.get("dim_case_embd"):  # a checkpoint has the embedding folded into its weights
        raise ValueError(
            f"fitting_net.dim_case_embd = {shown(size)} is not supported for training; supported: 0, one data set"
        )
    return InputModel(
        config,
        name,
        precision_of(complete),
        fitting["atom_ener"] if has_atom_energies(fitting) else None,
        has_vacuum_reference(complete) if fitting.get("vacuum_ref") else None,
        irrelevant_options(own),
    )


def _filled_in(own: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """Model section with the options of a preset where the input has none, also in descriptor and fitting network."""
    parts = {part: {**published[part], **own.get(part, {})} for part in ("descriptor", "fitting_net")}
    return {**published, **own, **parts}
