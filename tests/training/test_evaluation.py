"""Evaluation: errors by quantity and group, tables and files, predictions that do not depend on batches."""

import copy
import csv
import io
import json
import re
from dataclasses import replace

import ase.io
import numpy as np
import pytest
import torch
from ase.data import chemical_symbols
from rich.console import Console

from dpa4.data import Frame, read_frames
from dpa4.output import read_csv, short
from dpa4.training import plots
from dpa4.training.errors import worst_structures, worst_table
from dpa4.training.evaluation import FILES, ErrorTable, FramePrediction, error_table, evaluate, predict
from helpers import crystal, molecule, random_potential

pytestmark = pytest.mark.usefixtures("no_figures")


def frame_of(atoms, group="", labels=None, **options):
    labels = labels or {}
    return Frame(
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        group=group,
        **labels,
        **options,
    )


def made_up():
    """Frames of two groups with known errors of the predictions."""
    rng = np.random.default_rng(0)
    frames, predictions = [], []
    for i, (atoms, group) in enumerate(
        [(molecule(1, 4), "gas"), (crystal(2), "solid"), (molecule(3, 5), "gas")]
    ):
        n = len(atoms)
        labels = {"energy": float(rng.normal()), "forces": rng.normal(size=(n, 3))}
        if group == "solid":
            labels["virial"] = rng.normal(size=(3, 3))
        frames.append(frame_of(atoms, group, labels))
        error = 0.001 * (i + 1)
        virial = labels.get("virial", np.zeros((3, 3)))
        predictions.append(
            FramePrediction(labels["energy"] + n * error, labels["forces"] - error, virial + error)
        )
    return frames, predictions


def test_errors_by_group_and_total():
    frames, predictions = made_up()
    table = error_table(frames, predictions)
    gas = table.row("energy per atom", "gas")
    assert (gas.values, gas.unit) == (2, "meV/atom")
    assert [gas.mae, gas.rmse, gas.maximum] == pytest.approx([2, np.sqrt(5), 3])
    assert table.row("energy", "gas").mae == pytest.approx((4 * 1 + 5 * 3) / 2)
    forces = table.row("forces")
    assert forces.values == 3 * (4 + 6 + 5)
    assert forces.mae == pytest.approx((4 * 1 + 6 * 2 + 5 * 3) / 15)
    assert table.row("virial per atom", "solid").mae == pytest.approx(2 / 6)
    volume = abs(np.linalg.det(frames[1].cell))
    assert table.row("stress").maximum == pytest.approx(2 / volume)
    assert table.row("stress", "gas") is None and table.row("virial per atom", "gas") is None


def test_one_group_has_no_section_of_its_own():
    frames, predictions = made_up()
    table = error_table(frames[:1], predictions[:1])
    assert {row.group for row in table.rows} == {"all"}


def printed(table, width=80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_table_on_the_terminal_and_in_files(tmp_path):
    table = error_table(*made_up())
    lines = printed(table.to_rich()).splitlines()
    heads = ["energy energy forces forces stress stress", "MAE RMSE MAE RMSE MAE RMSE"]
    assert [" ".join(line.split()) for line in lines[1:3]] == heads
    assert lines[3].split()[1:] == ["meV/atom", "meV/atom", "meV/Å", "meV/Å", "meV/Å³", "meV/Å³"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:] if line.strip()}
    assert rows["gas"] == ["2.000", "2.236", "2.111", "2.333", "-", "-"]  # one row for a group
    volume = abs(np.linalg.det(made_up()[0][1].cell))
    assert rows["solid"][:4] == ["2.000"] * 4 and float(rows["all"][5]) == pytest.approx(2 / volume, abs=1e-3)
    table.write_csv(tmp_path / "errors.csv")
    table.write_json(tmp_path / "errors.json")
    with (tmp_path / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["quantity"] for r in rows] == [r.quantity for r in table.rows]
    assert float(rows[0]["mae"]) == table.rows[0].mae
    stored = json.loads((tmp_path / "errors.json").read_text())
    assert stored == [r._asdict() for r in table.rows]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e7])
