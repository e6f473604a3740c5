"""DPA4 interatomic potentials: data, graphs, the model, potentials, training, simulation.

The names in ``__all__`` are the public interface, described in docs/python.md. Each is imported at its first use, so
that ``import dpa4`` does not import torch.
"""

from typing import TYPE_CHECKING

from dpa4 import _lazy

if TYPE_CHECKING:
    from dpa4.interfaces.ase import DPA4Calculator
    from dpa4.potential import Potential, load_potential, save_potential
    from dpa4.simulation.dynamics import run_md
    from dpa4.simulation.elastic import elastic_tensor
    from dpa4.simulation.eos import equation_of_state
    from dpa4.simulation.neb import run_neb
    from dpa4.simulation.phonon import phonons
    from dpa4.simulation.relax import relax
    from dpa4.simulation.screen import screen
    from dpa4.training import evaluate, train

__version__ = "0.1.0"

__all__ = [
    "DPA4Calculator",
    "Potential",
    "elastic_tensor",
    "equation_of_state",
    "evaluate",
    "load_potential",
    "phonons",
    "relax",
    "run_md",
    "run_neb",
    "save_potential",
    "screen",
    "train",
]

_lazy.attach(
    __name__,
    {
        "DPA4Calculator": "dpa4.interfaces.ase",
        "Potential": "dpa4.potential",
        "elastic_tensor": "dpa4.simulation.elastic",
        "equation_of_state": "dpa4.simulation.eos",
        "evaluate": "dpa4.training",
        "load_potential": "dpa4.potential",
        "phonons": "dpa4.simulation.phonon",
        "relax": "dpa4.simulation.relax",
        "run_md": "dpa4.simulation.dynamics",
        "run_neb": "dpa4.simulation.neb",
        "save_potential": "dpa4.potential",
        "screen": "dpa4.simulation.screen",
        "train": "dpa4.training",
    },
)
