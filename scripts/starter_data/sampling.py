"""Structures of one system and their GFN2-xTB labels. Only numpy, ASE and tblite are needed here."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.optimize import LBFGS
from numpy.typing import NDArray
from tblite.ase import TBLite
from tblite.interface import Calculator

from starter_data.storage import POSITION_DECIMALS, Frames, Molecule, System
from starter_data.structures import (
    Array,
    Bonds,
    Part,
    arranged,
    droplet,
    fingerprint,
    hydrogen_bonded,
    is_duplicate,
    joined_bonds,
    proton_transferred,
    rotatable,
    stretched,
    twisted,
)

Draws = Iterator[tuple[str, Array]]  # kind and positions

FAILED = "dynamics or relaxation failed"

MAX_FORCE = 30.0  # eV/Angstrom
MAX_ENERGY = (6.0, 0.4)  # eV and eV/atom above the lowest structure of the system
MIN_DISTANCE = 0.4  # Angstrom
MIN_GAP = 0.1  # eV; below it the closed-shell state is not the ground state and energies have kinks
HYDROGEN_MASS = 4.0  # u; masses do not change the distribution, and heavy hydrogen allows a larger time step
TIMESTEP = 2.0  # fs
START, STRIDE = 14, 6  # steps before the first structure of a trajectory and between two structures
MULTIPLICITY = {"H": 2, "C": 3, "N": 4, "O": 3, "F": 2, "P": 4, "S": 3, "Cl": 2, "Br": 2}  # of the free atoms


@dataclass(frozen=True)
class Labelled:
    """Structure with its label: positions in Angstrom, energy and gap in eV, forces in eV/Angstrom."""

    kind: str
    positions: Array
    energy: float
    forces: Array
    gap: float


@dataclass
class Sampler:
    """Source of structures of one system, with the random numbers and the structures so far.

    Attributes:
        numbers: Atomic numbers.
        bonds: Bonds of the molecules.
        rng: Source of random numbers.
        kept: Accepted structures, from which others are derived.
        fingerprints: Fingerprints of the accepted structures.
    """

    numbers: NDArray[np.int64]
    bonds: Bonds
    rng: np.random.Generator
    kept: list[Labelled] = field(default_factory=list)
    fingerprints: list[Array] = field(default_factory=list)

    def add(self, kind: str, positions: Array) -> str | None:
        """Label a structure and keep it, or return the reason why not."""
        positions = np.round(positions - positions.mean(axis=0), POSITION_DECIMALS)
        if not np.isfinite(positions).all():
            return FAILED
        own = fingerprint(self.numbers, positions)
        if is_duplicate(own, self.fingerprints):
            return "duplicate"
        if own.min() < MIN_DISTANCE:
            return f"atoms closer than {MIN_DISTANCE} Angstrom"
        try:
            energy, forces, gap = label(self.numbers, positions)
        except RuntimeError:
            return "charges not converged"
        if not np.isfinite(forces).all() or np.abs(forces.sum(axis=0)).max() > 0.01:
            return "forces do not add up to zero"
        if np.linalg.norm(forces, axis=1).max() > MAX_FORCE:
            return "force too large"
        if gap < MIN_GAP:
            return "gap too small"
        self.kept.append(Labelled(kind, positions, energy, forces, gap))
        self.fingerprints.append(own)
        return None

    def frames(self) -> Frames | None:
        """Accepted structures whose energies are not too high, or None if there are none."""
        lowest = min((frame.energy for frame in self.kept), default=0.0)
        limit = lowest + MAX_ENERGY[0] + MAX_ENERGY[1] * len(self.numbers)
        low = [frame for frame in self.kept if frame.energy <= limit]
        if not low:
            return None
        return Frames(
            numbers=self.numbers,
            positions=np.array([frame.positions for frame in low]),
            energies=np.array([frame.energy for frame in low]),
            forces=np.array([frame.forces for frame in low]),
            gaps=np.array([frame.gap for frame in low]),
            kinds=[frame.kind for frame in low],
        )

    def relaxation(self, positions: Array, path: bool) -> Draws:
        """Yield the end of a short relaxation and, with ``path``, also the start and a structure on the way."""
        if path:
            yield "conformer", positions
        atoms = _dynamic(self.numbers, positions)
        optimizer = LBFGS(atoms, logfile=None)
        optimizer.run(fmax=0.02, steps=4)
        if path:
            yield "conformer", atoms.positions
        optimizer.run(fmax=0.02, steps=8 if path else 6)
        yield "conformer", atoms.positions

    def dynamics(self, positions: Array, temperature: float, count: int) -> Draws:
        """Yield structures of Langevin dynamics, the first after ``START`` steps, then one every ``STRIDE`` steps."""
        atoms = _dynamic(self.numbers, positions)
        masses = np.where(self.numbers == 1, HYDROGEN_MASS, atoms.get_masses())
        atoms.set_masses(masses)
        # Twice the temperature, because half of the initial kinetic energy becomes potential energy.
        speeds = np.sqrt(2 * units.kB * temperature / masses)[:, None] * self.rng.normal(size=(len(atoms), 3))
        atoms.set_velocities(speeds)
        run = Langevin(
            atoms,
            TIMESTEP * units.fs,
            temperature_K=temperature,
            friction=0.02 / units.fs,
            rng=self.rng,
            fixcm=False,
        )
        run.run(START - STRIDE)
        for _ in range(count):
            run.run(STRIDE)
            yield "dynamics-hot" if temperature > 800 else "dynamics", atoms.positions

    def stretches(self, count: int) -> Draws:
        """Yield accepted structures with one bond stretched or compressed."""
        for _ in range(count):
            yield "bond", stretched(self._any(), self.bonds, self.rng)

    def torsions(self, positions: Array, count: int) -> Draws:
        """Yield a scan of one torsion in equal steps from a random angle."""
        axes = rotatable(self.numbers, self.bonds)
        if axes:
            axis = axes[self.rng.integers(len(axes))]
            start = self.rng.uniform(0, 2 * np.pi)
            for step in range(count):
                yield "torsion", twisted(positions, self.bonds, axis, start + 2 * np.pi * step / count)

    def protons(self, count: int) -> Draws:
        """Yield accepted structures with a proton on its way to another atom."""
        for _ in range(count):
            moved = proton_transferred(self.numbers, self._any(), self.bonds, self.rng)
            if moved is not None:
                yield "proton", moved

    def _any(self) -> Array:
        return self.kept[self.rng.integers(len(self.kept))].positions


def sample(
    system: System, molecules: list[Molecule]
) -> tuple[Frames | None, dict[str, float], dict[str, int]]:
    """Create and label the structures of a system.

    Returns:
        The structures (None if there are none), seconds by kind, and numbers of dropped structures by reason.
        The seconds are those of the processor.
    """
    rng = np.random.default_rng(list(system.name.encode()))
    members = [molecules[k] for k in system.members]
    numbers = np.concatenate([np.array(m.numbers) for m in members])
    bonds = joined_bonds([(len(m.numbers), m.bonds) for m in members])
    sampler = Sampler(numbers, bonds, rng)
    plan = _plan_of_molecule if len(members) == 1 else _plan_of_cluster
    seconds: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for draws in plan(sampler, members):
        start, kind = time.process_time(), "failed"
        try:
            for kind, positions in draws:
                reason = sampler.add(kind, positions)
                if reason is not None:
                    dropped[reason] += 1
                seconds[kind] += time.process_time() - start
                start = time.process_time()
        except (RuntimeError, ValueError, FloatingPointError, np.linalg.LinAlgError):
            dropped[FAILED] += 1
            seconds[kind] += time.process_time() - start
    frames = sampler.frames()
    dropped["energy too high"] += len(sampler.kept) - (0 if frames is None else len(frames.energies))
    return frames, dict(seconds), dict(+dropped)


def label(numbers: NDArray[np.int64], positions: Array, uhf: int = 0) -> tuple[float, Array, float]:
    """Energy (eV), forces (eV/Angstrom) and orbital gap (eV) by GFN2-xTB from a fresh, well converged calculation.

    Raises:
        RuntimeError: If the charges do not converge.
    """
    calculator = Calculator("GFN2-xTB", numbers, positions / units.Bohr, uhf=uhf)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", 0.1)
    result = calculator.singlepoint()
    levels, filled = result.get("orbital-energies"), result.get("orbital-occupations")
    empty, occupied = levels[filled < 1], levels[filled >= 1]
    gap = (empty.min() - occupied.max()) * units.Hartree if len(empty) and len(occupied) else np.inf
    forces = -result.get("gradient") * units.Hartree / units.Bohr
    return float(result.get("energy")) * units.Hartree, forces, float(gap)


def free_atoms() -> dict[str, float]:
    """Energies of the free atoms in eV in the multiplicities of their ground states."""
    return {
        symbol: label(Atoms(symbol).numbers, np.zeros((1, 3)), multiplicity - 1)[0]
        for symbol, multiplicity in MULTIPLICITY.items()
    }


def _dynamic(numbers: NDArray[np.int64], positions: Array) -> Atoms:
    """Atoms with a calculator that starts from the charges of the last step; good enough to move atoms."""
    atoms = Atoms(numbers, positions)
    atoms.calc = TBLite(method="GFN2-xTB", accuracy=1.0, verbosity=0)
    return atoms


def _plan_of_molecule(sampler: Sampler, members: list[Molecule]) -> Iterator[Draws]:
    """Kinds of structures of a molecule; small molecules, which are cheap and common, have more of each."""
    (molecule,) = members
    shapes = [np.array(c) for c in molecule.conformers]
    more = 2 if len(molecule.numbers) <= 9 else 1
    rng = sampler.rng
    for number, shape in enumerate(shapes):
        yield sampler.relaxation(shape, path=number == 0)
    if not sampler.kept:
        return
    start = sampler.kept[-1].positions
    if len(molecule.numbers) == 2:
        scales = np.linspace(0.6, 2.4, 46)
        yield (("bond", start * scale) for scale in scales)
        return
    for _ in range(more):
        yield sampler.dynamics(sampler.kept[0].positions, rng.uniform(300, 800), 4)
        yield sampler.dynamics(start, rng.uniform(800, 2000), 4)
    yield sampler.torsions(start, 3 * more)
    yield sampler.stretches(3 * more)
    yield sampler.protons(1 + more // 2)


def _plan_of_cluster(sampler: Sampler, members: list[Molecule]) -> Iterator[Draws]:
    """Kinds of structures of a dimer or cluster."""
    rng = sampler.rng
    water = all(m.smiles == "O" for m in members)

    def parts() -> list[Part]:
        shapes = [np.array(m.conformers[rng.integers(len(m.conformers))]) for m in members]
        return [
            (np.array(m.numbers), s + rng.uniform(0.0, 0.03) * rng.normal(size=s.shape))
            for m, s in zip(members, shapes, strict=True)
        ]

    def placed(kind: str, low: float, high: float) -> tuple[str, Array]:
        return kind, arranged(parts(), rng.uniform(low, high), rng)[1]

    def shared_protons(count: int) -> Draws:
        for _ in range(count):
            pair = hydrogen_bonded(*parts(), rng)
            if pair is not None:
                moved = proton_transferred(*pair, sampler.bonds, rng, reach=3.9)
                yield "proton", pair[1] if moved is None else moved

    pair = len(members) == 2
    yield (placed("collision", 0.45, 0.7) for _ in range(2 if pair else 1))
    yield (placed("contact", 0.7, 1.2) for _ in range(3))
    if pair:
        yield (placed("apart", 1.2, 2.5) for _ in range(2))
        yield shared_protons(2)
    start = droplet(parts()[0], len(members), rng)[1] if water else placed("contact", 0.8, 1.0)[1]
    if water:
        yield iter([("contact", start)])
    relaxed: list[Array] = []
    yield _remember(sampler.relaxation(start, path=False), relaxed)
    for _ in range(2 if relaxed and water else 1 if relaxed else 0):
        yield sampler.dynamics(relaxed[-1], rng.uniform(100, 700), 6)
    if not pair and sampler.kept:
        yield sampler.protons(1)


def _remember(draws: Draws, positions: list[Array]) -> Draws:
    for kind, structure in draws:
        positions.append(structure.copy())
        yield kind, structure
