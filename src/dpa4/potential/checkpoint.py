"""Saving and loading potentials: one safetensors file with the weights, and a description in its metadata.

The weights keep their names and precision; ``reference_energies`` is an additional float64 tensor. The metadata can
be read without the weights. They hold the format version, a digest of the whole content and, as JSON, the
configuration, elements, reference energies, provenance and, for models trained with this package, the coverage of
the training data. Checkpoints of deepmd-kit can be read wherever native ones can.

A file may come from anybody, and may be damaged. Its names, shapes and types are compared with its configuration
before a network is built, and its values are checked (`dpa4.potential.verification`).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dpa4 import __version__
from dpa4.data.coverage import Coverage
from dpa4.model import ModelConfig
from dpa4.output import atomic_write, check_writable
from dpa4.parsing import first_line, parse_json, shown
from dpa4.potential.deepmd.options import first_problem
from dpa4.potential.deepmd.reader import read_deepmd
from dpa4.potential.deepmd.writer import export_deepmd
from dpa4.potential.model_file import HUB, model_file
from dpa4.potential.potential import Potential
from dpa4.potential.verification import (
    check_number_of_layers,
    check_provenance,
    check_reference_energies,
    check_values,
    digest_of,
    listed,
    weight_problems,
)
from dpa4.system import float32_by_default, own_settings, user_path

FORMAT = "dpa4"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
_NETWORK = "model."
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types in which a native checkpoint may store numbers, by their names in safetensors."""


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
    digest: str | None = None  # verified digest of the content; None for files that have none


@own_settings
def save_potential(
    potential: Potential, path: str | Path, provenance: Mapping[str, str] | None = None
) -> None:
    """Write a potential to a model file; an existing file is replaced atomically.

    Args:
        potential: The potential; its weights are stored in their own precision.
        path: File to write, ending in ``.safetensors``.
        provenance: Origin of the potential, such as data and parent file; the version of dpa4 and the date are
            added.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        ValueError: If the name does not end in ``.safetensors``, or a weight is not finite.
    """
    path = user_path(path)
    if path.suffix != SUFFIX:
        raise ValueError(
            f"model files end in {SUFFIX}, got {path.name!r}; `dpa4 convert` writes deepmd-kit's .pt"
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in potential.state_dict().items()}
    try:
        check_values(tensors.items())
    except ValueError as error:
        raise ValueError(f"cannot write {path}: {error}") from None
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
    _write(path, metadata, tensors)


def add_provenance(path: Path, entries: Mapping[str, str]) -> None:
    """Add entries to the provenance of a native checkpoint, whose weights stay as they are.

    Raises:
        ValueError: If the file is not a native checkpoint, or damaged.
    """
    _read_native(path, None)
    metadata, tensors = _read_tensors(path)
    provenance = parse_json(metadata.get("provenance", "{}"), "its entry provenance")
    _write(path, metadata | {"provenance": json.dumps(provenance | dict(entries))}, tensors)


def _write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    content = {key: value for key, value in metadata.items() if key != "digest"}
    # safetensors' own function writes a temporary file that only its owner can read, whatever the umask, and that
    # stays behind if the process is killed.
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(dict(tensors), content | {"digest": digest_of(content, tensors)}))


@own_settings
@float32_by_default()
def load_potential(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Literal["float32", "float64"] | None = None,
    branch: str | None = None,
    ema: bool = False,
) -> Potential:
    """Load a potential in evaluation mode from a model file of dpa4 or a checkpoint of deepmd-kit.

    Args:
        path: The file; its content, not its name, determines the format. ``hf:organisation/repository/file``
            names a file on the Hugging Face hub, which is downloaded once.
        device: Device of the potential; unlike the calculators, the CPU by default.
        dtype: Floating-point type of the network, float32 or float64; by default that of the file. Energies are
            always float64.
        branch: Branch of a multitask model of deepmd-kit.
        ema: Load the averaged weights of a deepmd-kit checkpoint that has them in its entry ``ema``, instead of the
            weights of the last step. Model files of dpa4 and separate ``_ema`` files hold one set of weights.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a file on the hub cannot be downloaded.
        ValueError: If the file cannot be read, or is not a supported DPA4 model, or the dtype is another one; also
            if ``ema`` is true and the file has no such entry.
    """
    if isinstance(dtype, str):
        dtype = {"float32": torch.float32, "float64": torch.float64}.get(dtype, dtype)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
    stored = read_checkpoint(path, branch, ema=ema)
    return _assemble(stored, dtype or stored.dtype).to(device)


