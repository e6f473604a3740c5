"""Preparation of a run: reads the data and builds the potential, the batches and the loss from the options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console

from dpa4.data import (
    Coverage,
    EpochBatches,
    Frame,
    FrameDataset,
    charges_and_spins,
    check_elements,
    coverage_of,
    digest,
    reference_energies,
    shortest_distances,
    undetermined_elements,
    undetermined_text,
    warn_of_reference_energies,
)
from dpa4.data.coverage import ElementPair
from dpa4.data.summary import elements_in
from dpa4.model import ModelConfig
from dpa4.model.shapes import check_size
from dpa4.model.short_range import pair_bridging
from dpa4.output import counted
from dpa4.parsing import parse_yaml
from dpa4.potential import Potential
from dpa4.potential.card import symmetry_text
from dpa4.training.fragments import Fragments
from dpa4.training.loss import Loss
from dpa4.training.options import RunConfig, TrainingOptions
from dpa4.training.processes import ALONE, Processes
from dpa4.training.repulsion import overlapping_pairs, without_repulsion
from dpa4.training.run_data import RunData, read_data


class Preparation(NamedTuple):
    """Potential, data and loss at the start of a run."""

    potential: Potential
    train: EpochBatches
    coverage: Coverage  # of the training data
    validation: EpochBatches | None
    loss: Loss
    provenance: dict[str, str]  # for the checkpoints
    undetermined: tuple[str, ...]  # elements with an arbitrary reference energy
    data: dict[str, str]  # digests of the training and validation data
    run_text: str  # the options as YAML; "auto" stays "auto"


def prepare(
    config: RunConfig, console: Console, state: Mapping[str, Any] | None = None, processes: Processes = ALONE
) -> Preparation:
    """Read the data, print a summary of them, and build the potential.

    Args:
        config: Options of the run.
        console: Console to print to.
        state: State of the run to resume; the model then has its elements and reference energies.
        processes: Processes among which the batches are divided.

    Raises:
        ValueError: If the data cannot be read, have no label for a term with a weight (training and validation
            data), have nothing but free atoms, or have an element that is outside the model or in the validation
            data only.
        RuntimeError: If device is cuda and no CUDA device is available.
    """
    device = processes.device(config.device)
    options = config.training
    data = read_data(config, console)
    frames, validation = data.train, data.validation
    model = _model(config, data, state, console)
    pairs = charges_and_spins([*frames, *validation], model.charge_spin, model.default_charge_spin)
    train = FrameDataset(frames, model.cutoff, pairs and pairs[: len(frames)])
    valid = FrameDataset(validation, model.cutoff, pairs and pairs[len(frames) :])
    shortest = shortest_distances(train)
    coverage = coverage_of(train, shortest)
    console.print(f"closest atoms of the training data: {coverage.text}", highlight=False, markup=False)
    model = _with_windows(config, model, shortest, state, console)
    energies, undetermined = _reference_energies(config, model, data, shortest, state, console)

    torch.manual_seed(options.seed)
    potential = Potential(model, energies).to(device)
    _describe(config, potential, device, console)
    budget = batch_budget(options)
    for dataset in (train, valid):
        processes.count_edges(dataset)
    processes.describe(budget.get("batch_size"), console)
    extend = Fragments(model, elements_in(frames), options.seed) if model.has_pair_bridging else None
    return Preparation(
        potential=potential,
        train=EpochBatches(
            train, **budget, seed=options.seed, shuffle=True, extend=extend, share=processes.share()
        ),
        coverage=coverage,
        validation=EpochBatches(valid, **budget, shuffle=False, share=processes.share(whole=True))
        if validation
        else None,
        loss=data.loss,
        provenance=_provenance(config, frames, validation, undetermined),
        undetermined=undetermined,
        data={"training": digest(frames), "validation": digest(validation)},
        run_text=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )


def _model(
    config: RunConfig, data: RunData, state: Mapping[str, Any] | None, console: Console
) -> ModelConfig:
    """Configuration of the model: that of the state if there is one, else from the options and the data."""
    elements = elements_in([*data.read, *data.validation])
    if state is None:
        model = config.model.build(elements)
    elif "config" not in state:  # of an earlier version, in which all models had this symmetry
        model = config.model.model_copy(update={"symmetry": "SO3"}).build(elements)
    else:
        model = ModelConfig.model_validate_json(state["config"])
    check_size(model)
    check_elements([*data.read, *data.validation], model.elements)
    if untrained := sorted(set(elements_in(data.read)) - set(elements_in(data.train))):
        console.print(
            f"no structure to train on contains {', '.join(untrained)}: of {_these(untrained)} the model knows the "
            "free atom only",
            style="yellow",
            soft_wrap=True,
        )
    return model


def _these(elements: Sequence[str]) -> str:
    return "this element" if len(elements) == 1 else "these elements"


def _with_windows(
    config: RunConfig,
    model: ModelConfig,
    shortest: Mapping[ElementPair, float],
    state: Mapping[str, Any] | None,
    console: Console,
) -> ModelConfig:
    """Add the windows of the repulsion to the model of a new run. A run to resume has those of its state."""
    if state is None and config.model.bridging == "auto":
        model = model.model_copy(update={"bridging": pair_bridging(shortest, model.elements, model.cutoff)})
    if overlap := overlapping_pairs(model, shortest):
        console.print(
            f"the repulsion of nuclei reaches into the training data for {', '.join(overlap)}; the network learns "
            "the difference",
            style="yellow",
            soft_wrap=True,
        )
    return model


def _reference_energies(
    config: RunConfig,
    model: ModelConfig,
    data: RunData,
    shortest: Mapping[ElementPair, float],
    state: Mapping[str, Any] | None,
    console: Console,
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Reference energies of a new run or of the state, and the elements for which they are arbitrary; prints both."""
    if state is None:
        fitted = without_repulsion(data.read, model, shortest)
        energies = reference_energies(config.data.reference_energies, fitted, model.elements)
        undetermined = undetermined_elements(config.data.reference_energies, fitted, model.elements)
    else:
        stored = state["potential"]["reference_energies"].tolist()
        energies = dict(zip(model.elements, stored, strict=False))
        undetermined = state.get("undetermined", ())
    values = (f"{e} {v:.4f}{' (arbitrary)' if e in undetermined else ''}" for e, v in energies.items())
    console.print("reference energies (eV): " + ", ".join(values))
    warn_of_reference_energies(data.train, energies)
    if undetermined:
        console.print(undetermined_text(undetermined), style="yellow", highlight=False, soft_wrap=True)
    return energies, tuple(undetermined)


