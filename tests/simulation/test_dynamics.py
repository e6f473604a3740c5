"""Molecular dynamics: conservation, correct temperature, exact restarts, files."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixBondLength
from ase.io import read, write
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.output import read_csv, short
from dpa4.potential.checkpoint import save_potential
from dpa4.simulation import DPA4Calculator, run_md
from dpa4.simulation.figures import draw_dynamics, read_thermo
from dpa4.simulation.integrators import make_integrator
from dpa4.simulation.momenta import degrees_of_freedom, draw_momenta, temperature
from helpers import crystal, molecule, random_potential

pytestmark = pytest.mark.usefixtures("no_figures")


def copper(repeat: int = 2) -> Atoms:
    return bulk("Cu", cubic=True).repeat(repeat)


def run(atoms, calculator, folder, **options):
    return run_md(atoms, calculator, folder, **({"progress": False} | options))


def thermo(folder, column: str) -> np.ndarray:
    return np.array([float(row[column]) for row in read_csv(folder / "thermo.csv")])


BATHS = [
    {"ensemble": "nve"},
    {"ensemble": "nvt", "tdamp": 20.0},
    {"ensemble": "npt", "tdamp": 20.0, "pdamp": 60.0, "pressure": 3.0, "cell": "volume"},
    {"ensemble": "npt", "tdamp": 20.0, "pdamp": 60.0, "pressure": 3.0, "cell": "full"},
]


@pytest.mark.parametrize("ensemble", BATHS, ids=["nve", "nvt", "npt-volume", "npt-full"])
def test_energy_error_of_a_potential_falls_with_the_square_of_the_timestep(tmp_path, ensemble):
    """The conserved energy includes that of the baths, if any."""
    calculator = DPA4Calculator(random_potential(n_blocks=1, lmax=1), device="cpu", dtype="float64")
    deviations = []
    for steps in (15, 30, 60):
        options = {"timestep": 22.5 / steps, "interval": steps // 15, "steps": steps} | ensemble
        deviations.append(run(crystal(), calculator, tmp_path / str(steps), **options).deviation)
    # the integrators are of second order, so halving the timestep divides the error by four
    assert deviations[0] / deviations[1] == pytest.approx(4, rel=0.1)
    assert deviations[1] / deviations[2] == pytest.approx(4, rel=0.1)
    kinetic = thermo(tmp_path / "60", "kinetic_eV")
    assert 1000 * np.ptp(kinetic) / 6 > 100 * deviations[2]  # the energy oscillates much more than it drifts


def test_files_and_statistics(tmp_path, figures):
    atoms = copper()
    start = atoms.copy()
    result = run(atoms, EMT(), tmp_path / "a" / "run", steps=40, timestep=5.0, interval=4)
    folder = tmp_path / "a" / "run"
    assert (result.steps, result.finished) == (40, True)
    time, total = thermo(folder, "time_ps"), thermo(folder, "total_eV")
    np.testing.assert_allclose(time, np.arange(11) * 0.02, atol=1e-12)
    assert thermo(folder, "temperature_K")[0] == pytest.approx(300)
    assert result.temperature == pytest.approx(thermo(folder, "temperature_K").mean())
    assert result.deviation == pytest.approx(1000 * np.abs(total - total[0]).max() / 32)
    slope = np.cov(time, total)[0, 1] / np.var(time, ddof=1)
    assert result.drift == pytest.approx(1000 * slope / 32, rel=1e-6)
    np.testing.assert_allclose(total, thermo(folder, "potential_eV") + thermo(folder, "kinetic_eV"))
    frames = read(folder / "trajectory.xyz", ":")
    assert [f.info["step"] for f in frames] == list(range(0, 41, 4))
    np.testing.assert_allclose(frames[0].positions, start.positions, atol=1e-7)
    last = frames[-1]
    np.testing.assert_allclose(last.positions, atoms.positions, atol=1e-7)
    np.testing.assert_allclose(last.get_momenta(), atoms.get_momenta(), atol=1e-7)
    np.testing.assert_allclose(last.get_forces(), atoms.get_forces(), atol=1e-7)
    assert last.get_potential_energy() == pytest.approx(thermo(folder, "potential_eV")[-1])
    pressure = -atoms.get_stress(include_ideal_gas=True)[:3].mean() / units.GPa
    assert thermo(folder, "pressure_GPa")[-1] == pytest.approx(pressure)
    assert (folder / "thermo.png").read_bytes().startswith(b"\x89PNG")


def test_drift_of_a_table_is_its_slope(tmp_path):
    """Fit to a run whose energy is replaced by a known line."""
    from dpa4.output import CsvLog
    from dpa4.simulation.dynamics import COLUMNS, summary

    log = CsvLog(tmp_path / "thermo.csv", COLUMNS)
    for step in range(5):
        log.write(
            dict(zip(COLUMNS, (step, 0.1 * step, 0.0, 0.0, 7 + 0.002 * step, 100.0 + step), strict=True))
        )
    log.close()
    table = read_thermo(tmp_path)
    result = summary(table, 4, True, num_atoms=10, ensemble="nve")
    assert result.drift == pytest.approx(2.0)  # 0.02 eV/ps over 10 atoms
    assert result.deviation == pytest.approx(0.8)
    assert result.temperature == pytest.approx(102)
    assert summary(table, 4, True, num_atoms=10, ensemble="langevin").drift is None


def test_figure_shows_running_means_and_set_points():
    steps, rng = np.arange(100), np.random.default_rng(0)
    values = {
        "time_ps": 0.01 * steps, "total_eV": 5 + 0.001 * steps, "temperature_K": 300 + rng.normal(0, 30, 100),
        "pressure_GPa": rng.normal(2, 1, 100), "volume_A3": 1e5 + 1e-3 * steps,
    }  # fmt: skip
    settings = {"ensemble": "npt", "temperature": 310.0, "pressure": 1.5}
    figure = draw_dynamics(values, 2, settings)
    figure.draw_without_rendering()
    energy, temperature, pressure, volume = figure.axes
    assert energy.lines[0].get_ydata()[-1] == pytest.approx(1000 * 0.099 / 2)  # meV/atom
    for axis, name in ((temperature, "temperature_K"), (pressure, "pressure_GPa"), (volume, "volume_A3")):
        time, mean = axis.lines[1].get_data()
        assert len(mean) == 90 and time[0] == pytest.approx(0.05)  # windows of 11 rows, at their middle
        assert mean[40] == pytest.approx(values[name][40:51].mean())
        assert f"mean {short(values[name].mean())}" in axis.get_title(loc="right")
        assert axis.yaxis.get_offset_text().get_text() == ""
    assert list(temperature.lines[2].get_ydata()) == [310, 310]
    assert list(pressure.lines[2].get_ydata()) == [1.5, 1.5] and len(volume.lines) == 2
    assert "set point 310" in temperature.get_title(loc="right")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["every row of the table", "running mean over 0.1 ps", "set point"]
    plain = draw_dynamics(values, 2, settings | {"ensemble": "nve"})
    assert [len(axis.lines) for axis in plain.axes] == [2] * 4  # nve has no baths
    few = {name: column[:5] for name, column in values.items()}
    assert [len(axis.lines) for axis in draw_dynamics(few, 2, settings).axes] == [1, 2, 2, 1]


def test_isolated_structures_have_no_pressure(tmp_path):
    calculator = DPA4Calculator(random_potential(), device="cpu", dtype="float64")
    run(molecule(), calculator, tmp_path, steps=3, interval=1)
    assert "pressure_GPa" not in read_csv(tmp_path / "thermo.csv")[0]
    assert len(read(tmp_path / "trajectory.xyz", ":")) == 4


def test_langevin_reaches_its_temperature(tmp_path):
    atoms = copper(2)
    options = {"ensemble": "langevin", "temperature": 500.0, "friction": 0.05, "timestep": 5.0}
    result = run(atoms, EMT(), tmp_path, steps=400, interval=5, **options)
    assert result.drift is None and result.deviation is None
    late = thermo(tmp_path, "temperature_K")[30:]
    # standard error of the mean: 500 K sqrt(2 / 96 degrees of freedom) / sqrt(20 independent samples) = 16 K
    assert late.mean() == pytest.approx(500, abs=50)


def test_nose_hoover_chains_reach_the_temperature(tmp_path):
    """Four atoms with a resting centre of mass: a bath for 12 instead of 9 momenta would give 400 K."""
    atoms = copper(1)
    options = {"ensemble": "nvt", "tdamp": 20.0, "timestep": 4.0, "interval": 5}
    result = run(atoms, EMT(), tmp_path, steps=2500, **options)
    # standard error of the mean: 300 K sqrt(2 / 9) / sqrt(200 independent samples, one in 50 fs) = 10 K
    assert result.temperature == pytest.approx(300, abs=40)
    np.testing.assert_allclose(atoms.get_momenta().sum(axis=0), 0, atol=1e-9)
    assert abs(result.drift) < 0.1 and result.deviation < 2
    conserved, total = thermo(tmp_path, "conserved_eV"), thermo(tmp_path, "total_eV")
    assert result.deviation == pytest.approx(1000 * np.abs(conserved - conserved[0]).max() / 4)
    assert np.ptp(total) > 20 * np.ptp(conserved)  # the bath exchanges energy


class Gas(Calculator):
    """Calculator for atoms without interaction."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def calculate(self, atoms, *arguments):
        super().calculate(atoms, *arguments)
        still = {"forces": np.zeros((len(atoms), 3)), "stress": np.zeros(6)}
        self.results = {"energy": 0.0, "free_energy": 0.0} | still


