"""What training data covered: found, kept in checkpoints, and missed aloud by the calculator."""

import io
import json
import os
import signal
import time
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpa4.data import Coverage, CoverageCollector, FrameDataset, coverage_of, frame_from_atoms, read_frames
from dpa4.data.coverage import MARGIN, CoverageMonitor
from dpa4.graph import build_graph
from dpa4.potential import convert, load_potential, model_card, save_potential
from dpa4.simulation import DPA4Calculator
from dpa4.training import coverage as training_coverage
from dpa4.training import load_run_config, train, trainer
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
    """Warnings of a calculation."""
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


def test_training_writes_it_and_the_card_shows_it(tmp_path):
    frames = []
    for seed in range(6):
        atoms = molecule(seed, 5)
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 0.1 * seed, -atoms.positions
        frames.append(atoms)
    write(tmp_path / "train.xyz", frames[:4])
    write(tmp_path / "valid.xyz", frames[4:])
    (tmp_path / "run.yaml").write_text(
        f"output: {tmp_path / 'run'}\ndevice: cpu\n"
        "model: {channels: 8, lmax: 1, n_blocks: 1, mixing_layers: 1, cutoff: 4}\n"
        f"data: {{train: {tmp_path / 'train.xyz'}, validation: {tmp_path / 'valid.xyz'}}}\n"
        "training: {steps: 2, batch_size: 2}\n"
    )
    best = train(load_run_config(tmp_path / "run.yaml"), console=Console(quiet=True))
    expected: dict = {}
    for atoms in frames[:4]:  # validation data do not count
        distances = atoms.get_all_distances()
        for i in range(5):
            for j in range(i):
                name = tuple(sorted((atoms.symbols[i], atoms.symbols[j]), key="HCO".index))
                if distances[i, j] <= 4:
                    expected[name] = min(expected.get(name, np.inf), distances[i, j])
    found = load_potential(best).coverage
    assert found.elements == ("H", "C", "O")
    assert found.shortest == pytest.approx(expected, abs=1e-7)  # of a file with eight decimals
    text = model_card(best).text
    assert found.text in text and "elements seen" in text


# --- found while training


FRAMES = 12


