"""The ASE calculator: exact derivatives, every result, committee, cache, Verlet skin, limits and errors."""

import warnings
from functools import cache

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.db import connect
from ase.stress import voigt_6_to_full_3x3_stress

from dpa4.interfaces.ase import has_deviations, labelled
from dpa4.potential import fingerprint_of, save_potential
from dpa4.simulation import DPA4Calculator
from helpers import crystal, graph_of, molecule, random_potential

CHARGED = {"charge_spin": True, "default_charge_spin": (0, 1)}


def attach(atoms: Atoms, model=None, **options) -> Atoms:
    """Copy of a structure with a float64 calculator on the CPU."""
    atoms = atoms.copy()
    options = {"device": "cpu", "dtype": "float64"} | options
    atoms.calc = DPA4Calculator(random_potential() if model is None else model, **options)
    return atoms


def count_calls(calculator: DPA4Calculator) -> list:
    """List that grows with every evaluation of the first model."""
    calls: list = []
    calculator.potentials[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("skin", [0.0, 0.7])
@pytest.mark.parametrize("structure", [molecule, crystal])
def test_forces_are_the_gradient(structure, skin):
    # central differences of float64 energies: error about 1e-8 at h = 1e-4
    atoms, h = attach(structure(), neighbor_skin=skin), 1e-4
    forces = atoms.get_forces()
    for atom, axis in [(0, 0), (3, 1), (5, 2)]:
        energies = []
        for sign in (1, -2):
            atoms.positions[atom, axis] += sign * h
            energies.append(atoms.get_potential_energy())
        atoms.positions[atom, axis] += h
        assert -(energies[0] - energies[1]) / (2 * h) == pytest.approx(forces[atom, axis], abs=3e-8)
    assert np.abs(forces).max() > 0.01


def test_stress_is_the_strain_derivative():
    atoms, h = attach(crystal()), 1e-4
    cell, stress = atoms.cell.array.copy(), atoms.get_stress(voigt=False)
    numerical = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[a, b] += sign * h / 2
                strain[b, a] += sign * h / 2
                strained = atoms.copy()
                strained.set_cell(cell @ strain, scale_atoms=True)
                strained.calc = atoms.calc
                energies.append(strained.get_potential_energy())
            numerical[a, b] = (energies[0] - energies[1]) / (2 * h) / atoms.get_volume()
    np.testing.assert_allclose(stress, numerical, atol=1e-9)
    assert np.abs(stress).max() > 1e-5


def test_results_are_those_of_the_potential():
    potential, atoms = random_potential(), crystal()
    expected = potential(graph_of(atoms))
    atoms = attach(atoms, potential)
    assert atoms.get_potential_energy() == pytest.approx(float(expected.energy), rel=1e-13)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    np.testing.assert_allclose(atoms.get_potential_energies(), expected.atomic_energies, rtol=1e-12)
    np.testing.assert_allclose(atoms.get_forces(), expected.forces, atol=1e-13)
    virial = -voigt_6_to_full_3x3_stress(atoms.get_stress()) * atoms.get_volume()
    np.testing.assert_allclose(virial, expected.virial[0], atol=1e-12)
    assert set(atoms.calc.results) == {"energy", "free_energy", "energies", "forces", "stress", "virial"}
    np.testing.assert_array_equal(atoms.calc.results["virial"], expected.virial[0])


def test_single_precision_agrees_and_leaves_the_given_potential_alone():
    potential, atoms = random_potential().train(), crystal()
    double = attach(atoms, potential)
    single = attach(atoms, potential, dtype="float32")
    assert potential.training and str(potential.dtype) == "torch.float64"
    assert str(single.calc.potentials[0].dtype) == "torch.float32"
    assert single.get_potential_energy() == pytest.approx(double.get_potential_energy(), abs=1e-5)
    np.testing.assert_allclose(single.get_forces(), double.get_forces(), atol=1e-4)
    assert single.get_potential_energy() != double.get_potential_energy()


def test_checkpoint_file(tmp_path):
    potential = random_potential()
    save_potential(potential, tmp_path / "model.safetensors")
    from_file, given = attach(crystal(), tmp_path / "model.safetensors"), attach(crystal(), potential)
    assert from_file.get_potential_energy() == given.get_potential_energy()


def test_committee_gives_mean_and_deviation():
    models = [random_potential(seed, cutoff=cutoff) for seed, cutoff in [(0, 4.0), (1, 4.0), (2, 3.5)]]
    committee = attach(crystal(), models)
    members = [attach(crystal(), m) for m in models]
    committee.get_potential_energy()
    results = committee.calc.results
    for name in ("energy", "forces", "stress"):
        values = np.array([m.calc.get_property(name, m) for m in members])
        np.testing.assert_allclose(results[name], values.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(results[f"{name}_std"], values.std(axis=0), atol=1e-12)
        assert np.all(committee.calc.get_property(f"{name}_std", committee) == results[f"{name}_std"])
    assert results["free_energy"] == results["energy"]
    assert "energy_std" not in members[0].calc.implemented_properties


def test_one_evaluation_serves_all_results():
    atoms = attach(crystal())
    calls = count_calls(atoms.calc)
    atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energies()
    atoms.set_initial_charges(np.ones(len(atoms)))
    atoms.info["note"] = "without effect"
    atoms.get_forces()
    assert len(calls) == 1
    atoms.positions[0, 0] += 0.01
    atoms.get_forces()
    assert len(calls) == 2
    atoms.pbc = (True, True, False)
    atoms.get_forces()
    assert len(calls) == 3


def test_charge_and_spin_are_read_and_not_cached_away():
    for skin in (0.0, 1.0):
        atoms = attach(molecule(), random_potential(**CHARGED), neighbor_skin=skin)
        calls = count_calls(atoms.calc)
        energies = {}
        for charge, spin in [(None, None), (0, 1), (1, 2), (1, 4), (-1, 2)]:
            atoms.info = {} if charge is None else {"charge": charge, "spin": spin}
            energies[charge, spin] = atoms.get_potential_energy()
        assert len(calls) == 5
        assert energies[None, None] == energies[0, 1]
        assert len(set(energies.values())) == 4
    graph = graph_of(molecule(), charge_spin=(1, 4))
    assert energies[1, 4] == pytest.approx(float(random_potential(**CHARGED)(graph).energy), rel=1e-13)


def test_charge_and_spin_must_be_known():
    atoms = attach(molecule(), random_potential(charge_spin=True))
    with pytest.raises(ValueError, match=r"without a default; set atoms.info\['charge'\]"):
        atoms.get_potential_energy()
    atoms.info = {"charge": 0.5, "spin": 1}
    with pytest.raises(ValueError, match=r"charge must be a whole number, the total charge in e; got 0.5"):
        atoms.get_potential_energy()
    atoms.info = {"charge": 1000, "spin": 1}
    with pytest.raises(ValueError, match="charge must be in"):
        atoms.get_potential_energy()


@pytest.mark.parametrize("charge", ["one", float("nan"), float("inf"), np.array([1, 2])], ids=repr)
def test_a_charge_that_is_no_number(charge):
    atoms = attach(molecule(), random_potential(charge_spin=True))
    atoms.info = {"charge": charge, "spin": 1}
    with pytest.raises(ValueError, match="charge must be "):
        atoms.get_potential_energy()
    atoms.info = {"charge": np.float32(1), "spin": np.int64(2)}
    assert np.isfinite(atoms.get_potential_energy())


def test_all_names_of_charge_and_spin_are_read():
    atoms = attach(molecule(), random_potential(**CHARGED))
    calls = count_calls(atoms.calc)
    energies = []
    for info in ({}, {"charge": 1, "spin": 2}, {"total_charge": np.array([1]), "multiplicity": 1.9999999}):
        atoms.info = info
        energies.append(atoms.get_potential_energy())
    assert energies[1] == energies[2] != energies[0] and len(calls) == 3
    atoms.info = {"charge": 1, "spin": 2, "net_charge": 1}
    with pytest.warns(UserWarning, match="atoms.info: not used, .*: net_charge; a total charge"):
        atoms.calc.calculate(atoms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.calc.calculate(atoms)


def test_charge_is_ignored_by_a_model_without_it():
    atoms = attach(molecule())
    energy = atoms.get_potential_energy()
    atoms.info["charge"] = 3
    assert atoms.get_potential_energy() == energy


@cache
def path_of_results(**options) -> tuple[np.ndarray, int]:
    """Energies, forces and stresses along a random path, and the number of neighbour searches."""
    models = [random_potential(0, n_blocks=1), random_potential(1, n_blocks=1, cutoff=3.4)]
    atoms, rng = attach(crystal(), models, **options), np.random.default_rng(0)
    path = []
    for _ in range(25):
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
        atoms.set_cell(atoms.cell.array * 1.0002)
        path.append([atoms.get_potential_energy(), *atoms.get_forces().ravel(), *atoms.get_stress()])
    return np.array(path), atoms.calc._neighbors.searches


@pytest.mark.parametrize("skin", [None, 0.3, 1.0])
def test_skin_gives_the_same_results_with_fewer_searches(skin):
    """Results are equal bit for bit: edges and their order are those of a new search."""
    expected, all_searches = path_of_results(neighbor_skin=0.0)
    found, searches = path_of_results(**({} if skin is None else {"neighbor_skin": skin}))
    assert np.array_equal(found, expected)
    assert all_searches == 25
    assert 1 <= searches < 15


@pytest.mark.parametrize("change", ["cell", "pbc", "numbers", "far", "length"])
def test_skin_searches_again_when_the_structure_changes(change):
    atoms = attach(crystal(), neighbor_skin=1.0)
    atoms.get_potential_energy()
    if change == "cell":
        atoms.set_cell(atoms.cell.array * 1.02)
    elif change == "pbc":
        atoms.pbc = (True, False, True)
    elif change == "numbers":
        atoms.numbers[0] = 6
    elif change == "far":
        atoms.positions[1] += 0.51
    else:
        del atoms[2]
    fresh = attach(atoms)
    assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-12)
    np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(), atol=1e-12)


def test_partial_periodicity():
    slab = crystal()
    slab.pbc = (True, True, False)
    slab.set_cell([slab.cell[0], slab.cell[1], [0, 0, 0]])
    slab = attach(slab)
    # The same slab with a third period beyond the cutoff
    cell = slab.cell.array.copy()
    cell[2] = (0, 0, 30.0)
    thick = Atoms(slab.symbols, slab.positions, cell=cell, pbc=True)
    thick = attach(thick)
    np.testing.assert_allclose(slab.get_forces(), thick.get_forces(), atol=1e-12)
    with pytest.raises(PropertyNotImplementedError, match="stress not present"):
        slab.get_stress()


def test_stress_only_where_it_is_defined_and_wanted():
    with pytest.raises(PropertyNotImplementedError, match="stress not present"):
        attach(molecule()).get_stress()
    quick = attach(crystal(), compute_stress=False)
    with pytest.raises(PropertyNotImplementedError, match="stress property not implemented"):
        quick.get_stress()
    assert "stress" not in quick.calc.results


def test_unwrapped_positions():
    inside, outside = attach(crystal()), attach(crystal())
    shifts = np.random.default_rng(0).integers(-3, 4, size=(len(outside), 3))
    outside.positions += shifts @ outside.cell.array
    assert outside.get_potential_energy() == pytest.approx(inside.get_potential_energy(), abs=1e-12)
    np.testing.assert_allclose(outside.get_forces(), inside.get_forces(), atol=1e-12)
    np.testing.assert_allclose(outside.get_stress(), inside.get_stress(), atol=1e-13)


def test_single_atom_and_atoms_beyond_reach():
    atom = attach(Atoms("C", [(3, -200, 1)]))
    alone = atom.get_potential_energy()
    assert alone == pytest.approx(float(random_potential()(graph_of(atom)).energy), rel=1e-13)
    assert np.all(atom.get_forces() == 0)
    pair = attach(Atoms("CC", [(0, 0, 0), (9, 0, 0)]))
    assert pair.get_potential_energy() == pytest.approx(2 * alone, rel=1e-13)
    lattice = attach(Atoms("C", cell=[2.5] * 3, pbc=True))
    lattice.get_stress()
    np.testing.assert_allclose(lattice.get_forces(), 0, atol=1e-13)
    assert lattice.get_potential_energy() != pytest.approx(alone, abs=1e-6)


def test_no_atoms():
    with pytest.raises(ValueError, match="the structure has no atoms"):
        attach(Atoms()).get_potential_energy()


def test_outside_the_model():
    with pytest.raises(ValueError, match=r"element Pu \(94\) is not in the model, which knows H, C, O"):
        attach(Atoms("HPu", [(0, 0, 0), (0, 0, 2)])).get_potential_energy()


@pytest.mark.parametrize("skin", [0.0, 1.0])
def test_positions_that_are_not_finite(skin):
    atoms = attach(molecule(), neighbor_skin=skin)
    atoms.get_potential_energy()
    atoms.positions[4, 1] = np.nan
    with pytest.raises(ValueError, match="position of atom 4 is not finite"):
        atoms.get_potential_energy()


def test_arguments():
    potential = random_potential()
    with pytest.raises(ValueError, match="dtype must be float32 or float64, got 'float16'"):
        DPA4Calculator(potential, dtype="float16")
    with pytest.raises(ValueError, match=r"neighbor_skin must be a distance >= 0 in Angstrom, got -1"):
        DPA4Calculator(potential, neighbor_skin=-1)
    with pytest.raises(ValueError, match="model is an empty list"):
        DPA4Calculator([])
    with pytest.raises(ValueError, match="branch = 'a' selects from a file of several models"):
        DPA4Calculator(potential, branch="a")
    with pytest.raises(FileNotFoundError, match="there is no model file"):
        DPA4Calculator("nowhere.safetensors")


def test_results_are_written_and_read_by_ase(tmp_path):
    from ase.io import read

    atoms = attach(crystal(), [random_potential(0), random_potential(1)])
    atoms.get_stress()
    for name in ("frame.xyz", "frame.traj"):
        atoms.write(tmp_path / name)
        again = read(tmp_path / name)
        assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-7)
        np.testing.assert_allclose(again.get_stress(), atoms.get_stress(), atol=1e-7)


