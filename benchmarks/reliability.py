"""Measure the short range of a model and the conservation of energy; print one line per test.

    python benchmarks/reliability.py pairs MODEL                     # wall, spikes and finite numbers of all pairs
    python benchmarks/reliability.py compressed MODEL FRAMES.xyz     # forces at 0.3 to 1.0 of all lengths
    python benchmarks/reliability.py collisions MODEL FRAMES.xyz     # head-on, 10 to 500 eV
    python benchmarks/reliability.py hot MODEL FRAMES.xyz --ps 100   # 3,000 K in a box, looking for holes
    python benchmarks/reliability.py nve MODEL FRAME.xyz --ps 100    # drift of the total energy at 300 K

"hot" and "nve" take hours on a CPU; with --state FOLDER an interrupted run continues.

Collisions and hot dynamics take one structure of each ``config_type`` of the file.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.geometry import find_mic
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from numpy.typing import NDArray

from dpa4 import DPA4Calculator, load_potential
from dpa4.execution.evaluator import Evaluator
from dpa4.graph import Graph, build_graph, collate
from dpa4.potential import Potential
from dpa4.simulation.close_contacts import (
    compress,
    excess_curvature,
    force_over_repulsion,
    repels_below,
    wall_distance,
)
from dpa4.simulation.pair_curves import pair_curves

Array = NDArray[np.float64]


def pairs(potential: Potential, step: float = 0.005) -> Iterator[dict]:
    """Yield the shape of the curve of every pair of elements, from 0.1 Angstrom to the cutoff."""
    shortest = potential.coverage.shortest if potential.coverage else {}
    potential = potential.double()
    for curve in pair_curves(potential, start=0.1, step=step):
        a, b = (Atoms(e).numbers[0] for e in curve.pair)
        length = shortest.get(curve.pair, shortest.get(curve.pair[::-1], np.nan))
        excess = excess_curvature(curve, curve.pair)
        cutoff, free = potential.config.cutoff, [False] * 3
        close = [
            build_graph([a, b], [[0, 0, 0], [0, 0, r]], np.zeros((3, 3)), free, cutoff)
            for r in (1e-4, 1e-3, 1e-2)
        ]
        yield {
            "pair": curve.name,
            "shortest": length,
            "monotonic": repels_below(curve, wall_distance(curve.pair, shortest)),
            "largest excess curvature": float(excess.max()),
            "at": float(curve.distance[excess.argmax()]),
            "lowest energy": float(curve.energy.min()),
            "finite": all(bool(torch.isfinite(potential(graph).forces).all()) for graph in close),
        }


def compressed(potential: Potential, frames: list[Atoms], count: int, seed: int = 0) -> Array:
    """Largest force of compressed structures divided by the force of ZBL at their shortest pair, (count,)."""
    random, ratios = np.random.default_rng(seed), []
    for _ in range(count):
        atoms = frames[random.integers(len(frames))]
        atoms = compress(atoms, random.uniform(0.3, 1.0), random)
        ratios.append(force_over_repulsion(potential, atoms))
    ratios = [ratio for ratio in ratios if not np.isnan(ratio)]
    return np.array(ratios)


class Together:
    """Energies and forces of several structures, evaluated as one.

    Pairs are searched up to a skin beyond the cutoff, which the network does not see, and again for a structure in
    which an atom has moved by half the skin.
    """

    skin = 1.0  # Angstrom

    def __init__(self, evaluate: Evaluator, structures: list[Atoms]):
        self.evaluate, self.structures = evaluate, structures
        sizes = [len(atoms) for atoms in structures]
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self._graphs: list[Graph] = []
        self._searched: Array = np.empty((0, 3))

    def __call__(self, positions: Array) -> tuple[Array, Array]:
        """Return the energies (structures,) and the forces (atoms, 3) at positions of all atoms (atoms, 3)."""
        self._search(positions)
        moved = torch.from_numpy(positions).to(self.evaluate.potential.device)
        prediction = self.evaluate(self._graph._replace(positions=moved))
        energies = np.add.reduceat(prediction.atomic_energies.double().cpu().numpy(), self.starts)
        return energies, prediction.forces.double().cpu().numpy()

    def shortest(self, positions: Array) -> Array:
        """Return the shortest distance in every structure, Angstrom; the cutoff where there is no pair."""
        self._search(positions)
        graph, r = self._graph, torch.from_numpy(positions).to(self._graph.shift.device)
        vectors = r[graph.destination] - r[graph.source] + graph.shift
        found = torch.full((len(self.starts),), self.evaluate.potential.config.cutoff, dtype=torch.float64)
        owner = torch.from_numpy(self.owner).to(vectors.device)[graph.source]
        return found.to(vectors.device).scatter_reduce(0, owner, vectors.norm(dim=1), "amin").cpu().numpy()

    def _search(self, positions: Array) -> None:
        """Search the pairs of the structures that have moved."""
        ends, first = self.starts[1:], not self._graphs
        if first:
            stale = list(range(len(self.starts)))
            self._graphs, self._searched = [None] * len(stale), positions.copy()  # type: ignore[list-item]
        else:
            far = np.linalg.norm(positions - self._searched, axis=1) > self.skin / 2
            stale = np.unique(self.owner[far]).tolist()
        if not stale:
            return
        cutoff, parts = self.evaluate.potential.config.cutoff + self.skin, np.split(positions, ends)
        for i in stale:
            atoms = self.structures[i]
            self._graphs[i] = build_graph(atoms.numbers, parts[i], atoms.cell.array, atoms.pbc, cutoff)
            self._searched[self.owner == i] = parts[i]
        self._graph = merged(self._graphs).to(self.evaluate.potential.device)


def head_on(atoms: Atoms, energy: float, seed: int) -> Atoms:
    """Return a structure in which an atom of the crystal, or a copy of the molecule, flies head-on at an atom."""
    random = np.random.default_rng(seed)
    if atoms.pbc.any():
        atoms = atoms.copy()
        first = random.integers(len(atoms))
        apart = atoms.get_distances(first, range(len(atoms)), mic=True, vector=True)
        lengths = np.linalg.norm(apart, axis=1)
        lengths[first] = np.inf
        direction = apart[random.choice(np.argsort(lengths)[:6])]
        moving = [first]
    else:
        own, other = atoms.copy(), atoms.copy()
        other.rotate(random.uniform(0, 360), random.normal(size=3))
        target = own.positions[random.integers(len(own))]
        direction = random.normal(size=3)
        direction /= np.linalg.norm(direction)
        other.positions += target - direction * 4.0 - other.positions[random.integers(len(other))]
        atoms = own + other
        moving = list(range(len(own), len(atoms)))
    velocities = np.zeros((len(atoms), 3))
    mass = atoms.get_masses()[moving].sum()
    velocities[moving] = direction / np.linalg.norm(direction) * np.sqrt(2 * energy / mass)
    atoms.set_velocities(velocities)
    return atoms


class Collision:
    """A collision under way.

    Attributes:
        atoms: The structure, with positions and velocities.
        energy: Kinetic energy at the start, eV.
        closest: Shortest distance so far, Angstrom.
        worst: Largest change of the total energy so far, relative to the kinetic energy at the start.
        travelled: Distance of the fastest atom so far, Angstrom.
    """

    length = 6.0  # Angstrom, travelled at the end

    def __init__(self, name: str, atoms: Atoms, energy: float, seed: int):
        self.name, self.energy, self.atoms = name, energy, head_on(atoms, energy, seed)
        self.closest, self.worst, self.travelled = np.inf, 0.0, 0.0

    @property
    def running(self) -> bool:
        """False at the end of the path, and after a number that is not finite."""
        return self.travelled < self.length and bool(np.isfinite(self.worst))


def collide(evaluate: Evaluator, collisions: list[Collision], reach: float = 0.02) -> None:
    """Integrate the equations of motion of collisions, many at once, until all have ended.

    The scheme is that of Yoshida of fourth order, with steps of its own for each collision, in which no atom moves by
    more than a share ``reach`` of the shortest distance at its speed, or by its acceleration.
    """
    w1 = 1 / (2 - 2 ** (1 / 3))
    drifts = (w1 / 2, (1 - w1) / 2, (1 - w1) / 2, w1 / 2)
    kicks = (w1, 1 - 2 * w1, w1)
    start: dict[int, float] = {}
    while running := [c for c in collisions if c.running]:
        together = Together(evaluate, [c.atoms for c in running])
        of_atoms, first = together.owner, together.starts
        positions = np.concatenate([c.atoms.positions for c in running])
        velocities = np.concatenate([c.atoms.get_velocities() for c in running])
        masses = np.concatenate([c.atoms.get_masses() for c in running])[:, None]
        energies, forces = together(positions)
        for c, energy in zip(running, energies, strict=True):
            start.setdefault(id(c), energy + c.energy)
        # New arrays without those that have ended, when these are half of all.
        while 2 * sum(c.running for c in running) > len(running):
            speed = np.maximum.reduceat(np.linalg.norm(velocities, axis=1), first)
            pull = np.maximum.reduceat(np.linalg.norm(forces, axis=1) / masses[:, 0], first)
            shortest = together.shortest(positions)
            longest = reach * shortest
            steps = np.minimum(longest / speed, np.sqrt(2 * longest / np.maximum(pull, 1e-9)) / 4)
            steps[[not c.running for c in running]] = 0.0
            step = steps[of_atoms, None]
            for drift, kick in zip(drifts, (*kicks, None), strict=True):
                positions = positions + drift * step * velocities
                energies, forces = together(positions)
                if kick is not None:
                    velocities = velocities + kick * step * forces / masses
            kinetic = 0.5 * np.add.reduceat((masses * velocities**2).sum(axis=1), first)
            for i, c in enumerate(running):
                if c.running:
                    c.closest = min(c.closest, shortest[i])
                    c.travelled += speed[i] * steps[i]
                    change = abs(energies[i] + kinetic[i] - start[id(c)]) / c.energy
                    c.worst = max(c.worst, change) if np.isfinite(change) else np.nan
        for i, c in enumerate(running):
            c.atoms.positions = positions[of_atoms == i]
            c.atoms.set_velocities(velocities[of_atoms == i])


def show_collisions(evaluate: Evaluator, starts: list[tuple[str, Atoms, float, int]]) -> None:
    """Print the results of collisions, given as arguments of `Collision`.

    Collisions in which the energy changes by more than 1e-4 are repeated in shorter steps: the error of the
    integrator falls by a factor of 16, that of a potential with jumps does not.
    """
    for reach in (0.02, 0.01, 0.005):
        cases = [Collision(*start) for start in starts]
        collide(evaluate, cases, reach)
        for c in cases:
            result = {"energy": c.energy, "closest": float(c.closest), "change of the energy": float(c.worst)}
            line(c.name, result | ({} if reach == 0.02 else {"reach": reach}))
        line(
            f"{len(cases)} collisions",
            {"largest change of the energy": float(np.max([c.worst for c in cases]))},
        )
        starts = [start for start, c in zip(starts, cases, strict=True) if not c.worst <= 1e-4]
        if not starts:
            return


class Progress:
    """State of a long run in a file, from which an interrupted run is continued."""

    def __init__(self, folder: Path | None, name: str):
        self.path = folder / f"{name}.npz" if folder else None

    def load(self) -> dict[str, Array]:
        """Return the arrays saved last, none at the start."""
        if self.path is None or not self.path.exists():
            return {}
        with np.load(self.path) as stored:
            return dict(stored)

    def save(self, **arrays: Array) -> None:
        """Replace the arrays of the file."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".part.npz")
            np.savez(partial, **arrays)
            partial.replace(self.path)


