"""Run file: YAML to checked options, errors that name the option, the commented default file."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpa4.model.config import ModelConfig
from dpa4.model.presets import preset
from dpa4.parsing import parse_yaml, problem, read_yaml, shown
from dpa4.system import user_path
from dpa4.training.options import ModelOptions, RunConfig, unknown_option
from dpa4.training.recipes import Choice, estimate_text


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a run file.

    Relative paths in the file are relative to the working directory.

    Args:
        path: YAML file.
        overrides: Options that replace those of the file, such as ``"training.learning_rate=5e-4"``. Texts, such
            as names of files, are used as they are given; all other values are YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not YAML, an override is malformed, or an option is unknown or not allowed. For
            faulty options, the message has one line each with the option, its value and the allowed values.
    """
    path = user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"run file {path} does not exist; `dpa4 init` writes a starting file")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must be a map of options (model:, data:, training:, ...), got {type(values).__name__}"
        )
    changed = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} must look like training.learning_rate=5e-4")
        _set(values, key.strip(), _override(key.strip(), text.strip(), f"override {override!r}"))
        changed[key.strip()] = override
    return checked_run_config(values, str(path), changed)


def checked_run_config(
    values: Mapping[str, Any], what: str, overrides: Mapping[str, str] | None = None
) -> RunConfig:
    """Check the options of a run.

    Args:
        values: Options, as read from a file.
        what: Name of the options, for messages.
        overrides: Overrides as they were typed, by option; errors of these options name them.

    Raises:
        ValueError: If an option is unknown or not allowed.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = _faults(error, overrides or {})
        raise ValueError(f"{what} is not valid:\n{faults}") from None


def default_config_text(train: str = "train.xyz", name: str = "mini") -> str:
    """Commented run file to start from. Its comments are the descriptions of the fields, so they cannot drift.

    Args:
        train: Path of the training data.
        name: Name of a preset.

    Raises:
        ValueError: If there is no such preset.
    """
    start = preset(name, elements=("H",))
    config = RunConfig.model_validate({"model": {"preset": name}, "data": {"train": train}})
    extra = ["  # Any other option of the model may be added, for example:"]
    if start.edge_norm.radial:
        extra = [
            "  # The published models were trained with true; with false, energies are smoother at the cutoff.",
            "  edge_norm: false",
            *extra,
        ]
    for name in ("cutoff", "channels", "lmax"):
        extra.append(
            f"  # {name}: {_scalar(getattr(start, name))}  # {ModelConfig.model_fields[name].description}"
        )
    return _text(config, [], extra, {})


def recipe_text(train: Sequence[str], choice: Choice) -> str:
    """Commented run file of a recipe. The reason of each choice follows the description of the option.

    Args:
        train: Files, folders and patterns of the training data, as in ``data.train``.
        choice: Options and reasons.
    """
    values: dict[str, Any] = {"data": {"train": list(train)}}
    for key, value in choice.options.items():
        _set(values, key, value)
    config = checked_run_config(values, "the recipe")
    extra = []
    for name, value in (config.model.model_extra or {}).items():
        extra += _wrapped(ModelConfig.model_fields[name].description or "", "  ")
        extra += [*_wrapped(choice.reasons[f"model.{name}"], "  "), f"  {name}: {_scalar(value)}"]
    extra.append("  # Any other option of the model may be added (docs/models.md).")
    head = [
        *_wrapped(f"Recipe for {choice.source}."),
        *_wrapped(f"Estimate: {estimate_text(choice.estimate)}."),
    ]
    for warning in choice.warnings:
        head += _wrapped(f"Note: {warning}.")
    return _text(config, head, extra, choice.reasons)


def _text(config: RunConfig, head: Sequence[str], extra: Sequence[str], reasons: Mapping[str, str]) -> str:
    """Lines of a run file: head, options with comments, and further lines at the end of the model section."""
    first = "# Training run of dpa4. Energies are in eV, lengths in Angstrom. null means: not set."
    body = _commented(config, reasons)
    at = next(i for i, line in enumerate(body) if line.startswith("data:")) - 2
    return "\n".join([first, *head, "", *body[:at], *extra, *body[at:]]) + "\n"


def _wrapped(text: str, pad: str = "") -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")


def _commented(section: BaseModel, reasons: Mapping[str, str], parents: tuple[str, ...] = ()) -> list[str]:
    lines: list[str] = []
    pad = "  " * len(parents)
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        path = (*parents, name)
        if not parents and lines:
            lines.append("")
        lines += _wrapped(field.description or "", pad)
        lines += _wrapped(reasons.get(".".join(path), ""), pad)
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", *_commented(value, reasons, path)]
        else:
            lines.append(f"{pad}{name}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, tuple):
        return _scalar(value[0]) if len(value) == 1 else f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, float):
        return repr(value)
    text = yaml.safe_dump(str(value) if isinstance(value, Path) else value)
    return text.removesuffix("...\n").strip()


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key and create missing sections. Unknown names are left to the validation."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.setdefault(section, {}), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _override(key: str, text: str, what: str) -> Any:
    """Value of an override: the text itself for an option that is a text, else the text as YAML.

    Texts in quotes are YAML in any case. The entries of a list, such as ``[a.xyz, 0123]``, stay as they are, too.
    """
    kinds = _kinds(key)
    if not kinds & {str, Path}:
        return parse_yaml(text, what)
    if not text or (text == "null" and kinds & {tuple, type(None)}):
        return None
    is_list = tuple in kinds and text.startswith("[") and text.endswith("]")
    if text[0] in "'\"" or (is_list and re.search("['\"]", text)):
        return parse_yaml(text, what)
    return [entry.strip() for entry in text[1:-1].split(",") if entry.strip()] if is_list else text


def _kinds(key: str) -> set[Any]:
    """Types of an option, and of the entries if it is a list; empty for unknown options."""
    field, fields = None, RunConfig.model_fields
    for part in key.split("."):
        field = fields.get(part)
        if field is None:
            return set()
        section = field.annotation
        is_section = isinstance(section, type) and issubclass(section, BaseModel)
        fields = section.model_fields if is_section else {}  # type: ignore[union-attr]
    return set() if field is None else _parts(field.annotation)


def _parts(annotation: Any) -> set[Any]:
    """Members of a union and entries of a list, down to plain types."""
    if get_origin(annotation) in (Literal, dict):
        return {get_origin(annotation)}
    inner = [_parts(part) for part in get_args(annotation) if part is not Ellipsis]
    own = {get_origin(annotation)} if get_origin(annotation) is tuple else set()
    return own.union(*inner) if inner else {annotation}


def _faults(error: ValidationError, overrides: Mapping[str, str]) -> str:
    """Describe each faulty option in one line; the members of a union ("a number" or "'auto'") share a line."""
    lines: dict[str, str] = {}
    inner: dict[
        str, str
    ] = {}  # faults within the value of an option, which say more than that its type is wrong
    for e in error.errors():
        path, section = _option(e["loc"])
        key = ".".join(map(str, path))
        message = problem(e)
        message = re.sub(r"valid dictionary( or instance of \w+)?", "map of options", message)
        message = re.sub(r"(valid )?tuple", "list", message, flags=re.IGNORECASE).partition(", unable to")[0]
        nested = len(path) < len(e["loc"])  # in the value of an option that is a map or a list
        if nested and e["type"] in ("extra_forbidden", "missing"):
            fault = "an entry is missing" if e["type"] == "missing" else f"unknown entry {e['loc'][-1]!r}"
            inner.setdefault(key, f"{key}: {fault}. {section[path[-1]].description}")
        elif e["type"] == "extra_forbidden":
            lines[key] = unknown_option(key, section)
        elif e["type"] == "missing":
            lines[key] = f"option {key} is required: {section[path[-1]].description}"
        elif e["type"] == "value_error":
            lines[key] = message
        elif key in lines:
            other = message.removeprefix("Input should be ")
            lines[key] += "" if other in lines[key] else f" or {other}"
        else:
            lines[key] = f"{key} = {shown(e['input'])}: {message[0].lower()}{message[1:]}"
    named = [f"{line}{_origin(key, overrides)}" for key, line in (lines | inner).items()]
    more = [f"and {len(lines) - 20} more faults"] if len(lines) > 20 else []
    return "\n".join(f"  {line}" for line in [*named[:20], *more])


def _origin(key: str, overrides: Mapping[str, str]) -> str:
    """Name the overrides of a faulty option, or of the options in a faulty section; empty if there are none."""
    found = [
        shown(override)
        for name, override in overrides.items()
        if name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") or not key
    ]
    return f" (override {', '.join(found)})" if found else ""


def _option(location: tuple[int | str, ...]) -> tuple[list[Any], dict[str, FieldInfo]]:
    """Path of an option in one of pydantic's error locations, and the fields of the section that contains it.

    Entries of the location after the option are union members ("literal['auto']") and indices.
    """
    path: list[Any] = []
    fields = RunConfig.model_fields
    for part in location:
        path.append(part)
        annotation = fields[str(part)].annotation if str(part) in fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        if len(path) < len(location):
            fields = annotation.model_fields | (
                ModelConfig.model_fields if annotation is ModelOptions else {}
            )
    return path, fields
