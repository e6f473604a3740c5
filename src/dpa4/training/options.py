"""Options of a training run, read from one YAML file and validated into frozen objects."""

import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from ase.data import chemical_symbols
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from dpa4.model.config import ModelConfig
from dpa4.model.presets import PRESETS, preset
from dpa4.potential.precision import Precision


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ModelOptions(BaseModel):
    """A published model and changes to it; any field of ``ModelConfig`` may be added."""

    model_config = ConfigDict(frozen=True, extra="allow")

    preset: str = Field("mini", description=f"Published model to start from: {', '.join(PRESETS)}.")
    elements: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="Chemical symbols the model knows; auto: all of the training and validation data.",
    )

    @model_validator(mode="after")
    def _valid_overrides(self) -> "ModelOptions":
        for name in self.model_extra or {}:
            if name not in ModelConfig.model_fields:
                raise ValueError(unknown_option(f"model.{name}", [*ModelConfig.model_fields, "preset"]))
        self.build(tuple(chemical_symbols[1:]))
        return self

    def build(self, found: Iterable[str]) -> ModelConfig:
        """Build the model configuration.

        Args:
            found: Elements of the data, used if ``elements`` is auto.

        Raises:
            ValueError: If an option of the model is not allowed.
        """
        elements = tuple(found) if self.elements == "auto" else self.elements
        return preset(self.preset, elements=elements, **(self.model_extra or {}))


class KeyOptions(_Section):
    """Names of the labels in the data files; labels without a name here are found by their usual names."""

    energy: str | None = Field(None, description="Total energy, in eV.")
    forces: str | None = Field(None, description="Forces, in eV/Angstrom.")
    stress: str | None = Field(None, description="Stress, in eV/Angstrom^3, tensile positive.")
    virial: str | None = Field(None, description="Virial = -volume * stress, in eV.")


