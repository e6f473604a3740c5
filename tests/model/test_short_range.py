"""Windows per pair of elements: where they end, what the network sees, and the repulsion that takes over."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii

from dpa4.model.config import ModelConfig, PairBridging, pair_names
from dpa4.model.short_range import (
    FROZEN,
    FULL,
    FULL_FAR,
    LOWEST,
    OUTER,
    UNSEEN,
    PairRange,
    pair_bridging,
    zbl_pair_energy,
)
from dpa4.ops.incidence import Incidence
from helpers import graph_of, molecule, random_potential

ELEMENTS = ("H", "C", "O")
ENDS = {"H-H": 0.9, "H-C": 1.0, "H-O": 0.8, "C-C": 1.4, "C-O": 1.3, "O-O": 1.2}
WINDOWS = PairBridging(outer=ENDS, frozen=0.75, full={name: 0.6 * end for name, end in ENDS.items()})


def pair(name: str, distance: float) -> Atoms:
    return Atoms(name.split("-"), [(0, 0, 0), (0.36 * distance, 0.48 * distance, 0.8 * distance)])


def of_pair(name: str, distances: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths that the network sees and repulsion of both atoms, each (n,), as functions of the distance."""
    lengths, energies = [], []
    for distance in distances:
        graph = graph_of(pair(name, distance))
        ends = Incidence.of(graph.source, 2), Incidence.of_sorted(graph.destination, 2)
        vectors, energy = PairRange(ELEMENTS, WINDOWS)(graph.edge_vectors(), *ends, graph.atomic_numbers)
        lengths.append(vectors.norm(dim=1)[0])
        energies.append(energy.sum())
    return torch.stack(lengths), torch.stack(energies)


def zbl(name: str, distances: np.ndarray) -> torch.Tensor:
    a, b = (torch.tensor(atomic_numbers[e]) for e in name.split("-"))
    return zbl_pair_energy(torch.from_numpy(distances), a, b)


def test_windows_end_below_the_data():
    shortest = {("H", "C"): 1.0, ("C", "O"): 0.1}
    found = pair_bridging(shortest, ELEMENTS, 4.0)
    radii = {e: covalent_radii[atomic_numbers[e]] for e in ELEMENTS}
    assert found.frozen == FROZEN and found.full.keys() == found.outer.keys() == pair_names(ELEMENTS).keys()
    assert found.outer["H-C"] == pytest.approx(OUTER)
    assert found.full["H-C"] == pytest.approx(FULL * OUTER)  # the radii add up to 1.07 Angstrom
    far = pair_bridging({("H", "H"): 1.3}, ELEMENTS, 4.0)
    assert far.full["H-H"] == pytest.approx(FULL_FAR * OUTER * 1.3)
    assert found.outer["C-O"] == pytest.approx(
        LOWEST * (radii["C"] + radii["O"])
    )  # atoms that nearly coincide
    assert found.outer["O-O"] == pytest.approx(UNSEEN * 2 * radii["O"])
    assert pair_bridging({("C", "H"): 1.0}, ELEMENTS, 4.0) == pair_bridging({("H", "C"): 1.0}, ELEMENTS, 4.0)
    # A window never reaches the cutoff.
    ModelConfig(elements=("Cs",), cutoff=2.0, bridging=pair_bridging({}, ("Cs",), 2.0))


@pytest.mark.parametrize("name", ["H-C", "O-O"])
def test_the_network_sees_the_true_length_above_and_a_fixed_one_below(name):
    end = ENDS[name]
    above = np.linspace(end, 3.9, 7)
    length, energy = of_pair(name, above)
    assert torch.allclose(length, torch.from_numpy(above), atol=1e-12) and not energy.any()
    below = np.linspace(0.01, 0.75 * end, 7)
    length, _ = of_pair(name, below)
    # The softening of lengths, 1e-7 Angstrom, is 5e-11 of the shortest one.
    assert torch.allclose(length, torch.full((7,), 0.875 * end, dtype=torch.float64), rtol=1e-9)
    below = np.linspace(0.01, 0.6 * end, 7)
    _, energy = of_pair(name, below)
    assert torch.allclose(energy, zbl(name, below), rtol=1e-9)


