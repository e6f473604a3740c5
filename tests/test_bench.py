"""Benchmark runs on small cases: known results, interruption and resumption, what is written, missing files."""

import csv
import gzip
import hashlib
import json
import os
import re
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import FIRE
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.data import Frame, read_frames
from dpa4.potential import save_potential
from dpa4.simulation import DPA4Calculator
from dpa4.simulation.bench import (
    files,
    kappa,
    relax_structures,
    run_diatomics,
    run_kappa,
    run_spice,
    score_diatomics,
    score_kappa,
    score_spice,
    score_structures,
    write_submission,
)
from dpa4.simulation.bench.diatomics import SCORED, evaluation_window, homonuclear_curve
from dpa4.simulation.bench.discovery import _Corrector, read_structures
from dpa4.simulation.bench.leaderboard import read_metadata
from dpa4.simulation.bench.metrics import combined_performance_score
from dpa4.simulation.records import Interrupted, Records, run_items
from helpers import molecule, random_potential

POTCARS = {"Cu": "Cu_pv", "Au": "Au", "Mg": "Mg_pv", "O": "O"}


class Interrupting:
    """Wraps a calculator; sends Ctrl-C at one evaluation."""

    def __init__(self, calculator, at: int):
        self.calculator, self.at, self.evaluations = calculator, at, 0
        inner = calculator.calculate

        def calculate(*arguments, **options):
            self.evaluations += 1
            if self.evaluations == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            inner(*arguments, **options)

        calculator.calculate = calculate


def settings(symbols) -> dict:
    """Settings of a DFT entry as in the Materials Project, without U."""
    potcars = [f"PBE {POTCARS[s]}" for s in sorted(set(symbols))]
    return {"run_type": "GGA", "hubbards": {}, "is_hubbard": False, "potcar_symbols": potcars}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gzipped(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


# Records


def test_records_survive_a_torn_line_and_failures_are_tried_again(tmp_path):
    settings = {"task": "test", "model": "a"}
    attempts: list[str] = []

    def compute(item: int, _: list[int]) -> dict:
        attempts.append(str(item))
        if item == 2 and attempts.count("2") == 1:
            raise RuntimeError("out of memory")
        return {"square": item**2}

    def call() -> tuple:
        with Records(tmp_path, settings) as records:
            state = run_items([(str(i), i) for i in range(4)], 4, compute, records, title="x", progress=False)
            return state, {r["id"]: r.get("square") for r in records}

    state, found = call()
    assert state == (3, 1, False, "2: RuntimeError: out of memory")
    assert found == {"0": 0, "1": 1, "2": None, "3": 9}
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"id": "4", "squ')  # killed while writing
    state, found = call()
    assert (state.done, state.failed) == (4, 0)
    assert found == {"0": 0, "1": 1, "2": 4, "3": 9}
    assert attempts == ["0", "1", "2", "3", "2"]
    with pytest.raises(
        ValueError, match="model = 'b', but .* holds results with model = 'a'; choose another folder"
    ):
        Records(tmp_path, settings | {"model": "b"})
    with (
        Records(tmp_path, settings) as records,
        pytest.raises(ValueError, match="two structures have the name '0'"),
    ):
        run_items([("0", 0), ("0", 1)], 2, compute, records, title="x", progress=False)


def test_ctrl_c_between_items_and_within_one(tmp_path):
    def compute(item: int, stopped: list[int]) -> dict:
        if item == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if item == 1 and stopped and (tmp_path / "strict").exists():
            raise Interrupted
        return {}

    items = [(str(i), i) for i in range(3)]
    handler = signal.getsignal(signal.SIGINT)
    with Records(tmp_path / "a", {}) as records:
        state = run_items(items, 3, compute, records, title="x", progress=False)
    assert (state.done, state.interrupted) == (2, True)  # the item at hand was finished
    (tmp_path / "strict").touch()
    with Records(tmp_path / "b", {}) as records:
        state = run_items(items, 3, compute, records, title="x", progress=False)
    assert (state.done, state.interrupted) == (1, True)  # it was given up
    assert signal.getsignal(signal.SIGINT) is handler


# Discovery


def alloys() -> dict[str, Atoms]:
    """Alloys off their equilibrium, by name."""
    found = {}
    for name, symbols in {"wbm-1-1": "Cu3Au", "wbm-1-2": "CuAu3", "wbm-1-3": "Cu4"}.items():
        atoms = bulk("Cu", a=3.75, cubic=True)
        atoms.symbols = Atoms(symbols).symbols
        atoms.rattle(0.05, seed=1)
        found[name] = atoms
    return found


def wbm(folder: Path) -> dict[str, Atoms]:
    """A folder of published files for the alloys, whose structures of DFT are those EMT relaxes to."""
    from pymatgen.core import Structure
    from pymatgen.entries.computed_entries import ComputedEntry, ComputedStructureEntry

    starts = alloys()
    (folder / "wbm").mkdir(parents=True)
    with zipfile.ZipFile(folder / files.WBM_INITIAL.path, "w") as archive:
        for name, atoms in starts.items():
            write(folder / "one.extxyz", atoms, format="extxyz")
            archive.write(folder / "one.extxyz", f"{name}.extxyz")
    lines, summary = [], []
    for name, start in starts.items():
        atoms = start.copy()
        atoms.calc = EMT()
        FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=0.02, steps=500)
        structure = Structure(atoms.cell.array, atoms.symbols, atoms.get_scaled_positions())
        entry = ComputedStructureEntry(structure, -1.0, parameters=settings(start.symbols))
        lines.append(json.dumps({"material_id": name, "computed_structure_entry": entry.as_dict()}))
        energy = atoms.get_potential_energy() - sum({"Cu": -0.1, "Au": -0.2}[s] for s in atoms.symbols)
        # the first is stable by DFT, the others are not; the formation energies of DFT are 0.1 eV/atom higher
        hull = -0.05 if name == "wbm-1-1" else 0.05
        summary.append(f"{name},{atoms.symbols},{energy / 4 + 0.1},{hull},{name != 'wbm-1-3'}")
    gzipped(folder / files.WBM_ENTRIES.path, "\n".join(lines) + "\n")
    columns = "material_id,formula,e_form_per_atom_mp2020_corrected,e_above_hull_mp2020_corrected_ppd_mp,"
    gzipped(folder / files.WBM_SUMMARY.path, "\n".join([columns + "unique_prototype", *summary]) + "\n")
    references = {e: ComputedEntry(e, energy).as_dict() for e, energy in {"Cu": -0.1, "Au": -0.2}.items()}
    gzipped(folder / files.MP_REFERENCES.path, json.dumps(references))
    return starts


