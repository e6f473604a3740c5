"""Data that stay on the disk: index, order, processes, and the same numbers as in memory."""

import multiprocessing
import pickle
import zlib
from itertools import islice
from pathlib import Path

import ase.io
import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.data import (
    EpochBatches,
    FrameDataset,
    conversion,
    lmdb_index,
    open_streamed,
    read_frames,
    streaming,
)
from dpa4.data import dataset as dataset_file
from dpa4.data.checking import DISAGREEING, DUPLICATE, ENERGY, FORCE, SHORT_DISTANCE, check
from dpa4.data.conversion import part_by, write_lmdb
from dpa4.data.dataset import Budget, pack
from dpa4.data.labels import LabelKeys
from dpa4.data.splitting import split
from dpa4.data.streaming import StreamedDataset, StreamedFrames
from dpa4.training.options import RunConfig
from dpa4.training.run import train
from training_runs import argon, options

pytest.importorskip("ase_db_backends")

CUTOFF = 4.0


def written(folder: Path, images: list[Atoms], name: str = "data") -> Path:
    ase.io.write(folder / f"{name}.xyz", images, format="extxyz")
    write_lmdb([folder / f"{name}.xyz"], [folder / f"{name}.aselmdb"])
    return folder / f"{name}.aselmdb"


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    images = argon(40)
    for k, atoms in enumerate(images):
        atoms.info |= {"charge": k % 3 - 1, "spin": 1 + k % 2}
    free = Atoms("Ne")
    free.info |= {"energy": -1.0, "config_type": "IsolatedAtom"}
    return written(tmp_path_factory.mktemp("database"), [*images, free])


def tensors(batch) -> list[torch.Tensor]:
    return [*batch.graph, *batch[1:]]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


# Frames and index


def test_frames_are_those_of_the_source_to_the_last_bit(database):
    streamed, read = open_streamed([database]), read_frames(database.with_suffix(".xyz"))
    assert len(streamed) == len(read) == 41
    for one, other in zip(streamed, read, strict=True):
        for name in ("atomic_numbers", "positions", "cell", "pbc", "forces", "virial"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None and b is None) or np.array_equal(a, b), name
        assert one.energy == other.energy and one.group == other.group
        assert {k: int(v) for k, v in one.charge_spin.items()} == {
            k: int(v) for k, v in other.charge_spin.items()
        }


def test_the_index_knows_what_the_frames_say(database):
    frames = open_streamed([database])
    read = list(frames)
    assert frames.elements() == [10, 18]
    assert frames.column("atoms")[:].tolist() == [len(f) for f in read]
    assert frames.sizes() == (1, np.mean([len(f) for f in read]), max(map(len, read)))
    assert frames.label_counts() == {"energy": 41, "forces": 40, "virial": 20}
    assert frames.free_atoms.tolist() == [40]
    assert frames.charges_and_spins().total() == 41 and frames.charges_and_spins()[None, None] == 1
    assert frames.kind_counts() == {"energy": 41, "forces": 40, "virial": 20, 18: 40, 10: 1}
    assert frames.kinds(40) == {10, "energy"}
    assert frames.edges(CUTOFF)[:].tolist() == FrameDataset(read, CUTOFF).num_edges.tolist()


def test_parts_of_several_files(database, tmp_path):
    other = written(tmp_path, argon(7, seed=1))
    frames = open_streamed([database, other])
    read = [*open_streamed([database]), *open_streamed([other])]
    assert len(frames) == 48
    part = frames.without(np.array([0, 3, 40, 41]))
    kept = [k for k in range(48) if k not in (0, 3, 40, 41)]
    assert [f.origin for f in part] == [read[k].origin for k in kept]
    assert part.column("atoms")[:].tolist() == [len(read[k]) for k in kept]
    again = part.without(np.array([0, 43]))
    assert [f.origin for f in again] == [read[k].origin for k in kept[1:-1]]
    chosen = part.take(np.array([5, 2]))
    assert [f.origin for f in chosen] == [read[kept[5]].origin, read[kept[2]].origin]
    assert part.indices_of(part.positions(np.arange(44))).tolist() == list(range(44))
    assert part[-1].origin == read[-1].origin
    with pytest.raises(IndexError):
        part[44]


