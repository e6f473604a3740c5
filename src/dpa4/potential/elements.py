"""Models without some of their elements: smaller files with the same results for all other elements."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dpa4.data.coverage import Coverage
from dpa4.model.config import ModelConfig, PairBridging, pair_names
from dpa4.potential.checkpoint import Checkpoint

TABLES = ("types.table", "seed.types.table")
"""Weights with one row per element and, at the end, a row of zeros."""


def with_elements(stored: Checkpoint, elements: Sequence[str]) -> Checkpoint:
    """Leave out all elements of a model but some, whose energies stay the same bit for bit.

    Args:
        stored: Content of a checkpoint.
        elements: Chemical symbols to keep, in any order; the order of the model is kept.

    Raises:
        ValueError: If the model lacks one of the elements.
    """
    config = stored.config
    if lacking := [e for e in elements if e not in config.elements]:
        raise ValueError(
            f"the model has no element {', '.join(lacking)}; it knows {', '.join(config.elements)}"
        )
    kept = [index for index, e in enumerate(config.elements) if e in set(elements)]
    if len(kept) == len(config.elements):
        return stored
    rows = torch.tensor([*kept, len(config.elements)])
    weights = {
        name: tensor[rows] if name in TABLES else tensor  # a copy without the rows of the other elements
        for name, tensor in stored.weights.items()
    }
    smaller = _config(config, tuple(config.elements[index] for index in kept))
    coverage = None if stored.coverage is None else _coverage(stored.coverage, smaller.elements)
    energies = stored.reference_energies[kept]
    return replace(
        stored, config=smaller, weights=weights, reference_energies=energies, coverage=coverage, digest=None
    )


def _config(config: ModelConfig, elements: tuple[str, ...]) -> ModelConfig:
    options = config.model_dump()
    options["elements"] = elements
    options["excluded_pairs"] = [pair for pair in config.excluded_pairs if set(pair) <= set(elements)]
    if isinstance(config.bridging, PairBridging):
        pairs = pair_names(elements)
        windows = {"outer": config.bridging.outer, "full": config.bridging.full}
        options["bridging"] |= {name: {p: found[p] for p in pairs} for name, found in windows.items()}
    return ModelConfig.model_validate(options)


def _coverage(coverage: Coverage, elements: Sequence[str]) -> Coverage:
    shortest = coverage.shortest
    if shortest is not None:
        shortest = {pair: length for pair, length in shortest.items() if set(pair) <= set(elements)}
    return Coverage(coverage.cutoff, tuple(e for e in coverage.elements if e in elements), shortest)
