"""Model card: description of a model or preset, as text and for the terminal."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from dpa4.model import ModelConfig
from dpa4.model.config import PairBridging
from dpa4.model.network import max_edges
from dpa4.model.presets import DEEPMD_PRESETS, closest_preset, generation, preset
from dpa4.model.shapes import ParameterCount, count_parameters
from dpa4.ops import available
from dpa4.ops.layout import EdgeLayout
from dpa4.output import html_table
from dpa4.parsing import parse_json, printable
from dpa4.potential.checkpoint import read_checkpoint
from dpa4.potential.fingerprint import model_digest
from dpa4.potential.model_file import WEIGHTS
from dpa4.system import user_path

UNITS = "energy eV, length Å, forces eV/Å, virial eV (-dE/dstrain), stress eV/Å³ (tensile positive)"
_DESCRIBED = ("elements", "cutoff", "symmetry")  # fields with their own lines, not listed as switches
_FEW_CHANGES = 3
"""Largest number of options by which a model may differ from a preset that its card names."""


@dataclass(frozen=True)
class ModelCard:
    """Title and sections of a model card; a section maps labels to values."""

    title: str
    sections: dict[str, dict[str, str]]

    @property
    def text(self) -> str:
        """The card as plain text."""
        width = max(len(label) for lines in self.sections.values() for label in lines)
        blocks = [self.title]
        for section, lines in self.sections.items():
            blocks.append(
                "\n".join([section, *(f"  {label:<{width}}  {value}" for label, value in lines.items())])
            )
        return "\n\n".join(blocks) + "\n"

    def _repr_html_(self) -> str:
        """The card as a table for a notebook."""
        return html_table(self.title, self.sections)

    def __rich__(self) -> Table:
        """The card as a table for the terminal."""
        table = Table(title=self.title, show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for section, lines in self.sections.items():
            table.add_row(Text(section, style="bold"), "")
            for label, value in lines.items():
                table.add_row(Text(f"  {label}"), Text(value))
            table.add_section()
        return table


def model_card(source: str | Path, branch: str | None = None) -> ModelCard:
    """Describe a model file or a preset. Print the card with rich, or use its ``text``.

    Args:
        source: Model file, as for ``load_potential``, or name of a preset.
        branch: Branch of a multitask model of deepmd-kit.

    Raises:
        FileNotFoundError: If ``source`` looks like a file and does not exist.
        ValueError: If the file cannot be read, ``source`` is neither a file nor a preset, or is a folder or the state
            of a training run; the message then names the file to take.
    """
    path = user_path(source)
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        return _preset_card(str(source))
    stored = read_checkpoint(source, branch)
    energies = zip(stored.config.elements, stored.reference_energies.tolist(), strict=True)
    sections = _sections(stored.config)
    sections["Model"] |= {
        "precision": str(stored.dtype).removeprefix("torch."),
        "reference energies": ", ".join(f"{element} {energy:.6f}" for element, energy in energies) + " eV",
    }
    if stored.coverage is not None:
        sections["Training data"] = {
            "elements seen": " ".join(stored.coverage.elements),
            "closest atoms": stored.coverage.text,
        }
    origin = {"file": str(path), "format": stored.format}
    origin["fingerprint"] = model_digest(stored.config, stored.weights, stored.reference_energies)
    if stored.digest is not None:
        origin["integrity"] = "weights and options are those that were written"
    for label, value in stored.provenance.items():
        if isinstance(options := _map_or_none(value), dict):
            sections[f"Training run, {printable(label)}"] = _flat(options)
        else:
            origin[printable(label)] = printable(value)
    first = {"Model": sections.pop("Model"), "Provenance": origin}
    if "Training data" in sections:
        first["Training data"] = sections.pop("Training data")
    return ModelCard(f"DPA4 potential {path.name}", first | sections)


def _map_or_none(text: str) -> Any:
    """Map in a text of JSON, such as the options of a training run; None for other texts."""
    try:
        return parse_json(text, "an entry of the provenance") if text.startswith("{") else None
    except ValueError:
        return None


def _flat(options: dict[Any, Any], above: str = "") -> dict[str, str]:
    """Lines of nested options: names such as training.seed, and their values."""
    lines: dict[str, str] = {}
    for key, value in options.items():
        name = f"{above}{printable(str(key))}"
        lines |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: _plain(value)}
    return lines


def _plain(value: Any) -> str:
    """Value of an option as a run file has it."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return printable(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)


