"""Time dpa4 against deepmd-kit, with equal weights and structures: evaluation and training steps.

    python benchmarks/beside_deepmd.py mini --water --threads 2 --deepmd-python PYTHON
    python benchmarks/beside_deepmd.py paper-air --train 32x64 --atoms 216 1000 4096 --bf16 --compile \\
        --deepmd-python PYTHON

PYTHON is an interpreter with deepmd-kit. The programs alternate, a few calls each, so that changes in the
speed of the machine affect both. They use a GPU if there is one; both then warm up at the same time, which
takes longer than alone. Every comparison is made twice (see --search):

* with the neighbour search, as users run the programs: the calculator of dpa4 against ``DeepPot.eval``; a
  training step that builds its graphs (which the trainer of dpa4 does ahead, in a thread) against
  ``dp --pt train``;
* without the neighbour search: both networks on the same edges; in training, the same loss and AdamW of
torch.

Evaluation computes energy, forces and virial. On a GPU, compiled training steps of dpa4 are replayed as CUDA
graphs, as in the trainer. ``dp train`` starts from its own weights and uses its own loader, loss (mean
squares of energy and forces) and AdamW. The structures are those of speed.py, or, with --water, 192 atoms of
water for evaluation and for training on one structure. Prints JSON lines with minimum and median milliseconds
of each program and the difference of their results. On a GPU, the lines also contain the peak memory of
tensors, without the memory pool of CUDA graphs, and the reserved memory.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from speed import ELEMENTS, labelled, potential_of, structure

import dpa4
from dpa4.data import Batch
from dpa4.execution.evaluator import Evaluator
from dpa4.execution.precompile import Mode, precompile
from dpa4.execution.regions import compile_potential
from dpa4.graph import Graph, build_graph, collate
from dpa4.potential import Potential, convert, load_potential, save_potential
from dpa4.potential.deepmd.options import config_to_deepmd
from dpa4.simulation import DPA4Calculator
from dpa4.system import keep_freed_memory
from dpa4.training.loss import Loss
from dpa4.training.replayed_step import ReplayedStep, StepRecorder
from dpa4.training.trainer import training_step

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WARM_UP = 3
SEARCHES = {"both": (True, False), "with": (True,), "without": (False,)}
WORKER = Path(__file__).with_name("deepmd_worker.py")


def water(seed: int = 0) -> Graph:
    """64 randomly oriented water molecules on a cubic lattice at the density of the liquid."""
    rng = np.random.default_rng(seed)
    box = Atoms(cell=[12.42] * 3, pbc=True)
    for cell in np.ndindex(4, 4, 4):
        one = molecule("H2O")
        one.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
        one.positions += (np.array(cell) + 0.5) * 12.42 / 4
        box += one
    return search(box)


def search(atoms: Atoms) -> Graph:
    return build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, 6.0)


def atoms_of(graph: Graph) -> Atoms:
    return Atoms(graph.atomic_numbers.numpy(), graph.positions.numpy(), cell=graph.cell[0].numpy(), pbc=True)


class Frames:
    """Structures with equal numbers of atoms, and random labels."""

    def __init__(self, graphs: list[Graph]):
        rng = np.random.default_rng(1)
        self.graphs = graphs
        self.graph = collate(graphs)
        self.atoms = graphs[0].num_atoms
        self.energy = rng.normal(size=len(graphs))
        self.forces = rng.normal(size=(len(graphs), self.atoms, 3))

    def write(self, folder: Path, batches: int) -> None:
        """Write the structures for the worker, and a mixed-type data set of deepmd-kit that repeats them.

        There must be more batches than training steps: at the end of the data set deepmd-kit restarts its
        loader, which takes seconds.

        Args:
            folder: Where to write.
            batches: Number of repetitions in the data set of deepmd-kit.
        """
        types = np.array(
            [[ELEMENTS.index(s) for s in atoms_of(g).get_chemical_symbols()] for g in self.graphs]
        )
        positions = self.graph.positions.numpy().reshape(len(types), -1, 3)
        cells = self.graph.cell.numpy().reshape(len(types), 9)
        np.savez(
            folder / "frames.npz",
            types=types,
            positions=positions,
            cells=cells,
            source=self.graph.source,
            destination=self.graph.destination,
            vectors=self.graph.edge_vectors(),
            energy=self.energy,
            forces=self.forces,
        )
        data = folder / "data"
        (data / "set.000").mkdir(parents=True)
        (data / "type_map.raw").write_text("\n".join(ELEMENTS), encoding="utf-8")
        (data / "type.raw").write_text("0\n" * self.atoms, encoding="utf-8")
        arrays = {"real_atom_types": types, "coord": positions, "box": cells}
        for name, array in (arrays | {"energy": self.energy, "force": self.forces}).items():
            np.save(data / "set.000" / f"{name}.npy", np.tile(array.reshape(len(types), -1), (batches, 1)))


def write_model(potential: Potential, folder: Path, frames: int, compile: bool, bf16: bool) -> None:
    """Write native and exported weights, and a deepmd-kit input file for the same architecture."""
    save_potential(potential, folder / "model.safetensors")
    convert(folder / "model.safetensors", folder / "model.pt")
    exported = torch.load(folder / "model.pt", weights_only=True)
    for params in (
        exported["model"]["_extra_state"]["model_params"],
        model := config_to_deepmd(potential.config, "float32"),
    ):
        params["use_compile"] = compile
        params["descriptor"]["use_amp"] = bf16
    torch.save(exported, folder / "model.pt")
    del model["info"]
    prefactors = {"e": 1, "f": 1, "v": 0}
    training = {"systems": ["data"], "batch_size": frames}
    never = 10**6
    settings = {
        "model": model,
        "learning_rate": {"type": "exp", "start_lr": 1e-4, "stop_lr": 1e-5},
        "optimizer": {"type": "AdamW"},
        "loss": {"type": "ener"}
        | {f"{end}_pref_{name}": value for name, value in prefactors.items() for end in ("start", "limit")},
        "training": {"training_data": training, "numb_steps": never, "disp_freq": never, "save_freq": never},
    }
    (folder / "input.json").write_text(json.dumps(settings), encoding="utf-8")


class Worker:
    """Process of deepmd-kit that prepares a kind of work and makes calls on request."""

    def __init__(self, python: Path, work: str, folder: Path, threads: int, compile: bool):
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), DP_INTER_OP_PARALLELISM_THREADS="1")
        environment["DP_INTRA_OP_PARALLELISM_THREADS"] = str(threads)
        if compile:
            environment |= {"DP_COMPILE_INFER": "1"} | ({"DP_TRITON_INFER": "3"} if CUDA else {})
        self.log = folder / f"{work}.log"
        command = [str(python), str(WORKER), work, str(folder), str(threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer. The first one comes after warm-up and names program and versions."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"deepmd-kit failed:\n{self.log.read_text()[-3000:]}")

    def ask(self, calls: int) -> dict[str, Any]:
        """Request calls; return their milliseconds and the memory used."""
        assert self.process.stdin
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        return self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()


def timed(call: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times


class Step:
    """Training step of dpa4: loss of energy and forces, backward pass, AdamW."""

    def __init__(self, potential: Potential, frames: Frames, compile: bool, bf16: bool, searches: bool):
        self.potential, self.searches = potential.to(DEVICE).train(), searches
        self.structures = [atoms_of(g) for g in frames.graphs]
        energy, forces = torch.from_numpy(frames.energy), torch.from_numpy(frames.forces).flatten(0, 1)
        self.batch = labelled(frames.graph, energy, forces).to(DEVICE)
        self.loss = Loss(energy=frames.atoms, forces=1, virial=0, kind="mse")
        keep_freed_memory(torch.device(DEVICE))
        self.parameters = parameters = [p for p in potential.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, 1e-4, fused=CUDA)
        self.step: Callable[[Batch], object] = self.differentiate
        potential.precision = "fast" if bf16 else "high"
        if compile:
            compile_potential(potential)
            mode = Mode(training=True, precision=potential.precision)
            precompile(potential, [mode], self.batch.graph)
        if compile and CUDA:
            self.step = ReplayedStep(
                potential, self.differentiate, StepRecorder(self.differentiate, parameters)
            )

    def next(self) -> Batch:
        if not self.searches:
            return self.batch
        return self.batch._replace(graph=collate([search(a) for a in self.structures]).to(DEVICE))

    def differentiate(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms = training_step(self.potential, batch, self.loss)
        loss.backward(inputs=self.parameters)
        return loss.detach(), terms

    def __call__(self) -> None:
        self.step(self.next())
        self.optimizer.step()

    def first(self) -> dict[str, float]:
        loss, _ = self.differentiate(self.next())
        norms = [p.grad.norm() for p in self.potential.parameters() if p.grad is not None]
        return {"loss": float(loss), "gradient_norm": float(torch.stack(norms).norm())}


class Evaluation:
    """Energy, forces and virial by dpa4: with the calculator, or on given edges."""

    def __init__(self, model: Path, frames: Frames, compile: bool, searches: bool):
        self.calculator = DPA4Calculator(model, device=DEVICE, compile=compile) if searches else None
        self.evaluator = Evaluator(load_potential(model, device=DEVICE), compile)
        self.atoms, self.graph = atoms_of(frames.graphs[0]), frames.graph.to(DEVICE)

    def __call__(self) -> np.ndarray | torch.Tensor:
        if self.calculator is None:
            return self.evaluator(self.graph).forces
        self.calculator.reset()
        return self.calculator.get_forces(self.atoms)

    def first(self) -> np.ndarray:
        forces = self()
        return forces.cpu().numpy() if isinstance(forces, torch.Tensor) else forces


def compare(frames: Frames, train: bool, searches: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Times of one kind of work in both programs, and differences of their results."""
    compile, bf16 = options.compile, options.bf16 and train
    potential = potential_of(options.model, "SO3", "cpu").eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames.write(folder, options.rounds * options.calls + 20)
        write_model(potential, folder, len(frames.graphs), compile, bf16)
        work = (
            ("train" if searches else "train_of_edges") if train else "evaluate" if searches else "of_edges"
        )
        with Worker(options.deepmd_python, work, folder, options.threads, compile) as worker:
            # On a CPU the programs would compete for cores, so they warm up one after the other.
            others = {} if CUDA else worker.answer()
            start = time.perf_counter()
            call: Step | Evaluation
            if train:
                call = Step(potential, frames, compile, bf16, searches)
            else:
                call = Evaluation(folder / "model.safetensors", frames, compile, searches)
            own = call.first()
            timed(call, WARM_UP)
            about = {"program": f"dpa4 {dpa4.__version__}", "torch": torch.__version__}
            about["warm_up_s"] = round(time.perf_counter() - start, 1)
            print(f"{work}: dpa4 is warm after {about['warm_up_s']} s", file=sys.stderr, flush=True)
            others = others or worker.answer()
            parity = {}
            if isinstance(own, np.ndarray):
                theirs = np.load(folder / "forces.npy")
                parity = {"largest_force_difference_eV_A": float(np.abs(own - theirs).max())}
                parity["largest_force_eV_A"] = float(np.abs(own).max())
            elif not searches:
                parity = {f"relative_difference_of_{k}": abs(others[k] / own[k] - 1) for k in own}
            release()
            times: tuple[list[float], list[float]] = [], []
            memory = [{}, {}]
            for _ in range(options.rounds):
                times[0].extend(timed(call, options.calls))
                memory[0] = memory_taken()
                memory[1] = worker.ask(options.calls)
                times[1].extend(memory[1].pop("ms"))
    versions = {k: others[k] for k in about}
    return {
        "dpa4": about | memory[0] | summary(times[0]),
        "deepmd-kit": versions | memory[1] | summary(times[1]),
        "times_as_fast": round(statistics.median(times[1]) / statistics.median(times[0]), 2),
        "parity": parity,
    }


