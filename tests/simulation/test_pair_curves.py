"""Pair curves: derivatives, definitions of the flags, files, interruption, the command."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch
import typer.main
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.model.config import Bridging
from dpa4.model.short_range import zbl_pair_energy
from dpa4.potential import Potential, save_potential
from dpa4.simulation import DPA4Calculator
from dpa4.simulation import pair_curves as module
from dpa4.simulation.pair_curves import (
    PairCurve,
    diagnose,
    element_pairs,
    pair_curves,
    parse_pairs,
    scan_pairs,
)
from helpers import random_potential

R = np.linspace(0.8, 6.0, 261)


def tiny(seed: int = 0, **options) -> Potential:
    """Tiny potential for tests that do not depend on the shape of the curves."""
    return random_potential(seed, **({"n_blocks": 1, "lmax": 1} | options))


def curve(energy, force, curvature, r=R) -> PairCurve:
    return PairCurve(("Ar", "Ar"), r, energy(r), force(r), curvature(r))


def lennard_jones(depth: float = 1.0, extra=None) -> PairCurve:
    """Lennard-Jones curve with the minimum at 1.2 Angstrom; ``extra`` is a bump of given height, place and width."""
    x = 1.2 / R
    values = [
        depth * (x**12 - 2 * x**6),
        12 * depth / R * (x**12 - x**6),
        12 * depth / R**2 * (13 * x**12 - 7 * x**6),
    ]
    if extra:
        height, place, width = extra
        bump, u = height * np.exp(-(((R - place) / width) ** 2) / 2), (R - place) / width
        values[0] += bump
        values[1] += bump * u / width
        values[2] += bump * (u**2 - 1) / width**2
    return PairCurve(("Ar", "Ar"), R, *values)


# --- the curves


@pytest.mark.parametrize("options", [{}, {"bridging": Bridging(r_inner=0.6, r_outer=0.9)}])
def test_force_and_curvature_are_derivatives(options):
    for found in pair_curves(random_potential(**options), [("H", "C"), ("O", "O")], start=0.5, step=5e-3):
        h = found.distance[1] - found.distance[0]
        # central differences: error h^2/6 times the third derivative, 1e-3 of the largest value at most
        middle = slice(2, -2)
        slope, change = np.gradient(found.energy, h)[middle], np.gradient(found.force, h)[middle]
        np.testing.assert_allclose(-slope, found.force[middle], atol=2e-3 * np.abs(found.force).max())
        np.testing.assert_allclose(
            -change, found.curvature[middle], atol=2e-3 * np.abs(found.curvature).max()
        )
        assert np.abs(found.curvature).max() > 0.1
        assert found.energy[-1] == found.force[-1] == 0 and found.distance[-1] == 4.0  # the cutoff


def test_energies_are_those_of_the_calculator():
    from ase import Atoms

    potential = random_potential()
    (found,) = pair_curves(potential, [("C", "O")], step=0.5)
    calculator = DPA4Calculator(potential, device="cpu", dtype="float64")
    alone = sum(calculator.get_potential_energy(Atoms(e)) for e in "CO")
    for r, energy, force in zip(found.distance, found.energy, found.force, strict=True):
        atoms = Atoms("CO", [(0, 0, 0), (r * 0.6, 0, r * 0.8)])
        atoms.calc = calculator
        assert energy == pytest.approx(atoms.get_potential_energy() - alone, abs=1e-12)
        assert force == pytest.approx(atoms.get_forces()[1] @ (0.6, 0, 0.8), abs=1e-12)


def test_nuclear_repulsion_is_all_there_is_at_contact():
    potential = random_potential(bridging=Bridging(r_inner=0.6, r_outer=0.9, smooth_cutoff=False))
    (found,) = pair_curves(potential, [("C", "O")], start=0.2, step=0.05)
    near = found.distance < 0.6
    r = torch.from_numpy(found.distance[near])
    np.testing.assert_allclose(
        np.diff(found.energy[near]), np.diff(zbl_pair_energy(r, torch.tensor(6), torch.tensor(8))), rtol=1e-9
    )


def test_pairs_and_distances():
    potential = random_potential(excluded_pairs=(("H", "O"), ("C", "C")))
    assert element_pairs(potential) == [("H", "H"), ("H", "C"), ("C", "O"), ("O", "O")]
    (found,) = pair_curves(potential, [("C", "H")], start=0.3, step=1.0)
    np.testing.assert_allclose(found.distance, [0.3, 1.225, 2.15, 3.075, 4.0])
    assert parse_pairs("Si-O, O-O") == [("Si", "O"), ("O", "O")]


def test_charge_and_multiplicity():
    """Charge and multiplicity are the model's default, else those of the neutral pair: singlet H2, doublet CH."""
    given, found = [], {}
    for default in (None, (1, 4)):
        potential = random_potential(charge_spin=True, default_charge_spin=default)
        # charge and multiplicity of the first atom of both pairs, whose nine points are one batch
        potential.model.register_forward_hook(lambda _, inputs, __: given.extend(inputs[4][[0, -1]].tolist()))
        found[default] = [c.energy for c in pair_curves(potential, [("H", "H"), ("C", "H")], step=0.5)]
    assert given == [[0, 1], [0, 2], [1, 4], [1, 4]]
    assert np.abs(found[None][0] - found[(1, 4)][0]).max() > 1e-4