def batch_budget(options: TrainingOptions) -> dict[str, Any]:
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


def _describe(config: RunConfig, potential: Potential, device: torch.device, console: Console) -> None:
    model = potential.config
    parameters = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    console.print(
        f"model {config.model.preset}: {parameters:,} parameters, {len(model.degrees)} blocks of degree "
        f"{model.degrees[0]}, {model.channels} channels, cutoff {model.cutoff:g} Å, elements "
        f"{' '.join(model.elements)}; device {device}, precision {config.training.precision}",
        highlight=False,
    )
    console.print(f"symmetry {symmetry_text(model)}", highlight=False, soft_wrap=True)


def _provenance(
    config: RunConfig, train: Sequence[Frame], validation: Sequence[Frame], undetermined: Sequence[str]
) -> dict[str, str]:
    def describe(paths: Sequence[Path], frames: Sequence[Frame]) -> str:
        return counted(len(frames), "structure") + (
            f" of {', '.join(path.name if path.exists() else str(path) for path in paths)}" if paths else ""
        )

    warning = {"arbitrary reference energies": undetermined_text(undetermined)} if undetermined else {}
    return warning | {
        "preset": config.model.preset,
        "training data": describe(config.data.train, train),
        "validation data": describe(config.data.validation or config.data.train, validation),
        "options": config.model_dump_json(),
    }
