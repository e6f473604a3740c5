"""Draw the picture of the README from the folder that ``make demo`` leaves: learning curve, parity and dynamics.

    make demo
    .venv/bin/python scripts/make_readme_figure.py

Nothing is computed again: the figure shows the tables and predictions in the folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from dpa4.output import new_figure, plain_ticks, read_csv, save_figure
from dpa4.simulation.figures import energy_change, read_thermo

ROOT = Path(__file__).resolve().parents[1]
UNSEEN = "acetamide"  # in the test set only
UNITS = {"energy": "meV/atom", "forces": "meV/Å"}


def draw_errors(axis: Any, folder: Path) -> None:
    """Draw the validation errors of energy and forces against the step."""
    rows = read_csv(folder / "valid.csv")
    steps = [int(row["step"]) for row in rows]
    for number, (quantity, unit) in enumerate(UNITS.items()):
        values = [float(row[f"{quantity}_mae"]) for row in rows]
        axis.plot(steps, values, "o-", color=f"C{number}", label=f"{quantity} ({unit})")
    axis.set(
        yscale="log", xlim=(0, None), xlabel="step",
        ylabel="mean absolute error", title="Training: errors on validation data",
    )  # fmt: skip
    plain_ticks(axis.yaxis)
    axis.legend()


def draw_parity(axis: Any, folder: Path) -> None:
    """Draw predicted against true force components of the test set; an unseen molecule has a colour of its own."""
    frames = ase.io.read(folder / "predictions.xyz", ":")
    both: dict[bool, list[Any]] = {False: [], True: []}
    for atoms in frames:
        pair = np.stack([atoms.arrays["REF_forces"], atoms.get_forces()]).reshape(2, -1)
        both[atoms.info.get("config_type") == UNSEEN].append(pair)
    limit = 0.0
    for unseen, label in (
        (False, "other molecules, solid CO₂"),
        (True, f"{UNSEEN}, not in the training data"),
    ):
        true, predicted = np.concatenate(both[unseen], axis=1)
        error = 1e3 * np.abs(predicted - true).mean()
        axis.plot(
            true, predicted, "o", markersize=2.5, alpha=0.5, markeredgewidth=0, color=f"C{3 * unseen}",
            label=f"{label}: MAE {error:.0f} meV/Å",
        )  # fmt: skip
        limit = max(limit, float(np.abs([true, predicted]).max()) * 1.05)
    axis.plot([-limit, limit], [-limit, limit], color="0.6", linewidth=1, zorder=0)
    axis.set(
        xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="GFN2-xTB (eV/Å)",
        ylabel="dpa4 (eV/Å)", title="Evaluation: forces of the test set",
    )  # fmt: skip
    axis.yaxis.set_major_locator(axis.xaxis.get_major_locator())
    axis.legend(loc="upper left", fontsize=8, markerscale=2)


def draw_dynamics(axis: Any, folder: Path) -> None:
    """Draw the changes of potential, kinetic and total energy of the molecular dynamics."""
    table = read_thermo(folder)
    settings = json.loads((folder / "restart.json").read_text(encoding="utf-8"))
    count = len(settings["system"]["elements"])
    for name, colour in (("potential", "C0"), ("kinetic", "C1")):
        energy = table[f"{name}_eV"]
        axis.plot(
            table["time_ps"], 1e3 * (energy - energy[0]) / count, color=colour, linewidth=0.9, label=name
        )
    total = energy_change(table, count)
    axis.plot(table["time_ps"], total, color="k", label=f"total: within {np.ptp(total):.1f} meV/atom")
    axis.set(
        xlim=(0, table["time_ps"][-1]), xlabel="time (ps)", ylabel="change of energy (meV/atom)",
        title=f"Dynamics: ethanol, {settings['settings']['ensemble'].upper()}",
    )  # fmt: skip
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    axis.legend(loc="upper center", ncols=3, fontsize=8, columnspacing=1)


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "demo-run", help="folder of make demo")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "demo.png")
    options = parser.parse_args()
    figure = new_figure(13.5, 4.3)
    errors, parity, dynamics = figure.subplots(1, 3)
    draw_errors(errors, options.folder / "training")
    draw_parity(parity, options.folder / "evaluation")
    draw_dynamics(dynamics, options.folder / "md")
    for axis in (errors, parity, dynamics):
        axis.grid(alpha=0.3)
    save_figure(figure, options.output, dpi=110)


if __name__ == "__main__":
    main()