def test_tables_fit_eighty_columns_without_broken_words_or_cut_numbers(scale):
    """With long names of groups and files, and errors of any size."""
    frames, predictions = made_up()
    groups = ("amorphous-silicon_dioxide-melt-quench-3000K", "surface-adsorbate_relaxations", "solid")
    frames = [
        replace(f, group=g, origin=f"/data/a-very-long-folder/training-structures_{g}.extxyz, frame 123456")
        for f, g in zip(frames, groups, strict=True)
    ]
    predictions = [
        p._replace(energy=p.energy * scale + 7, forces=p.forces * scale, virial=p.virial * scale)
        for p in predictions
    ]
    table = error_table(frames, predictions)
    worst = worst_structures(frames, predictions, table)
    for text in (printed(table.to_rich()), printed(worst_table(worst))):
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        words = set(re.findall(r"[a-z]{3,}", text))
        for group in groups:
            assert set(re.findall(r"[a-z]{3,}", group)) <= words
    for row in table.rows:
        if row.quantity in ("energy per atom", "forces", "stress"):
            assert short(row.mae) in printed(table.to_rich())
    for structure in worst:
        assert short(structure.energy_error) in printed(worst_table(worst))


def test_long_names_of_groups_are_not_cut_off():
    frames, predictions = made_up()
    frames = [replace(frame, group=f"group-with-a-long-name-{frame.group}") for frame in frames]
    assert "…" not in printed(error_table(frames, predictions).to_rich(), width=60)


def test_worst_structures_are_ranked_by_their_errors_over_the_rmse():
    frames, predictions = made_up()
    frames = [replace(f, origin=f"some/test.xyz, frame {k}") for k, f in enumerate(frames)]
    predictions[0].forces[1, 2] += 0.5
    table = error_table(frames, predictions)
    worst = worst_structures(frames, predictions, table)
    assert [w.rank for w in worst] == [1, 2, 3] and (worst[0].file, worst[0].frame) == ("some/test.xyz", "0")
    first = worst[0]
    error = 1e3 * (predictions[0].forces - frames[0].forces)
    assert (first.quantity, first.atoms, first.group, first.number) == ("forces", 4, "gas", 0)
    assert first.forces_rmse == pytest.approx(np.sqrt(np.mean(error**2)))
    assert first.forces_maximum == pytest.approx(499)
    assert first.ratio == pytest.approx(first.forces_rmse / table.row("forces").rmse)
    assert first.energy_error == pytest.approx(1)  # with its sign
    assert first.virial_rmse is None
    assert len(worst_structures(frames, predictions, table, 2)) == 2
    assert worst_structures([frame_of(molecule(1))], [predictions[0]], ErrorTable(())) == []


@pytest.fixture(scope="module")
def potential():
    return random_potential()


def labelled(potential, atoms, group=""):
    """Frame whose labels are the potential's own predictions."""
    frame = frame_of(atoms, group)
    from dpa4.data import EpochBatches, FrameDataset

    dataset = FrameDataset([frame], potential.config.cutoff)
    (p,) = predict(potential, EpochBatches(dataset, batch_size=1, shuffle=False).batches(0))
    labels = {"energy": p.energy, "forces": p.forces}
    if atoms.pbc.all():
        labels["virial"] = p.virial
    return frame_of(atoms, group, labels)


def test_a_perfect_potential_has_no_errors(potential, tmp_path, figures):
    frames = [
        labelled(potential, a, g) for a, g in ((molecule(1), "m"), (crystal(2), "c"), (molecule(3, 4), "m"))
    ]
    torch.manual_seed(0)
    table = evaluate(potential, frames, max_atoms=12, output=tmp_path)
    assert len(table.rows) == 3 * 1 + 5 + 5  # energies and forces of m, everything of c and of all
    assert max(row.maximum for row in table.rows) < 1e-9
    for name in (*FILES, "predictions.xyz"):
        assert (tmp_path / name).stat().st_size > 0


