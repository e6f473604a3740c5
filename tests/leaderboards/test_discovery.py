"""Matbench Discovery: formation energies and hull distances by hand, missing predictions, the whole command."""

import gzip
import json
import os
import signal

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

from bench_cases import (
    REFERENCES,
    alloys,
    command,
    dft_settings,
    gzipped,
    published,
    published_alloys,
    rows,
    saved_model,
    screened_alloys,
)
from dpa4.leaderboards import discovery, score_structures
from dpa4.leaderboards.discovery import _Corrector, pymatgen_structure, read_summary
from dpa4.simulation import DPA4Calculator, relax
from helpers import crystal

# One of four atoms moved by 0.3 Angstrom: after subtraction of the mean, it is 0.225 off and the others 0.075.
MOVED = ((0.225**2 + 3 * 0.075**2) / 4) ** 0.5 / (3.75**3 / 4) ** (1 / 3)


def entry_of(atoms: Atoms) -> dict:
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    parameters = dft_settings(atoms.symbols)
    return ComputedStructureEntry(pymatgen_structure(atoms), -50.0, parameters=parameters).as_dict()


def test_formation_energy_by_hand():
    """Energy of Mg4O4: oxide correction -0.687 eV per O; elements -1.5 (Mg) and -4.9 eV (O)."""
    atoms = bulk("MgO", "rocksalt", a=4.2, cubic=True)
    corrector, dft = _Corrector({"Mg": -1.5, "O": -4.9}), entry_of(atoms)
    found = corrector.score(atoms, -48.0, dft)
    assert found["corrected_energy"] == pytest.approx(-48 - 4 * 0.687)
    assert found["e_form"] == pytest.approx((-50.748 + 6 + 19.6) / 8)
    assert found["rmsd"] == pytest.approx(0, abs=1e-9)
    # every O moved by 0.4 A: less the mean, all atoms are 0.2 A off; an atom has a cube of 2.1 A
    moved = atoms.copy()
    moved.positions[atoms.numbers == 8, 0] += 0.4
    assert corrector.score(moved, -48.0, dft)["rmsd"] == pytest.approx(0.2 / 2.1)
    # farther than stol, one cube edge per atom, nothing matches; and a volume that changed is not scaled away
    swollen = atoms.copy()
    swollen.set_cell(1.5 * atoms.cell.array, scale_atoms=True)
    assert corrector.score(swollen, -48.0, dft)["rmsd"] is None
    with pytest.raises(ValueError, match="the structure is Mg4 O4, but the DFT entry is"):
        corrector.score(atoms, -48.0, entry_of(bulk("MgO", "rocksalt", a=4.2)))


def test_metrics_of_relaxed_structures(tmp_path):
    data, run = published_alloys(tmp_path / "data"), screened_alloys(tmp_path / "run")
    state, score = score_structures(run, data, progress=False)
    assert (state.done, score.structures, score.relaxed, score.failed) == (3, 3, 3, 0)
    found = rows(run / "discovery.csv")
    assert [row["material_id"] for row in found] == ["wbm-1-1", "wbm-1-2", "wbm-1-3"]
    assert [float(row["e_form_per_atom"]) for row in found] == [-0.4, -0.4, -0.4]
    # predicted 0.1 eV/atom below DFT, so that everything seems stable: -0.05 - 0.1 and 0.05 - 0.1
    assert [float(row["e_above_hull_pred"]) for row in found] == [-0.15, -0.05, -0.05]
    unique = score.stability["unique_prototypes"]
    assert (unique.TP, unique.FP, unique.FN, unique.TN) == (1, 1, 0, 0)
    assert unique.MAE == pytest.approx(0.1)
    np.testing.assert_allclose([float(row["rmsd"]) for row in found], [0, MOVED, 0], atol=1e-7)  # 8 decimals
    assert score.rmsd == pytest.approx(MOVED / 3, abs=1e-7)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stability"]["unique_prototypes"]["F1"] == unique.F1
    assert (run / "hull.png").stat().st_size > 1000