def test_an_index_is_built_once_and_again_when_the_file_changes(database, tmp_path, monkeypatch):
    copy = tmp_path / "copy.aselmdb"
    copy.write_bytes(database.read_bytes())
    assert len(open_streamed([copy])) == 41
    with monkeypatch.context() as patch:
        patch.setattr(lmdb_index, "_build", None)  # a call would be an error
        assert len(open_streamed([copy])) == 41
    written(tmp_path, argon(5), "other")
    (tmp_path / "other.aselmdb").replace(copy)
    assert len(open_streamed([copy])) == 5


def test_an_interrupted_build_continues(database, tmp_path, monkeypatch):
    copy = tmp_path / "copy.aselmdb"
    copy.write_bytes(database.read_bytes())
    monkeypatch.setattr(lmdb_index, "CHUNK", 8)
    describe, calls = lmdb_index._describe, []

    def interrupted(rows, jobs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(jobs))
        return describe(rows, jobs)

    monkeypatch.setattr(lmdb_index, "_describe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_streamed([copy])
    seen = []
    monkeypatch.setattr(
        lmdb_index, "_describe", lambda rows, jobs: (seen.append(len(jobs)), describe(rows, jobs))[1]
    )
    frames = open_streamed([copy])
    assert calls == [8, 8, 8] and seen == [8, 8, 1]
    assert frames.label_counts() == open_streamed([database]).label_counts()


@pytest.mark.parametrize("name", ["flags.npy", "offset.npy", "unusable.npy", "index.json", "places.json"])
@pytest.mark.parametrize("size", [0, 60])
def test_a_damaged_index_is_built_anew(database, tmp_path, name, size):
    copy = tmp_path / "copy.aselmdb"
    copy.write_bytes(database.read_bytes())
    folder = open_streamed([copy]).indexes[0].folder
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    frames = open_streamed([copy])
    assert frames.label_counts() == open_streamed([database]).label_counts()
    assert len(list(frames)) == 41


def test_processes_build_the_same_index(database, tmp_path, monkeypatch):
    copy = tmp_path / "copy.aselmdb"
    copy.write_bytes(database.read_bytes())
    monkeypatch.setattr(lmdb_index, "FEW_ROWS", 0)
    monkeypatch.setattr(lmdb_index, "CHUNK", 8)
    frames, expected = open_streamed([copy], workers=2), open_streamed([database])
    for name in ("atoms", "low", "high", "flags", "charge", "spin"):
        assert np.array_equal(frames.column(name)[:], expected.column(name)[:]), name


def test_a_folder_that_cannot_be_written_gets_its_index_elsewhere(database, tmp_path, monkeypatch):
    copy = tmp_path / "copy.aselmdb"
    copy.write_bytes(database.read_bytes())
    monkeypatch.setattr(lmdb_index.code_cache, "folder", lambda: tmp_path / "cache")
    (tmp_path / ".copy.aselmdb.index").write_text("")  # no folder can have this name now
    assert len(open_streamed([copy])) == 41
    assert list((tmp_path / "cache" / "indexes").iterdir())


def test_unusable_rows_are_left_out_and_reported(database, tmp_path):
    copy = tmp_path / "copy.aselmdb"
    copy.write_bytes(database.read_bytes())
    with lmdb.open(str(copy), subdir=False, map_size=2**24) as file, file.begin(write=True) as transaction:
        transaction.put(b"3", zlib.compress(b"{}"))
    frames = open_streamed([copy])
    assert len(frames) == 40
    assert f"{copy}, row 3" not in [f.origin for f in frames]
    assert streaming.unusable_text(frames).startswith(f"left out: 1 of 41 rows; the first: {copy}, row 3")


def test_a_named_label_in_no_structure_is_refused(database):
    with pytest.raises(ValueError, match=r"data.keys.energy = 'dft' is in no structure of .*data.aselmdb"):
        open_streamed([database], LabelKeys(energy="dft"))


def test_a_sample_has_every_element_and_free_atoms(database):
    frames = open_streamed([database])
    sample = frames.sample(4)
    assert {z for f in sample for z in f.atomic_numbers.tolist()} == {10, 18}
    assert len(frames.sample()) == 41


def test_the_split_is_that_of_frames_in_memory(database):
    frames = open_streamed([database])
    for labels in ((), ("energy", "virial")):
        ours, theirs = split(frames, 0.2, 3, labels), split(list(frames), 0.2, 3, labels)
        for a, b in zip(ours, theirs, strict=True):
            assert [f.origin for f in a] == [f.origin for f in b]


# Batches


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), max_size=30),
    st.integers(1, 20),
    st.integers(1, 40),
)
@settings(deadline=None, max_examples=60)
def test_packing_is_that_of_the_definition(sizes, max_atoms, max_edges):
    table = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    expected, filled = [], np.zeros(2, dtype=np.int64)
    for index, size in enumerate(table):
        filled = filled + size
        if not expected or (filled > [max_atoms, max_edges]).any():
            expected.append([])
            filled = size.copy()
        expected[-1].append(index)
    budgets = [Budget("atoms", table[:, 0], max_atoms), Budget("edges", table[:, 1], max_edges)]
    assert pack(range(len(table)), budgets) == expected


