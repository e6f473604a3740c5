"""Fine-tuning: the first step is that of the start, the kept model is never worse, every kind of start works."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from deepmd_files import parameter_names
from dpa4.data import Coverage, read_frames, write_structures
from dpa4.graph import collate
from dpa4.model.short_range import pair_bridging
from dpa4.output import read_csv
from dpa4.potential import Potential, model_card
from dpa4.potential.checkpoint import convert, load_potential, save_potential
from dpa4.potential.fingerprint import fingerprint_of
from dpa4.simulation.report import write_report
from dpa4.training import plots
from dpa4.training.committee import train_committee
from dpa4.training.dry_run import dry_run
from dpa4.training.evaluation import evaluate
from dpa4.training.options import FINETUNING, ModelOptions, RunConfig
from dpa4.training.run import train
from dpa4.training.run_data import split
from dpa4.training.run_file import load_run_config
from dpa4.training.start import load_start
from helpers import graph_of, molecule, random_potential
from parity_files import FOLDER, read_parity_file
from training_runs import SILENT, Killed, assert_same_run, kill_at

pytestmark = pytest.mark.usefixtures("no_figures")

ELEMENTS = ("H", "C", "N", "O")
SHIFT = {"H": -3.25, "C": 12.5, "N": 100.0, "O": -7.125}  # eV: another level of theory
FORMULAS = ("HCO", "HHC", "HCCO", "OOH", "HCOO")
SMALL = {"n_blocks": 1, "lmax": 1, "mixing_layers": 1, "elements": ELEMENTS, "symmetry": "O3"}


def save_start(path: Path, **options) -> Potential:
    """Write a start with windows and coverage; return it in float32, as it will be trained."""
    shortest = {("H", "C"): 0.95, ("H", "O"): 0.95, ("C", "N"): 1.2, ("C", "O"): 1.2}
    bridging = {"bridging": pair_bridging(shortest, ELEMENTS, 4.0)}
    start = random_potential(**(SMALL | bridging | options)).float()
    start.coverage = Coverage(4.0, start.elements, shortest)
    save_potential(start, path, {"training data": "500 structures of first.xyz"})
    return start


def labelled(start: Potential, count: int, shift: dict[str, float], scale: float = 1, **info) -> list[Atoms]:
    """Clusters with the energies and forces of a start times a factor, and energies shifted per element."""
    images = []
    for seed in range(count):
        atoms = molecule(seed, 5 + seed % 3, FORMULAS[seed % len(FORMULAS)])
        pair = info.get("charge", 0), info.get("spin", 1)
        prediction = start(graph_of(atoms, start.config.cutoff, pair))
        atoms.info |= info
        atoms.info["REF_energy"] = scale * float(prediction.energy) + sum(shift[e] for e in atoms.symbols)
        atoms.arrays["REF_forces"] = scale * prediction.forces.detach().numpy()
        images.append(atoms)
    return images


def options(start: Path, data: Path, output: Path, model: dict | None = None, **training) -> dict:
    defaults = {"steps": 6, "batch_size": 4, "validation_interval": 2, "log_interval": 2}
    return {
        "model": {"start_from": str(start)} | (model or {}),
        "data": {"train": str(data), "validation_fraction": 0.25},
        "training": defaults | training,
        "output": str(output),
        "device": "cpu",
    }


def finetune(values: dict, resume: bool = False) -> str:
    console = Console(file=io.StringIO(), record=True, width=200)
    train(RunConfig.model_validate(values), resume=resume, console=console)
    return console.export_text()


@pytest.fixture(scope="module")
def start_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_start(path)
    return path


@pytest.fixture(scope="module")
def files(start_file) -> Path:
    """Folder with the start and data: labels of the start with other reference energies, and others."""
    folder = start_file.parent
    start = load_potential(start_file)
    write_structures(folder / "exact.xyz", labelled(start, 16, SHIFT))
    write_structures(folder / "other.xyz", labelled(start, 16, SHIFT, 4.0))
    return folder


@pytest.fixture(scope="module")
def exact_run(files) -> tuple[Path, str]:
    """Run on labels of the start, which nothing can improve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpa4.training.trainer.plot_learning_curve", lambda folder: None)
        text = finetune(options(files / "start.safetensors", files / "exact.xyz", files / "exact"))
    return files / "exact", text