@pytest.mark.parametrize("cell", ["volume", "full"])
def test_ideal_gas_at_constant_pressure(cell):
    """The volume of eight atoms with a resting centre of mass is distributed as V^7 exp(-pV/kT)."""
    pressure = 0.02
    volume = 8 * units.kB * 300 / (pressure * units.GPa)  # mean of the distribution
    atoms = Atoms(["He"] * 8, cell=[volume ** (1 / 3)] * 3, pbc=True)
    rng = np.random.default_rng(0)
    atoms.set_scaled_positions(rng.random((8, 3)))
    atoms.calc = Gas()
    draw_momenta(atoms, 300.0, rng)
    settings = {"ensemble": "npt", "timestep": 10.0, "temperature": 300.0, "tdamp": 100.0, "pdamp": 200.0}
    integrator = make_integrator(atoms, settings | {"pressure": pressure, "cell": cell}, rng)
    cell_energy, kelvin, volumes = [], [], []
    for _ in range(3000):
        integrator.step()
        rates = integrator._p_g if cell == "full" else integrator._p_eps
        cell_energy.append(np.square(rates).sum() / integrator._barostat.W / (units.kB * 300))
        kelvin.append(temperature(atoms))
        volumes.append(atoms.get_volume())
    # the volume decorrelates in about 300 fs: 100 samples, standard errors 0.354 / sqrt(100) and 0.354 / sqrt(200)
    assert np.mean(volumes) / volume == pytest.approx(1, abs=0.1)
    assert np.std(volumes) / volume == pytest.approx(8**-0.5, rel=0.25)
    assert np.mean(kelvin) == pytest.approx(300, rel=0.05)
    if cell == "full":  # equipartition over six strain rates: sqrt(2 / 6 / 100) = 6 %
        assert np.mean(cell_energy) == pytest.approx(6, rel=0.2)


