"""Train and screen on several GPUs: speed, the same numbers as on one, resuming, and the end of a killed process.

    python benchmarks/several_gpus.py                                  # 1, 2 and 4 GPUs of one node
    python benchmarks/several_gpus.py --device cpu                     # dry run: 1 and 2 processes, a tiny model

Every measurement prints one JSON line; the last lines say which targets are met, and the status is 1 if one is not.
Speed is measured with the same number of edges per GPU, so batches grow with the number of GPUs. The share of
communication is the time of the sums of a step alone, measured after the run with buffers of the same size, divided
by the time of a step. In the dry run nothing is said of speed: the processes share the processors.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from rich.console import Console

from dpa4.data import EpochBatches, FrameDataset, read_frames
from dpa4.output import read_csv
from dpa4.potential.checkpoint import load_potential
from dpa4.system import peak_memory
from dpa4.training import load_run_config, train
from dpa4.training.launcher import launched
from dpa4.training.state import load_state

WARM_UP = 0.2  # share of the steps that are not timed
TARGETS = {2: 1.9, 4: 3.7}  # times the edges per second of one GPU
SCREENING_TARGETS = {4: 3.8}
SAME_LOSS = 1e-4  # relative, at the first step; float32, sums in another order
ENDED = 60.0  # s from the death of a process to the end of the run
METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")


class Size(NamedTuple):
    """Size of the measurements on a kind of device."""

    preset: dict[str, Any]
    precision: str
    gpus: list[int]
    edges: int  # per GPU and step
    steps: int
    structures: int  # trained on
    cells: int  # 4 * cells**3 atoms per structure
    screened: int


SIZES = {
    "cuda": Size({"preset": "paper-air"}, "fast", [1, 2, 4], 100_000, 100, 1000, 3, 2000),
    "cpu": Size(
        {"preset": "nano", "channels": 8, "n_radial": 6, "n_blocks": 1, "cutoff": 4.0},
        "high", [1, 2], 400, 10, 24, 1, 8,
    ),
}  # fmt: skip


def main() -> int:
    """Run all measurements; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of processes; one of them is 1")
    parser.add_argument("--output", type=Path, help="folder to keep; by default a temporary one")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        size = SIZES[arguments.device]
        bench = Bench(arguments.device, size._replace(gpus=arguments.gpus or size.gpus), folder)
        bench.measure()
    for line in bench.verdicts:
        print(line)
    return int(any(line.startswith("MISSED") for line in bench.verdicts))


