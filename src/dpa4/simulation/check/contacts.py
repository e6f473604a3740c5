"""Scans of pairs and of compressed triples: walls, wells, spikes and curvature."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from ase.data import atomic_numbers, covalent_radii
from numpy.typing import NDArray

from dpa4.data.coverage import ElementPair
from dpa4.potential import Potential
from dpa4.simulation.check.drawing import Line
from dpa4.simulation.check.result import CheckResult, Figure
from dpa4.simulation.close_contacts import (
    CURVATURE,
    STEEPNESS,
    WALL_OF_DATA,
    WALL_OF_RADII,
    bare_repulsion,
    excess_curvature,
    repels_below,
    wall_distance,
)
from dpa4.simulation.clusters import cluster_forces
from dpa4.simulation.pair_curves import (
    SPIKE,
    WALL,
    Curve,
    Diagnosis,
    PairCurve,
    diagnose,
    element_pairs,
    mismatch,
)

SHORTEST = 0.2
"""Shortest distance of a scan, in Angstrom."""

PAIR_DEPTH, TRIPLE_DEPTH = 15.0, 25.0
"""Largest depths in eV: the strongest bonds are those of CO, 11 eV, and CO2, 17 eV in all."""

PARTS, LEVELS, STEPS = 5, 4, 4
"""Parts into which a step is divided where energy and force disagree, repetitions, and steps of a curve each time."""

JUMP_WIDTH = 1e-3
"""Width of a step, in Angstrom, in which a disagreement is a jump rather than a feature that is not resolved."""

TRIPLES = 250

TRIPLE_WALL = 0.8
"""Margin of the wall of a triple: one pair must outweigh the attraction of the other two."""

PAIRS_AT_ONCE, TRIPLES_AT_ONCE = 64, 32
LARGEST_DRAWN = 150
NAMED = 6  # names of curves in a remark

Array = NDArray[np.float64]
Values = tuple[Array, Array, Array, Array]
"""Distances, energies, forces and curvatures of a curve."""


@dataclass(frozen=True)
class TripleCurve:
    """Energy of three atoms whose distances grow together, over the shortest one; fields as in ``PairCurve``.

    Attributes:
        elements: Chemical symbols.
        sides: Distances of the pairs 0-1, 0-2 and 1-2 relative to the shortest.
    """

    elements: tuple[str, str, str]
    sides: tuple[float, float, float]
    distance: Array
    energy: Array
    force: Array
    curvature: Array

    @property
    def name(self) -> str:
        """Name such as "O-H-H"."""
        return "-".join(self.elements)

    @property
    def pairs(self) -> list[ElementPair]:
        """The pairs of elements, in the order of the sides."""
        return list(combinations(self.elements, 2))


@dataclass(frozen=True)
class Shape:
    """Curve with its diagnosis, relative to the wall and to the bare repulsion of its atoms."""

    curve: Curve
    diagnosis: Diagnosis
    wall: bool
    jump: bool
    excess: float  # largest excess curvature, eV/Angstrom^2; NaN if the curve is not finite
    at: float  # its distance

    def failed(self, depth: float) -> bool:
        """Return whether one of the failures of the checks applies to the curve."""
        d = self.diagnosis
        return not self.wall or not self.excess <= CURVATURE or not (d.depth or 0.0) <= depth or self.jump


def distances(cutoff: float) -> Array:
    """Distances of a scan up to the cutoff, in Angstrom: dense where curves are steep."""
    parts = [np.arange(SHORTEST, 0.5, 0.025), np.arange(0.5, 1.6, 0.05), np.arange(1.6, 3.6, 0.1)]
    grid = np.concatenate([*parts, np.arange(3.6, max(cutoff, 3.6), 0.2)])
    return np.append(grid[grid < cutoff - 0.01], cutoff)


def scan_all_pairs(potential: Potential, elements: Sequence[str]) -> Iterator[Shape]:
    """Yield the diagnosed curves of all pairs of some elements. Curvatures are differences of the forces."""
    pairs = [pair for pair in element_pairs(potential) if set(pair) <= set(elements)]
    grid = distances(potential.config.cutoff)
    shortest = potential.coverage.shortest if potential.coverage else None
    for first in range(0, len(pairs), PAIRS_AT_ONCE):
        for curve in _pair_curves(potential, pairs[first : first + PAIRS_AT_ONCE], grid):
            repels = repels_below(curve, wall_distance(curve.pair, shortest))
            yield _shape(curve, repels, excess_curvature(curve, curve.pair))


def scan_triples(potential: Potential, elements: Sequence[str], count: int, seed: int = 0) -> Iterator[Shape]:
    """Yield the diagnosed curves of random triples of atoms that are compressed, all lengths alike.

    Two sides have 0.8 to 1.6 times the sum of the covalent radii of their atoms, relative to each other, and a random
    angle. Every element is used about equally often. Triples with an excluded pair are left out.
    """
    random = np.random.default_rng(seed)
    grid = distances(potential.config.cutoff)
    shortest = potential.coverage.shortest if potential.coverage else None
    allowed = {frozenset(pair) for pair in element_pairs(potential)}
    drawn = [_random_triple(elements, k, random) for k in range(count)]
    drawn = [t for t in drawn if allowed.issuperset(frozenset(pair) for pair in combinations(t[0], 2))]
    for first in range(0, len(drawn), TRIPLES_AT_ONCE):
        for curve in _triple_curves(potential, drawn[first : first + TRIPLES_AT_ONCE], grid):
            walls = [
                wall_distance(pair, shortest) / side
                for pair, side in zip(curve.pairs, curve.sides, strict=True)
            ]
            yield _shape(curve, repels_below(curve, TRIPLE_WALL * min(walls)), _excess_of_triple(curve))


def check_pairs(shapes: Sequence[Shape], total: int) -> list[CheckResult]:
    """Judge the curves of pairs.

    Args:
        shapes: Diagnosed curves.
        total: Number of pairs of the model.
    """
    tested = f"{len(shapes):,} of {total:,} pairs, {SHORTEST:g} Å to the cutoff"
    return _judged("pairs", shapes, tested, PAIR_DEPTH, "the strongest bond of two atoms, CO, has 11 eV")


def check_triples(shapes: Sequence[Shape], pairs: Sequence[Shape]) -> list[CheckResult]:
    """Judge the curves of triples, and count those that fail although each of their pairs is fine alone."""
    fine = {frozenset(_pair(s.curve)) for s in pairs if not s.failed(PAIR_DEPTH)}
    failed = [s.curve for s in shapes if s.failed(TRIPLE_DEPTH)]
    hidden = sum(
        all(frozenset(pair) in fine for pair in curve.pairs)
        for curve in failed
        if isinstance(curve, TripleCurve)
    )
    tested = f"{len(shapes):,} random triples, all lengths compressed to {SHORTEST:g} Å"
    reason = "the strongest triatomic molecule, CO2, has 17 eV"
    remark = (
        f"{hidden} of {len(failed)} failing triples consist of pairs that are fine alone" if failed else ""
    )
    return _judged("triples", shapes, tested, TRIPLE_DEPTH, reason, remark)


def drawn_lines(shapes: Sequence[Shape], depth: float) -> list[Line]:
    """Curves for the picture: evenly spaced ones of those that failed, and of those that did not."""
    failed = [s for s in shapes if s.failed(depth)]
    good = [s for s in shapes if not s.failed(depth)]
    chosen = [*_some(failed), *_some(good)]
    return [Line(s.curve.name, s.curve.distance, s.curve.energy, s.failed(depth)) for s in chosen]


# --- judgement


def _judged(
    what: str, shapes: Sequence[Shape], tested: str, depth: float, strongest: str, remark: str = ""
) -> list[CheckResult]:
    walls = [s for s in shapes if not s.wall]
    wells = [s for s in shapes if (s.diagnosis.force_flips or 0) > 1]
    jumps = [s for s in shapes if s.jump]
    broken = sum("not finite" in s.diagnosis.flags for s in shapes)
    deep = [s for s in shapes if _depth(s) > depth]
    barriers = [s for s in shapes if _variation(s) > SPIKE]
    curved = [s for s in shapes if not s.excess <= CURVATURE] or _largest(shapes, _excess)[:1]
    return [
        CheckResult(
            f"{what}: wall",
            tested,
            (
                Figure(f"{what} without a wall", len(walls), "", 0),
                Figure(f"{what} not finite", broken, "", 0),
            ),
            f"{SHORTEST:g} Å apart, the energy is {WALL:g} eV or more above free atoms, and the force is repulsive "
            f"below {WALL_OF_DATA:g} of the shortest distance in the training data (unknown: below {WALL_OF_RADII:g} "
            "of the sum of the covalent radii); otherwise atoms fall into each other",
            "; ".join(filter(None, (remark, _listed(walls)))),
        ),
        CheckResult(
            f"{what}: wells",
            tested,
            (
                Figure("deepest well", max(map(_depth, shapes), default=0.0), "eV", depth),
                Figure(f"{what} with several wells", len(wells), "", 0, severe=False),
            ),
            f"{strongest}; several wells are rare where electronic states do not cross",
            _listed(deep, lambda s: f"{_depth(s):.3g} eV", _depth) if deep else _listed(wells),
        ),
        CheckResult(
            f"{what}: spikes",
            tested,
            (
                Figure(f"{what} where energy and force disagree", len(jumps), "", 0),
                Figure(
                    "highest barrier", max(map(_variation, shapes), default=0.0), "eV", SPIKE, severe=False
                ),
            ),
            "a step in which the force is not the slope of the energy hides a spike; barriers are the variation of "
            "the energy beyond that of a single well, which free atoms rarely have",
            _listed(jumps) if jumps else _listed(barriers, lambda s: f"{_variation(s):.3g} eV", _variation),
        ),
        CheckResult(
            f"{what}: curvature",
            tested,
            (Figure("largest excess curvature", max(0.0, *map(_excess, shapes)), "eV/Å²", CURVATURE),),
            f"above {STEEPNESS:g} times the bare repulsion of nuclei; the stiffest bond, N2, has 143 eV/Å², and at "
            "1,000 a time step of 0.5 fs is unstable for hydrogen",
            _listed(curved, lambda s: f"{s.excess:.3g} eV/Å² at {s.at:.2f} Å", _excess),
        ),
    ]


def _variation(shape: Shape) -> float:
    return shape.diagnosis.excess_variation or 0.0


def _excess(shape: Shape) -> float:
    """Largest excess curvature; infinite for a curve that is not finite."""
    return float(np.nan_to_num(shape.excess, nan=np.inf))


def _largest(shapes: Sequence[Shape], measure: Callable[[Shape], float]) -> list[Shape]:
    return sorted(shapes, key=measure, reverse=True)


def _depth(shape: Shape) -> float:
    return shape.diagnosis.depth or 0.0


def _pair(curve: Curve) -> ElementPair:
    assert isinstance(curve, PairCurve)
    return curve.pair


def _listed(
    shapes: Sequence[Shape],
    text: Callable[[Shape], str] = lambda shape: "",
    measure: Callable[[Shape], float] = lambda shape: 0.0,
) -> str:
    """Names of some curves, each once and with the number of its curves, those of the largest measure first.

    Args:
        shapes: The curves.
        text: Function that returns what to say of a curve; said of the first one of each name.
        measure: Measure of a curve.
    """
    groups: dict[str, list[Shape]] = {}
    for shape in _largest(shapes, measure):
        groups.setdefault(shape.curve.name, []).append(shape)
    parts = []
    for name, members in list(groups.items())[:NAMED]:
        said, count = text(members[0]), len(members)
        largest = "up to " if said and count > 1 else ""
        parts.append(f"{name} {largest}{said}".rstrip() + (f" ({count:,} times)" if count > 1 else ""))
    rest = len(shapes) - sum(map(len, list(groups.values())[:NAMED]))
    return ", ".join(parts) + (f" and {rest:,} more" if rest else "")


def _some(shapes: Sequence[Shape]) -> list[Shape]:
    chosen = np.unique(np.linspace(0, len(shapes) - 1, min(len(shapes), LARGEST_DRAWN)).astype(int))
    return [shapes[k] for k in chosen]


def _shape(curve: Curve, repels: bool, excess: Array) -> Shape:
    diagnosis = diagnose(curve)
    finite = "not finite" not in diagnosis.flags
    at = int(np.nan_to_num(excess, nan=np.inf).argmax())
    return Shape(
        curve,
        diagnosis,
        repels and not {"no wall", "not finite"} & {*diagnosis.flags},
        finite and _jumps(curve),
        float(excess.max()) if finite else float("nan"),
        float(curve.distance[at]),
    )


def _jumps(curve: Curve) -> bool:
    """Return whether energy and force disagree in a step that is too narrow for a feature of a smooth energy."""
    difference, allowed = mismatch(curve.distance, curve.energy, curve.force, curve.curvature)
    return bool(((difference > allowed) & (np.diff(curve.distance) < JUMP_WIDTH)).any())


# --- curves


def _scan(potential: Potential, atoms: Sequence[Sequence[str]], shapes: Array, grid: Array) -> list[Values]:
    """Scan clusters whose lengths all grow together.

    Steps in which energy and force disagree are divided, so that the curves are resolved where they are steep.

    Args:
        potential: The potential.
        atoms: Chemical symbols of the n atoms of every cluster.
        shapes: Positions (S, n, 3) for the distance 1.
        grid: Distances (m,), in Angstrom.

    Returns:
        For every cluster distances, energies relative to the longest distance, forces along the distance, curvatures.
    """
    numbers = np.array([[atomic_numbers[e] for e in elements] for elements in atoms])

    def points(which: NDArray[np.int64], distance: Array) -> Array:
        energies, forces = cluster_forces(potential, numbers[which], shapes[which] * distance[:, None, None])
        return np.stack([distance, energies, (forces * shapes[which]).sum((1, 2))], axis=1)

    every = np.arange(len(atoms))
    found = list(points(every.repeat(len(grid)), np.tile(grid, len(atoms))).reshape(len(atoms), len(grid), 3))
    for _ in range(LEVELS):
        added = [_between(values) for values in found]
        if not any(map(len, added)):
            break
        which, distance = every.repeat([len(d) for d in added]), np.concatenate(added)
        new = points(which, distance)
        for k in every:
            merged = np.concatenate([found[k], new[which == k]])
            found[k] = merged[merged[:, 0].argsort()]
    return [(r, e - e[-1], f, _curvature(f, r)) for r, e, f in (values.T for values in found)]


def _between(values: Array) -> Array:
    """Distances inside the steps of a curve in which energy and force disagree most."""
    r, e, f = values.T
    if not np.isfinite(values).all():
        return np.empty(0)
    difference, allowed = mismatch(r, e, f, _curvature(f, r))
    worst = (difference - allowed).argsort()[-STEPS:]
    steps = worst[difference[worst] > allowed[worst]]
    return (r[steps, None] + np.diff(r)[steps, None] * np.arange(1, PARTS) / PARTS).ravel()


def _pair_curves(potential: Potential, pairs: Sequence[ElementPair], grid: Array) -> Iterator[PairCurve]:
    """Yield the curves of some pairs."""
    # Only the second atom moves, so that the force along the distance is its own.
    shapes = np.zeros((len(pairs), 2, 3))
    shapes[:, 1, 0] = 1.0
    for pair, values in zip(pairs, _scan(potential, pairs, shapes, grid), strict=True):
        yield PairCurve(pair, *values)


def _random_triple(
    elements: Sequence[str], index: int, random: np.random.Generator
) -> tuple[tuple[str, str, str], Array]:
    """Elements of a triple, and positions (3, 3) whose shortest distance is 1."""
    a = elements[index % len(elements)]
    b, c = (elements[int(random.integers(len(elements)))] for _ in range(2))
    ra, rb, rc = (float(covalent_radii[atomic_numbers[e]]) for e in (a, b, c))
    first, second = random.uniform(0.8, 1.6, size=2) * (ra + rb, ra + rc)
    cosine = random.uniform(-1, 0.5)
    sine = float(np.sqrt(1 - cosine**2))
    positions = np.array([[0, 0, 0], [first, 0, 0], [second * cosine, second * sine, 0]])
    return (a, b, c), positions / min(_sides(positions))


def _triple_curves(
    potential: Potential, triples: Sequence[tuple[tuple[str, str, str], Array]], grid: Array
) -> Iterator[TripleCurve]:
    """Yield the curves of some triples, given by their elements and positions."""
    shapes = np.array([positions for _, positions in triples])
    scans = _scan(potential, [elements for elements, _ in triples], shapes, grid)
    for (elements, shape), values in zip(triples, scans, strict=True):
        a, b, c = _sides(shape)
        yield TripleCurve(elements, (a, b, c), *values)


def _sides(positions: Array) -> list[float]:
    return [float(np.linalg.norm(positions[i] - positions[j])) for i, j in combinations(range(3), 2)]


def _excess_of_triple(curve: TripleCurve) -> Array:
    """Curvature above 10 times that of the bare repulsion of its pairs, per pair, (n,) in eV/Angstrom^2."""
    repulsion, scale = np.zeros(len(curve.distance)), 0.0
    for (a, b), side in zip(curve.pairs, curve.sides, strict=True):
        _, curvature = bare_repulsion(atomic_numbers[a], atomic_numbers[b], side * curve.distance)
        repulsion += np.abs(curvature) * side**2
        scale += side**2
    # Moving all atoms apart stretches every pair, a longer one by more.
    return (np.abs(curve.curvature) - STEEPNESS * repulsion) / scale


def _curvature(force: Array, grid: Array) -> Array:
    """Second derivative of the energy from differences of the forces, which miss no change between two points."""
    return -np.gradient(force, grid, edge_order=2)