def test_atoms_that_are_fixed_take_no_part_in_the_temperature(tmp_path):
    atoms = copper(1)
    atoms.set_constraint(FixAtoms([0, 1]))
    fixed = atoms.positions[:2].copy()
    options = {"ensemble": "nvt", "tdamp": 20.0, "timestep": 4.0, "interval": 5}
    result = run(atoms, EMT(), tmp_path, steps=1500, **options)
    assert np.array_equal(atoms.positions[:2], fixed)
    # a bath for 12 instead of 6 momenta would give 600 K; standard error as above, 16 K
    assert result.temperature == pytest.approx(300, abs=50)


def test_volume_and_density_of_npt(tmp_path):
    atoms = copper(1)
    shape = atoms.cell.array / atoms.cell.array[0, 0]
    options = {"ensemble": "npt", "timestep": 2.0, "pressure": 20.0, "pdamp": 50.0}
    result = run(atoms, EMT(), tmp_path, steps=40, interval=1, **options)
    volume, density = thermo(tmp_path, "volume_A3"), thermo(tmp_path, "density_g_cm3")
    assert volume[-1] == pytest.approx(atoms.get_volume()) and volume[-1] < volume[0]
    # copper: 63.546 g/mol, four atoms per cell, 6.02214076e23 per mol
    np.testing.assert_allclose(density, 4 * 63.546 / 6.02214076e23 / (volume * 1e-24), rtol=1e-6)
    assert result.density == pytest.approx(density.mean())
    np.testing.assert_allclose(atoms.cell.array / atoms.cell.array[0, 0], shape, atol=1e-12)
    cells = [frame.cell.volume for frame in read(tmp_path / "trajectory.xyz", ":")]
    np.testing.assert_allclose(cells, volume, rtol=1e-6)  # eight decimals


