"""Sections of the report of a training run."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from dpa4.data.coverage import ElementPair
from dpa4.output import read_csv, svg_of
from dpa4.parsing import read_yaml
from dpa4.potential import Potential, load_potential, model_card
from dpa4.potential.card import ModelCard
from dpa4.simulation import html
from dpa4.simulation.pair_curves import ADVICE, Diagnosis, diagnose, draw_pairs, element_pairs, pair_curves
from dpa4.system import choose_device
from dpa4.training.logs import ERROR_UNITS
from dpa4.training.plots import draw_learning_curve

TRAINING_FILES = ("best.safetensors", "last.safetensors", "train.csv", "run.yaml")
MAX_PAIRS = 60  # in the report; `dpa4 pairs` has no limit
PAIRS_OF_A_FIGURE = 3  # one row, as wide as the page
WORST = (
    "<p>Structures with the largest error of energy per atom, forces or virial per atom, relative to its RMSE in all "
    "structures. Look at them in worst.xyz of the evaluation. A wrong label there (an electronic-structure "
    "calculation that did not converge) spoils training; a strange structure with a right label shows what the "
    "training data lack.</p>"
)
WORST_COLUMNS = {
    "file": "file",
    "frame": "frame",
    "group": "group",
    "atoms": "atoms",
    "quantity": "worst in",
    "ratio": "times\nRMSE",
    "energy_error": "energy\n(meV/atom)",
    "forces_rmse": "forces RMSE\n(meV/Å)",
    "forces_maximum": "forces max\n(meV/Å)",
}
SUMMARY = (
    "preset",
    "trainable parameters",
    "elements",
    "cutoff",
    "training data",
    "validation data",
    "step",
    "date",
)


def training_sections(
    folder: Path, evaluation: Path | None, pairs: bool, device: str | torch.device, progress: bool
) -> dict[str, str]:
    """Sections of the report, as HTML by title."""
    model = next((folder / name for name in TRAINING_FILES[:2] if (folder / name).is_file()), None)
    card = None if model is None else model_card(model)
    validations = validations_of(folder)
    table = None if evaluation is None else error_table(evaluation / "errors.json")
    return {
        "Summary": _summary(card, validations, table, speed_of(folder)),
        "Learning curve": _learning_curve(folder, validations),
        "Errors": errors_section(model, evaluation, table),
        "Pair curves": _pair_curves(model, pairs, device, progress),
        "Model": model_section(card),
        "Configuration": configuration_section(folder),
    }


def _summary(
    card: ModelCard | None,
    validations: dict[str, dict[str, str]],
    table: list[dict[str, Any]] | None,
    speed: dict[str, str],
) -> str:
    lines: dict[str, str] = {}
    if card is not None:
        known = card.sections["Model"] | card.sections["Provenance"]
        lines |= {name: known[name] for name in SUMMARY if name in known}
    lines |= speed
    for label, row in validations.items():
        errors = [
            f"{what} {html.short(row[f'{what}_mae'])} {unit}"
            for what, unit in ERROR_UNITS.items()
            if row.get(f"{what}_mae")
        ]
        lines[f"validation MAE, {label}"] = ", ".join(errors)
    if table:
        lines["test MAE"] = ", ".join(
            f"{r['quantity']} {html.short(r['mae'])} {r['unit']}"
            for r in table
            if r["group"] == "all" and r["quantity"] != "energy"
        )
    return html.name_table(lines) if lines else "<p>There is neither a model nor a validation result yet.</p>"


def speed_of(folder: Path) -> dict[str, str]:
    """Duration and throughput of the training, from the last row of train.csv; {} without one."""
    rows = read_csv(folder / "train.csv")
    try:
        steps, seconds = int(rows[-1]["step"]), float(rows[-1]["seconds"])
    except (IndexError, KeyError, ValueError):  # no row, or a damaged one
        return {}
    lines = {"training time": f"{html.duration(seconds)}, without compilation"}
    if seconds > 0:
        lines["throughput"] = f"{html.short(steps / seconds)} steps/s"
        if structures := _batch_size(folder / "run.yaml"):
            lines["throughput"] += f", {html.short(structures * steps / seconds)} structures/s"
    return lines


def _batch_size(file: Path) -> int | None:
    """Number of structures in a batch; None if the options do not say so."""
    try:
        size = read_yaml(file)["training"]["batch_size"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return size if isinstance(size, int) else None


def validations_of(folder: Path) -> dict[str, dict[str, str]]:
    """Best and last row of valid.csv, or one row if they are the same; {} without validation."""
    rows = read_csv(folder / "valid.csv")
    best = [row for row in rows if row["best"] == "1"]
    chosen = [("best", row) for row in best[-1:]] + [
        ("last", row) for row in rows[-1:] if row not in best[-1:]
    ]
    return {f"{label} (step {row['step']})": row for label, row in chosen}


def _learning_curve(folder: Path, validations: dict[str, dict[str, str]]) -> str:
    parts = []
    if read_csv(folder / "train.csv") or validations:
        parts.append(html.image(svg_of(draw_learning_curve(folder)), "Learning curve"))
    else:
        parts.append(html.missing("There is no row in train.csv", "dpa4 train run.yaml --resume"))
    if not validations:
        return "\n".join([*parts, "<p>The run has no validation data.</p>"])
    rows = [["score", *(html.short(row["score"]) for row in validations.values())]]
    for name in next(iter(validations.values())):
        what, _, kind = name.partition("_")
        values = [row[name] for row in validations.values()]
        if what in ERROR_UNITS and any(values):
            rows.append([f"{what} {kind.upper()} ({ERROR_UNITS[what]})", *map(html.short, values)])
    return "\n".join([*parts, "<h3>Validation</h3>", html.table(["", *validations], rows)])


def error_table(file: Path) -> list[dict[str, Any]] | None:
    """Rows of the error table of `dpa4 eval`; None if the file does not exist."""
    if not file.is_file():
        return None
    names = ("group", "quantity", "unit", "values", "mae", "rmse", "maximum")
    try:
        return [{name: row[name] for name in names} for row in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); write it again with dpa4 eval") from error


def errors_section(model: Path | None, evaluation: Path | None, table: list[dict[str, Any]] | None) -> str:
    """Errors on test data.

    Args:
        model: Model file or folder of a committee, for the command that a message names.
        evaluation: Output folder of `dpa4 eval`.
        table: Its table of errors.
    """
    command = f"dpa4 eval {model or 'best.safetensors'} test.xyz --output eval"
    if evaluation is None:
        return html.missing("No evaluation was given; pass its folder with --eval", command)
    parts = (
        [html.missing(f"{evaluation} has no errors.json", command)]
        if table is None
        else [_error_tables(table)]
    )
    parity = html.picture(evaluation, "parity", "Predictions against labels")
    parts.append(parity or html.missing(f"{evaluation} has no parity.png", command))
    if calibration := html.picture(evaluation, "calibration", "Error against deviation of the committee"):
        parts += ["<h3>Deviation of the committee</h3>", calibration]
    if rows := read_csv(evaluation / "worst.csv"):
        parts += ["<h3>Worst structures</h3>", WORST, _worst(rows)]
    return "\n".join(parts)


def _worst(rows: Sequence[dict[str, str]]) -> str:
    """Table of worst.csv, whose columns may be those of another version."""
    shown = [name for name in WORST_COLUMNS if name in rows[0]]
    cells = [[html.short(row[name]) or "-" for name in shown] for row in rows]
    return html.table([WORST_COLUMNS[name] for name in shown], cells)


def _error_tables(table: list[dict[str, Any]]) -> str:
    """Table of the errors of all structures, followed by a table with a row for each group."""
    header = ["quantity", "unit", "values", "MAE", "RMSE", "largest"]
    names = ("quantity", "unit", "values", "mae", "rmse", "maximum")
    parts = [html.table(header, [[html.short(r[n]) for n in names] for r in table if r["group"] == "all"])]
    groups = list(dict.fromkeys(r["group"] for r in table if r["group"] != "all"))
    if groups:
        found = {
            (r["group"], r["quantity"], kind): html.short(r[kind]) for r in table for kind in ("mae", "rmse")
        }
        # Energies of whole structures of different sizes do not compare, and the columns fill the page without them.
        shown = [r for r in table if r["quantity"] != "energy"]
        columns = {(r["quantity"], kind): r["unit"] for r in shown for kind in ("mae", "rmse")}
        header = [
            "\n".join((*quantity.split(maxsplit=1), kind.upper(), f"({unit})"))
            for (quantity, kind), unit in columns.items()
        ]
        rows = [[group, *(found.get((group, *column), "-") for column in columns)] for group in groups]
        parts += ["<h3>By group</h3>", html.table(["group", *header], rows)]
    return "\n".join(parts)


def _pair_curves(model: Path | None, compute: bool, device: str | torch.device, progress: bool) -> str:
    if model is None:
        return html.missing("There is no model yet", "dpa4 train run.yaml --resume")
    if not compute:
        return html.missing("Pair curves were switched off", f"dpa4 pairs {model}")
    potential = load_potential(model, device=choose_device(device))
    pairs = _pairs_of_the_data(potential)
    chosen = pairs[:MAX_PAIRS]
    computed = track(pair_curves(potential, chosen), "pair curves", total=len(chosen), disable=not progress)
    curves = list(computed)
    diagnoses = [diagnose(curve) for curve in curves]
    parts = [
        "<p>Energy, force and curvature of two isolated atoms. Flags: no wall (at 0.2 Å the atoms do not repel each "
        "other, or the energy is less than 1 eV), several wells (the force changes sign more than once), spike (the "
        "energy varies by more than 0.1 eV in excess of a single well), jump (energy and force disagree).</p>"
    ]
    if len(pairs) > MAX_PAIRS:
        text = (
            f"Only {MAX_PAIRS} of {len(pairs)} pairs are shown, with the shortest distances in the training data; "
            "for all pairs"
        )
        parts.append(html.missing(text, f"dpa4 pairs {model}"))
    for first in range(0, len(curves), PAIRS_OF_A_FIGURE):
        page = slice(first, first + PAIRS_OF_A_FIGURE)
        parts.append(html.image(svg_of(draw_pairs(curves[page], diagnoses[page])), "Pair curves"))
    parts.append(_diagnoses(diagnoses))
    if found := {flag: ADVICE[flag] for diagnosis in diagnoses for flag in diagnosis.flags}:
        parts += ["<h3>What to do about the flags</h3>", html.name_table(found)]
    return "\n".join(parts)


def _pairs_of_the_data(potential: Potential) -> list[ElementPair]:
    """Pairs that were neighbours in the training data, closest first; all pairs if the model does not record them."""
    known = element_pairs(potential)
    if potential.coverage is None or potential.coverage.shortest is None:
        return known
    closest = sorted(potential.coverage.shortest.items(), key=lambda entry: entry[1])
    return [pair for pair, _ in closest if pair in known or pair[::-1] in known]


def _diagnoses(diagnoses: Sequence[Diagnosis]) -> str:
    header = ["pair", "minimum (Å)", "depth (eV)", "force flips", "excess variation (eV)", "flags"]
    rows = []
    for d in diagnoses:
        values = (d.minimum, d.depth, d.force_flips, d.excess_variation)
        numbers = ["-" if v is None else html.short(round(v, 4) + 0) for v in values]  # no -0
        rows.append([d.pair, *numbers, ", ".join(d.flags) or "none"])
    return html.table(header, rows)


def model_section(card: ModelCard | None) -> str:
    """Model card."""
    if card is None:
        return html.missing("There is no model yet", "dpa4 train run.yaml --resume")
    tables = []
    for title, lines in card.sections.items():
        if not title.startswith("Training run"):  # see Configuration
            tables.append(f"<h3>{escape(title)}</h3>\n{html.name_table(lines)}")
    return "\n".join([f"<p>{escape(card.title)}</p>", *tables])


def configuration_section(folder: Path) -> str:
    """Run file of a training run."""
    file = folder / "run.yaml"
    if not file.is_file():
        return html.missing("There is no run.yaml", "dpa4 train run.yaml")
    return f"<pre>{escape(file.read_text(encoding='utf-8'))}</pre>"