@own_settings
@float32_by_default()
def convert(
    source: str | Path,
    target: str | Path,
    branch: str | None = None,
    *,
    drop_bridging: bool = False,
    ema: bool = False,
) -> dict[str, str]:
    """Convert a model file to the format given by the suffix of ``target``: .safetensors, or .pt for deepmd-kit.

    Args:
        source: The file, as for `load_potential`.
        target: File to write.
        branch: Branch of a multitask model of deepmd-kit.
        drop_bridging: Leave out the bridging, which some models of this package have and deepmd-kit lacks. The
            network alone is unreliable where atoms are closer than in the training data.
        ema: Convert the averaged weights of a deepmd-kit checkpoint, see `load_potential`.

    Returns:
        Provenance of the model that was read, texts by label.

    Raises:
        FileNotFoundError: If there is no such file, or the folder of ``target`` does not exist.
        ValueError: If the file cannot be read, the suffix of ``target`` is unknown, or deepmd-kit has no
            model with the same results.
    """
    target = user_path(target)
    if target.suffix not in (SUFFIX, ".pt"):
        raise ValueError(f"cannot convert to {target.name!r}; the target must end in {SUFFIX} or .pt")
    check_writable(target)
    stored = read_checkpoint(source, branch, ema=ema)
    if drop_bridging:
        stored = replace(stored, config=stored.config.model_copy(update={"bridging": None}))
    potential = _assemble(stored, stored.dtype)
    name = str(source) if str(source).startswith(HUB) else Path(source).name
    parent = {"parent file": name, "parent format": stored.format}
    if target.suffix == ".pt":
        export_deepmd(potential, target)
    else:
        save_potential(potential, target, stored.provenance | parent)
    return stored.provenance


