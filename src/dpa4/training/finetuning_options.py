"""Options of fine-tuning: defaults that differ, data to replay, and limits of what may change."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, model_validator

from dpa4.training.sections import Section, UserPath

FINETUNING = {"learning_rate": 2e-3, "warmup_fraction": 0.1}
"""Defaults of the section ``training`` with ``model.start_from`` that differ; measured, see docs/finetuning.md."""


class ReplayOptions(Section):
    """Data of the start that are trained on again, so that fine-tuning does not forget them."""

    files: tuple[UserPath, ...] = Field(
        (),
        description="Data that model.start_from was trained on, or a part of them, as for train: each batch has some "
        "of their structures, with the reference energies of the start; []: none.",
    )
    share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of each batch (of batch_size, or of max_atoms and max_edges) for these structures.",
    )

    @model_validator(mode="before")
    @classmethod
    def _single_file(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("files"), str | Path):
            return values | {"files": [values["files"]]}
        return (
            values | {"files": ()} if isinstance(values, dict) and values.get("files", ()) is None else values
        )


class FinetuneOptions(Section):
    """Limits of what fine-tuning may change."""

    freeze: tuple[str, ...] = Field(
        (),
        description="Parts of the network that stay as in model.start_from: embedding, block1, block2, ..., blocks "
        "(all of them), readout.",
    )
    depth_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor of the learning rate from each part to the one before it, from the read-out (1) to the "
        "embedding.",
    )
    lora_rank: Annotated[int, Field(gt=0, le=10**6)] | None = Field(
        None,
        description="Rank of changes of the equivariant linear layers (LoRA), 16 say; most other matrices are then "
        "frozen; null: off.",
    )
    lora_alpha: PositiveFloat | None = Field(
        None,
        le=1e6,
        description="Scale of these changes, which are multiplied by lora_alpha / lora_rank; null: lora_rank.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneOptions":
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(
                f"training.finetune.lora_alpha = {self.lora_alpha:g} needs training.finetune.lora_rank, the rank of "
                "the changes that it scales"
            )
        return self
