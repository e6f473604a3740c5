"""Replay: the start's data are in every batch, with its reference energies, and are forgotten less."""

import numpy as np
import pytest
import torch
from ase.io import read, write
from safetensors import safe_open

from dpa4.data import EpochBatches, FrameDataset, read_frames
from dpa4.output import read_csv
from dpa4.potential.checkpoint import load_potential
from dpa4.training.evaluation import predict
from dpa4.training.options import DataOptions, RunConfig
from dpa4.training.prepare import prepare
from dpa4.training.replay import ReplayedBatches, divided, moved_energies, replay_of
from dpa4.training.scores import errors_of as errors_of_predictions
from finetuning_runs import ELEMENTS, SHIFT, finetune, options, start_and_data
from training_runs import SILENT, Killed, assert_same_run, kill_at

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay")
    start_and_data(path)
    return path


def batches_of(folder, name, size, **order):
    return EpochBatches(FrameDataset(read_frames(folder / name), 4.0), batch_size=size, **order)


def errors_of(potential, batches):
    return errors_of_predictions(batches.dataset.frames, predict(potential, batches.batches(0)))


def assert_same_batch(one, two):
    flat = [(*batch.graph, *batch[1:]) for batch in (one, two)]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


# --- reference energies


def test_moved_labels_have_the_errors_of_the_start(folder):
    """Old references with the labels as they are, and new references with the moved labels: the same errors."""
    potential = load_potential(folder / "start.safetensors")
    frames = read_frames(folder / "old.xyz")
    for i, frame in enumerate(frames):
        frame.forces[:] += 0.01 * i
    old = dict(zip(potential.elements, potential.reference_energies.tolist(), strict=True))
    new = {e: value + SHIFT[e] for e, value in old.items()}
    expected = errors_of(potential, EpochBatches(FrameDataset(frames, 4.0), batch_size=4, shuffle=False))
    potential.reference_energies.copy_(torch.tensor([new[e] for e in potential.elements]))
    moved = moved_energies(frames, old, new)
    found = errors_of(potential, EpochBatches(FrameDataset(moved, 4.0), batch_size=4, shuffle=False))
    assert expected["energy"].mae < 1e-2  # meV/atom: labels of the start in float32
    for name in ("energy", "forces"):
        assert found[name].mae == pytest.approx(expected[name].mae, rel=1e-6, abs=1e-6)


def test_a_run_refits_the_new_references_and_keeps_the_errors_of_the_start(folder, tmp_path):
    """The new data are of another level of theory: without moved labels the errors would be of electronvolts."""
    config = RunConfig.model_validate(options(folder, tmp_path, replay={"files": str(folder / "old.xyz")}))
    preparation = prepare(config, SILENT)
    potential = preparation.potential
    changes = dict(zip(ELEMENTS, potential.reference_energies.tolist(), strict=True))
    assert changes["C"] > 10 and preparation.replay.references["C"] == -1.5
    assert errors_of(potential, preparation.replay.validation)["energy"].mae < 1e-2  # meV/atom


# --- batches


def test_every_batch_has_structures_of_both_kinds(folder):
    old = batches_of(folder, "old.xyz", 3, seed=0, shuffle=True)
    add = ReplayedBatches(old)
    new = batches_of(folder, "new.xyz", 2, seed=0, shuffle=True, extend=add)
    seen = set()
    for batch, plain in zip(new.batches(1), batches_of(folder, "new.xyz", 2, seed=0).batches(1), strict=True):
        graph = batch.graph
        own = plain.graph.num_structures
        assert graph.num_structures in (
            own + 1,
            own + 3,
        )  # 16 old structures: five batches of three, one of one
        assert_same_batch(plain, plain._replace(graph=plain.graph))
        assert torch.equal(batch.energy[:own], plain.energy)
        assert torch.equal(graph.positions[: plain.graph.num_atoms], plain.graph.positions)
        nitrogen = graph.atomic_numbers[plain.graph.num_atoms :] == 7
        assert nitrogen.any()  # in the old data only
        seen.update(batch.energy[own:].tolist())
    assert len(seen) == 16


def test_batches_are_determined_by_epoch_and_number(folder):
    def batches(epoch, start=0):
        add = ReplayedBatches(batches_of(folder, "old.xyz", 3, seed=0))
        return list(batches_of(folder, "new.xyz", 2, seed=0, extend=add).batches(epoch, start))

    whole = batches(2)
    for one, two in zip(whole[3:], batches(2, 3), strict=True):
        assert_same_batch(one, two)
    assert not torch.equal(batches(1)[0].energy, whole[0].energy)


