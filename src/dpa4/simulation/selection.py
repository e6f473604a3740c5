"""Selection of structures to label: those on which a committee disagrees, far from each other in its features."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from dpa4.data import check_elements, frame_from_atoms, write_structures
from dpa4.data.writers import without_labels
from dpa4.output import OutputFolder, atomic_write, new_figure, save_figure, write_csv
from dpa4.potential import Potential, embeddings
from dpa4.potential.committee import add_deviations, largest_force_deviation
from dpa4.potential.descriptors import bare_structure
from dpa4.system import own_settings, user_path
from dpa4.training.errors import FramePrediction
from dpa4.training.evaluation import batches_for, predict_committee

Values = NDArray[np.float64]

COLUMNS = ("structure", "source", "formula", "energy_std", "max_force_std", "rank", "distance")

SAME = 1e-5
"""Largest distance of copies, relative to the largest feature vector: rounding in float32."""


@dataclass(frozen=True)
class Selection:
    """Structures selected from candidates.

    Attributes:
        chosen: Index of each selected structure, in the order of selection.
        distances: Distance of each of them from the nearest structure selected before or known. The first one of a
            selection without known structures has none: infinity.
        deviations: Largest deviation of the force on an atom of every candidate, (n,) in eV/Angstrom; None for a
            single model.
        candidates: Number of candidates between the limits of the deviation.
    """

    chosen: list[int]
    distances: list[float]
    deviations: Values | None
    candidates: int


@own_settings
def select(
    structures: Sequence[Atoms],
    potentials: Sequence[Potential],
    output: str | Path,
    *,
    number: int,
    above: float = 0.0,
    below: float = np.inf,
    known: Sequence[Atoms] = (),
    sources: Sequence[str] | None = None,
    max_atoms: int = 2000,
) -> Selection:
    """Select structures to label, by the deviation of a committee and by diversity.

    Farthest-point selection, weighted by the deviation: the next structure is the one with the largest product of its
    deviation and its distance from the nearest structure that is selected or known. The deviation of a structure is
    the largest deviation of the force on an atom. Its features are the mean of the embeddings of its atoms by the
    first model, see ``dpa4.potential.embeddings``. With a single model, the distance alone decides.

    Files written to ``output``:

    * selected.xyz: selected structures, in the order of selection, with the standard deviations of the committee and
      ``selected_from``, but without energies and forces, so that predictions are not mistaken for labels.
    * selection.csv: a row for each candidate.
    * selection.png: deviations, and a map of the candidates.

    Args:
        structures: Candidates, such as the frames of a trajectory.
        potentials: Members of the committee, or a single potential, on the device to compute on.
        output: Output folder, created if absent; files of an earlier selection are replaced.
        number: Number of structures to select. Fewer are selected if there are fewer different candidates.
        above: Smallest deviation of a candidate, in eV/Angstrom.
        below: Largest deviation of a candidate, in eV/Angstrom, to leave out structures that are not physical.
        known: Structures with labels, from which the selected ones are to differ as well.
        sources: Source of each candidate, for the table.
        max_atoms: Maximum number of atoms evaluated at once.

    Returns:
        The selection.

    Raises:
        BlockingIOError: If another process is working in the folder.
        ValueError: If an argument is not allowed, a structure cannot be evaluated, or no candidate is between the
            limits.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    if not 0 <= above < below:
        raise ValueError(f"above = {above} must be at least 0 and less than below = {below} eV/Angstrom")
    if len(potentials) == 1 and (above > 0 or below < np.inf):
        raise ValueError(
            "above and below limit the deviation of a committee, but there is one model; give several"
        )
    if not structures:
        raise ValueError("there are no structures to select from")
    folder = user_path(output)
    with OutputFolder(folder):
        predictions = _predictions(structures, potentials, max_atoms)
        deviations = _largest(predictions)
        features = _features(potentials[0], [*structures, *known], max_atoms)
        weights = np.ones(len(structures)) if deviations is None else deviations
        allowed = np.isfinite(weights) & (weights >= above) & (weights <= below)
        if not allowed.any():
            raise ValueError(
                f"none of {len(structures)} structures has a deviation between {above:g} and {below:g} eV/Angstrom; "
                f"they are {np.nanmin(weights):.3g} to {np.nanmax(weights):.3g}"
            )
        own, others = features[: len(structures)], features[len(structures) :]
        chosen, distances = farthest_points(own, np.where(allowed, weights, 0.0), number, others)
        result = Selection(chosen, distances, deviations, int(allowed.sum()))
        _write(folder, structures, predictions, result, sources)
        _plot(folder / "selection.png", result, own, others, above, below)
    return result


def farthest_points(
    features: Values, weights: Values, number: int, known: Values | None = None
) -> tuple[list[int], list[float]]:
    """Select points one by one, each with the largest product of weight and distance from the nearest one before.

    Args:
        features: Points, (n, C).
        weights: Weight of each point, (n,); points of weight 0 are not selected.
        number: Maximum number of points.
        known: Points from which the distances count as well, (m, C).

    Returns:
        Indices of the points, and the distance of each from the nearest point before; infinity for the first one if
        none is known. Copies of selected points are not selected, so there may be fewer than ``number``.
    """
    nearest = np.full(len(features), np.inf)
    copy = SAME * np.linalg.norm(features, axis=1).max()
    for point in [] if known is None else known:
        nearest = np.minimum(nearest, np.linalg.norm(features - point, axis=1))
    chosen: list[int] = []
    distances: list[float] = []
    while len(chosen) < min(number, len(features)):
        # Without any distance yet, the weight alone decides.
        score = weights * np.where(nearest > copy, nearest if np.isfinite(nearest).all() else 1.0, 0.0)
        best = int(score.argmax())
        if score[best] <= 0:
            break
        chosen.append(best)
        distances.append(float(nearest[best]))
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
    return chosen, distances


