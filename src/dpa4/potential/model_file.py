"""Local file of the model that a user names; advice if that is a preset, a run folder or a training state."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpa4.model.presets import DEEPMD_PRESETS, PRESETS
from dpa4.parsing import shown
from dpa4.system import require, user_path

HUB = "hf:"
"""Start of the names of files on the Hugging Face hub, hf:organisation/repository/file."""

WEIGHTS = 'docs/models.md, "Published weights", lists files with weights'
BEST, LAST, STATE = "best.safetensors", "last.safetensors", "last.pt"  # files of a run that matter here
SUFFIXES = (".safetensors", ".pt")
DEMO = "demo-run"
"""Folder that make demo writes; the examples of the documentation name its model."""

_LISTED = 3  # model files of a folder in a message
_OF_STATES = frozenset(("format", "potential", "optimizer", "random"))


def model_file(source: str | Path) -> Path:
    """Path of a model file; files on the Hugging Face hub are downloaded once, to its cache.

    Args:
        source: Path, or ``hf:organisation/repository/file``.

    Raises:
        FileNotFoundError: If there is no such file, or the name is that of a preset.
        ImportError: If the file is on the hub and huggingface_hub is not installed.
        OSError: If the file cannot be downloaded.
        ValueError: If the path is a folder, or the name of a file on the hub is malformed.
    """
    if str(source).startswith(HUB):
        return _downloaded(str(source))
    path = user_path(source)
    if path.is_dir():
        raise ValueError(_folder_text(path))
    if path.is_file():
        return path
    if str(source).lower() in PRESETS | DEEPMD_PRESETS:
        raise FileNotFoundError(
            f"{source} is a preset, an architecture without weights, and no preset has weights here; train it "
            f"(model.preset: {source}), or name a file: {WEIGHTS}"
        )
    raise FileNotFoundError(missing_text(path))


def missing_text(path: Path) -> str:
    """Message about a model file that does not exist, with the model files of its folder."""
    text, folder = f"there is no model file {path}", path.parent
    if DEMO in path.parts:
        text += f"; make demo, at the top of the checkout, writes {DEMO}"
    if not folder.is_dir():
        return f"{text}; there is no folder {folder.absolute()}"
    names = [model.name for model in _models(folder)]
    if near := difflib.get_close_matches(path.name, names, 1):
        return f"{text}; did you mean {folder / near[0]}?"
    listed = ", ".join(names[:_LISTED]) + (
        f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    )
    return f"{text}; model files in {folder.absolute()}: {listed or 'none'}"


def is_training_state(content: Mapping[Any, Any]) -> bool:
    """Return whether the content of a PyTorch file is the state of a training run, ``last.pt``."""
    return content.keys() >= _OF_STATES


def training_state_text(path: Path) -> str:
    """Message about a training state that was named in place of a model."""
    advice = _advice(path.parent)
    return f"{path} is the state of a training run, from which --resume continues, not a model; {advice}"


def _folder_text(folder: Path) -> str:
    if any((folder / name).is_file() for name in (BEST, LAST, STATE)):
        return f"{folder} is the folder of a training run, not a model; {_advice(folder)}"
    models = [str(path) for path in _models(folder)]
    examples = f", such as {', '.join(models[:_LISTED])}" if models else "; there is none in it"
    return f"{folder} is a folder, not a model; name a model file{examples}"


def _models(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.name != STATE]
    except OSError:  # a folder that may not be listed
        return []


def _advice(run: Path) -> str:
    """Advice on the file to take from the folder of a run."""
    best, last = run / BEST, run / LAST
    if best.is_file():
        newest = f" ({last} is the newest one)" if last.is_file() else ""
        return f"take {best}, the model with the lowest validation error so far{newest}"
    if last.is_file():
        return f"take {last}, the newest model; there is no {BEST} yet"
    return f"the run has not saved a model yet: continue it with dpa4 train {run / 'run.yaml'} --resume"


def _downloaded(name: str) -> Path:
    parts = name.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise ValueError(f"model {shown(name)} must look like hf:organisation/repository/file")
    owner, repository, file = parts
    hub = require("huggingface_hub", "hub")
    try:
        return Path(hub.hf_hub_download(repo_id=f"{owner}/{repository}", filename=file))
    except Exception as error:  # errors of the network, of the hub and of the names are of many kinds
        raise OSError(
            f"cannot download {name} from the Hugging Face hub: {_one_line(error)}; check the name and the "
            "connection, or download the file and give its path"
        ) from error


def _one_line(error: Exception) -> str:
    """Message of an error of the hub, whose first line is often only a number of the request."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
