"""Integrators of ASE for the ensembles, and the state of their baths, from which a run goes on.

ASE gives no access to that state, so attributes that start with an underscore are read and set here and
nowhere else.
"""

from functools import reduce
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import (
    MTKNPT,
    IsotropicMTKBarostat,
    IsotropicMTKNPT,
    MTKBarostat,
    NoseHooverChainNVT,
    NoseHooverChainThermostat,
)
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray

from dpa4.simulation.momenta import degrees_of_freedom


class NVT(NoseHooverChainNVT):
    """Nose-Hoover chains that hold atoms in place; ASE's own moves them on, unseen, and warms them."""

    def _get_forces(self) -> NDArray[np.float64]:
        self._update_atoms()
        return self.atoms.get_forces()


Integrator = VelocityVerlet | Langevin | NVT | IsotropicMTKNPT | MTKNPT

_THERMOSTAT = ("_thermostat._eta", "_thermostat._p_eta")
_BAROSTAT = ("_barostat._xi", "_barostat._p_xi")
_STATE: dict[type, tuple[str, ...]] = {
    VelocityVerlet: (),
    Langevin: (),
    NVT: _THERMOSTAT,
    IsotropicMTKNPT: (*_THERMOSTAT, *_BAROSTAT, "_eps", "_p_eps", "_volume0", "_cell0"),
    MTKNPT: (*_THERMOSTAT, *_BAROSTAT, "_p_g"),
}


def make_integrator(atoms: Atoms, settings: dict[str, Any], rng: np.random.Generator) -> Integrator:
    """Integrator for the settings of ``run_md``; ``rng`` is the Langevin bath's.

    Raises:
        ValueError: If the ensemble cannot keep the constraints.
    """
    ensemble, timestep = settings["ensemble"], settings["timestep"] * units.fs
    if ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    kelvin = settings["temperature"]
    if ensemble == "langevin":
        # fixcm would distort the distribution
        friction = settings["friction"] / units.fs
        return Langevin(atoms, timestep, temperature_K=kelvin, friction=friction, rng=rng, fixcm=False)
    _check_constraints(atoms, ensemble)
    tdamp, pdamp = settings["tdamp"] * units.fs, settings["pdamp"] * units.fs
    integrator: Any
    # ASE takes 3 N for the number of degrees of freedom. It is smaller where the centre of mass rests or atoms are
    # fixed, and the motion that is left would be too hot; so the baths are made for a third of the number at hand.
    third: Any = degrees_of_freedom(atoms) / 3
    if ensemble == "nvt":
        integrator = NVT(atoms, timestep, kelvin, tdamp)
    else:
        kind = IsotropicMTKNPT if settings["cell"] == "volume" else MTKNPT
        integrator = kind(atoms, timestep, kelvin, settings["pressure"] * units.GPa, tdamp, pdamp)
        integrator._num_atoms_global = third
        if kind is IsotropicMTKNPT:
            integrator._barostat = IsotropicMTKBarostat(third, kelvin, pdamp)
        else:
            # The momenta of the cell are symmetric: six degrees of freedom, not nine.
            integrator._barostat = MTKBarostat(third, kelvin, pdamp, mask=(True,) * 6)  # type: ignore[arg-type]
    integrator._thermostat = NoseHooverChainThermostat(third, integrator.masses, kelvin, tdamp)
    return integrator


def conserved_energy(integrator: Integrator) -> float | None:
    """Energy of structure and baths together, in eV, which Nose-Hoover chains conserve; None for other ensembles."""
    return None if isinstance(integrator, VelocityVerlet | Langevin) else integrator.get_conserved_energy()


def bath_state(integrator: Integrator) -> dict[str, Any]:
    """State of the baths, for JSON; {} for an integrator without."""
    names = _STATE[type(integrator)]
    return {name: np.asarray(reduce(getattr, name.split("."), integrator)).tolist() for name in names}


def set_bath_state(integrator: Integrator, state: dict[str, Any]) -> None:
    """Take over what ``bath_state`` gave.

    Raises:
        KeyError: If a part of the state is absent.
    """
    for name in _STATE[type(integrator)]:
        *owners, attribute = name.split(".")
        value = state[name]
        owner = reduce(getattr, owners, integrator)
        setattr(owner, attribute, np.array(value) if isinstance(value, list) else value)


def _check_constraints(atoms: Atoms, ensemble: str) -> None:
    """Nose-Hoover chains hold atoms in place, but know nothing of bonds; the barostat moves every atom."""
    kept = (FixAtoms, FixCartesian, FixedLine, FixedPlane) if ensemble == "nvt" else ()
    for constraint in atoms.constraints:
        if not isinstance(constraint, kept):
            allowed = "only FixAtoms, FixCartesian, FixedLine and FixedPlane" if kept else "no constraints"
            raise ValueError(
                f"ensemble {ensemble} keeps {allowed}, got {type(constraint).__name__}; use langevin or remove it"
            )
