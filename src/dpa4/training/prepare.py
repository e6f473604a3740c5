"""Preparation of a run: reads the data and builds the potential, the batches and the loss from the options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from rich.console import Console

from dpa4.data import (
    CoverageCollector,
    EpochBatches,
    Frame,
    FrameDataset,
    LabelKeys,
    check_charge_spin,
    check_elements,
    check_labels,
    read_frames,
    reference_energies,
    summarize,
    without_isolated_atoms,
)
from dpa4.data.summary import elements_in
from dpa4.model.shapes import check_size
from dpa4.parsing import parse_yaml
from dpa4.potential import Potential
from dpa4.system import choose_device
from dpa4.training.loss import Loss
from dpa4.training.options import RunConfig, TrainingOptions

DEFAULT_VIRIAL_WEIGHT = 5.0


class Preparation(NamedTuple):
    """Potential, data and loss at the start of a run."""

    potential: Potential
    train: EpochBatches
    coverage: CoverageCollector  # of the training data
    validation: EpochBatches | None
    loss: Loss
    provenance: dict[str, str]  # for the checkpoints
    run_text: str  # the options as YAML; "auto" stays "auto"


def prepare(config: RunConfig, console: Console) -> Preparation:
    """Read the data, print a summary of them, and build the potential.

    Raises:
        ValueError: If the data cannot be read, have no label for a term with a weight, or have an element outside
            the model.
        RuntimeError: If device is cuda and no CUDA device is available.
    """
    device = choose_device(config.device)
    options = config.training
    keys = LabelKeys(**config.data.keys.model_dump())
    read = read_frames(config.data.train, keys)
    frames = without_isolated_atoms(read)  # isolated atoms only serve for reference energies
    if config.data.validation:
        validation = without_isolated_atoms(read_frames(config.data.validation, keys))
    else:
        frames, validation = split(frames, config.data.validation_fraction, config.data.split_seed)
    console.print(summarize({"training": frames, "validation": validation}))

    model = config.model.build(elements_in([*read, *validation]))
    check_size(model)
    check_elements([*read, *validation], model.elements)
    if model.charge_spin and model.default_charge_spin is None:
        check_charge_spin([*frames, *validation])
    energies = reference_energies(config.data.reference_energies, read, model.elements)
    console.print("reference energies (eV): " + ", ".join(f"{e} {v:.4f}" for e, v in energies.items()))

    loss = _loss(options, frames, console)
    torch.manual_seed(options.seed)
    potential = Potential(model, energies).to(device)
    _describe(config, potential, device, console)

    coverage = CoverageCollector(frames, model.cutoff)
    train = FrameDataset(frames, model.cutoff, model.default_charge_spin, observe=coverage.add)
    valid = FrameDataset(validation, model.cutoff, model.default_charge_spin)
    budget = batch_budget(options)
    return Preparation(
        potential=potential,
        train=EpochBatches(train, **budget, seed=options.seed, shuffle=True),
        coverage=coverage,
        validation=EpochBatches(valid, **budget, seed=options.seed, shuffle=False) if validation else None,
        loss=loss,
        provenance=_provenance(config, frames, validation),
        run_text=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )


def split(frames: Sequence[Frame], fraction: float, seed: int) -> tuple[list[Frame], list[Frame]]:
    """Split off a random share of the structures for validation, at least one unless the fraction is 0.

    Returns:
        Structures for training and for validation.

    Raises:
        ValueError: If no structure would be left to train on.
    """
    count = max(1, round(fraction * len(frames))) if fraction else 0
    if count >= len(frames):
        raise ValueError(
            f"data.validation_fraction = {fraction} of {len(frames)} structures leaves none to train on; "
            "add structures or set it to 0"
        )
    held_out = set(np.random.default_rng(seed).permutation(len(frames))[:count].tolist())
    return (
        [frame for i, frame in enumerate(frames) if i not in held_out],
        [frames[i] for i in sorted(held_out)],
    )


def batch_budget(options: TrainingOptions) -> dict[str, int]:
    """Limits of a batch, in structures or in atoms and edges; by default eight structures."""
    budget = {
        "batch_size": options.batch_size,
        "max_atoms": options.max_atoms,
        "max_edges": options.max_edges,
    }
    return {name: value for name, value in budget.items() if value is not None} or {"batch_size": 8}


def changed_options(old: str, new: str) -> list[str]:
    """List the options that differ between the YAML of two runs, as "training.seed: 0 -> 1"."""
    before, after = _flat(parse_yaml(old, "the former run file")), _flat(parse_yaml(new, "the run file"))
    keys = [k for k in before | after if before.get(k) != after.get(k)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _loss(options: TrainingOptions, frames: Sequence[Frame], console: Console) -> Loss:
    virial = options.virial_weight
    if virial == "auto":
        labelled = any(frame.virial is not None for frame in frames)
        virial = DEFAULT_VIRIAL_WEIGHT if labelled else 0.0
        reason = "there are stress or virial labels" if labelled else "there is no stress or virial label"
        console.print(f"training.virial_weight = {virial:g}, because {reason}")
    loss = Loss(options.energy_weight, options.forces_weight, virial, options.loss, options.huber_delta)
    check_labels(frames, {"energy": loss.energy, "forces": loss.forces, "virial": loss.virial})
    return loss


def _describe(config: RunConfig, potential: Potential, device: torch.device, console: Console) -> None:
    model = potential.config
    parameters = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    console.print(
        f"model {config.model.preset}: {parameters:,} parameters, {len(model.degrees)} blocks of degree "
        f"{model.degrees[0]}, {model.channels} channels, cutoff {model.cutoff:g} Å, elements "
        f"{' '.join(model.elements)}; device {device}, precision {config.training.precision}",
        highlight=False,
    )


def _provenance(config: RunConfig, train: Sequence[Frame], validation: Sequence[Frame]) -> dict[str, str]:
    def describe(paths: Sequence[Path], frames: Sequence[Frame]) -> str:
        return f"{len(frames)} structures" + (
            f" of {', '.join(path.name for path in paths)}" if paths else ""
        )

    return {
        "preset": config.model.preset,
        "training data": describe(config.data.train, train),
        "validation data": describe(config.data.validation or config.data.train, validation),
        "options": config.model_dump_json(),
    }
