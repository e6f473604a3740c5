"""ASE integrators for the ensembles, and the state of their thermostats and barostats (baths) for restarts.

ASE has no public access to the state of a bath. This module, and no other, therefore reads and sets private
attributes of ASE's integrators.
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
    """Nose-Hoover chain integrator in which fixed atoms stay at rest.

    ASE's integrator uses forces without constraints. Its internal momenta of fixed atoms therefore grow, although the
    atoms do not move, and enter the temperature of the thermostat.
    """

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
    """Create the integrator for the settings of ``run_md``.

    Args:
        atoms: Structure with momenta and calculator.
        settings: Ensemble and its parameters, in the units of ``run_md``.
        rng: Random numbers of the Langevin bath.

    Raises:
        ValueError: If the ensemble cannot respect a constraint.
    """
    ensemble, timestep = settings["ensemble"], settings["timestep"] * units.fs
    if ensemble == "nve":
        return VelocityVerlet(atoms, timestep)
    kelvin = settings["temperature"]
    if ensemble == "langevin":
        # fixcm=True would distort the canonical distribution.
        friction = settings["friction"] / units.fs
        return Langevin(atoms, timestep, temperature_K=kelvin, friction=friction, rng=rng, fixcm=False)
    _check_constraints(atoms, ensemble)
    tdamp, pdamp = settings["tdamp"] * units.fs, settings["pdamp"] * units.fs
    integrator: Any
    # ASE assumes 3 N degrees of freedom. There are fewer if the centre of mass rests or atoms are fixed, and the
    # remaining motion would be too hot. The baths therefore get a third of the actual number as "number of atoms".
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
            # The matrix of cell momenta is symmetric: six degrees of freedom, not nine.
            integrator._barostat = MTKBarostat(third, kelvin, pdamp, mask=(True,) * 6)  # type: ignore[arg-type]
    integrator._thermostat = NoseHooverChainThermostat(third, integrator.masses, kelvin, tdamp)
    return integrator


def conserved_energy(integrator: Integrator) -> float | None:
    """Energy of structure and baths, in eV, conserved in nvt and npt; None for other ensembles."""
    return None if isinstance(integrator, VelocityVerlet | Langevin) else integrator.get_conserved_energy()


def bath_state(integrator: Integrator) -> dict[str, Any]:
    """State of the baths as JSON values; {} for an integrator without a bath."""
    names = _STATE[type(integrator)]
    return {name: np.asarray(reduce(getattr, name.split("."), integrator)).tolist() for name in names}


def set_bath_state(integrator: Integrator, state: dict[str, Any]) -> None:
    """Restore a state returned by ``bath_state``.

    Raises:
        ValueError: If a part of the state is absent or unknown, has another shape, or is not finite.
    """
    expected = bath_state(integrator)
    if state.keys() != expected.keys():
        raise ValueError(f"baths has the entries {sorted(state)}, expected {sorted(expected)}")
    for name, now in expected.items():
        value = state[name]
        numbers = np.array(value, dtype=object).ravel()
        if np.shape(value) != np.shape(now) or not all(_is_finite(number) for number in numbers):
            raise ValueError(f"baths.{name} must be finite numbers of the shape {np.shape(now)}")
        *owners, attribute = name.split(".")
        owner = reduce(getattr, owners, integrator)
        setattr(owner, attribute, np.array(value) if isinstance(value, list) else value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def _check_constraints(atoms: Atoms, ensemble: str) -> None:
    """Reject constraints that an ensemble cannot respect.

    Nose-Hoover chains support fixed atoms and directions but not, for example, bond lengths. The barostat moves every
    atom and supports no constraint.

    Raises:
        ValueError: If there is such a constraint.
    """
    supported = (FixAtoms, FixCartesian, FixedLine, FixedPlane) if ensemble == "nvt" else ()
    for constraint in atoms.constraints:
        if not isinstance(constraint, supported):
            allowed = (
                "only FixAtoms, FixCartesian, FixedLine and FixedPlane" if supported else "no constraints"
            )
            raise ValueError(
                f"ensemble {ensemble} supports {allowed}, got {type(constraint).__name__}; use langevin or remove it"
            )
