"""Create the bundled data set examples/organic: small organic molecules and solid CO2 with GFN2-xTB labels.

Run ``OMP_NUM_THREADS=1 python scripts/make_dataset.py``; the script needs the package tblite and a few
minutes. All random numbers come from fixed seeds. Positions and cells are rounded before the labels are
computed, each label by a fresh calculation, so that labels match the structures in the files exactly.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevin import Langevin
from ase.neighborlist import build_neighbor_list, natural_cutoffs
from ase.optimize import FIRE
from ase.spacegroup import crystal
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation
from tblite.ase import TBLite

Draw = Callable[[np.random.Generator], Atoms]

DECIMALS = 6  # digits of positions and cells in Angstrom
MAX_FORCE = 20.0  # eV/Angstrom; frames with larger forces are exploding and rejected
MAX_ENERGY = 1.0  # eV/atom above the relaxed structure; frames of higher energy are rejected
MULTIPLICITY = {"H": 2, "C": 3, "N": 4, "O": 3}  # ground states of the free atoms

MOLECULES = {
    "ethane": "C2H6",
    "ethylene": "C2H4",
    "benzene": "C6H6",
    "methanol": "CH3OH",
    "ethanol": "CH3CH2OH",
    "dimethyl-ether": "CH3OCH3",
    "acetaldehyde": "CH3CHO",
    "acetic-acid": "CH3COOH",
    "methylamine": "H3CNH2",
    "acetonitrile": "CH3CN",
}
CLUSTERS = {
    "water-dimer": ("H2O", "H2O"),
    "water-trimer": ("H2O", "H2O", "H2O"),
    "ammonia-water": ("NH3", "H2O"),
}
HELD_OUT = {"acetamide": "CH3CONH2"}  # in the test set only

MOLECULE_FRAMES = {"train": 46, "valid": 8, "test": 16}
CRYSTAL_FRAMES = {"train": 60, "valid": 6, "test": 12}
HELD_OUT_FRAMES = 50


def gfn2(atoms: Atoms, **options: int) -> Atoms:
    """Copy of the structure with a fresh, tightly converged GFN2-xTB calculator."""
    atoms = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    atoms.calc = TBLite(method="GFN2-xTB", accuracy=0.01, verbosity=0, **options)
    return atoms


def label(atoms: Atoms) -> Atoms:
    """Round the structure to DECIMALS and compute energy, forces and, if periodic, stress.

    Raises:
        RuntimeError: If the self-consistent charges do not converge (raised by tblite).
    """
    atoms = gfn2(atoms)
    atoms.set_cell(np.round(atoms.cell.array, DECIMALS))
    atoms.positions = np.round(atoms.positions, DECIMALS)
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def relaxed(atoms: Atoms) -> Atoms:
    """Relax the structure to the nearest GFN2-xTB minimum."""
    atoms = gfn2(atoms)
    FIRE(atoms, logfile=None).run(fmax=0.01, steps=500)
    return atoms


def formamide() -> Atoms:
    """Formamide, which is missing in the molecule collection of ASE; roughly planar, to be relaxed."""
    positions = [
        (0, 0.42, 0),
        (1.2, 0.24, 0),
        (-0.93, -0.56, 0),
        (-0.44, 1.43, 0),
        (-0.64, -1.53, 0),
        (-1.91, -0.34, 0),
    ]
    return Atoms("CONHHH", positions)


def molecular_dynamics(atoms: Atoms, temperature: float, rng: np.random.Generator) -> Iterator[Atoms]:
    """Yield snapshots of Langevin dynamics endlessly, one every 30 fs, the first 100 fs after the start."""
    atoms = gfn2(atoms)
    # Twice the temperature, because half of the initial kinetic energy becomes potential energy.
    atoms.set_momenta(
        np.sqrt(2 * units.kB * temperature * atoms.get_masses())[:, None] * rng.normal(size=(len(atoms), 3))
    )
    dynamics = Langevin(
        atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False
    )
    dynamics.run(140)
    while True:
        dynamics.run(60)
        yield atoms


def displaced(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Displace all atoms by normal random numbers with one standard deviation of 0.02 to 0.1 Angstrom."""
    moved = atoms.copy()
    moved.positions += rng.uniform(0.02, 0.1) * rng.normal(size=moved.positions.shape)
    return moved


