"""Start of fine-tuning: the trained model, its agreement with options and data, and new reference energies.

The network of the start is taken as it is, with its symmetry and its short range, so that the first errors are those
of the start (docs/adr/0029).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from dpa4.data import (
    EpochBatches,
    Frame,
    reference_energies,
    refitted_reference_energies,
    undetermined_changes_text,
    undetermined_elements,
)
from dpa4.data.summary import elements_in, frames_with_other_elements
from dpa4.model import ModelConfig
from dpa4.model.config import PairBridging
from dpa4.model.presets import FREE_OPTIONS, preset
from dpa4.ops.incidence import Incidence
from dpa4.ops.segments import segment_sum
from dpa4.parsing import shown
from dpa4.potential import Potential
from dpa4.potential.checkpoint import Checkpoint, potential_of, read_checkpoint
from dpa4.potential.deepmd.options import first_problem
from dpa4.potential.elements import with_elements
from dpa4.potential.fingerprint import fingerprint_of
from dpa4.progress import ProgressBar
from dpa4.system import own_settings
from dpa4.training.options import ModelOptions

START, FINGERPRINT, EARLIER = "start", "fingerprint of the start", "earlier starts"
ORIGINS = (START, FINGERPRINT, EARLIER, "data of the start", "reference energies")
"""Entries of the provenance of a fine-tuned model that describe its start."""


class Start(NamedTuple):
    """Model to fine-tune.

    Attributes:
        name: Its name in the options.
        potential: The potential in float32, without the elements that were dropped.
        provenance: Entries that describe it in the provenance of the fine-tuned model.
    """

    name: str
    potential: Potential
    provenance: dict[str, str]


def load_start(options: ModelOptions) -> Start:
    """Load the model to fine-tune, and compare it with the other options of the model.

    Args:
        options: Options with ``start_from``.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If a file on the hub cannot be downloaded.
        ValueError: If the file cannot be read, or an option contradicts it.
    """
    name = options.start_from
    assert name is not None
    stored = read_checkpoint(name, options.start_branch, ema=options.start_ema)
    if found := contradictions(options, stored.config):
        raise ValueError(
            f"model.start_from = {name} is another network than the other options say: {'; '.join(found)}. Remove "
            "these options: the network is that of the start"
        )
    origin = _origin(stored, options)
    if default := (options.model_extra or {}).get("default_charge_spin"):
        config = ModelConfig.model_validate(stored.config.model_dump() | {"default_charge_spin": default})
        stored = replace(stored, config=config)
    if options.elements != "auto":
        try:
            stored = with_elements(stored, options.elements)
        except ValueError as error:
            raise ValueError(f"model.elements does not fit model.start_from = {name}: {error}") from None
    return Start(name, potential_of(stored, torch.float32), origin)


def _origin(stored: Checkpoint, options: ModelOptions) -> dict[str, str]:
    """Describe a start for the provenance of a fine-tuned model."""
    branch = f"branch {options.start_branch}" if options.start_branch else None
    averages = "averaged weights" if options.start_ema else None
    name = ", ".join(filter(None, (options.start_from, branch, averages)))
    origin = {START: name, FINGERPRINT: fingerprint_of(potential_of(stored, torch.float32))["model"]}
    if data := stored.provenance.get("training data"):
        origin["data of the start"] = data
    if before := stored.provenance.get(START):
        mark = stored.provenance.get(FINGERPRINT, "unknown")
        chain = [f"{before} (fingerprint {mark})", stored.provenance.get(EARLIER)]
        origin[EARLIER] = "; ".join(filter(None, chain))
    return origin


def contradictions(options: ModelOptions, start: ModelConfig) -> list[str]:
    """Describe the options of the model, given beside ``start_from``, that differ from the start.

    Args:
        options: Options of the model; defaults do not count. Elements are not compared, nor is the charge and spin
            of structures that state none, which the network does not depend on.
        start: Configuration of the start.
    """
    ignored = {"elements", "default_charge_spin"} if start.charge_spin else {"elements"}
    given = {name: value for name in (*options.model_fields_set, *(options.model_extra or {}))
             if name in ModelConfig.model_fields and name not in ignored
             and (value := getattr(options, name)) != "auto"}  # fmt: skip
    try:
        expected = ModelConfig.model_validate(start.model_dump() | given)
        problems = [
            f"model.{name} = {_shown(getattr(expected, name))} (start: {_shown(getattr(start, name))})"
            for name in ModelConfig.model_fields
            if name in given and getattr(expected, name) != getattr(start, name)
        ]
        if "preset" in options.model_fields_set:
            network = preset(options.preset, start.elements, **{"symmetry": start.symmetry} | given)
            others = [
                f"{name} {_shown(getattr(network, name))} (start: {_shown(getattr(start, name))})"
                for name in ModelConfig.model_fields
                if name not in {*FREE_OPTIONS, *given} and getattr(network, name) != getattr(start, name)
            ]
            if others:
                problems.append(f"model.preset = {options.preset} with {', '.join(others)}")
    except ValidationError as error:
        return [first_problem(error)]
    return problems


def check_elements_of_start(frames: Sequence[Frame], start: Start) -> None:
    """Check that the start knows all elements of the structures.

    Raises:
        ValueError: If not; the message names the first such element and its structure.
    """
    for frame, element in frames_with_other_elements(frames, start.potential.elements):
        raise ValueError(
            f"element {element} of {frame.origin} is not in the model to fine-tune, {start.name}, which knows "
            f"{' '.join(start.potential.elements)}; fine-tuning cannot add elements. Remove the structures with it, "
            "add it to model.elements if that dropped it, choose another start, or train from random weights"
        )


def adapt(
    start: Start,
    batches: EpochBatches,
    read: Sequence[Frame],
    source: str | Mapping[str, float],
    console: Console,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Set the reference energies of a start for other data, and print the old and the new ones.

    Args:
        start: The start, whose potential is on its device.
        batches: Training data without free atoms, in their order.
        read: Training data with free atoms.
        source: Option ``data.reference_energies``; auto and least_squares fit the change, the others state energies.
        console: Console to print to.

    Returns:
        Entries about the start for the provenance of the model, and the elements whose changes the data do not
        determine one by one.

    Raises:
        ValueError: If the data lack a stated energy of one of their elements.
    """
    potential, frames = start.potential, batches.dataset.frames
    console.print(f"fine-tuning of {start.name}", highlight=False, markup=False, soft_wrap=True)
    old = dict(zip(potential.elements, potential.reference_energies.tolist(), strict=True))
    used, undetermined = elements_in(frames), []
    if source == "isolated" or isinstance(source, Mapping):
        new = old | reference_energies(source, read, used)
    else:
        new = refitted_reference_energies(old, frames, energies_of(potential, batches))
        if labelled := [frame for frame in frames if frame.energy is not None]:
            undetermined = undetermined_elements("least_squares", labelled, elements_in(labelled))
    potential.reference_energies.copy_(torch.tensor(list(new.values()), dtype=torch.float64))
    remarks = _describe_references(old, new, used, undetermined, console)
    return start.provenance | remarks, tuple(undetermined)


