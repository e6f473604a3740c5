"""Submissions: YAML file and artifacts, and refusal of runs that do not belong together."""

import csv
import datetime
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from bench_cases import (
    METADATA,
    POTENTIAL,
    argon,
    command,
    published_alloys,
    saved_model,
    screened_alloys,
)
from dpa4.leaderboards import (
    run_diatomics,
    score_diatomics,
    score_kappa,
    score_structures,
    write_submission,
)
from dpa4.leaderboards.kappa import ReferenceKappa
from dpa4.leaderboards.submission import read_metadata
from dpa4.simulation.runs.store import Records


def conductivities(folder: Path) -> Path:
    """A crystal with half the conductivity of DFT in every mode, and one with imaginary frequencies."""
    settings = {"task": "kappa", "model": "", "dtype": "float64", "force_max": 1e-4, "max_steps": 300}
    kappa = {"kappa_tot_rta": [[3.0] * 6], "mode_kappa_tot_rta": [[[[1.0] * 6] * 3]], "mode_weights": [1]}
    symmetry = {"init_spg_num": 194, "final_spg_num": 194}
    with Records(folder, settings | {"displacement_distance": 0.03}) as records:
        records.append({"id": "mp-1", "has_imag_ph_modes": False, "q_points": [[0, 0, 0]]} | symmetry | kappa)
        records.append({"id": "mp-2", "has_imag_ph_modes": True} | symmetry)
    score_kappa(folder, {"mp-1": ReferenceKappa(6.0, np.full((1, 3), 2.0), None)})
    return folder