# --- the first step is the start, and the kept model is never worse


def test_reference_energies_are_refitted_and_the_first_errors_are_those_of_the_start(exact_run):
    """The labels are those of the start with other reference energies, so no error is left."""
    folder, text = exact_run
    best = load_potential(folder / "best.safetensors")
    energies = dict(zip(best.elements, best.reference_energies.tolist(), strict=True))
    old = {"H": -0.5, "C": -1.5, "N": 0.0, "O": 0.0}
    for element in "HCO":  # 1e-4 eV: float32 energies of a few eV
        assert energies[element] == pytest.approx(old[element] + SHIFT[element], abs=1e-4)
    assert energies["N"] == 0.0  # not in the data
    assert "the training data lack N: their reference energies are those of the start" in text
    table = [line.split() for line in text.splitlines() if line.startswith("│ C")]
    assert table == [["│", "C", "│", "-1.5000", "│", "11.0000", "│", "+12.5000", "│"]]
    row, valid = read_csv(folder / "train.csv")[0], read_csv(folder / "valid.csv")[0]
    for values in (row, valid):
        assert (values["step"], values["epoch"]) == ("0", "0")
        assert float(values["energy_mae"]) < 1e-2 and float(values["forces_mae"]) < 1e-2  # meV: rounding
    assert row["loss"] == "" and "start, on the training data  energy" in text
    assert text.count("step       0 ") == 2


def test_the_start_is_kept_if_nothing_is_better(exact_run, files):
    folder, text = exact_run
    valid = read_csv(folder / "valid.csv")
    assert [(r["step"], r["best"]) for r in valid] == [("0", "1"), ("2", "0"), ("4", "0"), ("6", "0")]
    assert "the start is the best model: none of 3 validations was better" in text
    best, start = load_file(folder / "best.safetensors"), load_file(files / "start.safetensors")
    assert best.keys() == start.keys()
    assert {k for k in best if not torch.equal(best[k], start[k])} == {"reference_energies"}
    last = load_file(folder / "last.safetensors")
    assert any(not torch.equal(last[k], start[k]) for k in start if k != "reference_energies")


def test_a_better_model_replaces_the_start(files, tmp_path):
    """Logged errors of step 0 are those that dpa4 eval finds; at the end the scores are compared."""
    text = finetune(options(files / "start.safetensors", files / "other.xyz", tmp_path / "run", steps=20))
    rows = read_csv(tmp_path / "run" / "valid.csv")
    scores = [float(row["score"]) for row in rows]
    assert min(scores) < scores[0] and scores[[r["best"] for r in rows].index("1")] == scores[0]
    assert f"score of the best model {min(scores):.4g}, of its start {scores[0]:.4g}" in text
    start = load_potential(files / "start.safetensors")
    start.reference_energies.copy_(load_potential(tmp_path / "run" / "last.safetensors").reference_energies)
    parts = split(read_frames(files / "other.xyz"), 0.25, 0)
    logged = read_csv(tmp_path / "run" / "train.csv")[0], rows[0]
    for frames, row in zip(parts, logged, strict=True):
        table = evaluate(start, frames)
        assert float(row["forces_mae"]) == pytest.approx(table.row("forces").mae, rel=1e-5)
        assert float(row["energy_mae"]) == pytest.approx(table.row("energy per atom").mae, rel=1e-3)


