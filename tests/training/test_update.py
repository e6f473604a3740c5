"""Update of the weights: the numbers of a plain implementation, steps that are not finite, recording and replay."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dpa4.training.ema import MovingAverage
from dpa4.training.logs import TERMS
from dpa4.training.muon import HybridMuon, orthogonalize, update_magma_score
from dpa4.training.packing import MuonPacking
from dpa4.training.replayed_step import RecordingError, ReplayedUpdate, StepRecorder
from dpa4.training.update import WeightUpdate

SHAPES = {"muon": [(24, 24), (8, 32), (32, 8), (3, 16, 8)], "adam": [(5,), (4, 8)], "adamw": [(16, 2, 1)]}
CLIP, DECAY = 5.0, 0.9


class Training:
    """Parameters with everything that updates them.

    Args:
        device: Device of the parameters.
        options: Options of the optimiser.
    """

    def __init__(self, device="cpu", **options):
        generator = torch.Generator().manual_seed(0)
        self.parameters, groups = [], []
        for route, shapes in SHAPES.items():
            own = [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
            self.parameters += own
            groups.append({"params": own, "route": route})
        self.optimizer = HybridMuon(groups, 1e-3, **options)
        self.average = MovingAverage(self.parameters, DECAY)
        self.update = WeightUpdate(self.parameters, self.optimizer, self.average, CLIP)

    def receive(self, step: int, without=(), bad: str | None = None) -> None:
        """Assign random gradients and receive them; ``bad`` is a number, in ``where`` of the step."""
        generator = torch.Generator().manual_seed(100 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + step)
        for i, p in enumerate(self.parameters):
            gradient = torch.randn(p.shape, generator=generator) ** 3
            p.grad = None if i in without else gradient.to(p.device)
        loss = torch.randn((), generator=generator, dtype=torch.float64).to(self.parameters[0].device)
        terms = {name: loss * (1 + i) for i, name in enumerate(("energy", "forces", "virial"))}
        terms["absolute_errors"] = loss * torch.ones(2, 3, dtype=torch.float64, device=loss.device)
        if bad == "loss":
            loss = loss * math.nan
        elif bad == "term":
            terms["virial"] = loss * math.inf
        elif bad is not None:
            self.parameters[{"muon": 0, "adam": 4, "adamw": 6}[bad]].grad.view(-1)[1] = math.inf
        self.update.receive(loss, terms, step)

    def everything(self) -> list[torch.Tensor]:
        """Copies of weights, state, average and sums."""
        state = [t for p in self.parameters for t in self.optimizer.state[p].values()]
        tensors = (*self.parameters, *state, *self.average.shadows, self.update.sums, self.update.errors)
        return [t.detach().clone() for t in tensors]


def assert_equal(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# --- the numbers


class Plain:
    """The same update with options and counts as Python numbers, weight by weight."""

    def __init__(self, training: Training):
        self.parameters = [p.detach().clone() for p in training.parameters]
        self.routes = [route for route, shapes in SHAPES.items() for _ in shapes]
        self.shadows = [p.clone() for p in self.parameters]
        self.state = [{} for _ in self.parameters]
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64)

    def step(self, training: Training, count: int) -> None:
        gradients = [None if p.grad is None else p.grad.clone() for p in training.parameters]
        norm = torch.stack([g.norm() for g in gradients if g is not None]).double().norm()
        lr, decay = training.optimizer.param_groups[0]["lr"], 1e-3
        for p, g, route, state in zip(self.parameters, gradients, self.routes, self.state, strict=True):
            if g is None:
                continue
            g.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0).float())
            if route != "adam":
                p.mul_(1 - lr * decay)
            (self.muon if route == "muon" else self.adam)(p, g, state, lr)
        weight = 1 - min(DECAY, (1 + count) / (10 + count))
        torch._foreach_lerp_(self.shadows, self.parameters, weight)
        self.sums[-1] += norm

    def adam(self, p, g, state, lr):
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        state["mean"].lerp_(g, 1 - 0.9)
        state["square"].mul_(0.95).addcmul_(g, g, value=1 - 0.95)
        denominator = state["square"].div(1 - 0.95 ** state["step"]).sqrt_().add_(1e-20)
        p.addcdiv_(state["mean"], denominator, value=-lr / (1 - 0.9 ** state["step"]))

    def muon(self, p, g, state, lr):
        def blocks(t):
            t = t.reshape(-1, *t.shape[-2:])
            return t.mT if p.shape[-2] > p.shape[-1] else t

        if not state:
            state.update(momentum=torch.zeros_like(p), score=torch.full((len(blocks(p)),), 0.5))
        momentum = state["momentum"].lerp_(g, 1 - 0.95)
        m, b = momentum.view(len(state["score"]), -1), g.reshape(len(state["score"]), -1)
        factor = update_magma_score(state["score"], (m * b).sum(-1), m.norm(dim=-1) * b.norm(dim=-1))
        x = orthogonalize(blocks(torch.lerp(momentum, g, 1 - 0.95)).contiguous())
        x = (x * (0.18 * max(p.shape[-2:]) ** 0.5)).to(x.dtype) * factor[:, None, None].to(x.dtype)
        p.add_((x.mT if p.shape[-2] > p.shape[-1] else x).reshape(p.shape).float(), alpha=-lr)


def test_an_update_has_the_numbers_of_a_plain_implementation():
    training = Training()
    plain = Plain(training)
    start = [p.detach().clone() for p in training.parameters]
    for step in range(6):
        training.receive(step, without=(1, 4) if step == 3 else ())
        plain.step(training, step)
        training.update.apply()
    rows = zip(
        training.parameters, training.average.shadows, plain.parameters, plain.shadows, start, strict=True
    )
    for i, (p, shadow, q, other, before) in enumerate(rows):
        if i in (0, 4, 5, 6):  # square matrices and vectors: bit for bit
            assert torch.equal(p, q) and torch.equal(shadow, other), i
        else:  # padded and iterated together in float16
            assert (p - q).norm() < 2e-3 * (q - before).norm(), i
            assert (shadow - other).norm() < 2e-3 * (q - before).norm(), i
    torch.testing.assert_close(training.update.sums[-1], plain.sums[-1], rtol=1e-6, atol=0)
    assert training.optimizer.state[training.parameters[4]]["step"] == 5


def test_without_muon_the_optimizer_is_adamw():
    """It continues from the state of PyTorch's."""
    mine, theirs = Training(eps=1e-8).parameters, Training().parameters
    routes = ("adamw", "adam")
    optimizer = HybridMuon(
        [{"params": mine[i::2], "route": route} for i, route in enumerate(routes)], 1e-2, eps=1e-8
    )
    other = torch.optim.AdamW(
        [
            {"params": theirs[i::2], "route": "muon", "weight_decay": (1e-3, 0.0)[i]}
            for i, route in enumerate(routes)
        ],
        1e-2,
        betas=(0.9, 0.95),
    )
    start = [p.detach().clone() for p in mine]
    for step in range(6):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        if step == 3:
            optimizer.load_state_dict(other.state_dict())
            torch._foreach_copy_([p.detach() for p in mine], [q.detach() for q in theirs])
        optimizer.step()
        other.step()
    assert [group["route"] for group in optimizer.param_groups] == ["adamw", "adam"]
    for p, q, before in zip(mine, theirs, start, strict=True):
        assert (p - q).norm() < 1e-5 * (q - before).norm()


