"""Files of tests/data/parity: one safetensors file with the weights and results of one model of deepmd-kit.

This module needs neither dpa4 nor deepmd-kit. scripts/make_parity_data.py writes the files with it, tests read
them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "data" / "parity"
NAMES = (
    "C_mini",
    "C_neo",
    "D_base",
    "D_chg_spin_given",
    "D_ffn_so3",
    "D_legacy_version1.0",
    "D_n_focus2",
    "D_radial_none",
    "D_zbl_atten",
    "E_edge_norm_FTF",
    "E_env_exp_5",
    "E_gauss_fix",
    "E_sandwich_TFTF",
    "G1_pro_narrow",
)
STORED_WEIGHT = torch.float8_e5m2  # every value of this type is exact in float32
SMALLEST_ROUNDED = 256  # entries; tensors with fewer stay float32: scales, biases, frequencies
PROJECTIONS = 4

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ParityFile:
    """One model and its results.

    Attributes:
        state: State dict under the names of deepmd-kit; ``_extra_state`` holds the model section of its input.
        charge_spin: Total charge and spin multiplicity of all structures; None: those of the model.
        n_params: Number of parameters that deepmd-kit counts.
        structures: Positions, cells, and results by structure and quantity; units are in the folder's README.
        gradients: By structure: the coefficients ``c``, the loss ``L`` and one entry of `projections` for every
            parameter, named as in ``state``.
    """

    state: dict[str, Any]
    charge_spin: tuple[int, int] | None
    n_params: int
    structures: dict[str, Arrays]
    gradients: dict[str, Arrays]


def round_weights(state: dict[str, Any], parameters: set[str]) -> dict[str, Any]:
    """Return a copy of a state whose large parameters have the values that one byte can hold."""
    rounded = dict(state)
    for name in parameters:
        if state[name].dtype == torch.float32 and state[name].numel() >= SMALLEST_ROUNDED:
            rounded[name] = state[name].to(STORED_WEIGHT).float()
    return rounded


def projections(gradient: np.ndarray) -> np.ndarray:
    """Return the scalar products of a gradient with four waves, which every entry of the gradient changes."""
    waves = np.cos(np.outer(np.arange(1, PROJECTIONS + 1), np.arange(gradient.size)))
    return waves @ gradient.ravel()


def write_parity_file(file: ParityFile, path: Path) -> None:
    """Write a file; equal content gives equal bytes."""
    tensors = {
        f"state/{name}": _shortest(value) for name, value in file.state.items() if isinstance(value, Tensor)
    }
    for group in ("structures", "gradients"):
        for structure, arrays in getattr(file, group).items():
            tensors |= {f"{group}/{structure}/{k}": torch.from_numpy(v.copy()) for k, v in arrays.items()}
    description = {
        "model_params": file.state["_extra_state"]["model_params"],
        "charge_spin": file.charge_spin,
        "n_params": file.n_params,
    }
    # Metadata of one entry only: safetensors writes several in random order.
    save_file(tensors, path, {"fixture": json.dumps(description, sort_keys=True)})


def read_parity_file(path: Path) -> ParityFile:
    """Read a file; a missing one raises FileNotFoundError."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["fixture"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    state: dict[str, Any] = {"_extra_state": {"model_params": description["model_params"]}}
    groups: dict[str, dict[str, Arrays]] = {"structures": {}, "gradients": {}}
    for key, value in tensors.items():
        group, name = key.split("/", 1)
        if group == "state":
            state[name] = value.float() if value.dtype == STORED_WEIGHT else value
        else:
            structure, quantity = name.split("/", 1)
            groups[group].setdefault(structure, {})[quantity] = value.numpy()
    charge_spin = description["charge_spin"]
    return ParityFile(state, tuple(charge_spin) if charge_spin else None, description["n_params"], **groups)


def _shortest(value: Tensor) -> Tensor:
    """Return a float32 tensor in one byte per entry where that is exact, any other tensor unchanged."""
    if value.dtype == torch.float32 and value.numel() >= SMALLEST_ROUNDED:
        short = value.to(STORED_WEIGHT)
        if torch.equal(short.float(), value):
            return short.contiguous()
    return value.contiguous()