def test_deviations_of_a_committee_below_a_correction():
    committee = DPA4Calculator([random_potential(0), random_potential(1)], device="cpu", dtype="float64")
    atoms = crystal()
    atoms.calc = SumCalculator([committee, LennardJones()])
    frame = labelled(atoms)
    assert frame.info["energy_std"] == committee.results["energy_std"] > 0
    np.testing.assert_array_equal(frame.arrays["forces_std"], committee.results["forces_std"])
    largest = np.linalg.norm(committee.results["forces_std"], axis=1).max()
    assert frame.info["max_force_std"] == pytest.approx(largest)
    assert has_deviations(atoms.calc) and not has_deviations(LennardJones())
    assert "energy_std" not in labelled(attach(crystal())).info


def test_neighbours_are_searched_once_for_all_members(monkeypatch):
    atoms = attach(
        crystal(), [random_potential(seed, cutoff=c) for seed, c in ((0, 4.0), (1, 3.5), (2, 4.0))]
    )
    atoms.get_forces()
    assert atoms.calc._neighbors.searches == 1


def test_folder_of_a_committee_is_a_committee(tmp_path):
    potentials = [random_potential(seed) for seed in (0, 1)]
    for number, potential in enumerate(potentials):
        (tmp_path / f"member-{number}").mkdir()
        save_potential(potential, tmp_path / f"member-{number}" / "best.safetensors")
    found, expected = attach(molecule(), tmp_path), attach(molecule(), potentials)
    assert found.get_potential_energy() == expected.get_potential_energy()
    assert len(found.calc.potentials) == 2