def boxed(atoms: Atoms) -> Atoms:
    """Return a copy in a periodic box, with 3.5 Angstrom around a molecule."""
    atoms = atoms.copy()
    if not atoms.pbc.any():
        atoms.center(vacuum=3.5)
        atoms.pbc = True
    return atoms


def hot(
    potential: Potential,
    structures: dict[str, Atoms],
    ps: float,
    temperature: float,
    progress: Progress,
    device: str,
) -> Iterator[tuple[str, dict]]:
    """Langevin dynamics of many periodic boxes at once, at a temperature where molecules fall apart and meet again.

    Splitting BAOAB, 0.5 fs, friction 0.01/fs. Yields one result per box.
    """
    boxes = [boxed(atoms) for atoms in structures.values()]
    calculate = Together(Evaluator(potential.to(device), compile=None), boxes)
    sizes = [len(atoms) for atoms in boxes]
    ends = np.cumsum(sizes)[:-1]
    random, step, friction = np.random.default_rng(0), 0.5 * units.fs, 0.01 / units.fs
    masses = np.concatenate([a.get_masses() for a in boxes])[:, None]
    thermal = np.sqrt(units.kB * temperature / masses)
    positions = np.concatenate([a.positions for a in boxes])
    first, forces = calculate(positions)
    velocities = thermal * random.normal(size=positions.shape)
    done, lowest, hottest = 0, np.zeros(len(boxes)), np.zeros(len(boxes))
    closest = np.full(len(boxes), np.inf)
    if stored := progress.load():
        positions, velocities, lowest, closest, hottest = (
            stored[n] for n in ("positions", "velocities", "lowest", "closest", "hottest")
        )
        done = int(stored["done"])
        random = np.random.default_rng(done)
        forces = calculate(positions)[1]
    decay, last = np.exp(-friction * step), round(2000 * ps)
    for number in range(done + 1, last + 1):
        velocities = velocities + 0.5 * step * forces / masses
        positions = positions + 0.5 * step * velocities
        velocities = decay * velocities + np.sqrt(1 - decay**2) * thermal * random.normal(
            size=positions.shape
        )
        positions = positions + 0.5 * step * velocities
        energies, forces = calculate(positions)
        velocities = velocities + 0.5 * step * forces / masses
        lowest = np.minimum(lowest, (energies - first) / sizes)
        kinetic = np.array([k.mean() for k in np.split(masses * velocities**2, ends)])
        hottest = np.maximum(hottest, kinetic / units.kB)
        if number % 20 == 0:
            near = zip(boxes, np.split(positions, ends), strict=True)
            closest = np.minimum(closest, [shortest_distance(a, r) for a, r in near])
        if number % 4000 == 0 or number == last:
            progress.save(
                positions=positions,
                velocities=velocities,
                lowest=lowest,
                closest=closest,
                hottest=hottest,
                done=np.array(number),
            )
            print(f"{number / 2000} ps, hottest {hottest.max():.0f} K, lowest {lowest.min():.2f}", flush=True)
    for name, *values in zip(structures, lowest, closest, hottest, strict=True):
        labels = ("lowest energy per atom", "closest", "hottest")
        yield name, {"ps": ps} | dict(zip(labels, map(float, values), strict=True))