# --- the flags


def test_a_wall_and_a_well_are_in_order():
    found = diagnose(lennard_jones())
    assert (found.flags, found.force_flips) == ((), 1)
    assert found.minimum == pytest.approx(1.2) and found.depth == pytest.approx(1)
    assert found.excess_variation == pytest.approx(0, abs=1e-12)
    wall = diagnose(curve(lambda r: 9 / r, lambda r: 9 / r**2, lambda r: 18 / r**3))
    assert (wall.flags, wall.force_flips) == ((), 0)


def test_a_bump_is_a_spike():
    found = diagnose(lennard_jones(extra=(0.4, 2.4, 0.1)))
    assert found.flags == ("several wells", "spike") and found.force_flips == 3
    # up and down again, minus the rise of the well's energy meanwhile
    assert 0.7 < found.excess_variation < 0.8
    small = diagnose(lennard_jones(extra=(0.04, 2.4, 0.1)))
    assert small.flags == ("several wells",) and 0 < small.excess_variation < 0.1


def test_a_hole_is_no_wall():
    found = diagnose(lennard_jones(extra=(-500.0, 0.8, 0.2)))
    assert "no wall" in found.flags
    soft = diagnose(curve(lambda r: 0.5 / r, lambda r: 0.5 / r**2, lambda r: 1 / r**3))
    assert soft.flags == ("no wall",)  # repulsive, but only by 0.6 eV


def test_a_step_is_a_jump():
    smooth = lennard_jones()
    broken = PairCurve(smooth.pair, R, smooth.energy + 0.02 * (R > 3), smooth.force, smooth.curvature)
    found = diagnose(broken)
    assert found.flags == ("jump",) and found.largest_jump == pytest.approx(0.02, abs=1e-4)


def test_what_is_not_finite():
    energy = lennard_jones().energy
    energy[3] = np.inf
    found = diagnose(PairCurve(("Ar", "Ar"), R, energy, R, R))
    assert found.flags == ("not finite",) and found.depth is None


# --- files


def test_files(tmp_path):
    scan = scan_pairs(tiny(), tmp_path / "a" / "out", step=0.1, progress=False)
    folder = tmp_path / "a" / "out"
    assert scan.finished and len(scan.curves) == 6
    rows = list(csv.DictReader((folder / "pairs.csv").open()))
    assert len(rows) == 6 * 39
    own = [row for row in rows if row["pair"] == "C-O"]
    (found,) = [c for c in scan.curves if c.name == "C-O"]
    for column, values in (
        ("distance_A", found.distance),
        ("energy_eV", found.energy),
        ("force_eV_per_A", found.force),
        ("curvature_eV_per_A2", found.curvature),
    ):
        np.testing.assert_allclose([float(row[column]) for row in own], values, rtol=1e-8, atol=1e-300)
    content = json.loads((folder / "pairs.json").read_text())
    assert content["finished"] and [p["pair"] for p in content["pairs"]] == [c.name for c in scan.curves]
    assert content["pairs"][0]["flags"] == list(scan.diagnoses[0].flags)
    assert [p.name for p in folder.glob("*.png")] == ["pairs-01.png"]
    assert (folder / "pairs-01.png").read_bytes().startswith(b"\x89PNG")


