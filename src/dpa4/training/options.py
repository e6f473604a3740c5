"""Options of a training run: one model per section of the run file."""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from ase.data import chemical_symbols
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from dpa4.model.config import Bridging, ModelConfig
from dpa4.model.presets import NAMES, preset
from dpa4.model.switches import Symmetry
from dpa4.potential.precision import Precision
from dpa4.system import user_path
from dpa4.training.schedule import LOWEST_RATE

UserPath = Annotated[Path, AfterValidator(user_path)]


def _device_name(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"device = {name!r}: allowed are auto, cpu, cuda and, for the second GPU, cuda:1")
    return name


def unknown_option(key: str, allowed: Iterable[str]) -> str:
    """Message about an unknown option, which suggests a known one or, if none is close, lists all of the section.

    An option of the same name in another section is the first choice.

    Args:
        key: Full name of the option, with dots.
        allowed: Options of its section.
    """
    allowed, elsewhere = list(allowed), _options_by_name()
    name = key.rpartition(".")[2]
    close = elsewhere.get(name) or difflib.get_close_matches(name, allowed, n=1)
    if not close and (others := difflib.get_close_matches(name, elsewhere, n=1)):
        close = elsewhere[others[0]]
    return f"unknown option {key if len(key) <= 100 else key[:97] + '...'}; " + (
        f"did you mean {' or '.join(map(repr, close))}?" if close else f"allowed are {', '.join(allowed)}"
    )


@cache
def _options_by_name() -> dict[str, list[str]]:
    """Full names of the options of all sections by their last part, such as "training.steps" by "steps"."""
    found: dict[str, list[str]] = {}

    def add(fields: Mapping[str, FieldInfo], prefix: str) -> None:
        for name, field in fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                add(kind.model_fields, f"{prefix}{name}.")
            elif prefix and prefix + name not in found.setdefault(name, []):
                found[name].append(prefix + name)

    add(RunConfig.model_fields, "")
    add(ModelConfig.model_fields, "model.")
    return found


