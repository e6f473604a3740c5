"""A training run on one page: an HTML file that needs nothing else."""

import base64
import io
import json
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from dpa4 import __version__
from dpa4.potential import Potential, load_potential, model_card
from dpa4.simulation.dimer import PER_PAGE, Diagnosis, Pair, diagnose, draw_pairs, element_pairs, pair_curves
from dpa4.system import atomic_write, choose_device, read_csv

MAX_PAIRS = 60  # in the report; `dpa4 dimer` draws any number

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #eee; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; }
img { max-width: 100%; }
.missing { color: #a40000; }
"""


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

    Its sections: model card, learning curve, errors on test data, pair curves, configuration, versions. Where
    something is missing, the section says so and names the command that makes it.

    Args:
        run: Output folder of the training.
        output: The file; report.html in the folder of the run by default. An earlier one is replaced.
        evaluation: Output folder of `dpa4 eval` with the model.
        pairs: Compute the pair curves of the pairs of elements that were neighbours in the training data (all pairs
            of the model if its file does not tell); of more than 60, of those with the shortest distances.
        device: Where to compute them.
        progress: Show a progress bar.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If the folder holds nothing of a training run, or a file in it is damaged.
    """
    folder = Path(run)
    for given in (folder, *([Path(evaluation)] if evaluation is not None else [])):
        if not given.is_dir():
            raise FileNotFoundError(f"there is no folder {given}")
    names = ("best.safetensors", "last.safetensors", "train.csv", "run.yaml")
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{folder} is no output folder of a training run: it has none of {', '.join(names)}")
    file = folder / "report.html" if output is None else Path(output)
    model = next((folder / name for name in names[:2] if (folder / name).is_file()), None)
    sections = {
        "Model": _model(model),
        "Learning curve": _learning_curve(folder),
        "Errors": _errors(model, None if evaluation is None else Path(evaluation)),
        "Pair curves": _pair_curves(model, pairs, device, progress),
        "Configuration": _configuration(folder),
        "Versions": _versions(),
    }
    body = "\n".join(
        f'<section id="{escape(title.lower().replace(" ", "-"))}">\n<h2>{escape(title)}</h2>\n{content}\n</section>'
        for title, content in sections.items()
    )
    name = escape(folder.resolve().name)
    text = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}: DPA4 training</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>Training run {name}</h1>\n{body}\n</body>\n</html>\n"
    )
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


# --- sections


def _model(model: Path | None) -> str:
    if model is None:
        return _missing("There is no model yet", "dpa4 train run.yaml --resume")
    card = model_card(model)
    tables = [f"<h3>{escape(title)}</h3>\n{_pairs_table(lines)}" for title, lines in card.sections.items()]
    return "\n".join([f"<p>{escape(card.title)}</p>", *tables])


def _learning_curve(folder: Path) -> str:
    parts = []
    if (folder / "learning_curve.png").is_file():
        parts.append(_image((folder / "learning_curve.png").read_bytes(), "Learning curve"))
    else:
        parts.append(_missing("There is no learning_curve.png", "dpa4 train run.yaml --resume"))
    validations = read_csv(folder / "valid.csv")
    if validations:
        best = [row for row in validations if row["best"] == "1"]
        chosen = {"best": best[-1], "last": validations[-1]} if best else {"last": validations[-1]}
        columns = [
            name for name in validations[0] if name != "best" and any(r[name] for r in chosen.values())
        ]
        rows = [[label, *(_short(row[name]) for name in columns)] for label, row in chosen.items()]
        parts += [
            "<p>Validation; errors of energy and virial in meV/atom, of forces in meV/Å:</p>",
            _table(["", *columns], rows),
        ]
    else:
        parts.append("<p>There were no validation data.</p>")
    return "\n".join(parts)