def test_motion_of_the_centre_of_mass_is_no_temperature(tmp_path):
    atoms = copper(1)
    draw_momenta(atoms, 300.0, np.random.default_rng(0))
    atoms.set_momenta(atoms.get_momenta() + atoms.get_masses()[:, None])
    assert temperature(atoms) == pytest.approx(300)
    assert atoms.get_temperature() > 1000
    run(atoms.copy(), EMT(), tmp_path / "nve", steps=1, interval=1)
    frame = read(tmp_path / "nve" / "trajectory.xyz", 0)
    np.testing.assert_allclose(frame.get_momenta(), atoms.get_momenta(), atol=1e-7)
    run(atoms.copy(), EMT(), tmp_path / "nvt", steps=1, interval=1, ensemble="nvt")
    np.testing.assert_allclose(
        read(tmp_path / "nvt" / "trajectory.xyz", 0).get_momenta().sum(axis=0), 0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("structure", "periodic", "freedom"),
    [(copper(1), True, 9), (molecule(n=9), False, 21), (Atoms("O2", [(0, 0, 0), (0, 0, 1)]), False, 1),
     (Atoms("O"), False, 3), (Atoms("OCO", [(-1.2, 0, 0), (0, 0, 0), (1.2, 0, 0)]), False, 4),
     (Atoms("OCO", [(-1.2, 0, 0), (0, 0.06, 0.05), (1.2, 0, 0)]), False, 4),  # as it bends at 300 K
     (Atoms("OSO", [(-1.23, 0, 0), (0, 0.73, 0), (1.23, 0, 0)]), False, 3)],
)  # fmt: skip
def test_degrees_of_freedom(structure, periodic, freedom):
    assert structure.pbc.any() == periodic and degrees_of_freedom(structure) == freedom
    # mean of the momenta drawn before scaling: each degree of freedom has kT/2
    rng = np.random.default_rng(0)
    masses = structure.get_masses()[:, None]
    means = []
    for _ in range(400):
        structure.set_momenta(np.sqrt(masses * units.kB * 300) * rng.normal(size=(len(structure), 3)))
        means.append(temperature(structure))
    # three standard errors, sqrt(2 / freedom / 400) each
    assert np.mean(means) == pytest.approx(300, rel=3 * (2 / freedom / 400) ** 0.5)


