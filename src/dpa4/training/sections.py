"""Base of the sections of a run file, and types of options."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dpa4.system import user_path

UserPath = Annotated[Path, AfterValidator(user_path)]
Count = Annotated[int, Field(gt=0, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Weight = Annotated[float, Field(ge=0, le=1e9)]


class Section(BaseModel):
    """Section whose options are checked and cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
