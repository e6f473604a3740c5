"""Geometries far from and near to equilibrium, from molecules with known bonds; no energies are needed here."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from ase.data import vdw_radii
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]
Part = tuple[NDArray[np.int64], Array]  # atomic numbers and positions of a molecule
Bonds = Sequence[Sequence[float]]  # index, index and order of each bond

HYDROGEN = 1
HETEROATOMS = (7, 8, 16)
MIN_HYDROGEN_DISTANCE = 0.75  # Angstrom, from a transferred proton to any atom
SAME = 0.01  # Angstrom; structures with a smaller RMS difference of sorted distances are duplicates
WATER_VOLUME = 30.0  # Angstrom^3 per molecule of the liquid


def fragments(atoms: int, bonds: Bonds, removed: tuple[int, int]) -> NDArray[np.int64]:
    """Index of the connected fragment of every atom after the removal of one bond."""
    connected = np.zeros((atoms, atoms))
    for i, j, _ in bonds:
        if {int(i), int(j)} != set(removed):
            connected[int(i), int(j)] = 1
    return connected_components(connected, directed=False)[1]


def stretched(positions: Array, bonds: Bonds, rng: np.random.Generator) -> Array:
    """Scale a random bond by 0.7 to 1.8 and move the fragment behind it; for a ring bond, scale the molecule."""
    i, j = rng.permutation([int(k) for k in bonds[rng.integers(len(bonds))][:2]])
    fragment = fragments(len(positions), bonds, (i, j))
    if fragment[i] == fragment[j]:
        centre = positions.mean(axis=0)
        return centre + rng.uniform(0.88, 1.18) * (positions - centre)
    moved = positions.copy()
    moved[fragment == fragment[j]] += rng.uniform(-0.3, 0.8) * (positions[j] - positions[i])
    return moved


def rotatable(numbers: NDArray[np.int64], bonds: Bonds) -> list[tuple[int, int]]:
    """Single bonds outside rings between atoms that both have further neighbours."""
    degree = np.bincount([int(k) for bond in bonds for k in bond[:2]], minlength=len(numbers))
    axes = [(int(i), int(j)) for i, j, order in bonds if order == 1 and degree[int(i)] > 1 < degree[int(j)]]
    split = {axis: fragments(len(numbers), bonds, axis) for axis in axes}
    return [axis for axis in axes if split[axis][axis[0]] != split[axis][axis[1]]]


def twisted(positions: Array, bonds: Bonds, axis: tuple[int, int], angle: float) -> Array:
    """Rotate the fragment behind a bond about that bond by an angle in radians."""
    i, j = axis
    moving = fragments(len(positions), bonds, axis) == fragments(len(positions), bonds, axis)[j]
    direction = (positions[j] - positions[i]) / np.linalg.norm(positions[j] - positions[i])
    moved = positions.copy()
    moved[moving] = positions[j] + Rotation.from_rotvec(angle * direction).apply(
        positions[moving] - positions[j]
    )
    return moved


def proton_transferred(
    numbers: NDArray[np.int64], positions: Array, bonds: Bonds, rng: np.random.Generator, reach: float = 3.3
) -> Array | None:
    """Move a hydrogen from its N, O, S or C partly or wholly to another N, O or S, or None if there is none.

    Args:
        numbers: Atomic numbers.
        positions: Positions in Angstrom.
        bonds: Bonds with indices.
        rng: Source of random numbers.
        reach: Largest distance between donor and acceptor in Angstrom.
    """
    partner = {int(i): int(j) for i, j, _ in bonds} | {int(j): int(i) for i, j, _ in bonds}
    acceptors = np.flatnonzero(np.isin(numbers, HETEROATOMS))
    paths = [
        (hydrogen, partner[hydrogen], acceptor)
        for hydrogen in np.flatnonzero(numbers == HYDROGEN).tolist()
        for acceptor in acceptors.tolist()
        if numbers[partner[hydrogen]] != HYDROGEN
        and acceptor != partner[hydrogen]
        and np.linalg.norm(positions[acceptor] - positions[partner[hydrogen]]) < reach
    ]
    for hydrogen, _, acceptor in (paths[k] for k in rng.permutation(len(paths))[:8]):
        towards = positions[hydrogen] - positions[acceptor]
        length = 1.35 if numbers[acceptor] == 16 else 1.0
        target = positions[acceptor] + length * towards / np.linalg.norm(towards)
        moved = positions.copy()
        moved[hydrogen] += rng.uniform(0.25, 1.0) * (target - positions[hydrogen])
        others = np.delete(np.arange(len(numbers)), hydrogen)
        if cdist(moved[[hydrogen]], moved[others]).min() > MIN_HYDROGEN_DISTANCE:
            return moved
    return None


def contact(first: Part, second: Part) -> float:
    """Smallest distance between the atoms of two parts in units of the sum of their van der Waals radii."""
    radii = vdw_radii[first[0]][:, None] + vdw_radii[second[0]]
    return float((cdist(first[1], second[1]) / radii).min())


def arranged(parts: Sequence[Part], closest: float, rng: np.random.Generator) -> Part:
    """Join randomly turned molecules, each with the given ``contact`` to the earlier ones.

    Args:
        parts: Molecules.
        closest: Contact of each molecule with the earlier ones.
        rng: Source of random numbers.
    """
    numbers, positions = parts[0]
    positions = positions - positions.mean(axis=0)
    for added, shape in parts[1:]:
        shape = Rotation.random(random_state=rng).apply(shape - shape.mean(axis=0))
        direction = Rotation.random(random_state=rng).apply([1.0, 0.0, 0.0])
        low, high = 0.0, 40.0
        # From far away inwards: the first contact on the way, found on a coarse grid and then by bisection.
        for distance in np.arange(25.0, 0.0, -0.25):
            if contact((numbers, positions), (added, shape + distance * direction)) < closest:
                low, high = distance, distance + 0.25
                break
        for _ in range(12):
            middle = (low + high) / 2
            near = contact((numbers, positions), (added, shape + middle * direction)) < closest
            low, high = (middle, high) if near else (low, middle)
        numbers = np.concatenate([numbers, added])
        positions = np.concatenate([positions, shape + high * direction])
        positions = positions - positions.mean(axis=0)
    return numbers, positions


def hydrogen_bonded(first: Part, second: Part, rng: np.random.Generator) -> Part | None:
    """Pair of molecules in which an X-H of the first points at an N, O or S of the second.

    The distance of X and the acceptor is 2.4 to 3 Angstrom, longer with S and Cl.

    Returns None if there is no such pair of atoms or no arrangement without a clash.
    """
    (numbers, positions), (others, shape) = first, second
    hydrogens = np.flatnonzero(numbers == HYDROGEN)
    heavy = np.flatnonzero(np.isin(numbers, (7, 8, 9, 16, 17)))
    acceptors = np.flatnonzero(np.isin(others, HETEROATOMS))
    if not (len(hydrogens) and len(heavy) and len(acceptors)):
        return None
    distances = cdist(positions[hydrogens], positions[heavy])
    donors = [
        (hydrogens[h], heavy[x])
        for h, x in np.argwhere(distances < 1.5)
        if distances[h, x] == distances[h].min()
    ]
    if not donors:
        return None
    for _ in range(20):
        hydrogen, donor = donors[rng.integers(len(donors))]
        acceptor = acceptors[rng.integers(len(acceptors))]
        axis = positions[hydrogen] - positions[donor]
        size = rng.uniform(2.4, 3.0) + 0.4 * (int(numbers[donor] > 9) + int(others[acceptor] > 9))
        turned = Rotation.random(random_state=rng).apply(shape - shape[acceptor])
        turned += positions[donor] + size * axis / np.linalg.norm(axis)
        rest = np.delete(np.arange(len(others)), acceptor)
        if not len(rest) or contact(first, (others[rest], turned[rest])) > 0.65:
            return np.concatenate([numbers, others]), np.concatenate([positions, turned])
    return None


def droplet(part: Part, count: int, rng: np.random.Generator) -> Part:
    """Randomly turned copies of a molecule at random places of a sphere with the density of liquid water."""
    radius = (3 * WATER_VOLUME * count / (4 * np.pi)) ** (1 / 3)
    placed: list[Part] = []
    while len(placed) < count:
        direction = Rotation.random(random_state=rng).apply([1.0, 0.0, 0.0])
        centre = radius * rng.uniform() ** (1 / 3) * direction
        shape = Rotation.random(random_state=rng).apply(part[1] - part[1].mean(axis=0)) + centre
        if all(contact((part[0], shape), other) > 0.55 for other in placed):
            placed.append((part[0], shape))
        else:
            radius *= 1.002  # random places fill a sphere badly
    return np.tile(part[0], count), np.concatenate([positions for _, positions in placed])


def joined_bonds(members: Sequence[tuple[int, Bonds]]) -> list[list[float]]:
    """Bonds of a cluster from number of atoms and bonds of each member."""
    bonds: list[list[float]] = []
    offset = 0
    for atoms, own in members:
        bonds += [[i + offset, j + offset, order] for i, j, order in own]
        offset += atoms
    return bonds


def fingerprint(numbers: NDArray[np.int64], positions: Array) -> Array:
    """Distances of all pairs, sorted within each pair of elements: equal for mirrored and renumbered structures."""
    pairs = np.array(
        [tuple(sorted((numbers[i], numbers[j]))) for i, j in combinations(range(len(numbers)), 2)]
    )
    distances = pdist(positions)
    return distances[np.lexsort((distances, pairs[:, 1], pairs[:, 0]))]


def is_duplicate(candidate: Array, kept: Sequence[Array]) -> bool:
    """Return True if a fingerprint differs from one of the others by less than ``SAME`` (RMS, Angstrom)."""
    return any(np.sqrt(np.mean((candidate - other) ** 2)) < SAME for other in kept)