def test_drawn_momenta():
    atoms = molecule(n=9)
    draw_momenta(atoms, 250.0, np.random.default_rng(0))
    assert temperature(atoms) == pytest.approx(250)
    np.testing.assert_allclose(atoms.get_momenta().sum(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(atoms.get_angular_momentum(), 0, atol=1e-12)
    linear = Atoms("OCO", [(-1.2, 0, 0), (0, 0, 0), (1.2, 0, 0)])
    assert degrees_of_freedom(linear) == 4  # 3 N - 5
    linear.rattle(0.02, seed=0)  # a molecule that vibrates is never exactly straight
    assert degrees_of_freedom(linear) == 4
    linear.positions = [(-1.2, 0, 0), (0, 0, 0), (1.2, 0, 0)]
    draw_momenta(linear, 250.0, np.random.default_rng(0))
    np.testing.assert_allclose(linear.get_angular_momentum(), 0, atol=1e-12)
    assert temperature(linear) == pytest.approx(250)
    one = Atoms("C", [(0, 0, 0)])
    draw_momenta(one, 250.0, np.random.default_rng(0))
    assert temperature(one) == pytest.approx(250)
    fixed = copper(1)
    fixed.set_constraint(FixAtoms([0]))
    draw_momenta(fixed, 250.0, np.random.default_rng(0))
    assert np.all(fixed.get_momenta()[0] == 0)
    assert temperature(fixed) == fixed.get_temperature() == pytest.approx(250)


def test_distribution_of_drawn_momenta():
    atoms = Atoms(["H", "O"] * 4000, positions=np.zeros((8000, 3)), pbc=True, cell=[5] * 3)
    draw_momenta(atoms, 300.0, np.random.default_rng(0))
    momenta = atoms.get_momenta()
    for element, mass in (("H", 1.008), ("O", 15.999)):
        own = momenta[atoms.symbols == element]
        assert (own**2).mean() / mass == pytest.approx(units.kB * 300, rel=0.05)  # equipartition
        assert (own**4).mean() / (own**2).mean() ** 2 == pytest.approx(3, rel=0.1)  # a normal distribution


def test_momenta_and_constraints_are_kept(tmp_path):
    atoms = copper(1)
    atoms.rattle(0.1, seed=0)
    atoms.set_constraint(FixAtoms([1]))
    momenta = np.random.default_rng(0).normal(size=(4, 3))
    atoms.set_momenta(momenta)
    fixed = atoms.positions[1].copy()
    run(atoms, EMT(), tmp_path, steps=5, interval=1, temperature=900.0)
    first = read(tmp_path / "trajectory.xyz", 0)
    np.testing.assert_allclose(first.get_momenta(), momenta * [[1], [0], [1], [1]], atol=1e-7)
    assert np.array_equal(atoms.positions[1], fixed)


class Small(DPA4Calculator):
    """Calculator with a tiny potential that calls a function at one evaluation; without a skin it has no memory."""

    def __init__(self, at: int = 0, action=None):
        super().__init__(random_potential(n_blocks=1, lmax=1), device="cpu", dtype="float64")
        self.left, self.action = at, action

    def calculate(self, *arguments, **options):
        self.left -= 1
        if self.left == 0:
            self.action()
        super().calculate(*arguments, **options)


def send(number: int):
    return lambda: signal.raise_signal(number)


def same_files(one, two) -> bool:
    return all((one / n).read_text() == (two / n).read_text() for n in ("thermo.csv", "trajectory.xyz"))


ENSEMBLES = [
    {"ensemble": "nve"},
    {"ensemble": "langevin"},
    {"ensemble": "nvt", "tdamp": 10.0},
    {"ensemble": "npt", "tdamp": 10.0, "pdamp": 30.0, "pressure": 2.0, "cell": "volume"},
    {"ensemble": "npt", "tdamp": 10.0, "pdamp": 30.0, "pressure": 2.0, "cell": "full"},
]
SIGNALS = [signal.SIGINT] * 5 + [signal.SIGTERM]


@pytest.mark.parametrize(("ensemble", "number"), [*zip([*ENSEMBLES, ENSEMBLES[0]], SIGNALS, strict=True)])
def test_interrupted_and_resumed_is_the_same_run(tmp_path, ensemble, number):
    options = {"timestep": 1.0, "interval": 4, "steps": 18} | ensemble
    whole = crystal()
    expected = run(whole, Small(), tmp_path / "whole", **options)
    handler = signal.getsignal(number)
    stopped = run(crystal(), Small(11, send(number)), tmp_path / "parted", **options)
    assert not stopped.finished and 8 < stopped.steps < 12
    assert signal.getsignal(number) is handler
    resumed = crystal()
    result = run(resumed, Small(), tmp_path / "parted", resume=True, **options)
    assert result == expected
    assert np.array_equal(resumed.positions, whole.positions)
    assert np.array_equal(resumed.get_momenta(), whole.get_momenta())
    assert np.array_equal(resumed.cell.array, whole.cell.array)
    assert np.array_equal(whole.cell.array, crystal().cell.array) == (ensemble["ensemble"] != "npt")
    assert same_files(tmp_path / "parted", tmp_path / "whole")


def test_a_killed_run_repeats_what_came_after_the_restart_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dpa4.simulation.dynamics.RESTART_INTERVAL", 10)
    options = {"timestep": 1.0, "interval": 4, "steps": 24}
    run(crystal(), Small(), tmp_path / "whole", **options)

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with pytest.raises(Killed):
        run(crystal(), Small(20, kill), tmp_path / "killed", **options)
    assert json.loads((tmp_path / "killed" / "restart.json").read_text())["step"] == 10
    assert thermo(tmp_path / "killed", "step")[-1] == 16
    run(crystal(), Small(), tmp_path / "killed", resume=True, **options)
    assert same_files(tmp_path / "killed", tmp_path / "whole")


def test_a_finished_run_is_extended(tmp_path):
    run(crystal(), Small(), tmp_path / "whole", steps=20)
    run(crystal(), Small(), tmp_path / "extended", steps=10)
    assert run(crystal(), Small(), tmp_path / "extended", steps=10, resume=True).steps == 10
    assert run(crystal(), Small(), tmp_path / "extended", steps=20, resume=True).finished
    assert same_files(tmp_path / "extended", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": random_potential(1, n_blocks=1, lmax=1)},
            r"model = '\w+', but .* with model = '\w+'; choose",
        ),
        ({"dtype": "float32"}, "dtype = 'float32', but .* with dtype = 'float64'; choose another folder"),
    ],
)
def test_another_model_or_precision_does_not_go_on(tmp_path, options, message):
    run(crystal(), Small(), tmp_path, steps=1)
    same = {"model": random_potential(n_blocks=1, lmax=1), "device": "cpu", "dtype": "float64"}
    with pytest.raises(ValueError, match=message):
        run(crystal(), DPA4Calculator(**(same | options)), tmp_path, steps=2, resume=True)
    assert run(crystal(), DPA4Calculator(**same), tmp_path, steps=2, resume=True).finished


