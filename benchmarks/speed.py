"""Time training steps and energy + forces of published model sizes; compare compiled and eager results.

The structures are rattled simple-cubic lattices of 89 elements with 0.06 atoms per cubic Angstrom; the cutoff
is 6 Angstrom. The neighbour search is not timed. Every measurement prints one JSON line.

    python benchmarks/speed.py paper-air --train 32x64 --atoms 216 1000 4096
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import ase
import numpy as np
import torch
from ase.data import chemical_symbols

from dpa4.data import Batch
from dpa4.execution.check import compare_with_eager
from dpa4.execution.cuda_graph import Replay
from dpa4.execution.limits import KEEP_NOTHING, KEEP_POLICIES, keep_policy
from dpa4.execution.padding import replayed_size
from dpa4.execution.precompile import Mode, precompile
from dpa4.execution.regions import compile_potential, restore_eager
from dpa4.graph import Graph, build_graph, collate
from dpa4.model.presets import preset
from dpa4.potential import Potential
from dpa4.system import keep_freed_memory, peak_memory
from dpa4.training.loss import Loss
from dpa4.training.replayed_step import ReplayedStep, StepRecorder
from dpa4.training.trainer import training_step

# recompute: compiled, without saved intermediate results; replay: compiled and recorded as a CUDA graph
WAYS = ["eager", "compiled", "recompute", "replay"]
ELEMENTS = tuple(chemical_symbols[1:90])


def structure(atoms: int, seed: int, density: float = 0.06) -> Graph:
    """Rattled simple-cubic lattice of random elements; density in atoms per cubic Angstrom."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(round(atoms ** (1 / 3), 6)))
    length = (atoms / density) ** (1 / 3)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)[:atoms]
    positions = grid * length / side + rng.normal(0, 0.1, (atoms, 3))
    cell = ase.Atoms(cell=[length] * 3, pbc=True).cell.array
    return build_graph(rng.integers(1, 90, atoms), positions, cell, [True] * 3, 6.0)


def potential_of(name: str, symmetry: str, device: str) -> Potential:
    """Potential with random weights; zero-initialised layers are filled, too, so that all parts contribute."""
    torch.manual_seed(0)
    potential = Potential(preset(name, ELEMENTS, symmetry=symmetry))
    with torch.no_grad():
        for p in potential.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return potential.to(device)


def timed(function, device: str, repeats: int) -> dict[str, float]:
    """Median and minimum milliseconds of a call, peak GiB, and the seconds of the first call.

    On a CPU also the minimum of the processor time of all threads, and the memory of the process: its peak, and its
    peak before the first call.
    """
    cuda = device == "cuda"
    before = (peak_memory(torch.device(device)) or 0) / 2**30
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(2):
        function()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, processor = [], []
    for _ in range(repeats):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start, used = time.perf_counter(), time.process_time()
            function()
            times.append(1e3 * (time.perf_counter() - start))
            processor.append(1e3 * (time.process_time() - used))
    found = {
        "ms": round(statistics.median(times), 2),
        "min_ms": round(min(times), 2),
        "first_s": round(first, 1),
    }
    if cuda:
        return found | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    peak = (peak_memory(torch.device(device)) or 0) / 2**30
    found["min_processor_ms"] = round(min(processor), 2)
    return found | {"peak_gib": round(peak, 3), "before_gib": round(before, 3)}


def labelled(graph: Graph, energy: torch.Tensor, forces: torch.Tensor) -> Batch:
    """Training batch with one energy per structure and forces; all tensors on one device."""
    known = torch.ones_like(energy, dtype=torch.bool)
    virial = energy.new_zeros(len(energy), 3, 3)
    counts = torch.zeros(4, dtype=torch.int64, device=energy.device)
    return Batch(
        graph, energy, forces, virial, known, known, ~known, torch.ones_like(energy), 0 * forces[:, 0], counts
    ).counted()


def replayed(potential: Potential, batch: Batch, optimizer: torch.optim.Optimizer):
    """Training step as replayed by the trainer: copy the batch, replay loss and gradients, run the optimizer."""
    parameters = [p for p in potential.parameters() if p.requires_grad]

    def differentiate(batch: Batch):
        optimizer.zero_grad(set_to_none=True)
        loss, terms = training_step(potential, batch, Loss(1.0, 1.0, 0.0, "mse"))
        loss.backward(inputs=parameters)
        return loss.detach(), terms

    step = ReplayedStep(potential, differentiate, StepRecorder(differentiate, parameters))

    def function() -> None:
        step(batch)
        optimizer.step()

    return function


def precompiled(potential: Potential, mode: Mode, graph: Graph, pieces: list[tuple[str, float]]) -> None:
    """Compile in worker processes, and append the time to ``pieces``."""
    start = time.perf_counter()
    precompile(potential, [mode], graph)
    pieces.append(("other processes", round(time.perf_counter() - start, 1)))