@pytest.fixture(scope="module")
def submission(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submission")
    runs = {
        "discovery": screened_alloys(folder / "discovery", failed=("wbm-1-3",)),
        "kappa": conductivities(folder / "kappa"),
        "diatomics": folder / "diatomics",
    }
    score_structures(runs["discovery"], published_alloys(folder / "data"), progress=False)
    run_diatomics(["Ar"], argon(), runs["diatomics"], progress=False)
    score_diatomics(runs["diatomics"])
    (folder / "metadata.yaml").write_text(METADATA)
    metadata, date = read_metadata(folder / "metadata.yaml"), datetime.date(2026, 8, 2)
    path, score = write_submission(saved_model(folder), metadata, folder / "out", date=date, **runs)
    return path, score, runs


def test_yaml_round_trip(submission):
    path, score, _ = submission
    assert path.parts[-3:] == ("models", "dpa4", "dpa4-test.yml")
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert document["authors"][0]["email"] == "author@example.org"
    assert document["model_params"] == sum(w.numel() for w in POTENTIAL.model.parameters())
    assert document["hyperparams"]["upstream_config"] == {"lmax": 2}
    evaluation = document["hyperparams"]["evaluation"]
    assert evaluation == {
        "max_force": 0.02, "max_steps": 500, "ase_optimizer": "FIRE", "cell_filter": "FrechetCellFilter",
        "kappa": {
            "protocol": "phonondb-v1", "displacement_distance": 0.03, "force_max": 1e-4, "max_steps": 300,
        },
    }  # fmt: skip
    assert document["hyperparams"]["architecture"]["graph_construction_radius"] == 4.0
    metrics = document["metrics"]
    unique = metrics["discovery"]["unique_prototypes"]
    assert (unique["TP"], unique["FP"], unique["F1"]) == (1, 1, 0.667)
    kappa = metrics["phonons"]["kappa_103"]
    assert (kappa["κ_SRME"], kappa["κ_SRE"]) == (0.6667, 0.6667)  # 2 * 3 / (3 + 6)
    # distances 0, 0.0550 (see screened_alloys) and 1 for the crystal that was not relaxed
    assert metrics["geo_opt"]["symprec=1e-2"] == {"rmsd": 0.3517, "n_structures": 2}
    assert "tortuosity" in metrics["diatomics"] and "smoothness" not in metrics["diatomics"]
    excluded = metrics["diatomics"]["excluded_formula_reasons"]
    assert len(excluded) == 86 and excluded["O-O"] == "not computed" and "Ar-Ar" not in excluded
    packages = [entry.partition("==")[0] for entry in document["environment"]["dependencies"]]
    assert packages == ["dpa4", "torch", "ase", "torch-sim-atomistic"]
    # 0.5 * 2/3 + 0.4 * (1 - 1/3) and nothing for an RMSD above 0.15
    assert score == pytest.approx(0.6)


def unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def test_artifacts_can_be_read_back(submission):
    path, _, runs = submission
    folder = path.with_suffix("")
    names = {"discovery.csv.gz", "geo-opt.jsonl.gz", "phonons-kappa-103.json.gz", "diatomics.json.gz"}
    assert {p.name for p in folder.iterdir()} == {f"2026-08-02-{name}" for name in names}
    reference = yaml.safe_load(path.read_text(encoding="utf-8"))["metrics"]["discovery"]["pred_file"]
    content = (folder.parents[2] / reference["name"]).read_bytes()
    assert reference["md5"] == hashlib.md5(content).hexdigest() and reference["size"] == len(content)
    table = list(csv.DictReader(unpacked(folder / "2026-08-02-discovery.csv.gz").splitlines()))
    assert table == [
        {"material_id": "wbm-1-1", "e_form_per_atom": "-0.4"},
        {"material_id": "wbm-1-2", "e_form_per_atom": "-0.4"},
        {"material_id": "wbm-1-3", "e_form_per_atom": ""},
    ]
    lines = [json.loads(line) for line in unpacked(folder / "2026-08-02-geo-opt.jsonl.gz").splitlines()]
    assert [line["material_id"] for line in lines] == ["wbm-1-1", "wbm-1-2"]
    assert [site["label"] for site in lines[1]["structure"]["sites"]] == ["Cu", "Au", "Au", "Au"]
    assert lines[1]["structure"]["sites"][1]["xyz"][0] == pytest.approx(0.3)
    assert lines[0]["energy"] == pytest.approx(3 * -0.1 - 0.2 - 1.6) and lines[0]["converged"] is True
    kappas = json.loads(unpacked(folder / "2026-08-02-phonons-kappa-103.json.gz"))
    assert [row["material_id"] for row in kappas] == ["mp-1", "mp-2"]
    assert kappas[1]["conductivity_skipped"] and "kappa_tot_rta" not in kappas[1]
    curves = json.loads(unpacked(folder / "2026-08-02-diatomics.json.gz"))
    assert np.shape(curves["homo-nuclear"]["Ar-Ar"]["forces"]) == (119, 2, 3)


def test_submission_refuses_what_does_not_belong_together(tmp_path, submission):
    _, _, runs = submission
    model, metadata = saved_model(tmp_path), yaml.safe_load(METADATA)
    with pytest.raises(ValueError, match="holds a run of the task 'kappa', not of 'discovery'"):
        write_submission(model, metadata, tmp_path, discovery=runs["kappa"])
    run_diatomics(["Ar"], argon(), tmp_path / "other", model="another", progress=False)
    with pytest.raises(ValueError, match="the runs belong to different models"):
        write_submission(model, metadata, tmp_path, kappa=runs["kappa"], diatomics=tmp_path / "other")
    with pytest.raises(
        FileNotFoundError, match="summary.json does not exist; finish the task with dpa4 bench diatomics"
    ):
        write_submission(model, metadata, tmp_path, diatomics=tmp_path / "other")
    with pytest.raises(ValueError, match="'kappa': '', 'the model file': 'sha256:1'"):
        write_submission(model, metadata, tmp_path, kappa=runs["kappa"], fingerprint="sha256:1")
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        write_submission(model, metadata, tmp_path, kappa=tmp_path / "nothing")


def test_command_refuses_runs_of_another_model(tmp_path, submission):
    _, _, runs = submission
    (tmp_path / "metadata.yaml").write_text(METADATA)
    arguments = (
        "yaml",
        saved_model(tmp_path),
        "--metadata",
        tmp_path / "metadata.yaml",
        "-o",
        tmp_path / "out",
    )
    assert "the runs belong to different models" in command(*arguments, "--kappa", runs["kappa"], ok=False)
    output = command(*arguments)
    assert (tmp_path / "out" / "models" / "dpa4" / "dpa4-test.yml").exists() and "CPS" not in output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name: x", "lacks model_key .*license .mapping with code"),
        (METADATA + "metrics: {}", "has entries that are computed: metrics; remove them"),
        (METADATA.replace("dpa4-test", "../x"), "model_key = '../x' in .*; use only letters"),
        ("[1", "is not valid YAML: line 1, column 3: "),
        ("- 1", "must be a mapping with model_name"),
    ],
)
def test_metadata_is_checked(tmp_path, text, message):
    (tmp_path / "metadata.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / "metadata.yaml")
    with pytest.raises(FileNotFoundError, match="it must hold model_name, model_key"):
        read_metadata(tmp_path / "none.yaml")
