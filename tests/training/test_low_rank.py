"""Low-rank adaptation: the merged weights are those of the factors, and a run saves an ordinary model."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpa4.data import EpochBatches, FrameDataset, read_frames
from dpa4.model import DPA4
from dpa4.model.presets import preset
from dpa4.potential.checkpoint import load_potential
from dpa4.training.loss import Loss
from dpa4.training.low_rank import LowRank
from dpa4.training.options import TrainingOptions
from dpa4.training.replayed_step import ReplayedUpdate
from dpa4.training.state import load_state, save_state
from dpa4.training.trainable import trainable
from dpa4.training.trainer import training_step
from dpa4.training.update import WeightUpdate
from finetuning_runs import finetune, options, start_and_data
from helpers import assert_close, graph_of, molecule, random_potential
from training_runs import Killed, assert_same_run, kill_at

pytestmark = pytest.mark.usefixtures("no_figures")

LORA = {"lora_rank": 2, "lora_alpha": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("low-rank")
    start_and_data(path)
    return path


def adapted(**options):
    """A float64 potential and factors of random values, merged."""
    potential = random_potential(**options).train()
    torch.manual_seed(1)
    low_rank = LowRank(potential.model, 2, 3.0)
    for _, up in low_rank.factors.values():
        torch.nn.init.normal_(up, std=0.1)
    start = {name: w.detach().clone() for name, w in low_rank.weights.items()}
    low_rank.merge()
    return potential, low_rank, start


def loss_of(potential, folder):
    frames = read_frames(folder / "old.xyz")[:3]
    batch = next(EpochBatches(FrameDataset(frames, potential.config.cutoff), batch_size=3).batches(0))
    return training_step(potential, batch, Loss(1.0, 1.0, 0.0))[0]


# --- the numbers


def test_the_trained_parameters_are_those_of_deepmd_kit():
    """The network of its water example: 212,516 of 833,132 parameters, factors included, are trained at rank 16."""
    model = DPA4(preset("mini", elements=("H", "O"), symmetry="SO3", edge_norm=False))
    full = sum(p.numel() for p in model.parameters())
    trained = trainable(TrainingOptions(finetune={"lora_rank": 16}), model, 1e-3)
    factors = sum(p.numel() for pair in trained.low_rank.factors.values() for p in pair)
    assert sum(p.numel() for p in trained.parameters) == 212_516
    assert full + factors == 833_132


@pytest.mark.parametrize("config", [{}, {"symmetry": "SO3", "n_focus": 2, "mlp_bias": True, "ffn_on": "s2"}])
def test_merged_weights_have_the_energy_forces_and_gradients_of_the_factors(folder, config):
    """The expected values come from autograd through W0 + alpha/r down up, layer by layer."""
    potential, low_rank, start = adapted(elements=("H", "C", "N", "O"), **config)
    others = [
        p for n, p in potential.model.named_parameters() if p.requires_grad and n not in low_rank.weights
    ]
    loss = loss_of(potential, folder)
    loss.backward(inputs=[*others, *low_rank.weights.values()])
    low_rank.pass_on_gradients()
    assert all(w.grad is None for w in low_rank.weights.values())

    explicit = {
        f"model.{name}": start[name] + 3.0 / 2 * torch.matmul(down, up)
        for name, (down, up) in low_rank.factors.items()
    }
    with torch.nn.utils.stateless._reparametrize_module(potential, explicit):
        expected = loss_of(potential, folder)
        flat = [p for pair in low_rank.factors.values() for p in pair]
        gradients = torch.autograd.grad(expected, [*flat, *others], allow_unused=True)
    assert_close(loss, expected, 1e-12)
    for p, gradient in zip([*flat, *others], gradients, strict=True):
        assert (gradient is None) == (p.grad is None)
        if gradient is not None:
            assert_close(p.grad, gradient, 1e-12)
    assert sum(float(p.grad.abs().max()) > 0 for p in flat if p.grad is not None) > 0.9 * len(flat)


def test_a_merged_model_is_still_invariant():
    potential, *_ = adapted(symmetry="O3")
    atoms = molecule(0)
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3))
    turned.positions *= -1
    energies = [potential(graph_of(a, potential.config.cutoff)).energy for a in (atoms, turned)]
    assert_close(*energies, 1e-12)


def test_fresh_factors_change_nothing():
    potential = random_potential()
    before = {n: p.detach().clone() for n, p in potential.model.named_parameters()}
    low_rank = LowRank(potential.model, 3, 1.0)
    low_rank.merge()
    assert all(torch.equal(p, before[n]) for n, p in potential.model.named_parameters())
    down = torch.cat([d.detach().flatten() for d, _ in low_rank.factors.values()])
    assert float(down.std()) == pytest.approx(3**-0.5, rel=0.1)  # of thousands of numbers


def test_weight_decay_acts_on_the_factors_alone():
    potential = random_potential()
    decay, rate = 0.5, 0.1
    trained = trainable(TrainingOptions(finetune=LORA, weight_decay=decay), potential.model, rate)
    low_rank = trained.low_rank
    base = {n: w.detach().clone() for n, w in low_rank.weights.items()}
    for _, up in low_rank.factors.values():
        torch.nn.init.normal_(up)
    low_rank.merge()
    change = {n: w.detach() - base[n] for n, w in low_rank.weights.items()}
    for p in trained.parameters:
        p.grad = torch.zeros_like(p)
    update = WeightUpdate(trained.parameters, trained.optimizer, None, None, low_rank)
    zero = torch.zeros((), dtype=torch.float64)
    terms = dict.fromkeys(("energy", "forces", "virial"), zero)
    update.receive(zero, terms | {"absolute_errors": torch.zeros(2, 3, dtype=torch.float64)}, 0)
    update.apply()
    for n, w in low_rank.weights.items():
        assert_close(w.detach() - base[n], change[n] * (1 - rate * decay) ** 2)


def test_an_update_that_is_not_finite_changes_nothing_and_a_replay_is_known_as_a_change():
    potential = random_potential()
    trained = trainable(TrainingOptions(finetune=LORA), potential.model, 1e-3)
    update = WeightUpdate(trained.parameters, trained.optimizer, None, None, trained.low_rank)
    replayed = ReplayedUpdate(update, lambda work: SimpleNamespace(replay=work))
    bad = torch.full((), float("nan"), dtype=torch.float64)
    terms = dict.fromkeys(("energy", "forces", "virial"), bad)
    for p in trained.parameters:
        p.grad = torch.ones_like(p)
    update.receive(bad, terms | {"absolute_errors": torch.zeros(2, 3, dtype=torch.float64)}, 0)
    weights = list(trained.low_rank.weights.values())
    before, versions = [w.detach().clone() for w in weights], [w._version for w in weights]
    replayed()
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    assert all(w._version > old for w, old in zip(weights, versions, strict=True))


# --- runs


@pytest.fixture(scope="module")
def whole_run(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpa4.training.trainer.plot_learning_curve", lambda folder: None)
        text = finetune(options(folder, folder / "whole", LORA, learning_rate=5e-3))
    return folder / "whole", text


def test_a_run_saves_an_ordinary_model_whose_weights_changed_by_the_rank(folder, whole_run):
    run, text = whole_run
    assert re.search(
        r"trained: [\d,]+ parameters; the network has [\d,]+; factors of rank 2 in place of", text
    )
    before, after = load_file(folder / "start.safetensors"), load_file(run / "last.safetensors")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    model = load_potential(run / "last.safetensors").model
    names = LowRank(model, 2, 1.0).weights.keys()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {"types.table", "basis.frequencies"} < frozen
    assert all(torch.equal(before[f"model.{n}"], after[f"model.{n}"]) for n in frozen)
    changed = 0
    for name in names:
        change = (after[f"model.{name}"].double() - before[f"model.{name}"]).reshape(
            -1, *after[f"model.{name}"].shape[-2:]
        )
        sizes = torch.linalg.svdvals(change)
        # Of the averaged factors, hence also of rank 2; weights of about 0.3 are rounded to float32.
        assert float(sizes[:, 2:].max()) < 1e-6
        changed += float(sizes[:, 0].max()) > 1e-4
    assert changed > 0.5 * len(names)


def test_a_killed_run_continues_bit_for_bit(folder, whole_run, tmp_path, monkeypatch):
    part = options(folder, tmp_path / "part", LORA, learning_rate=5e-3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        finetune(part)
    finetune(part, resume=True)
    assert_same_run(whole_run[0], tmp_path / "part")
    states = [load_state(path / "last.pt")["low_rank"] for path in (whole_run[0], tmp_path / "part")]
    for part_of_state in ("start", "down", "up"):
        one, two = (state[part_of_state] for state in states)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda factors: factors.pop("up"), "its entries do not fit .KeyError"),
        (
            lambda factors: factors["up"].update({n: t[..., :1] for n, t in factors["up"].items()}),
            "has the shape",
        ),
        (
            lambda factors: factors["up"].update({n: t * float("nan") for n, t in factors["up"].items()}),
            "not finite",
        ),
        (lambda factors: factors.update(up=3), "its entry low_rank is"),
    ],
)
def test_a_damaged_state_is_refused(folder, whole_run, tmp_path, change, message):
    state = load_state(whole_run[0] / "last.pt")
    change(state["low_rank"])
    (tmp_path / "run").mkdir()
    save_state(state, tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match=message):
        finetune(options(folder, tmp_path / "run", LORA, learning_rate=5e-3), resume=True)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"lora_rank": 9}, "training.finetune.lora_rank = 9 exceeds 8, the rank of the smallest matrix"),
        (
            {"lora_rank": 2, "freeze": ["blocks", "readout"]},
            "lora_rank has no effect: training.finetune.freeze",
        ),
    ],
)
def test_ranks_that_are_none(chosen, message):
    with pytest.raises(ValueError, match=message):
        trainable(TrainingOptions(finetune=chosen), random_potential().model, 1e-3)


def test_factors_have_the_rates_of_their_depth():
    model = random_potential().model
    trained = trainable(
        TrainingOptions(finetune={"lora_rank": 2, "depth_decay": 0.5, "freeze": ["block1"]}), model, 1e-3
    )
    assert not any(name.startswith("blocks.0.") for name in trained.low_rank.weights)
    rate = {
        id(p): r for g in trained.optimizer.param_groups for p, r in zip(g["params"], g["rates"], strict=True)
    }
    for name, pair in trained.low_rank.factors.items():
        assert all(rate[id(p)] == (0.5 if name.startswith("blocks.1.") else 1.0) for p in pair)


def assert_similar_weights(one, two):
    one, two = load_file(one / "last.safetensors"), load_file(two / "last.safetensors")
    assert one.keys() == two.keys()
    for name in one:  # Muon turns rounding errors of small gradients into differences of about a step of 1e-3
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-3)


def compare_compiled_with_eager(folder):
    """Train with a part of the network that has no gradients, and with factors in the others."""
    start_and_data(folder, n_blocks=1, ffn_on="s2")
    chosen = LORA | {"freeze": ["embedding"]}
    text = finetune(options(folder, folder / "compiled", chosen, compile=True, steps=3))
    assert "deviation from eager mode" in text and "failed" not in text
    finetune(options(folder, folder / "eager", chosen, steps=3))
    assert_similar_weights(folder / "compiled", folder / "eager")


@pytest.mark.slow
def test_traced_training_equals_eager_training(tmp_path, compilations):
    """The code of the regions, run without a compiler."""
    compare_compiled_with_eager(tmp_path)
    assert len(compilations) > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_training_equals_eager_training(tmp_path):
    compare_compiled_with_eager(tmp_path)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_training_on_the_gpu_equals_eager_training(folder, tmp_path):
    for compile in (True, False):
        values = options(folder, tmp_path / str(compile), LORA, compile=compile, steps=13)
        text = finetune(values | {"device": "cuda"})
        assert "failed" not in text
    assert_similar_weights(tmp_path / "True", tmp_path / "False")
