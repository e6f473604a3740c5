"""Potentials: energies, forces and virials from a network, and the files they are kept in."""

from dpa4.potential.card import model_card
from dpa4.potential.checkpoint import convert, load_potential, save_potential
from dpa4.potential.potential import Potential, Prediction

__all__ = ["Potential", "Prediction", "convert", "load_potential", "model_card", "save_potential"]
