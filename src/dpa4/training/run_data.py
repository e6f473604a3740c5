"""Data of a run: reads and splits them, checks them, and prints what they are."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from dpa4.data import (
    Frame,
    LabelKeys,
    check_labels,
    check_trained,
    find_sources,
    is_isolated_atom,
    read_frames,
    summarize,
    warn_of_implausible_labels,
    without_isolated_atoms,
)
from dpa4.data.frame import structure_digest
from dpa4.output import counted
from dpa4.training.loss import Loss
from dpa4.training.options import RunConfig, TrainingOptions

DEFAULT_VIRIAL_WEIGHT = 5.0
COMPARED = 100_000  # structures up to which validation and training data are compared, in a few seconds


class RunData(NamedTuple):
    """Structures of a run, and the loss that their labels allow."""

    read: Sequence[Frame]  # training files, with free atoms and the part that is split off
    train: Sequence[Frame]
    validation: Sequence[Frame]
    loss: Loss


def read_data(config: RunConfig, console: Console) -> RunData:
    """Read the data, check them, and print a summary.

    Raises:
        ValueError: If a file is both in the training and the validation data, or the data are not fit to train on.
    """
    check_no_common_file(config.data.train, config.data.validation)
    keys = LabelKeys(**config.data.keys.model_dump())
    read = _frames_of("data.train", config.data.train, keys, console)
    frames = _without_isolated_atoms(read, "data.train", config.data.train)
    loss = _loss(config.training, frames, console)
    weights = {"energy": loss.energy, "forces": loss.forces, "virial": loss.virial}
    check_labels(frames, weights)
    free = [frame for frame in read if is_isolated_atom(frame)]
    fraction = config.data.validation_fraction
    frames, left_out = _without_calibration(config, frames, loss)
    if config.data.validation:
        held_out = _frames_of("data.validation", config.data.validation, keys, console)
        validation = _without_isolated_atoms(held_out, "data.validation", config.data.validation)
        free += [frame for frame in held_out if is_isolated_atom(frame)]
    else:
        frames, validation = split(frames, fraction, config.data.split_seed, _labels(loss))
    others = {"for calibration": left_out, "free atoms": free}
    parts = {"training": frames, "validation": validation} | {
        k: found for k, found in others.items() if found
    }
    console.print(summarize(parts))
    if free:
        console.print("free atoms are not trained on; they are for the reference energies", highlight=False)
    if validation and not config.data.validation:
        console.print(
            "The validation data are a random share of data.train. If those are frames of trajectories, they "
            "resemble their neighbours in the training data, and errors of other structures are larger",
            soft_wrap=True,
            highlight=False,
        )
    if common := count_common(frames, validation):
        console.print(
            f"{common} of {len(validation)} validation structures are in the training data, too (same elements, "
            "positions and cell), so their errors are too small; remove them from one of the two",
            style="yellow",
            soft_wrap=True,
            highlight=False,
        )
    if validation:
        check_labels(validation, weights, "validation")
        check_trained(validation, frames)
    if table := warn_of_implausible_labels([*frames, *validation]):
        console.print(table)
    return RunData(read, frames, validation, loss)


def check_no_common_file(train: Sequence[Path], validation: Sequence[Path]) -> None:
    """Check that no file is read both for training and for validation.

    Raises:
        ValueError: If one is; the message names it.
    """
    if not validation:
        return
    trained = {path.resolve() for path in find_sources(train).paths}
    for path in find_sources(validation).paths:
        if path.resolve() in trained:
            raise ValueError(
                f"{path} is in data.train and in data.validation; errors of structures that the model was trained on "
                "say nothing. Name other files in data.validation, or leave it out: then data.validation_fraction of "
                "the training data are set aside"
            )


def count_common(training: Sequence[Frame], validation: Sequence[Frame]) -> int:
    """Number of validation structures that are in the training data, too; 0 if there are too many to compare."""
    if not validation or len(training) + len(validation) > COMPARED:
        return 0
    trained = {structure_digest(frame) for frame in training}
    return sum(structure_digest(frame) in trained for frame in validation)


def calibration_frames(config: RunConfig) -> list[Frame]:
    """Structures that no member of a committee is trained on: the validation files, or the share that is left out."""
    silent = Console(quiet=True)
    keys = LabelKeys(**config.data.keys.model_dump())
    if config.data.validation:
        held_out = _frames_of("data.validation", config.data.validation, keys, silent)
        return _without_isolated_atoms(held_out, "data.validation", config.data.validation)
    read = _frames_of("data.train", config.data.train, keys, silent)
    frames = _without_isolated_atoms(read, "data.train", config.data.train)
    loss = _loss(config.training, frames, silent)
    return _without_calibration(config, frames, loss)[1]


def _without_calibration(
    config: RunConfig, frames: list[Frame], loss: Loss
) -> tuple[list[Frame], list[Frame]]:
    """Split off the share of the data that calibrates a committee; it does not depend on the seeds of the run."""
    fraction = config.data.calibration_fraction
    return split(frames, fraction, 0, _labels(loss)) if fraction else (frames, [])


def _labels(loss: Loss) -> list[str]:
    """Labels with a weight in the loss."""
    return [name for name in ("energy", "forces", "virial") if getattr(loss, name)]


def _frames_of(option: str, paths: Sequence[Path], keys: LabelKeys, console: Console) -> list[Frame]:
    """Read the files behind an option, and print how many they are if that does not follow from the option."""
    sources = find_sources(paths)
    if sources.searched:
        console.print(f"{option}: {sources.text}", highlight=False, markup=False, soft_wrap=True)
    return read_frames(sources, keys)


def split(
    frames: Sequence[Frame], fraction: float, seed: int, labels: Sequence[str] = ()
) -> tuple[list[Frame], list[Frame]]:
    """Split off a random share of the structures for validation, at least one unless the fraction is 0.

    Structures that training needs, because no other has one of their elements or labels, are not split off.

    Args:
        frames: The structures.
        fraction: Share of the structures for validation.
        seed: Seed of the random numbers.
        labels: Labels that both parts must have: "energy", "forces" or "virial".

    Returns:
        Structures for training and for validation.

    Raises:
        ValueError: If no structure would be left to train on, or a part would lack a label.
    """
    count = max(1, round(fraction * len(frames))) if fraction else 0
    if count >= len(frames):
        raise ValueError(
            f"data.validation_fraction = {fraction} of {counted(len(frames), 'structure')} leaves none to train on; "
            "add structures or set it to 0"
        )
    held_out = _held_out(frames, np.random.default_rng(seed).permutation(len(frames)).tolist(), count, labels)
    return (
        [frame for i, frame in enumerate(frames) if i not in held_out],
        [frames[i] for i in sorted(held_out)],
    )


def _held_out(frames: Sequence[Frame], order: Sequence[int], count: int, labels: Sequence[str]) -> set[int]:
    """Indices of the first structures of the order that training can spare, and with which no label is missing."""
    if not count:
        return set()
    kinds: list[set[int | str]] = [
        {*frame.atomic_numbers.tolist(), *(label for label in labels if getattr(frame, label) is not None)}
        for frame in frames
    ]
    left = Counter(kind for own in kinds for kind in own)  # number of structures to train on with each kind
    chosen: set[int] = set()
    covered: set[int | str] = set()

    def choose(index: int) -> None:
        if index not in chosen and all(left[kind] > 1 for kind in kinds[index]):
            left.subtract(kinds[index])
            chosen.add(index)
            covered.update(kinds[index])

    for index in order:
        if len(chosen) < count:
            choose(index)
    for label in labels:
        for index in order:
            if label not in covered and label in kinds[index]:
                choose(index)
    missing = [label for label in labels if label not in covered]
    if missing or not chosen:
        raise ValueError(
            f"the {len(frames)} structures cannot be split: training needs every structure"
            + (f" with a label for {missing[0]}" if missing else "")
            + ", because of labels or elements that no other has; add structures, give data.validation, or set "
            "data.validation_fraction to 0"
        )
    return chosen


def _without_isolated_atoms(frames: Sequence[Frame], option: str, paths: Sequence[Path]) -> list[Frame]:
    """Return the structures to fit.

    Raises:
        ValueError: If all are free atoms.
    """
    found = without_isolated_atoms(frames)
    if not found:
        raise ValueError(
            f"all {len(frames)} structures of {option} = {', '.join(map(str, paths))} are free atoms, which define "
            "reference energies but are not fitted; add molecules or crystals"
        )
    return found


def _loss(options: TrainingOptions, frames: Sequence[Frame], console: Console) -> Loss:
    virial = options.virial_weight
    if virial == "auto":
        labelled = any(frame.virial is not None for frame in frames)
        virial = DEFAULT_VIRIAL_WEIGHT if labelled else 0.0
        reason = "there are stress or virial labels" if labelled else "there is no stress or virial label"
        console.print(f"training.virial_weight = {virial:g}, because {reason}")
    return Loss(options.energy_weight, options.forces_weight, virial, options.loss, options.huber_delta)
