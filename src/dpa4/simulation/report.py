"""Report of a training run: one self-contained HTML page."""

import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from dpa4.data.coverage import ElementPair
from dpa4.output import atomic_write, check_writable, read_csv
from dpa4.potential import Potential, load_potential, model_card
from dpa4.potential.card import ModelCard
from dpa4.simulation import html
from dpa4.simulation.pair_curves import Diagnosis, diagnose, draw_pairs, element_pairs, pair_curves
from dpa4.system import choose_device, user_path
from dpa4.training.logs import ERROR_UNITS

MAX_PAIRS = 60  # in the report; `dpa4 pairs` has no limit
PAIRS_OF_A_FIGURE = 3  # one row, as wide as the page
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


def write_report(
    run: str | Path,
    output: str | Path | None = None,
    *,
    evaluation: str | Path | None = None,
    pairs: bool = True,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Path:
    """Write one self-contained HTML file about a training run.

    Sections: summary, learning curve, errors on test data, pair curves, model card, configuration, versions. A
    section without data says what is missing and names the command that creates it.

    Args:
        run: Output folder of the training run.
        output: File to write or replace; by default report.html in the folder of the run.
        evaluation: Output folder of `dpa4 eval` for the model.
        pairs: Compute the curves of the pairs of elements that were neighbours in the training data, or of all pairs
            if the model file does not say which were. Of more than 60 pairs, only the 60 with the shortest distances
            are shown.
        device: Device to compute the curves on.
        progress: Show a progress bar.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If the folder is not the output folder of a training run, or a file in it is damaged.
    """
    folder = user_path(run)
    evaluation = None if evaluation is None else user_path(evaluation)
    for given in (folder, *([evaluation] if evaluation is not None else [])):
        if not given.is_dir():
            raise FileNotFoundError(f"there is no folder {given}")
    names = ("best.safetensors", "last.safetensors", "train.csv", "run.yaml")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{folder} is not an output folder of a training run: it has none of {', '.join(names)}"
        )
    file = folder / "report.html" if output is None else user_path(output)
    check_writable(file)
    model = next((folder / name for name in names[:2] if (folder / name).is_file()), None)
    card = None if model is None else model_card(model)
    validations = _validations(folder)
    table = None if evaluation is None else _error_table(evaluation / "errors.json")
    sections = {
        "Summary": _summary(card, validations, table),
        "Learning curve": _learning_curve(folder, validations),
        "Errors": _errors(model, evaluation, table),
        "Pair curves": _pair_curves(model, pairs, device, progress),
        "Model": _model(card),
        "Configuration": _configuration(folder),
        "Versions": html.versions(),
    }
    name = folder.resolve().name
    text = html.page(f"{name}: DPA4 training", f"DPA4 training run: {name}", sections)
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


# --- sections


def _summary(
    card: ModelCard | None, validations: dict[str, dict[str, str]], table: list[dict[str, Any]] | None
) -> str:
    lines: dict[str, str] = {}
    if card is not None:
        known = card.sections["Model"] | card.sections["Provenance"]
        lines |= {name: known[name] for name in SUMMARY if name in known}
    for label, row in validations.items():
        errors = [
            f"{what} {html.short(row[f'{what}_mae'])} {unit}"
            for what, unit in ERROR_UNITS.items()
            if row.get(f"{what}_mae")
        ]
        lines[f"validation MAE, {label}"] = ", ".join(errors)
    if table:
        lines["test MAE"] = ", ".join(
            f"{r['quantity']} {html.short(r['mae'])} {r['unit']}" for r in table if r["group"] == "all"
        )
    return html.name_table(lines) if lines else "<p>There is neither a model nor a validation result yet.</p>"


def _validations(folder: Path) -> dict[str, dict[str, str]]:
    """Best and last row of valid.csv, or one row if they are the same; {} without validation."""
    rows = read_csv(folder / "valid.csv")
    best = [row for row in rows if row["best"] == "1"]
    chosen = [("best", row) for row in best[-1:]] + [
        ("last", row) for row in rows[-1:] if row not in best[-1:]
    ]
    return {f"{label} (step {row['step']})": row for label, row in chosen}


def _learning_curve(folder: Path, validations: dict[str, dict[str, str]]) -> str:
    parts = []
    if (folder / "learning_curve.png").is_file():
        parts.append(html.image((folder / "learning_curve.png").read_bytes(), "Learning curve"))
    else:
        parts.append(html.missing("There is no learning_curve.png", "dpa4 train run.yaml --resume"))
    if not validations:
        return "\n".join([*parts, "<p>The run has no validation data.</p>"])
    rows = [["score", *(html.short(row["score"]) for row in validations.values())]]
    for name in next(iter(validations.values())):
        what, _, kind = name.partition("_")
        values = [row[name] for row in validations.values()]
        if what in ERROR_UNITS and any(values):
            rows.append([f"{what} {kind.upper()} ({ERROR_UNITS[what]})", *map(html.short, values)])
    return "\n".join([*parts, "<h3>Validation</h3>", html.table(["", *validations], rows)])


def _error_table(file: Path) -> list[dict[str, Any]] | None:
    """Rows of the error table of `dpa4 eval`; None if the file does not exist."""
    if not file.is_file():
        return None
    names = ("group", "quantity", "unit", "values", "mae", "rmse", "maximum")
    try:
        return [{name: row[name] for name in names} for row in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); write it again with dpa4 eval") from error


def _errors(model: Path | None, evaluation: Path | None, table: list[dict[str, Any]] | None) -> str:
    command = f"dpa4 eval {model or 'best.safetensors'} test.xyz --output eval"
    if evaluation is None:
        return html.missing("No evaluation was given; pass its folder with --eval", command)
    parts = (
        [html.missing(f"{evaluation} has no errors.json", command)]
        if table is None
        else [_error_tables(table)]
    )
    if (evaluation / "parity.png").is_file():
        parts.append(html.image((evaluation / "parity.png").read_bytes(), "Predictions against labels"))
    else:
        parts.append(html.missing(f"{evaluation} has no parity.png", command))
    return "\n".join(parts)


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
        columns = {(r["quantity"], kind): r["unit"] for r in table for kind in ("mae", "rmse")}
        header = [f"{quantity} {kind.upper()} ({unit})" for (quantity, kind), unit in columns.items()]
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
        drawn = io.BytesIO()
        draw_pairs(curves[page], diagnoses[page]).savefig(drawn, dpi=115, format="png")
        parts.append(html.image(drawn.getvalue(), "Pair curves"))
    parts.append(_diagnoses(diagnoses))
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
        rows.append([d.pair, *("-" if v is None else html.short(v) for v in values), ", ".join(d.flags)])
    return html.table(header, rows)


def _model(card: ModelCard | None) -> str:
    if card is None:
        return html.missing("There is no model yet", "dpa4 train run.yaml --resume")
    tables = []
    for title, lines in card.sections.items():
        own = {name: value for name, value in lines.items() if name != "options"}  # see Configuration
        tables.append(f"<h3>{escape(title)}</h3>\n{html.name_table(own)}")
    return "\n".join([f"<p>{escape(card.title)}</p>", *tables])


def _configuration(folder: Path) -> str:
    file = folder / "run.yaml"
    if not file.is_file():
        return html.missing("There is no run.yaml", "dpa4 train run.yaml")
    return f"<pre>{escape(file.read_text(encoding='utf-8'))}</pre>"
