"""Saving and loading potentials: one safetensors file with the weights, and a description in its metadata.

The weights keep their names and precision; ``reference_energies`` is an additional float64 tensor. The metadata can
be read without the weights. They hold the format version and, as JSON, the configuration, elements, reference
energies, provenance and, for models trained with this package, the coverage of the training data. Checkpoints of
deepmd-kit can be read wherever native ones can.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpa4 import __version__
from dpa4.data.coverage import Coverage
from dpa4.model import ModelConfig
from dpa4.output import atomic_write
from dpa4.potential.deepmd.options import first_problem
from dpa4.potential.deepmd.reader import read_deepmd
from dpa4.potential.deepmd.writer import export_deepmd
from dpa4.potential.potential import Potential
from dpa4.system import float32_by_default, own_settings

FORMAT = "dpa4"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
_NETWORK = "model."


@dataclass(frozen=True)
class Checkpoint:
    """Content of a native or deepmd-kit checkpoint."""

    config: ModelConfig
    weights: dict[str, Tensor]  # state dict of the network
    reference_energies: Tensor  # (T,) float64, eV
    dtype: torch.dtype  # of the network
    provenance: dict[str, str]
    format: str
    coverage: Coverage | None = None  # of the training data, if the file contains it


@own_settings
def save_potential(
    potential: Potential, path: str | Path, provenance: Mapping[str, str] | None = None
) -> None:
    """Write a potential to a native checkpoint; an existing file is replaced atomically.

    Args:
        potential: The potential; its weights are stored in their own precision.
        path: File to write, ending in ``.safetensors``.
        provenance: Origin of the potential, such as data and parent file; the version of dpa4 and the date are
            added.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        ValueError: If the name does not end in ``.safetensors``.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(
            f"checkpoints end in {SUFFIX}, got {path.name!r}; `dpa4 convert` writes deepmd-kit's .pt"
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in potential.state_dict().items()}
    energies = dict(zip(potential.elements, tensors["reference_energies"].tolist(), strict=True))
    origin = {"dpa4 version": __version__, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": potential.config.model_dump_json(),
        "elements": json.dumps(potential.elements),
        "reference_energies": json.dumps(energies),
        "provenance": json.dumps(origin | dict(provenance or {})),
    }
    if potential.coverage is not None:
        metadata["coverage"] = potential.coverage.to_json()
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


def add_coverage(path: Path, coverage: Coverage) -> None:
    """Add the coverage of the training data to a native checkpoint that contains no distances yet."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    stored = _coverage(path, metadata)
    if stored is None or stored.shortest is None:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata | {"coverage": coverage.to_json()})


@own_settings
@float32_by_default()
def load_potential(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Literal["float32", "float64"] | None = None,
    branch: str | None = None,
) -> Potential:
    """Load a potential in evaluation mode from a native or deepmd-kit checkpoint.

    Args:
        path: The checkpoint; its content, not its name, determines the format.
        device: Device of the potential; unlike the calculators, the CPU by default.
        dtype: Floating-point type of the network, float32 or float64; by default that of the file. Energies are
            always float64.
        branch: Branch of a multitask model of deepmd-kit.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or is not a supported DPA4 model, or the dtype is another one.
    """
    if isinstance(dtype, str):
        dtype = {"float32": torch.float32, "float64": torch.float64}.get(dtype, dtype)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
    stored = read_checkpoint(path, branch)
    return _assemble(path, stored, dtype or stored.dtype).to(device)


@own_settings
@float32_by_default()
def convert(source: str | Path, target: str | Path, branch: str | None = None) -> None:
    """Convert a checkpoint to the format given by the suffix of ``target``: .safetensors, or .pt for deepmd-kit.

    Raises:
        FileNotFoundError: If there is no such file, or the folder of ``target`` does not exist.
        ValueError: If the file cannot be read, the suffix of ``target`` is unknown, or deepmd-kit has no
            model with the same results.
    """
    source, target = Path(source), Path(target)
    if target.suffix not in (SUFFIX, ".pt"):
        raise ValueError(f"cannot convert to {target.name!r}; the target must end in {SUFFIX} or .pt")
    stored = read_checkpoint(source, branch)
    potential = _assemble(source, stored, stored.dtype)
    parent = {"parent file": source.name, "parent format": stored.format}
    if target.suffix == ".pt":
        export_deepmd(potential, target)
    else:
        save_potential(potential, target, stored.provenance | parent)


@own_settings
@float32_by_default()
def read_checkpoint(path: str | Path, branch: str | None = None) -> Checkpoint:
    """Read a native or deepmd-kit checkpoint; arguments and errors as in `load_potential`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # safetensors: eight bytes of header length, then JSON
        return _read_native(path, branch)
    if start[:2] in (b"PK", b"\x80\x02"):  # zip archive or pickle, the two formats of torch.save
        model = read_deepmd(path, branch)
        kind = f"deepmd-kit checkpoint, descriptor format {model.version:g}"
        return Checkpoint(
            model.config, model.weights, model.reference_energies, model.dtype, model.provenance, kind
        )
    raise ValueError(
        f"cannot read {path}: it is neither a {SUFFIX} checkpoint nor a PyTorch file of deepmd-kit, or it "
        "was cut off"
    )


