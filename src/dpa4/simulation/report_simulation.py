"""Sections of the report of a simulation: molecular dynamics, relaxations, phonons."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from dpa4.output import read_csv, svg_of
from dpa4.parsing import read_json
from dpa4.simulation import html
from dpa4.simulation.dynamics import summary
from dpa4.simulation.figures import (
    DENSITY,
    PRESSURE,
    RUNNING_MEAN_ROWS,
    THERMOSTATS,
    VOLUME,
    draw_dynamics,
    draw_relaxations,
    energy_change,
    read_thermo,
)
from dpa4.simulation.relax import FMAX
from dpa4.simulation.restart import THERMO, Restart, read_restart
from dpa4.simulation.runs.store import SETTINGS, read_settings

BLOCKS = 10  # for the standard errors of means
STRUCTURES = 100  # rows of the table of relaxed structures
DRIFT = 1.0  # meV/atom/ps; larger drifts get an advice
SETTING_LABELS = {
    "temperature": "temperature (K)",
    "timestep": "time step (fs)",
    "friction": "friction (1/fs)",
    "tdamp": "time constant of the thermostat (fs)",
    "pressure": "pressure (GPa)",
    "pdamp": "time constant of the barostat (fs)",
    "cell": "cell degrees of freedom",
    "interval": "steps between rows and frames",
    "seed": "random seed",
    "model": "fingerprint of the model",
}
ONLY_IN = {
    "friction": ("langevin",),
    "tdamp": ("nvt", "npt"),
    "pressure": ("npt",),
    "pdamp": ("npt",),
    "cell": ("npt",),
}
"""Ensembles in which a setting means something, if not in all."""
QUANTITIES = {
    "temperature_K": "temperature (K)",
    "potential_eV": "potential energy (eV)",
    PRESSURE: "pressure (GPa)",
    VOLUME: "volume (Å³)",
    DENSITY: "density (g/cm³)",
}
PHONONS = {
    "atoms_of_primitive_cell": "atoms of the primitive cell",
    "supercell": "supercell",
    "displacements": "displacements",
    "residual_force": "largest force before displacement (eV/Å)",
    "min_frequency": "lowest frequency (THz)",
    "max_frequency": "highest frequency (THz)",
    "imaginary": "imaginary modes",
    "zero_point_energy": "zero-point energy (kJ/mol)",
    "heat_capacity": "heat capacity at 300 K (J/(K mol))",
}
THERMAL = {
    "temperature_K": "temperature\n(K)",
    "free_energy_kJ_mol": "free energy\n(kJ/mol)",
    "entropy_J_K_mol": "entropy\n(J/(K mol))",
    "heat_capacity_J_K_mol": "heat capacity\n(J/(K mol))",
}


# --- molecular dynamics


def _dynamics(folder: Path) -> dict[str, str]:
    table, state = read_thermo(folder), read_restart(folder)
    with _naming_damage(folder / THERMO):
        return _dynamics_sections(table, state)


def _dynamics_sections(table: Mapping[str, NDArray[np.float64]], state: Restart) -> dict[str, str]:
    count = len(state.positions)
    figure = draw_dynamics(table, count, state.settings)
    return {
        "Summary": _dynamics_summary(table, state),
        "Course": _course(table, html.image(svg_of(figure), "Energy, temperature and pressure against time")),
        "Statistics": _statistics(table, count, state.settings),
        "Settings": html.name_table(_md_settings(state.settings)),
    }


def _course(table: Mapping[str, NDArray[np.float64]], image: str) -> str:
    """Figure; the reason, if it has no running means."""
    rows = len(table["time_ps"])
    if rows >= RUNNING_MEAN_ROWS:
        return image
    return (
        f"<p>Running means are drawn from {RUNNING_MEAN_ROWS} rows of {THERMO} on; there are {rows}. A smaller "
        f"--interval writes more of them.</p>\n{image}"
    )


def _md_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that mean something in the ensemble of a run, with their units; others have no effect."""
    labels = dict(SETTING_LABELS)
    if settings["ensemble"] not in THERMOSTATS:
        labels["temperature"] = "temperature of initial velocities, if drawn (K)"
    unused = {name for name, ensembles in ONLY_IN.items() if settings["ensemble"] not in ensembles}
    return {labels.get(name, name): _plain(v) for name, v in settings.items() if name not in unused}