def test_a_crystal_that_was_not_relaxed_is_a_missing_prediction(tmp_path):
    data = published_alloys(tmp_path / "data")
    run = screened_alloys(tmp_path / "run", failed=("wbm-1-1", "wbm-1-3"))
    _, score = score_structures(run, data, progress=False)
    assert (score.relaxed, score.failed) == (1, 2)
    unique = score.stability["unique_prototypes"]
    assert (unique.missing_preds, unique.FN, unique.FP) == (1, 1, 1)
    assert score.rmsd == pytest.approx((1 + MOVED + 1) / 3)
    assert rows(run / "discovery.csv")[0]["error"] == "refused: element Au is not in the model"


def test_an_energy_that_cannot_be_corrected_is_a_missing_prediction(tmp_path, monkeypatch):
    data, run = published_alloys(tmp_path / "data"), screened_alloys(tmp_path / "run")
    score_of = _Corrector.score

    def refuse(self, atoms, energy, dft):
        if len(set(atoms.symbols)) == 1:
            raise ValueError("MaterialsProject2020Compatibility refuses the entry")
        return score_of(self, atoms, energy, dft)

    monkeypatch.setattr(_Corrector, "score", refuse)
    state, score = score_structures(run, data, progress=False)
    assert (state.failed, score.failed) == (1, 1) and "refuses the entry" in state.reason
    assert "refuses the entry" in rows(run / "discovery.csv")[2]["error"]


def test_what_differs_from_the_leaderboard_is_told(tmp_path):
    data = published_alloys(tmp_path / "data")
    same = screened_alloys(tmp_path / "same", fmax=0.05)
    assert score_structures(same, data, progress=False)[1].differences == ()
    other = screened_alloys(tmp_path / "other", fmax=0.02, steps=300, cell="fixed")
    content = gzip.decompress((data / "wbm/2023-12-13-wbm-summary.csv.gz").read_bytes()).decode()
    gzipped(data / "wbm/2023-12-13-wbm-summary.csv.gz", content + "wbm-1-4,Cu,-0.3,0.1,True\n")
    assert score_structures(other, data, progress=False)[1].differences == (
        "max_force = 0.02 (runner of the leaderboard: 0.05)",
        "max_steps = 300 (runner of the leaderboard: 500)",
        "cell_filter = fixed, 0.0 GPa (runner of the leaderboard: FrechetCellFilter)",
        "3 crystals (the whole test set: 4)",
    )


def test_scores_go_on_after_an_interruption(tmp_path, monkeypatch):
    data, run = published_alloys(tmp_path / "data"), screened_alloys(tmp_path / "run", model="x")
    calls = []
    score_of = _Corrector.score

    def counting(self, atoms, energy, dft):
        calls.append(str(atoms.symbols))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return score_of(self, atoms, energy, dft)

    monkeypatch.setattr(_Corrector, "score", counting)
    state, score = score_structures(run, data, progress=False)
    assert (state.done, state.interrupted, score) == (2, True, None)
    _, score = score_structures(run, data, progress=False)
    assert len(calls) == 3 and score.structures == 3  # none is evaluated twice
    marker = run / "shards" / "0-of-1.json"  # relaxed anew with other weights
    marker.write_text(marker.read_text().replace('"model": "x"', '"model": "y"'))
    with pytest.raises(ValueError, match="model = 'y', but .* holds results with model = 'x'"):
        score_structures(run, data, progress=False)


