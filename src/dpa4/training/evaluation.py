"""Evaluation of a potential: predictions, error tables, and files with predictions and parity plots."""

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Column, Table

from dpa4.data import (
    Batch,
    EpochBatches,
    Frame,
    FrameDataset,
    charges_and_spins,
    check_elements,
    with_results,
    write_structures,
)
from dpa4.data.charge_spin import is_number
from dpa4.data.labels import PREDICTED_ENERGY
from dpa4.graph import within_cutoff
from dpa4.output import OutputFolder, atomic_write, write_csv
from dpa4.potential import Potential
from dpa4.potential.committee import MeanAndDeviation, add_deviations, check_one_charge_spin
from dpa4.system import own_settings, user_path
from dpa4.training.calibration import calibrations, write_calibration
from dpa4.training.plots import plot_parity

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


class ErrorRow(NamedTuple):
    """Errors of one quantity in one group of structures; forces, virial and stress are compared by component."""

    group: str
    quantity: str
    unit: str
    values: int  # number of labels, or of their components
    mae: float
    rmse: float
    maximum: float


class ErrorTable(NamedTuple):
    """Errors of all labelled quantities, per group and for all structures."""

    rows: tuple[ErrorRow, ...]

    def row(self, quantity: str, group: str = TOTAL) -> ErrorRow | None:
        """Errors of a quantity in a group; None if it has no labels."""
        return next((r for r in self.rows if (r.group, r.quantity) == (group, quantity)), None)

    def to_rich(self) -> Table:
        """Format as a table for the terminal."""
        table = Table(Column("group", overflow="fold"), "quantity", "unit", title="Errors")
        for column in ("values", "MAE", "RMSE", "max"):
            table.add_column(column, justify="right")
        for i, r in enumerate(self.rows):
            errors = (f"{e:.3f}" for e in (r.mae, r.rmse, r.maximum))
            last = i + 1 == len(self.rows) or self.rows[i + 1].group != r.group
            table.add_row(escape(r.group), r.quantity, r.unit, str(r.values), *errors, end_section=last)
        return table

    def write_csv(self, path: Path) -> None:
        """Write one row per group and quantity."""
        write_csv(path, ErrorRow._fields, (row._asdict() for row in self.rows))

    def write_json(self, path: Path) -> None:
        """Write a list with one object per group and quantity."""
        text = json.dumps([r._asdict() for r in self.rows], indent=1, ensure_ascii=False)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@own_settings
def predict(potential: Potential, batches: Iterable[Batch]) -> list[FramePrediction]:
    """Predict energy, forces and virial of every structure, in the order of the batches.

    The potential is evaluated in evaluation mode; its own mode is restored afterwards.

    Raises:
        ValueError: If an element, charge or spin is outside the model.
    """
    device = potential.device
    training = potential.training
    potential.eval()
    results = []
    try:
        for batch in batches:
            potential.check(batch.graph)
            prediction = potential(batch.graph.to(device))
            atoms = torch.bincount(batch.graph.structure, minlength=batch.graph.num_structures).tolist()
            energy = prediction.energy.detach().cpu().numpy()
            virial = prediction.virial.detach().cpu().numpy()
            forces = prediction.forces.detach().cpu().split(atoms)
            results += [
                FramePrediction(float(energy[b]), forces[b].numpy(), virial[b]) for b in range(len(atoms))
            ]
    finally:
        potential.train(training)
    return results


def predict_committee(potentials: Sequence[Potential], batches: Iterable[Batch]) -> list[FramePrediction]:
    """Predict mean and standard deviations of several potentials; for a single one the same as `predict`.

    All members are evaluated on the same graphs.

    Args:
        potentials: The members.
        batches: Batches whose graphs extend to the largest cutoff of a member.

    Raises:
        ValueError: If an element, charge or spin is outside a model, or the members read charge and spin differently.
    """
    if len(potentials) == 1:
        return predict(potentials[0], batches)
    check_one_charge_spin(potentials)
    longest = max(potential.config.cutoff for potential in potentials)
    results: list[FramePrediction] = []
    for batch in batches:
        members = []
        for potential in potentials:
            cutoff = potential.config.cutoff
            graph = batch.graph if cutoff == longest else within_cutoff(batch.graph, cutoff)
            members.append(predict(potential, [batch._replace(graph=graph)]))
        results += map(_combined, zip(*members, strict=True))
    return results


def _combined(members: tuple[FramePrediction, ...]) -> FramePrediction:
    """Mean and standard deviations of the predictions of all members for one structure."""
    energy = MeanAndDeviation.of([member.energy for member in members])
    forces = MeanAndDeviation.of([member.forces for member in members])
    virial = MeanAndDeviation.of([member.virial for member in members])
    spread = FrameDeviation(float(energy.deviation), forces.deviation, virial.deviation)
    return FramePrediction(float(energy.mean), forces.mean, virial.mean, spread)


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
        if volume := _volume(frame):
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


