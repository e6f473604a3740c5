"""Preparation of a run: reads the data and builds the potential, the batches and the loss from the options."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from ase.data import atomic_numbers
from rich.console import Console

from dpa4.data import (
    Coverage,
    EpochBatches,
    Frame,
    FrameDataset,
    LabelKeys,
    StreamedDataset,
    StreamedFrames,
    charges_and_spins,
    check_elements,
    coverage_of,
    digest,
    reference_energies,
    sampled,
    shortest_distances,
    undetermined_elements,
    undetermined_text,
    warn_of_reference_energies,
)
from dpa4.data.charge_spin import charge_and_spin_of
from dpa4.data.coverage import ElementPair
from dpa4.data.loader import default_workers
from dpa4.data.summary import elements_in
from dpa4.model import ModelConfig
from dpa4.model.shapes import check_size
from dpa4.model.short_range import pair_bridging
from dpa4.output import counted
from dpa4.potential import Potential
from dpa4.potential.card import symmetry_text
from dpa4.training.finetuning_options import FINETUNING
from dpa4.training.fragments import Fragments
from dpa4.training.loss import Loss
from dpa4.training.options import RunConfig, TrainingOptions
from dpa4.training.parts import check_parts
from dpa4.training.processes import ALONE, Processes
from dpa4.training.replay import Extension, Replay, combined, divided, replay_of
from dpa4.training.repulsion import overlapping_pairs, without_repulsion
from dpa4.training.run_data import RunData, frames_of, read_data, without_isolated
from dpa4.training.start import Start, adapt, check_elements_of_start, load_start, origin_of


class Preparation(NamedTuple):
    """Potential, data and loss at the start of a run."""

    potential: Potential
    train: EpochBatches
    coverage: (
        Coverage | None
    )  # of the training data, those of the start included; None: unknown for the start
    validation: EpochBatches | None
    loss: Loss
    provenance: dict[str, str]  # for the checkpoints
    replay: Replay | None  # data of the start
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
            data only; also if the model to start from contradicts an option.
        RuntimeError: If device is cuda and no CUDA device is available.
    """
    device = processes.device(config.device)
    options = config.training
    start = load_start(config.model) if state is None and config.model.start_from else None
    if start is not None:
        check_parts(options.finetune.freeze, start.potential.model)
    processes.refuse_with(bool(config.data.replay.files), "data.replay")
    data = read_data(config, console)
    frames, validation = data.train, data.validation
    streamed = any(isinstance(part, StreamedFrames) for part in (frames, validation))
    processes.refuse_with(streamed, "training on .aselmdb files")
    model = _model(config, data, state, start, console)
    seen, held_out = sampled(frames), sampled(validation)
    pairs = charges_and_spins([*seen, *held_out], model.charge_spin, model.default_charge_spin)
    of_seen = pairs and pairs[: len(seen)]
    train = _dataset(frames, model, of_seen)
    valid = _dataset(validation, model, pairs and pairs[len(seen) :])
    if isinstance(frames, StreamedFrames):
        sample = FrameDataset(seen, model.cutoff, of_seen, cache_bytes=0)
        shortest = shortest_distances(sample)
        own = coverage_of(train, shortest, searched=len(seen))
        console.print(
            f"statistics and reference energies are those of {len(seen):,} of {len(frames):,} structures",
            highlight=False,
        )
    else:
        sample = train
        shortest = shortest_distances(train)
        own = coverage_of(train, shortest)
    console.print(f"closest atoms of the training data: {own.text}", highlight=False, markup=False)
    if state is None and start is None:
        model = _with_windows(config, model, shortest)
    _report_overlap(model, shortest, console)
    budget = batch_budget(options)
    old = _replayed_frames(config, state, console)
    own_budget, replayed_budget = divided(budget, config.data.replay.share) if old else (budget, {})

    torch.manual_seed(options.seed)
    if start is None:
        energies, undetermined = _reference_energies(config, model, data, shortest, state, console)
        potential = Potential(model, energies).to(device)
        origin = {} if state is None else origin_of(state)
        unknown = config.model.start_from and state is not None and state["coverage"] is None
        coverage = None if unknown else own
        references = {} if state is None else state.get("replay") or {}
    else:
        potential = start.potential.to(device)
        references = potential_references(potential)
        in_order = EpochBatches(sample, **budget, shuffle=False)
        read = sampled(data.read)
        origin, undetermined = adapt(start, in_order, read, config.data.reference_energies, console)
        _advise(options, validation, console)
        coverage = potential.coverage and own.union(potential.coverage)
    _describe(config, potential, device, console)
    for dataset in (train, valid):
        processes.count_edges(dataset)
    processes.describe(budget.get("batch_size"), console)
    replay = None
    if old:
        present = potential_references(potential)
        replay = replay_of(old, config.data, model, references, present, replayed_budget, options.seed)
        console.print(
            f"each batch also has structures of the start: {len(replay.add.batches.dataset)} are replayed; the best "
            "model is that of the new data",
            soft_wrap=True,
        )
    additions: list[Extension] = [] if replay is None else [replay.add]
    if model.has_pair_bridging:
        fragment_elements = sorted({*elements_in(frames), *elements_in(old)}, key=atomic_numbers.__getitem__)
        additions.append(Fragments(model, fragment_elements, options.seed))
    batches = EpochBatches(
        train,
        **own_budget,
        seed=options.seed,
        shuffle=True,
        extend=combined(additions),
        workers=_workers(config, frames, device),
        share=processes.share(),
    )
    for fill in batches.fill():
        console.print(
            f"batches fill {fill.mean:.1%} of max_{fill.what} (standard deviation {fill.deviation:.1%}, "
            f"{fill.batches:,} batches)",
            highlight=False,
        )
    workers = _workers(config, validation, device)
    return Preparation(
        potential=potential,
        train=batches,
        coverage=coverage,
        validation=EpochBatches(
            valid, **budget, shuffle=False, workers=workers, share=processes.share(whole=True)
        )
        if validation
        else None,
        loss=data.loss,
        provenance=origin | _provenance(config, frames, validation, undetermined, old),
        replay=replay,
        undetermined=undetermined,
        data={"training": _digest(frames, old), "validation": _digest(validation)},
        run_text=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )


def _dataset(
    frames: Sequence[Frame], model: ModelConfig, pairs: list[tuple[int, int]] | None
) -> FrameDataset:
    """Data set of structures in memory, with their charges and spins, or on the disk."""
    if not isinstance(frames, StreamedFrames):
        return FrameDataset(frames, model.cutoff, pairs)
    rule = partial(charge_and_spin_of, default=model.default_charge_spin) if model.charge_spin else None
    return StreamedDataset(frames, model.cutoff, rule)


def _workers(config: RunConfig, frames: Sequence[Frame], device: torch.device) -> int:
    """Number of processes that prepare batches; structures in memory need a thread only."""
    if not isinstance(frames, StreamedFrames):
        return 0
    return default_workers(device) if config.data.workers is None else config.data.workers


def _digest(frames: Sequence[Frame], replayed: Sequence[Frame] = ()) -> str:
    if not isinstance(frames, StreamedFrames):
        return digest([*frames, *replayed])
    return "-".join([frames.digest(), *([digest(replayed)] if replayed else [])])


def _replayed_frames(config: RunConfig, state: Mapping[str, Any] | None, console: Console) -> list[Frame]:
    """Structures of the start to train on again; none unless the options name some.

    Raises:
        ValueError: If the run to resume had none, so that the reference energies of the start are not known.
    """
    files = config.data.replay.files
    if not files:
        return []
    if state is not None and not state.get("replay"):
        raise ValueError(
            f"data.replay.files = {', '.join(map(str, files))}: the run to resume replays no data; remove the "
            "option, or start a new run"
        )
    read = frames_of("data.replay.files", files, LabelKeys(**config.data.keys.model_dump()), console)
    return list(without_isolated(read, "data.replay.files", files))


def potential_references(potential: Potential) -> dict[str, float]:
    """Reference energy of each element of a potential, in eV."""
    return dict(zip(potential.elements, potential.reference_energies.tolist(), strict=True))