def profile(function, rows: int) -> None:
    """Print the kernels that consume most time on the GPU."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.device_type.name == "CUDA"]
    events.sort(key=lambda e: -e.self_device_time_total)
    print(
        f"total on device: {sum(e.self_device_time_total for e in events) / 1e3:.1f} ms, {len(events)} kinds"
    )
    for e in events[:rows]:
        print(f"{e.self_device_time_total / 1e3:8.3f} ms {e.count:5d} x {e.key[:110]}")


def measured(record: dict, function: Callable[[], object], way: str, options: argparse.Namespace) -> None:
    """Print time and memory of a function as a JSON line, and its profile if requested."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = {"way": way} | timed(function, device, options.repeats)
    except torch.cuda.OutOfMemoryError:
        print(json.dumps(record | {"way": way, "error": "out of memory"}), flush=True)
        return
    if way == "replay":  # the memory of a CUDA graph does not count as allocated
        result["reserved_gib"] = round(torch.cuda.memory_reserved() / 2**30, 2)
    print(json.dumps(record | result), flush=True)
    if options.profile and way != "eager" and device == "cuda":
        profile(function, options.profile)
    gc.collect()
    torch.cuda.empty_cache()


def train(base: dict, device: str, options: argparse.Namespace) -> None:
    """Time training steps."""
    frames, atoms = map(int, options.train.split("x"))
    potential = potential_of(options.model, options.symmetry, device).train()
    graph = collate([structure(atoms, i) for i in range(frames)]).to(device)
    potential.precision = options.precision or "fast"
    parameters = [p for p in potential.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=device == "cuda")
    energy = torch.randn(frames, dtype=torch.float64, device=device)
    forces = torch.randn(graph.num_atoms, 3, dtype=torch.float64, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        found = potential(graph)
        loss = (found.energy - energy).square().mean() / atoms + (found.forces - forces).square().mean()
        loss.backward(inputs=parameters)
        optimizer.step()

    record = base | {"work": "train", "frames": frames, "atoms": graph.num_atoms, "edges": graph.num_edges}
    record |= {"precision": potential.precision}
    pieces: list[tuple[str, float]] = []
    for way in options.ways:
        restore_eager(potential)
        if way in ("compiled", "replay"):
            pieces.clear()
            start = time.perf_counter()
            compile_potential(potential, lambda part, s: pieces.append((part, round(s, 1))))
            precompiled(potential, Mode(True, potential.precision), graph, pieces)
            parity = compare_with_eager(potential, graph)
            ready = {"ready_s": round(time.perf_counter() - start, 1)}  # compilation and comparison
            print(json.dumps(record | {"parity": parity} | ready), flush=True)
            print(f"compiled in {sum(s for _, s in pieces):.1f} s: {pieces}", flush=True)
        called = step
        if way == "replay":
            called = replayed(potential, labelled(graph, energy, forces), optimizer)
        measured(record, called, way, options)
        called = None


def evaluate(base: dict, device: str, atoms: int, options: argparse.Namespace) -> None:
    """Time energy and forces of one structure."""
    potential = potential_of(options.model, options.symmetry, device).eval()
    potential.precision = options.precision or "high"
    graph = structure(atoms, 0, options.density).to(device)
    record = base | {"work": "energy+forces", "atoms": graph.num_atoms, "edges": graph.num_edges}
    record |= {"precision": potential.precision}
    pieces: list[tuple[str, float]] = []
    for way in options.ways:
        restore_eager(potential)
        if way != "eager":
            pieces.clear()
            start = time.perf_counter()
            policy = KEEP_NOTHING if way == "recompute" else keep_policy(replayed_size(atoms) or atoms)
            compile_potential(potential, lambda part, s: pieces.append((part, s)), KEEP_POLICIES[policy])
            precompiled(potential, Mode(False, potential.precision), graph, pieces)
            parity = compare_with_eager(potential, graph) if atoms <= 10_000 else {}
            record["compile_s"] = round(sum(s for _, s in pieces), 1)
            record["ready_s"] = round(time.perf_counter() - start, 1)
            print(json.dumps(record | {"way": way, "parity": parity}), flush=True)
        called = Replay(potential) if way == "replay" else potential
        measured(record, partial(called, graph), way, options)
        called = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name of a preset")
    parser.add_argument("--train", help="time training steps of frames x atoms, such as 32x64")
    parser.add_argument(
        "--atoms", type=int, nargs="*", default=[], help="time energy + forces of these sizes"
    )
    parser.add_argument(
        "--ways",
        nargs="*",
        default=["eager", "compiled"],
        choices=WAYS,
        help="ways to execute the model",
    )
    parser.add_argument("--symmetry", choices=["SO3", "O3"], default="SO3")
    parser.add_argument("--precision", choices=["high", "fast"], help="default: fast in training, else high")
    parser.add_argument(
        "--density", type=float, default=0.06, help="atoms per cubic Angstrom; copper has 0.0847"
    )
    parser.add_argument("--repeats", type=int, default=10, help="calls per measurement")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        help="rows of the profile printed for every compiled measurement; 0 for none",
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    keep_freed_memory(torch.device(device))
    base = {"model": options.model, "symmetry": options.symmetry, "device": name, "torch": torch.__version__}

    if options.train:
        train(base, device, options)
    for atoms in options.atoms:
        evaluate(base, device, atoms, options)


if __name__ == "__main__":
    main()
