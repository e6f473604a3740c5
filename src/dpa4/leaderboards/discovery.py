"""Discovery task of Matbench Discovery: stability of crystals, and relaxed structures compared with DFT.

The structures are relaxed by ``dpa4.simulation.screen``.
"""

import csv
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from dpa4.leaderboards import files, protocol
from dpa4.leaderboards.metrics import StabilityMetrics, discovery_metrics, mean_rmsd
from dpa4.output import new_figure, save_figure, write_csv, write_json
from dpa4.simulation.runs.shards import FinishedScreening
from dpa4.simulation.runs.store import Record, Records, RunState, run_items
from dpa4.system import require, user_path

PREDICTION = "e_form_per_atom"  # column of the predicted formation energy, eV/atom
DECIMALS = 4  # of energies per atom in discovery.csv, as on the leaderboard
COLUMNS = (
    "material_id", "formula", "energy", "corrected_energy", PREDICTION, "e_above_hull_pred", "rmsd", "converged",
    "steps", "error",
)  # fmt: skip


@dataclass(frozen=True)
class WBMRow:
    """DFT results for a crystal of the WBM test set."""

    formula: str
    e_form: float  # corrected as in the Materials Project, eV/atom
    e_above_hull: float  # of the Materials Project, eV/atom
    unique: bool  # True if it represents, within WBM, a prototype that the Materials Project lacks


@dataclass(frozen=True)
class DiscoveryScore:
    """Metrics of the leaderboard."""

    stability: dict[str, StabilityMetrics]  # for "full_test_set", "unique_prototypes", "most_stable_10k"
    rmsd: float  # mean, dimensionless
    structures: int
    relaxed: int  # with a prediction
    failed: int  # without a prediction
    differences: tuple[str, ...]  # between the settings and those of the leaderboard's runner


def score_structures(
    output: str | Path, data: str | Path, *, progress: bool = True
) -> tuple[RunState, DiscoveryScore | None]:
    """Compute formation energies, energies above the hull and RMSD of relaxed structures, and their metrics.

    The predicted energy and structure replace those of the DFT entry, ``MaterialsProject2020Compatibility`` corrects
    the energy, and the energies of the elements are subtracted. A crystal that was not relaxed, or whose energy
    cannot be corrected, is a missing prediction. The metrics refer to the structures of the run; they are comparable
    with the leaderboard only for the whole test set.

    Writes discovery.csv, summary.json and hull.png into ``output``. Scores are saved one by one in scores.jsonl.
    After an interruption, the same call continues the run.

    Args:
        output: Output folder of ``dpa4.simulation.screen.screen``. Each structure must have the ``material_id`` of a
            crystal of the test set.
        data: Folder of the published files.
        progress: Show a progress bar on a terminal.

    Returns:
        Numbers of scored and failed structures, and the metrics, which are None after an interruption.

    Raises:
        FileNotFoundError: If a file is missing, or the structures have not been relaxed.
        ImportError: If pymatgen is not installed.
        ValueError: If a structure is not in the WBM test set or occurs twice, a file cannot be read, or the folder
            holds scores of other settings.
    """
    folder = user_path(output)
    require("pymatgen.entries.compatibility", "bench")
    summary = read_summary(files.locate(data, files.WBM_SUMMARY))
    corrector = _Corrector(read_references(files.locate(data, files.MP_REFERENCES)))
    entries = files.locate(data, files.WBM_ENTRIES)
    run = FinishedScreening(folder)
    crystals = _by_name(run, summary)
    relaxed = {name: row for name, row in crystals.items() if row["frame"] == "True"}
    cell, pressure = run.settings["cell"], run.settings["pressure"]
    settings: Record = {
        "task": "discovery", **{name: run.settings[name] for name in ("model", "dtype", "precision")},
        "max_force": run.settings["fmax"], "max_steps": run.settings["steps"], "ase_optimizer": "FIRE",
        "cell_filter": "FrechetCellFilter" if cell == "full" and not pressure else f"{cell}, {pressure} GPa",
    }  # fmt: skip

    def compute(entry: Record, _: list[int]) -> Record:
        row = relaxed[entry["material_id"]]
        atoms, energy = run.atoms(int(row["structure"])), float(row["energy"])
        return corrector.score(atoms, energy, entry["computed_structure_entry"])

    with Records(folder, settings, name="scores") as scores:
        items = ((e["material_id"], e) for e in read_entries(entries) if e["material_id"] in relaxed)
        state = run_items(items, len(relaxed), compute, scores, title="formation energies", progress=progress)
        if state.interrupted:
            return state, None
        if lost := sorted(set(relaxed) - set(scores.names))[:3]:
            raise ValueError(f"{entries} has no entry of {', '.join(lost)}; download it again")
        rows = [
            _row(row, scores[name] if name in relaxed else None, summary[name])
            for name, row in crystals.items()
        ]
    score = _score(rows, summary, settings)
    _write(folder, rows, summary, score)
    return state, score