@pytest.mark.parametrize(
    ("budget", "share", "expected"),
    [
        ({"batch_size": 8}, 0.5, ({"batch_size": 4}, {"batch_size": 4})),
        ({"batch_size": 8}, 0.01, ({"batch_size": 7}, {"batch_size": 1})),
        ({"batch_size": 8}, 0.99, ({"batch_size": 1}, {"batch_size": 7})),
        (
            {"max_atoms": 100, "max_edges": 1000},
            0.25,
            ({"max_atoms": 75, "max_edges": 750}, {"max_atoms": 25, "max_edges": 250}),
        ),
    ],
)
def test_a_batch_is_divided(budget, share, expected):
    assert divided(budget, share) == expected


def test_a_batch_of_one_structure_cannot_be_divided(folder, tmp_path):
    with pytest.raises(ValueError, match="training.batch_size = 1 has no room for both"):
        finetune(options(folder, tmp_path / "run", replay={"files": str(folder / "old.xyz")}, batch_size=1))


# --- runs


@pytest.fixture(scope="module")
def whole_run(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpa4.training.trainer.plot_learning_curve", lambda folder: None)
        replay = {"files": str(folder / "old.xyz")}
        text = finetune(options(folder, folder / "whole", replay=replay))
    return folder / "whole", text


@pytest.mark.slow
def test_replayed_data_are_forgotten_less(folder, tmp_path):
    """Both runs see as many new structures. With replay the error is 0.2 to 0.36 times as large, for five seeds."""
    errors = []
    for replay, size in (({"files": str(folder / "old.xyz")}, 4), (None, 2)):
        run = tmp_path / str(size)
        training = {"steps": 16, "batch_size": size, "validation_interval": 16, "learning_rate": 5e-3}
        finetune(options(folder, run, replay=replay, **training))
        tuned = load_potential(run / "last.safetensors")
        data = FrameDataset(read_frames(folder / "old.xyz"), 4.0)
        errors.append(errors_of(tuned, EpochBatches(data, batch_size=4, shuffle=False))["forces"].mae)
    assert errors[0] < 0.7 * errors[1]


def test_errors_of_both_are_logged_apart_and_the_new_data_decide(whole_run):
    folder, text = whole_run
    valid, replay = read_csv(folder / "valid.csv"), read_csv(folder / "valid_replay.csv")
    assert [r["step"] for r in valid] == [r["step"] for r in replay] == ["0", "2", "4", "6"]
    assert float(replay[0]["forces_mae"]) < 1e-2 < float(valid[0]["forces_mae"])  # meV/Å: labels of the start
    scores = [float(r["score"]) for r in valid]
    best = max(i for i, r in enumerate(valid) if r["best"] == "1")
    assert scores[best] == min(scores)
    assert text.count(" replayed  ") == len(replay)
    with safe_open(folder / "last.safetensors", "pt") as file:
        assert "16 structures of old.xyz" in str(file.metadata())


@pytest.mark.parametrize("step", [0, 3])
def test_a_killed_run_continues_bit_for_bit(folder, whole_run, tmp_path, monkeypatch, step):
    part = options(folder, tmp_path / "part", replay={"files": str(folder / "old.xyz")})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step)
        finetune(part)
    finetune(part, resume=True)
    assert_same_run(whole_run[0], tmp_path / "part")
    assert read_csv(whole_run[0] / "valid_replay.csv") == read_csv(tmp_path / "part" / "valid_replay.csv")


def test_other_replayed_data_are_refused_on_resume(folder, whole_run, tmp_path):
    write(tmp_path / "other.xyz", read(folder / "old.xyz", ":8"), format="extxyz")
    values = options(folder, whole_run[0], replay={"files": str(tmp_path / "other.xyz")})
    with pytest.raises(ValueError, match="the training data are not those of"):
        finetune(values, resume=True)
    finetune(options(folder, tmp_path / "plain", steps=1))
    values = options(folder, tmp_path / "plain", replay={"files": str(folder / "old.xyz")}, steps=2)
    with pytest.raises(ValueError, match="data.replay.files = .*: the run to resume replays no data"):
        finetune(values, resume=True)


def test_data_that_cannot_be_replayed(folder, tmp_path):
    potential = load_potential(folder / "start.safetensors")
    chosen = DataOptions(train=("new.xyz",), replay={"files": "silent.xyz"})
    references = dict.fromkeys(ELEMENTS, 0.0)

    def prepare_with(atoms):
        write(tmp_path / "silent.xyz", atoms, format="extxyz")
        frames = read_frames(tmp_path / "silent.xyz")
        replay_of(frames, chosen, potential.config, references, references, {"batch_size": 2}, 0)

    atoms = read(folder / "old.xyz", ":3")
    for each in atoms:
        each.calc = None
        each.info, each.arrays = {}, {n: each.arrays[n] for n in ("numbers", "positions")}
    with pytest.raises(
        ValueError, match="no structure of data.replay.files = silent.xyz has an energy or forces"
    ):
        prepare_with(atoms)
    atoms[0].numbers = np.full(len(atoms[0]), 80)
    with pytest.raises(ValueError, match="Hg"):
        prepare_with(atoms)
