"""Comparison of a run to resume with its state: options and data that must stay, and those that have changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa4.parsing import parse_yaml

FIXED = (
    "model.", "training.optimizer", "training.adam_for_basis", "training.ema_decay", "training.finetune.",
)  # fmt: skip
"""Beginnings of the options that must stay the same."""

_LACKING = (
    "training.adam_for_basis: None -> False",
    "model.symmetry: None -> O3",
    "data.calibration_fraction: None -> 0.0",
    "model.start_ema: None -> False",
    "training.finetune.freeze: None -> []",
    "training.finetune.depth_decay: None -> 1.0",
    "data.replay.files: None -> []",
    "data.replay.share: None -> 0.5",
)
"""Defaults of options that states of earlier versions lack."""


def changes_of_run(
    state: Mapping[str, Any], options: str, data: Mapping[str, str], file: Path, new_data: bool
) -> tuple[list[str], list[str]]:
    """Compare options and data of a run with those of the state to resume from.

    Args:
        state: The state.
        options: Options of the run as YAML.
        data: Digests of its data.
        file: File of the state, for messages.
        new_data: Whether other data are allowed.

    Returns:
        The options that have changed, as "training.seed: 0 -> 1", and the names of the data that have.

    Raises:
        ValueError: If an option or data have changed that must stay the same.
    """
    changed = [c for c in changed_options(state["options"], options) if c not in _LACKING]
    if (
        "config" not in state
    ):  # of an earlier version, in which models had no repulsion unless an option said so
        changed = [c for c in changed if c != "model.bridging: None -> auto"]
    if fixed := [c for c in changed if c.startswith(FIXED)]:
        raise ValueError(
            f"{file} cannot be resumed with other options: {'; '.join(fixed)}. Restore them or choose another output"
        )
    found = state.get("data")  # absent in states of earlier versions
    others = [name for name, own in data.items() if found and found[name] != own]
    if others and not new_data:
        raise ValueError(
            f"the {' and '.join(others)} data are not those of {file}; restore files, keys and split, or continue on "
            "the new data with --resume --new-data"
        )
    return changed, others


def changed_options(old: str, new: str) -> list[str]:
    """List the options that differ between the YAML of two runs, as "training.seed: 0 -> 1"."""
    before, after = _flat(parse_yaml(old, "the former run file")), _flat(parse_yaml(new, "the run file"))
    keys = [k for k in before | after if before.get(k) != after.get(k)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
