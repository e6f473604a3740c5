"""Running potentials: the ASE calculator, molecular dynamics, relaxation."""

from dpa4.simulation.calculator import DPA4Calculator
from dpa4.simulation.dynamics import DynamicsResult, run_md
from dpa4.simulation.relax import Relaxation, relax, relax_all

__all__ = ["DPA4Calculator", "DynamicsResult", "Relaxation", "relax", "relax_all", "run_md"]