def _errors(model: Path | None, evaluation: Path | None) -> str:
    command = f"dpa4 eval {model or 'best.safetensors'} test.xyz --output eval"
    if evaluation is None:
        return _missing("No evaluation was given; name its folder by --eval", command)
    parts = []
    if (evaluation / "errors.json").is_file():
        columns = ("group", "quantity", "unit", "values", "mae", "rmse", "maximum")
        try:
            found = json.loads((evaluation / "errors.json").read_text(encoding="utf-8"))
            rows = [[_short(row[name]) for name in columns] for row in found]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{evaluation / 'errors.json'} is damaged ({error!r})") from error
        parts.append(_table(["group", "quantity", "unit", "values", "MAE", "RMSE", "max"], rows))
    else:
        parts.append(_missing(f"{evaluation} has no errors.json", command))
    if (evaluation / "parity.png").is_file():
        parts.append(_image((evaluation / "parity.png").read_bytes(), "Predictions against labels"))
    else:
        parts.append(_missing(f"{evaluation} has no parity.png", command))
    return "\n".join(parts)


def _pair_curves(model: Path | None, wanted: bool, device: str | torch.device, progress: bool) -> str:
    if model is None:
        return _missing("There is no model yet", "dpa4 train run.yaml --resume")
    if not wanted:
        return _missing("Pair curves were switched off", f"dpa4 dimer {model} --output dimer")
    potential = load_potential(model, device=choose_device(device))
    pairs = _pairs_of_the_data(potential)
    chosen = pairs[:MAX_PAIRS]
    computed = track(pair_curves(potential, chosen), "pair curves", total=len(chosen), disable=not progress)
    curves = list(computed)
    diagnoses = [diagnose(curve) for curve in curves]
    parts = [
        "<p>Energy, force and curvature of two atoms alone. Flags: no wall (at 0.2 Å the atoms do not repel, or by "
        "less than 1 eV), several wells (the force changes sign more than once), spike (the energy goes up and down "
        "by more than 0.1 eV beyond a single well), jump (energy and force disagree).</p>"
    ]
    if len(pairs) > MAX_PAIRS:
        text = (
            f"These are the {MAX_PAIRS} of {len(pairs)} pairs that came closest in the training data; for all"
        )
        parts.append(_missing(text, f"dpa4 dimer {model} --output dimer"))
    for first in range(0, len(curves), PER_PAGE):
        page = slice(first, first + PER_PAGE)
        drawn = io.BytesIO()
        draw_pairs(curves[page], diagnoses[page]).savefig(drawn, dpi=100, format="png")
        parts.append(_image(drawn.getvalue(), "Pair curves"))
    parts.append(_diagnoses(diagnoses))
    return "\n".join(parts)


def _pairs_of_the_data(potential: Potential) -> list[Pair]:
    """Pairs that were neighbours in the training data, closest first; without knowledge of them, all."""
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
        rows.append([d.pair, *("-" if v is None else _short(v) for v in values), ", ".join(d.flags)])
    return _table(header, rows)


def _configuration(folder: Path) -> str:
    file = folder / "run.yaml"
    if not file.is_file():
        return _missing("There is no run.yaml", "dpa4 train run.yaml")
    return f"<pre>{escape(file.read_text(encoding='utf-8'))}</pre>"


def _versions() -> str:
    return _pairs_table(
        {
            "report made": datetime.now(UTC).isoformat(timespec="seconds"),
            "dpa4": __version__,
            "PyTorch": torch.__version__,
            "NumPy": version("numpy"),
            "ASE": version("ase"),
            "Python": platform.python_version(),
            "system": platform.platform(),
        }
    )


# --- pieces of HTML; each escapes its text


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">{escape(what)}: <code>{escape(command)}</code></p>'


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _pairs_table(lines: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>\n" for a, b in lines.items())
    return f"<table>\n{rows}</table>"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _cell(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>' if _is_number(text) else f"<td>{escape(text)}</td>"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    """Text of a value, with four digits if it is a fraction."""
    text = str(value)
    return f"{float(text):.4g}" if _is_number(text) and not text.lstrip("-").isdecimal() else text
