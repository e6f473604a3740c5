"""YAML and JSON of files that anybody may have written, and short descriptions of the values found there."""

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_FILE = 1_000_000
"""Largest file of options, in bytes."""

MAX_VALUES = 20_000
"""Largest number of values in YAML; the parser needs two seconds for so many."""

MAX_DIGITS = 30
"""Longest integer. Python converts integers in quadratic time."""


class _Loader(yaml.SafeLoader):
    """Loader with the scalars of YAML 1.2: 1e-3 is a number, and the element No (nobelium) is not false.

    Aliases are refused, because a few lines of nested aliases stand for billions of values.
    """

    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_VALUES:,} values", self.peek_event().start_mark
            )
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"aliases such as *{event.anchor} are not supported", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        _check_digits(str(node.value))
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: If the file is larger than ``MAX_FILE``, or is not UTF-8 or not valid YAML.
        OSError: If the file cannot be read.
    """
    return parse_yaml(_read_text(path, "YAML"), str(path))


def read_json(path: Path) -> Any:
    """Read a JSON file; errors as in `read_yaml`."""
    return parse_json(_read_text(path, "JSON"), str(path))


def _read_text(path: Path, kind: str) -> str:
    if (size := path.stat().st_size) > MAX_FILE:
        raise ValueError(
            f"{path} has {size:,} bytes; a {kind} file of options may have at most {MAX_FILE:,}. Is it another file?"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8"
        ) from None


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML 1.2 without aliases.

    Args:
        text: The text.
        what: Name of the text in error messages.

    Raises:
        ValueError: If the text is not valid, with line and column.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{what} is not valid YAML: {at}{error.problem or error.context}") from None
    except RecursionError:
        raise ValueError(f"{what} is not valid YAML: it is nested too deeply") from None
    except Exception as error:  # the constructors of scalars raise many kinds of errors
        raise ValueError(f"{what} is not valid YAML: {first_line(error)}") from None


def parse_json(text: str, what: str) -> Any:
    """Parse JSON.

    Args:
        text: The text.
        what: Name of the text in error messages.

    Raises:
        ValueError: If the text is not valid.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"{what} is not valid JSON: it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} is not valid JSON: {first_line(error)}") from None


def shown(value: object) -> str:
    """Describe a value in at most some 200 characters, as ``repr`` if it is short; parts of long values are left out.

    Unlike ``repr``, the function is quick for nested containers that share their parts.
    """
    text = _short.repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def problem(entry: Mapping[str, Any]) -> str:
    """Message of an entry of ``ValidationError.errors()``, without the words that pydantic puts before ours."""
    return str(entry["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")


def printable(text: str) -> str:
    """Escape line breaks and control characters, with which a file could draw on the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """First line of the message of an error of another package, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 150, 60
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 8

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"an integer of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        plain = x is None or isinstance(x, bool | float | complex | bytes | Path)
        return super().repr_instance(x, level) if plain else f"<{type(x).__name__}>"


_short = _Short()


def _integer(digits: str) -> int:
    _check_digits(digits)
    return int(digits)


def _check_digits(digits: str) -> None:
    if len(digits) > MAX_DIGITS:
        raise ValueError(
            f"the integer {digits[:10]}... has {len(digits)} digits; at most {MAX_DIGITS} are read"
        )