def relax_alloys(folder: Path, calculator, data: Path, **options):
    total, images = read_structures(data / files.WBM_INITIAL.path)
    return relax_structures(images, total, calculator, folder, progress=False, **options)


def test_discovery_from_files_to_metrics(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    wbm(data)
    assert relax_alloys(run, EMT(), data).done == 3
    state, score = score_structures(run, data, progress=False)
    assert (state.done, score.structures, score.failed) == (3, 3, 0)
    found = rows(run / "discovery.csv")
    assert [row["material_id"] for row in found] == ["wbm-1-1", "wbm-1-2", "wbm-1-3"]
    # predicted 0.1 eV/atom below DFT, so that everything seems stable: -0.05 - 0.1 and 0.05 - 0.1
    np.testing.assert_allclose(
        [float(r["e_above_hull_pred"]) for r in found], [-0.15, -0.05, -0.05], atol=1e-4
    )
    unique = score.stability["unique_prototypes"]
    assert (unique.TP, unique.FP, unique.FN, unique.TN) == (1, 1, 0, 0)
    assert unique.MAE == pytest.approx(0.1, abs=1e-9)  # three decimals
    # the same relaxation gave the structures of DFT
    assert score.rmsd == pytest.approx(0, abs=1e-8)
    assert json.loads((run / "summary.json").read_text())["stability"]["unique_prototypes"]["F1"] == unique.F1
    assert (run / "hull.png").stat().st_size > 1000


def test_formation_energy_by_hand():
    """Four MgO: oxide correction -0.687 eV per O; elements -1.5 (Mg) and -4.9 eV (O)."""
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    from dpa4.simulation.bench.discovery import pymatgen_structure

    atoms = bulk("MgO", "rocksalt", a=4.2, cubic=True)
    record = {"id": "x", "numbers": atoms.numbers, "cell": atoms.cell.array, "positions": atoms.positions}
    record["energy"] = -48.0
    dft = ComputedStructureEntry(
        pymatgen_structure(record), -50.0, parameters=settings(atoms.symbols)
    ).as_dict()
    found = _Corrector({"Mg": -1.5, "O": -4.9}).score(record, dft)
    assert found["corrected_energy"] == pytest.approx(-48 - 4 * 0.687)
    assert found["e_form"] == pytest.approx((-50.748 + 6 + 19.6) / 8)
    # every O moved by 0.4 A: less the mean, all atoms are 0.2 A off; an atom has a cube of 2.1 A
    moved = record | {"positions": atoms.positions + (atoms.numbers == 8)[:, None] * [0.4, 0, 0]}
    assert _Corrector({"Mg": -1.5, "O": -4.9}).score(moved, dft)["rmsd"] == pytest.approx(0.2 / 2.1)
    with pytest.raises(ValueError, match="the structure is Mg4 O4, that of DFT"):
        other = bulk("MgO", "rocksalt", a=4.2)
        small = {"numbers": other.numbers, "cell": other.cell.array, "positions": other.positions}
        entry = ComputedStructureEntry(
            pymatgen_structure(small), -12.0, parameters=settings(atoms.symbols)
        ).as_dict()
        _Corrector({"Mg": -1.5, "O": -4.9}).score(record, entry)


def test_a_crystal_that_fails_is_a_missing_prediction(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    wbm(data)

    class OnlyCopper(EMT):
        def calculate(self, atoms=None, *arguments):
            if "Au" in atoms.get_chemical_symbols():
                raise ValueError("element Au is not in the model")
            super().calculate(atoms, *arguments)

    state = relax_alloys(run, OnlyCopper(), data)
    assert (state.done, state.failed) == (1, 2)
    _, score = score_structures(run, data, progress=False)
    assert score.failed == 2 and score.stability["unique_prototypes"].missing_preds == 2
    assert score.stability["unique_prototypes"].FN == 1
    assert score.rmsd == pytest.approx(2 / 3)  # 1, 1 and 0
    assert rows(run / "discovery.csv")[0]["error"] == "ValueError: element Au is not in the model"


def test_discovery_goes_on_after_an_interruption(tmp_path):
    data = tmp_path / "data"
    wbm(data)
    calculator = Interrupting(EMT(), at=10)
    state = relax_alloys(tmp_path / "run", calculator.calculator, data)
    assert state.interrupted and state.done == 0
    calculator.at = calculator.evaluations + 40
    state = relax_alloys(tmp_path / "run", calculator.calculator, data)
    assert state.interrupted and 1 <= state.done < 3
    before = (tmp_path / "run" / "results.jsonl").read_text()
    assert relax_alloys(tmp_path / "run", EMT(), data)[:3] == (3, 0, False)
    assert (tmp_path / "run" / "results.jsonl").read_text().startswith(before)
    relax_alloys(tmp_path / "whole", EMT(), data)
    records = []
    for run in ("run", "whole"):
        lines = (tmp_path / run / "results.jsonl").read_text().splitlines()
        records.append([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines])
    assert records[0] == records[1]
    with pytest.raises(ValueError, match="max_steps = 3, but .* holds results with max_steps = 500"):
        relax_alloys(tmp_path / "run", EMT(), data, steps=3)


def test_parts_share_a_folder(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    wbm(data)
    assert relax_alloys(run, EMT(), data, part=(1, 2)).done == 2
    assert relax_alloys(run, EMT(), data, part=(2, 2)).done == 1
    assert {p.name for p in run.glob("*.jsonl")} == {"results-1-of-2.jsonl", "results-2-of-2.jsonl"}
    _, score = score_structures(run, data, progress=False)
    assert score.structures == 3 and score.failed == 0
    with pytest.raises(ValueError, match="part must be i/n with 1 <= i <= n, got 3/2"):
        relax_alloys(run, EMT(), data, part=(3, 2))


def test_files_of_structures(tmp_path):
    named = molecule()
    named.info["material_id"] = "mp-1"
    write(tmp_path / "some.xyz", [named, molecule(1)], format="extxyz")
    total, images = read_structures(tmp_path / "some.xyz")
    assert total == 2 and [name for name, _ in images] == ["mp-1", "1"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_structures(tmp_path / "none.xyz")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="holds no .extxyz file"):
        read_structures(tmp_path / "empty.zip")
    (tmp_path / "bad.xyz").write_text("two\n\n")
    with pytest.raises(ValueError, match="cannot be read by ASE"):
        read_structures(tmp_path / "bad.xyz")


def test_summary_without_a_column(tmp_path):
    from dpa4.simulation.bench.discovery import read_summary

    gzipped(tmp_path / "summary.csv.gz", "material_id,formula\nwbm-1-1,Cu\n")
    with pytest.raises(
        ValueError, match="lacks the columns e_form_per_atom_mp2020_corrected, .*unique_prototype"
    ):
        read_summary(tmp_path / "summary.csv.gz")


# Conductivity


def argon() -> LennardJones:
    return LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0, smooth=True)


def crystals(path: Path, *kinds: str) -> Path:
    """Argon as a file of the task: hcp, and simple cubic, which is not stable."""
    known = {"hcp": bulk("Ar", "hcp", a=3.7, c=6.1), "sc": bulk("Ar", "sc", a=3.4)}
    images = []
    for kind in kinds:
        atoms = known[kind]
        cells = {"fc2_supercell": np.diag([2, 2, 2]), "fc3_supercell": np.diag([2, 2, 2])}
        atoms.info = {"mp_id": f"mp-{kind}", "q_mesh": np.array([3, 3, 3]), **cells}
        images.append(atoms)
    write(path, images, format="extxyz")
    return path


def table_of(record: dict, scale: float = 1.0) -> list[dict]:
    """A table of DFT made of a result of ours."""
    modes = np.array(record["mode_kappa_tot_rta"])[..., :3].mean(axis=-1) * scale
    average = np.array(record["kappa_tot_rta"])[:, :3].mean(axis=-1) * scale
    names = ("material_id", "kappa_tot_avg", "mode_kappa_tot_avg", "q_points")
    values = (record["id"], average.tolist(), modes.tolist(), record["q_points"])
    return [dict(zip(names, values, strict=True))]


@pytest.fixture(scope="module")
def kappa_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kappa")
    path = crystals(folder / "argon.xyz", "hcp", "sc")
    state = run_kappa(path, argon(), folder / "run", progress=False)
    assert state == (2, 0, False, "")
    lines = (folder / "run" / "results.jsonl").read_text().splitlines()
    return folder, {r["id"]: r for r in map(json.loads, lines)}


def test_conductivity_is_that_of_phono3py(kappa_run):
    """The same force constants and transport, written down with phono3py alone."""
    from phono3py import Phono3py
    from phonopy.structure.atoms import PhonopyAtoms

    folder, records = kappa_run
    atoms = bulk("Ar", "hcp", a=3.7, c=6.1)
    kappa.relax_symmetric(atoms, argon(), fmax=1e-4, steps=300)
    cell = PhonopyAtoms(symbols=["Ar", "Ar"], cell=atoms.cell.array, positions=atoms.positions)
    ph3 = Phono3py(cell, supercell_matrix=[2, 2, 2], phonon_supercell_matrix=[2, 2, 2], symprec=1e-5)
    ph3.mesh_numbers = [3, 3, 3]
    ph3.generate_displacements(distance=0.03)

    def forces(cells):
        found = []
        for c in cells:
            image = Atoms(c.symbols, c.positions, cell=c.cell, pbc=True, calculator=argon())
            found.append(image.get_forces())
        return np.array(found)

    ph3.phonon_forces = forces(ph3.phonon_supercells_with_displacements)
    ph3.forces = forces(ph3.supercells_with_displacements)
    ph3.produce_fc2()
    ph3.symmetrize_fc2()
    ph3.produce_fc3()
    ph3.symmetrize_fc3()
    ph3.init_phph_interaction()
    ph3.run_thermal_conductivity(
        temperatures=[300], is_isotope=True, transport_type="SMM19", boundary_mfp=1e6
    )
    found = np.array(records["mp-hcp"]["kappa_tot_rta"])
    # the same arithmetic; JSON keeps every digit
    np.testing.assert_allclose(found[0], ph3.thermal_conductivity.kappa[0, 0], rtol=1e-8, atol=1e-10)
    assert 0.05 < found[0, 0] < 1  # W/(m K); argon conducts little


def test_modes_add_up_to_the_conductivity(kappa_run):
    record = kappa_run[1]["mp-hcp"]
    modes = np.array(record["mode_kappa_tot_rta"])
    assert modes.shape == (1, 6, 6, 6)  # q-points, bands of two atoms, components
    total = modes.sum(axis=(1, 2)) / np.sum(record["mode_weights"])
    np.testing.assert_allclose(total, record["kappa_tot_rta"], atol=1e-12)
    parts = np.array(record["kappa_p_rta"]) + record["kappa_c"]
    np.testing.assert_allclose(parts, record["kappa_tot_rta"], atol=1e-12)
    assert sum(record["mode_weights"]) == 27 and record["init_spg_num"] == record["final_spg_num"] == 194


def test_scores_of_conductivities(kappa_run):
    folder, records = kappa_run

    def score(*tables):
        path = folder / "reference.json.gz"
        gzipped(path, json.dumps([row for table in tables for row in table]))
        return score_kappa(folder / "run", kappa.read_reference(path))

    own = table_of(records["mp-hcp"])
    assert score(own).kappa_SRME == pytest.approx(0, abs=1e-12)
    # DFT is twice as large in every mode: 2 (k) / (k + 2 k) = 2/3
    double = score(table_of(records["mp-hcp"], 2))
    assert (double.kappa_SRME, double.kappa_SRE) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    # simple cubic argon has imaginary frequencies, and mp-0 is missing: 2 each
    sc, none = ([row | {"material_id": name} for row in own] for name in ("mp-sc", "mp-0"))
    found = score(table_of(records["mp-hcp"], 2), sc, none)
    assert found.kappa_SRME == pytest.approx((2 / 3 + 2 + 2) / 3)
    assert (found.materials, found.failed, found.missing) == (3, 2, 1)
    table = rows(folder / "run" / "kappa.csv")
    assert [row["reason"] for row in table] == ["", "imaginary frequencies", "not computed"]
    assert (folder / "run" / "kappa.png").stat().st_size > 1000
    # the order of the q-points does not matter, nor do reciprocal lattice vectors; another mesh is an error
    q_points, modes = np.array(own[0]["q_points"]), np.array(own[0]["mode_kappa_tot_avg"])
    turned = {"q_points": (q_points[::-1] - 1).tolist(), "mode_kappa_tot_avg": modes[:, ::-1].tolist()}
    assert score([own[0] | turned]).kappa_SRME == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="q-points of mp-hcp are not those of the reference"):
        score([own[0] | {"q_points": (q_points + 0.1).tolist()}])


def test_broken_symmetry_and_failures_count_as_two(tmp_path):
    with Records(tmp_path, {"task": "kappa"}) as records:
        records.append({"id": "a", "init_spg_num": 194, "final_spg_num": 187})
        records.append({"id": "b", "error": "RuntimeError: no memory"})
    reference = {n: kappa.ReferenceKappa(1.0, np.ones((1, 3)), None) for n in "ab"}
    assert score_kappa(tmp_path, reference).kappa_SRME == 2
    reasons = [row["reason"] for row in rows(tmp_path / "kappa.csv")]
    assert reasons == ["the space group changed from 194 to 187", "RuntimeError: no memory"]


def test_conductivity_goes_on_after_an_interruption(tmp_path, kappa_run):
    calculator = Interrupting(argon(), at=60)  # among the displacements of the third order
    path = crystals(tmp_path / "argon.xyz", "hcp")
    assert run_kappa(path, calculator.calculator, tmp_path / "run", progress=False)[:3] == (0, 0, True)
    assert calculator.evaluations < 80
    assert run_kappa(path, argon(), tmp_path / "run", progress=False)[:3] == (1, 0, False)
    found = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    assert found["kappa_tot_rta"] == kappa_run[1]["mp-hcp"]["kappa_tot_rta"]
    assert run_kappa(path, None, tmp_path / "run", progress=False)[:3] == (
        1,
        0,
        False,
    )  # nothing is left to do


def test_reference_by_columns_and_under_the_first_names(tmp_path):
    columns = {
        "mp_id": {"0": "mp-1"},
        "kappa_TOT_ave": {"0": [2.0]},
        "mode_kappa_TOT_ave": {"0": [[[1.0, 3.0]]]},
    }
    gzipped(tmp_path / "reference.json.gz", json.dumps(columns))
    (found,) = kappa.read_reference(tmp_path / "reference.json.gz").values()
    assert found.kappa == 2 and found.mode_kappa.tolist() == [[1, 3]] and found.q_points is None
    gzipped(tmp_path / "other.json.gz", json.dumps([{"material_id": "mp-1"}]))
    with pytest.raises(ValueError, match="lacks kappa_tot_avg or kappa_TOT_ave; it has material_id"):
        kappa.read_reference(tmp_path / "other.json.gz")
    (tmp_path / "broken.json.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        kappa.read_reference(tmp_path / "broken.json.gz")


def test_entries_of_the_published_structures(tmp_path):
    """The header as it is in the file: matrices as JSON, rows first."""
    header = (
        'Lattice="3.7 0 0 0 3.7 0 0 0 3.7" Properties=species:S:1:pos:R:3 pbc="T T T" mp_id=mp-1 name=Ar symm.no=221 '
        'fc3_supercell="_JSON [[1, 1, 0], [-1, 1, 0], [0, 0, 2]]" '
        'fc2_supercell="_JSON [[4, 0, 0], [0, 4, 0], [0, 0, 4]]" '
        'q_mesh="_JSON [19, 19, 15]"'
    )
    (tmp_path / "one.extxyz").write_text(f"1\n{header}\nAr 0 0 0\n")
    _, ((_, atoms),) = read_structures(tmp_path / "one.extxyz")
    name, (_, cells) = kappa._crystal(0, atoms, tmp_path / "one.extxyz")
    assert name == "mp-1" and cells["mesh"] == [19, 19, 15]
    assert cells["fc3_supercell"].tolist() == [[1, 1, 0], [-1, 1, 0], [0, 0, 2]]
    assert cells["fc2_supercell"].tolist() == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]


def test_crystals_without_a_supercell_are_refused(tmp_path):
    write(tmp_path / "plain.xyz", bulk("Ar", "hcp", a=3.7, c=6.1), format="extxyz")
    with pytest.raises(ValueError, match="plain.xyz, structure 0, lacks fc2_supercell; it has"):
        run_kappa(tmp_path / "plain.xyz", argon(), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="displacement must be positive, got 0"):
        run_kappa(tmp_path / "plain.xyz", argon(), tmp_path / "run", displacement=0, progress=False)


# Diatomic molecules


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_potential(random_potential(), path)
    return path


def test_curves_of_a_potential(tmp_path, model):
    calculator = DPA4Calculator(model, device="cpu", dtype="float64")
    assert run_diatomics(["H", "O"], calculator, tmp_path, progress=False)[:3] == (2, 0, False)
    score = score_diatomics(tmp_path)
    assert score.coverage == 2 / 87 and len(SCORED) == 87
    # forces are derivatives: what is left is the error of differences on a logarithmic grid (3 % apart)
    forces = [abs(float(row["force"])) for row in rows(tmp_path / "curves.csv")]
    assert score.metrics["conservation_deviation"] < 0.05 * max(forces)
    assert np.isnan(score.CDS) and "pbe_energy_mae" not in score.metrics
    assert {row["element"] for row in rows(tmp_path / "metrics.csv")} == {"H", "O"}
    assert (tmp_path / "diatomics.png").stat().st_size > 1000
    reference = {"O": _curve_of(tmp_path, "O")}
    again = score_diatomics(tmp_path, reference)
    assert again.metrics["pbe_energy_mae"] == 0  # compared with itself
    assert again.metrics["tortuosity"] == score.metrics["tortuosity"]


def _curve_of(folder, element):
    from dpa4.simulation.bench.metrics import Curve

    found = [r for r in rows(folder / "curves.csv") if r["element"] == element]
    return Curve(*(np.array([float(r[c]) for r in found]) for c in ("distance", "energy", "force")))


def test_rough_references_are_not_compared_with():
    from dpa4.simulation.bench.diatomics import element_metrics
    from dpa4.simulation.bench.metrics import Curve

    r = np.linspace(1.0, 4.0, 40)
    smooth = Curve(r, (r - 2) ** 2, 2 * (r - 2))
    rough = Curve(r, (r - 2) ** 2 + 0.5 * (-1.0) ** np.arange(40), smooth.forces)
    assert "pbe_energy_mae" in element_metrics("O", smooth, smooth)
    assert "pbe_energy_mae" not in element_metrics("O", smooth, rough)
    with pytest.raises(ValueError, match="O has 3 points in its window; 5 are needed"):
        element_metrics("O", Curve(r[:3], smooth.energies[:3], smooth.forces[:3]))


def test_windows_and_points_that_are_not_finite(tmp_path):
    low, high = evaluation_window("O", 6.0)
    assert (low, high) == (pytest.approx(0.9 * 0.66), pytest.approx(3.1 * 1.50))
    assert evaluation_window("Cs", 6.0)[1] == 6.0

    class Broken(LennardJones):
        beyond, below = 10.0, 0.3

        def calculate(self, atoms=None, *arguments):
            super().calculate(atoms, *arguments)
            distance = atoms.get_distance(0, 1)
            if distance < self.below or distance > self.beyond:
                self.results["energy"] = np.nan

    found = homonuclear_curve("O", Broken(rc=20))
    assert found["distances"][0] >= 0.3 and len(found["distances"]) < 119
    calculator = Broken(rc=20)
    calculator.beyond = 4.4
    with pytest.raises(ValueError, match=r"not finite at \[4.546\]"):
        homonuclear_curve("O", calculator)
    assert run_diatomics(["O"], calculator, tmp_path, progress=False)[:3] == (0, 1, False)
    assert "not finite" in score_diatomics(tmp_path).failed["O"]
    with pytest.raises(ValueError, match="'Xx' is no element from H to U"):
        run_diatomics(["Xx"], calculator, tmp_path, progress=False)


# SPICE


def frames_of(potential, tmp_path) -> list[Frame]:
    """Molecules in two subsets whose labels are the predictions plus known errors."""
    images = []
    for seed in range(6):
        atoms = molecule(seed, 5 + seed)
        atoms.calc = DPA4Calculator(potential, device="cpu", dtype="float64")
        subset, shift = ("water", 0.001) if seed % 2 else ("dipeptides", 0.004)
        energy = atoms.get_potential_energy() + shift * len(atoms)
        forces = atoms.get_forces() - 10 * shift
        atoms.calc = None
        atoms.info |= {"config_type": subset, "REF_energy": energy}
        atoms.arrays["REF_forces"] = forces
        images.append(atoms)
    write(tmp_path / "test.xyz", images, format="extxyz")
    return read_frames(tmp_path / "test.xyz")


def test_errors_by_subset_and_their_log_mean(tmp_path):
    potential = random_potential()
    frames = frames_of(potential, tmp_path)
    state = run_spice(potential, frames, tmp_path / "run", max_atoms=16, progress=False)
    assert state.done == 4 and state.failed == 0  # 5 + 6 | 7 + 8 | 9 | 10 atoms
    score = score_spice(tmp_path / "run")
    found = {row.subset: row for row in score.subsets}
    assert {n: row.structures for n, row in found.items()} == {"dipeptides": 3, "water": 3}
    # the file has eight digits
    assert found["water"].energy == pytest.approx(1, abs=1e-4) and found["water"].forces == pytest.approx(
        10, abs=1e-4
    )
    assert found["dipeptides"].energy == pytest.approx(4, abs=1e-4)
    assert score.energy == pytest.approx(2, abs=1e-4)  # sqrt(1 * 4)
    assert score.forces == pytest.approx(20, abs=1e-3)  # sqrt(10 * 40)
    table = rows(tmp_path / "run" / "errors.csv")
    assert [row["subset"] for row in table] == ["dipeptides", "water", "log mean"]
    assert len(rows(tmp_path / "run" / "structures.csv")) == 6
    assert (tmp_path / "run" / "errors.png").stat().st_size > 1000
    # a second call finds everything done; other batches are another run
    assert run_spice(potential, frames, tmp_path / "run", max_atoms=16, progress=False).done == 4
    with pytest.raises(ValueError, match="max_atoms = 30, but .* holds results with max_atoms = 16"):
        run_spice(potential, frames, tmp_path / "run", max_atoms=30, progress=False)


def test_structures_without_labels_are_refused(tmp_path):
    write(tmp_path / "plain.xyz", molecule(), format="extxyz")
    with pytest.raises(ValueError, match="plain.xyz, frame 0 lacks energy"):
        run_spice(random_potential(), read_frames(tmp_path / "plain.xyz"), tmp_path / "run", progress=False)


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


@pytest.fixture(scope="module")
def submission(tmp_path_factory, model, kappa_run):
    import datetime

    folder = tmp_path_factory.mktemp("submission")
    wbm(folder / "data")
    relax_alloys(folder / "discovery", EMT(), folder / "data")
    score_structures(folder / "discovery", folder / "data", progress=False)
    gzipped(folder / "reference.json.gz", json.dumps(table_of(kappa_run[1]["mp-hcp"], 2)))
    score_kappa(kappa_run[0] / "run", kappa.read_reference(folder / "reference.json.gz"))
    run_diatomics(["Ar"], argon(), folder / "diatomics", progress=False)
    score_diatomics(folder / "diatomics")
    (folder / "metadata.yaml").write_text(METADATA)
    runs = {
        "discovery": folder / "discovery",
        "kappa": kappa_run[0] / "run",
        "diatomics": folder / "diatomics",
    }
    date = datetime.date(2026, 8, 2)
    path, score = write_submission(
        model, read_metadata(folder / "metadata.yaml"), folder / "out", date=date, **runs
    )
    return path, score, runs


def test_yaml_round_trip(submission):
    path, score, _ = submission
    assert path.parts[-3:] == ("models", "dpa4", "dpa4-test.yml")
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert document["authors"][0]["email"] == "author@example.org"
    assert document["model_params"] == sum(w.numel() for w in random_potential().model.parameters())
    assert document["hyperparams"]["upstream_config"] == {"lmax": 2}
    evaluation = document["hyperparams"]["evaluation"]
    assert evaluation == {
        "max_force": 0.02, "max_steps": 500, "ase_optimizer": "FIRE", "cell_filter": "FrechetCellFilter",
        "kappa": {
            "protocol": "phonondb-v1", "displacement_distance": 0.03, "force_max": 1e-4, "max_steps": 300,
        },
    }  # fmt: skip
    assert document["hyperparams"]["architecture"]["graph_construction_radius"] == 4.0
    unique = document["metrics"]["discovery"]["unique_prototypes"]
    assert (unique["TP"], unique["FP"], unique["F1"]) == (1, 1, 0.667)
    assert document["metrics"]["phonons"]["kappa_103"]["κ_SRME"] == 0.6667
    assert document["metrics"]["geo_opt"]["symprec=1e-2"] == {"rmsd": 0.0, "n_structures": 3}
    assert (
        "tortuosity" in document["metrics"]["diatomics"]
        and "smoothness" not in document["metrics"]["diatomics"]
    )
    assert score == pytest.approx(combined_performance_score(2 / 3, 2 / 3, 0))


def test_artifacts_can_be_read_back(submission):
    path, _, runs = submission
    folder = path.with_suffix("")
    names = {"discovery.csv.gz", "geo-opt.jsonl.gz", "phonons-kappa-103.json.gz", "diatomics.json.gz"}
    assert {p.name for p in folder.iterdir()} == {f"2026-08-02-{name}" for name in names}
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    discovery = document["metrics"]["discovery"]
    artifact = folder.parents[2] / discovery["pred_file"]["name"]
    content = artifact.read_bytes()
    assert discovery["pred_file"]["md5"] == hashlib.md5(content).hexdigest()
    assert discovery["pred_file"]["size"] == len(content)
    table = list(csv.DictReader(gzip.decompress(content).decode().splitlines()))
    assert table == rows(runs["discovery"] / "discovery.csv") and discovery["pred_col"] in table[0]
    lines = gzip.decompress((folder / "2026-08-02-geo-opt.jsonl.gz").read_bytes()).decode().splitlines()
    assert json.loads(lines[0])["structure"]["sites"][0]["species"][0]["element"] == "Cu"
    kappas = json.loads(gzip.decompress((folder / "2026-08-02-phonons-kappa-103.json.gz").read_bytes()))
    assert [row["material_id"] for row in kappas] == ["mp-hcp", "mp-sc"]
    assert kappas[1]["conductivity_skipped"] and "kappa_tot_rta" not in kappas[1]
    curves = json.loads(gzip.decompress((folder / "2026-08-02-diatomics.json.gz").read_bytes()))
    assert np.shape(curves["homo-nuclear"]["Ar-Ar"]["forces"]) == (119, 2, 3)


def test_submission_refuses_what_does_not_belong_together(tmp_path, submission, model):
    _, _, runs = submission
    metadata = yaml.safe_load(METADATA)
    with pytest.raises(ValueError, match="holds a run of the task 'kappa', not of 'discovery'"):
        write_submission(model, metadata, tmp_path, discovery=runs["kappa"])
    run_diatomics(["Ar"], argon(), tmp_path / "other", model="another", progress=False)
    with pytest.raises(ValueError, match="the runs are of different models"):
        write_submission(model, metadata, tmp_path, kappa=runs["kappa"], diatomics=tmp_path / "other")
    with pytest.raises(
        FileNotFoundError, match="summary.json is absent; finish the task with dpa4 bench diatomics"
    ):
        write_submission(model, metadata, tmp_path, diatomics=tmp_path / "other")
    with pytest.raises(ValueError, match="'kappa': '', 'the checkpoint': 'sha256:1'"):
        write_submission(model, metadata, tmp_path, kappa=runs["kappa"], fingerprint="sha256:1")
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        write_submission(model, metadata, tmp_path, kappa=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name: x", "lacks model_key .*license .mapping with code"),
        (METADATA + "metrics: {}", "gives metrics, which is computed"),
        (METADATA.replace("dpa4-test", "../x"), "model_key = '../x' in .*; it must be of letters"),
        ("[1", "is not YAML"),
        ("- 1", "must be a mapping with model_name"),
    ],
)
def test_metadata_is_checked(tmp_path, text, message):
    (tmp_path / "metadata.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / "metadata.yaml")
    with pytest.raises(FileNotFoundError, match="it must hold model_name, model_key"):
        read_metadata(tmp_path / "none.yaml")


# Commands


def command(*arguments: object, ok: bool = True) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert (result.exit_code == 0) == ok, result.output
    return result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("task", "file"),
    [("discovery", files.WBM_INITIAL), ("kappa", files.KAPPA_STRUCTURES), ("spice", files.SPICE_TEST)],
)
def test_a_missing_file_is_named_with_its_source_and_place(tmp_path, model, task, file):
    output = command(task, model, "--data", tmp_path, ok=False)
    for part in (Path(file.path).name, file.content, file.source, str(tmp_path / file.path)):
        assert part in output