def test_seed_decides_the_run(tmp_path):
    positions = []
    for number, seed in enumerate((1, 1, 2)):
        atoms = copper(1)
        run(atoms, EMT(), tmp_path / str(number), steps=5, seed=seed)
        positions.append(atoms.positions)
    assert np.array_equal(positions[0], positions[1])
    assert not np.allclose(positions[0], positions[2])


def test_second_signal_acts_at_once():
    """Signals are sent to the process, like by Ctrl-C; another thread may receive them, which delays them."""
    code = (
        "import os, signal, time\nfrom dpa4.system import stop_requests\n"
        "with stop_requests() as stopped:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while not stopped:\n        time.sleep(0.001)\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        print('interrupted', stopped == [signal.SIGINT])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "interrupted True\n"


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to resume in"):
        run(copper(1), EMT(), tmp_path / "none", steps=5, resume=True)
    with pytest.raises(ValueError, match="element N"):
        run(Atoms("N2", [(0, 0, 0), (0, 0, 1)]), Small(), tmp_path, steps=5)
    run(copper(1), EMT(), tmp_path, steps=5)  # the failed start left no files
    with pytest.raises(FileExistsError, match="already holds a run; continue it"):
        run(copper(1), EMT(), tmp_path, steps=5)
    for constraint, ensemble, allowed in (
        (
            FixBondLength(0, 1),
            "nvt",
            "supports only FixAtoms, FixCartesian, FixedLine and FixedPlane, got FixBondLengths",
        ),
        (FixAtoms([0]), "npt", "supports no constraints, got FixAtoms"),
    ):
        held = copper(1)
        held.set_constraint(constraint)
        with pytest.raises(ValueError, match=f"ensemble {ensemble} {allowed}"):
            run(held, EMT(), tmp_path / "held", steps=5, ensemble=ensemble)
    held = copper(1)
    held.set_constraint(FixAtoms([0, 1, 2, 3]))
    for nothing, count in ((held, 4), (Atoms(), 0)):
        with pytest.raises(ValueError, match=f"none of {count} atoms can move"):
            run(nothing, EMT(), tmp_path / "nothing", steps=5)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ValueError, match="ensemble npt needs a cell periodic along all three axes"):
        run(molecule(), Small(), tmp_path / "molecule", steps=5, ensemble="npt")
    with pytest.raises(ValueError, match="temperature must be above 0 K in ensemble nvt"):
        run(copper(1), EMT(), tmp_path / "cold", steps=5, ensemble="nvt", temperature=0)
    with pytest.raises(ValueError, match=r"timestep = 1.0, but .* holds results with timestep = 0.5; choose"):
        run(copper(1), EMT(), tmp_path, steps=5, timestep=1, resume=True)
    with pytest.raises(ValueError, match="the structure is not that of the run in .*: elements"):
        run(copper(2), EMT(), tmp_path, steps=5, resume=True)
    restart = tmp_path / "restart.json"
    state = json.loads(restart.read_text())
    restart.write_text(json.dumps(state | {"format": 1}))
    with pytest.raises(ValueError, match="has format 1; this version reads format 3"):
        run(copper(1), EMT(), tmp_path, steps=5, resume=True)
    restart.write_text('{"form')
    with pytest.raises(ValueError, match="restart.json is damaged"):
        run(copper(1), EMT(), tmp_path, steps=5, resume=True)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ensemble", "nph", "ensemble must be one of nve, langevin, nvt, npt, got 'nph'"),
        ("cell", "shape", "cell must be one of volume, full, got 'shape'"),
        ("tdamp", 0, r"tdamp must be positive \(in fs\), got 0"),
        ("pdamp", float("inf"), r"pdamp must be positive \(in fs\), got inf"),
        ("pressure", 1, "pressure = 1.0 GPa has no effect in ensemble nve; use npt"),
        ("pressure", float("nan"), "pressure must be a number in GPa, got nan"),
        ("timestep", 0, r"timestep must be positive \(in fs\), got 0"),
        ("friction", -1, r"friction must be positive \(in 1/fs\), got -1"),
        ("temperature", -5, "temperature must be at least 0 K, got -5"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("interval", 0, "interval must be at least 1, got 0"),
    ],
)
def test_arguments(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        run(copper(1), EMT(), tmp_path, **({"steps": 5} | {option: value}))


def test_command_runs_at_constant_pressure(tmp_path):
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "m.safetensors")
    write(tmp_path / "start.xyz", crystal())
    arguments = [
        "md",
        tmp_path / "m.safetensors",
        tmp_path / "start.xyz",
        "-o",
        tmp_path / "out",
        "--steps",
        4,
    ]
    options = [
        "--ensemble",
        "npt",
        "--pressure",
        2,
        "--cell",
        "full",
        "--tdamp",
        50,
        "--pdamp",
        500,
        "--interval",
        2,
    ]
    shown = CliRunner().invoke(app, [str(a) for a in (*arguments, *options, "--device", "cpu")])
    assert shown.exit_code == 0, shown.output
    assert "mean density" in shown.output and "energy drift" in shown.output
    settings = json.loads((tmp_path / "out" / "restart.json").read_text())["settings"]
    expected = {"ensemble": "npt", "pressure": 2.0, "cell": "full", "tdamp": 50.0, "pdamp": 500.0}
    assert settings | expected == settings
    assert len(thermo(tmp_path / "out", "density_g_cm3")) == 3