def test_the_window_is_smooth_and_monotonic():
    """Third differences of length and energy are continuous at both ends, so they have three derivatives there."""
    end, step = ENDS["C-C"], 2e-3
    distances = np.arange(0.55 * end, 1.05 * end, step)
    length, energy = of_pair("C-C", distances)
    assert (length.diff() >= -1e-12).all() and (energy.diff() <= 1e-12).all()
    for values, scale, width in ((length, end, 0.25 * end), (energy, float(energy.max()), 0.4 * end)):
        third = values.diff(n=3) / step**3
        # A jump of the third derivative would be of the order of scale / width^3; between neighbouring points the
        # fourth derivative, at most 900 scale / width^4, changes it by far less.
        assert float(third.diff().abs().max()) < 1000 * scale / width**4 * step


def test_forces_and_curvature_are_derivatives_of_the_energy():
    potential = random_potential(bridging=WINDOWS)
    for distance in (0.5, 1.1, 1.2, 1.35):  # below, in and above the window of C-C
        energies = [float(potential(graph_of(pair("C-C", distance + h))).energy) for h in (-1e-4, 1e-4)]
        forces = potential(graph_of(pair("C-C", distance))).forces
        along = float(forces[1] @ torch.tensor([0.36, 0.48, 0.8], dtype=torch.float64))
        assert along == pytest.approx(-(energies[1] - energies[0]) / 2e-4, rel=1e-5, abs=1e-6)


def test_a_frozen_pair_still_has_the_environment_of_the_others():
    """The learned energy does not depend on a distance below the window, whatever other atoms are near."""
    potential = random_potential(bridging=WINDOWS)
    others = molecule(3, 4).positions + (0, 0, 3.0)

    def learned(distance: float) -> float:
        atoms = Atoms("CC" + "HCOH", np.vstack([[[0, 0, 0], [0, 0, distance]], others]))
        graph = graph_of(atoms)
        ends = Incidence.of(graph.source, 6), Incidence.of_sorted(graph.destination, 6)
        repulsion = potential.short_range(graph.edge_vectors(), *ends, graph.atomic_numbers)[1].sum()
        return float(potential(graph).energy - repulsion)

    moved = [learned(d) for d in (1.05, 1.0)]  # the other distances change a little
    assert abs(moved[0] - moved[1]) < 1.0  # without windows: several eV (random weights)


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 0.05, 0.3])
def test_numbers_stay_finite_down_to_contact(distance):
    potential = random_potential(bridging=WINDOWS).float()
    for atoms in (pair("C-O", distance), Atoms("COH", [(0, 0, 0), (0, 0, distance), (0, distance, 0)])):
        found = potential(graph_of(atoms))
        assert torch.isfinite(found.energy).all() and torch.isfinite(found.forces).all()
        assert found.energy > zbl("H-C", np.array([distance]))[0]


def test_parts_and_dtype_of_the_network_leave_the_windows_exact():
    potential = random_potential(bridging=WINDOWS)
    exact = potential.short_range.windows.clone()
    assert torch.equal(potential.float().double().short_range.windows, exact)


def test_windows_are_checked():
    def config(outer: dict[str, float], full: dict[str, float], cutoff: float = 4.0) -> ModelConfig:
        bridging = PairBridging(outer=outer, frozen=0.8, full=full)
        return ModelConfig(elements=ELEMENTS, cutoff=cutoff, bridging=bridging)

    half = {name: 0.5 * end for name, end in ENDS.items()}
    assert config(ENDS, half).has_pair_bridging
    with pytest.raises(
        ValueError, match=r"outer needs one entry per pair of elements; .* unknown: \['C-O'\]"
    ):
        config({name: end for name, end in ENDS.items() if name != "C-O"}, half)
    with pytest.raises(ValueError, match=r"full needs one entry per pair .* unknown: \['Si-Si'\]"):
        config(ENDS, half | {"Si-Si": 1.0})
    with pytest.raises(ValueError, match="outer must be between 0 and the cutoff, got .*C-C: 1.4 of 1.25"):
        config(ENDS, half, cutoff=1.25)
    with pytest.raises(ValueError, match="full must be between 0 and bridging.outer, got .*H-H: 0.9 of 0.9"):
        config(ENDS, ENDS)
