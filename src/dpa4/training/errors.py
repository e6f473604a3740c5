"""Errors of predictions: per structure, per group of structures, and the structures with the largest ones."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from dpa4.data import Frame
from dpa4.data.frame import file_of
from dpa4.output import atomic_write, short, wrapped, wrapped_path, write_csv

TOTAL = "all"
LabelPair = tuple[NDArray[np.float64], NDArray[np.float64]]  # label, prediction


class FrameDeviation(NamedTuple):
    """Standard deviations over the members of a committee for one structure, in float64."""

    energy: float  # eV
    forces: NDArray[np.float64]  # (N, 3), eV/Angstrom
    virial: NDArray[np.float64]  # (3, 3), eV


class FramePrediction(NamedTuple):
    """Prediction for one structure, in float64."""

    energy: float  # eV
    forces: NDArray[np.float64]  # (N, 3), eV/Angstrom
    virial: NDArray[np.float64]  # (3, 3), eV, -dE/dstrain
    deviation: FrameDeviation | None = None  # of a committee, whose mean the prediction then is


class Quantity(NamedTuple):
    """Quantity of an error table and its unit."""

    name: str
    unit: str
    scale: float  # factor from eV and Angstrom to the unit


QUANTITIES = (
    Quantity("energy per atom", "meV/atom", 1e3),
    Quantity("energy", "meV", 1e3),
    Quantity("forces", "meV/Å", 1e3),
    Quantity("virial per atom", "meV/atom", 1e3),
    Quantity("stress", "meV/Å³", 1e3),
)


_SHOWN = ("energy per atom", "forces", "stress")  # in the table of the terminal and in parity plots
_GROUP_WIDTH = 24  # characters of a line with the name of a group, so that three quantities fit beside it
_PLACE_WIDTH = 18  # the same for each of file and group in the table of the worst structures
_RANKED = ("energy per atom", "forces", "virial per atom")


class ErrorRow(NamedTuple):
    """Errors of one quantity in one group of structures; forces, virial and stress are compared by component."""

    group: str
    quantity: str
    unit: str
    values: int  # number of labels, or of their components
    mae: float
    rmse: float
    maximum: float


class WorstStructure(NamedTuple):
    """Structure with large errors.

    ``ratio`` is the error of ``quantity`` over its RMSE in all structures. For forces and virial, the error of a
    structure is the RMSE of its components.
    """

    rank: int
    file: str
    frame: str
    group: str
    atoms: int
    quantity: str
    ratio: float
    energy_error: float | None  # prediction - label, meV/atom
    forces_rmse: float | None  # meV/Angstrom
    forces_maximum: float | None  # largest error of a component, meV/Angstrom
    virial_rmse: float | None  # meV/atom
    number: int  # among the evaluated structures, from 0


class ErrorTable(NamedTuple):
    """Errors of all labelled quantities, per group and for all structures.

    ``worst`` holds the structures with the largest errors, worst first, if they were looked for.
    """

    rows: tuple[ErrorRow, ...]
    worst: tuple[WorstStructure, ...] = ()

    def row(self, quantity: str, group: str = TOTAL) -> ErrorRow | None:
        """Errors of a quantity in a group; None if it has no labels."""
        return next((r for r in self.rows if (r.group, r.quantity) == (group, quantity)), None)

    def to_rich(self) -> Table:
        """Format as a table of one row per group for a terminal of 80 columns, with MAE and RMSE of each quantity."""
        found = {(r.group, r.quantity): r for r in self.rows}
        names = {name for _, name in found}
        shown = [q for q in QUANTITIES if q.name in names and q.name in _SHOWN]
        if "stress" not in names:
            shown += [q for q in QUANTITIES if q.name == "virial per atom" and q.name in names]
        table = _open_table("group")
        for quantity in shown:
            for kind in ("MAE", "RMSE"):
                head = f"{quantity.name.removesuffix(' per atom')}\n{kind}\n{quantity.unit}"
                table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
        groups = list(dict.fromkeys(group for group, _ in found))
        for group in groups:
            rows = [found.get((group, q.name)) for q in shown]
            errors = [e for r in rows for e in ((None, None) if r is None else (r.mae, r.rmse))]
            last = [group] == groups[-2:-1]  # a line before the total
            name = escape(wrapped(group, _GROUP_WIDTH))
            table.add_row(name, *("-" if e is None else short(e) for e in errors), end_section=last)
        return table

    def write_csv(self, path: Path) -> None:
        """Write one row per group and quantity."""
        write_csv(path, ErrorRow._fields, (row._asdict() for row in self.rows))

    def write_json(self, path: Path) -> None:
        """Write a list with one object per group and quantity."""
        text = json.dumps([r._asdict() for r in self.rows], indent=1, ensure_ascii=False)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def label_pairs(frame: Frame, prediction: FramePrediction) -> dict[str, LabelPair]:
    """Label and prediction of each labelled quantity of a structure, by name; flat arrays in eV and Angstrom."""
    n = len(frame)
    out: dict[str, LabelPair] = {}
    if frame.energy is not None:
        label, value = np.array([frame.energy]), np.array([prediction.energy])
        out["energy per atom"], out["energy"] = (label / n, value / n), (label, value)
    if frame.forces is not None:
        out["forces"] = frame.forces.ravel(), prediction.forces.ravel()
    if frame.virial is not None:
        label, value = frame.virial.ravel(), prediction.virial.ravel()
        out["virial per atom"] = label / n, value / n
        if volume := volume_of(frame):
            out["stress"] = -label / volume, -value / volume
    return out


def error_table(frames: Sequence[Frame], predictions: Sequence[FramePrediction]) -> ErrorTable:
    """Compute the errors of predictions, for each group if there are several, and for all structures."""
    errors: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    groups = list(dict.fromkeys(frame.group for frame in frames))
    for frame, prediction in zip(frames, predictions, strict=True):
        for name, (label, value) in label_pairs(frame, prediction).items():
            for group in {frame.group, TOTAL} if len(groups) > 1 else {TOTAL}:
                errors.setdefault(group, {}).setdefault(name, []).append(value - label)
    rows = []
    for group in [*groups, TOTAL]:
        for name, unit, scale in QUANTITIES:
            if found := errors.get(group, {}).get(name):
                e = np.abs(np.concatenate(found)) * scale
                rmse = float(np.sqrt(np.mean(e**2)))
                rows.append(ErrorRow(group, name, unit, e.size, float(e.mean()), rmse, float(e.max())))
    return ErrorTable(tuple(rows))


def volume_of(frame: Frame) -> float:
    """Volume of the cell in Angstrom^3; 0 unless the structure is periodic along all three axes."""
    return abs(float(np.linalg.det(frame.cell))) if frame.pbc.all() else 0.0


def worst_structures(
    frames: Sequence[Frame], predictions: Sequence[FramePrediction], table: ErrorTable, count: int = 10
) -> list[WorstStructure]:
    """Find the structures with the largest errors, worst first.

    A structure is ranked by the largest of its errors of energy per atom, forces and virial per atom, each divided by
    the RMSE of all structures in ``table``, so that no quantity prevails by its unit.
    """
    totals = {row.quantity: row.rmse for row in table.rows if row.group == TOTAL}
    found = []
    for number, (frame, prediction) in enumerate(zip(frames, predictions, strict=True)):
        pairs = label_pairs(frame, prediction)
        errors = {name: 1e3 * (value - label) for name, (label, value) in pairs.items()}
        rmse = {name: float(np.sqrt(np.mean(errors[name] ** 2))) for name in _RANKED if name in errors}
        ratios = {name: e / totals[name] if totals[name] else 0.0 for name, e in rmse.items()}
        if not ratios:
            continue
        quantity = max(ratios, key=ratios.__getitem__)
        file = file_of(frame.origin) or frame.origin
        energy, forces = errors.get("energy per atom"), errors.get("forces")
        structure = WorstStructure(
            rank=0,
            file=file,
            frame=frame.origin.removeprefix(file).removeprefix(", ").removeprefix("frame "),
            group=frame.group,
            atoms=len(frame),
            quantity=quantity,
            ratio=ratios[quantity],
            energy_error=None if energy is None else float(energy[0]),
            forces_rmse=rmse.get("forces"),
            forces_maximum=None if forces is None else float(np.abs(forces).max(initial=0.0)),
            virial_rmse=rmse.get("virial per atom"),
            number=number,
        )
        found.append(structure)
    found.sort(key=lambda structure: -structure.ratio)
    return [structure._replace(rank=rank) for rank, structure in enumerate(found[:count], start=1)]


def worst_table(structures: Sequence[WorstStructure]) -> Table:
    """Format structures with large errors as a table for a terminal of 80 columns."""
    table = _open_table("file, frame")
    folder = common_folder([s.file for s in structures])
    table.add_column("group", vertical="bottom", overflow="fold")
    for head in ("atoms", "times\nRMSE", "energy\nmeV/atom", "forces\nRMSE\nmeV/Å", "forces\nmax\nmeV/Å"):
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    for s in structures:
        file = s.file.removeprefix(folder)
        numbers = (s.ratio, s.energy_error, s.forces_rmse, s.forces_maximum)
        table.add_row(
            escape(wrapped_path(", ".join(filter(None, (file, s.frame))), _PLACE_WIDTH)),
            escape(wrapped(s.group, _PLACE_WIDTH)),
            str(s.atoms),
            *("-" if n is None else short(n) for n in numbers),
        )
    if folder:
        table.caption, table.caption_justify = f"files are in {escape(folder)}", "left"
    return table


def common_folder(files: Sequence[str]) -> str:
    """Folder with a "/" at its end that all files are in, or ""; less is left of a path that begins with it."""
    parents = {Path(file).parent for file in files}
    if not parents or len({parent.is_absolute() for parent in parents}) > 1:
        return ""
    folder = Path(os.path.commonpath(parents)).as_posix()
    return "" if folder in (".", "/") else f"{folder}/"


def _open_table(first: str) -> Table:
    """Table without vertical lines, whose first column has a name."""
    column = Column(first, vertical="bottom", overflow="fold")
    return Table(column, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