def test_files_are_found_flat_or_in_their_subfolder(tmp_path):
    (tmp_path / Path(files.KAPPA_REFERENCE.path).name).touch()
    assert files.locate(tmp_path, files.KAPPA_REFERENCE).parent == tmp_path
    (tmp_path / "phonons").mkdir()
    (tmp_path / files.KAPPA_REFERENCE.path).touch()
    assert files.locate(tmp_path, files.KAPPA_REFERENCE).parent == tmp_path / "phonons"


def test_commands_from_end_to_end(tmp_path, model):
    cpu = ("--device", "cpu")
    output = command("diatomics", model, "--data", tmp_path, "--elements", "O", "-o", tmp_path / "d", *cpu)
    assert (
        "no comparison with DFT: diatomics-dft.json.gz is missing" in output
        and "1 curves, none failed" in output
    )
    assert "coverage 0.011" in output
    frames_of(random_potential(), tmp_path)
    output = command("spice", model, tmp_path / "test.xyz", "-o", tmp_path / "s", "--dtype", "float64", *cpu)
    assert "log mean" in output and "20.000" in output
    write(tmp_path / "start.xyz", molecule(), format="extxyz")
    arguments = (
        "discovery",
        model,
        "--structures",
        tmp_path / "start.xyz",
        "-o",
        tmp_path / "r",
        "--relax-only",
    )
    assert "0 structures relaxed, 1 failed (0: ValueError: cell = " in command(
        *arguments, *cpu
    )  # a molecule has none
    assert "--part must be i/n such as 2/8, got 3" in command(*arguments, "--part", "3", ok=False)
    (tmp_path / "metadata.yaml").write_text(METADATA)
    output = command(
        "yaml",
        model,
        "--metadata",
        tmp_path / "metadata.yaml",
        "--diatomics",
        tmp_path / "d",
        "-o",
        tmp_path / "y",
    )
    assert (tmp_path / "y" / "models" / "dpa4" / "dpa4-test.yml").exists() and "CPS" not in output


