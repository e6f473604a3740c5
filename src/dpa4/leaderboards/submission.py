"""Submission to Matbench Discovery: the YAML file of a model and the artifacts that it names."""

import csv
import datetime
import gzip
import hashlib
import io
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import yaml

from dpa4.leaderboards import protocol
from dpa4.leaderboards.diatomics import SCORED
from dpa4.leaderboards.discovery import PREDICTION, pymatgen_structure
from dpa4.leaderboards.metrics import combined_performance_score
from dpa4.output import atomic_write, read_csv
from dpa4.parsing import read_yaml
from dpa4.potential.checkpoint import read_checkpoint
from dpa4.simulation.runs.shards import FinishedScreening
from dpa4.simulation.runs.store import Record, Records, read_settings
from dpa4.system import user_path

MAX_NEIGHBORS = "missing"  # the number of neighbours is not limited
REQUIRED = {
    "model_name": "name on the leaderboard",
    "model_key": "letters, digits and . + - only; the name of the files",
    "model_version": "for example v2026.08.01",
    "dates": "mapping with benchmark_added and paper_published, each as 'YYYY-MM-DD'",
    "authors": "list of mappings with name, affiliation, email, orcid; the first needs an email",
    "repo": "URL of the code",
    "doi": "URL https://doi.org/...",
    "paper": "URL of the paper",
    "pr_url": "URL of the pull request",
    "checkpoint_url": "URL of the weights",
    "license": "mapping with code, code_url, checkpoint, checkpoint_url",
    "training_sets": "list, for example [MPtrj]",
    "training_cost": "mapping with entries: list of hardware, count, hours_per_device",
}
DEFAULTS: Record = {
    "lifecycle": "active",
    "openness": "OSOD",
    "architecture_types": ["gnn"],
    "train_task": "S2EFS",
    "test_task": "IS2RE-SR",
    "targets": "EFS_G",
}
COMPUTED = ("environment", "model_params", "metrics")