def _dynamics_summary(table: Mapping[str, NDArray[np.float64]], state: Restart) -> str:
    settings, count = state.settings, len(state.positions)
    result = summary(table, state.step, True, count, settings["ensemble"])
    picoseconds = 1e-3 * state.step * settings["timestep"]
    lines = {
        "structure": f"{Atoms(state.system['elements']).get_chemical_formula()}, {count} atoms",
        "ensemble": settings["ensemble"],
        "simulated time": f"{html.short(picoseconds)} ps, {state.step} steps of {settings['timestep']:g} fs",
    }
    if state.seconds > 0:
        rate = 86.4 * picoseconds / state.seconds
        lines["time of computation"] = html.duration(state.seconds)
        lines["throughput"] = f"{html.short(state.step / state.seconds)} steps/s, {html.short(rate)} ns/day"
    lines["mean temperature"] = f"{result.temperature:.1f} K"
    if result.density is not None:
        lines["mean density"] = f"{result.density:.4f} g/cm³"
    if result.drift is not None:
        lines["drift of the conserved energy"] = f"{result.drift:+.3f} meV/atom/ps"
        lines["largest deviation"] = f"{result.deviation:.3f} meV/atom"
    parts = [html.name_table(lines)]
    if result.drift is not None and abs(result.drift) > DRIFT:
        parts.append(
            f"<p>The drift exceeds {DRIFT:g} meV/atom/ps. Halve the time step: if the drift falls, the step was too "
            "long. If it stays, the energy of the model is not smooth where the atoms are (dpa4 check), or the first "
            "steps of a structure far from equilibrium dominate; then look at the second half of the run.</p>"
        )
    return "\n".join(parts)


def _statistics(table: Mapping[str, NDArray[np.float64]], num_atoms: int, settings: Mapping[str, Any]) -> str:
    """Table of means, with standard errors from blocks."""
    baths = {"temperature_K": settings["temperature"]} if settings["ensemble"] in THERMOSTATS else {}
    baths |= {PRESSURE: settings["pressure"]} if settings["ensemble"] == "npt" else {}
    columns = {label: (table[name], baths.get(name)) for name, label in QUANTITIES.items() if name in table}
    columns["change of the conserved or total energy (meV/atom)"] = energy_change(table, num_atoms), None
    rows = []
    for label, (values, bath) in columns.items():
        half = values[len(values) // 2 :]
        numbers = (
            values.mean(),
            half.mean(),
            _standard_error(half),
            values.std(),
            values.min(),
            values.max(),
        )
        spread = values.std()
        decimals = int(np.clip(2 - np.floor(np.log10(spread)), 0, 9)) if spread > 0 else 3
        set_point = "-" if bath is None else f"{bath:g}"
        rows.append([label, set_point, *("-" if n is None else f"{n:.{decimals}f}" for n in numbers)])
    header = [
        "quantity",
        "set point",
        "mean",
        "of the\nsecond half",
        "standard\nerror",
        "standard\ndeviation",
    ]
    note = (
        f"<p>The standard error is that of the mean of the second half, from {BLOCKS} blocks of it. It is right if a "
        "block is longer than the correlations.</p>"
    )
    return note + "\n" + html.table([*header, "lowest", "highest"], rows)


def _standard_error(values: NDArray[np.float64]) -> float | None:
    """Standard error of a mean from blocks; None if a block would have less than two values."""
    length = len(values) // BLOCKS
    if length < 2:
        return None
    means = values[: length * BLOCKS].reshape(BLOCKS, length).mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(BLOCKS))


# --- relaxations


def _relaxations(folder: Path) -> dict[str, str]:
    with _naming_damage(folder / "relax.csv"):
        return _relaxation_sections(folder)


