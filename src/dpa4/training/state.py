"""File with the state of a training run, from which the run resumes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dpa4.data import Coverage
from dpa4.model import ModelConfig
from dpa4.output import write_torch
from dpa4.parsing import parse_yaml, shown
from dpa4.potential.deepmd.options import first_problem
from dpa4.potential.model_file import STATE as STATE
from dpa4.potential.pytorch_file import load_pytorch
from dpa4.potential.verification import check_values, differences, listed

STATE_FORMAT = 1
DATA = ("training", "validation")
PROVENANCE = ("training data", "validation data")


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a training state, which holds tensors and plain Python values."""
    write_torch(path, {"format": STATE_FORMAT} | state)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state onto the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not a training state, or of another format version; also if an entry is
            missing, of another type, or has weights that are not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no training state {path} to resume from; train without --resume first")
    state = load_pytorch(path)
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is not a training state; resuming needs the last.pt of the run")
    if not isinstance(state["format"], int) or state["format"] != STATE_FORMAT:
        raise ValueError(
            f"{path} is a training state of format {shown(state['format'])}; this version reads format {STATE_FORMAT}"
        )
    try:
        _check_entries(state)
        check_values((key, value) for key, value in state["potential"].items())
    except ValueError as error:
        raise ValueError(f"cannot resume from {path}: {error}") from None
    return state


def check_fits(state: dict[str, Any], potential: Mapping[str, Tensor], path: Path) -> None:
    """Compare the names and shapes of the weights of a training state with those of a potential.

    Args:
        state: State read with `load_state`.
        potential: State dict of the potential.
        path: File of the state, for the message.

    Raises:
        ValueError: If they differ.
    """
    found = {key: value.shape for key, value in state["potential"].items()}
    problems = differences({key: value.shape for key, value in potential.items()}, found)
    if problems:
        raise ValueError(f"{path} belongs to another model: {listed(problems)}")


def _check_entries(state: dict[str, Any]) -> None:
    for name in ("step", "epoch", "batch", "stale", "summed"):
        _check_steps(name, _entry(state, name, int))
    if "labelled" in state:
        for name, steps in _entry(state, "labelled", dict).items():
            _check_steps(f"labelled.{shown(name)}", steps)
    for name in ("best_score", "seconds"):
        value = _entry(state, name, int | float)
        if not (abs(value) < 2**62 or value == math.inf):
            raise ValueError(f"its entry {name} is {shown(value)}, not a number")
    if not isinstance(parse_yaml(_entry(state, "options", str), "its entry options"), dict):
        raise ValueError(f"its entry options is {shown(state['options'])}, not a map of options")
    _entry(state, "optimizer", dict)
    _entry(state, "average", list | None)
    if (factors := state.get("low_rank")) is not None:
        if not isinstance(factors, dict) or not all(isinstance(part, dict) for part in factors.values()):
            raise ValueError(f"its entry low_rank is {shown(factors)}, not a map of factors")
        check_values((f"low_rank.{p}.{n}", t) for p, part in factors.items() for n, t in part.items())
    if (references := state.get("replay")) is not None and not (
        isinstance(references, dict)
        and all(isinstance(v, float) and math.isfinite(v) for v in references.values())
    ):
        raise ValueError(f"its entry replay is {shown(references)}, not a reference energy per element")
    _entry(state, "sums", Tensor)
    if "errors" in state and _entry(state, "errors", Tensor).shape != (2, 3):
        raise ValueError(f"its entry errors has the shape {tuple(state['errors'].shape)}, not (2, 3)")
    tensors = _entry(state, "potential", dict), _entry(state, "random", dict)
    for name, value in (entry for group in tensors for entry in group.items()):
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its entry {shown(name)} is {shown(value)}, not a tensor")
    if "cpu" not in state["random"]:
        raise ValueError("it has no entry random.cpu")
    if state["potential"].get("reference_energies", torch.zeros(())).dim() != 1:
        raise ValueError("its entry potential.reference_energies is not one energy per element")
    _check_origin(state)


def _check_steps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise ValueError(f"its entry {name} is {shown(value)}, not a number of steps")


def _check_origin(state: dict[str, Any]) -> None:
    """Check the entries about model and data, which states of earlier versions lack."""
    if "config" not in state:
        return
    try:
        ModelConfig.model_validate_json(_entry(state, "config", str))
    except ValidationError as error:
        raise ValueError(f"its configuration is not valid: {first_problem(error)}") from None
    for name in ("coverage", "earlier_coverage"):
        if state.get(name) is not None:
            Coverage.from_json(_entry(state, name, str))
    if _entry(state, "first_epoch", int) < 0:
        raise ValueError(f"its entry first_epoch is {shown(state['first_epoch'])}, not a number of epochs")
    texts = [*_entry(state, "undetermined", list)]
    for entry in (
        _entry(state, "data", dict),
        _entry(state, "provenance", dict),
        *_entry(state, "history", list),
    ):
        if not isinstance(entry, dict):
            raise ValueError(f"its entry history has {shown(entry)}")
        texts += [*entry, *entry.values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its entries undetermined, data, provenance and history must be texts")
    for entry, names in (
        (state["data"], DATA),
        *((h, PROVENANCE) for h in (state["provenance"], *state["history"])),
    ):
        if missing := [name for name in names if name not in entry]:
            raise ValueError(f"it does not say {', '.join(missing)} of its data")


def _entry(state: dict[str, Any], name: str, kind: Any) -> Any:
    if name not in state:
        raise ValueError(f"it has no entry {name}")
    if not isinstance(state[name], kind):
        raise ValueError(f"its entry {name} is {shown(state[name])}, not of type {kind}")
    return state[name]
