"""Simulations with a potential: dynamics, relaxation, barriers, crystals, pair curves, screening, reports.

Each name is imported at its first use. The names of ``dpa4.interfaces`` are also here, for compatibility with earlier
versions.
"""

from typing import TYPE_CHECKING

from dpa4 import _lazy

if TYPE_CHECKING:
    from dpa4.interfaces.ase import DPA4Calculator
    from dpa4.interfaces.dispersion import with_dispersion
    from dpa4.interfaces.lammps import attach_lammps, open_lammps, run_lammps
    from dpa4.interfaces.mliap import DPA4MLIAP
    from dpa4.simulation.check import CheckResult, ModelCheck, check_model, write_check
    from dpa4.simulation.crystal_calculation import Stopped
    from dpa4.simulation.dynamics import DynamicsResult, run_md
    from dpa4.simulation.elastic import Elasticity, Moduli, elastic_tensor
    from dpa4.simulation.eos import EquationOfState, equation_of_state
    from dpa4.simulation.neb import Barrier, run_neb
    from dpa4.simulation.pair_curves import PairScan, scan_pairs
    from dpa4.simulation.phonon import Phonons, phonons
    from dpa4.simulation.relax import Relaxation, relax, relax_all
    from dpa4.simulation.report import write_report
    from dpa4.simulation.selection import Selection, select

__all__ = [
    "Barrier",
    "CheckResult",
    "DPA4Calculator",
    "DPA4MLIAP",
    "DynamicsResult",
    "Elasticity",
    "EquationOfState",
    "ModelCheck",
    "Moduli",
    "PairScan",
    "Phonons",
    "Relaxation",
    "Selection",
    "Stopped",
    "attach_lammps",
    "check_model",
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
    "select",
    "with_dispersion",
    "write_check",
    "write_report",
]

_lazy.attach(
    __name__,
    {
        "Barrier": "dpa4.simulation.neb",
        "CheckResult": "dpa4.simulation.check",
        "DPA4Calculator": "dpa4.interfaces.ase",
        "DPA4MLIAP": "dpa4.interfaces.mliap",
        "DynamicsResult": "dpa4.simulation.dynamics",
        "Elasticity": "dpa4.simulation.elastic",
        "EquationOfState": "dpa4.simulation.eos",
        "ModelCheck": "dpa4.simulation.check",
        "Moduli": "dpa4.simulation.elastic",
        "PairScan": "dpa4.simulation.pair_curves",
        "Phonons": "dpa4.simulation.phonon",
        "Relaxation": "dpa4.simulation.relax",
        "Selection": "dpa4.simulation.selection",
        "Stopped": "dpa4.simulation.crystal_calculation",
        "attach_lammps": "dpa4.interfaces.lammps",
        "check_model": "dpa4.simulation.check",
        "elastic_tensor": "dpa4.simulation.elastic",
        "equation_of_state": "dpa4.simulation.eos",
        "open_lammps": "dpa4.interfaces.lammps",
        "phonons": "dpa4.simulation.phonon",
        "relax": "dpa4.simulation.relax",
        "relax_all": "dpa4.simulation.relax",
        "run_lammps": "dpa4.interfaces.lammps",
        "run_md": "dpa4.simulation.dynamics",
        "run_neb": "dpa4.simulation.neb",
        "scan_pairs": "dpa4.simulation.pair_curves",
        "select": "dpa4.simulation.selection",
        "with_dispersion": "dpa4.interfaces.dispersion",
        "write_check": "dpa4.simulation.check",
        "write_report": "dpa4.simulation.report",
    },
)
