"""Train recipes on small data sets and measure their errors; the anchor of every claim about accuracy.

    python benchmarks/accuracy.py DATA adam-for-basis --output accuracy --steps 6000 --seeds 0 1 --jobs 4
    python benchmarks/accuracy.py DATA --data acac mlearn-si --recipe default --set model.lmax=3
    python benchmarks/accuracy.py DATA ladder --output accuracy --table
    python benchmarks/accuracy.py DATA --list

DATA is a folder with the folders acac, rmd17, 3bpa, mlearn and inorganic; `DATA_SETS` names the files. An experiment
is a set of recipes on some data sets. A recipe is a list of overrides on the file that `dpa4 init` writes, with the
cutoff and learning rate of `BASE`. Every training is a process of its own, --jobs of them at a time, for a fixed
number of steps.

results.jsonl in the output folder receives one line per training and test set: errors of energy, forces and, with
labels, stress; the same on the training file (with the part for validation); options, seed, steps, seconds of
training without compilation, parameters, and version. A table of means over the seeds is printed at the end. --table
prints the table of an experiment relative to its first recipe instead of training; times are comparable only between
trainings that ran alone (--jobs 1). The same command again continues: finished trainings are skipped, others resume
from their last checkpoint. Without matplotlib there are no learning curves.
"""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dpa4
from dpa4.data import read_frames
from dpa4.output import read_csv, tolerate_any_encoding
from dpa4.potential import load_potential
from dpa4.system import choose_device
from dpa4.training import RunConfig, evaluate, load_run_config, train, trainer
from dpa4.training.run_file import default_config_text
from dpa4.training.state import STATE, load_state


class DataSet(NamedTuple):
    """Files of a data set, relative to DATA.

    Attributes:
        train: Training file, a tenth of which is for validation unless ``validation_fraction`` says otherwise.
        tests: Test files by name; without any, the last ``held_out`` structures of the training file are the test.
        structures: Number of structures for training and validation, evenly spaced in the file; None: all.
        held_out: Number of structures at the end of the training file that are tested.
        validation_fraction: Share of the structures for validation.
        more: Further training files.
        every: Number n of which every n-th structure of each training file is tested instead of trained on; 0: none.
    """

    train: str
    tests: dict[str, str]
    structures: int | None = None
    held_out: int = 0
    validation_fraction: float = 0.1
    more: tuple[str, ...] = ()
    every: int = 0

    @property
    def num_tests(self) -> int:
        """Number of test sets, including the part of the training files that is held out."""
        return len(self.tests) + bool(self.held_out or self.every)


DATA_SETS = {
    "acac": DataSet(
        "acac/train_300K.xyz", {"300K": "acac/test_MD_300K.xyz", "600K": "acac/test_MD_600K.xyz"}
    ),
    "3bpa": DataSet("3bpa/train_300K.xyz", {}, held_out=100),
    "mlearn-si": DataSet("mlearn/Si_train.xyz", {"test": "mlearn/Si_test.xyz"}),
    "mlearn-mo": DataSet("mlearn/Mo_train.xyz", {"test": "mlearn/Mo_test.xyz"}),
    "inorganic": DataSet(
        "inorganic/mptrj-random-1k.xyz",
        {"alkali": "inorganic/mpf-alkali-TP.xyz"},
        validation_fraction=0.05,
        more=("inorganic/mpf-TP.xyz",),
        every=10,
    ),
}
for _molecule in ("aspirin", "ethanol"):
    _files = f"rmd17/{_molecule}_train.xyz", {"test": f"rmd17/{_molecule}_test.xyz"}
    DATA_SETS[f"rmd17-{_molecule}"] = DataSet(*_files, validation_fraction=0.05)
    DATA_SETS[f"rmd17-{_molecule}-50"] = DataSet(*_files, structures=50)

BASE = ["model.cutoff=5.0", "training.learning_rate=4e-3", "training.log_interval=100"]

