"""Relaxation: minima, cells, constraints, symmetry, files."""

import csv
import json
import signal
import sys

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read, write
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.output import read_csv
from dpa4.potential.checkpoint import save_potential
from dpa4.simulation import DPA4Calculator, relax, relax_all
from helpers import crystal, molecule, random_potential


def squeezed() -> Atoms:
    """Rattled, strained cell of copper."""
    atoms = bulk("Cu", a=3.5, cubic=True)
    atoms.rattle(0.08, seed=1)
    atoms.set_cell(atoms.cell.array @ np.diag([1.0, 1.03, 0.98]), scale_atoms=True)
    return atoms


@pytest.mark.parametrize("optimizer", ["fire", "bfgs", "lbfgs"])
def test_reaches_a_minimum(optimizer):
    atoms = squeezed()
    cell = atoms.cell.array.copy()
    result = relax(atoms, EMT(), fmax=0.01, optimizer=optimizer)
    forces = np.linalg.norm(atoms.get_forces(), axis=1).max()
    assert result.converged and not result.interrupted
    assert result.max_force == pytest.approx(forces) and forces < 0.01
    assert result.energy == pytest.approx(atoms.get_potential_energy())
    assert result.energy < result.initial_energy - 0.05
    assert 0 < result.steps < 500
    assert np.array_equal(atoms.cell.array, cell)


def test_relaxes_the_cell():
    atoms = squeezed()
    result = relax(atoms, EMT(), fmax=1e-3, optimizer="lbfgs", cell="full")
    assert result.converged
    np.testing.assert_allclose(atoms.cell.lengths(), 3.59, atol=0.01)  # the lattice constant of EMT
    np.testing.assert_allclose(atoms.get_stress(), 0, atol=1e-4)


@pytest.mark.parametrize(("structure", "cell"), [(molecule, "fixed"), (crystal, "full")])
def test_lowers_the_energy_and_forces_of_a_potential(structure, cell):
    atoms = structure()
    calculator = DPA4Calculator(random_potential(n_blocks=1), device="cpu", dtype="float64")
    atoms.calc = calculator
    before = np.linalg.norm(atoms.get_forces(), axis=1).max()
    result = relax(atoms, calculator, fmax=before / 3, steps=150, optimizer="bfgs", cell=cell)
    assert result.converged
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() == pytest.approx(result.max_force)
    assert result.max_force < before / 2
    assert result.energy < result.initial_energy


def test_pressure_is_reached():
    """The stress of the structure balances the pressure at the minimum of the enthalpy."""
    atoms = squeezed()
    result = relax(atoms, EMT(), fmax=1e-4, optimizer="bfgs", cell="full", pressure=10.0)
    assert result.converged
    # fmax bounds the virial of the cell per atom: 4 * 1e-4 eV of 44 Angstrom^3 are 1.5e-3 GPa
    np.testing.assert_allclose(atoms.get_stress() / units.GPa, [-10, -10, -10, 0, 0, 0], rtol=0, atol=2e-3)
    assert result.pressure == pytest.approx(10, abs=2e-3)
    assert result.volume == atoms.get_volume()