# Documentation

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")


def test_tables_of_options_agree_with_the_commands():
    group = typer.main.get_command(app).commands["bench"]
    headings = {
        "discovery": "Discovery",
        "kappa": "Conductivity",
        "diatomics": "Diatomic",
        "spice": "SPICE-MACE",
    }
    for name, heading in headings.items():
        section = PAGE.partition(f"\n## {heading}")[2].partition("\n## ")[0]
        found = re.findall(r"^\| `(--[\w-]+)` \| (\S+) \|", section, re.MULTILINE)
        assert found, heading
        parameters = {parameter.opts[0]: parameter for parameter in group.commands[name].params}
        for option, default in found:
            expected = parameters[option].default
            assert default == ("off" if expected is False else str(expected)), (name, option)


def test_table_of_files_agrees_with_the_code():
    known = [value for value in vars(files).values() if isinstance(value, files.PublishedFile)]
    documented = dict(re.findall(r"^\| `([\w./-]+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|", PAGE, re.MULTILINE))
    assert set(documented) == {file.path for file in known}
    for file in known:
        if "github" not in file.source:
            assert file.source.removeprefix("https://") == documented[file.path].strip()


def test_metadata_of_the_documentation_is_complete(tmp_path):
    (example,) = re.findall(r"^```\n(model_name:.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "metadata.yaml").write_text(example)
    assert read_metadata(tmp_path / "metadata.yaml")["model_key"] == "my-dpa4"


def test_published_scores_of_the_documentation_fit_together():
    table = re.findall(r"^\| [^|]+ \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \|", PAGE, re.MULTILINE)
    assert len(table) == 9
    for row in table:
        score, *metrics = map(float, row)
        # half a unit of the last digit in each: 0.0005 (0.5 + 0.2 + 0.67) + 0.0005
        assert combined_performance_score(*metrics) == pytest.approx(score, abs=0.0012)
