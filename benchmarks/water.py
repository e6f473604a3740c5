"""Make training data of liquid water for benchmarks/reliability.py: droplets of 16 molecules, GFN2-xTB labels.

    OMP_NUM_THREADS=1 python benchmarks/water.py water.xyz            # needs tblite; some minutes
    dpa4 train run.yaml --set data.train=water.xyz ...
    python benchmarks/water.py box.xyz --box 64                       # a box of 64 molecules for dynamics, no labels

The accuracy is that of GFN2-xTB. The data serve to test the conservation of energy in a liquid, nothing else.
"""

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import FIRE

from dpa4.output import tolerate_any_encoding

TRAJECTORIES, FRAMES = 16, 25
MOLECULES = 16
INTERVAL = 10  # steps of 1 fs between frames
MASS_OF_MOLECULE = 18.015 / 6.02214e23  # gram


def box(count: int, density: float, random: np.random.Generator) -> Atoms:
    """Cube of molecules on a lattice, randomly turned; ``count`` is a cube, the density in g/cm³."""
    side = round(count ** (1 / 3))
    length = (count * MASS_OF_MOLECULE / density * 1e24) ** (1 / 3)
    atoms = Atoms(cell=[length] * 3, pbc=True)
    for place in np.ndindex(side, side, side):
        water = molecule("H2O")
        water.rotate(random.uniform(0, 360), random.normal(size=3))
        water.positions += (np.array(place) + 0.5) * length / side - water.get_center_of_mass()
        atoms += water
    atoms.info["config_type"] = "water-box"
    return atoms


def droplet(random: np.random.Generator) -> Atoms:
    """The 16 molecules of a box that are closest to its centre."""
    atoms = box(27, random.uniform(0.85, 1.15), random)
    atoms.pbc = False
    oxygen = atoms.positions[atoms.numbers == 8]
    inner = np.argsort(np.linalg.norm(oxygen - atoms.cell.array.sum(0) / 2, axis=1))[:MOLECULES]
    atoms.cell = None
    return atoms[[3 * k + atom for k in inner for atom in range(3)]]


def labelled(atoms: Atoms) -> Atoms:
    """Copy with energy and forces of the calculator."""
    frame = Atoms(atoms.numbers, atoms.positions)
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def trajectory(seed: int) -> list[Atoms]:
    """Frames of Langevin dynamics at 300 to 700 K."""
    from tblite.ase import TBLite

    random = np.random.default_rng(seed)
    atoms = droplet(random)
    atoms.calc = TBLite(method="GFN2-xTB", accuracy=0.1, verbosity=0)
    FIRE(atoms, logfile=None).run(fmax=0.5, steps=60)
    temperature = random.uniform(300, 700)
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * temperature, rng=random)
    dynamics = Langevin(
        atoms, units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=random, fixcm=False
    )
    frames = []
    for _ in range(FRAMES):
        dynamics.run(INTERVAL)
        frames.append(labelled(atoms))
    return frames


def main() -> None:
    """Write the data, or a box without labels."""
    tolerate_any_encoding()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--box", type=int, help="write a box of so many molecules, a cube such as 8 or 64")
    options = parser.parse_args()
    if options.box:
        write(options.output, box(options.box, 1.0, np.random.default_rng(0)))
        return
    options.output.unlink(missing_ok=True)
    for seed in range(TRAJECTORIES):
        frames = trajectory(seed)
        write(options.output, frames, format="extxyz", append=True)
        largest = max(np.abs(frame.get_forces()).max() for frame in frames)
        print(f"trajectory {seed + 1} of {TRAJECTORIES}, largest force {largest:.1f} eV/Å", flush=True)


if __name__ == "__main__":
    main()