def test_without_validation_data_the_run_says_so(files, tmp_path):
    values = options(files / "start.safetensors", files / "other.xyz", tmp_path / "run", steps=1)
    values["data"]["validation_fraction"] = 0
    assert "there are no validation data, so nothing shows whether" in finetune(values)
    assert read_csv(tmp_path / "run" / "valid.csv") == []


def test_the_learning_curve_and_the_report_begin_with_the_start(exact_run, tmp_path):
    folder = shutil.copytree(exact_run[0], tmp_path / "run")
    figure = plots.draw_learning_curve(folder)
    for axis in figure.axes[:2]:
        lines = {line.get_label(): line.get_xdata().tolist() for line in axis.lines}
        assert lines["training"][0] == lines["validation"][0] == 0
    write_report(folder)
    assert "best (step 0)" in (folder / "report.html").read_text(encoding="utf-8")


# --- resume


@pytest.mark.parametrize("step", [0, 3])
def test_a_killed_run_continues_bit_for_bit(files, tmp_path, monkeypatch, step):
    """Also if it was killed before its first step; the start itself is not needed any more."""
    start = shutil.copy(files / "start.safetensors", tmp_path / "start.safetensors")
    whole, part = (options(start, files / "other.xyz", tmp_path / name) for name in ("whole", "part"))
    finetune(whole)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            finetune(part)
    Path(start).unlink()
    values = yaml.safe_load((tmp_path / "part" / "run.yaml").read_text())
    assert values["model"] == {"start_from": str(start), "start_branch": None, "start_ema": False}
    finetune(values, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    both = [provenance(tmp_path / name / "best.safetensors") for name in ("whole", "part")]
    assert both[0]["fingerprint of the start"] == both[1]["fingerprint of the start"]


def test_a_run_killed_while_the_start_is_evaluated(files, tmp_path, monkeypatch):
    values = options(files / "start.safetensors", files / "exact.xyz", tmp_path / "run")
    with monkeypatch.context() as patch:

        def deadly(*_):
            raise Killed

        patch.setattr("dpa4.training.trainer.score_of", deadly)
        with pytest.raises(Killed):
            finetune(values)
    text = finetune(values, resume=True)
    assert "the start is the best model" in text
    for name, steps in (("train.csv", "0 2 4 6"), ("valid.csv", "0 2 4 6")):
        assert [row["step"] for row in read_csv(tmp_path / "run" / name)] == steps.split()


@pytest.mark.slow
def test_a_run_continues_on_new_data_without_a_comparison(files, tmp_path):
    """Scores on other data cannot be compared; the model still names its start, and coverage and windows stay."""
    values = options(files / "start.safetensors", files / "exact.xyz", tmp_path / "run", steps=1)
    assert "the start is the best model" in finetune(values)
    values = options(files / "start.safetensors", files / "other.xyz", tmp_path / "run", steps=2)
    console = Console(file=io.StringIO(), record=True, width=200)
    train(RunConfig.model_validate(values), resume=True, new_data=True, console=console)
    text = console.export_text()
    assert "best score" in text and "the start is the best" not in text and "of its start" not in text
    last, start = (
        load_potential(p) for p in (tmp_path / "run/last.safetensors", files / "start.safetensors")
    )
    assert last.config == start.config and last.coverage.shortest[("C", "N")] == 1.2
    found = provenance(tmp_path / "run/last.safetensors")
    assert found["start"] == str(files / "start.safetensors") and "exact.xyz" in found["training data"]


@pytest.mark.slow
def test_a_committee_is_fine_tuned(files, tmp_path):
    """All members begin with the weights of the start and end with different ones."""
    values = options(files / "start.safetensors", files / "other.xyz", tmp_path / "both", steps=1)
    train_committee(RunConfig.model_validate(values), 2, console=SILENT)
    members = [load_file(tmp_path / f"both/member-{k}/last.safetensors") for k in (0, 1)]
    assert any(not torch.equal(members[0][name], members[1][name]) for name in members[0])
    found = [provenance(tmp_path / f"both/member-{k}/best.safetensors")["start"] for k in (0, 1)]
    assert found == [str(files / "start.safetensors")] * 2


def test_another_start_is_refused_on_resume(exact_run, files):
    values = options("other.safetensors", files / "exact.xyz", exact_run[0])
    with pytest.raises(ValueError, match="model.start_from: .*start.safetensors -> other.safetensors"):
        finetune(values, resume=True)


# --- short range, coverage, provenance


def provenance(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["provenance"])


def test_windows_stay_and_the_coverage_grows(exact_run, files):
    start = load_potential(files / "start.safetensors")
    best = load_potential(exact_run[0] / "best.safetensors")
    assert best.config == start.config
    data, _ = split(read_frames(files / "exact.xyz"), 0.25, 0)
    closest = min(
        np.linalg.norm(f.positions[i] - f.positions[j])
        for f in data
        for i in np.flatnonzero(f.atomic_numbers == 8)
        for j in np.flatnonzero(f.atomic_numbers == 8)
        if i < j
    )
    assert best.coverage.elements == ELEMENTS
    assert best.coverage.shortest[("C", "N")] == 1.2  # of the start
    assert best.coverage.shortest[("O", "O")] == pytest.approx(closest)  # of the data


def test_the_card_names_start_and_data(exact_run, files):
    card = model_card(exact_run[0] / "best.safetensors").text
    mark = fingerprint_of(load_potential(files / "start.safetensors"))["model"]
    for text in (mark, "start.safetensors", "12 structures of exact.xyz", "500 structures of first.xyz"):
        assert text in card
    assert "preset" not in provenance(exact_run[0] / "best.safetensors")  # the options have none


def test_fine_tuning_again_names_all_starts(exact_run, files, tmp_path):
    first = exact_run[0] / "best.safetensors"
    finetune(options(first, files / "other.xyz", tmp_path / "run", steps=1))
    found = provenance(tmp_path / "run" / "best.safetensors")
    assert found["start"] == str(first) and str(files / "start.safetensors") in found["earlier starts"]


# --- kinds of starts


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("D_chg_spin_given", {"charge": -1, "spin": 2}),
        ("D_zbl_atten", {}),
        pytest.param("D_legacy_version1.0", {}, marks=pytest.mark.slow),
    ],
)
def test_published_layouts_are_fine_tuned_and_exported(tmp_path, name, info):
    """Step 0 is the imported model, with its bridging and symmetry; the result is exported to deepmd-kit."""
    torch.save({"model": read_parity_file(FOLDER / f"{name}.safetensors").state}, tmp_path / "model.pt")
    start = load_potential(tmp_path / "model.pt", dtype="float32")
    elements = [e for e in start.elements if e in ("H", "C", "O")]
    assert elements == ["H", "C", "O"] or set(elements) == {"H", "C", "O"}
    data = labelled(start, 6, dict.fromkeys(start.elements, 1.5), **info)
    write_structures(tmp_path / "data.xyz", data)
    finetune(options(tmp_path / "model.pt", tmp_path / "data.xyz", tmp_path / "run", steps=2))
    valid = read_csv(tmp_path / "run" / "valid.csv")
    assert (
        float(valid[0]["energy_mae"]) < 0.05
    )  # meV/atom: float32, and 12 numbers behind the point of the file
    last = load_potential(tmp_path / "run" / "last.safetensors")
    assert last.config == start.config and last.coverage is None
    convert(tmp_path / "run" / "last.safetensors", tmp_path / "exported.pt")
    again = load_potential(tmp_path / "exported.pt", dtype="float32")
    pair = info.get("charge", 0), info.get("spin", 1)
    graph = collate([graph_of(atoms, start.config.cutoff, pair) for atoms in data[:2]])
    # 1e-6: float32, relative
    torch.testing.assert_close(again(graph).energy, last(graph).energy, rtol=1e-6, atol=1e-5)


