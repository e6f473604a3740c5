"""Simulations with a potential: ASE, LAMMPS, molecular dynamics, relaxation, barriers, crystals, pair curves."""

from dpa4.interfaces.ase import DPA4Calculator
from dpa4.interfaces.dispersion import with_dispersion
from dpa4.interfaces.lammps import attach_lammps, open_lammps, run_lammps
from dpa4.interfaces.mliap import DPA4MLIAP
from dpa4.simulation.dynamics import DynamicsResult, run_md
from dpa4.simulation.elastic import Elasticity, Moduli, elastic_tensor
from dpa4.simulation.eos import EquationOfState, equation_of_state
from dpa4.simulation.neb import Barrier, run_neb
from dpa4.simulation.pair_curves import PairScan, scan_pairs
from dpa4.simulation.phonon import Phonons, phonons
from dpa4.simulation.relax import Relaxation, relax, relax_all
from dpa4.simulation.report import write_report

__all__ = [
    "Barrier",
    "DPA4Calculator",
    "DPA4MLIAP",
    "DynamicsResult",
    "Elasticity",
    "EquationOfState",
    "Moduli",
    "PairScan",
    "Phonons",
    "Relaxation",
    "attach_lammps",
    "elastic_tensor",
    "equation_of_state",
    "open_lammps",
    "phonons",
    "relax",
    "relax_all",
    "run_lammps",
    "run_md",
    "run_neb",
    "scan_pairs",
    "with_dispersion",
    "write_report",
]
