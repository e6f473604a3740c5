"""Check of data of any size: structures that should not be trained on, and labels that look wrong."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import covalent_radii
from rich.markup import escape
from rich.table import Table

from dpa4.data.composition_fit import DEVIATION, QUARTILES, element_counts, fit_composition
from dpa4.data.conversion import Entry, entries, is_labelled
from dpa4.data.frame import Frame
from dpa4.data.labels import USUAL_KEYS, LabelKeys
from dpa4.data.plausibility import HUGE_FORCE, LARGE_FORCE, warn_of_implausible_labels
from dpa4.data.references import is_isolated_atom
from dpa4.data.streaming import SAMPLE
from dpa4.graph import build_graph

SHORT = 0.5  # of the sum of the covalent radii: H2 compressed to 0.31 Angstrom, metals to 1.3 Angstrom
SAME_ENERGY = 1e-3  # eV/atom; repeated calculations of a structure agree better than this
MANY = 30.0  # times the median of the largest forces of the structures
DIGITS = 5  # of positions and cells of equal structures, in Angstrom

UNUSABLE = "unusable"
UNLABELLED = "without labels"
SHORT_DISTANCE = "short distance"
DUPLICATE = "duplicate"
DISAGREEING = "disagreeing energies"
ENERGY = "energy outlier"
FORCE = "force outlier"


@dataclass(frozen=True)
class Checked:
    """Result of a check.

    Attributes:
        structures: Number of structures.
        sample: Number of structures for the fit of energies and the search for wrong units.
        reasons: Why structures should be left out, by their number.
        examples: Origin of the first structure and the size of its deviation, by reason.
        implausible: Table of labels that look wrong, file by file; None if there are none.
    """

    structures: int
    sample: int
    reasons: dict[int, str]
    examples: dict[str, str]
    implausible: Table | None

    def table(self) -> Table:
        """Number of structures and the first one, for each reason."""
        table = Table(title="Check", title_justify="left")
        table.add_column("reason")
        table.add_column("structures", justify="right")
        table.add_column("first", overflow="fold")
        found = list(self.reasons.values())
        for reason, example in self.examples.items():
            table.add_row(reason, str(found.count(reason)), escape(example))
        return table

    def part(self, number: int, entry: Entry) -> int:
        """Rule for ``write_lmdb``: 0 for structures without a reason, -1 for the others."""
        return -1 if number in self.reasons else 0


def check(
    paths: Sequence[Path],
    keys: LabelKeys = USUAL_KEYS,
    progress: Callable[[Iterable[Entry]], Iterable[Entry]] = iter,
    sample: int = SAMPLE,
) -> Checked:
    """Look for structures that should be left out; nothing is changed.

    Found are structures that cannot be used or have no label, with atoms too close to each other, repeated ones,
    repeated ones whose energies differ (all of them), and energies and forces far outside of the others. The memory
    is 24 bytes per structure.

    Args:
        paths: Files to read.
        keys: Names of labels that differ from the usual ones.
        progress: Function that iterates over the structures and may show the progress.
        sample: Number of structures for the fit of energies by composition and for the search for wrong units: a
            random choice of this size.
    """
    reasons: dict[int, str] = {}
    examples: dict[str, str] = {}
    chosen: list[Frame] = []
    random = np.random.default_rng(0)
    same, energies, forces = [], [], []
    count = 0

    def leave_out(number: int, reason: str, example: str) -> None:
        reasons.setdefault(number, reason)
        examples.setdefault(reason, example)

    for number, entry in enumerate(progress(entries(paths, keys))):
        count += 1
        frame = entry.frame
        same.append(0 if frame is None else _identity(frame))
        energies.append(np.nan if frame is None or frame.energy is None else frame.energy / len(frame))
        forces.append(
            0.0 if frame is None or frame.forces is None else float(np.abs(frame.forces).max(initial=0.0))
        )
        if frame is None:
            leave_out(number, UNUSABLE, f"{entry.origin}: {entry.reason}")
        elif not is_labelled(entry):
            leave_out(number, UNLABELLED, entry.origin)
        elif (close := closest(frame)) is not None:
            leave_out(number, SHORT_DISTANCE, f"{entry.origin}: {close}")
        else:
            _reservoir(chosen, frame, sample, number, random)
    outside = _Outliers(chosen, np.array(forces))
    repeated = _repeated(np.array(same, dtype=np.uint64), np.array(energies))
    for number, entry in enumerate(entries(paths, keys)):
        if number in reasons or entry.frame is None:
            continue
        if number in repeated:
            leave_out(number, repeated[number], entry.origin)
        elif found := outside.reason(entry.frame):
            leave_out(number, found[0], f"{entry.origin}: {found[1]}")
    fitted = [frame for frame in chosen if not is_isolated_atom(frame)]
    return Checked(count, len(chosen), reasons, examples, warn_of_implausible_labels(fitted))


def closest(frame: Frame) -> str | None:
    """Describe the closest pair of atoms below half the sum of their covalent radii; None: there is none."""
    radii = covalent_radii[frame.atomic_numbers]
    try:
        graph = build_graph(
            frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, 2 * SHORT * radii.max()
        )
    except ValueError as error:
        return str(error)
    lengths = graph.edge_vectors().norm(dim=1).numpy()
    i, j = graph.source.numpy(), graph.destination.numpy()
    short = np.flatnonzero(lengths < SHORT * (radii[i] + radii[j]))
    if not len(short):
        return None
    k = int(short[lengths[short].argmin()])
    return f"atoms {min(i[k], j[k])} and {max(i[k], j[k])} are {lengths[k]:.3f} Å apart"


class _Outliers:
    """Limits of energies, relative to a fit by composition, and of forces."""

    def __init__(self, frames: Sequence[Frame], largest: np.ndarray):
        labelled = [f for f in frames if f.energy is not None and not is_isolated_atom(f)]
        self.references = np.full(119, np.nan)
        self.limit = np.inf
        if labelled:
            counts = element_counts(labelled)
            energies = np.array([f.energy for f in labelled], dtype=np.float64)
            fit = fit_composition(counts, energies)
            present = np.unique(np.concatenate([f.atomic_numbers for f in labelled]))
            self.references[present] = fit.energies
            self.limit = max(DEVIATION, QUARTILES * float(np.quantile(np.abs(fit.deviations), 0.75)))
        usual = float(np.median(largest[largest > 0])) if (largest > 0).any() else 0.0
        self.largest = min(HUGE_FORCE, max(LARGE_FORCE, MANY * usual))

    def reason(self, frame: Frame) -> tuple[str, str] | None:
        """Reason to leave a structure out, and the size of the deviation."""
        if frame.energy is not None and not is_isolated_atom(frame):
            deviation = (frame.energy - self.references[frame.atomic_numbers].sum()) / len(frame)
            if abs(deviation) > self.limit:  # false for an element that is in no structure of the sample
                return ENERGY, f"{deviation:+.4g} eV/atom from the fit by composition"
        if (
            frame.forces is not None
            and (largest := float(np.abs(frame.forces).max(initial=0.0))) > self.largest
        ):
            return FORCE, f"{largest:.4g} eV/Å"
        return None


def _identity(frame: Frame) -> int:
    """Digest of a structure; of equal ones it is the same."""
    found = hashlib.blake2b(digest_size=8)
    for array in (frame.positions, frame.cell):
        found.update((np.round(array, DIGITS) + 0.0).tobytes())  # + 0.0: -0 becomes 0
    found.update(frame.atomic_numbers.tobytes() + frame.pbc.tobytes())
    found.update(repr(sorted((str(k), str(v)) for k, v in frame.charge_spin.items())).encode())
    return int.from_bytes(found.digest(), "little") or 1


def _repeated(same: np.ndarray, energies: np.ndarray) -> dict[int, str]:
    """Numbers of repeated structures: all but the first, or all if their energies disagree."""
    order = np.argsort(same, kind="stable")
    ordered = same[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + np.uint64(1))).tolist()
    found = {}
    for a, b in zip(starts, [*starts[1:], len(order)], strict=True):
        if b - a < 2 or ordered[a] == 0:
            continue
        group = order[a:b]
        known = energies[group][np.isfinite(energies[group])]
        disagree = len(known) > 1 and np.ptp(known) > SAME_ENERGY
        for number in group.tolist() if disagree else group[1:].tolist():
            found[number] = DISAGREEING if disagree else DUPLICATE
    return found


def _reservoir(
    chosen: list[Frame], frame: Frame, size: int, number: int, random: np.random.Generator
) -> None:
    """Keep a random sample of a sequence of unknown length."""
    if len(chosen) < size:
        chosen.append(frame)
    elif (place := int(random.integers(number + 1))) < size:
        chosen[place] = frame
