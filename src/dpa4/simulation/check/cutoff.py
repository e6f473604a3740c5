"""Checks at the cutoff: an atom that crosses it, and atoms that are just inside."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from numpy.typing import NDArray

from dpa4.graph import collate
from dpa4.model.config import Bridging
from dpa4.model.short_range import zbl_pair_energy
from dpa4.potential import Potential
from dpa4.simulation.check.numerics import bound_energies
from dpa4.simulation.check.result import CheckResult, Figure
from dpa4.simulation.check.structures import cubic_crystal, graph_of, in_lowest_multiplicity
from dpa4.simulation.close_contacts import CURVATURE

GAP = 1e-6
"""Distance of the crossing atom from the cutoff on either side, in Angstrom."""

ENERGY_JUMP, FORCE_JUMP = 1e-6, 1e-5
"""Largest jumps of an energy (eV) and of a force (eV/Angstrom)."""

DISPLACEMENT = 1e-7
"""Displacement whose effect on the forces is measured, in Angstrom."""

INSIDE = np.logspace(-6, 0, 13)
"""Distances between a shell of neighbours and the cutoff, in Angstrom."""

MAX_PROBES = 8

Structures = Mapping[str, Atoms]


def check_crossing(potential: Potential, structures: Structures, elements: Sequence[str]) -> CheckResult:
    """Move an atom across the cutoff of the outermost atom of a structure, and compare energy and forces.

    Every molecule and cluster meets up to eight elements. The abrupt end of the repulsion in imported models with a
    zone is a warning.
    """
    targets = {name: a for name, a in structures.items() if not a.pbc.any() and "charge" in a.info}
    probes = list(
        dict.fromkeys(elements[k] for k in np.linspace(0, len(elements) - 1, MAX_PROBES).astype(int))
    )
    energy, force, known, place = 0.0, 0.0, 0.0, ""
    for name, atoms in targets.items():
        for probe in probes:
            sides = [_with_probe(atoms, probe, potential.config.cutoff + gap) for gap in (-GAP, GAP)]
            graph = collate([graph_of(potential, side) for side in sides])
            prediction = potential(graph)
            inside, outside = bound_energies(potential, graph, prediction).tolist()
            forces = prediction.forces.detach().cpu().unflatten(0, (2, -1))
            jump, kick = abs(inside - outside), float((forces[0] - forces[1]).abs().max())
            abrupt = _abrupt_end(potential, atoms.numbers[_outermost(atoms)], atomic_numbers[probe])
            # The slope of the repulsion ends together with its energy.
            jump, kick = (max(0.0, value - end) for value, end in zip((jump, kick), abrupt, strict=True))
            known = max(known, abrupt[0])
            if not (jump <= energy and kick <= force):
                energy, force = float(np.maximum(jump, energy)), float(np.maximum(kick, force))
                place = f"largest: {probe} at {name}"
    return CheckResult(
        "crossing the cutoff",
        f"{', '.join(probes)} crosses the cutoff of {len(targets)} structures, {GAP:g} Å on either side, float64",
        (Figure("energy jumps", energy, "eV", ENERGY_JUMP), Figure("force jumps", force, "eV/Å", FORCE_JUMP)),
        "a jump heats or cools dynamics at every crossing; energies of float32 are accurate to about 1e-6 eV",
        place,
        f"the repulsion of the model ends abruptly at the cutoff, by up to {known:.2g} eV a pair, as in deepmd-kit; "
        "the figures are without it"
        if known > ENERGY_JUMP
        else "",
    )


def check_amplification(
    potential: Potential, structures: Structures, elements: Sequence[str], seed: int = 0
) -> tuple[CheckResult, list[float]]:
    """Displace all atoms by about 1e-7 Angstrom and compare the change of the forces with the displacement.

    An ideal crystal is also stretched until a whole shell of neighbours is just inside the cutoff, at 13 distances,
    where models that normalise the features of edges are steepest.

    Returns:
        The result, and the change of the forces per displacement at the distances of `INSIDE`, in eV/Angstrom^2.
    """
    random = np.random.default_rng(seed)
    found = {
        name: _response(potential, atoms, random) for name, atoms in structures.items() if len(atoms) > 1
    }
    crystal = cubic_crystal(elements)
    shells = [
        _response(potential, _stretched(crystal, potential.config.cutoff, gap), random) for gap in INSIDE
    ]
    worst = float(np.max([*found.values(), *shells]))
    at = int(np.argmax(shells))
    result = CheckResult(
        "amplification",
        f"displacements of {DISPLACEMENT:g} Å: {len(found)} structures, and crystals with a shell of neighbours "
        f"{INSIDE[0]:g} to {INSIDE[-1]:g} Å inside the cutoff, float64",
        (Figure("change of force per displacement", worst, "eV/Å²", CURVATURE),),
        "bonds have 10 to 150 eV/Å²; at 1,000 a time step of 0.5 fs is unstable for hydrogen",
        f"largest near the cutoff: {shells[at]:.3g} eV/Å², {INSIDE[at]:.1g} Å inside",
    )
    return result, shells


def _outermost(atoms: Atoms) -> int:
    return int(np.linalg.norm(atoms.positions - atoms.positions.mean(0), axis=1).argmax())


def _with_probe(atoms: Atoms, probe: str, distance: float) -> Atoms:
    """Add an atom at a distance from the outermost atom, on the side away from all others."""
    end = _outermost(atoms)
    direction = atoms.positions[end] - atoms.positions.mean(0)
    length = np.linalg.norm(direction)
    direction = direction / length if length > 0 else np.array([0.6, 0.0, 0.8])
    joined = atoms + Atoms(probe, positions=[atoms.positions[end] + distance * direction])
    joined.info["charge"] = atoms.info["charge"]
    return in_lowest_multiplicity(joined)


def _abrupt_end(potential: Potential, a: int, b: int) -> tuple[float, float]:
    """Energy and slope with which the repulsion of a pair ends at the cutoff; zero for models that end smoothly."""
    bridging = potential.config.bridging
    if not isinstance(bridging, Bridging) or bridging.smooth_cutoff:
        return 0.0, 0.0
    length = torch.tensor([potential.config.cutoff], dtype=torch.float64, requires_grad=True)
    energy = zbl_pair_energy(length, torch.tensor(int(a)), torch.tensor(int(b)))
    (slope,) = torch.autograd.grad(energy.sum(), length)
    return 1.001 * float(energy.detach()), 1.001 * abs(float(slope))


def _stretched(crystal: Atoms, cutoff: float, gap: float) -> Atoms:
    """Scale a crystal until the shell of its first atom next to the cutoff is a gap inside."""
    lengths = crystal.repeat(2 * int(np.ceil(cutoff / crystal.cell.lengths().min())) + 1)
    distance = np.linalg.norm(lengths.positions - lengths.positions[_central(crystal, lengths)], axis=1)
    nearest = distance[np.abs(distance - cutoff).argmin()]
    stretched = crystal.copy()
    stretched.set_cell(crystal.cell * ((cutoff - gap) / nearest), scale_atoms=True)
    return stretched


def _central(crystal: Atoms, repeated: Atoms) -> int:
    """Index of the copy of the first atom in the middle of a repeated crystal."""
    copies = np.arange(0, len(repeated), len(crystal))
    middle = repeated.cell.array.sum(0) / 2
    return int(copies[np.linalg.norm(repeated.positions[copies] - middle, axis=1).argmin()])


def _response(potential: Potential, atoms: Atoms, random: np.random.Generator) -> float:
    """Largest change of a force component per displacement, in eV/Angstrom^2."""
    direction: NDArray[np.float64] = random.normal(size=(len(atoms), 3))
    direction /= np.linalg.norm(direction, axis=1).max()
    moved = atoms.copy()
    moved.positions += DISPLACEMENT * direction
    forces = potential(collate([graph_of(potential, a) for a in (atoms, moved)])).forces.detach().cpu()
    first, second = forces.unflatten(0, (2, -1))
    return float((second - first).abs().max()) / DISPLACEMENT
