"""Time the stack of SO(2) layers of a preset with symmetry SO3 and O3: value, forces and a step of training.

    python benchmarks/so2_stack.py paper-neo --edges 2000

forces: value and derivative, weights fixed. training: the four stages, with gradients of the weights. Both symmetries
run in turns, on plain operations and, where they are available, on kernels (C++ on a CPU; on a GPU, those of the
precision). One JSON line each: minimum and median of the calls, in ms.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dpa4.model.presets import preset
from dpa4.model.so2 import FusedSO2Stack
from dpa4.model.switches import Symmetry
from dpa4.ops import available

SYMMETRIES: tuple[Symmetry, ...] = ("SO3", "O3")
Step = Callable[[], object]


def steps(name: str, edges: int, dtype: torch.dtype, device: str, symmetry: Symmetry) -> dict[str, Step]:
    """Functions to time for a stack of the first block of a preset."""
    config = preset(name, ("H",))
    lmax, width, foci = config.degrees[0], config.focus_width, config.n_focus
    stack = FusedSO2Stack(lmax, min(config.mmax, lmax), width, foci, config.mixing_layers, symmetry)
    stack = stack.to(device, dtype)
    shape = foci, edges, stack.layout.total * width
    x, g, c = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    x.requires_grad_()

    def forces() -> Tensor:
        stack.eval()
        return torch.autograd.grad(stack(x, None), x, g)[0]

    def training() -> None:
        stack.train()
        y = stack(x, None)
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        torch.autograd.backward([y, first], [g, c], inputs=list(stack.parameters()))

    return {"forces": forces, "training": training}


@contextmanager
def plain_operations() -> Iterator[None]:
    """Switch the kernels for a CPU off."""
    before, available._on_cpu = available._on_cpu, lambda *tensors: False
    try:
        yield
    finally:
        available._on_cpu = before


def timed(step: Step, device: str) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, edges: int, dtype: torch.dtype, device: str, repeats: int, kernels: str) -> None:
    """Print the times of one kind of kernels."""
    both = {symmetry: steps(name, edges, dtype, device, symmetry) for symmetry in SYMMETRIES}
    for kind in ("forces", "training"):
        times: dict[str, list[float]] = {symmetry: [] for symmetry in SYMMETRIES}
        for i in range(repeats + 2):
            for symmetry in SYMMETRIES:
                elapsed = timed(both[symmetry][kind], device)
                times[symmetry] += [elapsed] if i > 1 else []
        for symmetry, found in times.items():
            line = {"preset": name, "edges": edges, "dtype": str(dtype), "kernels": kernels, "step": kind}
            ms = {"min": round(min(found), 3), "median": round(statistics.median(found), 3)}
            print(json.dumps(line | {"symmetry": symmetry} | ms), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="+")
    parser.add_argument("--edges", type=int, nargs="+", default=[2000])
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    for name in args.preset:
        for edges in args.edges:
            arguments = name, edges, dtype, args.device, args.repeats
            if args.device == "cuda":
                measure(*arguments, kernels="GPU")
                continue
            with plain_operations():
                measure(*arguments, kernels="plain")
            if available.cpp(preset(name, ("H",)).focus_width, torch.zeros(1, dtype=dtype)):
                measure(*arguments, kernels="C++")


if __name__ == "__main__":
    main()