class DataOptions(_Section):
    """Structures, labels and reference energies."""

    train: tuple[Path, ...] = Field(
        min_length=1,
        description="Training file, or list of files: extxyz, ASE database, .aselmdb, deepmd folder.",
    )
    validation: tuple[Path, ...] = Field(
        (), description="Validation file or list of files; [] splits the training data."
    )
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Random share of the training data for validation if no file is given; 0: none.",
    )
    split_seed: int = Field(0, description="Seed of the random split.")
    reference_energies: Literal["auto", "isolated", "least_squares"] | dict[str, float] = Field(
        "auto",
        description="Energy of a free atom per element: isolated (frames with config_type IsolatedAtom), "
        "least_squares (fit), auto (isolated if complete, else fit), or a map such as "
        "{H: -13.6, O: -2041.8}; in eV.",
    )
    keys: KeyOptions = Field(
        default_factory=KeyOptions,
        description="Names of the labels in the files; null finds the usual names.",
    )

    @model_validator(mode="before")
    @classmethod
    def _single_file(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        single = {
            k: [v] for k, v in values.items() if k in ("train", "validation") and isinstance(v, str | Path)
        }
        absent = {k: () for k in ("validation",) if values.get(k, ()) is None}
        return values | single | absent


class TrainingOptions(_Section):
    """Options of the fit: length, batches, optimiser, loss, logs."""

    epochs: PositiveInt | None = Field(
        None, description="Passes over the training data; null: 200, unless steps is given."
    )
    steps: PositiveInt | None = Field(None, description="Optimiser steps, instead of epochs.")
    batch_size: PositiveInt | None = Field(
        None, description="Structures per batch; null: 8, unless max_atoms or max_edges is given."
    )
    max_atoms: PositiveInt | None = Field(
        None, description="Maximum number of atoms per batch; packs structures of any size."
    )
    max_edges: PositiveInt | None = Field(
        None, description="Maximum number of edges (directed neighbour pairs) per batch."
    )

    optimizer: Literal["hybrid_muon", "adamw"] = Field("hybrid_muon", description="hybrid_muon or adamw.")
    weight_decay: float = Field(1e-3, ge=0, description="Decoupled weight decay of matrices.")
    schedule: Literal["wsd", "cosine"] = Field(
        "wsd", description="Learning rate: wsd (warm-up, stable, cosine decay) or cosine (warm-up, decay)."
    )
    learning_rate: PositiveFloat = Field(
        4e-3,
        description="Peak learning rate. Short runs need a high one; the published runs of 2 million steps "
        "used 3e-4 to 1e-3.",
    )
    final_learning_rate: float = Field(1e-6, ge=0, description="Learning rate at the end.")
    warmup_fraction: float = Field(
        0.01, ge=0, lt=1, description="Share of all steps spent on the linear warm-up."
    )
    warmup_factor: float = Field(0.2, ge=0, le=1, description="Learning rate of step 0 relative to the peak.")
    decay_fraction: float = Field(
        0.65, gt=0, le=1, description="Share of all steps that wsd spends on the decay."
    )
    gradient_clip: PositiveFloat | None = Field(
        5.0, description="Maximum norm of the gradient; null: no limit."
    )
    ema_decay: float | None = Field(
        0.999,
        gt=0,
        lt=1,
        description="Decay per step of the averaged weights, which are evaluated and saved; null: off.",
    )

    loss: Literal["mae", "mse", "huber"] = Field("mae", description="Error measure: mae, mse or huber.")
    huber_delta: PositiveFloat = Field(
        0.01, description="Error above which huber is linear, in eV/atom and eV/Angstrom."
    )
    energy_weight: float = Field(20.0, ge=0, description="Weight of the energy error per atom (eV/atom).")
    forces_weight: float = Field(20.0, ge=0, description="Weight of the force error (eV/Angstrom).")
    virial_weight: float | Literal["auto"] = Field(
        "auto",
        description="Weight of the virial error per atom (eV/atom); auto: 5 if the training data "
        "has stress or virial, else 0.",
    )

    precision: Precision = Field(
        "high", description="high (float32), or fast: bfloat16 products in the interaction blocks (GPU)."
    )
    compile: bool | None = Field(
        None,
        description="Compile the network and compare it with eager mode at the start; null: only on a GPU.",
    )
    seed: int = Field(0, description="Seed of initial weights and batch order.")
    log_interval: PositiveInt = Field(20, description="Steps between rows of train.csv.")
    validation_interval: PositiveInt | None = Field(
        None, description="Steps between validations; null: every epoch, but at most 100 times in all."
    )
    checkpoint_interval: PositiveInt | None = Field(
        None, description="Steps between checkpoints last.pt; null: at every validation."
    )
    patience: PositiveInt | None = Field(
        None, description="Stop after this many validations without a better one; null: never."
    )
    tensorboard: bool = Field(
        False, description="Also write TensorBoard files (needs the tensorboard package)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingOptions":
        if self.epochs and self.steps:
            raise ValueError(
                f"give training.epochs = {self.epochs} or training.steps = {self.steps}; set one to null"
            )
        if self.batch_size and (self.max_atoms or self.max_edges):
            raise ValueError(
                f"training.batch_size = {self.batch_size} cannot be combined with training.max_atoms or "
                "training.max_edges; set training.batch_size to null"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"training.final_learning_rate = {self.final_learning_rate} must be at most "
                f"training.learning_rate = {self.learning_rate}"
            )
        if isinstance(self.virial_weight, float) and self.virial_weight < 0:
            raise ValueError(f"training.virial_weight must be >= 0 or auto, got {self.virial_weight}")
        if not (self.energy_weight or self.forces_weight or self.virial_weight):
            raise ValueError(
                "training.energy_weight, forces_weight and virial_weight are all 0: nothing to learn"
            )
        return self


class RunConfig(_Section):
    """Everything that defines a training run."""

    model: ModelOptions = Field(
        default_factory=ModelOptions, description="The network; any other option of the model may be added."
    )
    data: DataOptions = Field(description="Structures with energies, forces and, if periodic, stress.")
    training: TrainingOptions = Field(default_factory=TrainingOptions, description="Options of the fit.")
    output: Path = Field(Path("run"), description="Folder for the model, checkpoints, logs and plots.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one.")


class _Loader(yaml.SafeLoader):
    """Loader with the scalars of YAML 1.2: 1e-3 is a number, and the element No (nobelium) is not false."""


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


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a run file.

    Relative paths in the file are relative to the working directory.

    Args:
        path: YAML file.
        overrides: Options that replace those of the file, such as ``"training.learning_rate=5e-4"``; the values
            are YAML.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not YAML, an override is malformed, or an option is unknown or not allowed. For
            faulty options, the message has one line each with the option, its value and the allowed values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"run file {path} does not exist; `dpa4 init` writes a starting file")
    values = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must be a map of options (model:, data:, training:, ...), got {type(values).__name__}"
        )
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} must look like training.learning_rate=5e-4")
        _set(values, key.strip(), _parse_yaml(text, f"override {override!r}"))
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path} is not valid:\n" + _faults(error)) from None


