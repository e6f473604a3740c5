"""Recipes: options of a training run that suit the data, with the reason of each choice.

The numbers of all recipes are in ``RECIPES``, those of the estimates of time and memory in ``COSTS``. Each has the
measurement it comes from, or says that it is not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from rich.table import Table

from dpa4.data import Frame, is_isolated_atom, label_counts, undetermined_elements, without_isolated_atoms
from dpa4.data.sampling import Sample
from dpa4.data.summary import elements_in
from dpa4.graph.neighbors import neighbor_list
from dpa4.output import counted

CUTOFF_MOLECULES = 5.0  # Angstrom; acetylacetone, 2026-11-30; the usual value for molecules
CUTOFF_PERIODIC = 6.0  # Angstrom; the cutoff of the published models
FRAMES_FOR_EDGES = 50  # structures, evenly spaced, whose neighbours are counted


@dataclass(frozen=True)
class DataSummary:
    """Properties of the training data that decide on a recipe.

    Attributes:
        structures: Number of structures, free atoms included; estimated unless ``complete``.
        sampled: Number of structures that were read.
        complete: True if all structures were read.
        atoms: Mean number of atoms of a structure to fit.
        largest: Number of atoms of the largest structure.
        edges: Mean number of edges (directed neighbour pairs) of a structure within ``cutoff``.
        cutoff: Cutoff for these data, in Angstrom.
        elements: Chemical symbols, by atomic number.
        periodic: Share of structures that are periodic along some axis.
        labels: Share of structures with each label: energy, forces, virial.
        isolated: True if every element has a free atom with an energy.
        undetermined: Elements whose reference energies the compositions do not determine.
        charged: True if a structure states a charge or spin.
    """

    structures: int
    sampled: int
    complete: bool
    atoms: float
    largest: int
    edges: float
    cutoff: float
    elements: tuple[str, ...]
    periodic: float
    labels: Mapping[str, float]
    isolated: bool
    undetermined: tuple[str, ...]
    charged: bool


@dataclass(frozen=True)
class Recipe:
    """Options for a range of data sizes on one kind of device.

    Attributes:
        below: Number of structures from which on the next recipe holds; None: no limit.
        source: Measurement from which the recipe comes.
        options: Options of the run file, each with its value and reason.
    """

    below: int | None
    source: str
    options: Mapping[str, tuple[Any, str]]


_ACAC = "acetylacetone, 450 structures, one H200, 2026-11-30"
_SMALL = {
    "model.edge_norm": (False, "energies are smoother at the cutoff"),
    "training.batch_size": (8, "few structures: small batches give more steps in each pass over them"),
    "training.weight_decay": (
        0.1,
        "few structures are learned by heart; 0.1 lowered the force error of structures unlike the training data "
        "from 103 (after 26,483 steps) to 64 meV/A (after 12,000), 0.5 was too much",
    ),
    "training.ema_decay": (0.999, "used in all measured runs"),
    "training.learning_rate": ("auto", "follows the number of steps, so you can change that alone"),
    "training.energy_weight": (60.0, "three times the weight of the forces, as in the measured runs"),
    "training.forces_weight": (20.0, "as in the measured runs"),
    "data.validation_fraction": (0.1, "a tenth of the structures is enough to choose the best model"),
}
_MIDDLE = _SMALL | {
    "training.batch_size": (16, "larger batches use the device better; not measured"),
    "training.weight_decay": (0.01, "more data need less decay; between the measured ends, not measured"),
    "training.energy_weight": (20.0, "default of the package"),
    "data.validation_fraction": (0.05, "a twentieth is enough to choose the best model"),
}
_LARGE = _MIDDLE | {
    "training.batch_size": (32, "batch of the timed training step (benchmarks/README.md)"),
    "training.weight_decay": (0.001, "default of the package, for large data; not measured"),
    "data.validation_fraction": (0.01, "a hundredth still holds hundreds of structures"),
}
_LONG = "the force error was still falling after 12,000 steps at 450 structures (2026-11-30)"

# Ordered by size. Change a number here, with its source; everything else follows.
RECIPES: dict[str, tuple[Recipe, ...]] = {
    "cuda": (
        Recipe(
            1_000,
            f"network, batch, decay and loss weights of the measured runs on {_ACAC}",
            _SMALL
            | {
                "model.preset": ("paper-neo", "1.6 million parameters, the measured network"),
                "training.steps": (24_000, _LONG),
            },
        ),
        Recipe(
            50_000,
            "interpolated between the measured ends; not measured itself",
            _MIDDLE
            | {
                "model.preset": ("paper-neo", "as for fewer structures; larger networks are not measured"),
                "training.steps": (60_000, "at least 19 passes over 50,000 structures; not measured"),
            },
        ),
        Recipe(
            None,
            "network and batch of the timed training step; accuracy not measured",
            _LARGE
            | {
                "model.preset": (
                    "paper-air",
                    "2.8 million parameters: many structures fill a larger network",
                ),
                "training.steps": (
                    200_000,
                    "6.4 million structures; the published runs have 2 million steps",
                ),
            },
        ),
    ),
    "cpu": (
        Recipe(
            1_000,
            "CPU, acetylacetone, 450 structures, 2026-11-30",
            _SMALL
            | {
                "model.preset": ("nano", "no GPU: the smallest network, measured on a CPU"),
                "training.steps": (
                    6_000,
                    "length of the measured run, which reached 29 meV/A with 450 structures",
                ),
            },
        ),
        Recipe(
            50_000,
            "extrapolated from fewer structures; not measured itself",
            _MIDDLE
            | {
                "model.preset": ("nano", "no GPU: a larger network would take weeks"),
                "training.steps": (20_000, "a compromise with the time on a CPU; not measured"),
            },
        ),
        Recipe(
            None,
            "extrapolated from fewer structures; not measured itself. Use a GPU if you can",
            _LARGE
            | {
                "model.preset": ("nano", "no GPU: a larger network would take months"),
                "training.steps": (50_000, "a compromise with the time on a CPU; not measured"),
            },
        ),
    ),
}


@dataclass(frozen=True)
class Cost:
    """Measured cost of a training step: seconds = max(least, per_edge * edges).

    Attributes:
        least: Time of a step of few edges, in seconds.
        per_edge: Time per edge of the batch, in seconds.
        fixed_bytes: Memory without a batch, in bytes.
        bytes_per_edge: Memory per edge of the batch, in bytes.
        device: Device of the measurement, for the comment.
    """

    least: float
    per_edge: float
    fixed_bytes: float
    bytes_per_edge: float
    device: str


# docs/training.md, "How the recipes were found", has the commands.
# cuda: 12.0 ms for 8 molecules of acetylacetone (paper-neo, 2026-11-30); 43.4 ms and 11.6 GiB for 32 x 64 atoms with
# 56 neighbours, 114,688 edges (paper-air, bfloat16, 2026-11-26, benchmarks/README.md). float32 is taken
# as twice that; paper-neo as two thirds of paper-air.
# cpu: nano, 32 molecules of acetylacetone (5,800 edges), 0.36 s of processor time per step, mean of 4 steps; memory:
# difference to 8 molecules (256 MB); the least time is that of 8 molecules by the same slope, not measured.
COSTS: dict[tuple[str, str], Cost] = {
    ("cuda", "paper-neo"): Cost(0.012, 5.0e-7, 1.0e9, 1.4e5, "one H200"),
    ("cuda", "paper-air"): Cost(0.018, 7.6e-7, 1.0e9, 2.1e5, "one H200"),
    ("cpu", "nano"): Cost(0.09, 6.1e-5, 5.2e8, 5.9e4, "one core of a server"),
}


@dataclass(frozen=True)
class Estimate:
    """Estimate of the time and memory of a run; within a factor of two or three."""

    seconds: float
    bytes: float
    device: str


@dataclass(frozen=True)
class Choice:
    """Options that suit the data.

    Attributes:
        options: Values of options by dotted name.
        reasons: Reason of each, in plain English.
        source: Number of structures, and the measurement from which the recipe comes.
        estimate: Time and memory; None for networks whose step is not timed.
        warnings: What the reader should do about the data.
    """

    options: dict[str, Any]
    reasons: dict[str, str]
    source: str
    estimate: Estimate | None
    warnings: tuple[str, ...]


def summary_of(sample: Sample) -> DataSummary:
    """Summarise the structures of a sample.

    Raises:
        ValueError: If there is no structure but free atoms.
    """
    frames = without_isolated_atoms(sample.frames)
    if not frames:
        raise ValueError(
            f"all {len(sample.frames)} structures are free atoms, which are not fitted; add structures to train on"
        )
    periodic = float(np.mean([frame.pbc.any() for frame in frames]))
    cutoff = CUTOFF_PERIODIC if periodic else CUTOFF_MOLECULES
    elements = elements_in(sample.frames)
    free = {elements_in([f])[0] for f in sample.frames if is_isolated_atom(f) and f.energy is not None}
    has_energy = any(frame.energy is not None for frame in frames)
    atoms = [len(frame) for frame in frames]
    return DataSummary(
        structures=sample.structures,
        sampled=len(sample.frames),
        complete=sample.complete,
        atoms=float(np.mean(atoms)),
        largest=max(atoms),
        edges=_mean_edges(frames, cutoff),
        cutoff=cutoff,
        elements=tuple(elements),
        periodic=periodic,
        labels={name: count / len(frames) for name, count in label_counts(frames).items()},
        isolated=set(elements) <= free,
        undetermined=tuple(undetermined_elements("auto", sample.frames, elements)) if has_energy else (),
        charged=any(frame.charge_spin for frame in frames),
    )


def recipe_for(summary: DataSummary, device: str, preset: str | None = None) -> Choice:
    """Choose the options of a run.

    Args:
        summary: Properties of the training data.
        device: Kind of device: "cpu" or "cuda".
        preset: Name of a network that replaces the recommended one.
    """
    recipe = next(r for r in RECIPES[device] if r.below is None or summary.structures < r.below)
    chosen = dict(recipe.options) | _from_data(summary, recipe.options)
    if preset is not None:
        chosen["model.preset"] = (preset, "the network that was asked for with --preset")
        chosen.pop("model.edge_norm")
    options = {name: value for name, (value, _) in chosen.items()}
    source = f"{'about ' if not summary.complete else ''}{summary.structures:,} structures: {recipe.source}"
    reasons = {name: reason for name, (_, reason) in chosen.items()}
    return Choice(options, reasons, source, _estimate(summary, options, device), _warnings(summary))


def estimate_text(estimate: Estimate | None) -> str:
    """Time and memory of a run in words."""
    if estimate is None:
        return "none, because a step of this network has not been timed"
    hours = estimate.seconds / 3600
    time = (
        f"{hours / 24:.1f} days"
        if hours > 48
        else f"{hours:.1f} h"
        if hours > 1.5
        else f"{hours * 60:.0f} min"
    )
    return (
        f"about {time} and {estimate.bytes / 2**30:.1f} GiB on {estimate.device}; a rough figure from the number of "
        "neighbours, without compilation and validation, which may be wrong by a factor of three"
    )


def choice_table(summary: DataSummary, choice: Choice, device: str) -> Table:
    """Short table of what was found in the data and what was chosen."""
    table = Table(show_header=False)
    exact = "" if summary.complete else f" (estimated from the first {summary.sampled:,})"
    labels = ", ".join(f"{name} {share:.0%}" for name, share in summary.labels.items())
    options = choice.options
    rows = {
        "structures": f"{summary.structures:,}{exact}",
        "atoms": f"{summary.atoms:.1f} on average, {summary.largest} at most",
        "elements": " ".join(summary.elements),
        "periodic": f"{summary.periodic:.0%}",
        "labels": labels,
        "device": "GPU" if device == "cuda" else "CPU",
        "network": f"{options['model.preset']}, cutoff {options['model.cutoff']} A",
        "length": f"{options['training.steps']:,} steps of {options['training.batch_size']} structures",
        "weight decay": f"{options['training.weight_decay']}",
        "estimate": estimate_text(choice.estimate),
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _from_data(summary: DataSummary, options: Mapping[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Options that follow from the structures and labels."""
    kind = (
        "periodic structures: the cutoff of the published models"
        if summary.periodic == 1
        else "periodic structures and molecules: the cutoff for periodic structures"
        if summary.periodic
        else "molecules: they need fewer neighbours than periodic structures"
    )
    chosen: dict[str, tuple[Any, str]] = {"model.cutoff": (summary.cutoff, kind)}
    labels = summary.labels
    for name in ("energy", "forces"):
        if not labels[name] and any(labels.values()):
            chosen[f"training.{name}_weight"] = (0.0, f"no structure has a label for {name}")
    virial = labels["virial"]
    chosen["training.virial_weight"] = (
        (5.0, f"{virial:.0%} of the structures have a stress or virial")
        if virial
        else (0.0, "no structure has a stress or virial, so the pressure is not fitted")
    )
    if summary.isolated:
        chosen["data.reference_energies"] = ("isolated", "every element has a free atom with an energy")
    elif labels["energy"]:
        chosen["data.reference_energies"] = (
            "least_squares",
            "not every element has a free atom with an energy, so compositions are fitted to the energies",
        )
    batch = min(options["training.batch_size"][0], summary.structures)
    if batch < options["training.batch_size"][0]:
        chosen["training.batch_size"] = (batch, "not more than there are")
    if summary.structures < 10:
        chosen["data.validation_fraction"] = (0.0, "too few to set some aside; test on other data")
    return chosen


