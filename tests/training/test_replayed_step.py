"""Replayed training steps: padding changes nothing, frequent sizes are recorded, a replay equals a step."""

import copy

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from dpa4.data import Batch
from dpa4.execution.padding import rounded_up
from dpa4.graph import collate
from dpa4.model.config import Bridging
from dpa4.training import replayed_step as replay
from dpa4.training.loss import Loss
from dpa4.training.replayed_step import RecordingError, ReplayedStep, StepRecorder, pad_batch
from dpa4.training.trainer import training_step
from helpers import assert_close, crystal, graph_of, molecule, random_potential

CUTOFF = 4.0  # of random_potential
MIXED = [molecule(0, 9), crystal(1), molecule(2, 5), molecule(3, 12)]


def batch_of(structures, missing: str = "", seed: int = 0) -> Batch:
    """Structures with random labels and weights; every other one lacks the labels ``missing`` (e, f, v)."""
    generator = torch.Generator().manual_seed(seed)
    graph = collate([graph_of(atoms) for atoms in structures])
    b, n = graph.num_structures, graph.num_atoms

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def known(letter):
        return torch.tensor([letter not in missing or i % 2 == 1 for i in range(b)])

    e, f, v = map(known, "efv")
    weight, bound = random(b).abs() + 0.5, random(n).clamp(min=0)
    counts = torch.zeros(4, dtype=torch.int64)
    return Batch(graph, random(b), random(n, 3), random(b, 3, 3), e, f, v, weight, bound, counts).counted()


def step_of(potential, loss=None):
    """Training step up to the gradients, as in the trainer."""
    loss = loss or Loss(2.0, 3.0, 5.0)

    def step(batch):
        potential.zero_grad(set_to_none=True)
        value, terms = training_step(potential, batch, loss)
        value.backward()
        return value.detach(), terms

    return step


def gradients(potential):
    return [None if p.grad is None else p.grad.clone() for p in potential.parameters()]


def assert_same_step(found, expected, tolerance=1e-10):
    """Compare loss, terms and gradients; parameters without a gradient must be the same ones."""
    (loss, terms, own), (other_loss, other_terms, others) = found, expected
    assert_close(loss, other_loss, tolerance)
    assert terms.keys() == other_terms.keys()
    for name in terms:
        assert_close(terms[name], other_terms[name], tolerance)
    assert [g is None for g in own] == [g is None for g in others]
    scale = max(float(g.abs().max()) for g in others if g is not None)
    for a, b in zip(own, others, strict=True):
        if a is not None:
            assert_close(a / scale, b / scale, tolerance)


def outcome(step, potential, batch):
    loss, terms = step(batch)
    return loss.clone(), {name: term.clone() for name, term in terms.items()}, gradients(potential)


# --- padding


@pytest.mark.parametrize("kind", ["mae", "mse", "huber"])
@pytest.mark.parametrize("missing", ["", "v", "ef", "efv"])
def test_padding_leaves_loss_terms_and_gradients(kind, missing):
    potential, batch = random_potential(n_blocks=1, lmax=1).train(), batch_of(MIXED, missing)
    step = step_of(potential, Loss(2.0, 3.0, 5.0, kind))
    expected = outcome(step, potential, batch)
    padded = pad_batch(batch, CUTOFF)
    assert padded.graph.num_edges > batch.graph.num_edges
    assert_same_step(outcome(step, potential, padded), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"bridging": Bridging(r_inner=0.95, r_outer=1.4)},
        {"charge_spin": True},
        {"edge_norm": True, "pre_release": True},
        {"excluded_pairs": (("H", "C"),)},
    ],
)
@pytest.mark.parametrize("structures", [MIXED, MIXED[:1], MIXED[1:2]])
def test_padding_leaves_the_step_of_other_models(options, structures):
    potential, batch = random_potential(**options).train(), batch_of(structures)
    batch = batch._replace(graph=potential.without_excluded(batch.graph))
    step = step_of(potential)
    assert_same_step(
        outcome(step, potential, pad_batch(batch, CUTOFF)), outcome(step, potential, batch), 1e-9
    )


