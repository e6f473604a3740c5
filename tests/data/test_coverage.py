"""Coverage of the training data: found during training, stored in checkpoints, checked by the calculator."""

import io
import json
import time
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from dpa4.data import (
    Coverage,
    FrameDataset,
    coverage_of,
    frame_from_atoms,
    read_frames,
    shortest_distances,
)
from dpa4.interfaces.coverage_monitor import MARGIN, CoverageMonitor
from dpa4.potential import convert, load_potential, model_card, save_potential
from dpa4.simulation import DPA4Calculator
from dpa4.training import load_run_config, train
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
    found = coverage_of(dataset, shortest_distances(dataset))
    assert (found.cutoff, found.elements) == (4.0, ("H", "C", "O"))
    assert found.shortest == pytest.approx({("H", "H"): 0.8, ("H", "C"): 1.1, ("C", "C"): 2.6}, abs=1e-12)
    assert found.text == "H-H 0.800, H-C 1.100, C-C 2.600 Å"


def test_long_lists_are_cut():
    elements = ("H", "He", "Li", "Be", "B")
    shortest = {(a, b): 1.0 + i + j for i, a in enumerate(elements) for j, b in enumerate(elements) if i <= j}
    assert Coverage(9.0, elements, shortest).text.endswith("Å and 3 more pairs")
    assert Coverage(9.0, elements, {}).text == "no pair within 9 Å"
    assert Coverage(9.0, elements).text == "unknown, because not every structure was used"


def test_of_large_data_only_a_part_is_searched(monkeypatch):
    """A part of the data does not tell which atoms are closer than in the data, so the distances count as unknown."""
    dataset = FrameDataset([frame_from_atoms(pair("HC", 1 + k / 10)) for k in range(9, -1, -1)], 4.0)
    assert shortest_distances(dataset) == pytest.approx({("H", "C"): 1.0})
    found = shortest_distances(dataset, limit=4)
    assert found == pytest.approx({("H", "C"): 1.0}) and len(dataset._graphs) == 10
    again = FrameDataset(dataset.frames[:-1], 4.0)
    assert shortest_distances(again, limit=3) == pytest.approx({("H", "C"): 1.1}) and len(again._graphs) == 3
    assert coverage_of(dataset, found) == Coverage(4.0, ("H", "C"), found)
    monkeypatch.setattr("dpa4.data.coverage.MAX_STRUCTURES", 5)
    assert coverage_of(dataset, found) == Coverage(4.0, ("H", "C"))


# --- coverage of a run


def labelled(seed: int) -> Atoms:
    atoms = molecule(seed, 5)
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 0.1 * seed, -atoms.positions
    return atoms


@pytest.fixture
def folder(tmp_path, no_figures):
    """Data of six batches per epoch, and a validation file."""
    write(tmp_path / "train.xyz", [labelled(seed) for seed in range(12)])
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


def test_all_files_of_a_run_have_it(folder):
    output = run(folder, steps=1)
    frames = FrameDataset(read_frames([folder / "train.xyz"]), 4.0)
    found = coverage_of(frames, shortest_distances(frames))
    for name in ("best", "last"):
        stored = load_potential(folder / "run" / f"{name}.safetensors")
        assert stored.coverage == found
        assert found.shortest is not None and stored.config.bridging.outer.keys() >= {"H-C", "C-O"}
    assert found.text in " ".join(output.split())
    assert (
        model_card(folder / "run/best.safetensors").sections["Training data"]["closest atoms"] == found.text
    )


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