def _model(
    config: RunConfig, data: RunData, state: Mapping[str, Any] | None, start: Start | None, console: Console
) -> ModelConfig:
    """Configuration of the model: that of the state or the start if there is one, else from options and data."""
    elements = sorted(
        {*elements_in(data.read), *elements_in(data.validation)}, key=atomic_numbers.__getitem__
    )
    if start is not None:
        for found in (data.read, data.validation):
            check_elements_of_start(found, start)
        model = start.potential.config
    elif state is None:
        model = config.model.build(elements)
    elif "config" not in state:  # of an earlier version, in which all models had this symmetry
        model = config.model.model_copy(update={"symmetry": "SO3"}).build(elements)
    else:
        model = ModelConfig.model_validate_json(state["config"])
    check_size(model)
    check_elements(data.read, model.elements)
    check_elements(data.validation, model.elements)
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
    config: RunConfig, model: ModelConfig, shortest: Mapping[ElementPair, float]
) -> ModelConfig:
    """Add the windows of the repulsion to the model of a run from random weights, if the options ask for them."""
    if config.model.bridging != "auto":
        return model
    return model.model_copy(update={"bridging": pair_bridging(shortest, model.elements, model.cutoff)})


def _advise(options: TrainingOptions, validation: Sequence[Frame], console: Console) -> None:
    """Print what may make a start worse, or hide that."""
    if options.learning_rate == "auto" or options.learning_rate >= 2 * FINETUNING["learning_rate"]:
        console.print(
            f"training.learning_rate = {options.learning_rate} suits random weights; fine-tuning begins with "
            f"{FINETUNING['learning_rate']:g} unless you say otherwise",
            style="yellow",
            soft_wrap=True,
        )
    if not validation:
        console.print(
            "there are no validation data, so nothing shows whether the fine-tuned model is better than its start",
            style="yellow",
            soft_wrap=True,
        )


def _report_overlap(model: ModelConfig, shortest: Mapping[ElementPair, float], console: Console) -> None:
    """Say which windows the data reach into."""
    if overlap := overlapping_pairs(model, shortest):
        console.print(
            f"the repulsion of nuclei reaches into the training data for {', '.join(overlap)}; the network learns "
            "the difference",
            style="yellow",
            soft_wrap=True,
        )


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
        fitted = without_repulsion(sampled(data.read), model, shortest)
        energies = reference_energies(config.data.reference_energies, fitted, model.elements)
        undetermined = undetermined_elements(config.data.reference_energies, fitted, model.elements)
    else:
        stored = state["potential"]["reference_energies"].tolist()
        energies = dict(zip(model.elements, stored, strict=False))
        undetermined = state.get("undetermined", ())
    values = (f"{e} {v:.4f}{' (arbitrary)' if e in undetermined else ''}" for e, v in energies.items())
    console.print("reference energies (eV): " + ", ".join(values))
    warn_of_reference_energies(sampled(data.train), energies)
    if undetermined and not config.model.start_from:
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


def _describe(config: RunConfig, potential: Potential, device: torch.device, console: Console) -> None:
    model = potential.config
    parameters = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    name = config.model.preset if config.model.holds("preset") else "of the start"
    console.print(
        f"model {name}: {parameters:,} parameters, {len(model.degrees)} blocks of degree "
        f"{model.degrees[0]}, {model.channels} channels, cutoff {model.cutoff:g} Å, elements "
        f"{' '.join(model.elements)}; device {device}, precision {config.training.precision}",
        highlight=False,
    )
    console.print(f"symmetry {symmetry_text(model)}", highlight=False, soft_wrap=True)


def _provenance(
    config: RunConfig,
    train: Sequence[Frame],
    validation: Sequence[Frame],
    undetermined: Sequence[str],
    replayed: Sequence[Frame],
) -> dict[str, str]:
    def describe(paths: Sequence[Path], frames: Sequence[Frame]) -> str:
        return counted(len(frames), "structure") + (
            f" of {', '.join(path.name if path.exists() else str(path) for path in paths)}" if paths else ""
        )

    entries: dict[str, str] = {}
    if config.model.start_from is None:
        if undetermined:
            entries["arbitrary reference energies"] = undetermined_text(undetermined)
        entries["preset"] = config.model.preset
    if replayed:
        entries["replayed data"] = describe(config.data.replay.files, replayed)
    return entries | {
        "training data": describe(config.data.train, train),
        "validation data": describe(config.data.validation or config.data.train, validation),
        "options": config.model_dump_json(),
    }
