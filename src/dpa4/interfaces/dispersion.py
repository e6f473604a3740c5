"""Dispersion added to a calculator: DFT-D3 of Grimme and others, by torch-dftd."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.mixing import SumCalculator
from ase.units import Bohr

from dpa4.system import choose_device, require

DAMPINGS = ("bj", "zero", "bjm", "zerom")


def with_dispersion(
    calculator: Calculator,
    functional: str = "pbe",
    damping: Literal["bj", "zero", "bjm", "zerom"] = "bj",
    *,
    cutoff: float = 95 * Bohr,
    device: str | torch.device = "cpu",
) -> SumCalculator:
    """A calculator with the energy, forces and stress of ``calculator`` plus those of DFT-D3.

    It is for potentials trained on labels without dispersion. Labels of a functional with dispersion (PBE-D3, a
    van der Waals functional, wB97M-V) have taught it to the potential already, and it would count twice.

    Args:
        calculator: Any with energy and forces, such as ``DPA4Calculator``.
        functional: That of the labels, whose damping parameters are taken: "pbe", "pbesol", "revpbe", "b3-lyp",
            "r2scan", ...
        damping: "bj" (Becke and Johnson), "zero", or their modified forms "bjm" and "zerom".
        cutoff: Pairs beyond it, in Angstrom, are left out; that of the original program is 95 Bohr. In periodic
            systems a smaller one is much faster, at the price of a small step of the energy where pairs cross it.
        device: Where D3 is computed, in float64.

    Raises:
        ImportError: If torch-dftd is not installed.
        ValueError: If functional, damping or cutoff is not allowed.
    """
    if damping not in DAMPINGS:
        raise ValueError(f"damping must be one of {', '.join(DAMPINGS)}, got {damping!r}")
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
            f"torch-dftd has no D3({damping}) parameters of functional {functional!r}"
        ) from error
    correction.implemented_properties = [*correction.implemented_properties, "free_energy"]  # has it, unsaid
    return _Corrected([calculator, correction])


class _Corrected(SumCalculator):
    """A sum that notices every change its first calculator notices, such as that of charge or spin."""

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation."""
        return super().check_state(atoms, tol) or self.mixer.calcs[0].check_state(atoms, tol)

    def calculate(
        self, atoms: Atoms, properties: Sequence[str], system_changes: Sequence[str] = all_changes
    ) -> Any:
        """Compute energy and forces in one go; asked for one by one, D3 would be computed twice."""
        super().calculate(atoms, list(dict.fromkeys(["forces", *properties])), system_changes)