@own_settings
def evaluate(
    potential: Potential | Sequence[Potential],
    frames: Sequence[Frame],
    *,
    max_atoms: int = 2000,
    output: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> ErrorTable:
    """Compare the predictions of a potential with labels; structures without labels are only predicted.

    Args:
        potential: The potential, which is moved to the device, or the members of a committee, whose mean is compared.
        frames: The structures.
        max_atoms: Maximum number of atoms evaluated at once.
        output: Folder for errors.csv, errors.json, predictions.xyz and parity.png, for a committee also
            calibration.png and calibration.json; None writes nothing.
        device: Device to compute on.

    Returns:
        MAE, RMSE and largest error per group and quantity, in the units of ``QUANTITIES``.

    Raises:
        BlockingIOError: If another process is working in the folder.
        ValueError: If there is no structure, or an element, charge or spin is outside the model.
    """
    if not frames:
        raise ValueError("there are no structures to evaluate")
    members = [potential] if isinstance(potential, Potential) else list(potential)
    for member in members:
        check_elements(frames, member.elements)
    folder = None if output is None else user_path(output)
    with nullcontext() if folder is None else OutputFolder(folder):
        return _evaluate([member.to(device) for member in members], frames, max_atoms, folder)


def batches_for(potentials: Sequence[Potential], frames: Sequence[Frame], max_atoms: int) -> EpochBatches:
    """Batches of structures, in their order, with the charges and spins and the largest cutoff of the potentials."""
    config = potentials[0].config
    pairs = charges_and_spins(frames, config.charge_spin, config.default_charge_spin)
    dataset = FrameDataset(frames, max(p.config.cutoff for p in potentials), pairs)
    return EpochBatches(dataset, max_atoms=max_atoms, shuffle=False)


def _evaluate(
    potentials: Sequence[Potential], frames: Sequence[Frame], max_atoms: int, output: Path | None
) -> ErrorTable:
    batches = batches_for(potentials, frames, max_atoms)
    predictions = predict_committee(potentials, batches.batches(0))
    table = error_table(frames, predictions)
    if output is not None:
        write_predictions(frames, predictions, output / "predictions.xyz")
        for name in ("errors.csv", "errors.json", "parity.png"):
            (output / name).unlink(missing_ok=True)  # of an earlier call, which may have had labels
        if table.rows:
            table.write_csv(output / "errors.csv")
            table.write_json(output / "errors.json")
            plot_parity(_parity_data(frames, predictions), output / "parity.png")
        write_calibration(calibrations(frames, predictions), output)
    return table


def write_predictions(frames: Sequence[Frame], predictions: Sequence[FramePrediction], path: Path) -> None:
    """Write extxyz with predictions as energy, forces, stress and labels as REF_energy, REF_forces, REF_virial."""
    images = []
    for frame, prediction in zip(frames, predictions, strict=True):
        atoms = Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
        results = {"energy": prediction.energy, "forces": prediction.forces}
        if volume := _volume(frame):
            results["stress"] = full_3x3_to_voigt_6_stress(-prediction.virial / volume)
        atoms = with_results(atoms, **results)
        atoms.info[PREDICTED_ENERGY] = prediction.energy  # marks the results as predictions
        if (spread := prediction.deviation) is not None:
            stress = full_3x3_to_voigt_6_stress(spread.virial / volume) if volume else None
            add_deviations(atoms, energy_std=spread.energy, forces_std=spread.forces, stress_std=stress)
        if frame.energy is not None:
            atoms.info["REF_energy"] = frame.energy
        if frame.forces is not None:
            atoms.arrays["REF_forces"] = frame.forces
        if frame.virial is not None:
            atoms.info["REF_virial"] = frame.virial
        if frame.group:
            atoms.info["config_type"] = frame.group
        atoms.info |= {name: v for name, v in frame.charge_spin.items() if is_number(v)}
        images.append(atoms)
    with atomic_write(path) as temporary:
        write_structures(temporary, images)


def _parity_data(frames: Sequence[Frame], predictions: Sequence[FramePrediction]) -> dict[str, LabelPair]:
    """Labels and predictions of all structures, by the title of their panel."""
    collected: dict[str, list[LabelPair]] = {}
    for frame, prediction in zip(frames, predictions, strict=True):
        for name, pair in label_pairs(frame, prediction).items():
            collected.setdefault(name, []).append(pair)
    panels = {}
    for name, unit, _ in QUANTITIES:
        if name in collected and name in ("energy per atom", "forces", "stress"):
            labels, values = zip(*collected[name], strict=True)
            panels[f"{name} ({unit.removeprefix('m')})"] = np.concatenate(labels), np.concatenate(values)
    return panels


def _volume(frame: Frame) -> float:
    """Volume of the cell in Angstrom^3; 0 unless the structure is periodic along all three axes."""
    return abs(float(np.linalg.det(frame.cell))) if frame.pbc.all() else 0.0
