"""Helpers for the tests of training: a tiny model, data for it, and runs that end early."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from rich.console import Console
from safetensors.torch import load_file

from dpa4.output import read_csv
from dpa4.training.options import RunConfig
from dpa4.training.run import train
from dpa4.training.trainer import Trainer

SILENT = Console(quiet=True)
MODEL = {"preset": "nano", "channels": 8, "cutoff": 4.0, "n_radial": 6, "mixing_layers": 1, "n_blocks": 1}


class FinishedRun(NamedTuple):
    """Uninterrupted training run."""

    folder: Path
    best: Path  # what `train` returned
    text: str  # what it printed


def argon(count: int, seed: int = 0) -> list[Atoms]:
    """Lennard-Jones clusters (energy, forces) and strained crystals (stress too) that differ widely."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        if i % 2:
            atoms = bulk("Ar", "fcc", a=3.4 + 0.3 * rng.random(), cubic=True)
        else:
            grid = np.array([[x, y, 0.0] for x in (0, 2.5) for y in (0, 2.5)])
            atoms = Atoms("Ar4", positions=grid)
        atoms.rattle(0.1, rng=rng)
        atoms.calc = LennardJones(sigma=2.3, epsilon=0.2, rc=6.0, ro=4.0, smooth=True)
        atoms.get_potential_energy()
        atoms.info["config_type"] = "crystal" if i % 2 else "cluster"
        images.append(atoms)
    return images


def options(data: Path, output: Path, **training) -> dict:
    """Options of a run of 13 steps, four in an epoch."""
    defaults = {
        "steps": 13,
        "batch_size": 3,
        "validation_interval": 5,
        "log_interval": 2,
        "learning_rate": 2e-3,
    }
    return {
        "model": MODEL,
        "data": {"train": str(data), "validation_fraction": 0.2},
        "training": defaults | training,
        "output": str(output),
        "device": "cpu",
    }


def run(data, output, resume=False, **training) -> tuple[Path, str]:
    """Train; return the path that `train` returns and the printed text."""
    console = Console(file=io.StringIO(), record=True, width=200)
    config = RunConfig.model_validate(options(data, output, **training))
    best = train(config, resume=resume, console=console)
    return best, console.export_text()


def assert_same_run(one: Path, two: Path) -> None:
    """Compare models, and logs without their times, bit for bit."""
    for name in ("best.safetensors", "last.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (name, key)
    for name in ("train.csv", "valid.csv"):
        a, b = read_csv(one / name), read_csv(two / name)
        assert [{k: v for k, v in row.items() if k != "seconds"} for row in a] == [
            {k: v for k, v in row.items() if k != "seconds"} for row in b
        ]


class Killed(BaseException):
    """Stand-in for SIGKILL in this process, which the trainer does not handle."""


def kill_at(monkeypatch, step: int) -> None:
    """Make the trainer die in the step after ``step`` finished ones."""
    original = Trainer._train_on

    def deadly(self, batch):
        if self.step == step:
            raise Killed
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_on", deadly)
