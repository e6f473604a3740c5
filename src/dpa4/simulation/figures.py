"""Figures of dynamics and relaxations, drawn from the tables in their folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpa4.output import new_figure, plain_ticks, read_csv, short
from dpa4.simulation.restart import THERMO

CONSERVED = "conserved_eV"  # energy of the structure and its baths; nvt and npt only
PRESSURE = "pressure_GPa"  # only if periodic along all three axes
VOLUME, DENSITY = "volume_A3", "density_g_cm3"  # npt only
DEVIATION = "max_force_std_eV_A"  # largest deviation of a force; committees only
THERMOSTATS = ("langevin", "nvt", "npt")
WINDOWS = 10  # windows of the running mean in a run
RUNNING_MEAN_ROWS = 2 * WINDOWS  # rows from which a window has the three values that make a mean
RELAXATIONS = 100  # largest number of structures in a figure

Array = NDArray[np.float64]


def read_thermo(folder: Path) -> dict[str, Array]:
    """Read the columns of the table of a run of molecular dynamics.

    Raises:
        ValueError: If the table has no rows, or an entry is not a number.
    """
    path = folder / THERMO
    rows = read_csv(path)
    try:
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or run the dynamics again") from None


def energy_change(table: Mapping[str, Array], num_atoms: int) -> Array:
    """Change of the conserved energy, or of the total energy if no other is conserved, (n,) in meV/atom."""
    energy = table.get(CONSERVED, table["total_eV"])
    return 1000 * (energy - energy[0]) / num_atoms


def draw_dynamics(table: Mapping[str, Array], num_atoms: int, settings: Mapping[str, Any]) -> Any:
    """Draw energy, temperature, pressure, volume and force deviation over time, with running means and set points.

    Args:
        table: Columns of thermo.csv.
        num_atoms: Number of atoms.
        settings: Settings of the run: ensemble, and temperature (K) and pressure (GPa) of its baths.
    """
    ensemble = settings["ensemble"]
    what = "conserved" if CONSERVED in table else "total"
    baths = {"temperature_K": settings["temperature"]} if ensemble in THERMOSTATS else {}
    baths |= {PRESSURE: settings["pressure"]} if ensemble == "npt" else {}
    columns = {
        "temperature_K": "temperature (K)",
        PRESSURE: "pressure (GPa)",
        VOLUME: "volume (Å³)",
        DEVIATION: "largest force\ndeviation (eV/Å)",
    }
    panels = [(f"{what} energy,\nchange (meV/atom)", energy_change(table, num_atoms), None)]
    panels += [(label, table[name], baths.get(name)) for name, label in columns.items() if name in table]
    time = table["time_ps"]
    shown: dict[str, Any] = {}
    figure = new_figure(8, 2.2 * len(panels) + 0.4)
    axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for axis, (label, values, bath) in zip(axes, panels, strict=True):
        running = _running_mean(values)
        style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.5} if len(running) else {"linewidth": 1.5}
        lines = {"every row of the table": axis.plot(time, values, color="C0", **style)[0]}
        if len(running):
            width = len(values) - len(running)
            middle = time[width // 2 : width // 2 + len(running)]
            name = f"running mean over {time[width] - time[0]:.3g} ps"
            lines[name] = axis.plot(middle, running, linewidth=1.8, color="C0")[0]
        title = f"mean {short(values.mean())}, standard deviation {short(values.std())}"
        if bath is not None:
            lines["set point"] = axis.axhline(bath, color="C3", linewidth=1.2, linestyle="--")
            title += f", set point {bath:g}"
        axis.set_ylabel(label)
        # A common offset of the numbers would hide how small the changes are.
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(alpha=0.3)
        if axis is not axes[0]:
            axis.set_title(title, fontsize=9, loc="right")
        shown |= lines
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=3, fontsize=9)
    axes[-1].set_xlabel("time (ps)")
    axes[-1].margins(x=0.01)
    return figure


def _running_mean(values: Array) -> Array:
    """Means over windows of a tenth of the values, one value apart; empty for few values."""
    if len(values) < RUNNING_MEAN_ROWS:
        return np.empty(0)
    width = len(values) // WINDOWS | 1  # odd, so that a window has a middle
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def draw_relaxations(folder: Path, fmax: float) -> Any:
    """Draw change of energy and largest force of relaxations against the step.

    Of many structures, those that did not converge come first.

    Args:
        folder: Folder with relax.csv and steps.csv.
        fmax: Threshold of the largest force, in eV/Angstrom.
    """
    converged = {row["structure"]: row["converged"] == "True" for row in read_csv(folder / "relax.csv")}
    histories: dict[str, list[dict[str, str]]] = {}
    for row in read_csv(folder / "steps.csv"):
        histories.setdefault(row["structure"], []).append(row)
    known = [number for number in histories if number in converged]
    shown = sorted(known, key=converged.__getitem__)[:RELAXATIONS]
    figure = new_figure(8, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True)
    style: dict[str, Any] = {
        "linewidth": 1.2 if len(shown) < 10 else 0.8,
        "alpha": 0.9 if len(shown) < 10 else 0.5,
    }
    labelled = set()
    for number in reversed(shown):  # those that did not converge on top
        step, atoms, energy, force = (
            np.array([float(row[name]) for row in histories[number]])
            for name in ("step", "atoms", "energy", "max_force")
        )
        label = "converged" if converged[number] else "not converged"
        colour = "C0" if converged[number] else "C3"
        upper.plot(step, 1e3 * (energy - energy[0]) / atoms, color=colour, **style)
        lower.plot(step, force.clip(1e-6), color=colour, label=None if label in labelled else label, **style)
        for axis, last in (
            (upper, 1e3 * (energy[-1] - energy[0]) / atoms[-1]),
            (lower, max(force[-1], 1e-6)),
        ):
            axis.plot(step[-1], last, "o" if converged[number] else "x", color=colour, markersize=5)
        labelled.add(label)
    lower.axhline(fmax, color="0.5", linewidth=1, linestyle="--", label=f"fmax = {fmax:g}")
    upper.set_ylabel("energy, change\n(meV/atom)")
    lower.set(ylabel="largest force\n(eV/Å)", xlabel="step", yscale="log")
    plain_ticks(lower.yaxis)
    lower.legend(fontsize=8)
    title = f"{sum(converged.values())} of {len(converged)} structures converged"
    upper.set_title(f"{title}, {len(shown)} shown" if len(shown) < len(converged) else title, fontsize=10)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    lower.xaxis.get_major_locator().set_params(integer=True)
    return figure
