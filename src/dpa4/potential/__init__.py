"""Potentials: energies, forces and virials from a network, and the files they are kept in."""

from dpa4.potential.potential import Potential, Prediction

__all__ = ["Potential", "Prediction"]