def test_padding_of_batches():
    batch = batch_of(MIXED)
    padded, n, b = pad_batch(batch, CUTOFF), batch.graph.num_atoms, 4
    graph = padded.graph
    assert graph.num_structures == 8
    assert (graph.num_atoms, graph.num_edges) == (rounded_up(n + 1, 5), rounded_up(batch.graph.num_edges, 5))
    assert (graph.structure.diff() >= 0).all() and (graph.destination.diff() >= 0).all()
    assert torch.equal(graph.structure[n:], torch.full((graph.num_atoms - n,), b))  # the rest is empty
    lengths = {name: len(t) for name, t in zip(padded._fields[1:], padded[1:], strict=True)}
    assert {lengths.pop("forces"), lengths.pop("max_force")} == {graph.num_atoms}
    assert lengths.pop("counts") == 4  # as before, see below
    assert set(lengths.values()) == {8}
    assert not any(t[b:].any() for t in (padded.has_energy, padded.has_forces, padded.has_virial))
    assert not padded.weight[b:].any()
    for old, new in zip(batch[1:], padded[1:], strict=True):
        assert old.dtype == new.dtype and torch.equal(new[: len(old)], old)


def test_batches_have_few_sizes():
    rng = np.random.default_rng(0)
    sizes, wasted = set(), []
    for _ in range(150):
        chosen = [molecule(0, int(n)) for n in rng.integers(2, 4, rng.integers(9, 15))]
        graph = pad_batch(batch_of(chosen), CUTOFF).graph
        sizes.add((graph.num_structures, graph.num_atoms, graph.num_edges))
        wasted.append(graph.num_atoms / sum(map(len, chosen)))
    assert len({b for b, _, _ in sizes}) == 1
    assert len(sizes) < 50  # a third
    assert max(wasted) < 1 + 1 / 16 + 1 / 18  # a sixteenth, and the additional atom in the smallest batch


def test_nothing_in_a_step_waits_for_the_device():
    """Fake tensors refuse operations that need values on the host or derive shapes from values."""
    potential = random_potential(
        n_blocks=1, lmax=1, excluded_pairs=(("H", "C"),), bridging=Bridging()
    ).train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = pytree.tree_map(mode.from_tensor, pad_batch(batch_of(MIXED), CUTOFF))
    with mode:
        loss, _ = training_step(potential, fake, Loss(1.0, 1.0, 1.0, "huber"))
        loss.backward()
        with pytest.raises(DynamicOutputShapeException):
            potential.without_excluded(fake.graph)


# --- which sizes are recorded


class Books:
    """Stub for the recorder that lists recorded and replayed sizes."""

    def __init__(self, error=None):
        self.recorded, self.replayed, self.plain, self.error = [], [], [], error

    def step(self, batch):
        self.plain.append(batch.graph.num_atoms)
        return torch.zeros(()), {}

    def record(self, batch):
        if self.error is not None:
            raise self.error
        size = batch.graph.num_atoms
        self.recorded.append(size)

        def replayed(other):
            assert other.graph.num_atoms == size
            self.replayed.append(size)
            return torch.zeros(()), {}

        return replayed


def sized(n):
    """Batch of n atoms; for n up to 32, each n is a size of its own."""
    return batch_of([molecule(0, n)])


def test_a_size_is_recorded_when_it_comes_again():
    books = Books()
    step = ReplayedStep(random_potential().train(), books.step, books.record)
    for n in (5, 6, 5, 5, 7, 6):
        step(sized(n))
    assert books.plain == [6, 7, 8]  # also padded
    assert books.recorded == [6, 7] and books.replayed == [6, 6, 7]