@own_settings
@float32_by_default()
def read_checkpoint(path: str | Path, branch: str | None = None, *, ema: bool = False) -> Checkpoint:
    """Read a native or deepmd-kit checkpoint; arguments and errors as in `load_potential`."""
    path = model_file(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # safetensors: eight bytes of header length, then JSON
        if ema:
            raise ValueError(
                f"cannot read averaged weights from {path}: a model file of dpa4 holds one set of weights; leave out "
                "--ema (Python: ema=True)"
            )
        return _read_native(path, branch)
    if start[:2] in (b"PK", b"\x80\x02"):  # the present and the earlier format of torch.save
        model = read_deepmd(path, branch, ema=ema)
        kind = f"deepmd-kit checkpoint, descriptor format {model.version:g}"
        if model.runtime != "pt":
            kind += f", runtime {model.runtime}"
        return Checkpoint(
            model.config, model.weights, model.reference_energies, model.dtype, model.provenance, kind
        )
    raise ValueError(
        f"cannot read {path}: it is neither a model file of dpa4 ({SUFFIX}) nor a checkpoint of deepmd-kit (.pt), or "
        "was cut off. Models frozen by deepmd-kit (.pb, .pth, .pt2, .dp, .hlo) cannot be read; use their checkpoint"
    )


def _read_native(path: Path, branch: str | None) -> Checkpoint:
    with _named(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            config = _config(metadata)
            slices = {key: file.get_slice(key) for key in file.keys()}
            types = {key: entry.get_dtype() for key, entry in slices.items()}
            shapes = {key: entry.get_shape() for key, entry in slices.items()}
        _check_layout(config, shapes, types)
        if branch is not None:
            raise ValueError(
                f"it holds a single model, so there is no branch {branch!r}; leave the branch out"
            )
        metadata, tensors = _read_tensors(path)
        check_values((key, value) for key, value in tensors.items() if key != "reference_energies")
        check_reference_energies(tensors["reference_energies"], config.elements)
        provenance = check_provenance(parse_json(metadata.get("provenance", "{}"), "its entry provenance"))
        coverage = _coverage(metadata)
        digest = _verified_digest(metadata, tensors)  # last, because the other messages say more
    energies = tensors.pop("reference_energies")
    weights = {key.removeprefix(_NETWORK): value for key, value in tensors.items()}
    double = any(value.dtype == torch.float64 for value in weights.values())
    return Checkpoint(
        config,
        weights,
        energies.double(),
        torch.float64 if double else torch.float32,
        provenance,
        f"model file of dpa4, format {FORMAT_VERSION}",
        coverage,
        digest,
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the name of the file to errors about its content."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"cannot read {path}: it is damaged or incomplete ({first_line(error)})") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a native checkpoint; nothing is checked."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}


def _check_layout(config: ModelConfig, shapes: Mapping[str, list[int]], types: Mapping[str, str]) -> None:
    """Compare the names, shapes and types of the tensors of a file with its configuration.

    Raises:
        ValueError: If a tensor is missing, unknown, or of another shape or type.
    """
    if "reference_energies" not in shapes:
        raise ValueError("it has no entry reference_energies")
    check_number_of_layers(config, len(shapes))
    weights = {key: shape for key, shape in shapes.items() if key != "reference_energies"}
    problems = weight_problems(config, {key.removeprefix(_NETWORK): value for key, value in weights.items()})
    if (found := tuple(shapes["reference_energies"])) != (expected := (len(config.elements),)):
        problems.append(f"reference_energies has shape {found} instead of {expected}")
    if problems:
        raise ValueError(f"its weights do not fit its configuration: {listed(problems)}")
    for key, kind in types.items():
        if kind not in _TYPES:
            raise ValueError(f"{key} has values of type {kind}; allowed are {', '.join(_TYPES)}")


def _verified_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str | None:
    """Digest stored in a checkpoint, after comparing it with the content; None if the file has none.

    Raises:
        ValueError: If the content has another digest.
    """
    content = dict(metadata)
    stored = content.pop("digest", None)
    if stored is not None and stored != digest_of(content, tensors):
        raise ValueError(
            "its weights, options or description are not those that dpa4 wrote (the digest differs): it is damaged "
            "or was edited. Use the original file; to keep a change of your own, remove the entry digest from the "
            "metadata"
        )
    return stored


def _coverage(metadata: Mapping[str, str]) -> Coverage | None:
    if "coverage" not in metadata:
        return None
    try:
        return Coverage.from_json(metadata["coverage"])
    except ValueError as error:
        raise ValueError(f"its entry coverage is {error}") from error


def _config(metadata: Mapping[str, Any]) -> ModelConfig:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"it is a safetensors file, but not of a DPA4 potential (its metadata lack format = {FORMAT!r})"
        )
    stored = metadata.get("format_version", "missing")
    if not (stored.isascii() and stored.isdecimal() and len(stored) < 10):
        raise ValueError(f"its format_version is {shown(stored)}, not a number")
    if int(stored) > FORMAT_VERSION:
        raise ValueError(
            f"it has format {stored}, written by a newer dpa4; this version reads formats up to {FORMAT_VERSION}. "
            "Update dpa4"
        )
    try:
        return ModelConfig.model_validate_json(metadata.get("config", ""))
    except ValidationError as error:
        raise ValueError(f"its configuration is not valid: {first_problem(error)}") from error


def _assemble(stored: Checkpoint, dtype: torch.dtype) -> Potential:
    """Build a potential with the stored weights, in evaluation mode."""
    potential = Potential(stored.config).to(dtype)
    potential.model.load_state_dict(stored.weights)
    potential.reference_energies.copy_(stored.reference_energies)
    potential.coverage = stored.coverage
    return potential.eval()
