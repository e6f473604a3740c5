"""Published benchmarks: Matbench Discovery (discovery, conductivity, diatomic molecules) and SPICE-MACE-OFF."""

from dpa4.leaderboards.diatomics import DiatomicsScore, run_diatomics, score_diatomics
from dpa4.leaderboards.discovery import DiscoveryScore, score_structures
from dpa4.leaderboards.kappa import KappaScore, run_kappa, score_kappa
from dpa4.leaderboards.spice import SpiceScore, run_spice, score_spice
from dpa4.leaderboards.submission import write_submission

__all__ = [
    "DiatomicsScore",
    "DiscoveryScore",
    "KappaScore",
    "SpiceScore",
    "run_diatomics",
    "run_kappa",
    "run_spice",
    "score_diatomics",
    "score_kappa",
    "score_spice",
    "score_structures",
    "write_submission",
]