@pytest.mark.parametrize("budget", [{"batch_size": 3}, {"max_atoms": 20}, {"max_edges": 150}])
def test_batches_are_those_of_frames_in_memory(database, budget):
    frames = open_streamed([database])
    ours = EpochBatches(StreamedDataset(frames, CUTOFF), **budget, seed=5)
    theirs = EpochBatches(FrameDataset(list(frames), CUTOFF), **budget, seed=5)
    for epoch in (0, 1):
        assert ours.indices(epoch) == theirs.indices(epoch)
        assert ours.num_batches(epoch) == len(theirs.indices(epoch))
    assert all(map(equal, ours.batches(1), theirs.batches(1)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_prepare_the_same_batches(database, method, monkeypatch):
    monkeypatch.setattr(dataset_file.Loader, "context", method)
    dataset = StreamedDataset(open_streamed([database]), CUTOFF)
    state = torch.get_rng_state()
    by_thread = EpochBatches(dataset, max_atoms=20, seed=5)
    by_processes = EpochBatches(dataset, max_atoms=20, seed=5, workers=2)
    expected = list(by_thread.batches(0, start=2))
    found = list(by_processes.batches(0, start=2))
    assert len(found) == len(expected) and all(map(equal, found, expected))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(next(by_processes.batches(0)), next(by_thread.batches(0)))  # ended early
    assert not [p for p in multiprocessing.active_children() if p.is_alive()]


def test_an_error_in_a_process_is_raised_as_it_is(database):
    def rule(frame):
        raise ValueError(f"no charge in {frame.origin}")

    batches = EpochBatches(StreamedDataset(open_streamed([database]), CUTOFF, rule), batch_size=4, workers=1)
    with pytest.raises(ValueError, match=r"^no charge in .*row \d+$"):
        next(batches.batches(0))


def test_windows_divide_an_epoch_and_can_be_resumed(database, monkeypatch):
    monkeypatch.setattr(dataset_file, "WINDOW", 16)
    monkeypatch.setattr(dataset_file, "BLOCK", 4)
    dataset = StreamedDataset(open_streamed([database]), CUTOFF)
    batches = EpochBatches(dataset, max_atoms=20, seed=1)
    plan = batches.indices(0)
    assert sorted(k for batch in plan for k in batch) == list(range(41))
    assert batches.num_batches(0) == len(plan)
    assert plan != batches.indices(1) and plan == batches.indices(0)
    for start in range(len(plan) + 1):
        assert list(batches.plan(0, start)) == list(enumerate(plan))[start:]
    in_order = EpochBatches(dataset, max_atoms=20, shuffle=False)
    assert [k for batch in in_order.indices(0) for k in batch] == list(range(41))
    for window in batches._windows(0):  # whole blocks of neighbours
        found = set(window.tolist())
        assert all(set(range(k // 4 * 4, min(41, k // 4 * 4 + 4))) <= found for k in found)


def test_fill_of_the_budgets(database):
    batches = EpochBatches(StreamedDataset(open_streamed([database]), CUTOFF), max_atoms=20, seed=1)
    sums = [batches.dataset.num_atoms[b].sum() / 20 for b in batches.indices(0)]
    (fill,) = batches.fill()
    assert (fill.what, fill.batches) == ("atoms", len(sums))
    assert fill.mean == pytest.approx(np.mean(sums)) and fill.deviation == pytest.approx(np.std(sums))


def test_a_sent_data_set_maps_the_index_itself(database):
    dataset = StreamedDataset(open_streamed([database]), CUTOFF)
    sent = pickle.dumps(dataset)
    assert len(sent) < 4000  # no column; 41 rows alone have 41 * 44 bytes, so a larger set would show it
    assert equal(pickle.loads(sent).batch([4, 2]), dataset.batch([4, 2]))


# Training


def run(
    folder: Path, data: Path, name: str, console: Console | None = None, resume=False, **training
) -> Path:
    config = options(data, folder / name, **training)
    return train(RunConfig.model_validate(config), resume=resume, console=console or Console(quiet=True))


def test_training_from_the_disk_is_bitwise_that_from_memory(tmp_path):
    data = written(tmp_path, argon(24))
    budget = {"batch_size": None, "max_edges": 300, "steps": 5}
    run(tmp_path, data.with_suffix(".xyz"), "memory", **budget)
    run(tmp_path, data, "disk", **budget)
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("memory", "disk")]
    for name, weight in states[0]["potential"].items():
        assert torch.equal(weight, states[1]["potential"][name]), name
    rows = [(tmp_path / name / "valid.csv").read_text() for name in ("memory", "disk")]
    assert rows[0] == rows[1]


def test_a_run_from_the_disk_resumes_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_file, "WINDOW", 8)
    monkeypatch.setattr(dataset_file, "BLOCK", 2)
    data = written(tmp_path, argon(24))
    run(tmp_path, data, "whole", steps=7)
    config = options(data, tmp_path / "parts", steps=7)
    from dpa4.training.trainer import Trainer

    train_on = Trainer._train_on

    def killed(self, batch):
        if self.step == 5:
            raise KeyboardInterrupt
        train_on(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on", killed)
        with pytest.raises(KeyboardInterrupt):
            train(
                RunConfig.model_validate(
                    config | {"training": config["training"] | {"checkpoint_interval": 4}}
                )
            )
    train(RunConfig.model_validate(config), resume=True, console=Console(quiet=True))
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")]
    for name, weight in states[0]["potential"].items():
        assert torch.equal(weight, states[1]["potential"][name]), name


# Conversion, split, check


def test_split_keeps_formulas_and_entries_together(tmp_path):
    images = []
    for k in range(60):
        atoms = Atoms(f"H{k % 6 + 1}", positions=np.arange(k % 6 + 1)[:, None] * [1.0, 0, 0])
        atoms.info |= {"REF_energy": -float(k), "molecule": f"m{k % 7}"}
        images.append(atoms)
    ase.io.write(tmp_path / "a.xyz", images, format="extxyz")
    for by in ("formula", "molecule", "structure"):
        outputs = [tmp_path / f"{by}-{part}.aselmdb" for part in (0, 1)]
        done = write_lmdb([tmp_path / "a.xyz"], outputs, part_by(by, 0.4, 1))
        assert sum(done.files.values()) == 60
        parts = [list(open_streamed([o])) for o in outputs]
        numbers = [{-int(f.energy) for f in part} for part in parts]
        assert not numbers[0] & numbers[1]
        if by != "structure":
            period = 6 if by == "formula" else 7
            assert not {n % period for n in numbers[0]} & {n % period for n in numbers[1]}
    with pytest.raises(ValueError, match=r"frame 0 has no entry 'key'; it has .*molecule"):
        write_lmdb([tmp_path / "a.xyz"], [tmp_path / "b.aselmdb"], part_by("key", 0.4, 1))
    assert not (tmp_path / "b.aselmdb").exists() and not list(tmp_path.glob(".b*"))


def test_check_finds_what_is_planted(tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for k in range(40):
        atoms = Atoms(f"H{k % 3 + 2}O", positions=rng.normal(size=(k % 3 + 3, 3)) * 0.1)
        atoms.positions[:, 0] += 2.0 * np.arange(len(atoms))
        atoms.info["REF_energy"] = -3.0 * (k % 3 + 2) - 400.0 + 0.1 * rng.normal()
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        images.append(atoms)
    images.append(images[4].copy())  # 40: repeated
    images.append(images[5].copy())  # 5, 41: repeated with another energy
    images[41].info["REF_energy"] += 1.0
    images[7].info["REF_energy"] -= 900.0
    images[9].arrays["REF_forces"][0, 0] = 2000.0
    images[11].positions[1] = images[11].positions[0] + 0.1
    ase.io.write(tmp_path / "a.xyz", images, format="extxyz")
    with pytest.warns(UserWarning, match="225 eV/atom away"):
        found = check([tmp_path / "a.xyz"])
    assert found.reasons == {
        5: DISAGREEING, 7: ENERGY, 9: FORCE, 11: SHORT_DISTANCE, 40: DUPLICATE, 41: DISAGREEING,
    }  # fmt: skip
    assert "frame 7: -2" in found.examples[ENERGY] and "eV/atom" in found.examples[ENERGY]


def test_commands(tmp_path):
    ase.io.write(tmp_path / "a.xyz", argon(30), format="extxyz")
    runner = CliRunner()

    def output(*words: str) -> str:
        result = runner.invoke(app, ["data", *words])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    data = str(tmp_path / "all.aselmdb")
    assert "all.aselmdb: 30 structures" in output("convert", str(tmp_path / "a.xyz"), "-o", data)
    refused = runner.invoke(app, ["data", "convert", str(tmp_path / "a.xyz"), "-o", data])
    assert refused.exit_code == 1 and "already exists; replace it with --overwrite" in refused.output.replace(
        "\n", " "
    )
    assert "30 structures" in output("convert", str(tmp_path / "a.xyz"), "-o", data, "--overwrite")
    assert "energy 30/30" in output("info", data)
    assert "train.aselmdb" in output("split", data, "-o", str(tmp_path / "parts"), "--fraction", "0.3")
    parts = [str(tmp_path / "parts" / f"{name}.aselmdb") for name in ("train", "validation")]
    merged = str(tmp_path / "merged.aselmdb")
    assert "merged.aselmdb: 30 structures" in output("convert", *parts, "-o", merged)
    clean = str(tmp_path / "clean.aselmdb")
    doubled = output("check", data, merged, "-o", clean)
    assert "duplicate" in doubled and "30 of 60 structures would be left out" in doubled
    assert len(open_streamed([Path(clean)])) == 30


@pytest.mark.parametrize("count", [3, 6, 7])
def test_structures_are_written_in_several_transactions(tmp_path, monkeypatch, count):
    monkeypatch.setattr(conversion, "TRANSACTION", 3)
    images = argon(count)
    frames = open_streamed([written(tmp_path, images)])
    assert [len(f) for f in frames] == list(map(len, images))


def test_other_programs_read_what_is_written(database):
    from ase.db import connect

    with connect(str(database), type="aselmdb", readonly=True, use_lock_file=False) as rows:
        found = [row.toatoms() for row in islice(rows.select(), 3)]
    for atoms, expected in zip(found, argon(3), strict=True):
        assert np.array_equal(atoms.positions, expected.positions) or np.allclose(
            atoms.positions, expected.positions
        )
        # extended XYZ has eight decimals
        assert np.allclose(atoms.get_forces(), expected.get_forces(), atol=1e-7)


def test_a_streamed_sequence_is_a_sequence(database):
    frames = open_streamed([database])
    assert isinstance(frames[2:5], StreamedFrames) and len(frames[2:5]) == 3