def test_names_must_be_those_of_the_test_set(tmp_path, monkeypatch):
    data, run = published_alloys(tmp_path / "data"), screened_alloys(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no finished run of dpa4 screen in"):
        score_structures(tmp_path / "none", data, progress=False)
    table = (run / "screen.csv").read_text()
    (run / "screen.csv").write_text(table.replace(",wbm-1-2,", ",mp-1,"))
    with pytest.raises(
        ValueError, match=r"structure 1 \(wbm.zip, wbm-1-2\) has the material_id 'mp-1', which"
    ):
        score_structures(run, data, progress=False)
    (run / "screen.csv").write_text(table.replace(",wbm-1-2,", ",wbm-1-1,"))
    with pytest.raises(ValueError, match="two structures have the material_id 'wbm-1-1'"):
        score_structures(run, data, progress=False)
    (run / "screen.csv").write_text(table)
    monkeypatch.setattr(discovery, "read_entries", lambda path: iter(()))
    with pytest.raises(ValueError, match="has no entry of wbm-1-1, wbm-1-2, wbm-1-3; download it again"):
        score_structures(run, data, progress=False)


def test_summary_without_a_column(tmp_path):
    gzipped(tmp_path / "summary.csv.gz", "material_id,formula\nwbm-1-1,Cu\n")
    with pytest.raises(
        ValueError, match="lacks the columns e_form_per_atom_mp2020_corrected, .*unique_prototype"
    ):
        read_summary(tmp_path / "summary.csv.gz")


def crystals_of_the_model() -> dict[str, Atoms]:
    """Two crystals that relax in about thirty steps."""
    found = {f"wbm-1-{seed}": crystal(seed) for seed in range(2)}
    for name, atoms in found.items():
        atoms.info["material_id"] = name
    return found


def test_command_from_published_files_to_metrics(tmp_path):
    """Two processes relax crystals to the energies of ASE; copper is not in the model."""
    pytest.importorskip("torch_sim")
    crystals = crystals_of_the_model() | {"wbm-1-3": alloys()["wbm-1-3"]}
    data = published(tmp_path / "data", crystals, dict.fromkeys(crystals, 0.0), set(crystals))
    model, run = saved_model(tmp_path), tmp_path / "run"
    arguments = ("discovery", model, "--data", data, "-o", run, "--fmax", 0.005, "--world-size", 2)
    arguments += ("--device", "cpu", "--dtype", "float64")
    assert "shard 1 of 2 is finished, others are not" in command(*arguments, "--rank", 1)
    output = command(*arguments, "--rank", 0)
    assert "1 converged, 1 refused" in output and "2 formation energies, none failed" in output
    assert "differs from the leaderboard: max_force = 0.005 (runner" in output and "max_steps" not in output
    assert "missing 1" in output and "RMSD" in output
    table, relaxed = rows(run / "discovery.csv"), read(run / "relaxed.xyz", ":")
    assert [row["material_id"] for row in table] == list(crystals)
    assert [atoms.info["material_id"] for atoms in relaxed] == ["wbm-1-0", "wbm-1-1"]
    assert "not in" in table[2]["error"] and not table[2]["e_form_per_atom"]
    calculator = DPA4Calculator(model, device="cpu", dtype="float64")
    for row, atoms in zip(table, relaxed, strict=False):
        expected = relax(crystals[row["material_id"]], calculator, fmax=0.005, cell="full")
        # both end with forces below 0.005 eV/Angstrom, about 0.1 Angstrom apart; the relaxation gains 0.012 eV
        assert float(row["energy"]) == pytest.approx(expected.energy, abs=1e-3)
        assert expected.initial_energy - expected.energy > 0.01
        elements = sum(REFERENCES[symbol] for symbol in atoms.symbols)
        formation = (float(row["corrected_energy"]) - elements) / len(atoms)
        assert float(row["e_form_per_atom"]) == pytest.approx(formation, abs=5e-5)  # four decimals
    # all crystals are relaxed, and the scores stay the same
    before = (run / "scores.jsonl").read_text()
    assert command(*arguments, "--rank", 0) == output
    assert (run / "scores.jsonl").read_text() == before
    assert "holds results with steps = 500; choose" in command(*arguments, "--steps", 9, ok=False)


def test_dpa4_screen_leaves_what_the_command_goes_on_with(tmp_path):
    pytest.importorskip("torch_sim")
    from typer.testing import CliRunner

    from dpa4.cli import app

    crystals = crystals_of_the_model()
    data = published(tmp_path / "data", crystals, dict.fromkeys(crystals, 0.0), set(crystals))
    write(tmp_path / "start.xyz", list(crystals.values()), format="extxyz")
    common = ["-o", tmp_path / "run", "--steps", 1, "--fmax", 0.001, "--device", "cpu", "--dtype", "float64"]
    model = saved_model(tmp_path)
    screen = ["screen", model, tmp_path / "start.xyz", "--cell", "full", *common]
    assert CliRunner().invoke(app, [str(a) for a in screen]).exit_code == 0
    frames = (tmp_path / "run" / "shards" / "0-of-1.xyz").read_bytes()
    structures = ("--structures", tmp_path / "start.xyz")
    output = command("discovery", model, "--data", data, *structures, *common)
    assert "2 unconverged" in output and "full_test_set: F1" in output
    assert (tmp_path / "run" / "shards" / "0-of-1.xyz").read_bytes() == frames  # relaxed once
