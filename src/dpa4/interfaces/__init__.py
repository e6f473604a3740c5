"""Engines that run a potential: ASE, TorchSim, nvalchemi, LAMMPS (`fix external`, ML-IAP); dispersion on top.

Each name is imported at its first use.
"""

from typing import TYPE_CHECKING

from dpa4 import _lazy

if TYPE_CHECKING:
    from dpa4.interfaces.ase import DPA4Calculator
    from dpa4.interfaces.dispersion import with_dispersion
    from dpa4.interfaces.lammps import attach_lammps, open_lammps, run_lammps
    from dpa4.interfaces.mliap import DPA4MLIAP
    from dpa4.interfaces.torchsim import DPA4Model

__all__ = [
    "DPA4Calculator",
    "DPA4MLIAP",
    "DPA4Model",
    "attach_lammps",
    "open_lammps",
    "run_lammps",
    "with_dispersion",
]

_lazy.attach(
    __name__,
    {
        "DPA4Calculator": "dpa4.interfaces.ase",
        "DPA4MLIAP": "dpa4.interfaces.mliap",
        "DPA4Model": "dpa4.interfaces.torchsim",
        "attach_lammps": "dpa4.interfaces.lammps",
        "open_lammps": "dpa4.interfaces.lammps",
        "run_lammps": "dpa4.interfaces.lammps",
        "with_dispersion": "dpa4.interfaces.dispersion",
    },
)
