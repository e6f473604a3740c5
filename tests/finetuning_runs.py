"""Helpers for the tests of the options of fine-tuning: a tiny start, data of its labels, and runs from it."""

import io
from pathlib import Path

from ase import Atoms
from rich.console import Console

from dpa4.data import write_structures
from dpa4.potential import Potential
from dpa4.potential.checkpoint import load_potential, save_potential
from dpa4.training.options import RunConfig
from dpa4.training.run import train
from helpers import graph_of, molecule, random_potential

ELEMENTS = ("H", "C", "N", "O")
SHIFT = {"H": -3.25, "C": 12.5, "N": 100.0, "O": -7.125}  # eV: another level of theory


def start_and_data(folder: Path, **changes) -> None:
    """Write a start with some options changed, data with its labels (old.xyz), and others (new.xyz)."""
    small = {"n_blocks": 2, "lmax": 1, "mixing_layers": 1, "elements": ELEMENTS}
    start = random_potential(**(small | changes)).float()
    save_potential(start, folder / "start.safetensors", {"training data": "old.xyz"})
    start = load_potential(folder / "start.safetensors")
    write_structures(folder / "old.xyz", labelled(start, range(100, 116), ("NHH", "CNH", "NNCH")))
    write_structures(
        folder / "new.xyz", labelled(start, range(16), ("HCO", "HHC", "OOH", "HCOO"), SHIFT, 2.0)
    )


def labelled(
    start: Potential,
    seeds: range,
    formulas: tuple[str, ...],
    shift: dict[str, float] | None = None,
    scale=1.0,
) -> list[Atoms]:
    """Clusters with the energies and forces of a potential times a factor, and energies shifted per element."""
    images = []
    for seed in seeds:
        atoms = molecule(seed, 5 + seed % 3, formulas[seed % len(formulas)])
        prediction = start(graph_of(atoms, start.config.cutoff))
        network = float(prediction.energy) - sum(
            start.reference_energies[ELEMENTS.index(e)].item() for e in atoms.symbols
        )
        moved = sum((shift or {}).get(e, 0.0) for e in atoms.symbols)
        atoms.info["REF_energy"] = float(prediction.energy) + (scale - 1) * network + moved
        atoms.arrays["REF_forces"] = scale * prediction.forces.detach().numpy()
        images.append(atoms)
    return images


def options(folder: Path, output: Path, finetune=None, replay=None, **training) -> dict:
    """Options of a run of six steps from the start of a folder."""
    defaults = {
        "steps": 6,
        "batch_size": 4,
        "validation_interval": 2,
        "log_interval": 2,
        "finetune": finetune or {},
    }
    return {
        "model": {"start_from": str(folder / "start.safetensors")},
        "data": {"train": str(folder / "new.xyz"), "validation_fraction": 0.25, "replay": replay or {}},
        "training": defaults | training,
        "output": str(output),
        "device": "cpu",
    }


def finetune(values: dict, resume: bool = False) -> str:
    """Run; return the printed text."""
    console = Console(file=io.StringIO(), record=True, width=200)
    train(RunConfig.model_validate(values), resume=resume, console=console)
    return console.export_text()