def read_metadata(path: Path) -> Record:
    """Read the metadata that only the submitter knows from a YAML file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the content is not a mapping, lacks an entry, or has an entry that is computed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; it must hold {', '.join(REQUIRED)}")
    metadata = read_yaml(path)
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} must be a mapping with {', '.join(REQUIRED)}")
    if missing := [name for name in REQUIRED if not metadata.get(name)]:
        raise ValueError(f"{path} lacks " + "; ".join(f"{name} ({REQUIRED[name]})" for name in missing))
    if not re.fullmatch(r"[a-zA-Z0-9.+-]+", key := str(metadata["model_key"])):
        raise ValueError(f"model_key = {key!r} in {path}; use only letters, digits and . + -")
    if given := [name for name in COMPUTED if name in metadata]:
        raise ValueError(f"{path} has entries that are computed: {', '.join(given)}; remove them")
    return metadata


def write_submission(
    model: str | Path,
    metadata: Mapping[str, Any],
    output: str | Path,
    *,
    discovery: Path | None = None,
    kappa: Path | None = None,
    diatomics: Path | None = None,
    branch: str | None = None,
    fingerprint: str | None = None,
    date: datetime.date | None = None,
) -> tuple[Path, float | None]:
    """Write models/dpa4/{key}.yml and the artifacts in models/dpa4/{key}/, as in the leaderboard's repository.

    The artifacts are {date}-discovery.csv.gz, {date}-geo-opt.jsonl.gz, {date}-phonons-kappa-103.json.gz and
    {date}-diatomics.json.gz. The tools of the leaderboard's repository add their URLs (``url``) and the statistics of
    symmetries.

    Args:
        model: Model file.
        metadata: Result of ``read_metadata``; its ``hyperparams`` are merged with the known ones.
        output: Output folder, created if absent.
        discovery: Folder of the discovery task.
        kappa: Folder of the conductivities.
        diatomics: Folder of the diatomic molecules.
        branch: Branch of a multitask checkpoint of deepmd-kit.
        fingerprint: Required ``model`` of all runs, see `dpa4.potential.fingerprint_of`; None only requires that all
            runs have the same one.
        date: Date in the names of the artifacts; None for today.

    Returns:
        Path of the YAML file, and the combined performance score; None if discovery or conductivities are missing.

    Raises:
        FileNotFoundError: If a task is not finished.
        ValueError: If the folders belong to different models or to other tasks.
    """
    stored = read_checkpoint(user_path(model), branch)
    key = str(metadata["model_key"])
    folder = user_path(output) / "models" / "dpa4" / key
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{(date or datetime.date.today()).isoformat()}-"
    runs = {"discovery": discovery, "kappa": kappa, "diatomics": diatomics}
    given = {task: _check(task, path) for task, path in runs.items() if path is not None}
    _check_same_model(given, fingerprint)
    metrics: Record = {}
    evaluation: Record = {}
    packages = ["dpa4", "torch", "ase"]
    summaries = {task: _summary(task, runs[task]) for task in given}
    if discovery is not None:
        settings = given["discovery"]
        evaluation |= {name: settings[name] for name in protocol.DISCOVERY}
        packages.append("torch-sim-atomistic")
        metrics |= _discovery(discovery, summaries["discovery"], stem, folder)
    if kappa is not None:
        settings = given["kappa"]
        evaluation["kappa"] = {"protocol": "phonondb-v1"} | {name: settings[name] for name in protocol.KAPPA}
        metrics["phonons"] = {"kappa_103": _kappa(kappa, summaries["kappa"], stem, folder)}
    if diatomics is not None:
        metrics["diatomics"] = _diatomics(diatomics, summaries["diatomics"], stem, folder)
    own = {
        "evaluation": evaluation,
        "architecture": {"graph_construction_radius": stored.config.cutoff, "max_neighbors": MAX_NEIGHBORS},
    }
    document = {
        **metadata,
        "environment": {
            "dependencies": [f"{name}=={version(name)}" for name in packages],
            "python_version": ".".join(platform.python_version_tuple()[:2]),
        },
        "model_params": sum(weight.numel() for weight in stored.weights.values()),
        "hyperparams": {**metadata.get("hyperparams", {}), **own},
        "metrics": metrics,
    }
    for name, value in DEFAULTS.items():
        document.setdefault(name, value)
    path = folder.with_name(f"{key}.yml")
    with atomic_write(path) as temporary:
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
        temporary.write_text(text, encoding="utf-8")
    return path, _cps(summaries)


def _check(task: str, folder: Path) -> Record:
    """Return the settings of a run after checking that it is one of this task."""
    settings = read_settings(folder)
    if settings.get("task") != task:
        raise ValueError(f"{folder} holds a run of the task {settings.get('task')!r}, not of {task!r}")
    return settings


def _check_same_model(settings: Mapping[str, Record], fingerprint: str | None) -> None:
    models = {task: found["model"] for task, found in settings.items()}
    if fingerprint is not None:
        models["the model file"] = fingerprint
    if len(set(models.values())) > 1:
        raise ValueError(f"the runs belong to different models: {models}; run the tasks with one model")


def _summary(task: str, folder: Path | None) -> Record:
    path = user_path(folder or "") / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; finish the task with dpa4 bench {task}")
    return json.loads(path.read_text(encoding="utf-8"))


def _cps(summaries: Mapping[str, Record]) -> float | None:
    """Combined performance score; None if a task it needs is missing or has no F1."""
    if not {"discovery", "kappa"} <= set(summaries):
        return None
    f1 = summaries["discovery"]["stability"]["unique_prototypes"]["F1"]
    if f1 is None:
        return None
    return combined_performance_score(f1, summaries["kappa"]["kappa_SRME"], summaries["discovery"]["rmsd"])


def _discovery(run: Path, summary: Record, stem: Path, folder: Path) -> Record:
    """Write the artifacts of discovery and geo_opt; return these sections of the metrics."""
    table = Path(f"{stem}discovery.csv.gz")
    with _compressed(table) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("material_id", PREDICTION))
        for row in read_csv(run / "discovery.csv"):
            writer.writerow((row["material_id"], row[PREDICTION]))
    relaxed = Path(f"{stem}geo-opt.jsonl.gz")
    screening = FinishedScreening(run)
    with _compressed(relaxed) as file:
        for row in screening.rows:
            if row["frame"] == "True":
                structure = pymatgen_structure(screening.atoms(int(row["structure"]))).as_dict()
                line = {"material_id": row["material_id"], "structure": structure, "energy": float(row["energy"]),
                        "converged": row["status"] == "converged", "n_steps": int(row["steps"])}  # fmt: skip
                file.write(json.dumps(line) + "\n")
    stability = {
        subset: {
            name: value if isinstance(value, int) else None if value is None else round(value, 3)
            for name, value in m.items()
        }
        for subset, m in summary["stability"].items()
    }
    return {
        "discovery": {"pred_file": _reference(table, folder), **stability},
        "geo_opt": {
            "pred_file": _reference(relaxed, folder),
            "symprec=1e-2": {"rmsd": round(summary["rmsd"], 4), "n_structures": summary["relaxed"]},
        },
    }


def _kappa(run: Path, summary: Record, stem: Path, folder: Path) -> Record:
    """Write the artifact of the conductivities; return their section of the metrics."""
    path = Path(f"{stem}phonons-kappa-103.json.gz")
    with Records(run, read_settings(run)) as records, _compressed(path) as file:
        rows = []
        for record in records:
            failed = "has_imag_ph_modes" not in record or record["has_imag_ph_modes"]
            row = {
                "material_id": record["id"],
                **{k: v for k, v in record.items() if k not in ("id", "error")},
            }
            row["errors"] = [record["error"]] if "error" in record else []
            rows.append(row | ({"conductivity_skipped": True} if failed else {}))
        json.dump(rows, file)
    return {
        "κ_SRME": round(summary["kappa_SRME"], 4),
        "κ_SRE": round(summary["kappa_SRE"], 4),
        "pred_file": _reference(path, folder),
    }


def _diatomics(run: Path, summary: Record, stem: Path, folder: Path) -> Record:
    """Write the artifact of the diatomic molecules; return their section of the metrics."""
    path = Path(f"{stem}diatomics.json.gz")
    settings = read_settings(run)
    with Records(run, settings) as records, _compressed(path) as file:
        curves = {
            f"{r['id']}-{r['id']}": {n: r[n] for n in ("distances", "energies", "forces")}
            for r in records
            if "error" not in r
        }
        content = {"homo-nuclear": curves, "hetero-nuclear": {}, "distances": settings["distances"]}
        json.dump(content, file)
    reasons = {
        f"{e}-{e}": summary["failed"].get(e, "not computed") for e in SCORED if f"{e}-{e}" not in curves
    }
    unofficial = ("smoothness", "conservation_deviation")
    metrics = {n: float(f"{v:.4g}") for n, v in summary["metrics"].items() if n not in unofficial}
    return {
        "pred_file": _reference(path, folder),
        "run_time_sec": round(summary["run_time_sec"], 2),
        "excluded_formula_reasons": reasons,
        **metrics,
    }


@contextmanager
def _compressed(path: Path) -> Iterator[TextIO]:
    """Open a gzip file for writing. It has no time stamp, so equal content results in equal bytes."""
    with atomic_write(path) as temporary, temporary.open("wb") as raw:
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
            with io.TextIOWrapper(packed, encoding="utf-8") as text:
                yield text


def _reference(path: Path, folder: Path) -> Record:
    """Name, size and checksum of an artifact, for the YAML file."""
    content = path.read_bytes()
    return {
        "name": f"models/dpa4/{folder.name}/{path.name}",
        "size": len(content),
        "md5": hashlib.md5(content, usedforsecurity=False).hexdigest(),
    }
