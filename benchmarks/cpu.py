"""Energy, forces and virial on the CPU beside deepmd-kit, same weights, same structure, one run.

    python benchmarks/cpu.py [--threads 2] [--compile] [--deepmd-python PYTHON]

192 atoms of water (about 17,000 edges at 6 Angstrom), preset mini with random weights, float32, neighbour search
included on both sides; then a training step of dpa4 on the same structure (loss of energy and forces, backward pass).
PYTHON is an interpreter with deepmd-kit; without it only dpa4 is timed. Prints JSON lines:
median of 7 calls after 2 for warm-up, and the largest difference of the forces of the two programs.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import ase
import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

import dpa4
from dpa4.graph import build_graph
from dpa4.model.presets import preset
from dpa4.potential import Potential, convert, save_potential
from dpa4.potential.compiled import compile_potential
from dpa4.simulation import DPA4Calculator

DEEPMD = """
import json, sys, time
import numpy as np
import deepmd, torch
from deepmd.infer import DeepPot
torch.set_num_threads(int(sys.argv[3]))
data = np.load(sys.argv[2])
model = DeepPot(sys.argv[1])
call = lambda: model.eval(data["positions"][None], data["cell"][None], data["types"].tolist())
for _ in range(2): call()
times = []
for _ in range(7):
    start = time.perf_counter(); energy, forces, virial = call(); times.append(time.perf_counter() - start)
np.save(sys.argv[4], forces[0])
print(json.dumps({"program": "deepmd-kit " + deepmd.__version__, "torch": torch.__version__,
                  "efv_ms": round(1e3 * float(np.median(times)), 1)}))
"""


def water(seed: int = 0) -> Atoms:
    """64 randomly turned molecules on a cubic lattice at the density of the liquid."""
    rng = np.random.default_rng(seed)
    box = Atoms(cell=[12.42] * 3, pbc=True)
    for cell in np.ndindex(4, 4, 4):
        one = molecule("H2O")
        one.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
        one.positions += (np.array(cell) + 0.5) * 12.42 / 4
        box += one
    return box


def training_step(potential: Potential, atoms: Atoms, compiled: bool) -> float:
    """Seconds, median of 5 after 2 for warm-up."""
    graph = build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, potential.config.cutoff)
    potential.train()
    if compiled:
        compile_potential(potential)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        potential.zero_grad()
        found = potential(graph)
        (found.energy.square().sum() / len(atoms) + found.forces.square().mean()).backward()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def main() -> None:
    """Time both programs and compare their forces."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--deepmd-python", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    atoms, potential = water(), Potential(preset("mini", elements=("H", "O"))).eval()
    with torch.no_grad():  # layers that start at zero would leave nothing to compare
        for parameter in potential.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        native, exported = Path(folder) / "m.safetensors", Path(folder) / "m.pt"
        save_potential(potential, native)
        convert(native, exported)
        atoms.calc = DPA4Calculator(native, device="cpu", compile=options.compile)
        times = []
        for _ in range(9):
            atoms.calc.reset()
            start = time.perf_counter()
            forces = atoms.get_forces()
            times.append(time.perf_counter() - start)
        ours = {
            "compiled": options.compile,
            "program": f"dpa4 {dpa4.__version__}",
            "torch": torch.__version__,
            "ase": ase.__version__,
        }
        print(json.dumps(ours | {"efv_ms": round(1e3 * float(np.median(times[2:])), 1), "atoms": len(atoms)}))
        print(
            json.dumps(
                ours | {"training_ms": round(1e3 * training_step(potential, atoms, options.compile), 1)}
            )
        )
        if options.deepmd_python:
            types = np.where(atoms.numbers == 8, 1, 0)
            np.savez(
                f"{folder}/x.npz",
                positions=atoms.positions.ravel(),
                cell=atoms.cell.array.ravel(),
                types=types,
            )
            arguments = [str(exported), f"{folder}/x.npz", str(options.threads), f"{folder}/f.npy"]
            command = [str(options.deepmd_python), "-c", DEEPMD, *arguments]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            difference = float(np.abs(np.load(f"{folder}/f.npy") - forces).max())
            result = json.loads(out.strip().splitlines()[-1])
            print(json.dumps(result | {"largest_force_difference_eV_A": difference}))


if __name__ == "__main__":
    main()