# --- records of a calculation


def test_databases_keep_the_fingerprint_of_the_model(tmp_path):
    potential = random_potential(n_blocks=1, lmax=1)
    with connect(tmp_path / "a.db") as database:
        database.write(attach(molecule(), potential))
    (row,) = connect(tmp_path / "a.db").select()
    expected = fingerprint_of(potential.double())
    assert row.calculator == "dpa4"
    assert row.calculator_parameters == expected | {"branch": None} and expected["dtype"] == "float64"
    committee = attach(molecule(), [potential, random_potential(1, n_blocks=1, lmax=1)]).calc
    first, second = committee.todict()["model"].split()
    assert first == expected["model"] != second


def test_the_branch_is_recorded(monkeypatch):
    potential = random_potential(n_blocks=1, lmax=1)
    monkeypatch.setattr("dpa4.interfaces.loading.load_potential", lambda *_, **__: potential)
    calculator = DPA4Calculator("multitask.pt", device="cpu", branch="metals")
    assert calculator.parameters["branch"] == "metals"
    assert "metals" in calculator._repr_html_()


def test_calculator_in_a_notebook():
    potential = random_potential(n_blocks=1, lmax=1)
    single, committee = (
        DPA4Calculator(models, device="cpu")._repr_html_() for models in (potential, [potential, potential])
    )
    assert fingerprint_of(potential)["model"] in single and "float32" in single and "cpu" in single
    assert "committee of 2 models" in committee and "Model 2" in committee