def test_figures_show_physical_energies_only_with_labels_and_plain_numbers():
    """Also of curves with a hole, a wall of 1e7 eV, tiny values, or values that are not finite."""
    hole = PairCurve(("H", "H"), R, 1e7 * np.exp(-9 * R) - 500 * np.exp(-((R - 3) ** 2)), -R, 1e6 * R)
    flat = PairCurve(("H", "O"), R, 1e-7 * np.cos(R), 1e-7 * R, 1e-7 * R)
    broken = PairCurve(("O", "O"), R, np.where(R > 3, np.nan, 1.0), R, R)
    curves = [lennard_jones(), hole, flat, broken]
    figure = module.draw_pairs(curves, map(diagnose, curves))
    figure.draw_without_rendering()
    panels = [figure.axes[k : k + 3] for k in range(0, 12, 3)]
    for energy, force, curvature in panels:
        names = [axis.get_ylabel() for axis in (energy, force, curvature)]
        assert names == ["E (eV)", "F (eV/Å)", "k (eV/Å²)"]
        low, high = energy.get_ylim()
        assert -14 < low < high < 14
        for axis in (energy, force, curvature):
            assert axis.yaxis.get_offset_text().get_text() == ""  # "1e6", over the panel above
    assert panels[0][0].get_ylim()[0] < -1 and panels[0][0].get_ylim()[1] > 2.9
    assert panels[1][0].get_ylim()[0] < -12  # the hole is seen
    lefts = [energy.yaxis.label.get_window_extent().x0 for energy, *_ in panels]
    assert all(b - a > 200 for a, b in zip(lefts, lefts[1:], strict=False))  # each label beside its panel


def test_many_pairs_take_several_figures_and_replace_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PER_PAGE", 2)
    scan_pairs(tiny(), tmp_path, step=1.0, progress=False)
    assert len(list(tmp_path.glob("pairs-*.png"))) == 3
    scan_pairs(tiny(), tmp_path, [("H", "H")], step=1.0, progress=False)
    assert [p.name for p in tmp_path.glob("pairs-*.png")] == ["pairs-01.png"]


def interrupted(potential, folder, at, monkeypatch):
    """Scan six pairs whose batches hold one pair each; Ctrl-C arrives in one of them."""
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "CPU_EDGES", 18)
    hook = potential.model.register_forward_hook(interrupt)
    scan = scan_pairs(potential, folder, step=0.5, progress=False)
    hook.remove()
    return scan, len(calls)


def test_interruption_keeps_what_is_done(tmp_path, monkeypatch):
    scan, _ = interrupted(tiny(), tmp_path, 2, monkeypatch)
    assert not scan.finished and len(scan.curves) == len(scan.diagnoses) == 2
    assert not json.loads((tmp_path / "pairs.json").read_text())["finished"]
    assert {row["pair"] for row in csv.DictReader((tmp_path / "pairs.csv").open())} == {"H-H", "H-C"}