def _by_name(run: FinishedScreening, summary: Mapping[str, WBMRow]) -> dict[str, dict[str, str]]:
    """Rows of a run by ``material_id``."""
    rows: dict[str, dict[str, str]] = {}
    for row in run.rows:
        name = row["material_id"]
        if name not in summary:
            raise ValueError(
                f"structure {row['structure']} ({row['source']}) has the material_id {name!r}, which is not in the "
                "summary of the WBM test set"
            )
        if name in rows:
            raise ValueError(f"two structures have the material_id {name!r}; names must be unique")
        rows[name] = row
    return rows


def read_summary(path: Path) -> dict[str, WBMRow]:
    """Read the DFT results of the WBM test set, by ``material_id``.

    Raises:
        ValueError: If a column is missing.
    """
    columns = (
        "material_id",
        "formula",
        "e_form_per_atom_mp2020_corrected",
        "e_above_hull_mp2020_corrected_ppd_mp",
        "unique_prototype",
    )
    with files.open_published(path) as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it has {reader.fieldnames}")
        return {
            name: WBMRow(formula, float(e_form), float(e_above_hull), unique.lower() in ("true", "1"))
            for name, formula, e_form, e_above_hull, unique in (
                [row[column] for column in columns] for row in reader
            )
        }


def read_references(path: Path) -> dict[str, float]:
    """Read the energies of the elements in the Materials Project (eV/atom), rounded as on the leaderboard."""
    entry = require("pymatgen.entries.computed_entries", "bench").ComputedEntry
    return {
        element: round(entry.from_dict(found).energy_per_atom, 4)
        for element, found in files.read_json(path).items()
    }


def read_entries(path: Path) -> Iterator[Record]:
    """Yield the DFT entries of a file: ``material_id`` and ``computed_structure_entry``."""
    with files.open_published(path) as file:
        yield from map(json.loads, file)


def pymatgen_structure(atoms: Atoms) -> Any:
    """Convert a structure to pymatgen."""
    core = require("pymatgen.core", "bench")
    return core.Structure(
        core.Lattice(atoms.cell.array), atoms.numbers, atoms.positions, coords_are_cartesian=True
    )