@pytest.mark.parametrize(
    ("cell", "zero"),  # components of the stress that vanish, and what the cell keeps
    [("volume", []), ("shape", []), ("xy", [0, 1, 5]), ("z", [2])],
)
def test_part_of_the_cell_is_relaxed(cell, zero):
    atoms = squeezed()
    atoms.set_cell(atoms.cell.array @ [[1, 0.03, 0], [0.03, 1, 0.02], [0, 0.02, 1]], scale_atoms=True)
    start = atoms.copy()
    assert relax(atoms, EMT(), fmax=2e-4, optimizer="bfgs", cell=cell).converged
    deformation = np.linalg.solve(start.cell.array, atoms.cell.array).T
    stress = atoms.get_stress()
    np.testing.assert_allclose(stress[zero], 0, atol=2e-5)  # 4 * 2e-4 eV / 46 Angstrom^3
    assert np.abs(stress).max() > 1e-3
    assert not np.allclose(deformation, np.eye(3), atol=1e-3)
    if cell == "volume":
        np.testing.assert_allclose(deformation, np.eye(3) * deformation[0, 0], atol=1e-10)
        assert stress[:3].sum() == pytest.approx(0, abs=6e-5)
    elif cell == "shape":
        assert atoms.get_volume() == pytest.approx(start.get_volume(), rel=1e-9)
        np.testing.assert_allclose(stress, [*[stress[:3].mean()] * 3, 0, 0, 0], atol=3e-5)
    else:
        kept = [(2, 2), (0, 2), (1, 2)] if cell == "xy" else [(0, 0), (1, 1), (0, 1), (0, 2), (1, 2)]
        for i, j in kept:
            assert deformation[i, j] == pytest.approx(float(i == j), abs=1e-10)


def test_symmetry_is_kept():
    """Forces that break the symmetry do not distort a tetragonal cell of copper."""
    dataset = pytest.importorskip("spglib").get_symmetry_dataset
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.set_cell([3.55, 3.55, 3.7], scale_atoms=True)
    atoms.rattle(1e-3, seed=0)
    noisy = np.random.default_rng(0).normal(scale=1e-3, size=(4, 3))

    class Noisy(EMT):
        """Calculator with errors that break symmetry."""

        def calculate(self, *arguments):
            super().calculate(*arguments)
            self.results["forces"] = self.results["forces"] + noisy

    result = relax(atoms, Noisy(), fmax=1e-3, optimizer="bfgs", cell="shape", symmetry=True, symprec=0.05)
    assert result.converged and not atoms.constraints
    number = dataset((atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers), symprec=1e-5).number
    assert number == 139  # I4/mmm, the space group of the start
    assert result.max_force < 1e-10  # symmetry allows no forces here


def test_symmetry_is_refused_where_it_cannot_be_kept(monkeypatch):
    fixed = bulk("Cu")
    fixed.set_constraint(FixAtoms([0]))
    with pytest.raises(ValueError, match="symmetry cannot be combined with FixAtoms"):
        relax(fixed, EMT(), symmetry=True)
    with pytest.raises(ValueError, match="symmetry needs a cell periodic along all three axes"):
        relax(molecule(), EMT(), symmetry=True)
    with pytest.raises(ValueError, match="symprec must be a positive distance in Angstrom, got 0"):
        relax(bulk("Cu"), EMT(), symmetry=True, symprec=0)
    with pytest.raises(ValueError, match="cell = z breaks the symmetry of the structure"):
        relax(bulk("Cu"), EMT(), symmetry=True, cell="z")
    tetragonal = bulk("Cu", cubic=True)
    tetragonal.set_cell([3.6, 3.6, 3.7], scale_atoms=True)
    assert relax(tetragonal, EMT(), symmetry=True, cell="z", fmax=0.05).converged
    monkeypatch.setitem(sys.modules, "spglib", None)
    with pytest.raises(ImportError, match=r"spglib is not installed; pip install .*\[symmetry\]'"):
        relax(bulk("Cu"), EMT(), symmetry=True)


def test_constraints_and_momenta_are_kept():
    atoms = squeezed()
    atoms.set_constraint(FixAtoms([0]))
    atoms.set_momenta(np.ones((4, 3)), apply_constraint=False)
    fixed = atoms.positions[0].copy()
    assert relax(atoms, EMT(), fmax=0.01).converged
    assert np.array_equal(atoms.positions[0], fixed)
    assert np.all(atoms.get_momenta() == 1)
    assert np.linalg.norm(atoms.get_forces(apply_constraint=False)[0]) > 0


def test_too_few_steps_are_reported():
    result = relax(squeezed(), EMT(), fmax=0.001, steps=2)
    assert (result.converged, result.steps) == (False, 2)
    start = squeezed()
    assert relax(start, EMT(), steps=0).steps == 0
    assert np.array_equal(start.positions, squeezed().positions)


