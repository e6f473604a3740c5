"""Restart files of molecular dynamics: writing, and reading with a check of every entry."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from ase import Atoms
from ase.io.jsonio import encode
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError

from dpa4.data.charge_spin import NAMES, charge_spin_entries
from dpa4.output import atomic_write
from dpa4.parsing import problem

RESTART = "restart.json"
THERMO = "thermo.csv"
TRAJECTORY = "trajectory.xyz"
FORMAT = 3
_MAX_STEP = 10**15

Vector = tuple[float, float, float]
Box = tuple[Vector, Vector, Vector]


class Restart(BaseModel):
    """State of a run: everything from which it continues, and everything that must be the same then.

    Lengths are in Angstrom, momenta in ASE's unit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[3]
    settings: dict[str, Any]
    system: dict[str, Any]  # see `system_of`
    step: Annotated[NonNegativeInt, Field(le=_MAX_STEP)]
    cell: Box
    positions: tuple[Vector, ...]
    momenta: tuple[Vector, ...]
    random: dict[str, Any]  # state of NumPy's bit generator
    baths: dict[str, Any]  # see `bath_state`
    trajectory_bytes: NonNegativeInt
    uncertain_bytes: NonNegativeInt = 0  # absent in files of earlier versions
    seconds: NonNegativeFloat = 0.0  # time of computation; not in files of earlier versions


def system_of(atoms: Atoms) -> dict[str, Any]:
    """Everything except positions and momenta on which the dynamics of a structure depends, as JSON values."""
    return {
        "elements": atoms.get_chemical_symbols(),
        "masses": atoms.get_masses().tolist(),
        "periodicity": atoms.pbc.tolist(),
        "box": atoms.cell.array.tolist(),
        "constraints": [json.loads(encode(c.todict())) for c in atoms.constraints],
        "charge and spin": {
            name: json.loads(encode(value))
            for name, value in charge_spin_entries(atoms.info).items()
            if name in NAMES
        },
    }


def check_system(atoms: Atoms, state: Restart, folder: Path) -> None:
    """Check that a structure is the one of a run: all entries of `system_of`.

    In place of the initial box of the run, the structure may have the last one.

    Raises:
        ValueError: If they differ.
    """
    given, known = system_of(atoms), dict(state.system)
    if _close(given["box"], state.cell):
        known["box"] = given["box"]
    for name, value in given.items():
        found = known.get(name)
        same = _close(value, found) if name in ("masses", "box") else value == found
        if not same:
            raise ValueError(
                f"the structure is not that of the run in {folder}: {name} {_short(value)} instead of "
                f"{_short(found)}; continue with the structure of the run, or choose another folder"
            )


def write_restart(folder: Path, **entries: Any) -> None:
    """Write the restart file of a run, with the entries of `Restart` as JSON values."""
    with atomic_write(folder / RESTART) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT} | entries), encoding="utf-8")


def read_restart(folder: Path) -> Restart:
    """Read the restart file of a run.

    Raises:
        FileNotFoundError: If there is no restart file.
        ValueError: If an entry is absent, unknown, or has a type, shape or value that is not possible.
    """
    path = folder / RESTART
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no run to resume in {folder}: {path} does not exist; start without resume"
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    found = content.get("format") if isinstance(content, Mapping) else None
    if isinstance(found, int) and found != FORMAT:
        raise ValueError(
            f"{path} has format {found}; this version reads format {FORMAT}; start again in another folder"
        )
    try:
        state = Restart.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise damaged(path, f"{where}: {problem(first).lower()}") from None
    for name in ("positions", "momenta"):
        rows = len(getattr(state, name))
        if rows != len(state.system.get("elements", ())):
            raise damaged(path, f"{name} has {rows} rows, not one for each atom")
    return state


def restore_random(rng: np.random.Generator, state: Restart, folder: Path) -> None:
    """Set the state of a random number generator.

    Raises:
        ValueError: If the file does not hold one.
    """
    try:
        rng.bit_generator.state = state.random
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise damaged(folder / RESTART, f"random is no state of a generator, {error!r}") from None


def damaged(path: Path, reason: str) -> ValueError:
    """Error about a file that cannot be what the program wrote."""
    return ValueError(f"{path} is damaged ({reason}); restore it, or start again in another folder")


def _close(given: Any, found: Any) -> bool:
    """Return whether two arrays of numbers are equal up to rounding."""
    try:
        return np.shape(given) == np.shape(found) and bool(np.allclose(given, found, rtol=1e-8, atol=1e-8))
    except (ValueError, TypeError):
        return False


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
