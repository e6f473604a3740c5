"""Worker of beside_deepmd.py that runs deepmd-kit, in an interpreter with deepmd-kit but without dpa4.

    python benchmarks/deepmd_worker.py WORK FOLDER THREADS

The worker prepares WORK (evaluate, of_edges, train or train_of_edges) from the files in FOLDER and prints an
answer. It then reads a number from each line of its input, makes this number of calls and answers with their
milliseconds. An answer is a line of "@" followed by JSON; all other output comes from deepmd-kit. Progress of
the preparation goes to standard error.
"""

import gc
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import deepmd
import numpy as np
import torch
from deepmd.infer import DeepPot
from torch.optim.optimizer import register_optimizer_step_post_hook

START = time.perf_counter()
WARM_UP = 3
CUDA = torch.cuda.is_available()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def progress(stage: str) -> None:
    print(f"{stage} after {seconds()} s", file=sys.stderr, flush=True)


def seconds() -> float:
    return round(time.perf_counter() - START, 1)


def answer(**record) -> None:
    if CUDA:
        taken = {"peak_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.memory_reserved()}
        record |= {name: round(n / 2**30, 2) for name, n in taken.items()}
    print("@" + json.dumps(record), flush=True)


def answer_warm(**record) -> None:
    """Print the first answer, after releasing the memory used by the preparation."""
    record["warm_up_s"] = seconds()
    progress("warm")
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    answer(program=f"deepmd-kit {deepmd.__version__}", torch=torch.__version__, **record)


def requested_calls() -> int:
    """Read the number of calls to make; the end of the input ends the process."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return int(line)


def serve(call: Callable[[], object], **result) -> NoReturn:
    for _ in range(WARM_UP):
        call()
    synchronize()
    answer_warm(**result)
    while True:
        times = []
        for _ in range(requested_calls()):
            start = time.perf_counter()
            call()
            synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        answer(ms=times)


def evaluate(folder: Path) -> NoReturn:
    """Time energy, forces and virial through the Python interface, including the neighbour search."""
    data = np.load(folder / "frames.npz")
    potential = DeepPot(str(folder / "model.pt"))
    arguments = data["positions"].reshape(1, -1), data["cells"].reshape(1, -1), data["types"][0].tolist()
    progress("model read")
    np.save(folder / "forces.npy", potential.eval(*arguments)[1][0])
    progress("first call")
    serve(lambda: potential.eval(*arguments))


def of_edges(folder: Path, train: bool) -> NoReturn:
    """Time energy, forces and virial on given edges; in training, loss, backward pass and AdamW."""
    data = np.load(folder / "frames.npz")
    device = "cuda" if CUDA else "cpu"
    model = DeepPot(str(folder / "model.pt")).deep_eval.dp.model["Default"].train(train)
    progress("model read")
    tensors = {name: torch.from_numpy(data[name]).to(device) for name in data.files}
    ends = torch.stack([tensors["source"], tensors["destination"]])
    arguments = {
        "coord": tensors["positions"],
        "atype": tensors["types"],
        "edge_index": ends,
        "edge_vec": tensors["vectors"],
        "edge_scatter_index": ends,
        "edge_mask": torch.ones(ends.shape[1], dtype=torch.bool, device=device),
    }
    if not train:
        np.save(folder / "forces.npy", model.forward_lower(**arguments)["extended_force"][0].detach().cpu())
        progress("first call")
        serve(lambda: model.forward_lower(**arguments))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=CUDA)
    atoms = tensors["types"].shape[1]

    def loss() -> torch.Tensor:
        found = model.forward_lower(**arguments)
        energy = (found["energy"][:, 0] - tensors["energy"]).square().mean() / atoms
        return energy + (found["extended_force"] - tensors["forces"]).square().mean()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    first = loss()
    first.backward()
    progress("first gradients")
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    serve(step, loss=float(first.detach()), gradient_norm=float(norm))


def dp_train(folder: Path) -> None:
    """Time the steps of an unmodified ``dp --pt train``, including data loading and the neighbour search."""
    times: list[float] = []
    warm, calls = False, WARM_UP
    last = time.perf_counter()

    def after_step(*_: object) -> None:
        nonlocal warm, times, calls, last
        synchronize()
        times.append(1e3 * (time.perf_counter() - last))
        if len(times) == calls:
            if warm:
                answer(ms=times)
            else:
                answer_warm()
            warm, times, calls = True, [], requested_calls()
        last = time.perf_counter()

    register_optimizer_step_post_hook(after_step)
    os.chdir(folder)
    sys.argv = ["dp", "--pt", "train", "input.json", "--skip-neighbor-stat"]
    runpy.run_module("deepmd", run_name="__main__")


def main() -> None:
    work, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    if work == "train":
        dp_train(folder)
    elif work == "evaluate":
        evaluate(folder)
    else:
        of_edges(folder, train=work == "train_of_edges")


if __name__ == "__main__":
    main()
