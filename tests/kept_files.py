"""Files in data/checkpoints that earlier versions of dpa4 wrote, and the results they must still give.

scripts/make_old_checkpoint.py makes the files with these functions; test_old_checkpoints.py reads them.
"""

import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dpa4.graph import build_graph
from dpa4.potential import Potential, load_potential
from dpa4.training import train
from dpa4.training.options import RunConfig

FOLDER = Path(__file__).resolve().parent / "data" / "checkpoints"
DATA = FOLDER / "train.xyz"
SAVED_STEPS, ALL_STEPS = 20, 26  # of the training run: when its state was kept, and after it is resumed


def checkpoint_file(version: int) -> Path:
    return FOLDER / f"potential-{version}.safetensors"


def state_file(version: int) -> Path:
    return FOLDER / f"state-{version}.pt.gz"


def results_file(file: Path) -> Path:
    return file.with_name(file.name.split(".")[0] + ".json")


def training_run(folder: Path, steps: int, resume: bool = False) -> Path:
    """Train in ``folder`` and return the folder of the run; all paths in the options are relative."""
    shutil.copy(DATA, folder)
    options = {
        "model": {
            "preset": "nano",
            "channels": 4,
            "cutoff": 4.0,
            "n_radial": 4,
            "n_blocks": 1,
            "mixing_layers": 1,
            "use_env_seed": False,
            "ffn_neurons": 8,
            "so3_readout": "none",
        },
        "data": {"train": DATA.name, "validation_fraction": 0.25},
        "training": {
            "steps": steps,
            "batch_size": 2,
            "validation_interval": 10,
            "log_interval": 1,
            "learning_rate": 1e-2,
            "ema_decay": 0.9,
        },
        "output": "run",
        "device": "cpu",
    }
    with chdir(folder):
        train(RunConfig.model_validate(options), resume=resume, console=Console(quiet=True))
    return folder / "run"


def evaluate(file: Path, structure: dict[str, Any]) -> dict[str, Any]:
    """Return energy (eV) and forces (eV/Angstrom) of a structure in float64."""
    potential: Potential = load_potential(file, dtype=torch.float64)
    numbers, positions = np.array(structure["numbers"]), np.array(structure["positions"])
    no_cell, no_pbc = np.zeros((3, 3)), np.zeros(3, dtype=bool)
    result = potential(build_graph(numbers, positions, no_cell, no_pbc, potential.config.cutoff))
    return {"energy": result.energy.item(), "forces": result.forces.tolist()}


def write_results(file: Path, structure: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the results of a file beside it."""
    results_file(file).write_text(json.dumps(structure | results) + "\n", encoding="utf-8")


def read_results(file: Path) -> dict[str, Any]:
    """Return the structure and the results that were written with a file."""
    return json.loads(results_file(file).read_text(encoding="utf-8"))
