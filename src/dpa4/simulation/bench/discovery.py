"""Matbench Discovery: relax crystals, tell stable ones from unstable ones, compare structures with those of DFT."""

import csv
import gzip
import io
import json
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from dpa4.simulation.bench import files
from dpa4.simulation.bench.metrics import StabilityMetrics, discovery_metrics, mean_rmsd
from dpa4.simulation.calculator import identify_calculator
from dpa4.simulation.records import (
    Interrupted,
    Progressed,
    Record,
    Records,
    read_settings,
    run_items,
    write_csv,
    write_json,
)
from dpa4.simulation.relax import relax
from dpa4.system import new_figure, require, save_figure

PREDICTION = "e_form_per_atom_dpa4"  # column of the predicted formation energy, eV/atom
COLUMNS = (
    *("material_id", "formula", "energy", "corrected_energy", PREDICTION, "e_above_hull_pred", "rmsd"),
    *("converged", "steps", "error"),
)


@dataclass(frozen=True)
class WBMRow:
    """What DFT says about a crystal of the WBM test set."""

    formula: str
    e_form: float  # corrected as in the Materials Project, eV/atom
    e_above_hull: float  # of the Materials Project, eV/atom
    unique: bool  # the prototype occurs once in WBM and not in the Materials Project


@dataclass(frozen=True)
class DiscoveryScore:
    """Metrics of the leaderboard."""

    stability: dict[str, StabilityMetrics]  # by subset, see metrics.SUBSETS
    rmsd: float  # mean, without unit
    structures: int
    failed: int