def test_trajectory(tmp_path):
    atoms = squeezed()
    path = tmp_path / "path.xyz"
    path.write_text("leftover")
    result = relax(atoms, EMT(), fmax=0.01, trajectory=path)
    frames = read(path, ":")
    assert len(frames) == result.steps + 1
    assert frames[0].get_potential_energy() == pytest.approx(result.initial_energy)
    assert frames[-1].get_potential_energy() == pytest.approx(result.energy)
    np.testing.assert_allclose(frames[-1].get_stress(), atoms.get_stress(), atol=1e-7)


class Interrupting(EMT):
    """Calculator that sends Ctrl-C at the fifth evaluation."""

    evaluations = 0

    def calculate(self, *arguments):
        self.evaluations += 1
        if self.evaluations == 5:
            signal.raise_signal(signal.SIGINT)
        super().calculate(*arguments)


def test_interruption_keeps_what_was_reached(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    results = relax_all([squeezed(), squeezed()], Interrupting(), tmp_path, fmax=1e-6, progress=False)
    assert len(results) == 1 and results[0].interrupted and not results[0].converged
    assert 1 <= results[0].steps <= 5
    assert len(read(tmp_path / "relaxed.xyz", ":")) == 1
    assert signal.getsignal(signal.SIGINT) is handler


def files(folder):
    return [(folder / name).read_text() for name in ("relax.csv", "relaxed.xyz")]


def test_resumed_relaxations(tmp_path):
    """Finished structures are reused, the interrupted one continues from its last step."""
    options = {"fmax": 0.01, "progress": False}
    starts = [bulk("Cu", a=3.6), squeezed(), squeezed(), bulk("Cu", a=3.5)]
    expected = relax_all([a.copy() for a in starts], EMT(), tmp_path / "whole", **options)
    structures = [a.copy() for a in starts]
    assert len(relax_all(structures, Interrupting(), tmp_path / "parts", **options)) == 2
    begun = structures[1].positions.copy()
    results = relax_all(starts, EMT(), tmp_path / "parts", resume=True, **options)
    assert results[0] == expected[0]
    for one, other in zip(results[2:], expected[2:], strict=True):  # EMT sums in another order now
        assert one.steps == other.steps and one.energy == pytest.approx(other.energy, abs=1e-10)
    assert results[1].converged and results[1].energy == pytest.approx(expected[1].energy, abs=1e-3)
    assert results[1].initial_energy < expected[1].initial_energy
    np.testing.assert_allclose(starts[1].positions, begun, atol=0.2)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert len(read(tmp_path / "parts" / "relaxed.xyz", ":")) == 4
    assert [row.split(",")[:3] for row in parts[0].split()] == [
        row.split(",")[:3] for row in whole[0].split()
    ]
    # a finished run does no further work
    again = [bulk("Cu", a=3.6), squeezed(), squeezed(), bulk("Cu", a=3.5)]
    assert relax_all(again, None, tmp_path / "parts", resume=True, **options) == results
    np.testing.assert_allclose(again[1].positions, starts[1].positions, atol=1e-7)
    assert files(tmp_path / "parts") == parts


def test_a_killed_relaxation_loses_one_structure(tmp_path):
    options = {"fmax": 0.01, "progress": False}
    starts = [squeezed(), bulk("Cu", a=3.6), bulk("Cu", a=3.5)]
    relax_all([a.copy() for a in starts], EMT(), tmp_path / "whole", **options)

    class Killed(BaseException):
        pass

    class Killing(EMT):
        def calculate(self, atoms, *arguments):
            if len(atoms) == 1 and atoms.cell.volume < 11:
                raise Killed
            super().calculate(atoms, *arguments)

    with pytest.raises(Killed):
        relax_all([a.copy() for a in starts], Killing(), tmp_path / "killed", **options)
    with (tmp_path / "killed" / "relaxed.xyz").open("a") as file:
        file.write("1\nLatt")  # torn by the kill
    relax_all([a.copy() for a in starts], EMT(), tmp_path / "killed", resume=True, **options)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no relaxation to resume in"):
        relax_all([squeezed()], EMT(), tmp_path / "none", resume=True, progress=False)
    relax_all([squeezed()], EMT(), tmp_path, fmax=0.05, progress=False)
    with pytest.raises(ValueError, match=r"fmax = 0.01, but .* holds results with fmax = 0.05; choose"):
        relax_all([squeezed()], EMT(), tmp_path, fmax=0.01, resume=True, progress=False)
    with pytest.raises(ValueError, match="the structures are not those of the relaxation to resume"):
        relax_all([bulk("Cu")], EMT(), tmp_path, fmax=0.05, resume=True, progress=False)


def test_results_of_another_model_or_run_are_kept_apart(tmp_path):
    def attempt(folder, seed=0, **options):
        potential = random_potential(seed, n_blocks=1, lmax=1)
        calculator = DPA4Calculator(potential, device="cpu", dtype="float64")
        return relax_all([molecule()], calculator, folder, steps=1, progress=False, **options)

    (first,) = attempt(tmp_path)
    with pytest.raises(ValueError, match=r"model = '\w+', but .* holds results with model = '\w+'; choose"):
        attempt(tmp_path, seed=1, resume=True)
    assert attempt(tmp_path, resume=True) == [first]
    with pytest.raises(FileExistsError, match="already holds relax.jsonl; continue it with --resume"):
        attempt(tmp_path)
    with pytest.raises(ValueError, match="give one of the two"):
        attempt(tmp_path, resume=True, overwrite=True)
    (other,) = attempt(tmp_path, seed=1, overwrite=True)
    assert other.energy != first.energy and len(read(tmp_path / "relaxed.xyz", ":")) == 1
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "settings.json").write_text('{"task": "kappa"}')
    with pytest.raises(ValueError, match="task = 'relax', but .* holds results with task = 'kappa'"):
        attempt(tmp_path / "bench")


