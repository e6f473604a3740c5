"""Choice of the molecules of clusters, such that clusters for tests consist of molecules for tests (and water)."""

from hashlib import sha256

import numpy as np

from starter_data.storage import Molecule, System, split_of

LARGEST_CLUSTER = 32  # atoms
WATER = "O"
WATER_SIZES = range(2, 11)  # molecules
WATER_SHARE = 0.15  # of the partners in clusters of organic molecules
SAME_SHARE = 0.25  # of the clusters consist of one kind of molecule


def systems(molecules: list[Molecule], dimers: int, clusters: int, water: int) -> list[System]:
    """All systems, in an order that makes every beginning of the list a fair sample.

    Args:
        molecules: The molecules; each is a system of its own.
        dimers: Number of pairs.
        clusters: Number of clusters of three to six molecules.
        water: Number of water clusters.
    """
    chosen = [System(f"molecule {m.smiles}", m.family, m.split, [k]) for k, m in enumerate(molecules)]
    chosen += [_cluster(f"dimer {k}", "dimer", 2, molecules) for k in range(dimers)]
    chosen += [_cluster(f"cluster {k}", "cluster", 3 + k % 4, molecules) for k in range(clusters)]
    oxygen = next((k for k, m in enumerate(molecules) if m.smiles == WATER), None)
    if oxygen is not None:
        for k in range(water):
            name = f"water {k}"
            size = WATER_SIZES[k % len(WATER_SIZES)]
            chosen.append(System(name, "water", split_of(name), [oxygen] * size))
    return sorted(chosen, key=lambda system: sha256(system.name.encode()).digest())


def _cluster(name: str, family: str, size: int, molecules: list[Molecule]) -> System:
    """Cluster of random molecules of one split."""
    split = split_of(name)
    rng = np.random.default_rng(list(name.encode()))
    fitting = [
        k for k, m in enumerate(molecules) if m.split == split and len(m.numbers) <= LARGEST_CLUSTER / size
    ]
    common = [k for k in fitting if len(molecules[k].numbers) <= 9]
    water = [k for k, m in enumerate(molecules) if m.smiles == WATER]

    def draw() -> int:
        pool = common if common and rng.random() < 0.5 else fitting
        return int(pool[rng.integers(len(pool))])

    first = draw()
    members = [first]
    alone = rng.random() < SAME_SHARE
    while len(members) < size:
        members.append(first if alone else water[0] if water and rng.random() < WATER_SHARE else draw())
    return System(name, family, split, members)