class _Corrector:
    """Computes formation energies of relaxed crystals and their distances to the DFT structures."""

    def __init__(self, references: Mapping[str, float]):
        self.references = references
        self.entry = require("pymatgen.entries.computed_entries", "bench").ComputedStructureEntry
        self.scheme = require("pymatgen.entries.compatibility", "bench").MaterialsProject2020Compatibility()
        matcher = require("pymatgen.analysis.structure_matcher", "bench").StructureMatcher
        self.matcher = matcher(stol=1.0, scale=False)

    def score(self, atoms: Atoms, energy: float, dft: Record) -> Record:
        """Score a relaxed crystal.

        Args:
            atoms: Relaxed structure.
            energy: Predicted energy, in eV.
            dft: DFT entry of the crystal.

        Returns:
            ``corrected_energy`` (eV), ``e_form`` (eV/atom) and ``rmsd`` (None if the structures do not match).

        Raises:
            ValueError: If the compositions differ or pymatgen refuses the entry.
        """
        structure = pymatgen_structure(atoms)
        reference = self.entry.from_dict(dft)
        if structure.composition != reference.composition:
            raise ValueError(
                f"the structure is {structure.formula}, but the DFT entry is {reference.formula}"
            )
        entry = self.entry(structure, energy, parameters=reference.parameters, data=reference.data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every alloy, about guessed oxidation states
            processed = self.scheme.process_entries([entry], clean=True)
        if not processed:
            raise ValueError("MaterialsProject2020Compatibility refuses the entry")
        corrected = float(processed[0].energy)
        composition = structure.composition.get_el_amt_dict()
        elements = sum(amount * self.references[element] for element, amount in composition.items())
        distance = self.matcher.get_rms_dist(structure, reference.structure)
        return {
            "corrected_energy": corrected,
            "e_form": (corrected - elements) / len(structure),
            "rmsd": None if distance is None else float(distance[0]),
        }


def _row(row: Mapping[str, str], score: Record | None, dft: WBMRow) -> Record:
    """Row of discovery.csv, from the row of the relaxation and, for a relaxed crystal, its score."""
    line: Record = {
        "material_id": row["material_id"],
        "formula": dft.formula,
        "energy": row["energy"] or None,
    }
    line |= {"converged": row["status"] == "converged", "steps": row["steps"]}
    if score is None:
        return line | {"error": f"{row['status']}: {row['reason']}"}
    if "error" in score:
        return line | {"error": score["error"]}
    e_form = round(score["e_form"], DECIMALS)
    return line | {
        "corrected_energy": score["corrected_energy"],
        PREDICTION: e_form,
        "e_above_hull_pred": round(dft.e_above_hull + e_form - dft.e_form, DECIMALS),
        "rmsd": score["rmsd"],
    }


def _score(
    rows: Sequence[Record], summary: Mapping[str, WBMRow], settings: Mapping[str, Any]
) -> DiscoveryScore:
    dft = [summary[row["material_id"]] for row in rows]
    predicted = np.array([row.get(PREDICTION, np.nan) for row in rows], dtype=float)
    stability = discovery_metrics(
        [d.e_above_hull for d in dft], [d.e_form for d in dft], predicted, [d.unique for d in dft]
    )
    differences = protocol.differences(settings, protocol.DISCOVERY)
    if len(rows) < len(summary):
        differences += (f"{len(rows)} crystals (the whole test set: {len(summary)})",)
    failed = int(np.isnan(predicted).sum())
    return DiscoveryScore(
        stability=stability,
        rmsd=mean_rmsd(np.array([row.get("rmsd") for row in rows], dtype=float)),
        structures=len(rows),
        relaxed=len(rows) - failed,
        failed=failed,
        differences=differences,
    )


def _write(
    folder: Path, rows: Sequence[Record], summary: Mapping[str, WBMRow], score: DiscoveryScore
) -> None:
    write_csv(folder / "discovery.csv", COLUMNS, rows)
    write_json(folder / "summary.json", asdict(score))
    pairs = [
        (summary[row["material_id"]].e_above_hull, row["e_above_hull_pred"])
        for row in rows
        if "e_above_hull_pred" in row
    ]
    figure = new_figure(5, 5)
    axis = figure.subplots()
    if pairs:
        axis.plot(*zip(*pairs, strict=True), ".", markersize=2, alpha=0.5)
    axis.axline((0, 0), slope=1, color="0.5", linewidth=1)
    axis.axhline(0, color="0.7", linewidth=0.8)
    axis.axvline(0, color="0.7", linewidth=0.8)
    axis.set_xlabel("energy above the hull, DFT (eV/atom)")
    axis.set_ylabel("energy above the hull, predicted (eV/atom)")
    axis.grid(alpha=0.3)
    save_figure(figure, folder / "hull.png")
