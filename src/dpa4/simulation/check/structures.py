"""Built-in structures of a check: molecules, clusters, crystal, slab and isolated atom of a model's elements."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import atomic_numbers, covalent_radii

from dpa4.graph import Graph, build_graph
from dpa4.interfaces.loading import charge_spin_of
from dpa4.potential import Potential

MOLECULES = ("CH3CH2OH", "CH3OH", "H2O", "CH4", "NH3", "CO2", "C2H4", "N2", "H2", "O2")
"""Molecules in the order of preference, with their names in ASE."""

CRYSTALS = {
    "NaCl": ("rocksalt", 5.64),
    "MgO": ("rocksalt", 4.21),
    "SiC": ("zincblende", 4.36),
    "GaAs": ("zincblende", 5.65),
    "Si": ("diamond", 5.43),
    "Ge": ("diamond", 5.66),
    "Cu": ("fcc", 3.61),
    "Al": ("fcc", 4.05),
    "C": ("diamond", 3.57),
    "Fe": ("bcc", 2.87),
    "W": ("bcc", 3.16),
}
"""Crystals in the order of preference: structure and lattice constant in Angstrom."""

RATTLE = 0.05
"""Standard deviation of random displacements that break all symmetries, in Angstrom."""

VACUUM = 6.0
"""Empty space above and below a slab, in Angstrom."""

MAX_CLUSTERS = 4
CLUSTER_ATOMS = 6


def built_in_structures(
    elements: Sequence[str], conditioned: bool = False, seed: int = 0
) -> dict[str, Atoms]:
    """Build small structures of given elements: molecules, clusters, crystal, slab, isolated atom.

    Positions are random displacements away from symmetric ones; the same seed gives the same structures.

    Args:
        elements: Chemical symbols.
        conditioned: Also build a charged structure, for a model that reads charge and spin.
        seed: Seed of displacements and clusters.

    Returns:
        Structures by name. Their ``info`` has a charge, and the lowest multiplicity for it.
    """
    random = np.random.default_rng(seed)
    found: dict[str, Atoms] = {}
    known = set(elements)
    molecules = [name for name in MOLECULES if known.issuperset(molecule(name).symbols)]
    for name in molecules[:2]:
        found[f"molecule {name}"] = molecule(name)
    for group in _groups(elements):
        atoms = cluster(group, random)
        found[f"cluster {atoms.get_chemical_formula()}"] = atoms
    crystal = cubic_crystal(elements)
    found[f"crystal {crystal.get_chemical_formula()}"] = crystal
    slab = crystal.repeat((1, 1, 2))
    slab.center(vacuum=VACUUM, axis=2)
    slab.pbc = (True, True, False)
    found[f"slab {slab.get_chemical_formula()}"] = slab
    for atoms in found.values():
        atoms.positions += random.normal(scale=RATTLE, size=(len(atoms), 3))
    if conditioned:
        name = next(iter(found))
        found[f"charged {name}"] = found[name].copy()
        found[f"charged {name}"].info["charge"] = 1
    found[f"atom {elements[0]}"] = Atoms(elements[0])
    return {name: in_lowest_multiplicity(atoms) for name, atoms in found.items()}


def in_lowest_multiplicity(atoms: Atoms) -> Atoms:
    """Set the multiplicity of a structure to the lowest one for its charge, which is zero by default."""
    charge = atoms.info.setdefault("charge", 0)
    atoms.info["spin"] = 1 + int(atoms.numbers.sum() - charge) % 2
    return atoms


def cluster(elements: Sequence[str], random: np.random.Generator) -> Atoms:
    """Build a random cluster whose atoms are 0.95 to 1.2 times the sum of their covalent radii from a neighbour."""
    radii = [float(covalent_radii[atomic_numbers[e]]) for e in elements]
    positions = [np.zeros(3)]
    while len(positions) < len(elements):
        radius = radii[len(positions)]
        neighbor = int(random.integers(len(positions)))
        direction = random.normal(size=3)
        length = random.uniform(0.95, 1.2) * (radius + radii[neighbor])
        trial = positions[neighbor] + length * direction / np.linalg.norm(direction)
        if all(
            np.linalg.norm(trial - p) > 0.95 * (radius + r)
            for p, r in zip(positions, radii, strict=False)
            if p is not positions[neighbor]
        ):
            positions.append(trial)
    return Atoms(list(elements), positions=np.array(positions))


def cubic_crystal(elements: Sequence[str]) -> Atoms:
    """Build a cubic crystal of known lattice constant, or of one or two elements at the distance of their radii."""
    known = set(elements)
    for name, (structure, length) in CRYSTALS.items():
        if known.issuperset(Atoms(name).symbols):
            return in_lowest_multiplicity(bulk(name, structure, a=length, cubic=True))
    pair = (elements[0], elements[min(1, len(elements) - 1)])
    distance = 1.2 * sum(float(covalent_radii[atomic_numbers[e]]) for e in pair)
    return in_lowest_multiplicity(bulk("".join(pair), "rocksalt", a=2 * distance, cubic=True))


def graph_of(potential: Potential, atoms: Atoms) -> Graph:
    """Build the graph of a structure with charge and spin, on the device of a potential."""
    state = charge_spin_of(potential, atoms)
    graph = build_graph(
        atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, potential.config.cutoff, state
    )
    return graph.to(potential.device)


def _groups(elements: Sequence[str]) -> list[list[str]]:
    """Elements of the clusters: evenly spaced in the list, and repeated if there are few."""
    count = min(MAX_CLUSTERS, -(-len(elements) // CLUSTER_ATOMS))
    chosen = np.linspace(0, len(elements), count * CLUSTER_ATOMS, endpoint=False).astype(int)
    return [[elements[k] for k in chosen[first::count]] for first in range(count)]