_SCALAR_READOUT = ["model.message_node_so3=false", "model.so3_readout=none"]
_S2_GRIDS = ["model.ffn_on=s2", "model.ffn_grid=glu", *_SCALAR_READOUT]
_GENERATION_1 = ["model.edge_norm=true", *_S2_GRIDS]
_EDGE_NORM = ["model.edge_norm=[false, true, true]"]
_PRE_NORM = ["model.sandwich_norm=[true, false, true, false]"]
_ONE_ENVELOPE = ["model.env_exp=5"]
_FIXED_GAUSSIANS = ["model.basis=gaussian/fix"]
_ADAM = ["training.adam_for_basis=true"]
_GENERATION_3 = [*_EDGE_NORM, *_PRE_NORM, *_ONE_ENVELOPE, *_FIXED_GAUSSIANS]
_SUM = ["model.n_atten_head=0"]
_PAPER_NEO = ["model.preset=paper-neo", "model.symmetry=SO3"]
_LADDER = [*_PAPER_NEO, "model.channels=32", "model.lmax=2", "model.mixing_layers=4"]

RECIPES = {
    "default": [],  # generation 2 without edge_norm
    "adam-for-basis": _ADAM,
    "generation-1": _GENERATION_1,
    "generation-2": ["model.edge_norm=true"],
    "v20260901": [*_EDGE_NORM, *_PRE_NORM],
    "v20260911": _GENERATION_3,
    "v20260911-adam-for-basis": [*_GENERATION_3, *_ADAM],
    "edge-norm-ftt": _EDGE_NORM,
    "pre-norm": _PRE_NORM,
    "one-envelope": _ONE_ENVELOPE,
    "fixed-gaussians": _FIXED_GAUSSIANS,
    "gaussians": ["model.basis=gaussian"],
    "paper-neo": ["model.preset=paper-neo"],
    # less capacity
    "no-env-seed": ["model.use_env_seed=false"],
    "radial-8": ["model.n_radial=8"],
    "one-block": ["model.n_blocks=1"],
    "channels-16": ["model.channels=16"],
    "sum": _SUM,
    "cutoff-4": ["model.cutoff=4.0"],
    # other training
    "weight-decay-0.03": ["training.weight_decay=0.03"],
    "weight-decay-0.1": ["training.weight_decay=0.1"],
    "weight-decay-0.3": ["training.weight_decay=0.3"],
    "batch-4": ["training.batch_size=4"],
    "rate-2e-3": ["training.learning_rate=2e-3"],
    "energy-weight-5": ["training.energy_weight=5.0"],
    "energy-weight-60": ["training.energy_weight=60.0"],
    "ema-0.99": ["training.ema_decay=0.99"],
    "huber": ["training.loss=huber"],
    "mse": ["training.loss=mse", "training.energy_weight=1e5", "training.forces_weight=1e3"],
    # the ablations of the paper (arXiv:2606.02419), on a small network of generation 1
    "ladder": _LADDER,
    "ladder-sum": [*_LADDER, *_SUM],
    "ladder-product-none": [*_LADDER, "model.radial_so2_mode=none"],
    "ladder-product-scalar": [*_LADDER, "model.radial_so2_mode=degree"],
    "ladder-product-rank-4": [*_LADDER, "model.radial_so2_rank=4"],
    "ladder-two-foci": [*_LADDER, "model.n_focus=2"],
    "ladder-3-layers": [*_LADDER, "model.mixing_layers=3"],
    "ladder-2-layers": [*_LADDER, "model.mixing_layers=2"],
    "ladder-gates": [*_LADDER, "model.ffn_on=degrees"],
    "ladder-adamw": [*_LADDER, "training.optimizer=adamw"],
    "ladder-adamw-1e-3": [*_LADDER, "training.optimizer=adamw", "training.learning_rate=1e-3"],
    "ladder-cosine": [*_LADDER, "training.schedule=cosine"],
    "so3": ["model.symmetry=SO3"],
    "so3-s2": ["model.symmetry=SO3", *_S2_GRIDS],
    "o3-so3grid": ["model.symmetry=O3"],
    "o3-s2": ["model.symmetry=O3", *_S2_GRIDS],
}
"""Overrides on the default run file by the name of the recipe; the v... recipes are switches, not sizes."""

