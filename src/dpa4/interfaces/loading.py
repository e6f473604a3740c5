"""Loading of a model for an engine, and charge and spin of a structure as input of the model."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.mixing import LinearCombinationCalculator

from dpa4.data.charge_spin import charge_and_spin
from dpa4.potential import Potential
from dpa4.potential.checkpoint import load_potential
from dpa4.potential.committee import member_files
from dpa4.potential.precision import Precision
from dpa4.system import own_settings

Model = str | Path | Potential
"""Model file, named as for ``load_potential``, or potential."""


def members_of(model: Model | Sequence[Model]) -> list[Model]:
    """List the models of a committee, or the single model.

    Args:
        model: Model, output folder of a committee, or list of these.

    Raises:
        FileNotFoundError: If a member of a committee has no model yet.
        ValueError: If the list is empty.
    """
    given = [model] if isinstance(model, str | Path | Potential) else list(model)
    if not given:
        raise ValueError("model is an empty list; give at least one model file or potential")
    return [m for one in given for m in ([one] if isinstance(one, Potential) else member_files(one))]


@own_settings
def load_model(
    model: Model, device: torch.device, dtype: str, precision: Precision, branch: str | None
) -> Potential:
    """Load or copy a potential and set it to evaluation mode; arguments as for ``DPA4Calculator``.

    Raises:
        FileNotFoundError: If the model file does not exist.
        ValueError: If an argument is not allowed or the model cannot be read.
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
            f"branch = {branch!r} selects from a file of several models, but model is a Potential; omit branch"
        )
    else:
        potential = copy.deepcopy(model).to(device=device, dtype=getattr(torch, dtype)).eval()
    potential.precision = precision
    return potential


def charge_spin_of(potential: Potential, atoms: Atoms) -> tuple[int, int]:
    """Total charge (e) and multiplicity 2S + 1 of a structure, as input of a model.

    Values missing in ``atoms.info`` are replaced by the default of the model. A model that is not conditioned on
    charge and spin gets (0, 1), and the values are not checked.

    Raises:
        ValueError: As in ``dpa4.data.charge_spin.charge_and_spin``.
    """
    if not potential.config.charge_spin:
        return (0, 1)
    return charge_and_spin(atoms.info, potential.config.default_charge_spin)


def reads_charge_spin(calculator: Calculator) -> bool:
    """Return whether the results of a calculator depend on the charge and spin in ``atoms.info``, as far as known."""
    potentials = [p for part in calculators_in(calculator) for p in getattr(part, "potentials", ())]
    return any(p.config.charge_spin for p in potentials if isinstance(p, Potential))


def calculators_in(calculator: Calculator) -> list[Calculator]:
    """Parts of a sum of calculators, or the calculator itself."""
    return calculator.mixer.calcs if isinstance(calculator, LinearCombinationCalculator) else [calculator]
