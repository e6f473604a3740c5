"""Sections of the report of a committee: its members side by side, learning curves and calibration."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dpa4.output import new_figure, plain_ticks, read_csv, svg_of
from dpa4.parsing import read_yaml
from dpa4.potential import model_card
from dpa4.potential.card import ModelCard
from dpa4.potential.committee import BEST
from dpa4.simulation import html
from dpa4.simulation.report_training import configuration_section, error_table, errors_section, model_section
from dpa4.training.calibration import calibration_lines
from dpa4.training.logs import ERROR_UNITS

SHARED = ("preset", "trainable parameters", "elements", "cutoff", "symmetry")
TRAIN = "dpa4 train run.yaml --committee {} --resume"
SPREAD = 1.5  # largest over smallest error of the members; larger ratios get an advice
CALIBRATION = (
    "<p>Deviation: how far the members are apart. Error: how far their mean is from the labels of structures that no "
    "member was trained on. If error = 1 x deviation, the deviation is an error bar. Members often agree too well; "
    "multiply deviations by the number then. A rank correlation near 1 means that large deviations point to "
    "large errors, near 0 that they do not.</p>"
)


def committee_sections(folder: Path, members: Sequence[Path], evaluation: Path | None) -> dict[str, str]:
    """Sections of the report, as HTML by title.

    Args:
        folder: Output folder of the committee.
        members: Folders of its members.
        evaluation: Output folder of `dpa4 eval` for the committee.
    """
    cards = {m.name: model_card(m / BEST) for m in members if (m / BEST).is_file()}
    validations = {m.name: read_csv(m / "valid.csv") for m in members}
    table = None if evaluation is None else error_table(evaluation / "errors.json")
    models = folder if len(cards) == len(members) else None
    return {
        "Summary": _summary(folder, cards, len(members)),
        "Members": _members(members, cards, validations),
        "Learning curves": _learning_curves(validations),
        "Calibration": _calibration(folder, len(members)),
        "Errors": errors_section(models, evaluation, table),
        "Model": model_section(next(iter(cards.values()), None)),
        "Configuration": configuration_section(members[0]),
    }


def _summary(folder: Path, cards: dict[str, ModelCard], members: int) -> str:
    lines = {
        "members": f"{members}, of which {len(cards)} have a model" if len(cards) < members else str(members)
    }
    if cards:
        card = next(iter(cards.values()))
        known = card.sections["Model"] | card.sections["Provenance"]
        lines |= {name: known[name] for name in SHARED if name in known}
    for line in calibration_lines(folder):
        quantity, _, text = line.partition(": ")
        lines[f"calibration, {quantity}"] = text
    parts = [html.name_table(lines)]
    if len(cards) < members:
        parts.append(html.missing("Some members have no model yet", TRAIN.format(members)))
    return "\n".join(parts)


def _members(
    members: Sequence[Path], cards: dict[str, ModelCard], validations: dict[str, list[dict[str, str]]]
) -> str:
    """Table with a row for each member: seeds, data, step, and errors of its best model."""
    errors = [
        f"{what}_mae"
        for what in ERROR_UNITS
        if any(_best(v).get(f"{what}_mae") for v in validations.values())
    ]
    header = ["member", "seed", "split seed", "training data", "best step", "fingerprint", "score"]
    header += [f"{e.removesuffix('_mae')} MAE\n({ERROR_UNITS[e.removesuffix('_mae')]})" for e in errors]
    rows = []
    for member in members:
        card, best = cards.get(member.name), _best(validations[member.name])
        origin = card.sections["Provenance"] if card else {}
        numbers = [html.short(best[name]) if best.get(name) else "-" for name in ("score", *errors)]
        seeds = [_option(member, *path) for path in (("training", "seed"), ("data", "split_seed"))]
        data = origin.get("training data", "-").partition(" of ")[0]
        rows.append(
            [member.name, *seeds, data, best.get("step", "-"), origin.get("fingerprint", "-"), *numbers]
        )
    parts = [
        "<p>Errors are those of each member's best model on its own validation data, which differ from member to "
        "member unless the run has a validation file.</p>",
        html.table(header, rows),
    ]
    for name in errors:
        values = [float(best[name]) for v in validations.values() if (best := _best(v)).get(name)]
        if len(values) > 1 and min(values) > 0 and max(values) > SPREAD * min(values):
            parts.append(
                f"<p>The largest {escape(name.removesuffix('_mae'))} error is {max(values) / min(values):.1f} times "
                "the smallest. If the learning curve of a member stands out, too, train it longer or leave it out: "
                "one bad member spoils mean and deviation.</p>"
            )
    return "\n".join(parts)


def _best(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Last row of valid.csv that was the best one; {} without one."""
    return next((row for row in reversed(rows) if row.get("best") == "1"), {})


def _option(member: Path, section: str, name: str) -> str:
    """Option in the run file of a member; "-" if the file is absent or damaged."""
    try:
        return str(read_yaml(member / "run.yaml")[section][name])
    except (OSError, ValueError, TypeError, KeyError):
        return "-"


def _learning_curves(validations: dict[str, list[dict[str, str]]]) -> str:
    shown = [
        what for what in ERROR_UNITS if any(row.get(f"{what}_mae") for v in validations.values() for row in v)
    ]
    if not shown:
        return "<p>The members have no validation results yet.</p>"
    figure = draw_learning_curves(validations, shown)
    return html.image(
        svg_of(figure), "Mean absolute errors on validation data against the step, a line for each member"
    )


def draw_learning_curves(validations: dict[str, list[dict[str, str]]], quantities: Sequence[str]) -> Any:
    """Draw the validation errors of all members against the step; a circle marks the best model of each.

    Args:
        validations: Rows of valid.csv by the name of the member.
        quantities: Quantities to draw, names in ``ERROR_UNITS``.
    """
    figure = new_figure(max(4.0 * len(quantities), 5.0), 4.0)
    axes = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axis, what in zip(axes, quantities, strict=True):
        for number, (member, rows) in enumerate(validations.items()):
            known = [row for row in rows if row.get(f"{what}_mae")]
            if not known:
                continue
            step, error = (np.array([float(row[name]) for row in known]) for name in ("step", f"{what}_mae"))
            axis.plot(step, error, color=f"C{number % 10}", linewidth=1.2, label=member)
            if (best := _best(known)) and best[f"{what}_mae"]:
                axis.plot(
                    float(best["step"]),
                    float(best[f"{what}_mae"]),
                    "o",
                    color=f"C{number % 10}",
                    markersize=5,
                )
        axis.set(title=what, xlabel="step", ylabel=f"validation MAE ({ERROR_UNITS[what]})", yscale="log")
        plain_ticks(axis.yaxis)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
    return figure


def _calibration(folder: Path, members: int) -> str:
    lines = calibration_lines(folder)
    if not lines:
        return html.missing(
            "There is no calibration; it is made when all members are trained", TRAIN.format(members)
        )
    picture = html.picture(folder, "calibration", "Error against deviation of the committee") or ""
    table = dict(line.split(": ", 1) for line in lines)
    return "\n".join([CALIBRATION, html.name_table(table), picture])
