"""Checks of symmetry and of derivatives, in float64."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from dpa4.graph import collate
from dpa4.potential import Potential
from dpa4.simulation.check.numerics import bound_energies
from dpa4.simulation.check.result import CheckResult, Figure
from dpa4.simulation.check.structures import graph_of

SYMMETRY_TOLERANCE = 1e-9
DERIVATIVE_TOLERANCE = 1e-6
MIRROR_WARNING = 1e-3
STEP = 2e-4
"""Step of finite differences, in Angstrom: the error of the formula and the rounding of energies are about equal."""

DIRECTIONS = 4
"""Random directions per structure in which derivatives are compared; each contains all atoms and components."""

Structures = Mapping[str, Atoms]
Array = NDArray[np.float64]
Operation = Callable[[Atoms, np.random.Generator], tuple[Atoms, Array, NDArray[np.int64]]]


def check_symmetry(potential: Potential, structures: Structures, seed: int = 0) -> list[CheckResult]:
    """Compare structures with their rotated, shifted and permuted copies, and with their mirror images."""
    random = np.random.default_rng(seed)
    deviations = {
        "rotation": _deviations(potential, structures, random, _rotated),
        "translation": _deviations(potential, structures, random, _translated),
        "permutation": _deviations(potential, structures, random, _permuted),
    }
    results = [
        CheckResult(
            name,
            f"{len(structures)} structures, float64",
            (
                Figure(
                    "energies differ by", _worst(e for e, _ in found.values()), "eV/atom", SYMMETRY_TOLERANCE
                ),
                Figure("forces differ by", _worst(f for _, f in found.values()), "eV/Å", SYMMETRY_TOLERANCE),
            ),
            "exact for every DPA4 model; float64 rounds at 1e-16, sums amplify it",
            f"largest: {max(found, key=lambda name: found[name])}",
        )
        for name, found in deviations.items()
    ]
    return [*results, check_mirror(potential, structures)]


def check_mirror(potential: Potential, structures: Structures) -> CheckResult:
    """Compare structures with their mirror images; promised for models of symmetry O3 and for models of scalars."""
    config = potential.config
    promised = config.has_mirror_symmetry
    random = np.random.default_rng(0)
    found = _deviations(potential, structures, random, _mirrored)
    energy = _worst(e for e, _ in found.values())
    limit = SYMMETRY_TOLERANCE if promised else MIRROR_WARNING
    reason = (
        f"exact for a model of {'symmetry O3' if config.symmetry == 'O3' else 'scalars (lmax 0)'}"
        if promised
        else "not promised: a model of symmetry SO3 is equivariant under rotations only; above 1 meV/atom reaction "
        "paths through mirror images and enantiomers are affected"
    )
    return CheckResult(
        "mirror images",
        f"{len(structures)} structures, float64",
        (
            Figure("energies differ by", energy, "eV/atom", limit, severe=promised),
            Figure(
                "forces differ by",
                _worst(f for _, f in found.values()),
                "eV/Å",
                SYMMETRY_TOLERANCE if promised else None,
            ),
        ),
        reason,
        f"largest: {max(found, key=lambda name: found[name])}",
    )


def check_forces(potential: Potential, structures: Structures, seed: int = 0) -> CheckResult:
    """Compare forces with finite differences of the energy along random displacements of all atoms."""
    random = np.random.default_rng(seed)
    deviations = {}
    for name, atoms in structures.items():
        forces = potential(graph_of(potential, atoms)).forces.detach().cpu().numpy()
        worst = 0.0
        for _ in range(DIRECTIONS):
            direction = random.normal(size=(len(atoms), 3))
            direction /= np.linalg.norm(direction)

            def moved(length: float, atoms: Atoms = atoms, direction: Array = direction) -> Atoms:
                copy = atoms.copy()
                copy.positions += length * direction
                return copy

            slope = _slope(potential, moved)
            worst = _worst((worst, abs(slope + float((forces * direction).sum()))))
        deviations[name] = worst / max(1.0, float(np.abs(forces).max()))
    return _derivative("forces", "eV/Å", deviations, "displacements of all atoms")


def check_virial(potential: Potential, structures: Structures, seed: int = 0) -> CheckResult:
    """Compare the virial with finite differences of the energy along random strains."""
    random = np.random.default_rng(seed)
    deviations = {}
    for name, atoms in structures.items():
        virial = potential(graph_of(potential, atoms)).virial[0].detach().cpu().numpy()
        worst = 0.0
        for _ in range(DIRECTIONS):
            strain = random.normal(size=(3, 3))
            strain /= np.linalg.norm(strain)

            def strained(length: float, atoms: Atoms = atoms, strain: Array = strain) -> Atoms:
                copy = atoms.copy()
                deformation = np.eye(3) + length * strain
                copy.set_cell(atoms.cell.array @ deformation.T)
                copy.positions = atoms.positions @ deformation.T
                return copy

            slope = _slope(potential, strained)
            worst = _worst((worst, abs(slope + float((virial * strain).sum()))))
        deviations[name] = worst / max(1.0, float(np.abs(virial).max()))
    return _derivative("virial", "eV", deviations, "strains")


def _derivative(name: str, unit: str, deviations: Mapping[str, float], along: str) -> CheckResult:
    return CheckResult(
        name,
        f"{len(deviations)} structures, {DIRECTIONS} random {along} each, finite differences in float64",
        (Figure("differ by", _worst(deviations.values()), unit, DERIVATIVE_TOLERANCE),),
        f"energies of float64 round at 1e-13 eV, which a step of {STEP:g} Å turns into 1e-9",
        f"largest: {max(deviations, key=deviations.__getitem__)}",
    )


def _slope(potential: Potential, moved: Callable[[float], Atoms]) -> float:
    """Derivative of the energy at zero by central differences of fourth order, per Angstrom."""
    graphs = collate([graph_of(potential, moved(k * STEP)) for k in (-2, -1, 1, 2)])
    energies = bound_energies(potential, graphs, potential(graphs))
    weights = torch.tensor([1.0, -8.0, 8.0, -1.0], dtype=torch.float64)
    return float((weights * energies).sum()) / (12 * STEP)


# --- symmetry operations: a copy, the matrix that transforms its forces, and the order of its atoms


def _rotated(atoms: Atoms, random: np.random.Generator) -> tuple[Atoms, Array, NDArray[np.int64]]:
    return _transformed(atoms, Rotation.random(rng=random).as_matrix())


def _mirrored(atoms: Atoms, random: np.random.Generator) -> tuple[Atoms, Array, NDArray[np.int64]]:
    return _transformed(atoms, np.diag([-1.0, 1.0, 1.0]))


def _transformed(atoms: Atoms, matrix: Array) -> tuple[Atoms, Array, NDArray[np.int64]]:
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ matrix.T)
    copy.positions = atoms.positions @ matrix.T
    return copy, matrix, np.arange(len(atoms))


def _translated(atoms: Atoms, random: np.random.Generator) -> tuple[Atoms, Array, NDArray[np.int64]]:
    copy = atoms.copy()
    copy.positions += random.uniform(-10, 10, size=3)
    copy.wrap()
    return copy, np.eye(3), np.arange(len(atoms))


def _permuted(atoms: Atoms, random: np.random.Generator) -> tuple[Atoms, Array, NDArray[np.int64]]:
    order = random.permutation(len(atoms))
    return atoms[order], np.eye(3), order


def _deviations(
    potential: Potential, structures: Structures, random: np.random.Generator, operation: Operation
) -> dict[str, tuple[float, float]]:
    """Deviation of the energy per atom and of the forces of every structure from those of its copy."""
    found = {}
    for name, atoms in structures.items():
        copy, matrix, order = operation(atoms, random)
        copy.info = atoms.info
        graphs = [graph_of(potential, a) for a in (atoms, copy)]
        first, second = (potential(graph) for graph in graphs)
        e, e_copy = (
            float(bound_energies(potential, g, p)) for g, p in zip(graphs, (first, second), strict=True)
        )
        forces, forces_copy = (p.forces.detach().cpu().numpy() for p in (first, second))
        scale = max(1.0, float(np.abs(forces).max()))
        force = float(np.abs(forces_copy - (forces @ matrix.T)[order]).max())
        found[name] = (abs(e_copy - e) / len(atoms) / scale, force / scale)
    return found


def _worst(values: Iterable[float]) -> float:
    return float(np.max(list(values)))  # unlike Python's max, propagates NaN
