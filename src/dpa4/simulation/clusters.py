"""Isolated clusters of a few atoms in batches: graphs without a neighbour search, energies and forces."""

import numpy as np
import torch
from numpy.typing import NDArray

from dpa4.graph import Graph
from dpa4.potential import Potential
from dpa4.system import own_settings

CPU_ATOMS, GPU_ATOMS = 1024, 32768
"""Atoms per batch. Larger batches exceed the caches of a CPU (nano, one core, 2026-12-01)."""

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]


@own_settings
def cluster_graph(potential: Potential, numbers: Numbers, positions: Array) -> Graph:
    """Build the graph of S isolated clusters of n atoms, on the device of the potential.

    Atoms at the cutoff do not interact and get no edges. A potential conditioned on charge and spin gets its default
    values. Without a default, clusters are neutral with the lowest multiplicity of their number of electrons.

    Args:
        potential: Source of cutoff, default charge and spin, and device.
        numbers: Atomic numbers (S, n).
        positions: Positions (S, n, 3), in Angstrom.
    """
    atoms, places = torch.from_numpy(numbers), torch.from_numpy(positions)
    structures, size = atoms.shape
    apart = (places[:, :, None] - places[:, None]).norm(dim=-1)
    near = (apart < potential.config.cutoff) & ~torch.eye(size, dtype=torch.bool)
    structure, center, neighbor = near.nonzero(as_tuple=True)  # sorted by structure, centre and neighbour
    multiplicity = 1 + atoms.sum(dim=1) % 2
    state = torch.stack([torch.zeros_like(multiplicity), multiplicity], dim=1)
    if potential.config.default_charge_spin:
        state[:] = torch.tensor(potential.config.default_charge_spin)
    return Graph(
        atomic_numbers=atoms.flatten(),
        positions=places.reshape(-1, 3),
        cell=torch.zeros(structures, 3, 3, dtype=torch.float64),
        structure=torch.arange(structures).repeat_interleave(size),
        source=structure * size + neighbor,
        destination=structure * size + center,
        shift=torch.zeros(len(center), 3, dtype=torch.float64),
        charge_spin=state,
    ).to(potential.device)


def cluster_forces(potential: Potential, numbers: Numbers, positions: Array) -> tuple[Array, Array]:
    """Energies (S,) in eV and forces (S, n, 3) in eV/Angstrom of S isolated clusters, in batches.

    Batches are halved if they exceed the memory of a GPU. Arguments as for `cluster_graph`.
    """
    structures, size = numbers.shape
    batch = max(1, (GPU_ATOMS if potential.device.type == "cuda" else CPU_ATOMS) // size)
    energies, forces, first = np.empty(structures), np.empty((structures, size, 3)), 0
    while first < structures:
        part = slice(first, first + batch)
        try:
            found = potential(cluster_graph(potential, numbers[part], positions[part]))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            continue
        energies[part] = found.energy.detach().cpu().numpy()
        forces[part] = found.forces.detach().cpu().numpy().reshape(-1, size, 3)
        first += batch
    return energies, forces
