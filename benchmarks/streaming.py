"""Measure data on the disk: opening a large index, reading, waiting for batches, and the memory of a run.

python benchmarks/streaming.py open --rows 10000000      # an index of synthetic entries
python benchmarks/streaming.py read                      # time per structure, by part
python benchmarks/streaming.py train --minutes 60        # memory over time, as a figure
python benchmarks/streaming.py wait --device cuda        # throughput from the disk and from memory, on a GPU
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from rich.console import Console

from dpa4.data import EpochBatches, lmdb_index, open_streamed
from dpa4.data.conversion import write_lmdb
from dpa4.data.lmdb_file import Place
from dpa4.data.streaming import StreamedDataset
from dpa4.graph import build_graph


def structures(count: int) -> list[Atoms]:
    """Random molecular crystals of 10 to 30 atoms, with the density of organic matter."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        n = int(rng.integers(10, 31))
        side = (10.0 * n) ** (1 / 3)
        grid = np.argwhere(np.ones((4, 4, 4)))[rng.permutation(64)[:n]] * side / 4
        atoms = Atoms(
            rng.choice([1, 6, 7, 8], n),
            grid + rng.normal(size=(n, 3)) * 0.05,
            cell=np.eye(3) * side,
            pbc=True,
        )
        results = {"energy": rng.normal() - 100.0 * n, "forces": rng.normal(size=(n, 3))}
        atoms.calc = SinglePointCalculator(atoms, **results)
        images.append(atoms)
    return images


def database(folder: Path, count: int) -> Path:
    ase.io.write(folder / "data.xyz", structures(count), format="extxyz")
    write_lmdb([folder / "data.xyz"], [folder / "data.aselmdb"])
    return folder / "data.aselmdb"


