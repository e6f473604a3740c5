"""Summary table of the structures, and checks of labels and elements before a run starts."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from rich.table import Table

from dpa4.data.charge_spin import stated_charge_and_spin
from dpa4.data.frame import Frame

LABELS = ("energy", "forces", "virial")


class IndexedFrames(Sequence[Frame], ABC):
    """Frames with an index that answers the questions of this file without reading them."""

    @abstractmethod
    def label_counts(self, used: bool = False) -> dict[str, int]:
        """Number of frames with each label; with ``used``, only of those whose weight is not zero."""

    @abstractmethod
    def elements(self) -> list[int]:
        """Atomic numbers that occur, sorted."""

    @abstractmethod
    def sizes(self) -> tuple[int, float, int]:
        """Smallest, mean and largest number of atoms; there must be a frame."""

    @abstractmethod
    def charges_and_spins(self) -> Counter[tuple[int | None, int | None]]:
        """Number of frames with each pair of a total charge and a multiplicity; None: not stated."""

    @abstractmethod
    def hidden(self) -> int:
        """Number of frames whose weight is zero."""

    @abstractmethod
    def first_outside(self, known: NDArray[np.bool_]) -> Frame | None:
        """First frame with an element that is not among the known ones, given by atomic number."""


def label_counts(frames: Sequence[Frame]) -> dict[str, int]:
    """Number of frames with each label."""
    if isinstance(frames, IndexedFrames):
        return frames.label_counts()
    return {name: sum(getattr(frame, name) is not None for frame in frames) for name in LABELS}


def elements_in(frames: Sequence[Frame]) -> list[str]:
    """Chemical symbols that occur, sorted by atomic number."""
    if isinstance(frames, IndexedFrames):
        return [chemical_symbols[z] for z in frames.elements()]
    numbers = [frame.atomic_numbers for frame in frames]
    return [chemical_symbols[z] for z in np.unique(np.concatenate(numbers))] if numbers else []


def summarize(frames_by_split: Mapping[str, Sequence[Frame]]) -> Table:
    """Table of structures, atoms, elements and labels, one row per split."""
    table = Table(title="Data", title_justify="left")
    table.add_column("")
    table.add_column("structures", justify="right")
    table.add_column("atoms min/mean/max", justify="right")
    table.add_column("elements")
    table.add_column("labels", no_wrap=True)
    for name, frames in frames_by_split.items():
        smallest, mean, largest = _sizes(frames) if len(frames) else (0, 0.0, 0)
        sizes = f"{smallest}/{mean:.1f}/{largest}" if largest else "-"
        table.add_row(name, str(len(frames)), sizes, " ".join(elements_in(frames)), _labels(frames, "\n"))
    return table


def charge_spin_text(frames: Sequence[Frame]) -> str:
    """Numbers of frames with each total charge and multiplicity, in one line; the ten most frequent ones."""
    if isinstance(frames, IndexedFrames):
        found = frames.charges_and_spins()
    else:
        found = Counter(stated_charge_and_spin(frame.charge_spin) for frame in frames)
    if set(found) <= {(None, None)}:
        return "charge and spin: not stated"
    shown = (
        ["not stated" if value is None else str(value) for value in (*pair, count)]
        for pair, count in found.most_common(10)
    )
    texts = [f"charge {charge}, multiplicity {spin}: {count}" for charge, spin, count in shown]
    return "; ".join(texts) + (f"; and {len(found) - 10} more pairs" if len(found) > 10 else "")


def check_labels(frames: Sequence[Frame], weights: Mapping[str, float], part: str = "training") -> None:
    """Check that every target with a non-zero weight has a label in some frame.

    Labels missing in some frames only are allowed: the loss masks them.

    Args:
        frames: Frames for training or validation.
        weights: Weight of "energy", "forces" and "virial" in the loss.
        part: Use of the frames, for the message: "training" or "validation".

    Raises:
        ValueError: If a target has no label in any frame; the message lists the labels found.
    """
    # A weight of zero hides the labels of a structure from training; validation errors have no weights.
    if part == "validation":
        counts, unused = label_counts(frames), 0
    elif isinstance(frames, IndexedFrames):
        counts, unused = frames.label_counts(used=True), frames.hidden()
    else:
        used = [frame for frame in frames if frame.weight]
        counts, unused = label_counts(used), len(frames) - len(used)
    for name, weight in weights.items():
        if weight and not counts[name]:
            hidden = f", {unused} with config_weight = 0" if unused else ""
            raise ValueError(
                f"training.{name}_weight = {weight:g}, but no {part} structure has a label for {name} "
                f"(found {_counted(counts, len(frames) - unused, ', ')}{hidden}); "
                "add the label, name it in data.keys, or set the weight to 0"
            )


def check_trained(validation: Sequence[Frame], training: Sequence[Frame]) -> None:
    """Check that all elements of the validation frames occur in the training frames.

    Raises:
        ValueError: If not; the message names the first such element and its frame.
    """
    for frame, element in frames_with_other_elements(validation, elements_in(training)):
        raise ValueError(
            f"element {element} of {frame.origin} is in the validation data, but in no structure to train on, so its "
            "errors would decide at random which model is the best; move structures with it to the training data, or "
            "remove them"
        )


def check_elements(frames: Sequence[Frame], elements: Sequence[str]) -> None:
    """Check that the model knows all elements of the frames.

    Raises:
        ValueError: If not; the message names the first unknown element and its frame.
    """
    for frame, element in frames_with_other_elements(frames, elements):
        raise ValueError(
            f"element {element} ({chemical_symbols.index(element)}) of {frame.origin} is not in model.elements "
            f"{list(elements)}; retrain with it or drop the structure"
        )


def frames_with_other_elements(
    frames: Sequence[Frame], elements: Sequence[str]
) -> Iterator[tuple[Frame, str]]:
    """Yield the frames with elements outside a list, each with the first such element."""
    known = np.zeros(len(chemical_symbols), dtype=bool)
    known[[chemical_symbols.index(e) for e in elements]] = True
    if isinstance(frames, IndexedFrames):
        first = frames.first_outside(known)
        frames = [] if first is None else [first]
    for frame in frames:
        if not known[frame.atomic_numbers].all():
            yield frame, chemical_symbols[frame.atomic_numbers[~known[frame.atomic_numbers]][0]]


def _labels(frames: Sequence[Frame], separator: str) -> str:
    """Label counts as text, such as "energy 50/50, forces 50/50, virial 12/50"."""
    return _counted(label_counts(frames), len(frames), separator)


def _counted(counts: Mapping[str, int], total: int, separator: str) -> str:
    return separator.join(f"{label} {count}/{total}" for label, count in counts.items())


def _sizes(frames: Sequence[Frame]) -> tuple[int, float, int]:
    if isinstance(frames, IndexedFrames):
        return frames.sizes()
    atoms = np.array([len(frame) for frame in frames])
    return int(atoms.min()), float(atoms.mean()), int(atoms.max())
