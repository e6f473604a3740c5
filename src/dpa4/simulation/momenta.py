"""Momenta and temperature of what moves inside a structure.

The centre of mass and, of an isolated structure, the rotation are no part of the temperature: integrators conserve
them, so a bath could not warm them. With constraints the temperature is that of all motion they leave.
"""

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray


def degrees_of_freedom(atoms: Atoms) -> int:
    """Number of momenta that count for the temperature."""
    if atoms.constraints:
        return atoms.get_number_of_degrees_of_freedom()
    if len(atoms) == 1:
        return 3
    return (
        3 * len(atoms) - 3 if atoms.pbc.any() else max(1, 3 * len(atoms) - 6)
    )  # two atoms keep one rotation


def internal_momenta(atoms: Atoms) -> NDArray[np.float64]:
    """Momenta (N, 3) without motion of the centre of mass and, without periodicity, without rotation."""
    momenta = atoms.get_momenta()
    if len(atoms) == 1 or atoms.constraints:
        return momenta
    masses = atoms.get_masses()[:, None]
    momenta -= masses * momenta.sum(axis=0) / masses.sum()
    if not atoms.pbc.any():
        arms = atoms.positions - atoms.get_center_of_mass()
        inertia = (masses * arms).T @ arms
        inertia = np.trace(inertia) * np.eye(3) - inertia
        # The pseudoinverse leaves out the axis of a linear structure.
        turning = np.linalg.pinv(inertia, rcond=1e-8) @ np.cross(arms, momenta).sum(axis=0)
        momenta -= masses * np.cross(turning, arms)
    return momenta


def temperature(atoms: Atoms) -> float:
    """Temperature in K."""
    freedom = degrees_of_freedom(atoms)
    if freedom == 0:
        return 0.0
    return float((internal_momenta(atoms) ** 2 / atoms.get_masses()[:, None]).sum() / (freedom * units.kB))


def draw_momenta(atoms: Atoms, kelvin: float, rng: np.random.Generator) -> None:
    """Draw momenta from the Maxwell-Boltzmann distribution, scaled to exactly the temperature (K).

    Without constraints the centre of mass rests, and without periodicity the structure does not rotate.
    """
    masses = atoms.get_masses()[:, None]
    atoms.set_momenta(np.sqrt(masses * units.kB * kelvin) * rng.normal(size=(len(atoms), 3)))
    atoms.set_momenta(internal_momenta(atoms))
    if (drawn := temperature(atoms)) > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(kelvin / drawn))