def test_charge_and_spin_of_the_file_act_and_are_kept(tmp_path):
    potential = random_potential(n_blocks=1, lmax=1, charge_spin=True)
    save_potential(potential, tmp_path / "m.safetensors")
    atoms = molecule()
    atoms.info = {"charge": 1, "spin": 2}
    write(tmp_path / "start.xyz", atoms)
    files = [tmp_path / "m.safetensors", tmp_path / "start.xyz", "-o", tmp_path / "out"]
    options = ["--steps", 2, "--interval", 1, "--device", "cpu", "--dtype", "float64"]
    shown = CliRunner().invoke(app, [str(a) for a in ("md", *files, *options)])
    assert shown.exit_code == 0, shown.output
    for frame in read(tmp_path / "out" / "trajectory.xyz", ":"):
        assert (frame.info["charge"], frame.info["spin"]) == (1, 2)
        energy = frame.get_potential_energy()
        frame.calc = DPA4Calculator(potential, device="cpu", dtype="float64")
        assert energy == pytest.approx(
            frame.get_potential_energy(), abs=1e-7
        )  # positions have eight decimals


def test_an_explosion_is_explained(tmp_path):
    class Exploding(DPA4Calculator):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            self.results["forces"] = self.results["forces"] + np.inf

    calculator = Exploding(random_potential(), device="cpu")
    with pytest.raises(RuntimeError, match="step 1 failed: .*not finite.*shorter timestep than 0.5 fs"):
        run(molecule(), calculator, tmp_path, steps=5)