def _predictions(
    structures: Sequence[Atoms], potentials: Sequence[Potential], max_atoms: int
) -> list[FramePrediction]:
    """Predictions of a committee; [] for a single model, of which only the features are used."""
    if len(potentials) == 1:
        return []
    frames = [frame_from_atoms(bare_structure(a), origin=f"structure {i}") for i, a in enumerate(structures)]
    for potential in potentials:
        check_elements(frames, potential.elements)
    return predict_committee(potentials, batches_for(potentials, frames, max_atoms).batches(0))


def _largest(predictions: Iterable[FramePrediction]) -> Values | None:
    """Largest deviation of the force on an atom of each structure, (n,) in eV/Angstrom; None for a single model."""
    found = [largest_force_deviation(p.deviation.forces) for p in predictions if p.deviation is not None]
    return np.array(found) if found else None


def _features(potential: Potential, structures: Sequence[Atoms], max_atoms: int) -> Values:
    """Mean of the embeddings of the atoms of each structure, (n, C)."""
    found = embeddings(potential, structures, max_atoms=max_atoms)
    return np.stack([one.mean(axis=0) for one in found]).astype(np.float64)


def _write(
    folder: Path,
    structures: Sequence[Atoms],
    predictions: Sequence[FramePrediction],
    result: Selection,
    sources: Sequence[str] | None,
) -> None:
    """Write selected.xyz and selection.csv."""
    ranks = {index: rank for rank, index in enumerate(result.chosen, start=1)}
    rows: list[dict[str, Any]] = []
    for index, atoms in enumerate(structures):
        row = {"structure": index, "source": "" if sources is None else sources[index]}
        row |= {"formula": atoms.get_chemical_formula(), "rank": ranks.get(index)}
        if predictions and (spread := predictions[index].deviation) is not None:
            row |= {"energy_std": spread.energy, "max_force_std": largest_force_deviation(spread.forces)}
        if index in ranks and np.isfinite(distance := result.distances[ranks[index] - 1]):
            row["distance"] = distance
        rows.append(row)
    write_csv(folder / "selection.csv", COLUMNS, rows)
    frames = []
    for index in result.chosen:
        frame = structures[index].copy()
        frame.info, frame.arrays = without_labels(frame.info), without_labels(frame.arrays)
        frame.info["selected_from"] = rows[index]["source"] or f"structure {index}"
        if predictions and (spread := predictions[index].deviation) is not None:
            add_deviations(frame, energy_std=spread.energy, forces_std=spread.forces)
        frames.append(frame)
    with atomic_write(folder / "selected.xyz") as temporary:
        write_structures(temporary, frames)


def _plot(path: Path, result: Selection, features: Values, known: Values, above: float, below: float) -> None:
    """Plot the deviation of each candidate, and all candidates along the two axes of largest variance."""
    panels = 1 if result.deviations is None else 2
    figure = new_figure(5.2 * panels, 4.4)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    chosen = result.chosen
    ring = {"facecolors": "none", "edgecolors": "C3", "s": 45, "linewidths": 1.2}
    if result.deviations is not None:
        axes[0].plot(result.deviations, ".", color="C0", markersize=4)
        axes[0].scatter(chosen, result.deviations[chosen], **ring, label=f"{len(chosen)} selected", zorder=3)
        for limit in (above, below):
            if 0 < limit < np.inf:
                axes[0].axhline(limit, color="0.5", linewidth=1, linestyle="--")
        top = 1.1 * float(result.deviations[np.isfinite(result.deviations)].max())  # whatever the limits are
        axes[0].set(xlabel="structure", ylabel="largest force deviation (eV/Å)", ylim=(0, top or None))
        axes[0].grid(alpha=0.3)
        axes[0].legend()
    centre = features.mean(axis=0)
    directions = np.linalg.svd(features - centre, full_matrices=False)[2][:2]
    place = np.zeros((len(features), 2))
    place[:, : len(directions)] = (features - centre) @ directions.T
    colours = {} if result.deviations is None else {"c": result.deviations, "cmap": "viridis"}
    points = axes[-1].scatter(*place.T, s=10, linewidths=0, **colours)
    if len(known):
        at = np.zeros((len(known), 2))
        at[:, : len(directions)] = (known - centre) @ directions.T
        axes[-1].plot(*at.T, "+", color="0.5", markersize=5, label="known", zorder=0)
    axes[-1].scatter(*place[chosen].T, **ring, label="selected")
    axes[-1].set(xlabel="features, first principal axis", ylabel="second principal axis")
    axes[-1].legend()
    if result.deviations is not None:
        figure.colorbar(points, ax=axes[-1], label="largest force deviation (eV/Å)")
    save_figure(figure, path)