def test_many_structures(tmp_path):
    structures = [squeezed(), bulk("Cu", a=3.6)]
    results = relax_all(structures, EMT(), tmp_path / "out", fmax=0.01, progress=False)
    frames = read(tmp_path / "out" / "relaxed.xyz", ":")
    rows = list(csv.DictReader((tmp_path / "out" / "relax.csv").open()))
    assert [r.steps > 0 for r in results] == [True, False]
    for number, (atoms, frame, row, result) in enumerate(zip(structures, frames, rows, results, strict=True)):
        np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-7)
        assert float(row["energy"]) == result.energy == pytest.approx(frame.get_potential_energy())
        assert (row["structure"], row["converged"]) == (str(number), "True")
    assert (rows[0]["formula"], rows[1]["formula"]) == ("Cu4", "Cu")


def test_figure_shows_energy_and_force_of_every_step(tmp_path, monkeypatch):
    figures, module = [], sys.modules["dpa4.simulation.relax"]  # the package has a function of this name
    original = module.save_figure
    monkeypatch.setattr(module, "save_figure", lambda f, path: figures.append(f) or original(f, path))
    structures = [squeezed(), bulk("Cu", a=3.6)]
    results = relax_all(structures, EMT(), tmp_path, fmax=0.01, steps=2, progress=False)
    assert [r.converged for r in results] == [False, True]
    assert (tmp_path / "relax.png").read_bytes().startswith(b"\x89PNG")
    rows = read_csv(tmp_path / "steps.csv")
    assert [(r["structure"], r["step"], r["atoms"]) for r in rows] == [
        ("0", "0", "4"), ("0", "1", "4"), ("0", "2", "4"), ("1", "0", "1"),
    ]  # fmt: skip
    assert float(rows[0]["energy"]) == results[0].initial_energy
    assert float(rows[2]["energy"]) == results[0].energy
    assert float(rows[2]["max_force"]) == pytest.approx(results[0].max_force)
    energies, forces = ([line.get_xydata() for line in axis.lines] for axis in figures[0].axes)
    change = 1e3 * (results[0].energy - results[0].initial_energy) / 4  # meV/atom of four atoms
    (course,) = (line for line in energies if len(line) == 3)
    assert course[0].tolist() == [0, 0] and course[-1].tolist() == pytest.approx([2, change]) and change < 0
    (course,) = (line for line in forces if len(line) == 3)
    assert course[:, 1].tolist() == [float(r["max_force"]) for r in rows[:3]]
    labels = {line.get_label(): line for line in figures[0].axes[1].lines}
    assert {"converged", "not converged", "fmax = 0.01"} <= labels.keys()
    assert list(labels["fmax = 0.01"].get_ydata()) == [0.01, 0.01]


