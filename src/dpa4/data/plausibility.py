"""Search for labels that look wrong: units, signs, exploded frames. Nothing is changed or dropped.

The rules and their limits are in docs/data.md, "Implausible labels".
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ase import units
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from dpa4.data.composition_fit import element_counts, fit_composition
from dpa4.data.consistency import Factor, energy_and_stress_factors, stiffness_factor
from dpa4.data.frame import Frame, file_of
from dpa4.messages import warn

Values = NDArray[np.float64]

LARGE_FORCE = 100.0  # eV/Angstrom; smaller forces are never exploded
HUGE_FORCE = 1000.0  # eV/Angstrom; larger forces always are
LARGE_VIRIAL = 100.0  # eV/atom; the same for the virial per atom, 1 TPa at 16 cubic Angstrom per atom
HUGE_VIRIAL = 1000.0  # eV/atom
USUAL_VIRIAL = (
    20.0  # eV/atom; a larger median of a file is implausible: 200 GPa at 16 cubic Angstrom per atom
)
USUAL_BINDING = 20.0  # eV/atom; a larger median distance from the reference energies is implausible
FEW = 12  # structures; files with fewer are examined together
COMPARED_FRAMES = 4096  # of all files together, for finite differences

_HARTREE, _RYDBERG = units.Hartree, units.Rydberg
_KCAL, _KJ = units.kcal / units.mol, units.kJ / units.mol

# Energy difference over the work of the forces, if one of the labels has other units; the most frequent cause first,
# because the factors of some causes are close to each other.
ENERGY_FACTORS = {
    "energies in Hartree": 1 / _HARTREE,
    "energies in Rydberg": 1 / _RYDBERG,
    "energies in kcal/mol": 1 / _KCAL,
    "energies in kJ/mol": 1 / _KJ,
    "energies in meV": 1e3,
    "forces in Hartree/bohr": _HARTREE / units.Bohr,
    "forces in Rydberg/bohr": _RYDBERG / units.Bohr,
    "forces in Hartree/Å": _HARTREE,
    "forces in kcal/mol/Å": _KCAL,
    "forces in kJ/mol/Å": _KJ,
    "energies and forces in atomic units": 1 / units.Bohr,
    "positions in bohr": units.Bohr,
}
# Stiffness of bonds of hydrogen over the usual one.
FORCE_FACTORS = {
    "kcal/mol": 1 / _KCAL,
    "kJ/mol": 1 / _KJ,
    "Hartree/bohr": units.Bohr / _HARTREE,
    "Hartree": 1 / _HARTREE,
}
UNUSUAL_STIFFNESS = 5.0  # factor; protons between two atoms are softer, units differ by 20 or more
# Virial over the energy difference upon strain.
STRESS_FACTORS = {
    "stress in GPa": 1 / units.GPa,
    "stress in kB": 10 / units.GPa,
    "stress in Hartree/bohr³": units.Bohr**3 / _HARTREE,
    "stress in Rydberg/bohr³": units.Bohr**3 / _RYDBERG,
    "energies and forces in Hartree": _HARTREE,
    "energies and forces in kcal/mol": _KCAL,
    "energies and forces in kJ/mol": _KJ,
}


class Finding(NamedTuple):
    """Labels of one file, or of several small ones, that look wrong."""

    label: str  # "energy", "forces" or "stress"
    structures: int  # number of structures concerned
    size: str  # size of the deviation, or factor
    example: str  # origin of the worst or a typical structure
    text: str  # observation and advice


class _Maxima(NamedTuple):
    """Largest absolute component of a label in each frame; 0 without the label."""

    values: Values
    labelled: NDArray[np.bool_]

    @property
    def usual(self) -> float:
        """Median over the frames with the label."""
        return max(float(np.median(self.values[self.labelled])), 1e-3)

    def outside(self, large: float, huge: float) -> NDArray[np.bool_]:
        """Values eight robust standard deviations above the others on a logarithmic scale, from large to huge.

        Values below ten times the median are never outside.
        """
        if not self.labelled.any():
            return np.zeros(len(self.values), dtype=bool)
        logarithms = np.log(np.maximum(self.values[self.labelled], large / 1000))
        centre = np.median(logarithms)
        spread = 1.4826 * np.median(np.abs(logarithms - centre))
        limit = max(min(max(np.log(large), centre + 8 * spread), np.log(huge)), centre + np.log(10.0))
        return self.values > np.exp(limit)


def implausible_labels(frames: Sequence[Frame]) -> list[Finding]:
    """Find labels that look wrong, file by file; the labels are not changed.

    Files with fewer than ``FEW`` structures, such as outputs of single calculations, are examined together.

    Args:
        frames: Structures without free atoms.
    """
    files = _by_file(frames)
    deviations = _energy_deviations(frames)
    compared = min(512, max(32, COMPARED_FRAMES // max(len(files), 1)))
    return [
        finding
        for indices in files
        for finding in _in_file([frames[i] for i in indices], deviations[indices], compared)
    ]


def _by_file(frames: Sequence[Frame]) -> list[list[int]]:
    """Indices of the structures of each file, and of all small files together."""
    files: dict[str, list[int]] = defaultdict(list)
    for index, frame in enumerate(frames):
        files[file_of(frame.origin)].append(index)
    small = sorted(index for indices in files.values() if len(indices) < FEW for index in indices)
    return [indices for indices in files.values() if len(indices) >= FEW] + ([small] if small else [])


def warn_of_implausible_labels(frames: Sequence[Frame]) -> Table | None:
    """Warn of labels that look wrong, and return a table of them; None if there are none."""
    findings = implausible_labels(frames)
    if not findings:
        return None
    table = Table(
        "label", "structures", "deviation", "for example", title="Implausible labels", title_justify="left"
    )
    for finding in findings:
        warn(f"{finding.example}: {finding.text}")
        cells = (finding.label, str(finding.structures), finding.size, finding.example)
        table.add_row(*map(escape, cells))
    return table


def warn_of_reference_energies(frames: Sequence[Frame], energies: Mapping[str, float]) -> None:
    """Warn if the energies are far from the reference energies, as those of another method or unit are.

    Args:
        frames: Structures without free atoms, with elements for which there are reference energies.
        energies: Reference energy of each element, in eV.
    """
    labelled = [frame for frame in frames if frame.energy is not None]
    if not labelled:
        return
    counts = element_counts(labelled, list(energies))
    totals = np.array([frame.energy for frame in labelled], dtype=np.float64)
    usual = float(np.median((totals - counts @ np.array(list(energies.values()))) / counts.sum(axis=1)))
    if abs(usual) > USUAL_BINDING:
        warn(
            f"the energies are {usual:+.4g} eV/atom from the reference energies in the median of the training data, "
            "much more than bonds are worth; are both of the same method and in eV?",
        )


def _energy_deviations(frames: Sequence[Frame]) -> Values:
    """Deviations from the fit by composition, in eV/atom, of energies that are far from it; 0 for all others."""
    labelled = np.array([frame.energy is not None for frame in frames], dtype=bool)
    out = np.zeros(len(frames))
    if labelled.any():
        own = [frame for frame in frames if frame.energy is not None]
        fit = fit_composition(element_counts(own), np.array([f.energy for f in own], dtype=np.float64))
        out[labelled] = np.where(fit.outliers, fit.deviations, 0.0)
    return out


def _in_file(frames: Sequence[Frame], deviations: Values, compared: int) -> Iterator[Finding]:
    """Findings in one file.

    Args:
        frames: Structures of the file.
        deviations: Deviations of exploded energies, in eV/atom; 0 for all others.
        compared: Number of structures that are compared with similar ones.
    """
    forces = _maxima([frame.forces for frame in frames])
    exploded, far = forces.outside(LARGE_FORCE, HUGE_FORCE), deviations != 0
    if far.any():
        yield _energy_finding(frames, deviations)
    if exploded.any():
        advice = "a calculation that failed, or atoms too close"
        yield _explosion("forces", "force", "eV/Å", frames, forces, exploded, advice)
    # Single wrong energies disturb the comparison; if most are far from other files, their unit is in question.
    wild = exploded | far if far.mean() < 0.5 else exploded
    sane = [frame for frame, bad in zip(frames, wild, strict=True) if not bad]
    energy, stress = energy_and_stress_factors(sane, compared)
    stiffness = stiffness_factor(sane, compared)
    if energy is not None and energy.differs():
        yield _energy_unit_finding(len(frames), energy, stiffness)
        stress = None  # its factor would be that of energies or forces
    elif stiffness is not None and stiffness.differs(UNUSUAL_STIFFNESS):
        yield _stiffness_finding(frames, stiffness, "forces" if energy is None else "energies and forces")
    yield from _stress_findings(frames, stress)


def _energy_finding(frames: Sequence[Frame], deviations: Values) -> Finding:
    """Finding of energies far from those of other structures."""
    worst = int(np.abs(deviations).argmax())
    size = f"{deviations[worst]:+.4g} eV/atom"
    text = (
        f"the energy is {size} away from those of other structures with this composition; look for a calculation "
        "that failed, or another method or unit"
    )
    return Finding("energy", int(np.count_nonzero(deviations)), size, frames[worst].origin, text)


def _energy_unit_finding(structures: int, energy: Factor, stiffness: Factor | None) -> Finding:
    """Finding of energies that do not agree with the forces; the stiffness tells which of both are wrong."""
    change = f"energies change by {energy.value:.4g} times the work of the forces"
    causes = ENERGY_FACTORS | {"energies per atom": 1 / energy.atoms}
    if stiffness is not None:
        wrong_forces = not _similar(abs(stiffness.value), 1.0, UNUSUAL_STIFFNESS)
        causes = {name: f for name, f in causes.items() if ("forces" in name) == wrong_forces}
    return _unit_finding("energy", structures, energy, change, causes, "the forces have the wrong sign")


def _stiffness_finding(frames: Sequence[Frame], factor: Factor, labels: str) -> Finding:
    """Finding of bonds of hydrogen that are much softer or stiffer than usual."""
    change = f"bonds of H to C, N and O are {factor.value:.4g} times as stiff as usual, by their forces"
    causes = {f"{labels} in {unit}": value for unit, value in FORCE_FACTORS.items()}
    count = sum(frame.forces is not None for frame in frames)
    return _unit_finding(
        "forces", count, factor, change, causes, "the forces have the wrong sign", tolerance=1.5
    )


def _stress_findings(frames: Sequence[Frame], factor: Factor | None) -> Iterator[Finding]:
    """Stress in other units or with the wrong sign, by finite differences or else by its size."""
    virials = _maxima([None if f.virial is None else f.virial / len(f) for f in frames])
    count = int(virials.labelled.sum())
    if factor is not None and factor.differs():
        causes = dict(STRESS_FACTORS)
        if factor.volume:
            causes["a virial under the name of a stress"] = -factor.volume
            causes["a stress under the name of a virial"] = -1 / factor.volume
        change = f"the stress is {factor.value:.4g} times the derivative of the energy"
        sign = "the stress has the wrong sign (ASE: positive under tension)"
        yield _unit_finding("stress", count, factor, change, causes, sign)
    elif factor is None and count and virials.usual > USUAL_VIRIAL:
        typical = frames[int(np.abs(virials.values - virials.usual).argmin())]
        yield Finding(
            "stress",
            count,
            f"{virials.usual:.4g} eV/atom",
            typical.origin,
            f"the virial, volume times stress, is {virials.usual:.4g} eV/atom in the median of the file, which is "
            f"implausible; the stress must be in eV/Å³ (kB: divide by {10 / units.GPa:.1f}, GPa: by "
            f"{1 / units.GPa:.2f})",
        )
    elif (wild := virials.outside(LARGE_VIRIAL, HUGE_VIRIAL)).any():
        yield _explosion(
            "stress", "virial", "eV/atom", frames, virials, wild, "a calculation that failed, or another unit"
        )


def _explosion(
    label: str,
    name: str,
    unit: str,
    frames: Sequence[Frame],
    maxima: _Maxima,
    wild: NDArray[np.bool_],
    advice: str,
) -> Finding:
    """Finding of values far outside of the others."""
    worst = int(maxima.values.argmax())
    value = maxima.values[worst]
    times = value / maxima.usual
    text = f"a {name} of {value:.4g} {unit}, {times:.4g} times the median of the file; look for {advice}"
    return Finding(label, int(wild.sum()), f"{value:.4g} {unit}", frames[worst].origin, text)


def _unit_finding(
    label: str,
    structures: int,
    factor: Factor,
    observation: str,
    causes: dict[str, float],
    sign: str,
    tolerance: float = 1.25,
) -> Finding:
    """Finding of a factor between a label and its finite difference."""
    text = f"{observation} ({factor.pairs} pairs of similar structures); {_cause(factor, causes, sign, tolerance)}"
    return Finding(label, structures, f"factor {factor.value:.4g}", factor.example[0], text)


def _cause(factor: Factor, causes: dict[str, float], sign: str, tolerance: float) -> str:
    """Known causes of a factor, the sign included, as the end of a sentence."""
    value = abs(factor.value)
    if _similar(value, 1.0):
        return sign
    low, high = sorted((abs(factor.lower), abs(factor.upper)))
    near = [
        n
        for n, f in causes.items()
        if low / 1.03 < abs(f) < high * 1.03 and _similar(value, abs(f), tolerance)
    ]
    if same := [name for name in near if factor.value * causes[name] > 0]:
        return f"this is the factor of {' or '.join(same)}"
    if near:
        return f"this is the factor of {' or '.join(near)}; also, {sign}"
    return "no common unit has this factor; look for labels of different calculations"


def _maxima(labels: Sequence[Values | None]) -> _Maxima:
    values = [0.0 if label is None else np.abs(label).max() for label in labels]
    return _Maxima(np.array(values), np.array([label is not None for label in labels], dtype=bool))


def _similar(first: float, second: float, tolerance: float = 1.6) -> bool:
    return 1 / tolerance < first / second < tolerance