def test_options_of_a_loaded_state_do_not_replace_those_of_the_optimizer():
    one, two = Training(weight_decay=0.1), Training(weight_decay=0.2)
    one.receive(0)
    one.update.apply()
    two.optimizer.load_state_dict(one.optimizer.state_dict())
    assert {group["weight_decay"] for group in two.optimizer.param_groups} == {0.2}


# --- steps that are not finite


@pytest.mark.parametrize("bad", ["loss", "term", "muon", "adam", "adamw"])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_and_all_later_ones_change_nothing(bad, first):
    training = Training()
    for step in range(0 if first else 2):
        training.receive(step)
        training.update.apply()
    training.receive(2, bad=bad)  # creates the state
    before = training.everything()
    training.update.apply()
    assert not training.update.report({}).is_finite()
    assert_equal(training.everything(), before)
    training.receive(3)
    training.update.apply()
    assert training.update.report({}).is_finite()
    assert_equal(training.everything(), before)


def test_a_finite_step_changes_everything():
    training = Training()
    training.receive(0)
    before = training.everything()
    training.update.apply()
    assert not any(torch.equal(a, b) for a, b in zip(training.everything(), before, strict=True))


# --- recording


class Tape(TorchDispatchMode):
    """Stand-in for a CUDA graph: repeats recorded operations on the tensors that they had when they were recorded."""

    def __init__(self, work):
        super().__init__()
        self.calls = []
        with self:
            work()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            if function.is_view:
                continue
            for own, new in zip(
                pytree.tree_leaves(result), pytree.tree_leaves(function(*args, **kwargs)), strict=True
            ):
                if own is not None and own.data_ptr() != new.data_ptr():
                    own.copy_(new)


