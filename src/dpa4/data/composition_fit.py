"""Least-squares fit of total energies by compositions that a few wrong energies cannot move."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from dpa4.data.frame import Frame

DEVIATION = 5.0
"""Energies closer to the fit than this, in eV/atom, are never outliers: bonds and pressure explain them."""
QUARTILES = 30.0
"""Smallest deviation of an outlier, in upper quartiles of the absolute deviations.

Compressed and hot crystals of many elements reach 16. The quartile stands while fewer than a quarter are wrong.
"""

_STEPS = 30  # of the iteratively reweighted fit; 10 are usual
_PRECISION = 1e-2  # eV/atom, sufficient to find outliers; smaller deviations have the same weight


class CompositionFit(NamedTuple):
    """Energy per element, and the deviation of each structure from the fit."""

    energies: NDArray[np.float64]  # (elements,), eV
    deviations: NDArray[np.float64]  # (structures,), eV/atom
    outliers: NDArray[np.bool_]  # (structures,); not part of the fit


def element_counts(frames: Sequence[Frame], elements: Sequence[str] | None = None) -> NDArray[np.float64]:
    """Number of atoms of each element in each frame, (frames, elements); by default of all elements that occur."""
    counts = np.zeros((len(frames), len(chemical_symbols)))
    for row, frame in zip(counts, frames, strict=True):
        row += np.bincount(frame.atomic_numbers, minlength=len(chemical_symbols))
    columns = counts.any(axis=0) if elements is None else [chemical_symbols.index(e) for e in elements]
    return counts[:, columns]


def fit_composition(
    counts: NDArray[np.float64], energies: NDArray[np.float64], deviation: float = DEVIATION
) -> CompositionFit:
    """Minimum-norm least-squares solution of counts @ x = energies without gross outliers.

    See docs/theory.md, "Readout and energy". Outliers are found by a fit of least absolute deviations per atom, which
    tolerates a minority of arbitrary energies. Without outliers the result is that of ordinary least squares.

    Args:
        counts: Number of atoms of each element in each structure, (structures, elements).
        energies: Total energies, (structures,), in eV.
        deviation: Energies closer to the fit than this, in eV/atom, are never outliers.
    """
    atoms = counts.sum(axis=1)
    outliers = np.zeros(len(energies), dtype=bool)
    solution = np.linalg.lstsq(counts, energies, rcond=None)[0]
    deviations = (energies - counts @ solution) / atoms
    # A wrong energy draws the fit towards itself, at most by half unless its element occurs almost nowhere else.
    if np.abs(deviations).max(initial=0.0) > deviation / 2:
        shares = counts / atoms[:, None]
        robust = energies / atoms - shares @ _least_absolute_deviations(shares, energies / atoms)
        outliers = np.abs(robust) > max(deviation, QUARTILES * np.quantile(np.abs(robust), 0.75))
        # Every element keeps a structure to be fitted.
        lost = (counts[~outliers] == 0).all(axis=0) & (counts > 0).any(axis=0)
        outliers &= (counts[:, lost] == 0).all(axis=1)
    if outliers.any():
        solution = np.linalg.lstsq(counts[~outliers], energies[~outliers], rcond=None)[0]
        deviations = (energies - counts @ solution) / atoms
    return CompositionFit(np.asarray(solution, dtype=np.float64), deviations, outliers)


def _least_absolute_deviations(
    matrix: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Minimise the sum of absolute deviations of matrix @ x from values, by iteratively reweighted least squares."""
    weights = np.ones(len(values))
    solution = np.zeros(matrix.shape[1])
    fitted = np.zeros(len(values))
    ridge = 1e-10 * np.eye(matrix.shape[1])  # compositions may leave energies undetermined
    for _ in range(_STEPS):
        weighted = (matrix * weights[:, None]).T
        solution = np.linalg.solve(weighted @ matrix + ridge * weights.sum(), weighted @ values)
        previous, fitted = fitted, matrix @ solution
        weights = 1 / np.maximum(np.abs(values - fitted), _PRECISION)
        if np.abs(fitted - previous).max() < _PRECISION:
            break
    return solution