def test_command_passes_its_options(tmp_path):
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "m.safetensors")
    write(tmp_path / "start.xyz", crystal())
    command = [
        "relax",
        tmp_path / "m.safetensors",
        tmp_path / "start.xyz",
        "-o",
        tmp_path / "out",
        "--steps",
        1,
    ]
    command += ["--cell", "volume", "--pressure", 2, "--symmetry", "--symprec", 0.001, "--device", "cpu"]
    for extra in ([], ["--resume"]):
        shown = CliRunner().invoke(app, [str(a) for a in (*command, *extra)])
        assert shown.exit_code == 0 and "0 of 1 structures converged" in shown.output, shown.output
    options = json.loads((tmp_path / "out" / "settings.json").read_text())
    expected = {"cell": "volume", "pressure": 2.0, "symmetry": True, "symprec": 0.001, "steps": 1}
    assert options | expected == options


def test_isolated_atoms_are_relaxed_and_no_atoms_refused(tmp_path):
    calculator = DPA4Calculator(random_potential(), device="cpu")
    for atoms, cell in ((Atoms("C"), "fixed"), (Atoms("C", cell=[9] * 3, pbc=True), "full")):
        result = relax(atoms, calculator, cell=cell)
        assert (result.converged, result.steps, result.max_force) == (True, 0, 0.0)
    good, bad = relax_all([Atoms("C"), Atoms()], calculator, tmp_path, progress=False)
    assert good.converged and bad.failure == "the structure has no atoms"


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="optimizer must be one of fire, bfgs, lbfgs, got 'newton'"):
        relax(squeezed(), EMT(), optimizer="newton")
    with pytest.raises(ValueError, match="fmax must be a positive force in eV/Angstrom, got 0"):
        relax(squeezed(), EMT(), fmax=0)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        relax(squeezed(), EMT(), steps=-1)
    with pytest.raises(ValueError, match="cell must be one of fixed, full, volume, shape, xy, z, got True"):
        relax(squeezed(), EMT(), cell=True)
    with pytest.raises(ValueError, match="pressure = 1 GPa has no effect with cell = shape"):
        relax(squeezed(), EMT(), cell="shape", pressure=1)
    with pytest.raises(ValueError, match="pressure must be a number in GPa, got inf"):
        relax(squeezed(), EMT(), cell="full", pressure=np.inf)
    with pytest.raises(ValueError, match="cell = full needs a cell periodic along all three axes"):
        relax(molecule(), EMT(), cell="full")
    with pytest.raises(ValueError, match="fmax must be a positive force"):
        relax_all([molecule()], EMT(), tmp_path / "none", fmax=0, progress=False)
    assert not (tmp_path / "none").exists()


class Refusing(Interrupting):
    """Calculator that lacks silver and is interrupted at its fifth evaluation."""

    def calculate(self, atoms, *arguments):
        if "Ag" in atoms.symbols:
            raise ValueError("atom 0 is Ag, which the model lacks")
        super().calculate(atoms, *arguments)