def read_structures(path: Path) -> tuple[int, Iterator[tuple[str, Atoms]]]:
    """Number of structures of a file, and these with their names.

    The name is ``atoms.info["material_id"]``, else the name of the file in a zip archive, else the number of the
    structure. Archives hold one extended XYZ file per structure and are read one by one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or holds no structure.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        members = [name for name in archive.namelist() if name.endswith((".extxyz", ".xyz"))]
        if not members:
            raise ValueError(f"{path} holds no .extxyz file")
        return len(members), (_named(_member(archive, name), Path(name).stem) for name in members)
    try:
        images = ase.io.read(path, index=":")
    except Exception as error:  # ASE's readers raise errors of every kind
        raise ValueError(f"{path} cannot be read by ASE: {type(error).__name__}: {error}") from error
    if not images:
        raise ValueError(f"{path} holds no structure")
    return len(images), (_named(atoms, str(number)) for number, atoms in enumerate(images))


def relax_structures(
    structures: Iterator[tuple[str, Atoms]] | Sequence[tuple[str, Atoms]],
    total: int,
    calculator: Calculator,
    output: str | Path,
    *,
    fmax: float = 0.02,
    steps: int = 500,
    part: tuple[int, int] = (1, 1),
    model: str = "",
    progress: bool = True,
) -> Progressed:
    """Relax positions and cells with FIRE and ``FrechetCellFilter``, every structure from where it is.

    Keeps every result in ``output``/results.jsonl as it comes. The same call goes on after an interruption and
    tries failed structures again. Several processes may share the folder, each with a part of the structures.

    Args:
        structures: Names and structures, periodic along all three axes.
        total: Number of structures.
        calculator: ASE calculator.
        output: Folder, made if absent.
        fmax: Largest force, eV/Angstrom, see ``dpa4.simulation.relax``. The leaderboard's runner has 0.05.
        steps: Most steps per structure. A structure that needs more counts as it is.
        part: (i, n): every n-th structure from the i-th, counted from 1.
        model: Name of the model, if it is none of dpa4; a folder of results of another model is refused.
        progress: Show a progress bar on a terminal.

    Raises:
        ValueError: If an argument is not allowed, or the folder holds results of other settings.
    """
    first, parts = part
    if not 1 <= first <= parts:
        raise ValueError(f"part must be i/n with 1 <= i <= n, got {first}/{parts}")
    settings = {
        "task": "discovery", "model": model, **identify_calculator(calculator),
        "max_force": float(fmax), "max_steps": steps,
        "ase_optimizer": "FIRE", "cell_filter": "FrechetCellFilter",
    }  # fmt: skip

    def compute(atoms: Atoms, _: list[int]) -> Record:
        atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        result = relax(atoms, calculator, fmax=fmax, steps=steps, optimizer="fire", cell="full")
        if result.interrupted:
            raise Interrupted
        if not np.isfinite(result.energy):
            raise ValueError(f"the energy is {result.energy} eV")
        return {
            "formula": atoms.get_chemical_formula(),
            "energy": result.energy,
            "converged": result.converged,
            "steps": result.steps,
            "numbers": atoms.numbers,
            "cell": atoms.cell.array,
            "positions": atoms.positions,
        }

    ending = "" if parts == 1 else f"-{first}-of-{parts}"
    chosen = (item for number, item in enumerate(structures) if number % parts == first - 1)
    mine = len(range(first - 1, total, parts))
    with Records(Path(output), settings, part=ending) as records:
        return run_items(chosen, mine, compute, records, title="relaxing", progress=progress)


def score_structures(
    output: str | Path, data: str | Path, *, progress: bool = True
) -> tuple[Progressed, DiscoveryScore | None]:
    """Formation energies, energies above the hull and RMSD of relaxed structures, and the metrics of all of them.

    The predicted energy and structure replace those of the DFT entry, ``MaterialsProject2020Compatibility`` corrects
    the energy, and the energies of the elements are subtracted. A crystal that failed is a missing prediction.
    Metrics refer to the structures that were relaxed, which for those of the leaderboard must be the whole test set.

    Writes discovery.csv, summary.json and hull.png into ``output``, and keeps scores in scores.jsonl.

    Args:
        output: Folder of ``relax_structures``.
        data: Folder of the published files.
        progress: Show a progress bar on a terminal.

    Returns:
        How far it came, and the metrics; None after an interruption.

    Raises:
        FileNotFoundError: If a file is missing.
        ImportError: If pymatgen is not installed.
        ValueError: If a structure is not one of the WBM test set, a file cannot be read, or a formation energy
            cannot be computed.
    """
    folder = Path(output)
    require("pymatgen.entries.compatibility", "bench")
    summary = read_summary(files.locate(data, files.WBM_SUMMARY))
    references = read_references(files.locate(data, files.MP_REFERENCES))
    entries = files.locate(data, files.WBM_ENTRIES)
    settings = read_settings(folder)
    with Records(folder, settings) as relaxed, Records(folder, settings, name="scores") as scores:
        if unknown := sorted(set(relaxed.names) - set(summary))[:3]:
            raise ValueError(f"{', '.join(unknown)} are not in the summary of the WBM test set")
        corrector = _Corrector(references)

        def compute(entry: Record, _: list[int]) -> Record:
            return corrector.score(relaxed[entry["material_id"]], entry["computed_structure_entry"])

        wanted = ((e["material_id"], e) for e in read_entries(entries) if e["material_id"] in relaxed.done)
        state = run_items(
            wanted, len(relaxed.done), compute, scores, title="formation energies", progress=progress
        )
        if state.interrupted:
            return state, None
        if state.failed:
            raise ValueError(f"{state.failed} formation energies failed; the first: {state.reason}")
        if lost := sorted(relaxed.done - set(scores.names))[:3]:
            raise ValueError(f"{entries} has no entry of {', '.join(lost)}; download it again")
        rows = {record["id"]: _row(record, scores, summary[record["id"]]) for record in relaxed}
    score = _score(rows, summary)
    _write(folder, rows, summary, score)
    return state, score


def read_summary(path: Path) -> dict[str, WBMRow]:
    """The table of the WBM test set by name.

    Raises:
        ValueError: If a column is missing.
    """
    columns = ("material_id", "formula", "e_form_per_atom_mp2020_corrected",
               "e_above_hull_mp2020_corrected_ppd_mp", "unique_prototype")  # fmt: skip
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it has {reader.fieldnames}")
        return {
            row[columns[0]]: WBMRow(row[columns[1]], float(row[columns[2]]), float(row[columns[3]]),
                                    row[columns[4]].lower() in ("true", "1"))
            for row in reader
        }  # fmt: skip


def read_references(path: Path) -> dict[str, float]:
    """Energy of every element in the Materials Project, in eV/atom, to four decimals as the leaderboard has them."""
    entry = require("pymatgen.entries.computed_entries", "bench").ComputedEntry
    return {
        element: round(entry.from_dict(found).energy_per_atom, 4)
        for element, found in files.read_json(path).items()
    }


def read_entries(path: Path) -> Iterator[Record]:
    """Lines of the file of DFT entries: ``material_id`` and ``computed_structure_entry``."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def pymatgen_structure(record: Record) -> Any:
    """The relaxed structure of a record."""
    core = require("pymatgen.core", "bench")
    return core.Structure(
        core.Lattice(record["cell"]), record["numbers"], record["positions"], coords_are_cartesian=True
    )


