"""Local file of the model that a user names; advice if that is a preset, a run folder or a training state."""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from dpa4.model.presets import DEEPMD_PRESETS, PRESETS
from dpa4.parsing import shown
from dpa4.system import require, user_path

HUB = "hf:"
"""Start of the names of files on the Hugging Face hub, hf:organisation/repository/file."""

WEIGHTS = 'docs/models.md, "Published weights", lists files with weights'
BEST, LAST, STATE = "best.safetensors", "last.safetensors", "last.pt"  # files of a run that matter here

_LISTED = 3  # model files of a folder in a message
_SEARCHED = 200  # entries of a folder that are looked at for one
_SUFFIXES = (".safetensors", ".pt")
_DEMO = "demo-run"  # folder that `make demo` writes
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
    raise FileNotFoundError(_absent_text(path))


def is_training_state(content: Mapping[Any, Any]) -> bool:
    """Return whether the content of a PyTorch file is the state of a training run, ``last.pt``."""
    return content.keys() >= _OF_STATES


def training_state_text(path: Path) -> str:
    """Message about a training state that was named in place of a model."""
    advice = _advice(path.parent)
    return f"{path} is the state of a training run, from which --resume continues, not a model; {advice}"


def _absent_text(path: Path) -> str:
    """Message about a file that does not exist: models with similar names, or the models where it was looked for."""
    absent = f"there is no model {path}"
    if _DEMO in path.parts:
        return f"{absent}; `make demo`, in a checkout of dpa4, trains it in a few minutes"
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = {str(file.relative_to(folder)): file for file in _models_near(folder)}
    wanted = str(path.relative_to(folder))
    if close := difflib.get_close_matches(wanted, names, n=_LISTED, cutoff=0.7):
        return f"{absent}; did you mean {' or '.join(str(names[name]) for name in close)}?"
    missing = path.parent if folder != path.parent else None
    where = f"there is no folder {missing}, and " if missing else ""
    place = folder.resolve()  # says which folder "." is
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return f"{absent}; {where}models in {place}: {', '.join(list(names)[:_LISTED])}{more}"
    return f"{absent}; {where}no model is in {place}; training writes run/{BEST}"


def _models_near(folder: Path) -> list[Path]:
    """Model files in a folder and in the folders in it, without training states, as far as it is searched."""
    found = []
    with suppress(OSError):  # a folder that may not be read
        for entry in sorted(islice(folder.iterdir(), _SEARCHED)):
            inside = sorted(islice(entry.iterdir(), _SEARCHED)) if entry.is_dir() else [entry]
            with suppress(OSError):
                found += [p for p in inside if p.suffix in _SUFFIXES and p.name != STATE and p.is_file()]
    return found


def _folder_text(folder: Path) -> str:
    if any((folder / name).is_file() for name in (BEST, LAST, STATE)):
        return f"{folder} is the folder of a training run, not a model; {_advice(folder)}"
    models = [str(path) for path in _models_near(folder)]
    examples = f", such as {', '.join(models[:_LISTED])}" if models else "; there is none in it"
    return f"{folder} is a folder, not a model; name a model file{examples}"


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
