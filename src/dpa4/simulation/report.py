"""Report of a training run, a committee or a simulation: one self-contained HTML page."""

from pathlib import Path

import torch

from dpa4.output import atomic_write, check_writable
from dpa4.potential.committee import member_folders
from dpa4.simulation import html
from dpa4.simulation.report_committee import committee_sections
from dpa4.simulation.report_simulation import SIMULATIONS
from dpa4.simulation.report_training import TRAINING_FILES, training_sections
from dpa4.system import user_path


def write_report(
    run: str | Path,
    output: str | Path | None = None,
    *,
    evaluation: str | Path | None = None,
    pairs: bool = True,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Path:
    """Write one self-contained HTML file about a training run, a committee, dynamics, relaxations or phonons.

    Sections of a training run: summary, learning curve, errors on test data, pair curves, model card, configuration,
    versions. A section without data says what is missing and names the command that creates it. Sections of a
    committee: summary, its members side by side, learning curves, calibration, errors on test data, model card and
    configuration of a member, versions. Sections of a simulation: summary, figures, tables, settings, versions.
    Figures are dark on a dark screen.

    Args:
        run: Output folder of `dpa4 train`, with or without `--committee`, `dpa4 md`, `dpa4 relax` or `dpa4 phonon`.
        output: File to write or replace; by default report.html in the folder of the run.
        evaluation: Output folder of `dpa4 eval` for the model of a training run, or for a committee.
        pairs: Compute the curves of the pairs of elements that were neighbours in the training data, or of all pairs
            if the model file does not say which were. Of more than 60 pairs, only the 60 with the shortest distances
            are shown.
        device: Device to compute the curves on.
        progress: Show a progress bar.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If the folder is not the output folder of one of these commands, or a file in it is damaged; or if
            an evaluation is given with a simulation.
    """
    folder = user_path(run)
    evaluation = None if evaluation is None else user_path(evaluation)
    for given in (folder, *([evaluation] if evaluation is not None else [])):
        if not given.is_dir():
            raise FileNotFoundError(f"there is no folder {given}")
    simulation = next((kind for kind in SIMULATIONS if (folder / kind.file).is_file()), None)
    members = member_folders(folder)
    if simulation is None and not members and not any((folder / name).is_file() for name in TRAINING_FILES):
        names = ", ".join((*TRAINING_FILES, *(kind.file for kind in SIMULATIONS)))
        raise ValueError(
            f"{folder} is not an output folder of dpa4 train, md, relax or phonon: it has none of {names}"
        )
    if simulation is not None and evaluation is not None:
        raise ValueError(
            f"{evaluation} is the evaluation of a model, and {folder} is a folder of {simulation.command}; give the "
            "evaluation with the folder of the training run"
        )
    file = folder / "report.html" if output is None else user_path(output)
    check_writable(file)
    if simulation is None and members:
        what, sections = "committee", committee_sections(folder, members, evaluation)
    elif simulation is None:
        what, sections = "training run", training_sections(folder, evaluation, pairs, device, progress)
    else:
        what, sections = simulation.title, simulation.sections(folder)
    name = folder.resolve().name
    text = html.page(f"{name}: DPA4 {what}", f"DPA4 {what}: {name}", sections | {"Versions": html.versions()})
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file