def _preset_card(name: str) -> ModelCard:
    try:
        config = preset(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is neither a file nor a preset: {error}") from None
    sections = _sections(config)
    sections["Provenance"] = {
        "preset": name,
        "source": f"{'deepmd-kit' if name.lower() in DEEPMD_PRESETS else 'arXiv:2606.02419'}",
        "weights": f"none; {WEIGHTS}",
    }
    return ModelCard(f"DPA4 preset {name}", sections)


def _sections(config: ModelConfig) -> dict[str, dict[str, str]]:
    parameters = count_parameters(config)
    switches = {key: value for key, value in config.model_dump().items() if key not in _DESCRIBED}
    if isinstance(config.bridging, PairBridging):
        switches["bridging"] = config.bridging.text
    default = ModelConfig(elements=config.elements).model_dump()
    return {
        "Model": {
            "generation": str(generation(config)),
            "version": _version(config),
            "parameters": f"{parameters.total:,}",
            "trainable parameters": _trainable(config, parameters),
            "elements": f"{len(config.elements)}: {' '.join(config.elements)}",
            "cutoff": f"{config.cutoff:g} Å",
            "symmetry": symmetry_text(config),
            "units": UNITS,
        },
        "Switches, not default": {
            key: _show(value) for key, value in switches.items() if value != default[key]
        },
        "Switches, default": {key: _show(value) for key, value in switches.items() if value == default[key]},
        "On a GPU": gpu_kernels(config, available.triton_version()),
        "On this CPU": cpu_kernels(config),
    }


def _version(config: ModelConfig) -> str:
    """Name of the preset with the options of a model, or of the closest one and the differences."""
    name, changed = closest_preset(config)
    if not changed:
        return name
    if len(changed) > _FEW_CHANGES:
        return "none, no preset is close"
    return f"none; {name} with {', '.join(f'{key} = {_show(value)}' for key, value in changed.items())}"


def symmetry_text(config: ModelConfig) -> str:
    """Symmetry of a model, for the card and the log of a training run."""
    energies = "are equal" if config.has_mirror_symmetry else "may differ"
    return f"{config.symmetry}: energies of mirror images {energies}"


def _trainable(config: ModelConfig, parameters: ParameterCount) -> str:
    text = f"{parameters.trainable:,}"
    if fixed := parameters.total - parameters.trainable:
        kind = "centres" if config.basis.startswith("gaussian") else "frequencies"
        text += f"; {fixed} {kind} of the radial basis are fixed"
    return text


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_show(entry) for entry in value) + ")"
    return str(value)


# Kernels: the rules are those of `dpa4.ops.available`; here they become lines of text.


_PLAIN_SO2 = {"mlp_bias": "biases", "layer_scale": "learned scales"}
"""Switches that prevent the SO(2) layers from being one fused operator, and the features they add."""


def _plain_switches(config: ModelConfig) -> dict[str, str]:
    """Entries of `_PLAIN_SO2` whose switch is set."""
    return {switch: what for switch, what in _PLAIN_SO2.items() if getattr(config, switch)}


def unsupported(config: ModelConfig) -> list[str]:
    """Reasons why a model runs plain operations on a GPU where other models have kernels; empty if there are none."""
    return [
        f"{switch} = True: SO(2) layers with {what} are not fused; they run operation by operation"
        for switch, what in _plain_switches(config).items()
    ]


def has_whole_stacks(config: ModelConfig) -> bool:
    """Return whether one kernel on Hopper GPUs computes all SO(2) layers of a block, for energies and forces."""
    return not unsupported(config) and not _misfits(config)


def _misfits(config: ModelConfig) -> list[str]:
    """Return what the CUDA kernels for whole stacks lack for any block of the model."""
    shape = config.n_focus, config.focus_width, config.mixing_layers, config.symmetry == "O3"
    layouts = [EdgeLayout(degree, min(config.mmax, degree)) for degree in config.degrees]
    return list(
        dict.fromkeys(text for layout in layouts for text in available.whole_stack_misfits(layout, *shape))
    )


def gpu_kernels(config: ModelConfig, triton: str | None) -> dict[str, str]:
    """Lines of the model card about GPUs.

    Args:
        config: The model.
        triton: Version of Triton, or None if it is not installed.
    """
    in_float64 = (
        "Triton kernels" if available.triton_dtype(torch.float64) else "plain operations, not compiled"
    )
    return {
        "Triton": triton or "not installed; without it no model runs on a GPU",
        "edges and nodes": "Triton kernels",
        "SO(2) layers": "; ".join(unsupported(config)) or "fused, " + _gates(config),
        "energies and forces on H100, H200": _on_hopper(config),
        "edges at once": f"{max_edges(config)['cuda']:,}; more are computed in parts, without a CUDA graph",
        "with --dtype float64": f"sums over edges by a Triton kernel, else {in_float64}",
    }


def _gates(config: ModelConfig) -> str:
    """Kernels of the fused SO(2) layers."""
    if available.triton_gate_width(config.focus_width):
        return "Triton kernels"
    return (
        f"Triton kernels; gates in plain operations ({config.focus_width} channels of a focus, at most "
        f"{available.GATE_CHANNELS})"
    )


def _on_hopper(config: ModelConfig) -> str:
    """Kernels of the SO(2) layers on Hopper GPUs, outside of training."""
    if has_whole_stacks(config):
        return "one CUDA kernel for all SO(2) layers of a block"
    if unsupported(config):
        return "as above"
    return f"as above; the CUDA kernel for whole stacks has {', '.join(_misfits(config))}"


def cpu_kernels(config: ModelConfig) -> dict[str, str]:
    """Lines of the model card about the CPU of this machine."""
    focus = {"channels of a focus": config.focus_width}
    widths = {"channels": config.channels} | focus
    if config.ffn_neurons:
        widths["channels of the feed-forward networks"] = config.ffn_neurons
    if config.n_atten_head > 1:
        widths["channels of an attention head"] = config.focus_width // config.n_atten_head
    switches = [f"{name} = True" for name in _plain_switches(config)]
    missing = available.cpp_missing()
    plain = missing or _odd(widths)
    layers = missing or _odd(focus) or (f"not with {', '.join(switches)}" if switches else None)
    return {
        "edges, nodes and grids": f"plain operations ({plain})" if plain else "C++ kernels",
        "layers of SO(2)": f"plain operations ({layers})" if layers else "C++ kernels, all layers at once",
    }


def _odd(widths: dict[str, int]) -> str | None:
    """Reason why the C++ kernels do not support these numbers of channels; None if they do."""
    odd = [f"{name} {width}" for name, width in widths.items() if not available.cpp_width(width)]
    return f"{', '.join(odd)}: not a multiple of {available.LANES}" if odd else None
