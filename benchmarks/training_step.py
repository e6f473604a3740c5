"""Time a training step of small batches, and compare the losses, for one or more versions of the sources.

    python benchmarks/training_step.py DATA [SOURCES ...] [--steps 1200] [--set training.batch_size=8 ...]

DATA is a file of structures, such as train_300K.xyz of acetylacetone. SOURCES are folders with the package, such as
the src of an earlier commit (`git archive COMMIT src | tar x -C FOLDER`); by default, those of this checkout. Every
version trains in a process of its own, twice in turns, and prints a JSON line: milliseconds per step in total (median
over the rows of train.csv after the first quarter), and the largest relative difference of a loss from that of the
first run. Differences after hundreds of steps are rounding, amplified by training.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
model:
  preset: paper-neo
  cutoff: 5.0
data:
  validation_fraction: 0.1
  reference_energies: least_squares
training:
  batch_size: 8
  learning_rate: 1e-3
  energy_weight: 60
  forces_weight: 20
  ema_decay: 0.999
  precision: high
"""
INTERVAL = 50  # steps between the rows of train.csv


def trained(data: Path, output: Path, steps: int, overrides: list[str]) -> None:
    """Train with the package that is found first."""
    from dpa4.training import load_run_config, train

    file = output.with_suffix(".yaml")
    file.write_text(RUN)
    settings = [f"training.steps={steps}", f"training.validation_interval={steps}"]
    settings += [f"training.log_interval={INTERVAL}", f"data.train={data}", f"output={output}"]
    train(load_run_config(file, [*settings, *overrides]))


def measured(source: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Rows of train.csv of a run in another process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, __file__, str(options.data.resolve()), "--output", str(output)]
        command += ["--steps", str(options.steps), *(f"--set={text}" for text in options.overrides)]
        path = os.pathsep.join([str(source.resolve()), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)
        with (output / "train.csv").open() as file:
            return [{name: float(value or 0) for name, value in row.items()} for row in csv.DictReader(file)]


def main() -> None:
    """Run every version twice in turns, and print a JSON line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="file of structures")
    parser.add_argument("sources", type=Path, nargs="*", default=[Path(__file__).parents[1] / "src"])
    parser.add_argument("--steps", type=int, default=1200, help="training steps of a run")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        help="override an option, as model.preset=mini",
    )
    parser.add_argument("--output", type=Path, help="train into this folder with the present package, only")
    options = parser.parse_args()
    if options.output is not None:
        trained(options.data, options.output, options.steps, options.overrides)
        return
    first: list[float] = []
    for source in 2 * options.sources:
        rows = measured(source, options)
        seconds = [b["seconds"] - a["seconds"] for a, b in zip(rows, rows[1:], strict=False)]
        losses = [row["loss"] for row in rows]
        first = first or losses
        differences = [abs(a / b - 1) for a, b in zip(losses, first, strict=True)]
        result: dict[str, object] = {"source": str(source)}
        result["ms_per_step"] = round(1e3 / INTERVAL * statistics.median(seconds[len(seconds) // 4 :]), 3)
        result |= {"difference_first_row": differences[0], "largest_difference": max(differences)}
        print(json.dumps(result | {"loss": losses[-1], "overrides": options.overrides}), flush=True)


if __name__ == "__main__":
    main()
