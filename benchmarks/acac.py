"""Acetylacetone (BOTNet data sets): train on molecular dynamics at 300 K, test at 300 K and 600 K.

    python benchmarks/acac.py DATA --output acac-run [--minutes 20 | --steps 2300] [--set model.lmax=2 ...]

DATA is the folder with train_300K.xyz, test_MD_300K.xyz and test_MD_600K.xyz. The number of steps is --steps,
or as many as fit into --minutes according to a short timed run. Prints one JSON line; results are in
benchmarks/README.md.
"""

import argparse
import csv
import json
import shutil
import time
from pathlib import Path

import torch

from dpa4.data import read_frames
from dpa4.potential import load_potential
from dpa4.system import choose_device
from dpa4.training import RunConfig, evaluate, load_run_config, train

RUN = """
model:
  preset: paper-air
  n_blocks: 2
  mixing_layers: 3
  edge_norm: false
  cutoff: 5.0
data:
  validation_fraction: 0.1
  reference_energies: least_squares
training:
  batch_size: 8
  learning_rate: 2e-3
  energy_weight: 60
  forces_weight: 20
  log_interval: 100
"""


def configuration(folder: Path, output: Path, overrides: list[str]) -> RunConfig:
    """Configuration of a run, loaded from a YAML file and overrides as a user would."""
    path = output.with_suffix(".yaml")
    path.write_text(RUN)
    files = [f"data.train={folder / 'train_300K.xyz'}", f"output={output}"]
    return load_run_config(path, [*files, *overrides])


def seconds_per_step(folder: Path, output: Path, overrides: list[str]) -> float:
    """Seconds per step after warm-up, from the log of a short run."""
    settings = ["training.steps=200", "training.validation_interval=200", "training.log_interval=100"]
    train(configuration(folder, output, [*overrides, *settings]))
    with (output / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    shutil.rmtree(output)
    return (float(rows[1]["seconds"]) - float(rows[0]["seconds"])) / 100


def main() -> None:
    """Train, evaluate on both test sets and print a JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with the three files")
    parser.add_argument("--output", type=Path, default=Path("acac-run"), help="output folder")
    parser.add_argument("--minutes", type=float, default=20, help="training time, if --steps is not given")
    parser.add_argument("--steps", type=int, help="number of training steps")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="override an option, as model.lmax=2"
    )
    options = parser.parse_args()

    steps = options.steps
    if steps is None:
        steps = int(options.minutes * 60 / seconds_per_step(options.data, options.output, options.overrides))
    settings = [f"training.steps={steps}", f"training.validation_interval={max(steps // 60, 1)}"]
    start = time.perf_counter()
    best = train(configuration(options.data, options.output, [*options.overrides, *settings]))
    result: dict[str, object] = {
        "train_s": round(time.perf_counter() - start),
        "steps": steps,
    }
    device = choose_device("auto")
    potential = load_potential(best, device=device)
    for temperature in (300, 600):
        frames = read_frames(options.data / f"test_MD_{temperature}K.xyz")
        table = evaluate(potential, frames, output=options.output / f"test_{temperature}K", device=device)
        for quantity in ("energy", "forces"):
            row = table.row(quantity)
            assert row is not None
            result[f"{quantity}_{temperature}K"] = {"rmse": row.rmse, "mae": row.mae, "unit": row.unit}
    result |= {"torch": torch.__version__, "overrides": options.overrides}
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    line = json.dumps(result)
    (options.output / "result.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
