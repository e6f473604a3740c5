"""Potentials: energies, forces and virials from a network, and the files they are kept in."""

from dpa4.potential.card import model_card
from dpa4.potential.checkpoint import convert, load_potential, save_potential
from dpa4.potential.embedding import embeddings, write_embeddings
from dpa4.potential.hessian import hessian, hessian_vector_product
from dpa4.potential.potential import Potential, Prediction

__all__ = [
    "Potential",
    "Prediction",
    "convert",
    "embeddings",
    "hessian",
    "hessian_vector_product",
    "load_potential",
    "model_card",
    "save_potential",
    "write_embeddings",
]
