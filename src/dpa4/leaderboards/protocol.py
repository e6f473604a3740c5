"""Settings of the Matbench Discovery runners (repository of July 2026), under their names in a submission."""

from collections.abc import Mapping
from typing import Any

DISCOVERY: dict[str, Any] = {
    "max_force": 0.05,  # eV/Angstrom
    "max_steps": 500,
    "ase_optimizer": "FIRE",
    "cell_filter": "FrechetCellFilter",
}
KAPPA: dict[str, Any] = {
    "force_max": 1e-4,  # eV/Angstrom
    "max_steps": 300,
    "displacement_distance": 0.01,  # Angstrom
}


def differences(settings: Mapping[str, Any], protocol: Mapping[str, Any]) -> tuple[str, ...]:
    """Differences between the settings of a run and of the leaderboard's runner, as readable text."""
    return tuple(
        f"{name} = {settings[name]} (runner of the leaderboard: {value})"
        for name, value in protocol.items()
        if settings[name] != value
    )