def memory(pid: int | str = "self") -> dict[str, float]:
    """Memory of a process in MiB: its own, and that mapped from files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def repeat_index(path: Path, rows: int) -> None:
    """Replace the index of a file by one with many entries, which point to the rows in turn."""
    folder = open_streamed([path]).indexes[0].folder
    meta = json.loads((folder / "index.json").read_text())
    count = meta["rows"]
    for name, kind in (lmdb_index._PLACES | lmdb_index._DESCRIPTIONS).items():
        values = np.load(folder / f"{name}.npy")
        out = np.lib.format.open_memmap(folder / f"{name}.new.npy", "w+", np.dtype(kind), (rows,))
        for start in range(0, rows, count):
            out[start : start + count] = values[: rows - start]
        out.flush()
        (folder / f"{name}.new.npy").replace(folder / f"{name}.npy")
    meta["rows"] = rows
    (folder / "index.json").write_text(json.dumps(meta))


def measure_open(rows: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = database(Path(name), 1000)
        repeat_index(path, rows)
        before = memory()
        start = time.perf_counter()

        def report(what: str) -> None:
            now = memory()
            grown = ", ".join(f"{n} {now[n] - before[n]:+.0f} MiB" for n in now)
            print(f"{what}: {time.perf_counter() - start:.2f} s since the start, {grown}", flush=True)

        frames = open_streamed([path])
        report(f"open {len(frames):,} entries")
        frames.elements(), frames.label_counts(), frames.sizes(), frames.digest()
        report("elements, labels, sizes, digest")
        frames[rows // 2]
        report("one structure")
        batches = EpochBatches(StreamedDataset(frames, 6.0), max_atoms=1000)
        report("batches by max_atoms")
        next(batches.batches(0))
        report("first batch")
        print(f"{batches.num_batches(0):,} batches")
        report("number of batches of an epoch")
        deep = next(batches.plan(0, batches.num_batches(0) // 2))
        report(f"resume at batch {deep[0]:,}")
        frames.sample(2000)
        report("sample of 2,000")
        print(batches.fill())


def measure_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        frames = open_streamed([database(Path(name), 1000)])
        index = frames.indexes[0]
        jobs = [
            Place(int(o), int(s)) for o, s in zip(index.columns["offset"], index.columns["size"], strict=True)
        ]

        def timed(what: str, work) -> list:
            start = time.process_time()
            out = [work(k) for k in range(len(jobs))]
            print(
                f"{what}: {(time.process_time() - start) / len(jobs) * 1e6:.0f} us of CPU time per structure"
            )
            return out

        packed = timed("read bytes", lambda k: index.rows.packed(jobs[k]))
        print(f"{np.mean([len(p) for p in packed]):.0f} bytes per structure")
        texts = timed("read and unpack", lambda k: index.rows.text(jobs[k]))
        timed("parse JSON", lambda k: json.loads(texts[k]))
        read = timed("frame (all of the above)", lambda k: frames[k])
        graphs = timed(
            "neighbour list of 6 Angstrom",
            lambda k: build_graph(read[k].atomic_numbers, read[k].positions, read[k].cell, read[k].pbc, 6.0),
        )
        print(
            f"{np.mean([len(f) for f in read]):.1f} atoms, {np.mean([g.num_edges for g in graphs]):.0f} edges"
        )


def measure_training(minutes: float, figure: Path) -> None:
    """Train from the disk and record the memory of this process and of those that prepare batches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dpa4.training.options import RunConfig
    from dpa4.training.run import train

    with tempfile.TemporaryDirectory() as name:
        path = database(Path(name), 4000)
        repeat_index(path, 10**7)
        config = RunConfig.model_validate(
            {
                "model": {"preset": "nano", "channels": 8, "n_blocks": 1, "cutoff": 4.0},
                "data": {"train": [path], "workers": 1, "validation_fraction": 1e-5},
                "training": {"steps": 10**7, "batch_size": 8, "validation_interval": 200, "compile": False},
                "output": Path(name) / "run",
                "device": "cpu",
            }
        )
        rows: list[tuple[float, float, float]] = []

        def watch() -> None:
            import signal

            while not (Path(name) / "run" / "train.csv").exists():  # the preparation does not count
                time.sleep(0.5)
            start = time.monotonic()
            while time.monotonic() - start < 60 * minutes:
                own = memory()["RssAnon"]
                others = 0.0
                for task in Path("/proc/self/task").iterdir():
                    for child in (task / "children").read_text().split():
                        try:
                            others += memory(child)["RssAnon"]
                        except OSError:
                            pass  # it has just ended
                rows.append(((time.monotonic() - start) / 60, own, others))
                time.sleep(max(1.0, minutes / 10))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=watch, daemon=True).start()
        train(config, console=Console(quiet=True))
        table = np.array(rows)
        lines = (Path(name) / "run" / "train.csv").read_text().splitlines()
        steps = int(dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))["step"])
    half = table[len(table) // 2 :]
    slope = np.polyfit(half[:, 0], half[:, 1] + half[:, 2], 1)[0]
    print(f"{steps} steps in {minutes:g} minutes; in the second half {slope:+.3f} MiB per minute")
    axes = plt.subplots(figsize=(6, 3.2), layout="constrained")[1]
    axes.plot(table[:, 0], table[:, 1], label="training process")
    axes.plot(table[:, 0], table[:, 2], label="process that reads")
    axes.set(xlabel="minutes", ylabel="memory (MiB)", ylim=(0, None))
    axes.legend(frameon=False)
    axes.figure.savefig(figure, dpi=150)


def measure_wait(device: str, workers: int, steps: int) -> None:
    """Structures per second of training steps with batches from memory and from the disk."""
    from dpa4.training.options import RunConfig
    from dpa4.training.prepare import prepare
    from dpa4.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as name:
        path = database(Path(name), 20_000)
        for source in (path.with_suffix(".xyz"), path):
            config = RunConfig.model_validate(
                {
                    "model": {"preset": "mini"},
                    "data": {"train": [source], "workers": workers, "validation_fraction": 0.001},
                    "training": {"steps": steps, "batch_size": 50},
                    "output": Path(name) / "run",
                    "device": device,
                }
            )
            trainer = Trainer(config, prepare(config, Console(quiet=True)), Console(quiet=True))
            trainer._compile()
            waited, count, start = 0.0, 0, time.perf_counter()
            found = trainer._batches()
            for number in range(steps):
                before = time.perf_counter()
                batch = next(found)
                if number == steps // 5:  # everything before is a warm-up
                    waited, count, start = 0.0, 0, time.perf_counter()
                elif number > steps // 5:
                    waited += time.perf_counter() - before
                    count += len(batch.energy)
                trainer._train_on(batch)
            trainer._confirm()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            print(
                f"{source.suffix}: {count / seconds:,.0f} structures/s, waiting {waited / seconds:.1%} of the time",
                flush=True,
            )
            found.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["open", "read", "train", "wait"])
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--figure", type=Path, default=Path("memory.png"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    if options.what == "open":
        measure_open(options.rows)
    elif options.what == "read":
        measure_read()
    elif options.what == "train":
        measure_training(options.minutes, options.figure)
    else:
        measure_wait(options.device, options.workers, options.steps)


if __name__ == "__main__":
    main()