def stretched(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Scale a random bond by 0.75 to 1.7 and move the fragment behind it; for a ring bond, scale the molecule."""
    neighbors = build_neighbor_list(atoms, natural_cutoffs(atoms), self_interaction=False)
    bonds = neighbors.get_connectivity_matrix(sparse=False)
    i, j = rng.permutation(rng.choice(np.argwhere(bonds)))
    bonds[i, j] = bonds[j, i] = 0
    fragment = connected_components(bonds, directed=False)[1]
    moved = displaced(atoms, rng) if rng.random() < 0.5 else atoms.copy()
    if fragment[i] == fragment[j]:
        moved.positions *= rng.uniform(0.9, 1.12)
    else:
        moved.positions[fragment == fragment[j]] += rng.uniform(-0.25, 0.7) * (
            atoms.positions[j] - atoms.positions[i]
        )
    return moved


def cluster(molecules: list[Atoms], rng: np.random.Generator) -> Atoms:
    """Join randomly rotated molecules, each with a closest contact of 1.4 to 3.5 Angstrom to earlier ones."""
    joined = Atoms()
    for part in molecules:
        part = displaced(part, rng)
        part.positions = Rotation.random(random_state=rng).apply(part.positions - part.get_center_of_mass())
        if len(joined):
            direction = Rotation.random(random_state=rng).apply([1.0, 0.0, 0.0])
            contact = rng.uniform(1.4, 3.5)
            start = part.positions + joined.positions.mean(axis=0)
            for distance in np.arange(0.0, 12.0, 0.02):
                part.positions = start + distance * direction
                gaps = np.linalg.norm(part.positions[:, None] - joined.positions, axis=-1)
                if distance > 1.5 and gaps.min() > contact:
                    break
        joined += part
    return joined


def carbon_dioxide(rng: np.random.Generator) -> Atoms:
    """Solid CO2 (Pa-3, 12 atoms) with strained cell, shifted and rotated molecules and displaced atoms."""
    sites = [(0, 0, 0), (0.119, 0.119, 0.119)]
    atoms = crystal(["C", "O"], sites, spacegroup=205, cellpar=[5.62] * 3 + [90] * 3)
    centres, offsets, molecules = _whole_molecules(atoms)
    strain = rng.normal(scale=0.02, size=(3, 3))
    deformation = rng.uniform(0.94, 1.04) * np.eye(3) + (strain + strain.T) / 2
    atoms.set_cell(atoms.cell.array @ deformation)
    for centre, offset, members in zip(centres, offsets, molecules, strict=True):
        turn = Rotation.from_rotvec(rng.normal(scale=rng.uniform(0.02, 0.25), size=3))
        shift = rng.normal(scale=rng.uniform(0.02, 0.12), size=3)
        atoms.positions[members] = centre @ deformation + shift + turn.apply(offset)
    atoms.positions += rng.uniform(0.005, 0.035) * rng.normal(size=atoms.positions.shape)
    return atoms


def _whole_molecules(atoms: Atoms) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """For each CO2 of a crystal: position of C, positions of all atoms relative to C, and atom indices."""
    centres, offsets, molecules = [], [], []
    for carbon in np.flatnonzero(atoms.symbols == "C"):
        vectors = atoms.get_distances(carbon, range(len(atoms)), mic=True, vector=True)
        members = np.flatnonzero(np.linalg.norm(vectors, axis=1) < 1.4)
        centres.append(atoms.positions[carbon].copy())
        offsets.append(vectors[members])
        molecules.append(members)
    return centres, offsets, molecules


def accepted(
    draws: Iterator[tuple[str, Atoms]], count: int, lowest: float, rejected: Counter
) -> Iterator[Atoms]:
    """Yield the first ``count`` labelled structures that converge and do not explode."""
    kept = 0
    for kind, atoms in draws:
        try:
            frame = label(atoms)
        except RuntimeError:
            rejected["charges not converged"] += 1
            continue
        if np.abs(frame.get_forces()).max() > MAX_FORCE:
            rejected[f"force above {MAX_FORCE} eV/Angstrom"] += 1
        elif frame.get_potential_energy() - lowest > MAX_ENERGY * len(frame):
            rejected[f"energy above {MAX_ENERGY} eV/atom"] += 1
        else:
            frame.info["kind"] = kind
            yield frame
            kept += 1
        if kept == count:
            return


def alternate(atoms: Atoms, far: Draw, temperatures: tuple[int, ...], rng: np.random.Generator) -> Iterator:
    """Yield structures endlessly: dynamics at each temperature, a displaced one, one far from equilibrium."""
    runs = {t: molecular_dynamics(atoms, t, rng) for t in temperatures}
    while True:
        for temperature, run in runs.items():
            yield f"md-{temperature}K", next(run)
        yield "displaced", displaced(atoms, rng)
        yield "far", far(rng)


def group_frames(name: str, split: str, count: int, rejected: Counter) -> list[Atoms]:
    """Create the frames of one molecule, cluster or crystal; each split has its own seed and trajectories."""
    rng = np.random.default_rng([*name.encode(), *split.encode()])
    if name == "solid-CO2":
        draws = (("strained", carbon_dioxide(rng)) for _ in iter(int, 1))
        lowest = label(carbon_dioxide(np.random.default_rng(0))).get_potential_energy()
    elif name in CLUSTERS:
        parts = [relaxed(molecule(part)) for part in CLUSTERS[name]]
        atoms = relaxed(cluster(parts, np.random.default_rng(5)))
        lowest = label(atoms).get_potential_energy()
        draws = alternate(atoms, lambda r: cluster(parts, r), (150, 300), rng)
    else:
        atoms = relaxed(formamide() if name == "formamide" else molecule((MOLECULES | HELD_OUT)[name]))
        lowest = label(atoms).get_potential_energy()
        draws = alternate(atoms, lambda r: stretched(atoms, r), (300, 600, 1200), rng)
    frames = list(accepted(draws, count, lowest, rejected))
    for frame in frames:
        frame.info = {"config_type": name} | frame.info
    return frames


def isolated_atoms() -> list[Atoms]:
    """Free atoms with their ground-state multiplicity, for the atomic reference energies."""
    frames = []
    for symbol, multiplicity in MULTIPLICITY.items():
        atoms = gfn2(Atoms(symbol, [(0, 0, 0)]), multiplicity=multiplicity)
        results = {"energy": atoms.get_potential_energy(), "forces": np.zeros((1, 3))}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["config_type"] = "IsolatedAtom"
        frames.append(atoms)
    return frames


def check_periodic() -> None:
    """Compare forces and stress of solid CO2 with energy differences, and a cell with its supercell."""
    atoms = label(carbon_dioxide(np.random.default_rng(1)))
    step = 5e-4
    moved, strained = [], []
    for sign in (1, -1):
        shifted = gfn2(atoms)
        shifted.positions[0, 0] += sign * step
        moved.append(shifted.get_potential_energy())
        scaled = gfn2(atoms)
        scaled.set_cell(atoms.cell * (1 + sign * step), scale_atoms=True)
        strained.append(scaled.get_potential_energy())
    force = -(moved[0] - moved[1]) / (2 * step)
    trace = (strained[0] - strained[1]) / (2 * step) / atoms.get_volume()
    print(f"force {atoms.get_forces()[0, 0]:.6f}, by finite differences {force:.6f} eV/Angstrom")
    print(f"stress trace {atoms.get_stress()[:3].sum():.7f}, by finite differences {trace:.7f} eV/Angstrom^3")
    double = gfn2(atoms.repeat((2, 1, 1)))
    energy = double.get_potential_energy() / 2 - atoms.get_potential_energy()
    forces = np.abs(double.get_forces()[: len(atoms)] - atoms.get_forces()).max()
    print(
        f"2x1x1 supercell: {1000 * energy / len(atoms):+.3f} meV/atom, forces within {forces:.4f} eV/Angstrom"
    )


def main() -> None:
    """Write train.xyz, valid.xyz and test.xyz."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "examples" / "organic"
    parser.add_argument("--output", type=Path, default=default, help="folder for the three files")
    parser.add_argument(
        "--check", action="store_true", help="only check periodic forces and stress by finite differences"
    )
    arguments = parser.parse_args()
    if arguments.check:
        return check_periodic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        rejected: Counter = Counter()
        frames = isolated_atoms() if split == "train" else []
        for name in (*MOLECULES, "formamide", *CLUSTERS):
            frames += group_frames(name, split, MOLECULE_FRAMES[split], rejected)
        frames += group_frames("solid-CO2", split, CRYSTAL_FRAMES[split], rejected)
        if split == "test":
            for name in HELD_OUT:
                frames += group_frames(name, split, HELD_OUT_FRAMES, rejected)
        path = arguments.output / f"{split}.xyz"
        write(path, frames, format="extxyz")
        megabytes = path.stat().st_size / 1e6
        print(f"{path.name}: {len(frames)} frames, {megabytes:.2f} MB, {dict(rejected)} rejected")


if __name__ == "__main__":
    main()
