"""Momenta and temperature of the internal motion of a structure.

Motion of the centre of mass and rotation of an isolated structure do not count for the temperature: integrators
conserve both, so a thermostat could not heat them. In a structure with constraints, all remaining motion counts.
"""

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

LINEAR = 0.01
"""Smallest over largest moment of inertia below which a molecule counts as linear.

A linear molecule that vibrates is never exactly straight: the mean ratio of CO2 at 300 K is 0.0007, from its bending
mode at 667/cm. Bent molecules have larger ratios: NO2 0.05, SO2 0.14, water 0.35.
"""


def degrees_of_freedom(atoms: Atoms) -> int:
    """Number of degrees of freedom that count for the temperature.

    Of 3 N degrees of freedom, three belong to the centre of mass. In an isolated molecule, three more belong to the
    rotation, or two if the molecule is linear.
    """
    if atoms.constraints:
        return atoms.get_number_of_degrees_of_freedom()
    if len(atoms) == 1:
        return 3
    rotations = 0 if atoms.pbc.any() else len(_rotation_axes(atoms)[0])
    return 3 * len(atoms) - 3 - rotations


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
        moments, axes = _rotation_axes(atoms)
        turning = axes @ (axes.T @ np.cross(arms, momenta).sum(axis=0) / moments)
        momenta -= masses * np.cross(turning, arms)
    return momenta


def _rotation_axes(atoms: Atoms) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Principal moments of inertia (R,) and axes (3, R) about which a molecule rotates.

    R is 3, or 2 for a linear molecule, which does not rotate about its own axis.
    """
    arms = atoms.positions - atoms.get_center_of_mass()
    spread = (atoms.get_masses()[:, None] * arms).T @ arms
    moments, axes = np.linalg.eigh(np.trace(spread) * np.eye(3) - spread)
    rotates = moments > LINEAR * moments[-1]
    return moments[rotates], axes[:, rotates]


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