def test_averaged_weights_of_a_checkpoint_are_a_start(tmp_path):
    state = read_parity_file(FOLDER / "D_base.safetensors").state
    means = {name.removeprefix("model.Default."): 0.5 * state[name] for name in parameter_names(state)}
    ema = {"decay": 0.999, "model": means, "validation_state": {}}
    torch.save({"model": state, "ema": ema}, tmp_path / "model.pt")
    for wanted in (True, False):
        named = ModelOptions(start_from=str(tmp_path / "model.pt"), start_ema=wanted)
        start = load_start(named)
        expected = load_potential(tmp_path / "model.pt", dtype="float32", ema=wanted).state_dict()
        assert all(torch.equal(start.potential.state_dict()[name], expected[name]) for name in expected)
        assert ("averaged weights" in start.provenance["start"]) == wanted


def test_charge_and_spin_of_silent_structures_may_be_given(tmp_path):
    """A start without a default needs them; the network does not depend on the default."""
    start = save_start(tmp_path / "start.safetensors", charge_spin=True)
    data = labelled(start, 6, SHIFT)
    write_structures(tmp_path / "data.xyz", data)
    values = options(tmp_path / "start.safetensors", tmp_path / "data.xyz", tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match="conditioned on charge and spin without a default"):
        finetune(values)
    values["model"]["default_charge_spin"] = [0, 1]
    finetune(values)
    best = load_potential(tmp_path / "run" / "best.safetensors")
    assert best.config.default_charge_spin == (0, 1)
    found = provenance(tmp_path / "run" / "best.safetensors")["fingerprint of the start"]
    assert found == fingerprint_of(start)["model"]


