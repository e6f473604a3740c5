"""Train MACE on the data sets of accuracy.py for a given time, and print its errors beside those of dpa4.

    python benchmarks/beside_mace.py DATA --mace-python PYTHON --minutes 4 --seeds 0 1 --jobs 4 --output mace
    python benchmarks/beside_mace.py --table accuracy/results.jsonl mace/results.jsonl

PYTHON is the interpreter of another environment, with torch and the packages of mace-requirements.txt. MACE is a
black box there: its programs ``run_train`` and ``eval_configs`` train and predict, and the errors are computed here,
as for dpa4. Structures for training and tests and the share for validation are those of accuracy.py; MACE draws the
validation structures itself.

The recipe has the size of the models in arXiv:2206.07697 (256 channels, L = 2, cutoff 5 Å, batches of 5, AMSGrad,
learning rate 0.01, weights 1 : 1000 of energy and forces) and a second stage in the last quarter with the weights and
the learning rate that MACE sets. Energies of isolated atoms come from the data set if it has them, else from a fit.
A short training measures the time per epoch, so that the number of epochs fills --minutes; the time without imports
and evaluation is in the results as ``seconds``. With --jobs, let dpa4 share the GPU in the same way.

results.jsonl in the output folder receives one line per training and test set, with the fields of accuracy.py. The
same command again skips finished trainings and continues the others from their last checkpoint.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
from accuracy import DATA_SETS, files_of, rows_of, table

from dpa4.data import read_frames
from dpa4.output import tolerate_any_encoding
from dpa4.training.evaluation import FramePrediction, error_table

ISOLATED_ATOMS = {"acac": "acac/isolated_atoms.xyz", "3bpa": "3bpa/iso_atoms.xyz"}
TIMED_EPOCHS = 3
RECIPE = [
    "--model=ScaleShiftMACE",
    "--num_interactions=2",
    "--max_L=2",
    "--correlation=3",
    "--r_max=5.0",
    "--batch_size=5",
    "--valid_batch_size=10",
    "--lr=0.01",
    "--amsgrad",
    "--ema",
    "--ema_decay=0.99",
    "--energy_weight=1",
    "--forces_weight=1000",
    "--energy_key=energy",
    "--forces_key=forces",
    "--plot=False",
]
DESCRIBE = """
import json, sys, torch
model = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
number = sum(p.numel() for p in model.parameters())  # all, since MACE saves them frozen
device = torch.cuda.get_device_name() if sys.argv[2] == "cuda" else "cpu"
print(json.dumps({"parameters": number, "torch": torch.__version__, "device": device}))
"""
"""Program for the other environment, the only one where MACE's model, just written there, is loaded."""
TIME = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) INFO: "


class Settings(NamedTuple):
    """Options that all trainings share."""

    data: Path
    python: str
    minutes: float
    channels: int
    dtype: str
    device: str


def training_options(settings: Settings, name: str, seed: int, train_file: Path) -> list[str]:
    """Options of MACE's ``run_train`` without the number of epochs."""
    return [
        *RECIPE,
        f"--num_channels={settings.channels}",
        f"--default_dtype={settings.dtype}",
        f"--device={settings.device}",
        f"--E0s={atomic_energies(name, settings.data)}",
        f"--train_file={train_file}",
        f"--valid_fraction={DATA_SETS[name].validation_fraction}",
        f"--seed={seed}",
        "--name=mace",
    ]


def atomic_energies(name: str, data: Path) -> str:
    """Energies of isolated atoms by atomic number, or ``average`` for a least-squares fit."""
    if name not in ISOLATED_ATOMS:
        return "average"
    atoms = ase.io.read(data / ISOLATED_ATOMS[name], ":")
    return json.dumps({int(a.numbers[0]): a.get_potential_energy() for a in atoms}).replace('"', "")


def schedule(epochs: int) -> list[str]:
    """Number of epochs, second stage in the last quarter, and a patience in proportion; 50 from 2000 epochs on."""
    return [
        f"--max_num_epochs={epochs}",
        "--swa",
        f"--start_swa={3 * epochs // 4}",
        f"--scheduler_patience={min(max(epochs // 40, 5), 50)}",
        f"--patience={epochs}",
    ]


def run(command: Sequence[str], log: Path) -> None:
    """Run a program of MACE.

    Raises:
        RuntimeError: If it fails.
    """
    with log.open("ab") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise RuntimeError(f"MACE ended with status {status}; see {log}")


def seconds_of_epochs(log: str) -> list[float]:
    """Seconds of each epoch with its validation, from MACE's log; the times between two runs are left out."""
    times, last = [], None
    for stamp, message in re.findall(TIME + r"(Started training|Initial|Epoch \d+)", log, re.MULTILINE):
        now = datetime.fromisoformat(stamp)
        if message.startswith("Epoch") and last is not None:
            times.append((now - last).total_seconds())
        last = now
    return times


def epochs_for(settings: Settings, options: list[str], folder: Path) -> int:
    """Number of epochs that fills the time, from a short training or from an earlier call."""
    plan = folder / "epochs"
    if not plan.is_file():
        log = folder / "timing.log"
        log.unlink(missing_ok=True)
        command = [settings.python, "-m", "mace.cli.run_train", *options, f"--work_dir={folder / 'timing'}"]
        run([*command, f"--max_num_epochs={TIMED_EPOCHS}"], log)
        times = seconds_of_epochs(log.read_text(encoding="utf-8"))[1:]  # the first compiles and warms up
        plan.write_text(str(max(int(60 * settings.minutes * len(times) / sum(times)), 2)), encoding="utf-8")
    return int(plan.read_text(encoding="utf-8"))