def _read_native(path: Path, branch: str | None) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            config = _config(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"cannot read {path}: it is damaged or incomplete ({error})") from error
    if branch is not None:
        raise ValueError(
            f"{path} holds a single model, so there is no branch {branch!r}; leave the branch out"
        )
    if "reference_energies" not in tensors:
        raise ValueError(f"cannot read {path}: it has no entry reference_energies")
    energies = tensors.pop("reference_energies")
    weights = {key.removeprefix(_NETWORK): value for key, value in tensors.items()}
    dtype = next((value.dtype for value in weights.values()), torch.float32)
    provenance = json.loads(metadata.get("provenance", "{}"))
    return Checkpoint(
        config,
        weights,
        energies,
        dtype,
        provenance,
        f"dpa4 checkpoint, format {FORMAT_VERSION}",
        _coverage(path, metadata),
    )


def _coverage(path: Path, metadata: Mapping[str, str]) -> Coverage | None:
    if "coverage" not in metadata:
        return None
    try:
        return Coverage.from_json(metadata["coverage"])
    except ValueError as error:
        raise ValueError(f"cannot read {path}: its entry coverage is {error}") from error


def _config(path: Path, metadata: Mapping[str, Any]) -> ModelConfig:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"cannot read {path}: it is a safetensors file, but not of a DPA4 potential (its metadata lack "
            f"format = {FORMAT!r})"
        )
    stored = metadata.get("format_version", "missing")
    if not stored.isdecimal():
        raise ValueError(f"cannot read {path}: its format_version is {stored!r}, not a number")
    if int(stored) > FORMAT_VERSION:
        raise ValueError(
            f"cannot read {path}: it has format {stored}, written by a newer dpa4; this version reads formats up "
            f"to {FORMAT_VERSION}. Update dpa4"
        )
    try:
        return ModelConfig.model_validate_json(metadata.get("config", ""))
    except ValidationError as error:
        raise ValueError(
            f"cannot read {path}: its configuration is not valid: {first_problem(error)}"
        ) from error


def _assemble(path: str | Path, stored: Checkpoint, dtype: torch.dtype) -> Potential:
    """Build a potential with stored weights, in evaluation mode.

    Raises:
        ValueError: If a weight is missing, unknown, or of another shape.
    """
    potential = Potential(stored.config).to(dtype)
    expected = {key: value.shape for key, value in potential.model.state_dict().items()}
    found = {key: value.shape for key, value in stored.weights.items()}
    expected["reference_energies"] = potential.reference_energies.shape
    found["reference_energies"] = stored.reference_energies.shape
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is unknown" for key in found if key not in expected]
    problems += [
        f"{key} has shape {tuple(found[key])} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if found.get(key, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"cannot read {path}: its weights do not fit its configuration: {', '.join(problems[:5])}{more}"
        )
    potential.model.load_state_dict(stored.weights)
    potential.reference_energies.copy_(stored.reference_energies)
    potential.coverage = stored.coverage
    return potential.eval()