def test_the_most_frequent_sizes_are_kept():
    books = Books()
    step = ReplayedStep(random_potential().train(), books.step, books.record, max_recordings=2)
    for n in (5, 5, 5, 6, 6):
        step(sized(n))
    assert books.recorded == [6, 7]
    for _ in range(3):  # not yet twice as often as the rarest one
        step(sized(7))
    assert books.recorded == [6, 7]
    step(sized(7))
    assert books.recorded == [6, 7, 8] and sorted(size[1] for size in step.recordings) == [6, 8]
    for n in (6, 6):  # nor does the displaced size return at once
        step(sized(n))
    assert books.recorded == [6, 7, 8]


def test_sizes_that_come_equally_often_do_not_displace_each_other():
    books = Books()
    step = ReplayedStep(random_potential().train(), books.step, books.record, max_recordings=2)
    batches = [sized(n) for n in range(3, 9)]
    for _ in range(20):
        for batch in batches:
            step(batch)
    assert books.recorded == [4, 5]


def test_batches_without_edges_or_in_parts_are_not_recorded():
    books, potential = Books(), random_potential().train()
    step = ReplayedStep(potential, books.step, books.record)
    apart = molecule(0, 2)
    apart.positions[1] += 50.0
    for _ in range(3):
        step(batch_of([apart]))
    assert books.plain == [2] * 3  # without padding
    batch = batch_of(MIXED)
    potential.model.max_edges = {"cpu": rounded_up(batch.graph.num_edges, 5) - 1}
    for _ in range(3):
        step(batch)
    assert books.plain[3:] == [batch.graph.num_atoms] * 3 and not books.recorded
    potential.model.max_edges = {"cpu": rounded_up(batch.graph.num_edges, 5)}
    for _ in range(3):
        step(batch)
    assert len(books.recorded) == 1 and len(books.replayed) == 2


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_recording_that_fails(kind):
    books = Books(kind("not permitted while recording"))
    step = ReplayedStep(random_potential().train(), books.step, books.record)
    step(sized(5))
    with pytest.raises(RecordingError, match="Error: not permitted while recording"):
        step(sized(5))


# --- replay


class Tape:
    """Stub for a CUDA graph that repeats the work and writes the results to the same tensors."""

    def __init__(self, work, parameters):
        self.work, self.parameters = work, parameters

    def record(self):
        self.results = self.work()
        self.gradients = [p.grad for p in self.parameters]
        for t in self._written():
            t.fill_(float("nan"))  # recording computes nothing
        return self.results

    def _written(self):
        return [t for t in (*pytree.tree_leaves(self.results), *self.gradients) if t is not None]

    def replay(self):
        results = self.work()
        new = [*pytree.tree_leaves(results), *(p.grad for p in self.parameters if p.grad is not None)]
        for own, found in zip(self._written(), new, strict=True):
            own.copy_(found)


@pytest.fixture
def tapes(monkeypatch):
    """Function that makes a recorder without a GPU from a step and its parameters."""

    def make(step, parameters):
        parameters = list(parameters)

        def record(work, stream, pool):
            assert (stream, pool) == ("stream", "pool")
            work()
            tape = Tape(work, parameters)
            return tape, tape.record()

        monkeypatch.setattr(replay, "record", record)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        return StepRecorder(step, parameters)

    return make


def follow(step, potential, batches):
    """Outcomes of steps, with clipping in place and plain gradient descent between them."""
    found = []
    for batch in batches:
        found.append(outcome(step, potential, batch))
        own = [p for p in potential.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in own], 0.5)
        with torch.no_grad():
            torch._foreach_add_(own, [p.grad for p in own], alpha=-1e-4)
    return found


def some_batches():
    """Nine batches of three sizes in a mixed order, one of which comes once."""
    rng = np.random.default_rng(0)
    kinds = [lambda s: batch_of([molecule(s, 9)], "v", s), lambda s: batch_of(MIXED, "f", s)]
    return [kinds[i](int(rng.integers(5))) for i in (0, 1, 0, 1, 1, 0, 1, 0)] + [batch_of(MIXED[:2])]


