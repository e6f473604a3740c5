"""Pairs and triples of atoms without labels, whose forces are bounded during training.

Data rarely contain two or three atoms alone. Without any constraint a network may predict arbitrarily deep holes for
them, and simulations find such holes: at high temperature, in collisions, or when a molecule falls apart. A few atoms
per batch are enough to prevent this (docs/adr/0023).
"""

from collections.abc import Sequence

import numpy as np
import torch
from ase.data import atomic_numbers, covalent_radii
from numpy.typing import NDArray

from dpa4.data.batch import Batch
from dpa4.graph import Graph, collate
from dpa4.model.config import ModelConfig, PairBridging

# Bound of the force between two atoms: FLOOR + STEEPNESS * exp((R - r) / LENGTH), with the sum R of their covalent
# radii. Diatomic molecules stay well below it at all distances, also N2, the strongest one, with 13 eV/Angstrom.
FLOOR = 8.0  # eV/Angstrom
STEEPNESS = 12.0  # eV/Angstrom
LENGTH = 0.2  # Angstrom

Array = NDArray[np.float64]


class Fragments:
    """Random fragments for every batch of a run, determined by seed, epoch and number of the batch.

    Distances range from the shortest one that the network sees, in the middle of the window of a pair, to the cutoff.
    Short ones are drawn more often.

    Args:
        config: Configuration of the model, with a window per pair of elements.
        elements: Elements of the training data.
        seed: Seed of the run.
    """

    SIZES = (2, 3)  # atoms of the fragments of a batch

    def __init__(self, config: ModelConfig, elements: Sequence[str], seed: int):
        assert isinstance(config.bridging, PairBridging)
        self.cutoff, self.seed = config.cutoff, seed
        self.charge_spin = config.default_charge_spin
        self.elements = np.array([atomic_numbers[e] for e in elements])
        self.shortest = {}
        for name, end in config.bridging.outer.items():
            a, b = (atomic_numbers[e] for e in name.split("-"))
            self.shortest[a, b] = self.shortest[b, a] = end * (1 + config.bridging.frozen) / 2

    def __call__(self, batch: Batch, epoch: int, number: int) -> Batch:
        """Append fragments to batch ``number`` of an epoch."""
        random = np.random.default_rng((self.seed, epoch, number))
        made = [self._fragment(size, random) for size in self.SIZES]
        bounds = torch.from_numpy(np.concatenate([bound for _, bound in made]))
        extended = batch.extended(collate([batch.graph, *(graph for graph, _ in made)]))
        return extended._replace(max_force=torch.cat([batch.max_force, bounds])).counted()

    def _fragment(self, size: int, random: np.random.Generator) -> tuple[Graph, Array]:
        """Draw a fragment; return its graph and the bound of the force of each atom, (size,)."""
        numbers = random.choice(self.elements, size)
        while True:  # two of three attempts succeed
            positions = self._positions(numbers, random)
            distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
            lowest = np.array([[self.shortest[a, b] for b in numbers] for a in numbers])
            if (distance >= lowest)[~np.eye(size, dtype=bool)].all():
                return self._graph(numbers, positions, distance), _bounds(numbers, distance)

    def _positions(self, numbers: NDArray[np.int64], random: np.random.Generator) -> Array:
        """Place each atom at a random distance from a random earlier one."""
        positions = np.zeros((len(numbers), 3))
        for new in range(1, len(numbers)):
            old = random.integers(new)
            lowest = self.shortest[numbers[old], numbers[new]]
            direction = random.normal(size=3)
            length = lowest + (self.cutoff - lowest) * random.random() ** 2
            positions[new] = positions[old] + length * direction / np.linalg.norm(direction)
        return positions

    def _graph(self, numbers: NDArray[np.int64], positions: Array, distance: Array) -> Graph:
        near = (distance < self.cutoff) & ~np.eye(len(numbers), dtype=bool)
        destination, source = np.nonzero(near)
        charge_spin = self.charge_spin or (0, 1 + int(numbers.sum()) % 2)
        return Graph(
            atomic_numbers=torch.from_numpy(numbers),
            positions=torch.from_numpy(positions),
            cell=torch.zeros(1, 3, 3, dtype=torch.float64),
            structure=torch.zeros(len(numbers), dtype=torch.int64),
            source=torch.from_numpy(source),
            destination=torch.from_numpy(destination),
            shift=torch.zeros(len(source), 3, dtype=torch.float64),
            charge_spin=torch.tensor([charge_spin]),
        )


def _bounds(numbers: NDArray[np.int64], distance: Array) -> Array:
    """Bound of the force of each atom, the sum of those of its pairs, (N,) in eV/Angstrom."""
    radii = covalent_radii[numbers]
    bound = FLOOR + STEEPNESS * np.exp((radii[:, None] + radii - distance) / LENGTH)
    return np.where(np.eye(len(numbers), dtype=bool), 0.0, bound).sum(1)