def test_a_structure_that_cannot_be_relaxed_does_not_end_the_run(tmp_path):
    """The others are relaxed, and a resumed run goes on behind it."""
    lost = bulk("Ag")
    lost.positions[:] = np.nan
    starts = [bulk("Cu", a=3.6), bulk("Ag"), squeezed(), lost, bulk("Cu", a=3.5)]
    options = {"fmax": 0.01, "progress": False}
    first = relax_all([a.copy() for a in starts], Refusing(), tmp_path, **options)
    assert [r.failure != "" for r in first] == [False, True, False] and first[2].interrupted
    results = relax_all(starts, Refusing(), tmp_path, resume=True, **options)
    while results[-1].interrupted:
        results = relax_all(starts, Refusing(), tmp_path, resume=True, **options)
    assert [r.converged for r in results] == [True, False, True, False, True]
    assert results[1].failure == results[3].failure == "atom 0 is Ag, which the model lacks"
    frames = read(tmp_path / "relaxed.xyz", ":")
    assert [frame.info["relax_structure"] for frame in frames] == [0, 2, 4]
    rows = list(csv.DictReader((tmp_path / "relax.csv").open()))
    assert [row["failure"] != "" for row in rows] == [False, True, False, True, False]
    assert relax_all(starts, None, tmp_path, resume=True, **options)[4] == results[4]


def test_a_broken_gpu_ends_the_run(tmp_path):
    class Broken(EMT):
        def calculate(self, *arguments):
            raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        relax_all([bulk("Cu")], Broken(), tmp_path, progress=False)


def test_command_names_structures_that_it_could_not_relax(tmp_path):
    save_potential(random_potential(n_blocks=1, lmax=1), tmp_path / "m.safetensors")
    for name, symbols, status in (("some", ("C", "U", "H"), 0), ("none", ("U", "Pu"), 1)):
        write(tmp_path / "start.xyz", [Atoms(symbol) for symbol in symbols])
        command = ["relax", tmp_path / "m.safetensors", tmp_path / "start.xyz", "-o", tmp_path / name]
        shown = CliRunner().invoke(app, [str(a) for a in (*command, "--device", "cpu")])
        assert shown.exit_code == status, shown.output
        assert f"structure {symbols.index('U')} not relaxed: " in shown.output
    again = CliRunner().invoke(app, [str(a) for a in (*command, "--device", "cpu")])
    assert again.exit_code == 1 and "--overwrite" in again.output


@pytest.mark.parametrize(
    ("name", "value"),
    [("cell", [[1.0]]), ("positions", None), ("positions", [[0, 0, float("nan")]] * 4), ("energy", "x"),
     ("bytes", -1), ("bytes", None), ("steps", ...), ("id", "7")],
)  # fmt: skip
@pytest.mark.usefixtures("no_figures")
def test_damaged_records_are_refused(tmp_path, name, value):
    relax_all([bulk("Cu", cubic=True)], EMT(), tmp_path, steps=0, progress=False)
    file = tmp_path / "relax.jsonl"
    record = json.loads(file.read_text()) | {name: value}
    if value is ...:
        del record[name]
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"relax.jsonl is damaged.*start without resume"):
        relax_all([bulk("Cu", cubic=True)], EMT(), tmp_path, steps=0, progress=False, resume=True)


@pytest.mark.usefixtures("no_figures")
def test_relaxed_structures_that_are_lost(tmp_path):
    relax_all([bulk("Cu", cubic=True)], EMT(), tmp_path, steps=0, progress=False)
    file = tmp_path / "relaxed.xyz"
    content = file.read_bytes()[:-10]
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"relaxed.xyz is damaged: it has \d+ bytes, relax.jsonl says at least"
    ):
        relax_all([bulk("Cu", cubic=True)], EMT(), tmp_path, steps=0, progress=False, resume=True)
    assert file.read_bytes() == content


def test_options_that_a_series_of_relaxations_lacks(tmp_path):
    text = "relax_all has no option trajectory; its options are fmax, .*written by relax, with trajectory"
    with pytest.raises(TypeError, match=text):
        relax_all([bulk("Cu")], EMT(), tmp_path / "relax", trajectory=tmp_path / "steps.xyz")
    assert not (tmp_path / "relax").exists()
