"""Options of fine-tuning: errors on new and on old molecules, and time of a step (docs/finetuning.md).

A small model is trained on some molecules of examples/organic and fine-tuned on others, with one option after the
other. All energies are of one level of theory. Errors are those of the last model on the test structures.

    python benchmarks/forgetting.py FOLDER           # errors; a run that exists is not repeated
    python benchmarks/forgetting.py FOLDER --times   # time of a step, on one thread
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import ase.io
import torch
from rich.console import Console

from dpa4.data import read_frames
from dpa4.output import read_csv
from dpa4.potential.checkpoint import load_potential
from dpa4.training.evaluation import evaluate
from dpa4.training.options import RunConfig
from dpa4.training.prepare import prepare
from dpa4.training.run import train
from dpa4.training.state import STATE
from dpa4.training.trainer import Trainer

DATA = Path(__file__).parents[1] / "examples" / "organic"
NEW = ("benzene", "acetonitrile", "acetic-acid")
OLD = ("ethane", "ethylene", "methanol", "ethanol", "acetaldehyde", "methylamine", "formamide", "water-dimer")
QUIET = Console(quiet=True)

# Options of fine-tuning, and whether a half of each batch is replayed.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "all parameters": ({}, False),
    "replay, half of each batch": ({}, True),
    "embedding and block1 frozen": ({"freeze": ["embedding", "block1"]}, False),
    "depth_decay 0.5": ({"depth_decay": 0.5}, False),
    "LoRA, rank 4": ({"lora_rank": 4}, False),
    "LoRA, rank 16": ({"lora_rank": 16}, False),
}


def split_by_molecule(folder: Path) -> None:
    """Write old-*.xyz and new-*.xyz for training, validation and test."""
    for part in ("train", "valid", "test"):
        images = ase.io.read(DATA / f"{part}.xyz", ":")
        for name, molecules in (("old", (*OLD, "IsolatedAtom")), ("new", NEW)):
            chosen = [a for a in images if a.info["config_type"] in molecules]
            ase.io.write(folder / f"{name}-{part}.xyz", chosen, format="extxyz")


def config_of(folder: Path, variant: str | None, seed: int, steps: int) -> RunConfig:
    """Options of the run of the start (None) or of a variant."""
    training: dict[str, Any] = {"steps": steps, "batch_size": 8, "validation_interval": steps, "seed": seed}
    if variant is None:
        name, model = "old", {"preset": "nano", "edge_norm": False}
        training |= {"learning_rate": 1e-2}
        replay: dict[str, Any] = {}
        output = folder / "start"
    else:
        options, replays = VARIANTS[variant]
        name, model = "new", {"start_from": str(folder / "start" / "last.safetensors")}
        training |= {"finetune": options}
        replay = {"files": str(folder / "old-train.xyz")} if replays else {}
        output = folder / f"{list(VARIANTS).index(variant)}-{seed}"
    data = {
        "train": str(folder / f"{name}-train.xyz"),
        "validation": str(folder / f"{name}-valid.xyz"),
        "replay": replay,
    }
    values = {"model": model, "data": data, "training": training, "output": str(output), "device": "cpu"}
    return RunConfig.model_validate(values)


def errors(folder: Path, model: Path) -> list[float]:
    """MAE of energy (meV/atom) and forces (meV/Å) on new and on old molecules.

    Energies of old molecules are computed with the reference energies of the start.
    """
    potential = load_potential(model)
    start = load_potential(folder / "start" / "last.safetensors")
    found = []
    for name in ("new", "old"):
        if name == "old":
            potential.reference_energies.copy_(start.reference_energies)
        table = evaluate(potential, read_frames(folder / f"{name}-test.xyz"))
        found += [row.mae for quantity in ("energy per atom", "forces") if (row := table.row(quantity))]
    return found


def complete(config: RunConfig, steps: int) -> None:
    """Do a run, or the rest of it."""
    rows = read_csv(config.output / "valid.csv") if (config.output / "valid.csv").exists() else []
    if not rows or int(rows[-1]["step"]) < steps:
        train(config, resume=(config.output / STATE).exists(), console=QUIET)


def measure_errors(folder: Path, seeds: int, steps: int, start_steps: int) -> None:
    """Train what is missing, and print a row per variant."""
    split_by_molecule(folder)
    start = config_of(folder, None, 0, start_steps)
    complete(start, start_steps)
    print(
        "| | new: energy, meV/atom | new: forces, meV/Å | old: energy | old: forces |\n|---|---|---|---|---|"
    )
    found = errors(folder, start.output / "last.safetensors")
    print("| start | " + " | ".join(f"{e:.1f}" for e in found) + " |", flush=True)
    for variant in VARIANTS:
        rows = []
        for seed in range(seeds):
            config = config_of(folder, variant, seed, steps)
            complete(config, steps)
            rows.append(errors(folder, config.output / "last.safetensors"))
        cells = ("/".join(f"{row[i]:.1f}" for row in rows) for i in range(4))
        print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)


def measure_times(folder: Path, rounds: int = 7) -> None:
    """Print the median CPU time of a step of each variant; the variants take turns."""
    torch.set_num_threads(1)
    trainers = {}
    for variant in VARIANTS:
        config = config_of(folder, variant, 0, 100)
        preparation = prepare(config, QUIET)
        batch = next(preparation.train.batches(0))
        trainers[variant] = Trainer(config, preparation, QUIET), batch
    found: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, (trainer, batch) in trainers.items():
            trainer._train_on(batch)
            times = [time.process_time()]
            trainer._differentiate(batch)
            times.append(time.process_time())
            trainer.update.receive(*_numbers(), trainer.step)
            trainer.update.apply()
            times.append(time.process_time())
            found[variant].append([1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)])
    print("| | trained parameters | gradients, ms | update, ms |\n|---|---|---|---|")
    for variant, times in found.items():
        count = sum(p.numel() for p in trainers[variant][0].trained.parameters)
        gradients, update = (statistics.median(t[i] for t in times) for i in range(2))
        print(f"| {variant} | {count:,} | {gradients:.0f} | {update:.1f} |")


def _numbers() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and terms of a step, whatever they are."""
    one = torch.ones((), dtype=torch.float64)
    terms = dict.fromkeys(("energy", "forces", "virial"), one)
    return one, terms | {"absolute_errors": torch.zeros(2, 3, dtype=torch.float64)}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--start-steps", type=int, default=400)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.times:
        measure_times(options.folder)
    else:
        measure_errors(options.folder, options.seeds, options.steps, options.start_steps)


if __name__ == "__main__":
    main()
