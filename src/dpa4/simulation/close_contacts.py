"""Measures of a potential at short distances, relative to the bare repulsion of nuclei."""

from collections.abc import Mapping

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from numpy.typing import NDArray

from dpa4.data.coverage import ElementPair
from dpa4.graph import build_graph
from dpa4.model.short_range import zbl_pair_energy
from dpa4.potential import Potential
from dpa4.simulation.pair_curves import Curve

CURVATURE = 1000.0
"""Bound of the curvature of a pair in eV/Angstrom^2; 10 times the curvature of the bare repulsion is added to it."""

STEEPNESS = 10.0
"""Largest ratio of a force or curvature to that of the bare repulsion."""

WALL_OF_DATA = 0.8
"""Distance below which a pair must repel, relative to its shortest distance in the training data."""

WALL_OF_RADII = 0.6
"""Distance below which a pair must repel, relative to the sum of the covalent radii, where the data are unknown.

The shortest bonds have 0.77 of that sum (N2), and atoms in dynamics of 1,200 K come to 0.9 of their bond length.
"""

Array = NDArray[np.float64]


def bare_repulsion(a: int, b: int, distance: Array) -> tuple[Array, Array]:
    """Slope (eV/Angstrom) and curvature (eV/Angstrom^2) of the ZBL repulsion of two nuclei.

    Args:
        a: Atomic number of one nucleus.
        b: Atomic number of the other nucleus.
        distance: Distances (n,), in Angstrom.
    """
    length = torch.tensor(distance, requires_grad=True)
    energy = zbl_pair_energy(length, torch.tensor(a), torch.tensor(b)).sum()
    (slope,) = torch.autograd.grad(energy, length, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), length)
    return slope.detach().numpy(), curvature.numpy()


def wall_distance(pair: ElementPair, shortest: Mapping[ElementPair, float] | None) -> float:
    """Distance in Angstrom below which a pair of elements must repel.

    Args:
        pair: Chemical symbols.
        shortest: Shortest distances in the training data, in Angstrom, if known.
    """
    known = shortest or {}
    found = known.get(pair, known.get(pair[::-1]))
    radii = float(sum(covalent_radii[atomic_numbers[e]] for e in pair))
    return WALL_OF_RADII * radii if found is None else WALL_OF_DATA * found


def repels_below(curve: Curve, distance: float) -> bool:
    """Return whether the force of a curve is repulsive at all its distances below one, in Angstrom."""
    return bool((curve.force[curve.distance < distance] > 0).all())


def excess_curvature(curve: Curve, pair: ElementPair) -> Array:
    """Curvature of a pair curve above 10 times that of the bare repulsion, (n,) in eV/Angstrom^2."""
    a, b = (atomic_numbers[e] for e in pair)
    return np.abs(curve.curvature) - STEEPNESS * np.abs(bare_repulsion(a, b, curve.distance)[1])


def compress(atoms: Atoms, scale: float, random: np.random.Generator) -> Atoms:
    """Copy a structure with all lengths multiplied by a factor and atoms displaced by about 0.02 Angstrom."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell * scale)
    atoms.positions = scale * atoms.positions + random.normal(scale=0.02, size=(len(atoms), 3))
    return atoms


def force_over_repulsion(potential: Potential, atoms: Atoms) -> float:
    """Largest force of a structure divided by the force of the bare repulsion at its shortest pair.

    The ratio is NaN for a structure without a pair within the cutoff, infinite for forces that are not finite.
    """
    graph = build_graph(atoms.numbers, atoms.positions, atoms.cell, atoms.pbc, potential.config.cutoff)
    if not graph.num_edges:
        return float("nan")
    length = graph.edge_vectors().norm(dim=1)
    edge = int(length.argmin())
    ends = (int(atoms.numbers[graph.source[edge]]), int(atoms.numbers[graph.destination[edge]]))
    slope, _ = bare_repulsion(*ends, np.array([float(length[edge])]))
    largest = potential(graph.to(potential.device)).forces.norm(dim=1).max()
    return float(largest.nan_to_num(nan=torch.inf)) / abs(float(slope[0]))
