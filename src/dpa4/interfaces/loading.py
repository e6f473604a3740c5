"""Loading of a model for an engine, and charge and spin of a structure as input of the model."""

import copy
from numbers import Real
from pathlib import Path

import torch
from ase import Atoms

from dpa4.potential import Potential
from dpa4.potential.checkpoint import load_potential
from dpa4.potential.precision import Precision
from dpa4.system import own_settings

Model = str | Path | Potential
"""Checkpoint file or potential."""

INFO_KEYS = ("charge", "spin")
"""Keys of ``atoms.info`` with the total charge (e) and the multiplicity 2S + 1."""


@own_settings
def load_model(
    model: Model, device: torch.device, dtype: str, precision: Precision, branch: str | None
) -> Potential:
    """Load or copy a potential and set it to evaluation mode; arguments as for ``DPA4Calculator``.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If an argument is not allowed or the checkpoint cannot be read.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {dtype!r}")
    if precision not in ("high", "fast"):
        raise ValueError(f"precision must be high or fast, got {precision!r}")
    if precision == "fast" and dtype != "float32":
        raise ValueError(f"precision 'fast' needs dtype float32, got {dtype!r}")
    if not isinstance(model, Potential):
        potential = load_potential(model, device=device, dtype=getattr(torch, dtype), branch=branch)
    elif branch is not None:
        raise ValueError(
            f"branch = {branch!r} selects from a checkpoint, but model is a Potential; omit branch"
        )
    else:
        potential = copy.deepcopy(model).to(device=device, dtype=getattr(torch, dtype)).eval()
    potential.precision = precision
    return potential


def charge_spin_of(potential: Potential, atoms: Atoms) -> tuple[int, int]:
    """Total charge (e) and multiplicity 2S + 1 of a structure, as input of a model.

    Values missing in ``atoms.info`` are replaced by the default of the model. A model that is not conditioned on
    charge and spin gets (0, 1).

    Raises:
        ValueError: If a value is missing and the model has no default, or if a value is not an integer.
    """
    if not potential.config.charge_spin:
        return (0, 1)
    missing = [key for key in INFO_KEYS if key not in atoms.info]
    default = potential.config.default_charge_spin
    if missing and default is None:
        raise ValueError(
            f"the model is conditioned on charge and spin without a default; set atoms.info[{missing[0]!r}] "
            "(charge in e, spin as the multiplicity 2S + 1)"
        )
    charge, spin = (atoms.info.get(key, d) for key, d in zip(INFO_KEYS, default or (0, 1), strict=True))
    if not all(isinstance(value, Real) and float(value).is_integer() for value in (charge, spin)):
        raise ValueError(
            f"charge and spin (2S + 1) must be whole numbers, got charge {charge!r}, spin {spin!r}"
        )
    return int(charge), int(spin)