def labelled(seed: int) -> Atoms:
    atoms = molecule(seed, 5)
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 0.1 * seed, -atoms.positions
    return atoms


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Data of six batches in an epoch, and a validation file with an element more."""
    monkeypatch.setattr(trainer, "plot_learning_curve", lambda folder: None)  # half of the time of a run
    write(tmp_path / "train.xyz", [labelled(seed) for seed in range(FRAMES)])
    other = labelled(90)
    other.symbols[0] = "N"
    write(tmp_path / "valid.xyz", [other, labelled(91)])
    return tmp_path


def run_config(folder, name="run", **training):
    options = {"steps": 6, "batch_size": 2, "validation_interval": 2} | training
    (folder / "run.yaml").write_text(
        f"output: {folder / name}\ndevice: cpu\n"
        "model: {channels: 8, lmax: 1, n_blocks: 1, mixing_layers: 1, cutoff: 4}\n"
        f"data: {{train: {folder / 'train.xyz'}, validation: {folder / 'valid.xyz'}}}\n"
        f"training: {json.dumps(options)}\n"
    )
    return load_run_config(folder / "run.yaml")


def run(folder, name="run", resume=False, **training) -> str:
    """What a run prints."""
    console = Console(file=io.StringIO(), record=True, width=300)
    train(run_config(folder, name, **training), resume=resume, console=console)
    return console.export_text()


def of_the_data(folder) -> Coverage:
    return coverage_of(FrameDataset(read_frames(folder / "train.xyz"), cutoff=4.0))


def files(folder, name="run") -> list[Coverage | None]:
    return [load_potential(folder / name / f"{which}.safetensors").coverage for which in ("best", "last")]


def interrupt_after(monkeypatch, step: int) -> None:
    """Send the signal of Ctrl-C within a step."""
    original = Trainer._train_on

    def interrupted(self, batch):
        original(self, batch)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_on", interrupted)


def count(monkeypatch) -> list:
    """The arguments with which graphs are built from now on."""
    built: list = []

    def counted(*args):
        built.append(args)
        return build_graph(*args)

    monkeypatch.setattr("dpa4.data.dataset.build_graph", counted)
    return built


@pytest.fixture
def nothing_at_the_end(monkeypatch):
    """As if data were large: what the first epoch did not use stays unknown."""
    monkeypatch.setattr(training_coverage, "FEW", 0)


def test_nothing_is_built_before_the_first_batch(folder, monkeypatch):
    built = count(monkeypatch)
    config = run_config(folder)
    preparation = prepare(config, Console(quiet=True))
    potential = Trainer(config, preparation, Console(quiet=True)).potential
    assert built == [] and not preparation.coverage.complete
    assert potential.coverage == Coverage(4.0, ("H", "C", "O"))
    config = run_config(folder, batch_size=None, max_edges=60)  # this needs every graph
    preparation = prepare(config, Console(quiet=True))
    assert preparation.coverage.coverage == of_the_data(folder)


@pytest.mark.usefixtures("nothing_at_the_end")
@pytest.mark.parametrize("cache_bytes", [0, 4 * 1024**3])
def test_one_epoch_finds_what_the_data_have(folder, monkeypatch, cache_bytes):
    monkeypatch.setattr(FrameDataset.__init__, "__defaults__", (None, cache_bytes, None))
    built = count(monkeypatch)
    text = run(folder)
    # the data once, in the first epoch, and the validation data in each of three validations, if not kept
    assert len(built) == FRAMES + (2 if cache_bytes else 6)
    assert files(folder) == [of_the_data(folder)] * 2
    assert text.count(f"closest atoms of the training data: {of_the_data(folder).text}") == 1
    assert text.index("step       2") < text.index("closest atoms")  # not at the start


@pytest.mark.usefixtures("nothing_at_the_end")
@pytest.mark.parametrize("step", [1, 2, 5])
def test_an_interrupted_first_epoch_is_completed(folder, monkeypatch, step):
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        text = run(folder)
    assert f"stopped after step {step}" in text and "not known" not in text
    seen = int(load_state(folder / "run" / "last.pt")["coverage"]["seen"].sum())
    assert seen >= 2 * step
    if step == 1:  # at most three batches are prepared ahead, so this is in the middle
        assert seen < FRAMES and "closest" not in text
        assert load_potential(folder / "run" / "last.safetensors").coverage.shortest is None
    text = run(folder, resume=True)
    assert "closest atoms of the training data: " + of_the_data(folder).text in text
    assert files(folder) == [of_the_data(folder)] * 2
    run(folder, "whole")
    for which in ("best", "last"):
        one, other = (load_file(folder / name / f"{which}.safetensors") for name in ("run", "whole"))
        assert all((one[key] == other[key]).all() for key in one)


class Killed(BaseException):
    """Nothing of the trainer handles it."""


def test_files_have_it_before_the_second_epoch_is_over(folder, monkeypatch):
    original = Trainer._train_on

    def deadly(self, batch):
        if self.step == 7:
            raise Killed
        original(self, batch)

    monkeypatch.setattr(Trainer, "_train_on", deadly)
    with pytest.raises(Killed):
        run(folder, steps=12, validation_interval=6)
    assert files(folder) == [of_the_data(folder)] * 2


@pytest.mark.usefixtures("nothing_at_the_end")
def test_other_data_are_looked_at_anew(folder, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        run(folder)
    frames = [labelled(seed) for seed in range(FRAMES)]
    frames[3].positions *= 1.1  # in a file of the same name and length
    write(folder / "train.xyz", frames)
    text = run(folder, resume=True)
    assert "not known, since training did not come to" in text
    run(folder, resume=True, steps=20)
    assert files(folder) == [of_the_data(folder)] * 2


@pytest.mark.usefixtures("nothing_at_the_end")
def test_a_state_of_an_earlier_version_is_looked_at_anew(folder):
    run(folder)
    state = load_state(folder / "run" / "last.pt")
    del state["coverage"], state["format"]
    save_state(state, folder / "run" / "last.pt")
    text = run(folder, resume=True, steps=12)
    assert text.count("closest atoms of the training data: " + of_the_data(folder).text) == 1


@pytest.mark.usefixtures("nothing_at_the_end")
def test_large_data_that_were_not_used_once(folder):
    """Elements are known, distances of a part would warn without reason."""
    text = run(folder, steps=1)
    assert "not known, since training did not come to" in text and "of 12 structures" in text
    assert files(folder) == [Coverage(4.0, ("H", "C", "O"))] * 2
    best = folder / "run" / "best.safetensors"
    assert "unknown, because not every structure was used" in model_card(best).text
    calc = DPA4Calculator(best, device="cpu")
    assert energy(pair("HC", 0.3), calc) == []
    assert energy(pair("HN", 1.0), calc)[0].startswith(
        "N: supported by the model, but not in its training data"
    )


def test_small_data_are_completed_at_the_end(folder, monkeypatch):
    text = run(folder, steps=1)
    assert text.count("closest atoms of the training data: " + of_the_data(folder).text) == 1
    assert files(folder) == [of_the_data(folder)] * 2
    interrupt_after(monkeypatch, 1)
    run(folder, "stopped")
    assert load_potential(folder / "stopped" / "last.safetensors").coverage == of_the_data(folder)


@pytest.mark.usefixtures("nothing_at_the_end")
def test_a_best_model_of_before_is_completed(folder, monkeypatch):
    """It keeps its weights and its description."""
    best = folder / "run" / "best.safetensors"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        run(folder, validation_interval=1)
    before, weights = model_card(best).sections, load_file(best)
    monkeypatch.setattr(Trainer, "_validate", lambda self: None)  # no model is better
    run(folder, resume=True, validation_interval=1)
    after = model_card(best).sections
    assert load_potential(best).coverage == of_the_data(folder)
    assert before.pop("Training data") != after.pop("Training data")
    assert before == after and all((weights[key] == value).all() for key, value in load_file(best).items())


def test_a_structure_that_is_no_good_costs_no_progress(folder):
    frames = [labelled(seed) for seed in range(FRAMES)]
    position, _ = prepare_order(folder)[4]
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
    assert files(folder)[1] == of_the_data(folder)


def test_a_structure_that_is_no_good_and_was_not_used(folder):
    position, _ = prepare_order(folder)[5]
    frames = [labelled(seed) for seed in range(FRAMES)]
    frames[position].positions[1] = frames[position].positions[0]
    write(folder / "train.xyz", frames)
    text = run(folder, steps=1)
    assert f"not known ({folder / 'train.xyz'}, frame {position}: atoms 0 and 1 coincide" in text
    assert [found.shortest for found in files(folder)] == [None, None]


def prepare_order(folder) -> list[list[int]]:
    """Structures of the batches of the first epoch."""
    return prepare(run_config(folder), Console(quiet=True)).train.indices(0)


def test_graphs_may_come_in_any_order_and_twice():
    frames = [frame_from_atoms(molecule(seed)) for seed in range(4)]
    dataset, found = FrameDataset(frames, 4.0), CoverageCollector(frames, 4.0)
    for index in (2, 0, 2, 3):
        assert found.coverage == Coverage(4.0, ("H", "C", "O"))
        found.add(index, dataset.graph(index))
    assert found.missing.tolist() == [1] and not found.complete
    rest = CoverageCollector(frames, 4.0)
    rest.add(1, dataset.graph(1))
    rest.load_state_dict(found.state_dict())
    assert rest.complete and rest.coverage == coverage_of(dataset)
    for other in (CoverageCollector(frames[::-1], 4.0), CoverageCollector(frames, 4.1)):
        other.load_state_dict(rest.state_dict())
        assert len(other.missing) == 4


# --- in files


def test_checkpoints_keep_it(tmp_path):
    save_potential(covered(Coverage(4.0, ("H", "C"))), tmp_path / "partial.safetensors")
    assert load_potential(tmp_path / "partial.safetensors").coverage == Coverage(4.0, ("H", "C"))
    save_potential(covered(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        assert load_potential(tmp_path / name).coverage == SEEN
    convert(tmp_path / "a.safetensors", tmp_path / "c.pt")  # a format without a place for it
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

    # This network is far smaller than any that is used; 5 % leaves room for a busy machine.
    assert fastest(watch) < 0.05 * fastest(lambda: potential(graph))


def test_looking_waits_for_nothing():
    """Values on the meta device do not exist, so whoever needs one fails."""
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