_BOTH = ["acac", "mlearn-si"]
_SCARCE = ["acac", "rmd17-ethanol-50"]
EXPERIMENTS: dict[str, tuple[list[str], list[str]]] = {
    "anchor": (list(DATA_SETS), ["default"]),
    "adam-for-basis": (
        _BOTH,
        ["default", "adam-for-basis", "v20260911", "v20260911-adam-for-basis"],
    ),
    "generations": (
        _BOTH,
        ["default", "generation-1", "generation-2", "v20260901", "v20260911"],
    ),
    "symmetry": (_BOTH, ["so3", "so3-s2", "o3-so3grid", "o3-s2"]),
    "switches": (
        _BOTH,
        [
            "default",
            "generation-2",
            "edge-norm-ftt",
            "pre-norm",
            "one-envelope",
            "gaussians",
            "fixed-gaussians",
        ],
    ),
    "capacity": (
        _SCARCE,
        ["default", "no-env-seed", "radial-8", "one-block", "channels-16", "sum", "cutoff-4", "v20260911"],
    ),
    "regularisation": (
        _SCARCE,
        ["default", "weight-decay-0.03", "weight-decay-0.1", "weight-decay-0.3", "ema-0.99"],
    ),
    "loss": (
        _SCARCE,
        ["default", "energy-weight-5", "energy-weight-60", "huber", "mse", "batch-4", "rate-2e-3"],
    ),
    "ladder": (["inorganic"], [name for name in RECIPES if name.partition("-")[0] == "ladder"]),
}
"""Data sets and recipes by the name of the experiment."""

UNFINISHED = 3
"""Exit status of a training that was stopped before its last step."""


class Job(NamedTuple):
    """One training."""

    data: str
    recipe: str
    seed: int
    steps: int
    extra: tuple[str, ...] = ()  # overrides on top of the recipe

    @property
    def name(self) -> str:
        """Name of the folder."""
        parts = [self.data, self.recipe, *self.extra, f"{self.steps}steps", f"seed{self.seed}"]
        return "_".join(parts).replace("/", "-").replace(" ", "")

    @property
    def overrides(self) -> list[str]:
        """Overrides on the default run file."""
        return [*BASE, *RECIPES[self.recipe], *self.extra]


# --- one training


def frames_of(source: Path) -> list[str]:
    """Text of every frame of an extended XYZ file."""
    frames = []
    with source.open(encoding="utf-8") as file:
        while head := file.readline():
            frames.append("".join([head, *(file.readline() for _ in range(int(head) + 1))]))
    return frames


