"""Random split of structures into those to train on and those to validate with."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dpa4.data import Frame


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
            f"data.validation_fraction = {fraction} of {len(frames)} structures leaves none to train on; "
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