def _relaxation_sections(folder: Path) -> dict[str, str]:
    rows, settings = read_csv(folder / "relax.csv"), read_settings(folder)
    failed = [row for row in rows if row["converged"] != "True"]
    lines = {
        "structures": str(len(rows)),
        "converged": str(len(rows) - len(failed)),
        "steps": str(sum(int(row["steps"]) for row in rows)),
        "fmax": f"{settings.get('fmax', FMAX)} eV/Å",
    }
    parts = [html.name_table(lines)]
    if failed:
        parts.append(
            f"<p>{len(failed)} structures did not converge. If their forces still fall, allow more steps. If forces "
            "go up and down around a value, use dtype float64 or a larger fmax. If the energy falls without end, "
            "look at the structure: atoms may have left the range of the training data.</p>"
        )
    sections = {"Summary": "\n".join(parts)}
    if read_csv(folder / "steps.csv"):
        figure = draw_relaxations(folder, float(settings.get("fmax", FMAX)))
        sections["Course"] = html.image(svg_of(figure), "Energy and largest force against the step")
    elif picture := html.picture(folder, "relax", "Energy and largest force"):
        sections["Course"] = picture  # of an earlier version
    sections["Structures"] = _structures([*failed, *(row for row in rows if row not in failed)])
    sections["Settings"] = _settings(settings)
    return sections


def _structures(rows: Sequence[dict[str, str]]) -> str:
    """Table of structures, those that did not converge first."""
    header = [
        "structure",
        "formula",
        "converged",
        "steps",
        "energy (eV)",
        "change (eV)",
        "largest force (eV/Å)",
    ]
    cells = []
    for row in rows[:STRUCTURES]:
        energy, start = float(row["energy"]), float(row["initial_energy"])
        converged = "yes" if row["converged"] == "True" else "no"
        numbers = f"{energy:.4f}", html.short(energy - start), html.short(row["max_force"])
        cells.append([row["structure"], row["formula"], converged, row["steps"], *numbers])
    more = f"<p>{STRUCTURES} of {len(rows)} structures; all are in relax.csv.</p>\n"
    return (more if len(rows) > STRUCTURES else "") + html.table(header, cells, marked=("no",))


# --- phonons


def _phonons(folder: Path) -> dict[str, str]:
    found = read_json(folder / "phonon.json")
    if not isinstance(found, dict):
        raise ValueError(f"{folder / 'phonon.json'} is damaged: it holds no map; run dpa4 phonon again")
    lines = {label: html.short(_plain(found[name])) for name, label in PHONONS.items() if name in found}
    parts = [html.name_table(lines)]
    if found.get("imaginary"):
        parts.append(
            "<p>There are imaginary modes, drawn below zero. Relax to smaller forces (fmax, dtype float64) and "
            "use a larger supercell first. If they stay, the structure is not a minimum of the model: displace the "
            "atoms along the mode and relax.</p>"
        )
    sections = {"Summary": "\n".join(parts)}
    for name, title in (("phonon", "Bands and density of states"), ("thermal", "Thermal properties")):
        command = "dpa4 phonon ... --resume"
        picture = html.picture(folder, name, title)
        sections[title] = picture or html.missing(f"{folder} has no {name}.png", command)
    if rows := read_csv(folder / "thermal.csv")[::10]:
        cells = [[html.short(row.get(name, "-")) for name in THERMAL] for row in rows]
        sections["Thermal properties"] += html.table([*THERMAL.values()], cells)
    if (folder / SETTINGS).is_file():
        sections["Settings"] = _settings(read_settings(folder))
    return sections


# --- all


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Name a file of results in errors about its entries."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or run the calculation again") from error


def _settings(settings: Mapping[str, Any]) -> str:
    return html.name_table({name: _plain(value) for name, value in settings.items()})


def _plain(value: Any) -> str:
    """Text of a setting or result."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


class Simulation(NamedTuple):
    """Kind of simulation.

    Attributes:
        file: File that only folders of this kind contain.
        command: Command that writes the folder.
        title: Title of the report.
        sections: Function that returns the sections of the report, as HTML by title, for a folder.
    """

    file: str
    command: str
    title: str
    sections: Callable[[Path], dict[str, str]]


SIMULATIONS = (
    Simulation(THERMO, "dpa4 md", "molecular dynamics", _dynamics),
    Simulation("relax.csv", "dpa4 relax", "relaxations", _relaxations),
    Simulation("phonon.json", "dpa4 phonon", "phonons", _phonons),
)
