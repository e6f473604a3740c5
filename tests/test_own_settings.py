"""The caller's settings of PyTorch do not reach the network: results are bitwise the same in every interface."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

from dpa4.data import frame_from_atoms
from dpa4.execution.evaluator import Evaluator
from dpa4.graph import Graph
from dpa4.interfaces.ase import DPA4Calculator
from dpa4.model import ModelConfig
from dpa4.potential import Potential, load_potential, save_potential
from dpa4.potential.descriptors import embeddings
from dpa4.potential.hessian import expand_energy, hessian
from dpa4.system import Lock, float32_by_default, own_settings
from dpa4.training import evaluate
from helpers import crystal, graph_of, molecule, random_potential, small_potential
from settings import SETTINGS, default_dtype
from training_runs import assert_same_run, run


@pytest.fixture(scope="module")
def potential():
    """Potential on which all kernels run."""
    return random_potential(channels=16, n_blocks=1).float()


@pytest.fixture(scope="module")
def checkpoint(potential, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_potential(potential, path)
    return path


def of_calculator(checkpoint, **options):
    atoms = crystal()
    atoms.calc = DPA4Calculator(checkpoint, device="cpu", **options)
    first = [atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), atoms.get_stresses()]
    atoms.positions[0] += 0.01  # with the neighbours of the first search
    return [*first, atoms.get_forces()]


def of_torchsim(checkpoint):
    model = pytest.importorskip("dpa4.interfaces.torchsim").DPA4Model(checkpoint, device="cpu")
    results = model(state())
    return [results[name] for name in ("energy", "forces", "stress")]


@own_settings  # TorchSim may do with the settings what it likes
@float32_by_default()
def state():
    torch_sim = pytest.importorskip("torch_sim")
    return torch_sim.initialize_state([crystal()], torch.device("cpu"), torch.float64)


def of_evaluator(checkpoint):
    return list(Evaluator(load_potential(checkpoint), compile=False)(graph_of(crystal())))


def of_potential(checkpoint):
    own = load_potential(checkpoint)
    graph = graph_of(molecule())
    return [*own(graph), own.atomic_virials(graph), own.descriptor(graph)]


def of_hessian(checkpoint):
    own = load_potential(checkpoint)
    graph = graph_of(molecule(n=3))
    return [hessian(own, graph), *expand_energy(own, graph, torch.ones_like(graph.positions, device="cpu"))]


def of_evaluation(checkpoint):
    atoms = crystal()
    atoms.info["REF_energy"] = 1.0
    frame = frame_from_atoms(atoms, origin="here")
    return [[(row.mae, row.maximum) for row in evaluate(load_potential(checkpoint), [frame]).rows]]


INTERFACES = {
    "ASE": of_calculator,
    "ASE, fast": lambda checkpoint: of_calculator(checkpoint, precision="fast"),
    "TorchSim": of_torchsim,
    "Evaluator": of_evaluator,
    "Potential": of_potential,
    "Hessian": of_hessian,
    "descriptors": lambda checkpoint: embeddings(load_potential(checkpoint), [crystal()]),
    "evaluation": of_evaluation,
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        one, other = one.detach().numpy(), other.detach().numpy()
    return np.array_equal(one, other)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Results without any setting, by interface; computed once."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = INTERFACES[name](checkpoint)
        return found[name]

    return of


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("interface", INTERFACES)
def test_settings_do_not_reach_the_network(interface, setting, checkpoint, expected):
    """Loading, the first call and later calls alike."""
    before = expected(interface)
    with SETTINGS[setting]():
        found = INTERFACES[interface](checkpoint)
    assert len(before) == len(found) > 0
    assert all(same(one, other) for one, other in zip(before, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["autocast", "inference mode", "float64 by default"])
def test_settings_do_not_reach_compiled_code(setting, compilations):
    def forces():
        own = small_potential().float()
        return Evaluator(own, compile=True)(graph_of(molecule())).forces

    before = forces()
    compiled = len(compilations)
    with SETTINGS[setting]():
        found = forces()
    assert torch.equal(before, found) and compiled and len(compilations) == 2 * compiled


def test_settings_do_not_reach_training(argon_file, finished_run, tmp_path, no_figures):
    with SETTINGS["float64 by default"](), SETTINGS["autocast"](), SETTINGS["no_grad"]():
        run(argon_file, tmp_path / "run")
    assert_same_run(finished_run.folder, tmp_path / "run")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_potential_is_built_and_moved_as_without(setting):
    def built():
        torch.manual_seed(0)
        return Potential(ModelConfig(elements=("H",), channels=8, n_blocks=1)).double().float()

    expected = built()
    with SETTINGS[setting]():
        found = built()
    assert found.dtype == torch.float32 and found.reference_energies.dtype == torch.float64
    for one, other in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and not one.is_inference()


def test_a_graph_made_in_inference_mode(potential):
    graph = graph_of(molecule(n=3))
    with torch.inference_mode():
        made = Graph(*(t.clone() for t in graph))
        inside = potential(made)
    for found in (inside, potential(made)):
        assert torch.equal(found.forces, potential(graph).forces)
    assert torch.equal(hessian(potential, made), hessian(potential, graph))


def test_training_under_autocast(potential):
    """The user's own training: the forward pass is that without autocast, so the gradients are as well."""
    own, graph = copy.deepcopy(potential).train(), graph_of(molecule())

    def gradients(setting):
        own.zero_grad()
        with setting:
            prediction = own(graph)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        return [p.grad for p in own.parameters() if p.grad is not None]

    expected = gradients(torch.enable_grad())
    found = gradients(torch.autocast("cpu", dtype=torch.bfloat16))
    assert expected and all(map(torch.equal, expected, found))