class Bench:
    """All measurements on one kind of device, with their files in a folder."""

    def __init__(self, device: str, size: Size, folder: Path):
        self.device, self.size, self.folder = device, size, folder
        self.verdicts: list[str] = []

    def measure(self) -> None:
        """Do all measurements."""
        images = [structure(self.size.cells, seed) for seed in range(self.size.structures)]
        ase.io.write(self.folder / "train.xyz", images)
        most = max(self.size.gpus)
        self.speed()
        if most > 1:
            self.same_losses(most)
            self.resume(most)
            self.kill(most)
        self.screening()

    def verdict(self, met: bool, text: str) -> None:
        """Note whether a target is met."""
        self.verdicts.append(f"{'met   ' if met else 'MISSED'} {text}")

    # --- training

    def config(self, name: str, **training: Any) -> Path:
        """Write a run file; its output is a folder of this name."""
        defaults = {
            "steps": self.size.steps,
            "max_edges": self.size.edges,
            "precision": self.size.precision,
            "validation_interval": self.size.steps,
            "log_interval": 1,
        }
        data = {"train": str(self.folder / "train.xyz"), "validation_fraction": 0.0}
        values = {
            "model": self.size.preset, "data": data, "training": defaults | training,
            "output": str(self.folder / name), "device": self.device,
        }  # fmt: skip
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def launch(self, file: Path, gpus: int, *options: str) -> "subprocess.Popen[str]":
        """Start a training in this number of processes."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        command = [sys.executable, *torchrun, __file__, "--worker", str(file), *options]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def train(self, file: Path, gpus: int) -> list[dict[str, Any]]:
        """Train to the end; return what each process reports."""
        for old in self.folder.glob("report-*.json"):
            old.unlink()
        process = self.launch(file, gpus)
        text, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"training on {gpus} GPUs failed:\n{text}")
        return [json.loads((self.folder / f"report-{rank}.json").read_text()) for rank in range(gpus)]

    def speed(self) -> None:
        """Time the steps of runs with the same number of edges per GPU."""
        rates: dict[int, float] = {}
        for gpus in self.size.gpus:
            limit = self.size.edges * gpus
            reports = self.train(self.config(f"speed-{gpus}", max_edges=limit), gpus)
            rows = read_csv(self.folder / f"speed-{gpus}" / "train.csv")
            start = max(1, int(WARM_UP * len(rows)))
            seconds = float(rows[-1]["seconds"]) - float(rows[start - 1]["seconds"])
            steps = len(rows) - start
            edges = self.edges(limit, start, len(rows))
            rates[gpus] = edges / seconds
            communication = max(report["communication_s"] for report in reports)
            show(
                "training", gpus=gpus, ms_per_step=round(1e3 * seconds / steps, 2), edges_per_s=round(rates[gpus]),
                times_one=round(rates[gpus] / rates[min(rates)], 3),
                communication_share=round(communication * steps / seconds, 4),
                peak_gib=[round(report["peak"] / 2**30, 2) for report in reports],
            )  # fmt: skip
            if self.device == "cuda" and gpus in TARGETS and 1 in rates:
                times = rates[gpus] / rates[1]
                self.verdict(
                    times >= TARGETS[gpus],
                    f"training on {gpus} GPUs: {times:.2f} times one, target {TARGETS[gpus]}",
                )

    def edges(self, max_edges: int, first: int, last: int) -> int:
        """Number of edges of the steps from ``first`` to before ``last`` of a run."""
        cutoff = load_potential(self.folder / f"speed-{self.size.gpus[0]}" / "last.safetensors").config.cutoff
        data = FrameDataset(read_frames([self.folder / "train.xyz"]), cutoff)
        batches = EpochBatches(data, max_edges=max_edges)
        found: list[int] = []
        epoch = 0
        while len(found) < last:
            found += [int(data.num_edges[batch].sum()) for batch in batches.indices(epoch)]
            epoch += 1
        return sum(found[first:last])

    def same_losses(self, most: int) -> None:
        """Compare the losses of 1 and of several GPUs on the same batches."""
        losses = {}
        for gpus in (1, most):
            file = self.config(
                f"same-{gpus}", steps=10, precision="high", max_edges=4 * self.size.edges, learning_rate=1e-4
            )
            self.train(file, gpus)
            losses[gpus] = np.array(
                [float(r["loss"]) for r in read_csv(self.folder / f"same-{gpus}" / "train.csv")]
            )
        found = np.abs(losses[most] / losses[1] - 1)
        show("same losses", gpus=most, first=float(found[0]), largest_of_10=float(found.max()))
        self.verdict(
            found[0] < SAME_LOSS,
            f"first loss of 1 and {most} GPUs differs by {found[0]:.1e}, allowed {SAME_LOSS:g}",
        )

    def resume(self, most: int) -> None:
        """Resume a run of all GPUs on half of them."""
        self.train(self.config("resumed", steps=6), most)
        self.train(self.config("resumed", steps=12), most // 2)  # the worker resumes what exists
        rows = read_csv(self.folder / "resumed" / "train.csv")
        found = [int(row["step"]) for row in rows]
        complete = found == list(range(1, 13)) and all(np.isfinite(float(row["loss"])) for row in rows)
        show(
            "resume",
            gpus=[most, most // 2],
            steps=found[-1],
            losses=[round(float(r["loss"]), 3) for r in rows],
        )
        self.verdict(complete, f"a run of {most} GPUs resumes on {most // 2}")

    def kill(self, most: int) -> None:
        """Kill the last process of a run; look for the reason and the time."""
        file = self.config("killed", steps=1_000_000, validation_interval=1_000_000, checkpoint_interval=5)
        process = self.launch(file, most)
        state = self.folder / "killed" / "last.pt"
        while process.poll() is None and not (state.exists() and load_state(state)["step"]):
            time.sleep(0.5)
        if process.poll() is not None:
            raise RuntimeError(f"the run to kill ended by itself:\n{process.communicate()[0]}")
        os.kill(int((self.folder / f"pid-{most - 1}").read_text()), signal.SIGKILL)
        start = time.monotonic()
        text, _ = process.communicate()
        seconds = time.monotonic() - start
        reason = next((line for line in text.splitlines() if line.startswith("error: process")), "")
        show("killed process", gpus=most, seconds=round(seconds, 1), status=process.returncode, reason=reason)
        named = f"process {most - 1} of {most}" in reason
        self.verdict(
            named and seconds < ENDED, f"a killed process ends the run in {seconds:.0f} s, with its reason"
        )

    # --- screening

    def screening(self) -> None:
        """Relax structures on each number of GPUs."""
        images = [
            structure(self.size.cells, 10_000 + seed, label=False) for seed in range(self.size.screened)
        ]
        ase.io.write(self.folder / "set.xyz", images)
        model = self.folder / f"speed-{self.size.gpus[0]}" / "last.safetensors"
        times: dict[int, float] = {}
        for gpus in self.size.gpus:
            output = self.folder / f"screen-{gpus}"
            start = time.monotonic()
            processes = []
            for rank in range(gpus):
                device = "cpu" if self.device == "cpu" else f"cuda:{rank}"
                command = [
                    "screen",
                    model,
                    self.folder / "set.xyz",
                    "--output",
                    output,
                    "--device",
                    device,
                    "--steps",
                    "20",
                ]
                shard = ["--rank", rank, "--world-size", gpus]
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dpa4", *map(str, [*command, *shard])],
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                    )
                )  # fmt: skip
            texts = [process.communicate()[0] for process in processes]
            if any(process.returncode for process in processes):
                raise RuntimeError(f"screening on {gpus} GPUs failed:\n{texts}")
            times[gpus] = time.monotonic() - start
            rows = len(read_csv(output / "screen.csv"))
            show(
                "screening",
                gpus=gpus,
                structures=rows,
                seconds=round(times[gpus], 1),
                times_one=round(times[min(times)] / times[gpus], 2),
            )
            self.verdict(
                rows == self.size.screened,
                f"screening on {gpus} GPUs has {rows} of {self.size.screened} results",
            )
            if self.device == "cuda" and gpus in SCREENING_TARGETS and 1 in times:
                found, target = times[1] / times[gpus], SCREENING_TARGETS[gpus]
                self.verdict(
                    found >= target, f"screening on {gpus} GPUs: {found:.2f} times one, target {target}"
                )


def structure(cells: int, seed: int, label: bool = True) -> Atoms:
    """Rattled and strained crystal of random metals, with energy, forces and stress of ASE's EMT."""
    random = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True, a=random.uniform(3.7, 4.1)) * (cells, cells, cells)
    atoms.symbols = random.choice(METALS, len(atoms)).tolist()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + random.normal(0, 0.02, (3, 3))), scale_atoms=True)
    atoms.rattle(0.1, rng=random)
    if label:
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    return atoms