def default_config_text(train: str = "train.xyz") -> str:
    """Commented run file to start from. Its comments are the descriptions of the fields, so they cannot drift."""
    head = ["# Training run of dpa4. Energies are in eV, lengths in Angstrom. null means: not set.", ""]
    body = _commented(RunConfig.model_validate({"data": {"train": train}}))
    at = next(i for i, line in enumerate(body) if line.startswith("data:")) - 2
    extra = [
        "  # The published models were trained with true; with false, energies are smoother at the cutoff.",
        "  edge_norm: false",
    ]
    extra += ["  # Any other option of the model may be added, for example:"]
    start = preset("mini", elements=("H",))
    for name in ("cutoff", "channels", "lmax"):
        extra.append(
            f"  # {name}: {_scalar(getattr(start, name))}  # {ModelConfig.model_fields[name].description}"
        )
    return "\n".join(head + body[:at] + extra + body[at:]) + "\n"


def _commented(section: BaseModel, depth: int = 0) -> list[str]:
    lines: list[str] = []
    pad = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if depth == 0 and lines:
            lines.append("")
        comment = f"{pad}# "
        lines += textwrap.wrap(
            field.description or "", 100, initial_indent=comment, subsequent_indent=comment
        )
        if isinstance(value, BaseModel):
            lines += [f"{pad}{name}:", *_commented(value, depth + 1)]
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


def unknown_option(key: str, allowed: Iterable[str]) -> str:
    """Message for an unknown option, with the closest known option or, if none is close, all of them."""
    allowed = list(allowed)
    close = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1)
    return f"unknown option {key}; " + (
        f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(allowed)}"
    )


def _parse_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not valid YAML: {error}") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key and create missing sections. Unknown names are left to the validation."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.setdefault(section, {}), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _faults(error: ValidationError) -> str:
    """Describe each faulty option in one line; the members of a union ("a number" or "'auto'") share a line."""
    lines: dict[str, str] = {}
    for e in error.errors():
        path, section = _option(e["loc"])
        key = ".".join(map(str, path))
        message = e["msg"].removeprefix("Value error, ")
        message = re.sub(r"valid dictionary( or instance of \w+)?", "map of options", message)
        message = re.sub(r"(valid )?tuple", "list", message, flags=re.IGNORECASE).partition(", unable to")[0]
        if e["type"] == "extra_forbidden":
            lines[key] = unknown_option(key, section)
        elif e["type"] == "missing":
            lines[key] = f"option {key} is required: {section[path[-1]].description}"
        elif e["type"] == "value_error":
            lines[key] = message
        elif key in lines:
            lines[key] += " or " + message.removeprefix("Input should be ")
        else:
            lines[key] = f"{key} = {e['input']!r}: {message[0].lower()}{message[1:]}"
    return "\n".join(f"  {line}" for line in lines.values())


def _option(location: tuple[int | str, ...]) -> tuple[list[Any], dict[str, FieldInfo]]:
    """Path of an option in one of pydantic's error locations, and the fields of the section that contains it.

    Entries of the location behind the option are union members ("literal['auto']") and indices.
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
