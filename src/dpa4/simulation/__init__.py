"""Running potentials: the ASE calculator, molecular dynamics, relaxation."""

from dpa4.simulation.calculator import DPA4Calculator

__all__ = ["DPA4Calculator"]