def test_the_same_call_goes_on(tmp_path, monkeypatch):
    potential = tiny()
    whole, calls = interrupted(potential, tmp_path / "whole", None, monkeypatch)
    assert whole.finished and calls == 6
    interrupted(potential, tmp_path / "parts", 2, monkeypatch)
    with (tmp_path / "parts" / "pairs.jsonl").open("a") as file:
        file.write('{"id": "H-O", "ener')  # torn by a kill
    resumed, calls = interrupted(potential, tmp_path / "parts", None, monkeypatch)
    assert resumed.finished and calls == 4  # none for the two finished curves
    for name in ("pairs.csv", "pairs.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # some of the pairs, from stored results; another precision or a copy is not another model
    again = scan_pairs(tiny(), tmp_path / "parts", [("C", "O")], step=0.5, progress=False)
    np.testing.assert_array_equal(again.curves[0].force, whole.curves[4].force)


def test_curves_of_another_model_or_other_distances_are_refused(tmp_path):
    options = {"pairs": [("C", "O")], "step": 1.0, "progress": False}
    scan_pairs(tiny(), tmp_path, **options)
    for potential, changed, message in (
        (
            tiny(seed=1),
            {},
            r"model = '\w+', but .* holds results with model = '\w+'; choose another",
        ),
        (tiny().float(), {}, "dtype = 'float32', but .* dtype = 'float64'; choose another"),
        (tiny(), {"step": 0.5}, "step = 0.5, but .* step = 1.0; choose another folder"),
        (tiny(), {"start": 0.3}, "start = 0.3, but .* start = 0.2; choose another folder"),
    ):
        with pytest.raises(ValueError, match=message):
            scan_pairs(potential, tmp_path, **(options | changed))


@pytest.mark.parametrize("edges", [pytest.param(2, marks=pytest.mark.slow), 14, 10_000])
def test_curves_do_not_depend_on_the_batches(monkeypatch, edges):
    potential = tiny(charge_spin=True)
    expected = list(pair_curves(potential, step=0.2))
    monkeypatch.setattr(module, "CPU_EDGES", edges)
    for one, other in zip(pair_curves(potential, step=0.2), expected, strict=True):
        assert one.name == other.name
        for name in ("energy", "force", "curvature"):
            values = getattr(other, name)
            # sums in another order; hundreds of eV at the wall
            np.testing.assert_allclose(getattr(one, name), values, atol=1e-12 * np.abs(values).max(), rtol=0)


def test_batches_that_do_not_fit_are_halved(monkeypatch):
    evaluate, sizes = module._evaluate, []

    def small(potential, graph):
        if graph.num_structures > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(graph.num_structures)
        return evaluate(potential, graph)

    expected = list(pair_curves(tiny(), step=0.5))
    monkeypatch.setattr(module, "_evaluate", small)
    found = list(pair_curves(tiny(), step=0.5))
    assert [c.name for c in found] == [c.name for c in expected]
    np.testing.assert_allclose(found[5].energy, expected[5].energy, atol=1e-12)
    assert sizes == [6] * 9  # of 54 points: 27, 13, 6

    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_evaluate", never)
    with pytest.raises(torch.OutOfMemoryError):
        list(pair_curves(tiny(), step=0.5))


def test_command(tmp_path):
    save_potential(tiny(), tmp_path / "m.safetensors")
    arguments = [
        "pairs",
        tmp_path / "m.safetensors",
        "-o",
        tmp_path / "out",
        "--pairs",
        "C-O,H-H",
        "--step",
        0.2,
    ]
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "C-O: no wall" in result.output and "2 of 2 pairs flagged; pairs.csv" in result.output


def test_earlier_name_of_the_command_is_hidden():
    commands = typer.main.get_command(app).commands
    assert commands["dimer"].hidden and commands["dimer"].help == commands["pairs"].help


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": [("H", "N")]}, "the model has no pair H-N; its elements are H, C, O"),
        ({"start": 0}, "start must be a distance between 0 and the cutoff, 4 Angstrom, got 0"),
        ({"start": 4.5}, "start must be a distance between 0 and the cutoff, 4 Angstrom, got 4.5"),
        ({"step": 0}, "step must be between 0 and 3.8 Angstrom, got 0"),
        ({"step": 4}, "step must be between 0 and 3.8 Angstrom, got 4"),
    ],
)
def test_refusals(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        scan_pairs(tiny(), tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["Si", "Si-", "Si-O-O", "Q-O", "X-O", ""])
def test_pairs_must_be_elements(text):
    with pytest.raises(ValueError, match="pairs are written as Si-O,O-O"):
        parse_pairs(text)
