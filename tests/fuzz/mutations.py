"""Mutations of bytes and of nested values, from a seeded generator."""

import copy
import random
from collections.abc import Callable
from typing import Any

CONSTANTS = (0, 1, 0x7F, 0x80, 0xFF)


def mutated_bytes(rng: random.Random, data: bytes, head: int = 200) -> bytes:
    """Change, cut or repeat a few bytes, in half of the cases among the first or last ``head`` bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_BYTES)(rng, changed, head)
    return bytes(changed)


def _place(rng: random.Random, data: bytearray, head: int) -> int:
    last = max(len(data) - 1, 0)
    where = rng.random()
    if where < 0.4:
        return rng.randint(0, min(head, last))
    return rng.randint(max(0, last - head), last) if where < 0.5 else rng.randint(0, last)


def _flip(rng: random.Random, data: bytearray, head: int) -> None:
    if data:
        data[_place(rng, data, head)] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, head: int) -> None:
    if data:
        data[_place(rng, data, head)] = rng.choice((*CONSTANTS, rng.randrange(256)))


def _digits(rng: random.Random, data: bytearray, head: int) -> None:
    """Replace one number in text by another."""
    places = [i for i, byte in enumerate(data[:4000]) if 48 <= byte < 58]
    if places:
        at = rng.choice(places)
        data[at : at + 1] = rng.choice((b"9" * 12, b"-1", b"1e308", b"nan", b"0", b"1" * 400, b"x"))


def _integer(rng: random.Random, data: bytearray, head: int) -> None:
    """Overwrite four or eight bytes by a number that is often a limit."""
    value = rng.choice(
        (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data), rng.getrandbits(40))
    )
    size = rng.choice((2, 4, 8))
    at = _place(rng, data, head)
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def _cut(rng: random.Random, data: bytearray, head: int) -> None:
    del data[_place(rng, data, head) :]


def _remove(rng: random.Random, data: bytearray, head: int) -> None:
    at = _place(rng, data, head)
    del data[at : at + rng.choice((1, 2, 8, 64, 1000))]


def _repeat(rng: random.Random, data: bytearray, head: int) -> None:
    at = _place(rng, data, head)
    part = data[at : at + rng.choice((1, 8, 64, 1000))]
    data[at:at] = part * rng.choice((1, 2, 50))


def _zero(rng: random.Random, data: bytearray, head: int) -> None:
    at = _place(rng, data, head)
    size = min(rng.choice((4, 64, 1000)), len(data) - at)
    data[at : at + size] = bytes(size)


def _noise(rng: random.Random, data: bytearray, head: int) -> None:
    at = _place(rng, data, head)
    data[at:at] = rng.randbytes(rng.choice((1, 16, 300)))


def _append(rng: random.Random, data: bytearray, head: int) -> None:
    data += rng.choice((b"\0", b"PK\x05\x06" + bytes(18), rng.randbytes(100), bytes(data[:500])))


_BYTES = (_flip, _flip, _flip, _set, _set, _digits, _integer, _cut, _remove, _repeat, _zero, _noise, _append)


def nested(depth: int) -> list:
    """List in a list in a list."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: 0, lambda: -1, lambda: 3, lambda: 10**6, lambda: 10**20, lambda: 10**400,
    lambda: -(10**12), lambda: 0.5, lambda: -0.0, lambda: 1e-300, lambda: 1e300, lambda: float("nan"),
    lambda: float("inf"), lambda: "", lambda: "x", lambda: "x" * 20_000, lambda: "NaN", lambda: "1", lambda: "\x00",
    lambda: "\ud7ff²", lambda: "../../x", lambda: [], lambda: {}, lambda: [1, 2], lambda: [None], lambda: {"a": {}},
    lambda: nested(50), lambda: nested(400), lambda: [3] * 20_000, lambda: ["H"] * 200, lambda: {"x" * 300: 1},
)  # fmt: skip
"""Values to try in the place of any other; functions, because some are large."""


def mutated_value(rng: random.Random, value: Any) -> Any:
    """Copy nested maps and lists, and replace, remove, rename, repeat or exchange a few entries."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)()
        container, key = rng.choice(places)
        other, other_key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            container[key] = rng.choice(VALUES)()
        elif action < 0.7:
            del container[key]
        elif action < 0.8 and isinstance(container, dict):
            name = rng.choice((f"{key}x", f"{key}"[:-1], "", 3, "format"))
            container[name] = container.pop(key)
        elif action < 0.9:
            container[key] = copy.deepcopy(other[other_key])
        elif isinstance(container, list):
            container += copy.deepcopy(container) * rng.choice((1, 30))
        else:
            container[key] = [container[key]]
    return value


def _places(value: Any) -> Any:
    """Container and key of every entry of nested maps and lists."""
    stack = [value]
    while stack:
        container = stack.pop()
        if isinstance(container, dict):
            entries = list(container.items())
        elif isinstance(container, list):
            entries = list(enumerate(container[:50]))
        else:
            continue
        for key, entry in entries:
            yield container, key
            stack.append(entry)