@pytest.fixture(scope="module")
def committee():
    models = [random_potential(seed, n_blocks=1, lmax=1) for seed in (0, 1)]
    return lambda: DPA4Calculator(models, device="cpu", dtype="float64")


def test_deviation_of_a_committee_is_in_table_and_frames(tmp_path, committee):
    result = run(crystal(), committee(), tmp_path, steps=4, interval=2)
    column = thermo(tmp_path, "max_force_std_eV_A")
    for atoms, largest in zip(read(tmp_path / "trajectory.xyz", ":"), column, strict=True):
        plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True, calculator=committee())
        plain.get_potential_energy()
        spread = plain.calc.results["forces_std"]
        assert largest == pytest.approx(np.linalg.norm(spread, axis=1).max(), rel=1e-5)
        np.testing.assert_allclose(atoms.arrays["forces_std"], spread, atol=1e-7)
        assert atoms.info["max_force_std"] == pytest.approx(largest)
        for name in ("energy_std", "stress_std"):
            np.testing.assert_allclose(atoms.info[name], plain.calc.results[name], rtol=1e-4)
    assert result.max_force_std == column.max() and result.exceeded is None and result.saved == 0
    assert not (tmp_path / "uncertain.xyz").exists()


def test_uncertain_frames_are_saved_and_survive_a_restart(tmp_path, committee):
    options = {"interval": 2, "temperature": 2000.0}
    run(molecule(0, 5), committee(), tmp_path / "whole", steps=12, **options)
    column = thermo(tmp_path / "whole", "max_force_std_eV_A")
    threshold = float(np.sort(column)[1])
    run(molecule(0, 5), committee(), tmp_path / "parts", steps=6, save_above=threshold, **options)
    file = tmp_path / "parts" / "uncertain.xyz"
    file.write_text(file.read_text() + "written after the restart file")
    result = run(
        molecule(0, 5),
        committee(),
        tmp_path / "parts",
        steps=12,
        save_above=threshold,
        resume=True,
        **options,
    )
    steps = [atoms.info["step"] for atoms in read(file, ":")]
    assert steps == [2 * i for i, value in enumerate(column) if value > threshold]
    assert result.saved == len(steps) == len(column) - 2


def test_a_run_stops_above_a_deviation_in_any_step_and_can_go_on(tmp_path, committee):
    options = {"interval": 50, "temperature": 2000.0}
    run(molecule(0, 5), committee(), tmp_path / "fine", steps=8, interval=1, temperature=2000.0)
    column = thermo(tmp_path / "fine", "max_force_std_eV_A")
    threshold = float((column[3] + column[4]) / 2)
    first = next(i for i, value in enumerate(column) if i and value > threshold)
    result = run(molecule(0, 5), committee(), tmp_path / "run", steps=8, stop_above=threshold, **options)
    assert not result.finished and result.steps == first
    assert result.exceeded == pytest.approx(column[first]) and result.saved == 1
    assert read(tmp_path / "run" / "uncertain.xyz").info["step"] == first
    result = run(
        molecule(0, 5), committee(), tmp_path / "run", steps=8, stop_above=99.0, resume=True, **options
    )
    assert result.finished and result.exceeded is None


def test_thresholds_need_a_committee_and_a_positive_deviation(tmp_path, committee):
    with pytest.raises(ValueError, match="save_above = 1.0 eV/Angstrom compares .* give several"):
        run(copper(1), EMT(), tmp_path, steps=1, save_above=1.0)
    with pytest.raises(ValueError, match="stop_above must be a positive deviation"):
        run(molecule(0, 5), committee(), tmp_path, steps=1, stop_above=0.0)
    assert not list(tmp_path.iterdir())
