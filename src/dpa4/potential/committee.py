"""Committees: several potentials of the same kind, whose disagreement measures the uncertainty of their mean."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from dpa4.potential.fingerprint import fingerprint_of
from dpa4.potential.potential import Potential
from dpa4.system import user_path

BEST = "best.safetensors"
MEMBER = "member-"
"""Start of the names of the members' folders in the output folder of a committee; a number follows."""

Values = NDArray[np.float64]


class MeanAndDeviation(NamedTuple):
    """Mean over the members of a committee, and standard deviation, normalised by the number of members."""

    mean: Values
    deviation: Values

    @classmethod
    def of(cls, members: Sequence[NDArray[np.floating] | float]) -> "MeanAndDeviation":
        """Mean and standard deviation of one result of every member."""
        stacked = np.stack([np.asarray(member, dtype=np.float64) for member in members])
        return cls(stacked.mean(axis=0), stacked.std(axis=0))


def force_deviations(forces_std: Values) -> Values:
    """Deviation of the force on each atom, (N,) in eV/Angstrom: root mean square distance from the mean force.

    Args:
        forces_std: Standard deviation of every component of the forces, (N, 3) in eV/Angstrom.
    """
    return np.linalg.norm(forces_std, axis=1)


def largest_force_deviation(forces_std: Values) -> float:
    """Largest deviation of the force on an atom, in eV/Angstrom; see `force_deviations`."""
    return float(force_deviations(forces_std).max(initial=0.0))


def add_deviations(
    atoms: Atoms, *, energy_std: float, forces_std: Values, stress_std: Values | None = None
) -> None:
    """Add standard deviations to the entries of a structure, for its file, and ``max_force_std`` to its ``info``.

    Args:
        atoms: The structure.
        energy_std: Standard deviation of the energy, in eV.
        forces_std: Standard deviation of every component of the forces, (N, 3) in eV/Angstrom.
        stress_std: Standard deviation of every component of the stress, (6,) in eV/Angstrom^3.
    """
    atoms.arrays["forces_std"] = forces_std
    atoms.info |= {"energy_std": energy_std, "max_force_std": largest_force_deviation(forces_std)}
    if stress_std is not None:
        atoms.info["stress_std"] = stress_std


def member_folders(folder: Path) -> list[Path]:
    """Folders of the members in the output folder of a committee, by number; [] if it has none."""
    found = [path for path in folder.glob(f"{MEMBER}*") if path.name.removeprefix(MEMBER).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(MEMBER)))


def member_files(source: str | Path) -> list[Path]:
    """Models of the output folder of a committee; any other path is returned as it is.

    Raises:
        FileNotFoundError: If a member of the committee has no model yet.
    """
    path = user_path(source)
    folders = member_folders(path) if path.is_dir() else []
    if missing := [folder / BEST for folder in folders if not (folder / BEST).is_file()]:
        raise FileNotFoundError(
            f"{path} is a committee of {len(folders)} members, but there is no {missing[0]}; finish the training "
            "with --resume, or give the models one by one"
        )
    return [folder / BEST for folder in folders] or [path]


def single_model(source: str | Path, reason: str) -> Path:
    """Path of a model, for work that needs exactly one.

    Args:
        source: File, or output folder of a committee.
        reason: Reason why a committee is refused.

    Raises:
        ValueError: If the path is that of a committee.
    """
    found = member_files(source)
    if len(found) > 1:
        raise ValueError(f"{source} is a committee of {len(found)} models; {reason}, such as {found[0]}")
    return found[0]


def fingerprint_of_committee(potentials: Iterable[Potential]) -> dict[str, str]:
    """Fingerprint of one or several potentials; the digests of several are joined by blanks."""
    members = [fingerprint_of(potential) for potential in potentials]
    return members[0] | {"model": " ".join(member["model"] for member in members)}


def check_one_charge_spin(potentials: Sequence[Potential]) -> None:
    """Check that all members are conditioned on charge and spin alike, so that one graph serves all.

    Raises:
        ValueError: If they are not.
    """
    kinds = {(p.config.charge_spin, p.config.default_charge_spin) for p in potentials}
    if len(kinds) > 1:
        raise ValueError(
            "the members of the committee differ in charge_spin or default_charge_spin; give models that agree"
        )
