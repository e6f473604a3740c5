"""Replay: data of the start in the batches of fine-tuning, so that the model does not forget them.

Start and new data may be of different levels of theory, whose energies differ mainly by a constant per element. Both
share the network, and each has its own reference energies. A potential has one set of them, that of the new data, so
the labels of the replayed structures are moved by the difference: the errors are the same, and nothing in the model
or in a training step needs to know of two levels (docs/adr/0030).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ase.data import chemical_symbols

from dpa4.data import Batch, EpochBatches, Frame, FrameDataset, charges_and_spins, check_elements
from dpa4.model import ModelConfig
from dpa4.training.options import DataOptions
from dpa4.training.run_data import split

Extension = Callable[[Batch, int, int], Batch]
"""Function that adds structures to a batch, given the epoch and the number of the batch."""


class Replay(NamedTuple):
    """Data of the start in a run.

    Attributes:
        add: Function that adds structures to a batch, for `EpochBatches`.
        validation: Structures that are held out, for the errors on data of the start, if any.
        references: Reference energy of each element in the start, in eV.
    """

    add: "ReplayedBatches"
    validation: EpochBatches | None
    references: dict[str, float]


class ReplayedBatches:
    """Structures of the start for every batch, determined by seed, epoch and number of the batch.

    Args:
        batches: The structures; those of a batch are one batch of these.
    """

    def __init__(self, batches: EpochBatches):
        self.batches = batches
        self._of_epoch: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, batch: Batch, epoch: int, number: int) -> Batch:
        """Append structures to batch ``number`` of an epoch. Large data are used in part, small ones repeatedly."""
        known, indices = self._of_epoch
        if known != epoch:
            indices = self.batches.indices(epoch)
            self._of_epoch = epoch, indices
        return batch.joined(self.batches.dataset.batch(indices[number % len(indices)]))


def combined(extensions: Sequence[Extension]) -> Extension | None:
    """Function that adds structures of several kinds, in their order; None without any."""

    def extend(batch: Batch, epoch: int, number: int) -> Batch:
        for extension in extensions:
            batch = extension(batch, epoch, number)
        return batch

    return extend if extensions else None


def replay_of(
    frames: Sequence[Frame],
    options: DataOptions,
    model: ModelConfig,
    references: Mapping[str, float],
    present: Mapping[str, float],
    budget: Mapping[str, int],
    seed: int,
) -> Replay:
    """Prepare data of the start for replay.

    Args:
        frames: Structures of the start without free atoms.
        options: Options of the data: share of the structures to hold out, and seed of the split.
        model: Configuration of the model.
        references: Reference energy of each element of the model in the start, in eV.
        present: Reference energy of each element now, in eV.
        budget: Limits of the part of a batch for these structures, see `EpochBatches`.
        seed: Seed of their order.

    Raises:
        ValueError: If an element is outside the model, no structure has a label, or the split is impossible.
    """
    check_elements(frames, model.elements)
    if not any(f.energy is not None or f.forces is not None for f in frames):
        raise ValueError(
            f"no structure of data.replay.files = {', '.join(map(str, options.replay.files))} has an energy or "
            "forces; name the labels in data.keys, or remove the option"
        )
    moved = moved_energies(frames, references, present)
    train, held_out = split(moved, options.validation_fraction, options.split_seed)

    def batches(part: Sequence[Frame], **order: Any) -> EpochBatches:
        pairs = charges_and_spins(part, model.charge_spin, model.default_charge_spin)
        order |= budget
        return EpochBatches(FrameDataset(part, model.cutoff, pairs), **order)

    return Replay(
        add=ReplayedBatches(batches(train, seed=seed, shuffle=True)),
        validation=batches(held_out, shuffle=False) if held_out else None,
        references=dict(references),
    )


def moved_energies(
    frames: Sequence[Frame], references: Mapping[str, float], present: Mapping[str, float]
) -> list[Frame]:
    """Move energies from the reference energies of one level of theory to those of another.

    Args:
        frames: The structures.
        references: Reference energy of each element that belongs to the energies, in eV.
        present: Reference energy of each element to move to, in eV.

    Returns:
        The structures, of which those with an energy have sum(present - references) over their atoms more.
    """
    change = {chemical_symbols.index(e): present[e] - value for e, value in references.items()}
    return [
        f
        if f.energy is None
        else replace(f, energy=f.energy + sum(change[z] for z in f.atomic_numbers.tolist()))
        for f in frames
    ]


def divided(budget: Mapping[str, int], share: float) -> tuple[dict[str, int], dict[str, int]]:
    """Divide the limits of a batch between new data and replayed ones, with at least one structure for each.

    Args:
        budget: Limits of a batch, see `EpochBatches`.
        share: Share of the replayed data.

    Returns:
        Limits for the new and for the replayed data.

    Raises:
        ValueError: If a batch holds one structure.
    """
    for name, limit in budget.items():
        if limit < 2:
            raise ValueError(
                f"training.{name} = {limit} has no room for both new and replayed structures; set it to 2 or more, "
                "or remove data.replay.files"
            )
    replayed = {name: min(max(1, round(share * limit)), limit - 1) for name, limit in budget.items()}
    return {name: limit - replayed[name] for name, limit in budget.items()}, replayed