def test_elements_are_dropped_and_the_run_has_the_same_numbers(files, tmp_path):
    """The padding of a table with fewer rows is the only difference, so all errors and weights agree."""
    whole, smaller = (
        options(files / "start.safetensors", files / "other.xyz", tmp_path / name, model)
        for name, model in (("whole", {}), ("smaller", {"elements": ["C", "H", "O"]}))
    )
    finetune(whole | {"training": whole["training"] | {"steps": 1}})
    text = finetune(smaller | {"training": smaller["training"] | {"steps": 1}})
    assert "lack N" not in text
    rows = [read_csv(tmp_path / name / "valid.csv") for name in ("whole", "smaller")]
    assert rows[0][0] == rows[1][0]
    sizes = [(tmp_path / name / "best.safetensors").stat().st_size for name in ("whole", "smaller")]
    assert sizes[1] < sizes[0]
    assert load_potential(tmp_path / "smaller" / "best.safetensors").elements == ("H", "C", "O")


def test_a_dry_run_of_fine_tuning_writes_nothing(files, tmp_path):
    values = options(files / "start.safetensors", files / "other.xyz", tmp_path / "run", steps=4)
    estimate = dry_run(RunConfig.model_validate(values), SILENT)
    assert estimate.validations == 3 and not (tmp_path / "run").exists()  # step 0 as well


# --- reference energies that are given, and data of one composition


def test_given_reference_energies_replace_those_of_the_start(files, tmp_path):
    values = options(files / "start.safetensors", files / "other.xyz", tmp_path / "run", steps=1)
    values["data"]["reference_energies"] = {"H": -13.0, "C": -30.0, "O": -40.0}
    finetune(values)
    best = load_potential(tmp_path / "run" / "last.safetensors")
    assert best.reference_energies.tolist() == [-13.0, -30.0, 0.0, -40.0]


