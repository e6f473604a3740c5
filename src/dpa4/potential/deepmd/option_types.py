"""Exact types of options read from a file: a truth value is not a number, and a list is not a truth value."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from dpa4.model.config import MAX_BLOCKS
from dpa4.parsing import shown

MAX_OPTIONS = 100_000
"""Largest number of options of all branches of a checkpoint, entries of lists included."""


@dataclass(frozen=True)
class Kind:
    """Type of an option: a test of its values, and its description in error messages."""

    matches: Callable[[Any], bool]
    text: str


def is_whole(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_list(value: Any) -> TypeGuard[list | tuple]:
    """Return whether a value is a list or tuple."""
    return isinstance(value, list | tuple)


def _are_flags(value: Any, count: int) -> bool:
    return is_list(value) and len(value) == count and all(isinstance(entry, bool) for entry in value)


FLAG = Kind(lambda value: isinstance(value, bool), "true and false")
WHOLE = Kind(is_whole, "whole numbers")
NUMBER = Kind(is_number, "numbers")
TEXT = Kind(lambda value: isinstance(value, str), "texts")
WHOLES = Kind(lambda value: is_list(value) and all(is_whole(v) for v in value), "lists of whole numbers")
EDGE_NORM = Kind(
    lambda value: isinstance(value, bool) or _are_flags(value, 3), "true, false, and lists of three of these"
)
SANDWICH_NORM = Kind(lambda value: _are_flags(value, 4), "lists of four truth values")
EXPONENTS = Kind(
    lambda value: is_whole(value) or (is_list(value) and len(value) == 2 and all(map(is_whole, value))),
    "whole numbers, and lists of two of these",
)
OUTPUT_BIAS = Kind(
    lambda value: value is None or isinstance(value, str | Mapping),
    "a map of outputs, the name of a table, or null",
)
ENERGIES = Kind(
    lambda value: value is None or (is_list(value) and all(v is None or is_number(v) for v in value)),
    "a list of energies or null",
)


def unsupported(option: str, value: object, supported: str) -> ValueError:
    """Error that names an option, its value, and the values that are supported."""
    return ValueError(f"{option} = {shown(value)} is not supported; supported: {supported}")


def check_kinds(options: Mapping[str, Any], section: str, kinds: Mapping[str, Kind]) -> None:
    """Check the types of the options that are present.

    Raises:
        ValueError: If an option has another type than its kind.
    """
    for option, kind in kinds.items():
        if option in options and not kind.matches(options[option]):
            raise unsupported(f"{section}.{option}", options[option], kind.text)


def is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Return whether a value equals one of several, with the same type; texts regardless of case."""
    value = value.lower() if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
    return any(type(value) is type(other) and value == other for other in accepted)


def pair(option: str, value: Any) -> tuple[bool, bool]:
    """Two truth values; one stands for both.

    Raises:
        ValueError: If ``value`` is anything else.
    """
    values = tuple(value) if is_list(value) else (value, value)
    if len(values) != 2 or not all(isinstance(v, bool) for v in values):
        raise unsupported(f"descriptor.{option}", value, "true, false, or a list of two of these")
    return values


def whole(option: str, value: Any, lowest: int, highest: int = MAX_BLOCKS) -> int:
    """Whole number within limits.

    Raises:
        ValueError: If ``value`` is anything else.
    """
    if not is_whole(value) or not lowest <= value <= highest:
        raise unsupported(f"descriptor.{option}", value, f"whole numbers from {lowest} to {highest}")
    return value


def whole_numbers(option: str, value: Any) -> list[int]:
    """Whole numbers >= 0, one per block.

    Raises:
        ValueError: If ``value`` is anything else.
    """
    if not is_list(value) or not 1 <= len(value) <= MAX_BLOCKS:
        raise unsupported(f"descriptor.{option}", value, f"a list of 1 to {MAX_BLOCKS} whole numbers")
    return [whole(option, entry, 0) for entry in value]


def type_pairs(option: str, value: Any, types: int) -> list[tuple[int, int]]:
    """Pairs of indices below ``types``; none for None.

    Raises:
        ValueError: If ``value`` is anything else.
    """
    if value is None:
        return []
    if not is_list(value) or not all(
        is_list(pair) and len(pair) == 2 and all(is_whole(i) and 0 <= i < types for i in pair)
        for pair in value
    ):
        raise unsupported(option, value, f"pairs of indices below {types}")
    return [(pair[0], pair[1]) for pair in value]


def check_plain(options: object) -> None:
    """Check that options are nested maps and lists of texts, numbers, truth values and None.

    Raises:
        ValueError: If there is anything else, or more of it than any model has.
    """
    remaining = [(options, "model_params", 0)]
    for count in range(MAX_OPTIONS + 1):
        if not remaining:
            return
        value, name, depth = remaining.pop()
        if depth > 20 or count == MAX_OPTIONS:
            raise ValueError("its model_params are nested too deeply or have too many entries")
        if isinstance(value, Mapping):
            if any(not isinstance(key, str) for key in value):
                raise ValueError(f"{name} has keys that are not texts: {shown(list(value))}")
            remaining += [(entry, f"{name}.{key}", depth + 1) for key, entry in value.items()]
        elif is_list(value):
            remaining += [(entry, name, depth + 1) for entry in value]
        elif value is not None and not isinstance(value, str | int | float):
            raise ValueError(f"{name:.200} has a value of type {type(value).__name__}, not a text or number")
