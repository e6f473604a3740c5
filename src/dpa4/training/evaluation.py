"""Evaluation of a potential: predictions, error tables, and files with predictions and parity plots."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

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
from dpa4.data.frame import file_of
from dpa4.data.labels import PREDICTED_ENERGY
from dpa4.graph import within_cutoff
from dpa4.output import OutputFolder, atomic_write, counted, write_csv
from dpa4.potential import Potential
from dpa4.potential.committee import MeanAndDeviation, add_deviations, check_one_charge_spin
from dpa4.system import naming_lack_of_memory, own_settings, user_path
from dpa4.training.calibration import calibrations, write_calibration
from dpa4.training.errors import (
    ErrorRow,
    ErrorTable,
    FrameDeviation,
    FramePrediction,
    WorstStructure,
    common_folder,
    error_table,
    label_pairs,
    volume_of,
    worst_structures,
)
from dpa4.training.plots import ParityPanel, plot_parity

__all__ = [
    "ErrorRow",
    "ErrorTable",
    "FramePrediction",
    "error_table",
    "evaluate",
    "predict",
    "write_predictions",
]

_MEMORY = (
    "compute fewer structures at once (dpa4 eval --max-atoms, training.batch_size), or use a GPU with more memory or "
    "one that no other program uses"
)
FILES = ("errors.csv", "errors.json", "parity.png", "parity.svg", "worst.csv", "worst.xyz")  # need labels


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
            graph = batch.graph
            with naming_lack_of_memory(partial("predictions for {}".format, graph.size), device, _MEMORY):
                prediction = potential(graph.to(device))
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


@own_settings
def evaluate(
    potential: Potential | Sequence[Potential],
    frames: Sequence[Frame],
    *,
    max_atoms: int = 2000,
    output: str | Path | None = None,
    device: str | torch.device = "cpu",
    model: str | Path = "",
    data: str = "",
) -> ErrorTable:
    """Compare the predictions of a potential with labels; structures without labels are only predicted.

    Args:
        potential: The potential, which is moved to the device, or the members of a committee, whose mean is compared.
        frames: The structures.
        max_atoms: Maximum number of atoms evaluated at once.
        output: Folder for tables, figures and structures: errors.csv, errors.json, parity.png, parity.svg,
            predictions.xyz, and worst.csv and worst.xyz with the ten worst structures; for a committee also
            calibration.png, calibration.svg and calibration.json. None writes nothing.
        device: Device to compute on.
        model: Name of the potential in the title of figures, such as its file.
        data: Name of the structures in the title, such as the folder or pattern of their files; by default the names
            of the files or, if there are more than three, of their folder.

    Returns:
        MAE, RMSE and largest error per group and quantity, in the units of ``QUANTITIES``, and the ten structures
        with the largest errors.

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
        return _evaluate(
            [member.to(device) for member in members], frames, max_atoms, folder, str(model), data
        )


def batches_for(potentials: Sequence[Potential], frames: Sequence[Frame], max_atoms: int) -> EpochBatches:
    """Batches of structures, in their order, with the charges and spins and the largest cutoff of the potentials."""
    config = potentials[0].config
    pairs = charges_and_spins(frames, config.charge_spin, config.default_charge_spin)
    dataset = FrameDataset(frames, max(p.config.cutoff for p in potentials), pairs)
    return EpochBatches(dataset, max_atoms=max_atoms, shuffle=False)


def _evaluate(
    potentials: Sequence[Potential],
    frames: Sequence[Frame],
    max_atoms: int,
    output: Path | None,
    model: str,
    data: str,
) -> ErrorTable:
    batches = batches_for(potentials, frames, max_atoms)
    predictions = predict_committee(potentials, batches.batches(0))
    table = error_table(frames, predictions)
    table = table._replace(worst=tuple(worst_structures(frames, predictions, table)))
    if output is not None:
        write_predictions(frames, predictions, output / "predictions.xyz")
        for name in FILES:
            (output / name).unlink(missing_ok=True)  # of an earlier call, which may have had labels
        if table.rows:
            table.write_csv(output / "errors.csv")
            table.write_json(output / "errors.json")
            _write_worst(frames, predictions, table.worst, output)
            panels = _parity_panels(frames, predictions, potentials[0])
            title = data or _name_of(frames)
            title = ", predicted by ".join(filter(None, (title, "/".join(Path(model).parts[-2:]))))
            plot_parity(panels, [frame.group for frame in frames], title, output / "parity.png")
        write_calibration(calibrations(frames, predictions), output)
    return table