class _Corrector:
    """Formation energy and distance to the DFT structure of one crystal after another."""

    def __init__(self, references: dict[str, float]):
        self.references = references
        self.entry = require("pymatgen.entries.computed_entries", "bench").ComputedStructureEntry
        self.scheme = require("pymatgen.entries.compatibility", "bench").MaterialsProject2020Compatibility()
        matcher = require("pymatgen.analysis.structure_matcher", "bench").StructureMatcher
        self.matcher = matcher(stol=1.0, scale=False)

    def score(self, record: Record, dft: Record) -> Record:
        structure = pymatgen_structure(record)
        reference = self.entry.from_dict(dft)
        if structure.composition != reference.composition:
            raise ValueError(f"the structure is {structure.formula}, that of DFT {reference.formula}")
        entry = self.entry(
            structure, record["energy"], parameters=reference.parameters, data=reference.data,
            entry_id=record["id"],
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that oxidation states are guessed, once for every alloy
            processed = self.scheme.process_entries([entry], clean=True)
        if not processed:
            raise ValueError("MaterialsProject2020Compatibility refuses the entry")
        energy = float(processed[0].energy)
        composition = structure.composition.get_el_amt_dict()
        elements = sum(amount * self.references[element] for element, amount in composition.items())
        distance = self.matcher.get_rms_dist(structure, reference.structure)
        return {
            "corrected_energy": energy,
            "e_form": (energy - elements) / len(structure),
            "rmsd": None if distance is None else float(distance[0]),
        }


def _named(atoms: Atoms, default: str) -> tuple[str, Atoms]:
    return str(atoms.info.get("material_id", default)), atoms


def _member(archive: zipfile.ZipFile, name: str) -> Atoms:
    return next(ase.io.iread(io.StringIO(archive.read(name).decode()), format="extxyz"))


def _row(record: Record, scores: Records, dft: WBMRow) -> Record:
    """A line of discovery.csv."""
    score = scores[record["id"]] if record["id"] in scores and "error" not in record else {}
    row: Record = {name: record.get(name) for name in ("formula", "energy", "converged", "steps")}
    row |= {"material_id": record["id"], "error": record.get("error") or score.get("error")}
    row["formula"] = dft.formula
    if "e_form" in score:
        e_form = round(score["e_form"], 4)
        row |= {"corrected_energy": score["corrected_energy"], PREDICTION: e_form, "rmsd": score["rmsd"]}
        row["e_above_hull_pred"] = round(dft.e_above_hull + e_form - dft.e_form, 4)
    return row


def _score(rows: dict[str, Record], summary: dict[str, WBMRow]) -> DiscoveryScore:
    dft = [summary[name] for name in rows]
    predicted = np.array([row.get(PREDICTION, np.nan) for row in rows.values()], dtype=float)
    stability = discovery_metrics(
        [d.e_above_hull for d in dft], [d.e_form for d in dft], predicted, [d.unique for d in dft]
    )
    rmsd = mean_rmsd(np.array([row.get("rmsd") for row in rows.values()], dtype=float))
    return DiscoveryScore(stability, rmsd, len(rows), int(np.isnan(predicted).sum()))


def _write(folder: Path, rows: dict[str, Record], summary: dict[str, WBMRow], score: DiscoveryScore) -> None:
    write_csv(folder / "discovery.csv", COLUMNS, rows.values())
    write_json(folder / "summary.json", asdict(score))
    pairs = [
        (summary[n].e_above_hull, row["e_above_hull_pred"])
        for n, row in rows.items()
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
