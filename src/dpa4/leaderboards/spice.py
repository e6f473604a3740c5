"""SPICE-MACE-OFF tables: errors of a labelled test set by subset, and their logarithmic mean."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from dpa4.data import EpochBatches, Frame, FrameDataset, charges_and_spins, check_elements
from dpa4.data.dataset import Budget, pack
from dpa4.leaderboards.metrics import log_mean
from dpa4.output import new_figure, save_figure, write_csv, write_json
from dpa4.potential import Potential, fingerprint_of
from dpa4.simulation.runs.store import Record, Records, RunState, read_settings, run_items
from dpa4.system import user_path
from dpa4.training.evaluation import label_pairs, predict

BATCH = "batch"


class SubsetErrors(NamedTuple):
    """Mean absolute errors in a subset."""

    subset: str
    structures: int
    energy: float  # meV/atom; mean over structures
    forces: float  # meV/Angstrom; mean over components


@dataclass(frozen=True)
class SpiceScore:
    """Errors by subset, and their logarithmic means."""

    subsets: tuple[SubsetErrors, ...]
    energy: float  # logarithmic mean, meV/atom
    forces: float  # logarithmic mean, meV/Angstrom

    def to_rich(self) -> Table:
        """Table for the terminal."""
        table = Table("subset", title="Mean absolute errors")
        for column in ("structures", "energy (meV/atom)", "forces (meV/Å)"):
            table.add_column(column, justify="right")
        for row in self.subsets:
            end = row is self.subsets[-1]
            table.add_row(
                row.subset, str(row.structures), f"{row.energy:.3f}", f"{row.forces:.3f}", end_section=end
            )
        table.add_row("log mean", "", f"{self.energy:.3f}", f"{self.forces:.3f}")
        return table


def run_spice(
    potential: Potential,
    frames: Sequence[Frame],
    output: str | Path,
    *,
    max_atoms: int = 2000,
    progress: bool = True,
) -> RunState:
    """Compute the errors of every structure of a test set.

    The errors of every batch are saved in ``output``/results.jsonl at once. After an interruption, the same call
    continues.

    Args:
        potential: Potential, on the device to use.
        frames: Structures with energies and forces; ``group`` is the subset.
        output: Output folder, created if absent.
        max_atoms: Maximum number of atoms per batch.
        progress: Show a progress bar on a terminal.

    Returns:
        Numbers of finished and failed batches.

    Raises:
        ValueError: If a structure lacks a label or has an element outside the model, or the folder holds results of
            other settings.
    """
    for frame in frames:
        if frame.energy is None or frame.forces is None:
            raise ValueError(f"{frame.origin} lacks {'energy' if frame.energy is None else 'forces'}")
    check_elements(frames, potential.elements)
    config = potential.config
    pairs = charges_and_spins(frames, config.charge_spin, config.default_charge_spin)
    settings = {
        "task": "spice",
        **fingerprint_of(potential),
        "max_atoms": max_atoms,
        "structures": len(frames),
    }

    def compute(indices: list[int], _: list[int]) -> Record:
        part = [frames[i] for i in indices]
        own = None if pairs is None else [pairs[i] for i in indices]
        dataset = FrameDataset(part, config.cutoff, own)
        predictions = predict(potential, EpochBatches(dataset, max_atoms=max_atoms, shuffle=False).batches(0))
        errors = [
            {name: np.abs(value - label) for name, (label, value) in label_pairs(frame, prediction).items()}
            for frame, prediction in zip(part, predictions, strict=True)
        ]
        return {
            "structure": indices,
            "subset": [frame.group for frame in part],
            "atoms": [len(frame) for frame in part],
            "energy": [float(e["energy per atom"][0]) for e in errors],  # eV/atom
            "forces": [float(e["forces"].mean()) for e in errors],  # eV/Angstrom
        }

    atoms = np.array([len(frame) for frame in frames])
    batches = pack(range(len(frames)), [Budget("atoms", atoms, max_atoms)])
    with Records(user_path(output), settings) as records:
        items = ((f"{BATCH} {number}", indices) for number, indices in enumerate(batches))
        return run_items(items, len(batches), compute, records, title="errors", progress=progress)


def score_spice(output: str | Path) -> SpiceScore:
    """Average the errors in a folder by subset, and compute the logarithmic means over the subsets.

    Writes errors.csv, structures.csv, summary.json and errors.png into the folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a batch failed, or the error of a subset is zero, which has no logarithm.
    """
    folder = user_path(output)
    rows: list[Record] = []
    with Records(folder, read_settings(folder)) as records:
        for record in records:
            if "error" in record:
                raise ValueError(f"{record['id']} failed: {record['error']}; run the command again")
            columns = ("structure", "subset", "atoms", "energy", "forces")
            rows += [
                dict(zip(columns, v, strict=True)) for v in zip(*(record[c] for c in columns), strict=True)
            ]
    subsets = []
    for subset in dict.fromkeys(row["subset"] for row in rows):
        part = [row for row in rows if row["subset"] == subset]
        energy = np.mean([row["energy"] for row in part])
        forces = np.average([row["forces"] for row in part], weights=[row["atoms"] for row in part])
        subsets.append(SubsetErrors(subset, len(part), 1e3 * float(energy), 1e3 * float(forces)))
    score = SpiceScore(
        tuple(subsets), log_mean([s.energy for s in subsets]), log_mean([s.forces for s in subsets])
    )
    write_csv(folder / "structures.csv", list(rows[0]), rows)
    last = {"subset": "log mean", "structures": len(rows), "energy": score.energy, "forces": score.forces}
    write_csv(folder / "errors.csv", list(SubsetErrors._fields), [*(s._asdict() for s in subsets), last])
    write_json(folder / "summary.json", asdict(score) | {"subsets": [s._asdict() for s in subsets]})
    _plot(score, folder / "errors.png")
    return score


def _plot(score: SpiceScore, path: Path) -> None:
    names = [s.subset for s in score.subsets]
    figure = new_figure(8, 1.2 + 0.35 * len(names))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, quantity, unit in zip(panels, ("energy", "forces"), ("meV/atom", "meV/Å"), strict=True):
        panel.barh(names, [getattr(s, quantity) for s in score.subsets])
        panel.axvline(getattr(score, quantity), color="0.3", linewidth=1, linestyle="--")
        panel.set_xlabel(f"MAE of the {quantity} ({unit}); dashed: log mean")
        panel.grid(alpha=0.3)
    save_figure(figure, path)
