"""Coverage of the training data: found during training, stored in checkpoints, checked by the calculator."""

import io
import json
import os
import signal
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols
from ase.io import write
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpa4.data import (
    Coverage,
    CoverageCollector,
    EpochBatches,
    FrameDataset,
    coverage_of,
    frame_from_atoms,
    read_frames,
)
from dpa4.graph import build_graph
from dpa4.interfaces.coverage_monitor import MARGIN, CoverageMonitor
from dpa4.potential import convert, load_potential, model_card, save_potential
from dpa4.simulation import DPA4Calculator
from dpa4.training import coverage as training_coverage
from dpa4.training import load_run_config, train
from dpa4.training.coverage import RunCoverage
from dpa4.training.prepare import prepare
from dpa4.training.state import load_state, save_state
from dpa4.training.trainer import Trainer
from helpers import crystal, graph_of, molecule, random_potential

SEEN = Coverage(4.0, ("H", "C"), {("H", "H"): 0.74, ("H", "C"): 1.05})


def covered(coverage: Coverage | None = SEEN, **options):
    potential = random_potential(**options)
    potential.coverage = coverage
    return potential


def energy(atoms: Atoms, calculator: DPA4Calculator) -> list[str]:
    """Run a calculation and return its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        atoms = atoms.copy()
        atoms.calc = calculator
        assert np.isfinite(atoms.get_potential_energy())
    assert all(issubclass(w.category, RuntimeWarning) for w in caught)
    return [str(w.message) for w in caught]


def calculator(*potentials) -> DPA4Calculator:
    return DPA4Calculator(list(potentials), device="cpu", dtype="float64")


def pair(elements: str, distance: float) -> Atoms:
    return Atoms(elements, [(1, 2, 3), (1, 2, 3 + distance)])


def test_shortest_distances_of_structures_worked_by_hand():
    frames = [
        pair("HC", 1.3),
        pair("CH", 1.1),
        pair("HH", 0.8),
        pair("CO", 4.5),  # beyond the cutoff
        Atoms("C", cell=[2.6, 3.0, 3.0], pbc=(True, False, False)),  # its own image
    ]
    dataset = FrameDataset([frame_from_atoms(atoms) for atoms in frames], cutoff=4.0)
    found = coverage_of(dataset)
    assert (found.cutoff, found.elements) == (4.0, ("H", "C", "O"))
    assert found.shortest == pytest.approx({("H", "H"): 0.8, ("H", "C"): 1.1, ("C", "C"): 2.6}, abs=1e-12)
    assert found.text == "H-H 0.800, H-C 1.100, C-C 2.600 Å"


def test_long_lists_are_cut():
    elements = ("H", "He", "Li", "Be", "B")
    shortest = {(a, b): 1.0 + i + j for i, a in enumerate(elements) for j, b in enumerate(elements) if i <= j}
    assert Coverage(9.0, elements, shortest).text.endswith("Å and 3 more pairs")
    assert Coverage(9.0, elements, {}).text == "no pair within 9 Å"
    assert Coverage(9.0, elements).text == "unknown, because not every structure was used"


def test_graphs_may_come_in_any_order_and_twice():
    frames = [frame_from_atoms(molecule(seed)) for seed in range(4)]
    dataset, found = FrameDataset(frames, 4.0), CoverageCollector(frames, 4.0)
    for index in (2, 0, 2, 3):
        assert found.coverage == Coverage(4.0, ("H", "C", "O"))
        found.add(index, dataset.graph(index))
    assert found.missing.tolist() == [1] and not found.complete
    found.add(1, dataset.graph(1))
    assert found.complete and found.coverage == coverage_of(dataset)


# --- coverage of a run, by its steps and its end


FRAMES = 12


@pytest.fixture
def built(monkeypatch) -> list:
    """Arguments of every call that builds a graph."""
    calls: list = []

    def counted(*args):
        calls.append(args)
        return build_graph(*args)

    monkeypatch.setattr("dpa4.data.dataset.build_graph", counted)
    return calls


class Run:
    """The parts of a training run that coverage needs, without steps."""

    def __init__(self, folder, cache_bytes: int = 2**20, coincide: int | None = None):
        frames = [frame_from_atoms(molecule(seed, 5)) for seed in range(FRAMES)]
        if coincide is not None:
            frames[coincide].positions[1] = frames[coincide].positions[0]
        collector = CoverageCollector(frames, 4.0)
        self.dataset = FrameDataset(frames, 4.0, cache_bytes=cache_bytes, observe=collector.add)
        self.potential = random_potential(elements=("H", "C", "N", "O"), n_blocks=1, lmax=1)
        self.folder = folder
        self.console = Console(file=io.StringIO(), record=True, width=300)
        train = EpochBatches(self.dataset, batch_size=2)
        self.preparation = SimpleNamespace(coverage=collector, train=train, potential=self.potential)
        self.coverage = RunCoverage(self.preparation, folder, self.console)

    def save(self) -> None:
        for name in ("best", "last"):
            save_potential(self.potential, self.folder / f"{name}.safetensors", {"step": "3"})

    def use(self, batches: int) -> None:
        """Run the first batches of an epoch, with an update after each."""
        for indices in self.preparation.train.indices(0)[:batches]:
            self.dataset.batch(indices)
            self.coverage.update()

    @property
    def text(self) -> str:
        return self.console.export_text(clear=False)

    @property
    def whole(self) -> Coverage:
        return coverage_of(FrameDataset(self.dataset.frames, 4.0))


ELEMENTS_ONLY = Coverage(4.0, ("H", "C", "O"))


def files(folder) -> list[Coverage | None]:
    return [load_potential(folder / f"{which}.safetensors").coverage for which in ("best", "last")]


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_an_epoch_finds_it_and_files_written_before_are_completed(tmp_path, built, cache_bytes):
    """Files keep their weights and description. No graph is built only for the distances."""
    run = Run(tmp_path, cache_bytes)
    run.save()
    best = tmp_path / "best.safetensors"
    before, weights = model_card(best).sections, load_file(best)
    run.use(5)
    assert run.potential.coverage == ELEMENTS_ONLY and files(tmp_path) == [ELEMENTS_ONLY] * 2
    assert run.text == ""
    run.use(6)
    run.coverage.update()
    run.coverage.finish(stopped=False)
    # The first five batches were used twice; without memory for graphs they were built twice.
    assert len(built) == (FRAMES if cache_bytes else FRAMES + 10)
    assert run.potential.coverage == run.whole and files(tmp_path) == [run.whole] * 2
    assert run.text.count(f"closest atoms of the training data: {run.whole.text}") == 1
    after = model_card(best).sections
    assert before.pop("Training data") != after.pop("Training data")
    assert before["Provenance"].pop("digest") != after["Provenance"].pop("digest")
    assert before == after and all((weights[key] == value).all() for key, value in load_file(best).items())


@pytest.mark.parametrize("stopped", [False, True])
def test_small_data_are_completed_at_the_end(tmp_path, stopped):
    run = Run(tmp_path)
    run.use(1)
    run.save()
    run.coverage.finish(stopped)
    assert files(tmp_path) == [run.whole] * 2
    assert run.text.count("closest atoms of the training data: " + run.whole.text) == 1


def test_large_data_that_were_not_used_once(tmp_path, monkeypatch):
    """Elements are known. Distances from a part of the data would cause unfounded warnings."""
    run = Run(tmp_path)
    run.use(1)
    run.save()
    monkeypatch.setattr(training_coverage, "MISSING_WHEN_STOPPED", 9)
    run.coverage.finish(stopped=True)
    assert run.text == ""  # the resumed run will find them
    monkeypatch.setattr(training_coverage, "MISSING", 9)
    run.coverage.finish(stopped=False)
    assert "not known, since training did not use 10 of 12 structures" in run.text
    assert files(tmp_path) == [ELEMENTS_ONLY] * 2
    best = tmp_path / "best.safetensors"
    assert "unknown, because not every structure was used" in model_card(best).text
    calc = DPA4Calculator(best, device="cpu")
    assert energy(pair("HC", 0.3), calc) == []
    assert energy(pair("HN", 1.0), calc)[0].startswith("N: supported by the model")


def test_a_structure_that_is_no_good_and_was_not_used(tmp_path):
    run = Run(tmp_path, coincide=7)
    run.save()
    run.coverage.finish(stopped=False)
    assert "not known (structure 7: atoms 0 and 1 coincide" in run.text
    assert [found.shortest for found in files(tmp_path)] == [None, None]


# --- coverage of a run, from its data to its files


def labelled(seed: int) -> Atoms:
    atoms = molecule(seed, 5)
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 0.1 * seed, -atoms.positions
    return atoms


@pytest.fixture
def folder(tmp_path, no_figures):
    """Data of six batches per epoch, and a validation file."""
    write(tmp_path / "train.xyz", [labelled(seed) for seed in range(FRAMES)])
    write(tmp_path / "valid.xyz", [labelled(90), labelled(91)])
    return tmp_path


def run_config(folder, **training):
    options = {"steps": 6, "batch_size": 2, "validation_interval": 2} | training
    (folder / "run.yaml").write_text(
        f"output: {folder / 'run'}\ndevice: cpu\n"
        "model: {channels: 8, lmax: 1, n_blocks: 1, mixing_layers: 1, cutoff: 4}\n"
        f"data: {{train: {folder / 'train.xyz'}, validation: {folder / 'valid.xyz'}}}\n"
        f"training: {json.dumps(options)}\n"
    )
    return load_run_config(folder / "run.yaml")


def run(folder, resume=False, **training) -> str:
    """Train and return the printed text."""
    console = Console(file=io.StringIO(), record=True, width=300)
    train(run_config(folder, **training), resume=resume, console=console)
    return console.export_text()


def of_the_data(folder) -> Coverage:
    return coverage_of(FrameDataset(read_frames(folder / "train.xyz"), cutoff=4.0))


def prepared(folder, **training):
    return prepare(run_config(folder, **training), Console(quiet=True))


def test_nothing_is_built_before_the_first_batch(folder, built):
    preparation = prepared(folder)
    potential = Trainer(run_config(folder), preparation, Console(quiet=True)).potential
    assert built == [] and not preparation.coverage.complete
    assert potential.coverage == ELEMENTS_ONLY
    preparation = prepared(folder, batch_size=None, max_edges=60)  # this budget needs every graph
    assert preparation.coverage.coverage == of_the_data(folder)


class Killed(BaseException):
    """Stand-in for SIGKILL, which the trainer does not handle."""


def test_files_and_card_have_it_before_the_second_epoch_is_over(folder, monkeypatch, built):
    original = Trainer._train_on

    def deadly(self, batch):
        if self.step == 7:
            raise Killed
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_on", deadly)
    with pytest.raises(Killed):
        run(folder, steps=12)
    assert len(built) == FRAMES + 2  # the data once, and the validation data
    expected: dict = {}
    for atoms in read_frames(folder / "train.xyz"):  # validation data do not count
        distances = np.linalg.norm(atoms.positions[:, None] - atoms.positions, axis=-1)
        symbols = [chemical_symbols[z] for z in atoms.atomic_numbers]
        for i in range(5):
            for j in range(i):
                name = tuple(sorted((symbols[i], symbols[j]), key="HCO".index))
                if distances[i, j] <= 4:
                    expected[name] = min(expected.get(name, np.inf), distances[i, j])
    for found in files(folder / "run"):
        assert found.elements == ("H", "C", "O")
        assert found.shortest == pytest.approx(expected, abs=1e-12)
    text = model_card(folder / "run" / "best.safetensors").text
    assert found.text in text and "elements seen" in text


def test_an_interrupted_first_epoch_is_completed(folder, monkeypatch):
    """The next epoch completes it, even where the data are too large to be searched at the end."""
    monkeypatch.setattr(training_coverage, "MISSING", 0)
    monkeypatch.setattr(training_coverage, "MISSING_WHEN_STOPPED", 0)
    original = Trainer._train_on

    def interrupted(self, batch):
        original(self, batch)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)  # like Ctrl-C

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on", interrupted)
        text = run(folder)
    assert "stopped after step 1" in text and "closest" not in text
    assert load_potential(folder / "run" / "last.safetensors").coverage == ELEMENTS_ONLY
    state = load_state(folder / "run" / "last.pt")
    assert "coverage" not in state
    del state["format"]
    save_state(state | {"coverage": {"data": 1}}, folder / "run" / "last.pt")  # like in earlier versions
    text = run(folder, resume=True, steps=12)
    assert text.count("closest atoms of the training data: " + of_the_data(folder).text) == 1
    assert text.index("step       2") < text.index("closest atoms")  # not at the start
    assert files(folder / "run") == [of_the_data(folder)] * 2


def test_a_structure_that_is_no_good_costs_no_progress(folder):
    frames = [labelled(seed) for seed in range(FRAMES)]
    position, _ = prepared(folder).train.indices(0)[4]
    frames[position].positions[1] = frames[position].positions[0]
    write(folder / "train.xyz", frames)
    with pytest.raises(
        ValueError, match=rf"frame {position}: atoms 0 and 1 coincide .*state before it is saved"
    ):
        run(folder)
    assert load_state(folder / "run" / "last.pt")["step"] == 4
    write(folder / "train.xyz", [labelled(seed) for seed in range(FRAMES)])
    run(folder, resume=True)
    assert load_state(folder / "run" / "last.pt")["step"] == 6
    assert files(folder / "run")[1] == of_the_data(folder)


# --- coverage in files


def test_checkpoints_keep_it(tmp_path):
    save_potential(covered(Coverage(4.0, ("H", "C"))), tmp_path / "partial.safetensors")
    assert load_potential(tmp_path / "partial.safetensors").coverage == Coverage(4.0, ("H", "C"))
    save_potential(covered(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        assert load_potential(tmp_path / name).coverage == SEEN
    convert(tmp_path / "a.safetensors", tmp_path / "c.pt")  # a format that cannot store it
    assert load_potential(tmp_path / "c.pt").coverage is None
    save_potential(covered(None), tmp_path / "old.safetensors")
    assert load_potential(tmp_path / "old.safetensors").coverage is None
    assert "Training data" not in model_card(tmp_path / "old.safetensors").text


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"cutoff": 4, "elements": ["Q"], "shortest": {}}', '{"cutoff": 4, "elements": ["H"], '
    '"shortest": {"H": 1}}'],
)  # fmt: skip
def test_a_damaged_entry_is_refused(tmp_path, text):
    path = tmp_path / "m.safetensors"
    save_potential(covered(), path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    assert json.loads(metadata["coverage"])["shortest"] == {"H-H": 0.74, "H-C": 1.05}
    save_file(tensors, path, metadata | {"coverage": text})
    with pytest.raises(ValueError, match="entry coverage is not a description of training data"):
        load_potential(path)


def test_closer_atoms_are_reported_once():
    calc = calculator(covered())
    assert energy(pair("HC", 1.05), calc) == []
    assert energy(pair("HC", 1.05 - MARGIN + 0.001), calc) == []
    (message,) = energy(pair("CH", 1.05 - MARGIN - 0.001), calc)
    assert message.startswith(
        "atoms 0 and 1 are 0.999 Angstrom apart, closer than any H-C pair of the training data"
    )
    assert "(1.050 Angstrom)" in message
    assert energy(pair("CH", 0.5), calc) == []


def test_each_pair_of_elements_has_its_own_distance():
    assert energy(pair("HH", 0.8), calculator(covered())) == []
    assert "any H-C pair" in energy(pair("HC", 0.8), calculator(covered()))[0]
    (message,) = energy(pair("CC", 2.5), calculator(covered()))
    assert "any C-C pair of the training data (none within the cutoff)" in message


def test_the_worst_pair_is_named_and_images_count():
    atoms = Atoms("HHC", [(0, 0, 0), (0, 0, 0.6), (0, 0.5, 8)])
    assert "atoms 0 and 1 are 0.600" in energy(atoms, calculator(covered()))[0]
    atoms.set_cell([9, 9, 8.3])
    atoms.pbc = True
    assert "atoms 0 and 2 are 0.583" in energy(atoms, calculator(covered()))[0]


def test_elements_outside_the_data_are_reported_once():
    calc = calculator(covered())
    (message,) = energy(pair("HO", 0.3), calc)  # no distance is known for O
    assert message.startswith("O: supported by the model, but not in its training data (only H C)")
    assert energy(pair("CO", 1.2), calc) == []
    assert "0.500 Angstrom apart" in energy(pair("HC", 0.5), calc)[0]  # the other warning is still to come


def test_the_narrowest_model_of_a_committee_decides():
    wide, other = Coverage(4.0, ("H", "C", "O"), {("H", "C"): 0.9}), covered(None)
    assert energy(pair("HC", 0.9), calculator(covered(wide), other)) == []
    (message,) = energy(pair("HC", 0.95), calculator(covered(wide), covered(SEEN), other))
    assert "(1.050 Angstrom)" in message
    assert "only H C)" in energy(pair("HO", 1.0), calculator(covered(SEEN), covered(wide)))[0]


def test_models_that_do_not_know_their_data_are_silent():
    assert energy(pair("HO", 0.2), calculator(covered(None))) == []


def test_a_step_is_hardly_slower():
    atoms = bulk("C", "diamond", a=3.57).repeat(4)  # 128 atoms
    graph = graph_of(atoms)
    potential = covered(Coverage(4.0, ("C",), {("C", "C"): 1.4}))
    monitor = CoverageMonitor([potential.coverage])

    def watch() -> None:
        monitor.look(graph)
        monitor.report()

    def fastest(work) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    # This network is far smaller than any in use; 5 % allows for a busy machine.
    assert fastest(watch) < 0.05 * fastest(lambda: potential(graph))


def test_looking_waits_for_nothing():
    """Tensors on the meta device have no values, so code that needs one fails."""
    monitor, graph = CoverageMonitor([SEEN], "meta"), graph_of(pair("HC", 0.5)).to("meta")
    monitor.look(graph)
    with pytest.raises(RuntimeError, match="meta"):
        monitor.report()


def test_closer_atoms_are_reported_when_the_results_are_there():
    atoms = pair("HC", 0.5)
    atoms.calc = calculator(covered())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="0.500 Angstrom apart"):
            atoms.get_potential_energy()
    assert energy(atoms, atoms.calc) == []


def test_positions_that_are_not_finite_are_refused_first():
    atoms = crystal()
    atoms.positions[2, 0] = np.inf
    atoms.calc = calculator(covered())
    with pytest.raises(ValueError, match="position of atom 2 is not finite"):
        atoms.get_potential_energy()