def _name_of(frames: Sequence[Frame]) -> str:
    """Names of the files of structures, or their folder if there are many or the names are the same."""
    files = list(dict.fromkeys(file_of(f.origin) or f.origin for f in frames))
    names = {Path(file).name for file in files}
    if len(names) == len(files) <= 3:
        return ", ".join(Path(file).name for file in files)
    return counted(len(files), "file") + (f" of {folder}" if (folder := common_folder(files)) else "")


def write_predictions(frames: Sequence[Frame], predictions: Sequence[FramePrediction], path: Path) -> None:
    """Write extxyz with predictions as energy, forces, stress and labels as REF_energy, REF_forces, REF_virial."""
    with atomic_write(path) as temporary:
        write_structures(temporary, map(_predicted, frames, predictions))


def _write_worst(
    frames: Sequence[Frame],
    predictions: Sequence[FramePrediction],
    worst: Sequence[WorstStructure],
    folder: Path,
) -> None:
    """Write the worst structures as worst.csv and, with predictions, labels and their place, as worst.xyz."""
    columns = [name for name in WorstStructure._fields if name != "number"]
    write_csv(folder / "worst.csv", columns, ({name: getattr(w, name) for name in columns} for w in worst))
    images = []
    for w in worst:
        atoms = _predicted(frames[w.number], predictions[w.number])
        atoms.info |= {"rank": w.rank, "file": w.file, "frame": w.frame, "times_rmse": round(w.ratio, 3)}
        images.append(atoms)
    with atomic_write(folder / "worst.xyz") as temporary:
        write_structures(temporary, images)


def _predicted(frame: Frame, prediction: FramePrediction) -> Atoms:
    """Structure with predictions as results and with its labels."""
    atoms = Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    results = {"energy": prediction.energy, "forces": prediction.forces}
    if volume := volume_of(frame):
        results["stress"] = full_3x3_to_voigt_6_stress(-prediction.virial / volume)
    atoms = with_results(atoms, **results)
    atoms.info[PREDICTED_ENERGY] = prediction.energy  # marks the results as predictions
    if (spread := prediction.deviation) is not None:
        spread_of_stress = full_3x3_to_voigt_6_stress(spread.virial / volume) if volume else None
        add_deviations(atoms, energy_std=spread.energy, forces_std=spread.forces, stress_std=spread_of_stress)
    if frame.energy is not None:
        atoms.info["REF_energy"] = frame.energy
    if frame.forces is not None:
        atoms.arrays["REF_forces"] = frame.forces
    if frame.virial is not None:
        atoms.info["REF_virial"] = frame.virial
    if frame.group:
        atoms.info["config_type"] = frame.group
    atoms.info |= {name: v for name, v in frame.charge_spin.items() if is_number(v)}
    return atoms


def _parity_panels(
    frames: Sequence[Frame], predictions: Sequence[FramePrediction], potential: Potential
) -> list[ParityPanel]:
    """Labels and predictions of all structures; energies per atom are relative to the reference energies."""
    per_element = dict(zip(potential.elements, potential.reference_energies.tolist(), strict=True))
    references = np.zeros(len(chemical_symbols))
    references[[chemical_symbols.index(e) for e in per_element]] = list(per_element.values())
    relative = ", relative to the reference energies" if references.any() else ""
    panels = []
    for name, what, scale, unit in (
        ("energy per atom", f"energy{relative}", 1e3, "meV/atom"),
        ("forces", "force components", 1.0, "eV/Å"),
        ("stress", "stress components", 1e3, "meV/Å³"),
    ):
        labels, values, owners = [], [], []
        for number, (frame, prediction) in enumerate(zip(frames, predictions, strict=True)):
            if (pair := label_pairs(frame, prediction).get(name)) is not None:
                zero = references[frame.atomic_numbers].mean() if name == "energy per atom" else 0.0
                labels.append(scale * (pair[0] - zero))
                values.append(scale * (pair[1] - zero))
                owners.append(np.full(pair[0].size, number))
        if labels:
            columns = (np.concatenate(parts) for parts in (labels, values, owners))
            panels.append(ParityPanel(what, unit, *columns))
    return panels