def test_a_backward_pass_under_autocast_does_not_crash(potential):
    own = copy.deepcopy(potential).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own(graph_of(molecule())).forces.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in own.parameters())


def test_mixed_precision_of_the_network_is_its_own(potential):
    """The bfloat16 products of ``precision = "fast"`` remain, and casts of old weights do not."""
    own, graph = copy.deepcopy(potential), graph_of(molecule())
    exact = own(graph).energy
    own.precision = "fast"
    rounded = own(graph).energy
    assert not torch.equal(exact, rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(own(graph).energy, rounded)
        with torch.no_grad():
            for p in own.parameters():
                p.mul_(1.1)
        found = own(graph).energy
    assert torch.equal(found, own(graph).energy) and not torch.equal(found, rounded)


def test_settings_return(potential):
    @own_settings
    def inside():
        assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
        assert torch.zeros(1).device.type == "cpu" and not torch.is_grad_enabled()
        raise ValueError("inside")

    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(ValueError, match="inside"):
            inside()
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_inference_mode_enabled() and torch.zeros(1).device.type == "meta"
    assert torch.zeros(1).device.type == "cpu"


def test_the_default_dtype_returns_after_the_last_block():
    with default_dtype(torch.float64):
        first, second = float32_by_default(), float32_by_default()
        with first:
            second.__enter__()
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64


def test_threads_that_share_a_calculator_get_their_own_results(checkpoint):
    calculator = DPA4Calculator(checkpoint, device="cpu")
    structures = [molecule(seed, n=4 + seed) for seed in range(3)]
    for atoms in structures:
        atoms.calc = calculator
    expected = [(a.get_potential_energy(), a.get_forces()) for a in structures]
    start, wrong = threading.Barrier(len(structures)), []

    def work(index: int):
        atoms, (energy, forces) = structures[index], expected[index]
        start.wait()
        for _ in range(15):
            try:
                if atoms.get_potential_energy() != energy or not np.array_equal(atoms.get_forces(), forces):
                    wrong.append(index)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(structures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_calculators_can_be_copied(checkpoint):
    calculator = DPA4Calculator(checkpoint, device="cpu")
    own = copy.deepcopy(calculator)
    assert own._lock is not calculator._lock
    assert own.get_potential_energy(molecule()) == calculator.get_potential_energy(molecule())
    assert isinstance(pickle.loads(pickle.dumps(calculator._lock)), Lock)