Count = Annotated[int, Field(gt=0, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Weight = Annotated[float, Field(ge=0, le=1e9)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class ModelOptions(BaseModel):
    """A published model and changes to it; any field of ``ModelConfig`` may be added."""

    model_config = ConfigDict(frozen=True, extra="allow")

    preset: str = Field("mini", description=f"Published model to start from: {NAMES}.")
    elements: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="Chemical symbols the model knows; auto: all of the training and validation data.",
    )
    bridging: Literal["auto"] | Bridging | None = Field(
        "auto",
        description="Nuclear repulsion at short distance. auto: below the shortest distance of each pair of elements "
        "in the training data; null: none; or r_inner and r_outer as in published models.",
    )

    symmetry: Symmetry = Field(
        "O3",
        description="O3: mirror images have equal energies; SO3: as in published models, symmetry under rotations "
        "alone.",
    )

    @model_validator(mode="after")
    def _valid_overrides(self) -> "ModelOptions":
        for name in self.model_extra or {}:
            if name not in ModelConfig.model_fields:
                raise ValueError(unknown_option(f"model.{name}", [*ModelConfig.model_fields, "preset"]))
        self.build(tuple(chemical_symbols[1:]))
        return self

    def build(self, found: Iterable[str]) -> ModelConfig:
        """Build the model configuration; with ``bridging`` auto it has no bridging yet.

        Args:
            found: Elements of the data, used if ``elements`` is auto.

        Raises:
            ValueError: If an option of the model is not allowed.
        """
        elements = tuple(found) if self.elements == "auto" else self.elements
        bridging = None if self.bridging == "auto" else self.bridging
        options = {"elements": elements, "bridging": bridging, "symmetry": self.symmetry}
        return preset(self.preset, **(options | (self.model_extra or {})))


class KeyOptions(_Section):
    """Names of the labels in the data files; labels without a name here are found by their usual names."""

    energy: str | None = Field(None, description="Total energy, in eV.")
    forces: str | None = Field(None, description="Forces, in eV/Angstrom.")
    stress: str | None = Field(None, description="Stress, in eV/Angstrom^3, tensile positive.")
    virial: str | None = Field(None, description="Virial = -volume * stress, in eV.")


class DataOptions(_Section):
    """Structures, labels and reference energies."""

    train: tuple[UserPath, ...] = Field(
        min_length=1,
        description="Training data, one or a list: file in any format of ASE, pattern such as runs/*/OUTCAR, or "
        "folder.",
    )
    validation: tuple[UserPath, ...] = Field(
        (), description="Validation data, as for train; [] splits the training data."
    )
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Random share of the training data for validation if no file is given; 0: none.",
    )
    split_seed: Seed = Field(0, description="Seed of the random split.")
    calibration_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Random share of the training data that is left out, the same for every split_seed: to calibrate "
        "a committee (dpa4 train --committee) if no validation file is given.",
    )
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

    epochs: Count | None = Field(
        None, description="Passes over the training data; null: 200, unless steps is given."
    )
    steps: Count | None = Field(None, description="Optimiser steps, instead of epochs.")
    batch_size: Count | None = Field(
        None, description="Structures per batch; null: 8, unless max_atoms or max_edges is given."
    )
    max_atoms: Count | None = Field(
        None, description="Maximum number of atoms per batch; packs structures of any size."
    )
    max_edges: Count | None = Field(
        None, description="Maximum number of edges (directed neighbour pairs) per batch."
    )

    optimizer: Literal["hybrid_muon", "adamw"] = Field(
        "hybrid_muon", description="Optimiser: hybrid_muon (Muon for matrices, AdamW for the rest) or adamw."
    )
    adam_for_basis: bool = Field(
        False,
        description="hybrid_muon: AdamW instead of Muon for the two matrices that multiply the radial basis, as in "
        "published runs of generation 3.",
    )
    weight_decay: float = Field(
        1e-3,
        ge=0,
        le=1e3,
        description="Weight decay: how much each step shrinks the matrices, against overfitting.",
    )
    schedule: Literal["wsd", "cosine", "exp"] = Field(
        "wsd",
        description="Learning rate: wsd (warm-up, stable, cosine decay), cosine (warm-up, decay) or exp (warm-up, "
        "exponential decay).",
    )
    learning_rate: Annotated[PositiveFloat, Field(le=1e3)] | Literal["auto"] = Field(
        "auto",
        description="Peak learning rate; auto: 1e-2 up to 1,000 steps, lower for more steps, 1e-3 from 31,600 steps "
        "on.",
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
        5.0, description="Norm to which a longer gradient is shortened; null: no limit."
    )
    ema_decay: float | None = Field(
        0.999,
        gt=0,
        lt=1,
        description="The model is an average of the weights over about 1/(1 - ema_decay) steps; null: no average.",
    )

    loss: Literal["mae", "mse", "huber"] = Field("mae", description="Error measure: mae, mse or huber.")
    huber_delta: PositiveFloat = Field(
        0.01, description="Error above which huber is linear, in eV/atom and eV/Angstrom."
    )
    energy_weight: Weight = Field(20.0, description="Weight of the energy error per atom (eV/atom).")
    forces_weight: Weight = Field(20.0, description="Weight of the force error (eV/Angstrom).")
    virial_weight: Annotated[float, Field(le=1e9)] | Literal["auto"] = Field(
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
    seed: Seed = Field(0, description="Seed of initial weights and batch order.")
    log_interval: Count = Field(20, description="Steps between rows of train.csv.")
    validation_interval: Count | None = Field(
        None, description="Steps between validations; null: every epoch, but at most 100 times in all."
    )
    checkpoint_interval: Count | None = Field(
        None, description="Steps between checkpoints last.pt; null: at every validation."
    )
    patience: Count | None = Field(
        None, description="Stop after this many validations without a better one; null: never."
    )
    tensorboard: bool = Field(
        False, description="Also write TensorBoard files (needs the tensorboard package)."
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        renamed = {"float32": "high", "bf16": "fast"}  # names of earlier versions
        if isinstance(value, str) and value in renamed:
            raise ValueError(f"training.precision = {value} is now called {renamed[value]}")
        return value

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
        if self.adam_for_basis and self.optimizer != "hybrid_muon":
            raise ValueError(
                f"training.adam_for_basis = true is an option of hybrid_muon, not of training.optimizer = "
                f"{self.optimizer}; remove it or choose hybrid_muon"
            )
        if self.learning_rate == "auto":
            if self.final_learning_rate > LOWEST_RATE:
                raise ValueError(
                    f"training.final_learning_rate = {self.final_learning_rate} must be at most {LOWEST_RATE}, "
                    "unless training.learning_rate is a number"
                )
        elif self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"training.final_learning_rate = {self.final_learning_rate} must be at most "
                f"training.learning_rate = {self.learning_rate}"
            )
        if self.schedule == "exp" and not self.final_learning_rate:
            raise ValueError(
                "training.schedule = exp needs training.final_learning_rate above 0, got 0; set it to 1e-6, say"
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
    output: UserPath = Field(Path("run"), description="Folder for the model, checkpoints, logs and plots.")
    device: Annotated[str, AfterValidator(_device_name)] = Field(
        "auto",
        description="auto (a GPU if there is one), cpu, cuda, or cuda:1 for the second GPU.",
    )