def merged(graphs: list[Graph]) -> Graph:
    """Return one structure with the atoms of all, in a unit cell of 1 Angstrom with shifts to match.

    A single structure is replayed as a CUDA graph, a batch is not.
    """
    batch = collate(graphs)
    shift = torch.cat([g.shift @ g.cell[0] for g in graphs])
    return batch._replace(
        cell=torch.eye(3, dtype=torch.float64)[None],
        shift=shift,
        structure=torch.zeros_like(batch.structure),
        charge_spin=batch.charge_spin[:1],
    )


def shortest_distance(atoms: Atoms, positions: Array) -> float:
    """Shortest distance in a box of atoms at other positions, Angstrom."""
    vectors = (positions[:, None] - positions)[np.triu_indices(len(positions), 1)]
    return float(find_mic(vectors, atoms.cell, atoms.pbc)[1].min())


def nve(
    model: DPA4Calculator, atoms: Atoms, ps: float, progress: Progress, temperature: float = 300.0
) -> dict:
    """Drift of the total energy in 1 fs steps, by a straight line, and its largest deviation.

    The structure is relaxed and thermalised for 1 ps before.
    """
    atoms = atoms.copy()
    atoms.calc = model
    total, energies = round(1000 * ps), []
    if stored := progress.load():
        atoms.positions, energies = stored["positions"], list(stored["energies"])
        atoms.set_velocities(stored["velocities"])
    else:
        FIRE(atoms, logfile=None).run(fmax=0.1, steps=500)
        random = np.random.default_rng(0)
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=random)
        Langevin(atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=random).run(
            2000
        )
        Stationary(atoms)
    dynamics, started, before = VelocityVerlet(atoms, units.fs), time.monotonic(), len(energies)
    while len(energies) < total // 10:
        dynamics.run(10)
        energies.append(atoms.get_total_energy() / len(atoms))
        if len(energies) % 200 == 0:
            velocities = atoms.get_velocities()
            progress.save(positions=atoms.positions, velocities=velocities, energies=np.array(energies))
            line(f"{len(energies) // 100} ps", fitted(energies) | {"K": atoms.get_temperature()})
    steps = 10 * (len(energies) - before)
    speed = 1e3 * (time.monotonic() - started) / max(steps, 1)
    return fitted(energies) | {"K": atoms.get_temperature(), "ms per step": speed}