def training_and_test_frames(kind: DataSet, data: Path) -> tuple[list[str], list[str]]:
    """Texts of the structures to train on, and of those of the training files that are held out."""
    files = [frames_of(data / path) for path in (kind.train, *kind.more)]
    if kind.every:
        tested = [frame for frames in files for frame in frames[kind.every - 1 :: kind.every]]
        rest = [frame for frames in files for i, frame in enumerate(frames, start=1) if i % kind.every]
    else:
        frames = [frame for frames in files for frame in frames]
        number = len(frames) - kind.held_out
        rest, tested = frames[:number], frames[number:]
    if kind.structures is not None:
        rest = [rest[i * len(rest) // kind.structures] for i in range(kind.structures)]
    return rest, tested


def files_of(name: str, data: Path, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Training file and test files of a data set; parts of a file are written to ``folder``."""
    kind = DATA_SETS[name]
    source = data / kind.train
    tests = {test: data / path for test, path in kind.tests.items()}
    if not (kind.held_out or kind.every or kind.more) and kind.structures is None:
        return source, tests
    trained, tested = training_and_test_frames(kind, data)
    part = folder.with_name(f"{folder.name}-train.xyz")
    part.write_text("".join(trained), encoding="utf-8")
    if tested:
        tests["held out"] = folder.with_name(f"{folder.name}-test.xyz")
        tests["held out"].write_text("".join(tested), encoding="utf-8")
    return part, tests


def configuration(job: Job, train_file: Path, folder: Path) -> RunConfig:
    """Configuration of a training, loaded from a run file and overrides as a user would."""
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(default_config_text(), encoding="utf-8")
    interval = max(job.steps // 40, 1)
    own = [
        f"data.train={train_file}",
        f"data.validation_fraction={DATA_SETS[job.data].validation_fraction}",
        f"training.steps={job.steps}",
        f"training.validation_interval={interval}",
        f"training.seed={job.seed}",
        f"output={folder}",
    ]
    return load_run_config(path, [*job.overrides, *own])


def run_job(job: Job, data: Path, folder: Path) -> None:
    """Train, or resume, and write the results next to the folder of the training."""
    if importlib.util.find_spec("matplotlib") is None:
        trainer.plot_learning_curve = lambda folder: None
    folder.parent.mkdir(parents=True, exist_ok=True)
    train_file, tests = files_of(job.data, data, folder)
    best = train(configuration(job, train_file, folder), resume=(folder / STATE).is_file())
    if load_state(folder / STATE)["step"] < job.steps:
        raise SystemExit(UNFINISHED)
    device = choose_device("auto")
    potential = load_potential(best, device=device)
    result: dict[str, Any] = {"data": job.data, "recipe": job.recipe, "seed": job.seed, "steps": job.steps}
    result |= {"options": job.overrides, "extra": list(job.extra)}
    result |= {"seconds": float(read_csv(folder / "train.csv")[-1]["seconds"])}
    result |= {"parameters": sum(p.numel() for p in potential.parameters() if p.requires_grad)}
    result |= {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    result |= {"version": f"dpa4 {dpa4.__version__}"}
    training = errors_on(potential, train_file, device)
    result |= {f"training {quantity}": value for quantity, value in training.items()}
    lines = [result | {"test": name} | errors_on(potential, path, device) for name, path in tests.items()]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    result_file(folder).write_text(text, encoding="utf-8")


def result_file(folder: Path) -> Path:
    """File with the results of a training, one line per test set."""
    return folder.with_name(f"{folder.name}.jsonl")


def errors_on(potential: Any, path: Path, device: torch.device) -> dict[str, float]:
    """MAE and RMSE of every labelled quantity of a test file; the names contain the units."""
    table = evaluate(potential, read_frames(path), device=device)
    errors: dict[str, float] = {}
    for row in table.rows:
        if row.group == "all":
            quantity = f"{row.quantity} ({row.unit})"
            errors |= {f"{quantity} mae": round(row.mae, 4), f"{quantity} rmse": round(row.rmse, 4)}
    return errors


# --- many trainings


def finished(results: Path) -> set[Job]:
    """Trainings that have all their lines in the file of results."""
    tests: dict[Job, set[str]] = defaultdict(set)
    for row in rows_of(results):
        tests[job_of(row)].add(row["test"])
    return {job for job, found in tests.items() if len(found) >= DATA_SETS[job.data].num_tests}


def job_of(row: dict[str, Any]) -> Job:
    """Training that a line of the file of results is of."""
    return Job(row["data"], row["recipe"], row["seed"], row["steps"], tuple(row["extra"]))


def rows_of(results: Path) -> list[dict[str, Any]]:
    """Lines of the file of results; [] if there is no such file."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def run_all(jobs: Sequence[Job], data: Path, output: Path, parallel: int, minutes: float | None) -> int:
    """Run the trainings that are not finished, several at a time; return the number without a result.

    At SIGINT, SIGTERM and after ``minutes``, running trainings save their state and end.
    """
    output.mkdir(parents=True, exist_ok=True)
    results, runs = output / "results.jsonl", output / "runs"
    runs.mkdir(exist_ok=True)
    done = finished(results)
    waiting = [job for job in jobs if job not in done]
    print(f"{len(jobs)} trainings, {len(jobs) - len(waiting)} finished before", flush=True)
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    end = time.monotonic() + 60 * (minutes or 1e9)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    missing, stopping = 0, False
    while running or (waiting and not stopping):
        while waiting and len(running) < parallel and not stopping:
            job = waiting.pop(0)
            running[job] = _start(job, data, runs)
        time.sleep(0.5)
        if not stopping and (signals or time.monotonic() > end):
            stopping = True
            for process in running.values():
                process.terminate()
        for job in [job for job, process in running.items() if process.poll() is not None]:
            missing += not _collect(job, running.pop(job).returncode, runs, results)
    return missing + len(waiting)


def _start(job: Job, data: Path, runs: Path) -> "subprocess.Popen[bytes]":
    """Start a process for one training, with a log file."""
    command = [sys.executable, __file__, str(data), "--output", str(runs), "--job", json.dumps(job)]
    # A process group of its own, so that ctrl-C reaches this process only, which then stops the others in order.
    with (runs / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)


def _collect(job: Job, status: int, runs: Path, results: Path) -> bool:
    """Add the results of a training that has ended to the file of results; return whether there are any."""
    if status == 0:
        lines = result_file(runs / job.name).read_text(encoding="utf-8")
        with results.open("a", encoding="utf-8") as file:
            file.write(lines)
        print(lines, end="", flush=True)
    else:
        state = "stopped" if status in (UNFINISHED, -signal.SIGTERM) else "failed"
        print(f"{job.name} {state}; see {runs / job.name}.log", flush=True)
    return status == 0


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown table of RMSE and MAE, each the mean over the seeds with the half range."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        recipe = " ".join([row["recipe"], *row["extra"]])
        groups[row["data"], row["test"], row["steps"], recipe].append(row)
    columns = {
        "E RMSE (meV)": "energy (meV) rmse",
        "E MAE (meV/atom)": "energy per atom (meV/atom) mae",
        "F RMSE (meV/Å)": "forces (meV/Å) rmse",
        "F MAE (meV/Å)": "forces (meV/Å) mae",
        "seconds": "seconds",
        "parameters": "parameters",
    }
    head = ["data", "test", "steps", "recipe", "seeds", *columns]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for key, members in sorted(groups.items()):
        values = (_mean([row[name] for row in members if name in row]) for name in columns.values())
        lines.append(" | ".join([*map(str, key), str(len(members)), *values]))
    return "\n".join(f"| {line} |" for line in lines)


_RELATIVE = {
    "energy": "energy per atom (meV/atom) mae",
    "forces": "forces (meV/Å) mae",
    "stress": "stress (meV/Å³) mae",
    "seconds": "seconds",
}
"""Quantities of a comparison of recipes."""


def relative_table(rows: Iterable[dict[str, Any]], recipes: Sequence[str]) -> str:
    """Markdown table of MAEs and times: those of the first recipe, and of the others divided by those of the first.

    Each is the mean over the seeds with the half range. Only seeds of which the first recipe has a result count.
    """
    groups: dict[tuple[str, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        case = row["data"], row["test"], str(row["steps"]), " ".join(row["extra"])
        groups.setdefault(case, {}).setdefault(row["recipe"], {})[row["seed"]] = row
    head = ["data", "test", "steps", "options", "recipe", "seeds", *_RELATIVE]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for case, members in groups.items():
        first = members.get(recipes[0], {})
        for recipe in recipes:
            seeds = sorted(first.keys() & members.get(recipe, {}).keys())
            cells = [_compared(first, members.get(recipe, {}), seeds, name) for name in _RELATIVE.values()]
            if seeds:
                lines.append(" | ".join([*case, recipe, str(len(seeds)), *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _compared(
    first: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], seeds: Sequence[int], name: str
) -> str:
    """Mean of a quantity of the first recipe, or of the ratio of another recipe to it."""
    pairs = [(other[s][name], 1.0 if other is first else first[s][name]) for s in seeds if name in first[s]]
    return _mean([own / anchor for own, anchor in pairs])


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.4g}" + (f" ± {half:.2g}" if half else "")


# --- command line


def main() -> None:
    """Run the trainings of the command line, or the one of --job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DATA", type=Path, help="folder of the data sets")
    parser.add_argument("experiments", metavar="EXPERIMENT", nargs="*", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, help="data sets instead of the experiment's")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, help="recipes instead of the experiment's")
    parser.add_argument("--set", dest="extra", action="append", default=[], help="override, as model.lmax=2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=6000, help="steps of every training")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--minutes", type=float, help="save all states and end after this time")
    parser.add_argument("--output", type=Path, default=Path("accuracy"), help="output folder")
    parser.add_argument(
        "--table", action="store_true", help="print results relative to the first recipe and end"
    )
    parser.add_argument("--list", action="store_true", help="print the trainings and end")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tolerate_any_encoding()
    if options.job:
        data, recipe, seed, steps, extra = json.loads(options.job)
        job = Job(data, recipe, seed, steps, tuple(extra))
        run_job(job, options.folder, options.output / job.name)
        return
    if unknown := [name for name in options.experiments if name not in EXPERIMENTS]:
        parser.error(f"unknown experiment {unknown[0]}; allowed are {', '.join(EXPERIMENTS)}")
    chosen = [EXPERIMENTS[name] for name in options.experiments] or [(["acac"], ["default"])]
    jobs = [
        Job(data, recipe, seed, options.steps, tuple(options.extra))
        for sets, recipes in chosen
        for seed in options.seeds
        for data in options.data or sets
        for recipe in options.recipe or recipes
    ]
    jobs = list(dict.fromkeys(jobs))
    if options.list:
        print("\n".join(job.name for job in jobs))
        return
    if options.table:
        rows = [row for row in rows_of(options.output / "results.jsonl") if job_of(row) in jobs]
        print(relative_table(rows, list(dict.fromkeys(job.recipe for job in jobs))))
        return
    missing = run_all(jobs, options.folder, options.output, options.jobs, options.minutes)
    print(table(rows_of(options.output / "results.jsonl")))
    raise SystemExit(1 if missing else 0)


if __name__ == "__main__":
    main()
