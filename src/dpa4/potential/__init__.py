"""Potentials: energies, forces and virials from a network, and their checkpoints."""

from dpa4.potential.card import model_card
from dpa4.potential.checkpoint import convert, load_potential, save_potential
from dpa4.potential.descriptors import embeddings, write_embeddings
from dpa4.potential.fingerprint import fingerprint_of
from dpa4.potential.hessian import Expansion, expand_energy, hessian, hessian_vector_product
from dpa4.potential.potential import Potential, Prediction

__all__ = [
    "Expansion",
    "Potential",
    "Prediction",
    "convert",
    "embeddings",
    "expand_energy",
    "fingerprint_of",
    "hessian",
    "hessian_vector_product",
    "load_potential",
    "model_card",
    "save_potential",
    "write_embeddings",
]
