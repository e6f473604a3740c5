"""Factors between labels and their finite differences: energies, forces, stress, and the stiffness of bonds.

Two similar frames of the same atoms are related by E_b - E_a = -F . d - V : e, exact to the third order in the
displacement d of the atoms and the strain e of the cell, with the means F of the forces and V of the virials. See
docs/theory.md, "Plausibility of labels".
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import NDArray
from scipy.linalg import polar

from dpa4.data.frame import Frame

Vectors = NDArray[np.float64]

_MOLECULES = 256  # frames of the same molecule that are searched for similar ones
_CELLS = 128  # the same for cells, whose comparison takes longer
_ATOMS = 16  # atoms that decide about the similarity of large structures
_DISPLACEMENT = 0.35  # Angstrom, root mean square over the atoms; beyond this the third order is not small
_STRAINED_DISPLACEMENT = 0.1  # Angstrom; the same for pairs with different cells
_STRAIN = 0.06  # largest strain of a pair, by component
_NO_STRAIN = 1e-6
_FEWEST = 6  # pairs
_STIFFNESS = 33.0  # eV/Angstrom^2, of bonds of hydrogen to C, N and O; single ones have 25 to 50
_BOND = 1.3  # Angstrom, longest bond of hydrogen
_STRETCH = 0.01  # Angstrom, smallest change of a bond length
_FEWEST_BONDS = 20
_SPREAD = 2.5  # largest ratio of the upper to the lower quartile


class Factor(NamedTuple):
    """Weighted median of the ratio of a label to its finite difference."""

    value: float
    lower: float  # quartile
    upper: float  # quartile
    pairs: int
    example: tuple[str, str]  # origins of the pair with the largest weight
    atoms: float  # mean number of atoms
    volume: float  # mean, Angstrom^3; 0 without a cell

    def differs(self, limit: float = 1.6) -> bool:
        """Return whether the factor is beyond a limit, and clearly so: not by the noise of the finite differences."""
        return not 1 / limit < self.value < limit and not (self.lower < 1.3 and self.upper > 1 / 1.3)


class _Pair(NamedTuple):
    first: Frame
    second: Frame
    energy: float  # difference of the labels, eV
    work: float  # -F . d, eV
    strain_energy: float  # -V : e, eV
    displacement: float  # root mean square, Angstrom
    strain: float  # largest component


def energy_and_stress_factors(
    frames: Sequence[Frame], max_frames: int = 512
) -> tuple[Factor | None, Factor | None]:
    """Factors of the energies and of the virials of one file; None if similar frames are too few or disagree.

    The energy factor is E_b - E_a over the work of the forces, for pairs with the same cell. The stress factor is the
    virial over the energy difference upon strain. If it is inconsistent and no cells are equal, the energy factor is
    E_b - E_a over the work of forces and stress.

    Args:
        frames: Frames of one file. Energies or forces far outside of the others must not be among them.
        max_frames: Number of frames to compare, those of the most frequent atoms first.
    """
    pairs = list(_similar_pairs(frames, max_frames))
    rigid = _closest([p for p in pairs if p.strain < _NO_STRAIN])
    energy = _factor(rigid, [p.energy for p in rigid], [p.work for p in rigid])
    scale = energy.value if energy is not None and energy.differs() else 1.0
    strained = [
        p
        for p in pairs
        if p.strain >= _NO_STRAIN and p.strain_energy and p.displacement < _STRAINED_DISPLACEMENT
    ]
    residual = [p.energy / scale - p.work for p in strained]
    stress = _factor(strained, [p.strain_energy for p in strained], residual)
    if energy is None and stress is None:  # no two cells are equal, and the energies may be the reason
        energy = _factor(strained, [p.energy for p in strained], [p.work + p.strain_energy for p in strained])
    return energy, stress


def stiffness_factor(frames: Sequence[Frame], max_frames: int = 512) -> Factor | None:
    """Stiffness of the bonds of H to C, N and O over the usual one; None if there are too few bonds or they disagree.

    The stiffness is the change of the force on hydrogen along its bond over that of the length of the bond, between
    frames of the same molecule. It does not depend on energies, and hardly on the molecule.

    Args:
        frames: Frames of one file. Forces far outside of the others must not be among them.
        max_frames: Number of frames to use, those of the most frequent atoms first.
    """
    ratios, weights, first = [], [], None
    for group in _groups(frames, max_frames):
        lengths, forces = _hydrogen_bonds(group)
        change, force = np.diff(lengths, axis=0), np.diff(forces, axis=0)
        valid = (np.maximum(lengths[1:], lengths[:-1]) < _BOND) & (np.abs(change) > _STRETCH)
        ratios.append(-force[valid] / change[valid] / _STIFFNESS)
        weights.append(np.abs(change[valid]))
        if valid.any() and first is None:
            first = group[int(np.argwhere(valid)[0, 0])]
    if first is None or sum(map(len, ratios)) < _FEWEST_BONDS:
        return None
    return _summary(np.concatenate(ratios), np.concatenate(weights), (first, first), [first])


def _hydrogen_bonds(group: Sequence[Frame]) -> tuple[Vectors, Vectors]:
    """Length of the bond of each H to the nearest C, N or O, and the force on H along it, both (frames, H)."""
    numbers = group[0].atomic_numbers
    hydrogen, partners = np.flatnonzero(numbers == 1)[:_ATOMS], np.flatnonzero(np.isin(numbers, (6, 7, 8)))
    if not len(hydrogen) or not len(partners):
        return np.zeros((len(group), 0)), np.zeros((len(group), 0))
    positions = np.array([frame.positions for frame in group])
    forces = np.array([frame.forces for frame in group])[:, hydrogen]
    # The partner is that of the first frame. If the bond breaks, its length leaves it out.
    first = np.linalg.norm(positions[0, hydrogen, None] - positions[0, partners], axis=-1)
    bonds = positions[:, hydrogen] - positions[:, partners[first.argmin(axis=1)]]
    lengths = np.linalg.norm(bonds, axis=-1)
    return lengths, (forces * bonds).sum(axis=-1) / np.maximum(lengths, 1e-3)


def _closest(pairs: Sequence[_Pair]) -> list[_Pair]:
    """The quarter of the pairs with the smallest displacements, at least eight, and all very close ones."""
    ordered = sorted(pairs, key=lambda pair: pair.displacement)
    number = max(8, len(ordered) // 4)
    return [p for k, p in enumerate(ordered) if k < number or p.displacement < 0.1]


def _factor(
    pairs: Sequence[_Pair], numerators: Sequence[float], denominators: Sequence[float]
) -> Factor | None:
    upper, lower = np.array(numerators), np.array(denominators)
    weights = np.sqrt(np.abs(upper * lower))
    if np.count_nonzero(weights) < _FEWEST:
        return None
    weights = np.minimum(weights, 4 * np.median(weights[weights > 0]))
    ratios = np.divide(upper, lower, out=np.zeros_like(upper), where=weights > 0)
    example = pairs[int(weights.argmax())]
    return _summary(ratios, weights, (example.first, example.second), [p.first for p in pairs])


def _summary(
    ratios: Vectors, weights: Vectors, example: tuple[Frame, Frame], frames: Sequence[Frame]
) -> Factor | None:
    """Weighted quartiles of ratios; None if they disagree."""
    order = np.argsort(ratios)
    sums = np.cumsum(weights[order])
    first, median, third = (
        ratios[order][np.searchsorted(sums, q * sums[-1])].item() for q in (0.25, 0.5, 0.75)
    )
    if first * third <= 0 or not 1 / _SPREAD < third / first < _SPREAD:
        return None
    return Factor(
        value=median,
        lower=first,
        upper=third,
        pairs=len(ratios),
        example=(example[0].origin, example[1].origin),
        atoms=float(np.mean([len(frame) for frame in frames])),
        volume=float(np.mean([abs(np.linalg.det(frame.cell)) for frame in frames])),
    )


def _groups(frames: Iterable[Frame], max_frames: int) -> Iterator[list[Frame]]:
    """Frames with forces, grouped by atoms in the same order, charge and spin; the largest group first."""
    groups: dict[tuple[bytes, bytes, str], list[Frame]] = defaultdict(list)
    for frame in frames:
        if frame.forces is not None and len(frame) > 1:
            state = str(dict(frame.charge_spin)) if frame.charge_spin else ""
            groups[frame.atomic_numbers.tobytes(), frame.pbc.tobytes(), state].append(frame)
    for group in sorted(groups.values(), key=len, reverse=True):
        group = group[: min(_CELLS if group[0].pbc.any() else _MOLECULES, max_frames)]
        max_frames -= len(group)
        if len(group) < 2:
            return
        yield group


def _similar_pairs(frames: Iterable[Frame], max_frames: int) -> Iterator[_Pair]:
    """Pairs of each frame and the most similar one, with energy and forces."""
    for group in _groups([frame for frame in frames if frame.energy is not None], max_frames):
        compare = _compare_cells if group[0].pbc.any() else _compare_molecules
        for i, k in _nearest(group):
            pair = compare(group[i], group[k])
            if pair.displacement <= _DISPLACEMENT and pair.strain <= _STRAIN:
                yield pair


def _nearest(frames: Sequence[Frame]) -> set[tuple[int, int]]:
    """Indices of each frame and its nearest neighbour."""
    distances = _cell_distances(frames) if frames[0].pbc.any() else _molecule_distances(frames)
    np.fill_diagonal(distances, np.inf)
    distances[distances < 1e-12] = np.inf  # the same structure twice
    nearest = distances.argmin(axis=1).tolist()
    return {(min(i, k), max(i, k)) for i, k in enumerate(nearest) if np.isfinite(distances[i, k])}


def _chosen_atoms(frame: Frame) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, len(frame) - 1, min(len(frame), _ATOMS)).astype(np.int64))


def _molecule_distances(frames: Sequence[Frame]) -> Vectors:
    """Squared differences of the interatomic distances, for every pair of frames: blind to rotations."""
    chosen = _chosen_atoms(frames[0])
    rows, columns = np.triu_indices(len(chosen), 1)
    places = np.array([frame.positions[chosen] for frame in frames])
    lengths = np.linalg.norm(places[:, rows] - places[:, columns], axis=-1)
    squares: Vectors = (lengths**2).sum(axis=1)
    out: Vectors = np.maximum(squares[:, None] + squares - 2 * lengths @ lengths.T, 0.0)
    return out


def _cell_distances(frames: Sequence[Frame]) -> Vectors:
    """Squared differences of the positions in the cell and of the cells, for every pair of frames."""
    chosen = _chosen_atoms(frames[0])
    cells = np.array([complete_cell(frame.cell) for frame in frames])
    inside = np.array([_scaled(f, c)[chosen] for f, c in zip(frames, cells, strict=True)])
    out = np.empty((len(frames), len(frames)))
    for i, own in enumerate(inside):
        shifts = _shortest(inside - own, frames[0].pbc) @ cells[i]
        out[i] = (shifts**2).sum(axis=2).mean(axis=1) + ((cells - cells[i]) ** 2).sum(axis=(1, 2))
    return out


def _scaled(frame: Frame, cell: Vectors) -> Vectors:
    """Positions (N, 3) in units of the cell vectors."""
    return frame.positions @ np.linalg.inv(cell)


def _shortest(shifts: Vectors, pbc: NDArray[np.bool_]) -> Vectors:
    """Displacements (..., N, 3) in units of the cell, by the nearest image, without their mean over the atoms."""
    shifts = shifts - np.where(pbc, np.round(shifts), 0.0)
    return shifts - shifts.mean(axis=-2, keepdims=True)


def _compare_molecules(first: Frame, second: Frame) -> _Pair:
    """Compare two frames after a rotation that superimposes the second on the first (Kabsch's algorithm)."""
    own, other = (f.positions - f.positions.mean(axis=0) for f in (first, second))
    left, _, right = np.linalg.svd(other.T @ own)
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    rotation = (left * sign) @ right
    return _pair(first, second, other @ rotation - own, rotation, np.zeros((3, 3)))


def _compare_cells(first: Frame, second: Frame) -> _Pair:
    """Compare two frames with similar cells after a rotation that leaves a pure strain between the cells."""
    own, other = complete_cell(first.cell), complete_cell(second.cell)
    back, stretch = polar(np.linalg.solve(own, other).T)  # other = own @ stretch @ back.T
    strain = stretch - np.eye(3)
    shifts = _shortest(_scaled(second, other) - _scaled(first, own), first.pbc) @ ((own + other @ back) / 2)
    return _pair(first, second, shifts, back, strain)


def _pair(first: Frame, second: Frame, shifts: Vectors, rotation: Vectors, strain: Vectors) -> _Pair:
    """Pair of frames from displacements, rotation of the second frame (row vectors) and strain."""
    assert first.energy is not None and second.energy is not None
    assert first.forces is not None and second.forces is not None
    forces = (first.forces + second.forces @ rotation) / 2
    strain_energy = 0.0
    if first.virial is not None and second.virial is not None:
        virial = (first.virial + rotation.T @ second.virial @ rotation) / 2
        strain_energy = -float((virial * strain).sum())
    return _Pair(
        first=first,
        second=second,
        energy=second.energy - first.energy,
        work=-float((forces * shifts).sum()),
        strain_energy=strain_energy,
        displacement=float(np.sqrt((shifts**2).sum(axis=1).mean())),
        strain=float(np.abs(strain).max()),
    )
