"""Random split of structures into a part to train on and a part that is held out."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dpa4.data.frame import Frame
from dpa4.data.streaming import SAMPLE, StreamedFrames
from dpa4.data.summary import LABELS
from dpa4.output import counted

_PERMUTED = 10**6  # structures on the disk up to which they are all permuted, as those in memory are


def split(
    frames: Sequence[Frame], fraction: float, seed: int, labels: Sequence[str] = ()
) -> tuple[Sequence[Frame], Sequence[Frame]]:
    """Split off a random share of the structures for validation, at least one unless the fraction is 0.

    Structures that training needs, because no other has one of their elements or labels, are not split off. Of
    structures on the disk at most `SAMPLE` are.

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
    random = np.random.default_rng(seed)
    if isinstance(frames, StreamedFrames):
        count = min(count, SAMPLE)
        if len(frames) <= _PERMUTED:
            order = random.permutation(len(frames))
        else:
            order = random.choice(len(frames), 4 * count, replace=False)
        left = Counter(frames.kind_counts())
        held_out = sorted(_held_out(len(frames), frames.kinds, left, order.tolist(), count, labels))
        return frames.without(np.array(held_out)), frames.take(np.array(held_out))
    kinds: list[set[int | str]] = [
        {*frame.atomic_numbers.tolist(), *(label for label in LABELS if getattr(frame, label) is not None)}
        for frame in frames
    ]
    left = Counter(kind for own in kinds for kind in own)
    order = random.permutation(len(frames))
    chosen = _held_out(len(frames), kinds.__getitem__, left, order.tolist(), count, labels)
    return (
        [frame for i, frame in enumerate(frames) if i not in chosen],
        [frames[i] for i in sorted(chosen)],
    )


def _held_out(
    total: int,
    all_kinds: Callable[[int], Iterable[int | str]],
    left: Counter[int | str],
    order: Sequence[int],
    count: int,
    labels: Sequence[str],
) -> set[int]:
    """Indices of the first structures of the order that training can spare, and with which no label is missing.

    Args:
        total: Number of structures.
        all_kinds: Function that gives the atomic numbers and the labels of a structure.
        left: Number of structures with each of them; afterwards, of those to train on.
        order: Indices of structures, in random order.
        count: Number of structures to hold out.
        labels: Labels that both parts must have.
    """
    if not count:
        return set()
    chosen: set[int] = set()
    covered: set[int | str] = set()

    def kinds(index: int) -> set[int | str]:
        return {kind for kind in all_kinds(index) if kind not in LABELS or kind in labels}

    def choose(index: int) -> None:
        own = kinds(index)
        if index not in chosen and all(left[kind] > 1 for kind in own):
            left.subtract(own)
            chosen.add(index)
            covered.update(own)

    for index in order:
        if len(chosen) < count:
            choose(index)
        else:
            break
    for label in labels:
        for index in order:
            if label in covered:
                break
            if label in kinds(index):
                choose(index)
    missing = [label for label in labels if label not in covered]
    if missing or not chosen:
        raise ValueError(
            f"the {total} structures cannot be split: training needs every structure"
            + (f" with a label for {missing[0]}" if missing else "")
            + ", because of labels or elements that no other has; add structures, give data.validation, or set "
            "data.validation_fraction to 0"
        )
    return chosen