def test_a_replayed_update_is_an_ordinary_update():
    one, two = Training(), Training()
    replayed = ReplayedUpdate(two.update, Tape)
    for step in range(8):  # other rates, counts and gradients in each, and not always all gradients
        for training in (one, two):
            training.receive(step, without=(0, 4) if step in (2, 5) else ())
        one.update.apply()
        replayed()
        assert_equal(two.everything(), one.everything())
        assert two.update.report({}).values() == one.update.report({}).values()
    assert len(replayed.recordings) == 2


def test_a_replayed_update_that_is_not_finite_changes_nothing():
    training = Training()
    replayed = ReplayedUpdate(training.update, Tape)
    for step in range(4):
        training.receive(step, bad="muon" if step == 2 else None)
        if step == 2:
            before = training.everything()
        replayed()
    assert_equal(training.everything(), before)


def test_a_replay_is_known_as_a_change_of_the_weights():
    training = Training()
    replayed = ReplayedUpdate(training.update, lambda work: nn.Identity())
    replayed.recordings[None] = type("Graph", (), {"replay": lambda self: None})()
    before = [p._version for p in training.parameters]
    replayed()
    assert all(p._version > old for p, old in zip(training.parameters, before, strict=True))


def test_an_update_that_cannot_be_recorded_changes_nothing():
    def record(work):
        work()
        raise RuntimeError("not permitted")

    training, twin = Training(), Training()
    for each in (training, twin):
        each.receive(0)
    with pytest.raises(RecordingError, match="RuntimeError: not permitted"):
        ReplayedUpdate(training.update, record)()
    for each in (training, twin):
        each.update.apply()
    assert_equal(training.everything(), twin.everything())


def test_nothing_in_an_update_waits_for_the_device():
    training = Training("meta")
    training.receive(0)
    tape = Tape(training.update.apply)
    names = {str(function) for function, *_ in tape.calls}
    assert not {n for n in names if "_local_scalar_dense" in n or "lift_fresh" in n or "nonzero" in n}


def test_state_stays_at_its_place_in_memory():
    """Also if other parameters have a gradient for a while."""
    training = Training()
    places = []
    for step in range(4):
        training.receive(step, without=(0, 5) if step == 1 else ())
        training.update.apply()
        if step != 1:
            places.append(
                [t.data_ptr() for p in training.parameters for t in training.optimizer.state[p].values()]
            )
    assert places[0] == places[1] == places[2]
    assert sum(isinstance(pack, MuonPacking) for pack in training.optimizer._packings.values()) == 2


# --- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_recorded_updates_on_the_gpu_are_ordinary_updates():
    one, two = Training("cuda"), Training("cuda")
    recorder = StepRecorder(lambda batch: None, two.parameters)
    replayed = ReplayedUpdate(two.update, recorder.record_update)
    start = copy.deepcopy([p.detach() for p in one.parameters])
    for step in range(12):
        for training in (one, two):
            training.receive(step, without=(0, 4) if step in (2, 5) else ())
        one.update.apply()
        replayed()
    assert len(replayed.recordings) == 2
    for p, q, before in zip(one.parameters, two.parameters, start, strict=True):
        assert (p - q).norm() < 1e-3 * (p - before).norm()
    torch.testing.assert_close(two.update.sums, one.update.sums)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bad", ["loss", "muon", "adam"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_recorded_update_that_is_not_finite_leaves_the_weights(bad, step):
    training = Training("cuda")
    recorder = StepRecorder(lambda batch: None, training.parameters)
    replayed = ReplayedUpdate(training.update, recorder.record_update)
    for i in range(step):
        training.receive(i)
        replayed()
    training.receive(step, bad=bad)
    before = training.everything()
    replayed()
    report = training.update.report({})
    training.receive(step + 1)
    replayed()
    assert not report.is_finite()
    assert_equal(training.everything(), before)
