"""Dispersion correction for a calculator: DFT-D3 of Grimme et al., computed by torch-dftd."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.mixing import SumCalculator
from ase.units import Bohr

from dpa4.messages import not_allowed
from dpa4.system import choose_device, require

Damping = Literal["bj", "zero", "bjm", "zerom"]


def with_dispersion(
    calculator: Calculator,
    functional: str = "pbe",
    damping: Damping = "bj",
    *,
    cutoff: float = 95 * Bohr,
    device: str | torch.device = "cpu",
) -> SumCalculator:
    """Add the DFT-D3 dispersion correction to a calculator.

    Use it only for potentials trained on labels without dispersion. If the labels include dispersion (PBE-D3, a
    van der Waals functional, wB97M-V), so does the potential, and the correction would count dispersion twice.

    Args:
        calculator: ASE calculator with energy and forces, such as ``DPA4Calculator``.
        functional: Functional of the labels, which selects the damping parameters: "pbe", "pbesol", "revpbe",
            "b3-lyp", "r2scan", ...
        damping: "bj" (Becke-Johnson), "zero", or the modified forms "bjm" and "zerom".
        cutoff: Largest distance between the atoms of a pair, in Angstrom. The default is that of the original
            program, 95 Bohr. In periodic systems a smaller cutoff is much faster, but the energy then jumps slightly
            whenever a pair crosses the cutoff.
        device: Device for D3, which is computed in float64. "auto" selects a GPU if one is available.

    Returns:
        ASE calculator whose energy, forces and, for periodic structures, stress are the sums of both contributions.

    Raises:
        ImportError: If torch-dftd is not installed.
        ValueError: If ``functional``, ``damping`` or ``cutoff`` is not allowed.

    Example:
        Energy with PBE-D3(BJ):

            atoms.calc = with_dispersion(DPA4Calculator("run/best.safetensors"), functional="pbe", damping="bj")
            energy = atoms.get_potential_energy()  # eV
    """
    if damping not in get_args(Damping):
        raise not_allowed("damping", damping, get_args(Damping))
    if not 0 < cutoff < float("inf"):
        raise ValueError(f"cutoff must be a positive distance in Angstrom, got {cutoff}")
    d3 = require("torch_dftd.torch_dftd3_calculator", "d3")
    try:
        correction = d3.TorchDFTD3Calculator(
            damping=damping,
            xc=functional,
            cutoff=cutoff,
            cnthr=min(cutoff, 40 * Bohr),
            device=choose_device(device),
            dtype=torch.float64,
        )
    except ValueError as error:
        raise ValueError(
            f"torch-dftd has no D3({damping}) parameters for functional {functional!r}"
        ) from error
    # torch-dftd computes the free energy but does not declare it.
    correction.implemented_properties = [*correction.implemented_properties, "free_energy"]
    corrected = _Corrected([calculator, correction])
    corrected.parameters = dict(calculator.todict()) | {
        "dispersion": f"D3({damping}) {functional}", "dispersion_cutoff": cutoff,
    }  # fmt: skip
    return corrected


class _Corrected(SumCalculator):
    """Sum of calculators that also notices changes that only the first calculator sees, such as of the charge."""

    def todict(self) -> dict[str, Any]:
        """Parameters of the first calculator and of the correction, which ASE's databases store."""
        return dict(self.parameters)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Names of the properties in which a structure differs from that of the last calculation; [] if none."""
        return super().check_state(atoms, tol) or self.mixer.calcs[0].check_state(atoms, tol)

    def calculate(
        self, atoms: Atoms, properties: Sequence[str], system_changes: Sequence[str] = all_changes
    ) -> Any:
        """Compute energy and forces together; separate requests would compute D3 twice."""
        super().calculate(atoms, list(dict.fromkeys(["forces", *properties])), system_changes)