def test_the_worst_structures_are_written_with_their_place(potential, tmp_path):
    frames = []
    for number in range(12):
        perfect = labelled(potential, molecule(number, 3), "gas")
        change = {"forces": perfect.forces + 0.01 * number, "energy": None}
        frames.append(replace(perfect, origin=f"data/test.xyz, frame {number}", **change))
    table = evaluate(potential, frames, output=tmp_path)
    assert [w.frame for w in table.worst] == [str(n) for n in range(11, 1, -1)]
    images = ase.io.read(tmp_path / "worst.xyz", ":")
    assert [(a.info["rank"], a.info["file"], int(a.info["frame"])) for a in images] == [
        (rank, "data/test.xyz", 12 - rank) for rank in range(1, 11)
    ]
    assert images[0].arrays["REF_forces"] == pytest.approx(frames[11].forces, abs=1e-6)
    assert images[0].get_forces() == pytest.approx(frames[11].forces - 0.11, abs=1e-6)
    rows = read_csv(tmp_path / "worst.csv")
    assert [row["frame"] for row in rows] == [w.frame for w in table.worst]
    assert float(rows[0]["forces_maximum"]) == pytest.approx(110)


def test_energies_of_parity_plots_are_relative_to_the_references(potential, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, **_: drawn.append(figure))
    potential = copy.deepcopy(potential)
    potential.reference_energies.copy_(torch.arange(len(potential.elements)) - 70.0)
    frames = [
        replace(labelled(potential, atoms, group), origin=f"sets/$odd_{group}$.xyz, frame 0")
        for atoms, group in ((molecule(1), "$m$"), (crystal(2), "c_1"), (molecule(3, 4), "$m$"))
    ]
    evaluate(potential, frames, output=tmp_path, model="some/run/best.safetensors")
    (figure,) = drawn
    title = figure.get_suptitle().replace(r"\$", "$")
    assert title == "$odd_$m$$.xyz, $odd_c_1$.xyz, predicted by run/best.safetensors"
    energy, forces, stress, *histograms = figure.axes
    assert "relative to the reference energies" in energy.get_title().replace("\n", " ")
    points = np.concatenate([line.get_xdata() for line in energy.lines[1:]])
    references = dict(zip(potential.elements, potential.reference_energies.tolist(), strict=True))
    expected = [
        1e3 * (f.energy - sum(references[chemical_symbols[z]] for z in f.atomic_numbers)) / len(f)
        for f in frames
    ]
    assert sorted(points) == pytest.approx(sorted(expected))  # meV/atom
    for axis in (energy, forces, stress):
        assert axis.get_aspect() == 1 and axis.get_xlim() == axis.get_ylim()
    assert {line.get_color() for line in energy.lines[1:]} == {"C0", "C1"}
    assert [t.get_text().replace(r"\$", "$") for t in figure.legends[0].get_texts()] == ["$m$", "c_1"]
    for axis in histograms:
        assert axis.get_yscale() == axis.get_xscale() == "log"
        assert [t.get_text().split(" below")[0] for t in axis.get_legend().get_texts()] == [
            "50 %",
            "90 %",
            "99 %",
        ]
    figure.draw_without_rendering()  # names with dollar signs are no formulas


def test_many_groups_share_the_last_colour(tmp_path, figures):
    groups = [f"g{number}" for number in range(30) for _ in range(40 - number)]
    values = np.arange(float(len(groups)))
    panel = plots.ParityPanel("energy", "meV/atom", values, values + 1, np.arange(len(groups)))
    plots.plot_parity([panel], groups, "title", tmp_path / "parity.png")
    svg = (tmp_path / "parity.svg").read_text()
    assert "<!-- 13 other groups -->" in svg and "<!-- g16 -->" in svg and "<!-- g17 -->" not in svg
    assert "prefers-color-scheme: dark" in svg and "#000000;" in svg.partition("</style>")[0]