def _estimate(summary: DataSummary, options: Mapping[str, Any], device: str) -> Estimate | None:
    cost = COSTS.get((device, options["model.preset"]))
    if cost is None:
        return None
    edges = options["training.batch_size"] * summary.edges
    seconds = options["training.steps"] * max(cost.least, cost.per_edge * edges)
    return Estimate(seconds, cost.fixed_bytes + cost.bytes_per_edge * edges, cost.device)


def _mean_edges(frames: Sequence[Frame], cutoff: float) -> float:
    chosen = frames[:: ceil(len(frames) / FRAMES_FOR_EDGES)]
    return float(np.mean([len(neighbor_list(f.positions, f.cell, f.pbc, cutoff).source) for f in chosen]))


def _warnings(summary: DataSummary) -> tuple[str, ...]:
    """Return advice on what the data lack."""
    found = []
    if not any(summary.labels.values()):
        found.append(
            "no energies, forces or stresses were found under the usual names; name them in data.keys of the file"
        )
    if summary.undetermined:
        which = f"{'energy' if len(summary.undetermined) == 1 else 'energies'} of {', '.join(summary.undetermined)}"
        found.append(
            f"the compositions do not determine the reference {which}: energy "
            "differences between compositions would mean nothing. Add a free atom of every element "
            "(config_type=IsolatedAtom), or other compositions"
        )
    if summary.charged:
        found.append(
            "the structures state a charge or spin, which the recommended network ignores; see model.charge_spin in "
            "docs/models.md"
        )
    if summary.structures < 10:
        found.append(
            f"only {counted(summary.structures, 'structure')}: too few for a model that can be trusted"
        )
    return tuple(found)
