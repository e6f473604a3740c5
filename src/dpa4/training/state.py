"""File with the state of a training run, from which the run resumes."""

from pathlib import Path
from typing import Any

import torch

from dpa4.output import write_torch

STATE_FORMAT = 1
STATE = "last.pt"  # in the output folder


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a training state, which holds tensors and plain Python values."""
    write_torch(path, {"format": STATE_FORMAT} | state)


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state onto the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not a training state, or of another format version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no training state {path} to resume from; train without --resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a training state: {error}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if found != STATE_FORMAT:
        raise ValueError(
            f"{path} is a training state of format {found}; this version reads format {STATE_FORMAT}"
        )
    return state
