"""TorchSim: the model gives the calculator's results for batches, and TorchSim's own methods run on it."""

import inspect
import sys

import numpy as np
import pytest
import torch
from ase import Atoms

from dpa4.simulation import DPA4Calculator, relax
from helpers import crystal, graph_of, molecule, random_potential

ts = pytest.importorskip("torch_sim")
from torch_sim.models.interface import validate_model_outputs  # noqa: E402

from dpa4.interfaces.torchsim import DPA4Model  # noqa: E402

OLD = not hasattr(ts, "fire_init")  # TorchSim 0.3, on Python 3.11


def small_potential(**options):
    return random_potential(**({"n_blocks": 1, "lmax": 1} | options))


def model(potential=None, **options) -> DPA4Model:
    return DPA4Model(potential or random_potential(), device="cpu", **({"dtype": "float64"} | options))


def state(structures, of: DPA4Model):
    return ts.initialize_state(structures, of.device, of.dtype)


def slab() -> Atoms:
    atoms = crystal(3)
    atoms.pbc = [True, True, False]
    return atoms


def test_a_committee_has_mean_and_deviation():
    members = [small_potential(seed=seed, cutoff=cutoff) for seed, cutoff in ((0, 4.0), (1, 3.5), (2, 4.0))]
    structures = [crystal(0), crystal(1)[:4]]
    own = DPA4Model(members, device="cpu", dtype="float64")
    found = own(state(structures, own))
    single = [model(member) for member in members]
    results = [one(state(structures, one)) for one in single]
    for name in ("energy", "energies", "forces", "stress"):
        values = torch.stack([result[name] for result in results])
        torch.testing.assert_close(found[name], values.mean(0), rtol=0, atol=1e-12)
        if name != "energies":
            torch.testing.assert_close(found[f"{name}_std"], values.std(0, correction=0), rtol=0, atol=1e-12)
    assert len(list(own.parameters())) == sum(len(list(one.parameters())) for one in single)
    assert "energy_std" not in results[0]


def test_torchsim_finds_the_model_valid():
    potential = small_potential(elements=("H", "C", "Mg", "Si", "Fe"))
    options = {} if OLD else {"check_detached": True}
    validate_model_outputs(model(potential), torch.device("cpu"), torch.float64, **options)


@pytest.mark.parametrize("kind", [molecule, crystal])
def test_a_batch_is_the_calculator_for_each_structure(kind):
    potential = random_potential()
    structures = [kind(seed) for seed in range(3)] + [kind(7)[:4]]
    own = model(potential)
    results = own(state(structures, own))
    calculator = DPA4Calculator(potential, device="cpu", dtype="float64")
    sizes = [len(atoms) for atoms in structures]
    parts = {name: results[name].split(sizes) for name in ("energies", "forces")}
    for index, atoms in enumerate(structures):
        atoms.calc = calculator
        # float64, sums in another order
        assert results["energy"][index].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(parts["energies"][index], atoms.get_potential_energies(), atol=1e-12)
        np.testing.assert_allclose(parts["forces"][index], atoms.get_forces(), atol=1e-12)
        if kind is crystal:
            np.testing.assert_allclose(results["stress"][index], atoms.get_stress(voigt=False), atol=1e-14)
    assert kind is crystal or results["stress"].isnan().all()
    assert not any(values.requires_grad for values in results.values())


def test_stress_is_the_derivative_by_strain_positive_under_tension():
    own, atoms, step = model(), crystal(), 1e-4
    stress = own(state([atoms], own))["stress"][0]
    for axis in range(3):
        energies = []
        for sign in (1, -1):
            strained = atoms.copy()
            deformation = np.eye(3)
            deformation[axis, axis] += sign * step
            strained.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
            energies.append(own(state([strained], own))["energy"].item())
        slope = (energies[0] - energies[1]) / (2 * step * atoms.get_volume())
        assert stress[axis, axis].item() == pytest.approx(slope, rel=1e-5)  # error of the difference