def release() -> None:
    """Release cached memory of earlier work and reset the memory statistics."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_taken() -> dict[str, float]:
    if not CUDA:
        return {}
    taken = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.memory_reserved()}
    return {name: round(n / 2**30, 2) for name, n in taken.items()}


def summary(times: list[float]) -> dict[str, float]:
    return {"min_ms": round(min(times), 2), "median_ms": round(statistics.median(times), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name of a preset")
    parser.add_argument("--deepmd-python", type=Path, required=True, help="interpreter with deepmd-kit")
    parser.add_argument(
        "--water", action="store_true", help="time evaluation and training on 192 atoms of water"
    )
    parser.add_argument("--train", help="time training steps of frames x atoms, such as 32x64")
    parser.add_argument("--atoms", type=int, nargs="*", default=[], help="time evaluation of these sizes")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile both programs; deepmd-kit with its Triton kernels on a GPU",
    )
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision; GPU only")
    parser.add_argument(
        "--search",
        choices=list(SEARCHES),
        default="both",
        help="time with the neighbour search, without it, or both",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each program"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of times the programs alternate")
    parser.add_argument("--calls", type=int, default=4, help="calls of each program per round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases: list[tuple[Frames, bool]] = []
    if options.water:
        cases += [(Frames([water()]), False), (Frames([water()]), True)]
    if options.train:
        number, atoms = map(int, options.train.split("x"))
        cases.append((Frames([structure(atoms, i) for i in range(number)]), True))
    cases += [(Frames([structure(atoms, 0)]), False) for atoms in options.atoms]
    for frames, train in cases:
        record = {"model": options.model, "device": torch.cuda.get_device_name() if CUDA else "CPU"}
        record |= {"threads": options.threads, "work": "train" if train else "energy, forces, virial"}
        record |= {"frames": len(frames.graphs), "atoms": frames.graph.num_atoms}
        record |= {"edges": frames.graph.num_edges}
        if train:
            record["precision"] = "bf16" if options.bf16 else "fp32"
        for searches in SEARCHES[options.search]:
            how = {"neighbour_search": searches, "compiled": options.compile}
            try:
                result = compare(frames, train, searches, options)
            except RuntimeError as error:  # continue with the other kinds of work
                result = {"error": str(error)}
            print(json.dumps(record | how | result), flush=True)
            release()


if __name__ == "__main__":
    main()
