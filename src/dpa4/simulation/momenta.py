"""Momenta and temperature of the internal motion of a structure.

Motion of the centre of mass and rotation of an isolated structure do not count for the temperature: integrators
conserve both, so a thermostat could not heat them. In a structure with constraints, all remaining motion counts.
"""

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray


def degrees_of_freedom(atoms: Atoms) -> int:
    """Number of degrees of freedom that count for the temperature."""
    if atoms.constraints:
        return atoms.get_number_of_degrees_of_freedom()
    if len(atoms) == 1:
        return 3
    # Two isolated atoms have two rotations, not three; their vibration remains.
    return 3 * len(atoms) - 3 if atoms.pbc.any() else max(1, 3 * len(atoms) - 6)


def internal_momenta(atoms: Atoms) -> NDArray[np.float64]:
    """Momenta (N, 3) of the internal motion, in ASE units.

    Motion of the centre of mass is removed, and for isolated structures the rotation. Momenta of a single atom or of
    a structure with constraints are returned unchanged.
    """
    momenta = atoms.get_momenta()
    if len(atoms) == 1 or atoms.constraints:
        return momenta
    masses = atoms.get_masses()[:, None]
    momenta -= masses * momenta.sum(axis=0) / masses.sum()
    if not atoms.pbc.any():
        arms = atoms.positions - atoms.get_center_of_mass()
        inertia = (masses * arms).T @ arms
        inertia = np.trace(inertia) * np.eye(3) - inertia
        # The pseudoinverse ignores the axis of a linear structure, about which it has no moment of inertia.
        turning = np.linalg.pinv(inertia, rcond=1e-8) @ np.cross(arms, momenta).sum(axis=0)
        momenta -= masses * np.cross(turning, arms)
    return momenta


def temperature(atoms: Atoms) -> float:
    """Temperature of the internal motion, in K."""
    freedom = degrees_of_freedom(atoms)
    if freedom == 0:
        return 0.0
    return float((internal_momenta(atoms) ** 2 / atoms.get_masses()[:, None]).sum() / (freedom * units.kB))


def draw_momenta(atoms: Atoms, kelvin: float, rng: np.random.Generator) -> None:
    """Draw momenta from the Maxwell-Boltzmann distribution and scale them to exactly the given temperature.

    In structures without constraints the centre of mass rests, and isolated structures do not rotate.

    Args:
        atoms: Structure whose momenta are set.
        kelvin: Temperature, in K.
        rng: Source of random numbers.
    """
    masses = atoms.get_masses()[:, None]
    atoms.set_momenta(np.sqrt(masses * units.kB * kelvin) * rng.normal(size=(len(atoms), 3)))
    atoms.set_momenta(internal_momenta(atoms))
    if (drawn := temperature(atoms)) > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(kelvin / drawn))