def test_replayed_steps_are_ordinary_steps(tapes):
    potential = random_potential(n_blocks=1, lmax=1).train()
    other = copy.deepcopy(potential)
    plain = step_of(potential)
    step = ReplayedStep(potential, plain, tapes(plain, potential.parameters()))
    batches = some_batches()
    state = torch.get_rng_state()
    found, expected = follow(step, potential, batches), follow(step_of(other), other, batches)
    assert 1 <= len(step.recordings) <= 2 < len(step.seen)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(found, expected, strict=True):
        assert_same_step(a, b, 1e-8)


def test_recordings_own_their_gradients(tapes):
    potential = random_potential().train()
    unused = torch.nn.Parameter(torch.zeros(2))
    potential.register_parameter("unused", unused)
    plain = step_of(potential)
    recorder = tapes(plain, potential.parameters())
    recordings = [recorder(pad_batch(batch_of(s), CUTOFF)) for s in (MIXED, MIXED[:1])]
    for recording, structures in zip(recordings, (MIXED, MIXED[:1]), strict=True):
        batch = pad_batch(batch_of(structures), CUTOFF)
        recording(batch)
        assert unused.grad is None
        for p, gradient in zip(potential.parameters(), recording.gradients, strict=True):
            assert p.grad is gradient
        assert not any(
            own is new for own, new in zip(pytree.tree_leaves(recording.inputs), batch, strict=False)
        )
    one, two = ([id(g) for g in r.gradients if g is not None] for r in recordings)
    assert not set(one) & set(two)


# --- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_replayed_steps_on_the_gpu_are_ordinary_steps(precision):
    potential = random_potential().to(precision).train().cuda()
    other = copy.deepcopy(potential)
    plain = step_of(potential)
    step = ReplayedStep(potential, plain, StepRecorder(plain, potential.parameters()))
    batches = [batch.to("cuda") for batch in 3 * some_batches()]
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    found, expected = follow(step, potential, batches), follow(step_of(other), other, batches)
    assert len(step.recordings) >= 2
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    tolerance = 1e-3 if precision == torch.float32 else 1e-8  # sums in another order, along a descent
    for a, b in zip(found, expected, strict=True):
        assert_same_step(a, b, tolerance)


@pytest.mark.gpu
@needs_gpu
def test_recordings_share_their_memory():
    potential = random_potential(channels=32).float().train().cuda()
    plain = step_of(potential)
    recorder = StepRecorder(plain, potential.parameters())
    batches = [pad_batch(batch_of(n * MIXED).to("cuda"), CUTOFF) for n in (20, 19, 18, 17, 16)]
    reserved, recordings = [], []
    for batch in batches:
        recordings.append(recorder(batch))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    first = reserved[0] - sum(p.numel() * 4 for p in potential.parameters())
    assert reserved[-1] < reserved[0] + 0.5 * first
    # a recording that was replayed in between gives the results of one that was not
    expected = [outcome(plain, potential, batch) for batch in batches]
    for i in (0, 4, 1, 3, 2, 0):
        assert_same_step(outcome(recordings[i], potential, batches[i]), expected[i], 1e-3)


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_waits_for_the_device_is_not_recorded_and_harms_nothing():
    potential = random_potential().float().train().cuda()
    plain, batch = step_of(potential), batch_of(MIXED).to("cuda")

    def waits(batch):
        loss, terms = plain(batch)
        return loss * float(loss), terms

    step = ReplayedStep(potential, waits, StepRecorder(waits, potential.parameters()))
    expected = outcome(waits, potential, batch)
    stream = torch.cuda.current_stream()
    step(batch)
    with pytest.raises(RecordingError):
        step(batch)
    assert torch.cuda.current_stream() == stream
    torch.cuda.get_rng_state()
    torch.randn(3, device="cuda")
    assert_same_step(outcome(waits, potential, batch), expected, 1e-3)
    # another recording is possible afterwards
    step = ReplayedStep(potential, plain, StepRecorder(plain, potential.parameters()))
    for _ in range(3):
        step(batch)
    assert len(step.recordings) == 1
