"""Choice of the molecules of clusters, such that clusters for tests consist of molecules for tests (and water)."""

from hashlib import sha256

import numpy as np

from starter_data.storage import Molecule, System, split_of

LARGEST_CLUSTER = 24  # atoms
WATER = "O"
WATER_SIZES = range(2, 11)  # molecules
WATER_SHARE = 0.15  # of the partners in clusters of organic molecules
COMMON_SIZE = 9  # atoms; half of the molecules of clusters are not larger
SAME_SHARE = 0.25  # of the clusters consist of one kind of molecule


def systems(molecules: list[Molecule], dimers: int, clusters: int, water: int) -> list[System]:
    """All systems, in an order that makes every beginning of the list a fair sample.

    Args:
        molecules: The molecules, among them water; each is a system of its own.
        dimers: Number of pairs.
        clusters: Number of clusters of three to six molecules.
        water: Number of water clusters.
    """
    chosen = [System(f"molecule {m.smiles}", m.family, m.split, [k]) for k, m in enumerate(molecules)]
    chosen += [_cluster(f"dimer {k}", "dimer", 2, molecules) for k in range(dimers)]
    chosen += [_cluster(f"cluster {k}", "cluster", 3 + k % 4, molecules) for k in range(clusters)]
    oxide = next(k for k, m in enumerate(molecules) if m.smiles == WATER)
    for k in range(water):
        size = WATER_SIZES[k % len(WATER_SIZES)]
        chosen.append(System(f"water {k}", "water", split_of(f"water {k}"), [oxide] * size))
    return sorted(chosen, key=lambda system: sha256(system.name.encode()).digest())


def _cluster(name: str, family: str, size: int, molecules: list[Molecule]) -> System:
    """Cluster of random molecules of one split; the atoms that are left always suffice for water."""
    split = split_of(name)
    rng = np.random.default_rng(list(name.encode()))
    water = next(k for k, m in enumerate(molecules) if m.smiles == WATER)
    own = [k for k, m in enumerate(molecules) if m.split == split]
    left = LARGEST_CLUSTER
    alone = rng.random() < SAME_SHARE
    members: list[int] = []
    while len(members) < size:
        atoms = left - 3 * (size - len(members) - 1)
        fitting = [k for k in own if len(molecules[k].numbers) <= atoms]
        common = [k for k in fitting if len(molecules[k].numbers) <= COMMON_SIZE]
        pool = common if common and rng.random() < 0.5 else fitting
        if members and alone and members[0] in fitting:
            pool = members[:1]
        elif members and (not fitting or rng.random() < WATER_SHARE):
            pool = [water]
        members.append(int(pool[rng.integers(len(pool))]))
        left -= len(molecules[members[-1]].numbers)
    return System(name, family, split, members)