def run_job(settings: Settings, name: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train MACE, or continue, and return one result per test set."""
    folder.mkdir(parents=True, exist_ok=True)
    train_file, tests = files_of(name, settings.data, folder)
    options = training_options(settings, name, seed, train_file)
    epochs = epochs_for(settings, options, folder)
    log = folder / "training.log"
    options += schedule(epochs)
    command = [settings.python, "-m", "mace.cli.run_train", *options, f"--work_dir={folder}"]
    run([*command, "--restart_latest"], log)
    text = log.read_text(encoding="utf-8")
    version = re.search(r"MACE version: (\S+)", text)
    updates = re.search(r"Number of gradient updates: (\d+)", text)
    result: dict[str, Any] = {
        "data": name,
        "recipe": "mace",
        "seed": seed,
        "steps": int(updates[1]) if updates else None,
    }
    result |= {"epochs": epochs, "minutes": settings.minutes, "options": options, "extra": []}
    result |= {"seconds": round(sum(seconds_of_epochs(text)), 1)}
    description = [settings.python, "-c", DESCRIBE, str(folder / "mace_stagetwo.model"), settings.device]
    described = subprocess.run(description, capture_output=True, check=True, text=True).stdout
    result |= json.loads(described.splitlines()[-1])  # imports may print warnings first
    result |= {"version": f"mace-torch {version[1]}" if version else None}
    training = errors_on(settings, train_file, folder, "training")
    result |= {f"training {quantity}": value for quantity, value in training.items()}
    return [
        result | {"test": test} | errors_on(settings, path, folder, test.replace(" ", "-"))
        for test, path in tests.items()
    ]


def errors_on(settings: Settings, path: Path, folder: Path, name: str) -> dict[str, float]:
    """Errors of MACE on a file, predicted in the precision of the training; float32 rounds energies to 1 meV."""
    output = folder / f"predictions-{name}.xyz"
    command = [settings.python, "-m", "mace.cli.eval_configs", f"--configs={path}", f"--output={output}"]
    options = [f"--model={folder / 'mace_stagetwo.model'}", f"--device={settings.device}", "--batch_size=16"]
    run([*command, *options, f"--default_dtype={settings.dtype}"], folder / "evaluation.log")
    return errors_of_predictions(path, output)


def errors_of_predictions(path: Path, predictions: Path) -> dict[str, float]:
    """MAE and RMSE of energy and forces in a file that MACE wrote; the names contain the units."""
    # Frames without a virial: MACE is not trained on stress here.
    frames = [replace(frame, virial=None) for frame in read_frames(path)]
    predicted = [
        FramePrediction(
            float(atoms.info["MACE_energy"]), np.asarray(atoms.arrays["MACE_forces"]), np.zeros((3, 3))
        )
        for atoms in ase.io.read(predictions, ":")
    ]
    errors: dict[str, float] = {}
    for row in error_table(frames, predicted).rows:
        if row.group == "all":
            quantity = f"{row.quantity} ({row.unit})"
            errors |= {f"{quantity} mae": round(row.mae, 4), f"{quantity} rmse": round(row.rmse, 4)}
    return errors


def beside(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown table of the results of both programs; the length is in minutes for MACE, in steps for dpa4."""
    return table(
        row | {"steps": f"{row['minutes']:g} min" if row["recipe"] == "mace" else str(row["steps"])}
        for row in rows
    )


def run_all(settings: Settings, jobs: Sequence[tuple[str, int]], output: Path, parallel: int) -> int:
    """Run the trainings without results, several at a time; return the number that failed."""
    results = output / "results.jsonl"
    done = {(row["data"], row["seed"]) for row in rows_of(results) if row["minutes"] == settings.minutes}
    waiting = [job for job in jobs if job not in done]
    print(f"{len(jobs)} trainings, {len(jobs) - len(waiting)} finished before", flush=True)
    failed = 0
    with ThreadPoolExecutor(parallel) as pool:
        folders = [output / "runs" / f"{name}_{settings.minutes:g}min_seed{seed}" for name, seed in waiting]
        running = [
            pool.submit(run_job, settings, *job, folder.absolute())
            for job, folder in zip(waiting, folders, strict=True)
        ]
        for job in running:
            try:
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in job.result())
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                failed += 1
                print(error, flush=True)
                continue
            with results.open("a", encoding="utf-8") as file:
                file.write(lines)
            print(lines, end="", flush=True)
    return failed


def main() -> None:
    """Run the trainings of the command line, or print the table of --table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DATA", type=Path, nargs="?", help="folder of the data sets")
    parser.add_argument("--mace-python", metavar="PYTHON", help="interpreter with mace-torch")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="data sets")
    parser.add_argument("--minutes", type=float, default=4, help="time of every training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--channels", type=int, default=256, help="channels of MACE")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="of the training")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("mace"), help="output folder")
    parser.add_argument("--table", type=Path, nargs="+", metavar="RESULTS", help="print results and end")
    options = parser.parse_args()
    tolerate_any_encoding()
    if options.table:
        print(beside(row for path in options.table for row in rows_of(path)))
        return
    if options.folder is None or options.mace_python is None:
        parser.error("DATA and --mace-python are needed to train")
    settings = Settings(
        options.folder.absolute(),
        options.mace_python,
        options.minutes,
        options.channels,
        options.dtype,
        options.device,
    )
    jobs = [(name, seed) for seed in options.seeds for name in options.data]
    failed = run_all(settings, jobs, options.output, options.jobs)
    print(beside(rows_of(options.output / "results.jsonl")))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
