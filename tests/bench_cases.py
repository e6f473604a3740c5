"""Helpers for the tests of the leaderboards: small runs, and published files to compare them with."""

import csv
import gzip
import json
import os
import signal
import zipfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.leaderboards import files
from dpa4.potential import save_potential
from dpa4.simulation.runs.shards import Shard, join_shards
from helpers import random_potential

POTENTIAL = random_potential(n_blocks=1, lmax=1)
POTCARS = {"Cu": "Cu_pv", "Au": "Au", "Mg": "Mg_pv", "O": "O", "C": "C", "H": "H"}
REFERENCES = {"Cu": -0.1, "Au": -0.2, "C": -0.3, "H": -0.4, "O": -0.5}  # eV per atom of the elements


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gzipped(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


def saved_model(folder: Path) -> Path:
    save_potential(POTENTIAL, folder / "model.safetensors")
    return folder / "model.safetensors"


def command(*arguments: object, ok: bool = True) -> str:
    """Output of a dpa4 bench command, in one line."""
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert (result.exit_code == 0) == ok, result.output
    return result.output.replace("\n", " ")


class Interrupting:
    """Calculator wrapper that sends Ctrl-C at one evaluation."""

    def __init__(self, calculator, at: int):
        self.calculator, self.at, self.evaluations = calculator, at, 0
        inner = calculator.calculate

        def calculate(*arguments, **options):
            self.evaluations += 1
            if self.evaluations == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            inner(*arguments, **options)

        calculator.calculate = calculate


# Discovery


def dft_settings(symbols) -> dict:
    """Settings of a DFT entry as in the Materials Project, without U."""
    potcars = [f"PBE {POTCARS[s]}" for s in sorted(set(symbols))]
    return {"run_type": "GGA", "hubbards": {}, "is_hubbard": False, "potcar_symbols": potcars}


def alloys() -> dict[str, Atoms]:
    """Three alloys of four atoms on the fcc lattice, named in their info."""
    found = {}
    for name, symbols in {"wbm-1-1": "Cu3Au", "wbm-1-2": "CuAu3", "wbm-1-3": "Cu4"}.items():
        found[name] = bulk("Cu", a=3.75, cubic=True)
        found[name].symbols = Atoms(symbols).symbols
        found[name].info["material_id"] = name
    return found


def published(folder: Path, crystals: dict[str, Atoms], hull: dict[str, float], unique: set[str]) -> Path:
    """Folder of published files for some crystals, which are the DFT structures, too.

    All DFT formation energies are -0.3 eV/atom; ``hull`` holds the energies above the hull, in eV/atom.
    """
    from pymatgen.core import Structure
    from pymatgen.entries.computed_entries import ComputedEntry, ComputedStructureEntry

    (folder / "wbm").mkdir(parents=True)
    lines, summary = [], []
    with zipfile.ZipFile(folder / files.WBM_INITIAL.path, "w") as archive:
        for name, atoms in crystals.items():
            write(folder / "one.extxyz", atoms, format="extxyz")
            archive.write(folder / "one.extxyz", f"{name}.extxyz")
            structure = Structure(atoms.cell.array, atoms.symbols, atoms.get_scaled_positions())
            entry = ComputedStructureEntry(structure, -1.0, parameters=dft_settings(atoms.symbols))
            lines.append(json.dumps({"material_id": name, "computed_structure_entry": entry.as_dict()}))
            summary.append(f"{name},{atoms.symbols},-0.3,{hull[name]},{name in unique}")
    gzipped(folder / files.WBM_ENTRIES.path, "\n".join(lines) + "\n")
    columns = "material_id,formula,e_form_per_atom_mp2020_corrected,e_above_hull_mp2020_corrected_ppd_mp,"
    gzipped(folder / files.WBM_SUMMARY.path, "\n".join([columns + "unique_prototype", *summary]) + "\n")
    entries = {e: ComputedEntry(e, energy).as_dict() for e, energy in REFERENCES.items()}
    gzipped(folder / files.MP_REFERENCES.path, json.dumps(entries))
    return folder


def published_alloys(folder: Path) -> Path:
    """Published files of the alloys: the first is stable by DFT, the third is not a unique prototype."""
    hull = {"wbm-1-1": -0.05, "wbm-1-2": 0.05, "wbm-1-3": 0.05}
    return published(folder, alloys(), hull, {"wbm-1-1", "wbm-1-2"})


def screened_alloys(folder: Path, failed: tuple[str, ...] = (), **settings) -> Path:
    """Results of dpa4 screen for the alloys: formation energies of -0.4 eV/atom, 0.1 below those of DFT.

    One gold atom of the second alloy has moved by 0.3 Angstrom.
    """
    identity = {"model": "", "dtype": "float32", "precision": "high"}
    settings = identity | {"fmax": 0.02, "steps": 500, "cell": "full", "pressure": 0.0} | settings
    columns = ("structure", "source", "material_id", "status", "reason", "steps", "energy")
    shard = Shard(folder, columns, settings)
    for number, (name, atoms) in enumerate(alloys().items()):
        row = {"structure": number, "source": f"wbm.zip, {name}", "material_id": name, "steps": 7}
        if name in failed:
            shard.record(row | {"status": "refused", "reason": "element Au is not in the model"})
            continue
        energy = sum(REFERENCES[symbol] for symbol in atoms.symbols) - 0.4 * len(atoms)
        if name == "wbm-1-2":
            atoms.positions[1, 0] += 0.3
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((4, 3)))
        shard.record(row | {"status": "converged", "energy": energy}, atoms)
    shard.finish(3)
    shard.close()
    assert join_shards(folder, 1)
    return folder


# Conductivity


def argon() -> LennardJones:
    return LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0, smooth=True)


# The submission

METADATA = """
model_name: DPA4-test
model_key: dpa4-test
model_version: v2026.08.01
dates: {benchmark_added: '2026-08-01', paper_published: '2026-06-11'}
authors:
- {name: A. Author, affiliation: Somewhere, email: author@example.org}
repo: https://example.org/code
doi: https://doi.org/10.48550/arXiv.2606.02419
paper: https://arxiv.org/abs/2606.02419
pr_url: https://example.org/pull/1
checkpoint_url: https://example.org/weights
license: {code: MIT, checkpoint: MIT}
training_sets: [MPtrj]
training_cost: {entries: [{hardware: NVIDIA H100, count: 1, hours_per_device: 10}]}
hyperparams: {upstream_config: {lmax: 2}}
"""