def test_one_composition_changes_reference_energies_as_little_as_possible(files, tmp_path):
    start = load_potential(files / "start.safetensors")
    data = [a for a in labelled(start, 20, SHIFT) if len(a) == 5 and set(a.symbols) == set("HCO")][::3]
    data = [a for a in data if a.get_chemical_formula() == data[0].get_chemical_formula()]
    assert len(data) >= 2
    write_structures(tmp_path / "data.xyz", data)
    values = options(files / "start.safetensors", tmp_path / "data.xyz", tmp_path / "run", steps=1)
    values["data"]["validation_fraction"] = 0.3
    text = finetune(values)
    assert "do not determine how the reference energies of H, C, O change one by one" in text
    best = load_potential(tmp_path / "run" / "best.safetensors")
    change = (best.reference_energies - start.reference_energies).numpy()[[0, 1, 3]]
    counts = np.array([sum(data[0].symbols == e) for e in "HCO"])
    total = counts @ np.array([SHIFT[e] for e in "HCO"])
    assert change == pytest.approx(
        total * counts / (counts @ counts), abs=1e-3
    )  # parallel to the composition
    card = model_card(tmp_path / "run" / "best.safetensors").text
    assert "a mixture of two levels of theory" in card


# --- refusals


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"cutoff": 5.0}, r"model\.cutoff = 5\.0 \(start: 4\.0\)"),
        ({"symmetry": "SO3", "lmax": 2}, r"model\.symmetry = SO3 \(start: O3\).*|model\.lmax = 2 \(start: 1\)"),
        ({"bridging": None}, r"model\.bridging = null \(start: a window per pair"),
        ({"preset": "mini"}, r"model\.preset = mini with cutoff 6\.0 \(start: 4\.0\), channels 32"),
        ({"elements": ["H", "C", "O", "Si"]}, r"model\.elements does not fit .*no element Si"),
        ({"elements": ["H", "C"]}, r"element O of .*other\.xyz.* is not in the model to fine-tune"),
        ({"start_branch": "water"}, "single model, so there is no branch 'water'"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_start_are_named(files, tmp_path, model, message):
    values = options(files / "start.safetensors", files / "other.xyz", tmp_path / "run", model)
    with pytest.raises(ValueError, match=message):
        finetune(values)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_options_that_agree_with_the_start_are_allowed(files, tmp_path):
    agreeing = {"cutoff": 4, "symmetry": "O3", "edge_norm": False, "bridging": "auto", "elements": "auto"}
    values = options(files / "start.safetensors", files / "other.xyz", tmp_path / "run", agreeing, steps=1)
    finetune(values)
    again = load_run_config(tmp_path / "run" / "run.yaml")
    assert again == RunConfig.model_validate(values)


def test_starts_that_are_none(files, tmp_path, exact_run):
    for start, message in (
        ("absent.safetensors", "there is no model file"),
        ("paper-neo", "an architecture without weights"),
        (exact_run[0], "is the folder of a training run, not a model; take .*best.safetensors"),
        (exact_run[0] / "last.pt", "is the state of a training run"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            finetune(options(start, files / "other.xyz", tmp_path / "run"))


@pytest.mark.parametrize("name", ["start_branch", "start_ema"])
def test_options_of_a_start_need_one(name):
    values = {"model": {name: "x" if name == "start_branch" else True}, "data": {"train": "a.xyz"}}
    with pytest.raises(ValueError, match=rf"model\.{name} = .* needs model\.start_from"):
        RunConfig.model_validate(values)


def test_learning_rate_and_warm_up_are_those_of_fine_tuning_unless_given(files, tmp_path):
    values = {"model": {"start_from": "a.safetensors"}, "data": {"train": "a.xyz"}}
    training = RunConfig.model_validate(values).training
    assert {name: getattr(training, name) for name in FINETUNING} == FINETUNING
    given = RunConfig.model_validate(values | {"training": {"learning_rate": 0.02}}).training
    assert given.learning_rate == 0.02 and given.warmup_fraction == FINETUNING["warmup_fraction"]
    assert RunConfig.model_validate({"data": {"train": "a.xyz"}}).training.learning_rate == "auto"
    loud = options(
        files / "start.safetensors", files / "other.xyz", tmp_path / "run", steps=1, learning_rate=0.02
    )
    assert "training.learning_rate = 0.02 suits random weights" in finetune(loud)