def show(what: str, **numbers: Any) -> None:
    """Print a measurement as JSON."""
    print(json.dumps({"what": what} | numbers), flush=True)


def work(file: Path) -> int:
    """Train in one of the processes, time the sums of a step, and write a report."""
    place = launched()
    rank = 0 if place is None else place.rank
    (file.parent / f"pid-{rank}").write_text(str(os.getpid()))
    config = load_run_config(file, [])
    train(config, resume=(config.output / "last.pt").exists(), console=Console(width=150))
    device = torch.device(
        "cpu" if config.device == "cpu" else f"cuda:{0 if place is None else place.local_rank}"
    )
    peak = peak_memory(device) or 0
    seconds = 0.0 if place is None else sums_of_a_step(config.output / "last.safetensors", device)
    (file.parent / f"report-{rank}.json").write_text(json.dumps({"peak": peak, "communication_s": seconds}))
    return 0


def sums_of_a_step(model: Path, device: torch.device, repeats: int = 20) -> float:
    """Time in seconds to add up gradients and numbers of a step over all processes."""
    count = sum(p.numel() for p in load_potential(model).parameters())
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    buffers = [torch.zeros(11, dtype=torch.float64, device=device), torch.zeros(count, device=device)]
    labels = torch.zeros(8, dtype=torch.int64, device=device)
    for number in range(repeats + 3):
        if number == 3:
            synchronize(device)
            start = time.monotonic()
        for tensor in (labels, *buffers):
            torch.distributed.all_reduce(tensor)
    synchronize(device)
    seconds = (time.monotonic() - start) / repeats
    torch.distributed.destroy_process_group()
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
