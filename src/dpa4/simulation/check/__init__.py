"""Check of a model: numbers, symmetry, derivatives, cutoff, short range; one page that says what is wrong."""

from dpa4.simulation.check.page import write_check
from dpa4.simulation.check.result import CheckResult, Figure, ModelCheck
from dpa4.simulation.check.run import check_model

__all__ = ["CheckResult", "Figure", "ModelCheck", "check_model", "write_check"]
