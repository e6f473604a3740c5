"""Settings of the runners of Matbench Discovery (repository of July 2026), by their names in a submission."""

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
    """What of the settings of a run is not that of a runner, for people."""
    return tuple(
        f"{name} = {settings[name]} (runner of the leaderboard: {value})"
        for name, value in protocol.items()
        if settings[name] != value
    )
