"""Data of a run: reads and splits them, checks them, and prints what they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from dpa4.data import (
    Frame,
    LabelKeys,
    StreamedFrames,
    are_streamed,
    check_labels,
    check_trained,
    find_sources,
    is_isolated_atom,
    label_counts,
    open_streamed,
    read_frames,
    sampled,
    summarize,
    unusable_text,
    warn_of_implausible_labels,
    without_isolated_atoms,
)
from dpa4.data.frame import structure_digest
from dpa4.data.splitting import split
from dpa4.data.streaming import SAMPLE
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
    read = frames_of("data.train", config.data.train, keys, console)
    frames = without_isolated(read, "data.train", config.data.train)
    loss = _loss(config.training, frames, console)
    weights = {"energy": loss.energy, "forces": loss.forces, "virial": loss.virial}
    check_labels(frames, weights)
    free = _free_atoms(read)
    fraction = config.data.validation_fraction
    frames, left_out = _without_calibration(config, frames, loss)
    if config.data.validation:
        held_out = frames_of("data.validation", config.data.validation, keys, console)
        validation = without_isolated(held_out, "data.validation", config.data.validation)
        free += _free_atoms(held_out)
    else:
        frames, validation = split(frames, fraction, config.data.split_seed, _labels(loss))
    if isinstance(validation, StreamedFrames) and len(validation) <= SAMPLE:
        validation = list(validation)  # read once instead of at every validation
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
    if table := warn_of_implausible_labels([*sampled(frames), *sampled(validation)]):
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
        held_out = frames_of("data.validation", config.data.validation, keys, silent)
        return list(without_isolated(held_out, "data.validation", config.data.validation))
    read = frames_of("data.train", config.data.train, keys, silent)
    frames = without_isolated(read, "data.train", config.data.train)
    loss = _loss(config.training, frames, silent)
    return list(_without_calibration(config, frames, loss)[1])


def _without_calibration(
    config: RunConfig, frames: Sequence[Frame], loss: Loss
) -> tuple[Sequence[Frame], Sequence[Frame]]:
    """Split off the share of the data that calibrates a committee; it does not depend on the seeds of the run."""
    fraction = config.data.calibration_fraction
    return split(frames, fraction, 0, _labels(loss)) if fraction else (frames, [])


def _labels(loss: Loss) -> list[str]:
    """Labels with a weight in the loss."""
    return [name for name in ("energy", "forces", "virial") if getattr(loss, name)]


def frames_of(option: str, paths: Sequence[Path], keys: LabelKeys, console: Console) -> Sequence[Frame]:
    """Read the files behind an option, or open them if they are LMDB databases, and print what is not expected."""
    sources = find_sources(paths)
    if sources.searched:
        console.print(f"{option}: {sources.text}", highlight=False, markup=False, soft_wrap=True)
    if not are_streamed(sources.paths):
        return read_frames(sources, keys)
    frames = open_streamed(sources.paths, keys)
    if lost := unusable_text(frames):
        console.print(f"{option}: {lost}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return frames


def _free_atoms(frames: Sequence[Frame]) -> list[Frame]:
    """The free atoms; of structures on the disk at most `SAMPLE`."""
    if isinstance(frames, StreamedFrames):
        return list(frames.take(frames.free_atoms[:SAMPLE]))
    return [frame for frame in frames if is_isolated_atom(frame)]


def without_isolated(frames: Sequence[Frame], option: str, paths: Sequence[Path]) -> Sequence[Frame]:
    """Return the structures to fit.

    Raises:
        ValueError: If all are free atoms.
    """
    if isinstance(frames, StreamedFrames):
        found: Sequence[Frame] = frames.without(frames.free_atoms)
    else:
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
        labelled = label_counts(frames)["virial"] > 0
        virial = DEFAULT_VIRIAL_WEIGHT if labelled else 0.0
        reason = "there are stress or virial labels" if labelled else "there is no stress or virial label"
        console.print(f"training.virial_weight = {virial:g}, because {reason}")
    return Loss(options.energy_weight, options.forces_weight, virial, options.loss, options.huber_delta)