def test_periodicity_along_some_axes():
    potential = random_potential()
    own, atoms = model(potential), slab()
    system = state([atoms], own)
    system.pbc = [True, True, False]  # TorchSim 0.3 supports only all or no axes
    results = own(system)
    atoms.calc = DPA4Calculator(potential, device="cpu", dtype="float64")
    assert results["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    np.testing.assert_allclose(results["forces"], atoms.get_forces(), atol=1e-12)
    assert results["stress"].isnan().all()


def test_unwrapped_positions_isolated_atoms_and_structures_without_edges():
    own = model()
    atoms = crystal()
    moved = atoms.copy()
    moved.positions[2] += 3 * atoms.cell[0] - 2 * atoms.cell[2]
    inverted = atoms.copy()
    inverted.set_cell(-atoms.cell.array)  # the same lattice, left-handed
    results = own(state([atoms, moved, inverted], own))
    for index in (1, 2):
        torch.testing.assert_close(results["energy"][index], results["energy"][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(results["stress"][index], results["stress"][0], rtol=0, atol=1e-12)
        forces = results["forces"].split(6)
        torch.testing.assert_close(forces[index], forces[0], rtol=0, atol=1e-11)
    apart = Atoms("HC", [(0, 0, 0), (50, 0, 0)])
    results = own(state([Atoms("C"), molecule(), apart], own))
    alone = [own(state([Atoms(element)], own))["energy"].item() for element in "HC"]
    assert results["energy"][0].item() == pytest.approx(alone[1], abs=1e-12)
    assert results["energy"][2].item() == pytest.approx(sum(alone), abs=1e-12)
    assert not results["forces"][0].any() and not results["forces"][-2:].any()
    assert own(state([Atoms("C")], own))["forces"].shape == (1, 3)


def test_a_dictionary_and_float32_states():
    own = model()
    system = state([crystal()], own)
    expected = own(system)
    if OLD:
        torch.testing.assert_close(own(vars(system)), expected)
    single = own(ts.initialize_state([crystal()], own.device, torch.float32))
    assert {values.dtype for values in single.values()} == {torch.float32}
    torch.testing.assert_close(
        single["forces"].double(), expected["forces"], rtol=0, atol=1e-5
    )  # of positions


def test_charge_and_spin():
    potential = small_potential(charge_spin=True)
    own = model(potential)
    first, second = molecule(1), molecule(2)
    system = state([first, second], own)
    with pytest.raises(
        ValueError, match="give each system a charge as the extra 'total_charge' of the state"
    ):
        own(system)
    system.total_charge, system.total_spin = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 4.0])
    results = own(system)
    calculator = DPA4Calculator(potential, device="cpu", dtype="float64")
    for index, (atoms, charge, spin) in enumerate(((first, 1, 2), (second, -1, 4))):
        atoms.info |= {"charge": charge, "spin": spin}
        atoms.calc = calculator
        assert results["energy"][index].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    system.total_charge = torch.tensor([0.5, 0.0])
    with pytest.raises(ValueError, match=r"total_charge must be a whole number, .* got \[0.5, 0.0\]"):
        own(system)
    system.total_charge, system.charge = torch.tensor([1.0000000002, -1]), torch.tensor([1, 0])
    with pytest.raises(ValueError, match="the extras charge, total_charge of the state disagree; remove all"):
        own(system)
    system.charge, system.mult = None, system.total_spin
    assert torch.equal(own(system)["energy"], results["energy"])
    system.net_charge = system.total_charge
    with pytest.warns(UserWarning, match="extras of the state: not used, .*: net_charge; a total charge"):
        own(system)
    own.charge_spin = (-1, 4)
    assert own(state([second], own))["energy"].item() == pytest.approx(results["energy"][1].item(), abs=1e-12)


def test_forces_and_stress_can_be_left_out():
    own = model(compute_stress=False)
    assert not own.compute_stress and "stress" not in own(state([crystal()], own))
    own.compute_stress, own.compute_forces = True, False
    assert {"energy", "energies", "stress"} == set(own(state([crystal()], own)))


def test_what_the_model_refuses():
    own = model()
    with pytest.raises(ValueError, match=r"element Cu \(29\) is not in the model"):
        own(state([molecule(), Atoms("Cu")], own))
    broken = molecule()
    broken.positions[3] = np.nan
    with pytest.raises(ValueError, match="the position of atom 3 is not finite"):
        own(state([molecule(1), broken], own))
    with pytest.raises(ValueError, match="dtype must be float32 or float64, got 'half'"):
        model(dtype="half")
    with pytest.raises(ValueError, match="precision 'fast' needs dtype float32"):
        model(precision="fast")


def test_fast_precision_differs_and_float32_hardly():
    atoms, potential = crystal(), random_potential()
    exact, high, fast = (
        (own := model(potential, **options))(state([atoms], own))["forces"]
        for options in ({}, {"dtype": "float32"}, {"dtype": "float32", "precision": "fast"})
    )
    assert (high - exact).abs().max() < 1e-6 < (fast - exact).abs().max()  # rounding of float32; of bfloat16


def test_several_structures_are_not_replayed(monkeypatch):
    """Recordings pay off for sizes that recur; sizes of batches do not."""
    own, replayed = model(), []
    monkeypatch.setattr(own._evaluators[0], "_call", replayed.append)
    assert own(state([molecule(), molecule(1)], own))["energy"].shape == (2,) and not replayed
    with pytest.raises(AttributeError):
        own(state([molecule()], own))
    assert len(replayed) == 1


def test_memory_that_does_not_suffice_is_no_fault_of_the_compiler(monkeypatch):
    own = model(dtype="float32", compile=True)
    monkeypatch.setattr("dpa4.execution.regions.compile_potential", lambda *_: None)
    monkeypatch.setattr("dpa4.execution.trial.compare_with_eager", lambda *_: {"energy": 0.0})
    called = own.potential.of_edges
    failing = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def of_edges(graph):
        for error in failing:
            raise error
        return called(graph)

    monkeypatch.setattr(own.potential, "of_edges", of_edges)
    with pytest.raises(torch.OutOfMemoryError):
        own(state([molecule()], own))
    own(state([molecule()], own))
    assert own._evaluators[0]._compile and own._evaluators[0]._compared


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu_are_those_of_the_cpu():
    potential = random_potential()
    for structures in ([molecule(1), molecule(2, 4), Atoms("C")], [crystal(1), crystal(2)]):
        reference = model(potential)
        expected = reference(state(structures, reference))
        for options, tolerance in (
            ({}, 1e-10),
            ({"dtype": "float32"}, 1e-5),
        ):  # rounding; compiled in float32
            own = DPA4Model(potential, device="cuda", **({"dtype": "float64"} | options))
            found = own(state(structures, own))
            for name in ("energy", "energies", "forces"):
                torch.testing.assert_close(found[name].cpu(), expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_compiled_batches():
    """The same compiled code evaluates a batch with an isolated atom, and one structure."""
    structures, potential = [molecule(1), molecule(2), Atoms("C"), molecule(3, 5)], random_potential()
    compiled, eager = (
        model(potential, dtype="float32", compile=True),
        model(potential, dtype="float32", compile=False),
    )
    for chosen in (structures, structures[:2], structures[:1]):
        found, expected = (own(state(chosen, own)) for own in (compiled, eager))
        for name in ("energy", "forces"):
            # float32, sums in another order
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


def fire(cell: bool = False):
    if OLD:
        return {"optimizer": ts.frechet_cell_fire if cell else ts.optimizers.fire}
    filtered = {"init_kwargs": {"cell_filter": ts.CellFilter.frechet}} if cell else {}
    return {"optimizer": ts.Optimizer.fire} | filtered


@pytest.mark.parametrize("cell", [False, True])
def test_relaxation_of_a_batch_reaches_the_minima_of_ase(cell):
    potential = small_potential()
    calculator = DPA4Calculator(potential, device="cpu", dtype="float64")
    structures, energies = [], []
    for seed in (1, 4):
        atoms = crystal(seed)
        relax(atoms, calculator, fmax=2e-3, steps=400, cell="full" if cell else "fixed")
        atoms.rattle(0.02, seed=seed)
        structures.append(atoms.copy())
        relax(atoms, calculator, fmax=2e-3, steps=400, cell="full" if cell else "fixed")
        energies.append(atoms.get_potential_energy())
    own = model(potential)
    converged = ts.generate_force_convergence_fn(2e-3, include_cell_forces=cell)
    batcher = ts.InFlightAutoBatcher(own, **own.autobatching(250))  # one at a time
    final = ts.optimize(
        structures, own, convergence_fn=converged, max_steps=400, autobatcher=batcher, **fire(cell)
    )
    assert converged(final, None).all()
    # fmax^2 / curvature of about 0.1 eV/Angstrom^2, for each of 18 coordinates
    np.testing.assert_allclose(final.energy, energies, atol=5e-4)


def test_energy_error_of_dynamics_falls_with_the_square_of_the_timestep():
    own = model()
    deviations = []
    for steps in (15, 30):
        system = state([crystal(), crystal(1)], own)
        dt = torch.tensor(22.5 / steps * float(ts.units.MetalUnits.time) / 1000)
        kT = torch.tensor(300 * float(ts.units.MetalUnits.temperature))
        if OLD:
            begin, step = ts.nve(model=own, dt=dt, kT=kT)
            system = begin(system, seed=1)
        else:
            system.rng = 1
            system = ts.nve_init(system, own, kT=kT)
            step = lambda s, dt=dt: ts.nve_step(s, own, dt=dt)  # noqa: E731
        totals = []
        for _ in range(steps + 1):
            kinetic = (system.momenta.square().sum(1) / system.masses / 2).split([6, 6])
            totals.append(system.energy + torch.stack([part.sum() for part in kinetic]))
            system = step(system)
        energies = torch.stack(totals)
        deviations.append((energies - energies[0]).abs().amax(0))
    # velocity Verlet is of second order, so halving the timestep divides the error by four
    np.testing.assert_allclose(deviations[0] / deviations[1], 4, rtol=0.15)


def test_autobatchers_take_as_many_structures_as_have_the_edges():
    own = model(small_potential())
    structures = [crystal()] * 7
    edges = graph_of(structures[0]).num_edges
    options = own.autobatching(2.6 * edges)
    if OLD:  # the estimate is close for a homogeneous structure
        spheres = 4 / 3 * np.pi * own.cutoff**3
        assert 6**2 / structures[0].get_volume() * spheres == pytest.approx(edges, rel=0.2)
    batcher = ts.BinningAutoBatcher(own, **options)
    batcher.load_states(state(structures, own))
    sizes = sorted(s.n_systems for s, *_ in (b if isinstance(b, tuple) else (b,) for b in batcher))
    assert sizes == [1, 2, 2, 2]
    assert own.memory_scales_with == options["memory_scales_with"]


def test_without_torchsim_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "dpa4.interfaces.torchsim")
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    with pytest.raises(ImportError, match=r"torch_sim is not installed; pip install .*\[torchsim\]'"):
        import dpa4.interfaces.torchsim  # noqa: F401


def test_constructor_has_the_arguments_of_the_calculator():
    of_calculator = inspect.signature(DPA4Calculator).parameters
    for name, parameter in inspect.signature(DPA4Model).parameters.items():
        assert name == "compute_forces" or parameter.default == of_calculator[name].default