def fitted(energies: list[float]) -> dict:
    """Slope of a straight line through energies per atom, one per 10 fs, and their range."""
    drift, _ = np.polyfit(0.01 * np.arange(len(energies)), energies, 1)
    return {
        "ps": 0.01 * len(energies),
        "drift ueV/atom/ps": 1e6 * float(drift),
        "largest deviation meV/atom": 1e3 * float(np.ptp(energies)),
    }


def line(name: str, values: dict) -> None:
    """Print a name and rounded values."""
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )
    print(f"{name}: " + ", ".join(shown), flush=True)


def one_of_each(frames: list[Atoms]) -> dict[str, Atoms]:
    """Return the first structure of each ``config_type``, without labels."""
    found: dict[str, Atoms] = {}
    for atoms in frames:
        found.setdefault(str(atoms.info.get("config_type", atoms.get_chemical_formula())), atoms.copy())
    return found


def main() -> None:
    """Run the test named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("test", choices=["pairs", "compressed", "collisions", "hot", "nve"])
    parser.add_argument("model")
    parser.add_argument("frames", nargs="?", help="structures, in any format that ASE reads")
    parser.add_argument("--only", nargs="*", help="names of the structures to use")
    parser.add_argument("--count", type=int, default=10_000, help="compressed structures")
    parser.add_argument("--collisions", type=int, default=200)
    parser.add_argument("--ps", type=float, default=100.0)
    parser.add_argument("--temperature", type=float, default=3000.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, help="folder of states, to continue hot and nve")
    options = parser.parse_args()
    frames = ase.io.read(options.frames, ":") if options.frames else []
    chosen = {n: a for n, a in one_of_each(frames).items() if not options.only or n in options.only}
    if options.test == "pairs":
        for found in pairs(load_potential(options.model)):
            line(found.pop("pair"), found)
    elif options.test == "compressed":
        ratios = compressed(load_potential(options.model), frames, options.count)
        over = int((~(ratios <= 10)).sum())
        line(
            f"{len(ratios)} structures",
            {"median": float(np.median(ratios)), "largest": float(ratios.max()), "above 10": over},
        )
    elif options.test == "collisions":
        random, starts = np.random.default_rng(1), []
        for number in range(options.collisions):
            name = list(chosen)[number % len(chosen)]
            energy = float(np.exp(random.uniform(np.log(10), np.log(500))))
            starts.append((f"{number} {name}", chosen[name], energy, number))
        evaluate = Evaluator(load_potential(options.model, device=options.device), compile=None)
        show_collisions(evaluate, starts)
    elif options.test == "hot":
        potential, progress = load_potential(options.model), Progress(options.state, "hot")
        results = hot(potential, chosen, options.ps, options.temperature, progress, options.device)
        for name, found in results:
            line(name, found)
    else:
        model = DPA4Calculator(options.model, device=options.device)
        for name, atoms in chosen.items():
            line(name, nve(model, atoms, options.ps, Progress(options.state, name)))


if __name__ == "__main__":
    main()