@own_settings
def energies_of(potential: Potential, batches: EpochBatches) -> list[float]:
    """Energies of structures in the order of the batches, in eV."""
    found: list[float] = []
    device, training = potential.device, potential.training
    potential.eval()
    try:
        with torch.no_grad(), ProgressBar("energies of the start", len(batches.dataset)) as bar:
            for batch in batches.batches(0):
                potential.check(batch.graph)
                graph = potential.without_excluded(batch.graph.to(device))
                atomic = potential.atomic_energies(graph, graph.edge_vectors())
                structure = Incidence.of_sorted(graph.structure, graph.num_structures)
                found += segment_sum(atomic, structure).tolist()
                bar.update(bar.task_ids[0], completed=len(found))
    finally:
        potential.train(training)
    return found


def _describe_references(
    old: Mapping[str, float],
    new: Mapping[str, float],
    used: Sequence[str],
    undetermined: Sequence[str],
    console: Console,
) -> dict[str, str]:
    """Print the reference energies of the start and those for the new data; return remarks for the provenance.

    Args:
        old: Reference energies of the start, in eV.
        new: Reference energies of the fine-tuned model, in eV.
        used: Elements of the training data.
        undetermined: Elements whose changes the data do not determine one by one.
        console: Console to print to.
    """
    table = Table(title="Reference energies (eV)", title_justify="left")
    for name in ("element", "start", "now", "change"):
        table.add_column(name, justify="left" if name == "element" else "right")
    for element in used:
        values = old[element], new[element], new[element] - old[element]
        mark = " *" if element in undetermined else ""
        table.add_row(element + mark, *(f"{v:+.4f}" if k == 2 else f"{v:.4f}" for k, v in enumerate(values)))
    console.print(table)
    remarks = []
    if undetermined:
        remarks.append(undetermined_changes_text(undetermined))
        console.print(f"* {remarks[0]}", style="yellow", highlight=False, soft_wrap=True)
    if others := [element for element in old if element not in used]:
        names = ", ".join(others) if len(others) <= 10 else f"{len(others)} elements"
        remarks.append(
            f"the training data lack {names}: their reference energies are those of the start, perhaps of another "
            "level of theory, and nothing keeps their forces as they were"
        )
        console.print(remarks[-1], style="yellow", highlight=False, soft_wrap=True)
    return {"reference energies": "; ".join(remarks)} if remarks else {}


def origin_of(state: Mapping[str, Any]) -> dict[str, str]:
    """Entries about the start in the provenance of a run to resume."""
    return {name: text for name, text in state.get("provenance", {}).items() if name in ORIGINS}


def _shown(value: Any) -> str:
    if isinstance(value, PairBridging):
        return "a window per pair of elements"
    return "null" if value is None else value if isinstance(value, str) else shown(value)
