"""Mode-resolved lattice thermal conductivity of one crystal, with phono3py and Wigner transport."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from numpy.typing import NDArray

from dpa4.graph.lattice import right_handed
from dpa4.simulation.runs.store import ItemInterrupted, Record
from dpa4.system import require

Array = NDArray[np.float64]

TEMPERATURE = 300.0  # K
SYMPREC = 1e-5  # tolerance for space groups and in phono3py
RELAX_SYMPREC = 1e-2  # tolerance for the symmetry that the relaxation preserves
BOUNDARY_MFP = 1e6  # micrometres
GAMMA_THRESHOLD = -0.01  # THz; lowest allowed acoustic frequency at q = 0


def space_group(atoms: Atoms) -> int:
    """Number of the space group.

    Raises:
        ImportError: If spglib is not installed.
        ValueError: If no space group is found.
    """
    dataset = require("spglib", "bench").get_symmetry_dataset(
        (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers), symprec=SYMPREC
    )
    if dataset is None:
        raise ValueError("no space group was found")
    return int(dataset.number)


def relax_symmetric(
    atoms: Atoms, calculator: Calculator, *, fmax: float, steps: int, stopped: Sequence[int] = ()
) -> int:
    """Relax positions and cell in place with FIRE, preserving the symmetry; the cell is not sheared.

    Args:
        atoms: Initial structure; replaced by the relaxed one.
        calculator: ASE calculator.
        fmax: Largest force of the relaxed structure, eV/Angstrom.
        steps: Maximum number of steps.
        stopped: List that is not empty after Ctrl-C.

    Returns:
        Number of steps taken.

    Raises:
        ItemInterrupted: After Ctrl-C.
    """
    atoms.calc = calculator
    atoms.set_constraint(FixSymmetry(atoms, symprec=RELAX_SYMPREC))
    engine = FIRE(FrechetCellFilter(atoms, mask=[True, True, True, False, False, False]), logfile=None)
    for _ in engine.irun(fmax=fmax, steps=steps):
        if stopped:
            raise ItemInterrupted
    atoms.set_constraint()
    atoms.calc = None
    return engine.get_number_of_steps()


def conductivity(
    atoms: Atoms,
    calculator: Calculator,
    *,
    fc2_supercell: NDArray[np.int64],
    fc3_supercell: NDArray[np.int64],
    mesh: Sequence[int],
    displacement: float = 0.03,
    stopped: Sequence[int] = (),
) -> Record:
    """Compute the conductivity at 300 K with phono3py: Wigner transport in the relaxation time approximation.

    Force constants of second and third order come from finite displacements. Isotope scattering is included. The
    transport is "SMM19" of phono3py 4. The contribution of a pair of bands is divided between the two bands according
    to their heat capacities C, as in Matbench Discovery:

        kappa_s = sum_s' 2 kappa_{s's} C_s' / (C_s + C_s').

    Args:
        atoms: Relaxed crystal.
        calculator: ASE calculator.
        fc2_supercell: (3,) or (3, 3) supercell for the second-order force constants.
        fc3_supercell: (3,) or (3, 3) supercell for the third-order force constants.
        mesh: Numbers of q-points along the three axes.
        displacement: Displacement of atoms, in Angstrom.
        stopped: List that is not empty after Ctrl-C.

    Returns:
        ``has_imag_ph_modes``. If it is False, also the conductivity ``kappa_tot_rta`` (1, 6), its parts
        ``kappa_p_rta`` within bands and ``kappa_c`` between bands, and the contributions of the modes
        ``mode_kappa_tot_rta`` (1, Q, S, 6), all in W/(m K) in the order xx, yy, zz, yz, xz, xy. The contributions of
        the modes include the ``mode_weights`` (Q,) of the ``q_points`` (Q, 3). ``ph_freqs`` (Q, S) are in THz.

    Raises:
        ImportError: If phono3py is not installed.
        ItemInterrupted: After Ctrl-C.
    """
    phonons = _phono3py(atoms, fc2_supercell, fc3_supercell, mesh, displacement)
    phonons.phonon_forces = _forces(phonons.phonon_supercells_with_displacements, calculator, stopped)
    phonons.produce_fc2()
    phonons.symmetrize_fc2()
    phonons.init_phph_interaction()
    phonons.run_phonon_solver()
    if imaginary(phonons.get_phonon_data()[0]):
        return {"has_imag_ph_modes": True}
    phonons.forces = _forces(phonons.supercells_with_displacements, calculator, stopped)
    phonons.produce_fc3()
    phonons.symmetrize_fc3()
    phonons.init_phph_interaction()
    phonons.run_thermal_conductivity(
        temperatures=[TEMPERATURE], is_isotope=True, transport_type="SMM19", boundary_mfp=BOUNDARY_MFP
    )
    found = phonons.thermal_conductivity
    return {
        "has_imag_ph_modes": False,
        "kappa_tot_rta": found.kappa[0],
        "kappa_p_rta": found.kappa_intra[0],
        "kappa_c": found.kappa_inter[0],
        "mode_kappa_tot_rta": shares(found.mode_kappa_matrix[0], found.mode_heat_capacities),
        "mode_weights": found.grid_weights,
        "q_points": found.qpoints,
        "ph_freqs": found.frequencies,
    }


def imaginary(frequencies: Array) -> bool:
    """Return whether a mode is imaginary, or its frequency not a number.

    The three acoustic modes at q = 0 count as imaginary only below -0.01 THz.

    Args:
        frequencies: (Q, S) in THz, negative if imaginary; q = 0 comes first, bands ascend.
    """
    if np.isnan(frequencies).any():
        return True
    limit = np.zeros_like(frequencies)
    limit[0, :3] = GAMMA_THRESHOLD
    return bool((frequencies < limit).any())


def shares(pairs: Array, heat_capacity: Array) -> Array:
    """Divide the contributions of pairs of bands between the bands, see ``conductivity``; preserves the sum.

    Args:
        pairs: (T, Q, S, S, 6) contributions of pairs of bands, symmetric in the two bands.
        heat_capacity: (T, Q, S) heat capacities of the modes.

    Returns:
        Contributions of the modes (T, Q, S, 6), in the unit of ``pairs``.
    """
    both = heat_capacity[..., :, None] + heat_capacity[..., None, :]
    fraction = np.divide(2 * heat_capacity[..., :, None], both, out=np.zeros_like(both), where=both > 0)
    return np.einsum("tqsuc,tqsu->tquc", pairs, fraction)


def _phono3py(
    atoms: Atoms,
    fc2_supercell: NDArray[np.int64],
    fc3_supercell: NDArray[np.int64],
    mesh: Sequence[int],
    displacement: float,
) -> Any:
    """Set up phono3py and generate the displaced supercells."""
    phonopy_atoms = require("phonopy.structure.atoms", "bench").PhonopyAtoms
    phono3py = require("phono3py", "bench").Phono3py
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the automatic primitive cell, which is intended
        phonons = phono3py(
            phonopy_atoms(
                symbols=atoms.get_chemical_symbols(),
                cell=right_handed(atoms.cell.array),
                positions=atoms.positions,
            ),
            supercell_matrix=fc3_supercell,
            phonon_supercell_matrix=fc2_supercell,
            primitive_matrix="auto",
            symprec=SYMPREC,
        )
    phonons.mesh_numbers = list(mesh)
    phonons.generate_displacements(distance=displacement)
    return phonons


def _forces(supercells: Sequence[Any], calculator: Calculator, stopped: Sequence[int]) -> Array:
    """Forces in the displaced supercells (D, N, 3), eV/Angstrom."""
    forces = []
    for cell in supercells:
        if stopped:
            raise ItemInterrupted
        atoms = Atoms(cell.symbols, cell.positions, cell=cell.cell, pbc=True)
        atoms.calc = calculator
        forces.append(atoms.get_forces())
    return np.array(forces)