def test_predictions_are_written_beside_the_labels(potential, tmp_path):
    perfect = labelled(potential, crystal(2), "solid")
    frames = [
        frame_of(
            crystal(2), "solid", {"energy": 1.5, "forces": perfect.forces + 1, "virial": perfect.virial + 1}
        ),
        frame_of(molecule(1), charge_spin={"charge": 1, "spin": 2}),
    ]
    evaluate(potential, frames, output=tmp_path)
    solid, gas = ase.io.read(tmp_path / "predictions.xyz", ":")
    assert solid.get_potential_energy() == pytest.approx(perfect.energy)
    assert solid.get_forces() == pytest.approx(perfect.forces, abs=1e-6)
    volume = solid.get_volume()
    assert solid.get_stress(voigt=False) == pytest.approx(-perfect.virial / volume, abs=1e-6)
    assert solid.info["REF_energy"] == 1.5
    assert solid.arrays["REF_forces"] == pytest.approx(perfect.forces + 1, abs=1e-6)
    assert np.reshape(solid.info["REF_virial"], (3, 3)) == pytest.approx(perfect.virial + 1, abs=1e-6)
    assert solid.info["config_type"] == "solid"
    assert "REF_energy" not in gas.info and "REF_forces" not in gas.arrays
    assert (gas.info["charge"], gas.info["spin"]) == (1, 2)
    assert np.isfinite(gas.get_forces()).all()


def test_without_labels_there_are_predictions_only(potential, tmp_path):
    table = evaluate(potential, [frame_of(molecule(1))], output=tmp_path)
    assert table == ErrorTable(())
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.xyz"}


def test_batches_do_not_change_predictions_and_the_mode_is_kept(potential):
    frames = [frame_of(molecule(seed, 3 + seed)) for seed in range(4)]
    from dpa4.data import EpochBatches, FrameDataset

    dataset = FrameDataset(frames, potential.config.cutoff)
    potential.train()
    together, single = (
        predict(potential, EpochBatches(dataset, batch_size=size, shuffle=False).batches(0))
        for size in (4, 1)
    )
    assert potential.training
    potential.eval()
    for a, b, frame in zip(together, single, frames, strict=True):
        assert a.forces.shape == (len(frame), 3)
        assert a.energy == pytest.approx(b.energy, rel=1e-12)
        assert a.forces == pytest.approx(b.forces, abs=1e-10)
        assert a.virial == pytest.approx(b.virial, abs=1e-10)


def test_nothing_to_evaluate(potential):
    with pytest.raises(ValueError, match="there are no structures to evaluate"):
        evaluate(potential, [])


def test_elements_outside_the_model(potential):
    gold = molecule(1)
    gold.numbers[0] = 79
    with pytest.raises(ValueError, match=r"Au \(79\)"):
        evaluate(potential, [frame_of(gold)])


def test_predictions_are_never_taken_for_labels(potential, tmp_path):
    """Evaluated again, the file with predictions has the same errors, and none where there were no labels."""
    frames = [
        frame_of(crystal(2), "solid", {"energy": 1.5, "forces": np.ones((6, 3)), "virial": np.eye(3)}),
        frame_of(molecule(1), "gas", {"energy": -3.0}),
        frame_of(molecule(2), "nothing", charge_spin={"charge": 1, "spin": 2}),
    ]
    first = evaluate(potential, frames, output=tmp_path / "first")
    again = read_frames(tmp_path / "first" / "predictions.xyz")
    assert [frame.forces is None for frame in again] == [False, True, True]
    second = evaluate(potential, again, output=tmp_path / "second")
    assert [row[:4] for row in second.rows] == [row[:4] for row in first.rows]
    assert min(row.maximum for row in second.rows) > 1
    for one, two in zip(first.rows, second.rows, strict=True):
        assert two[4:] == pytest.approx(one[4:], rel=1e-6, abs=1e-4)
    # The labels of a new calculation on the same structures count.
    images = ase.io.read(tmp_path / "first" / "predictions.xyz", ":")
    images[2].calc.results["energy"] = 7.0
    ase.io.write(tmp_path / "new.xyz", images, format="extxyz")
    assert [frame.energy for frame in read_frames(tmp_path / "new.xyz")] == [1.5, -3.0, 7.0]


def test_errors_of_an_earlier_evaluation_do_not_stay(potential, tmp_path):
    evaluate(potential, [frame_of(molecule(1), labels={"energy": 1.0})], output=tmp_path)
    assert (tmp_path / "errors.json").is_file()
    evaluate(potential, [frame_of(molecule(1))], output=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"predictions.xyz"}
