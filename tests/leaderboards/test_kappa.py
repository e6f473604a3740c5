"""Thermal conductivities: agreement with phono3py, mode contributions, scores by hand, files, interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write

from bench_cases import Interrupting, argon, gzipped, rows
from dpa4.data import read_atoms
from dpa4.leaderboards import kappa, run_kappa, score_kappa
from dpa4.leaderboards.conductivity import imaginary, relax_symmetric, shares
from dpa4.simulation.runs.store import Records


def test_imaginary_frequencies():
    fine = np.array([[-0.009, 0.0, 0.0, 2.0], [1.0, 1.0, 2.0, 3.0]])
    assert not imaginary(fine)
    assert imaginary(fine - [[0.002, 0, 0, 0], [0, 0, 0, 0]])  # below -0.01 THz at q = 0
    assert imaginary(fine - [[0, 0, 0, 2.001], [0, 0, 0, 0]])  # an optical mode at q = 0
    assert imaginary(fine - [[0, 0, 0, 0], [1.001, 0, 0, 0]])  # no tolerance elsewhere
    assert imaginary(np.full((2, 4), np.nan))


def test_pairs_of_bands_are_shared_by_their_heat_capacities():
    pairs = np.array([[4.0, 2.0], [2.0, 6.0]])[None, None, :, :, None] * np.ones(6)
    found = shares(pairs, np.array([[[1.0, 3.0]]]))
    # 4 + 2 * 2 * 3 / (1 + 3) and 6 + 2 * 2 * 1 / (1 + 3)
    np.testing.assert_allclose(found[0, 0, :, 0], [7, 7])
    assert found.shape == (1, 1, 2, 6)
    np.testing.assert_allclose(shares(pairs, np.zeros((1, 1, 2))), 0)


def crystals(path: Path, *kinds: str) -> Path:
    """File of the task with argon: hcp, and simple cubic, which is unstable."""
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
    """DFT table derived from one of our results."""
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
    """The same force constants and transport, computed with phono3py alone."""
    from phono3py import Phono3py
    from phonopy.structure.atoms import PhonopyAtoms

    folder, records = kappa_run
    atoms = bulk("Ar", "hcp", a=3.7, c=6.1)
    relax_symmetric(atoms, argon(), fmax=1e-4, steps=300)
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
    assert found.differences == ("displacement_distance = 0.03 (runner of the leaderboard: 0.01)",)
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
    settings = {"task": "kappa", "force_max": 1e-4, "max_steps": 300, "displacement_distance": 0.01}
    with Records(tmp_path, settings) as records:
        records.append({"id": "a", "init_spg_num": 194, "final_spg_num": 187})
        records.append({"id": "b", "error": "RuntimeError: no memory"})
        negative = {"kappa_tot_rta": [[-1.0] * 6], "mode_kappa_tot_rta": [[[[-1.0] * 6] * 3]]}
        negative |= {"mode_weights": [1], "q_points": [[0, 0, 0]], "has_imag_ph_modes": False}
        records.append({"id": "c", "init_spg_num": 194, "final_spg_num": 194} | negative)
    reference = {n: kappa.ReferenceKappa(1.0, np.ones((1, 3)), None) for n in "abc"}
    found = score_kappa(tmp_path, reference)
    assert (found.kappa_SRME, found.kappa_SRE, found.failed) == (2, 2, 3)
    reasons = [row["reason"] for row in rows(tmp_path / "kappa.csv")]
    assert reasons == [
        "the space group changed from 194 to 187",
        "RuntimeError: no memory",
        "the conductivity is -1.0 W/(m K)",
    ]


def test_conductivity_goes_on_after_an_interruption(tmp_path, kappa_run):
    calculator = Interrupting(argon(), at=60)  # among the displacements of the third order
    path = crystals(tmp_path / "argon.xyz", "hcp")
    assert run_kappa(path, calculator.calculator, tmp_path / "run", progress=False)[:3] == (0, 0, True)
    assert calculator.evaluations < 80
    assert run_kappa(path, argon(), tmp_path / "run", progress=False)[:3] == (1, 0, False)
    found = json.loads((tmp_path / "run" / "results.jsonl").read_text())
    assert found["kappa_tot_rta"] == kappa_run[1]["mp-hcp"]["kappa_tot_rta"]
    # all crystals are done: no calculator is needed
    assert run_kappa(path, None, tmp_path / "run", progress=False)[:3] == (1, 0, False)


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
    with pytest.raises(ValueError, match="broken.json.gz cannot be read: BadGzipFile"):
        kappa.read_reference(tmp_path / "broken.json.gz")


def test_entries_of_the_published_structures(tmp_path):
    """Headers of the published file: matrices in JSON, rows first."""
    header = (
        'Lattice="3.7 0 0 0 3.7 0 0 0 3.7" Properties=species:S:1:pos:R:3 pbc="T T T" mp_id=mp-1 name=Ar symm.no=221 '
        'fc3_supercell="_JSON [[1, 1, 0], [-1, 1, 0], [0, 0, 2]]" '
        'fc2_supercell="_JSON [[4, 0, 0], [0, 4, 0], [0, 0, 4]]" '
        'q_mesh="_JSON [19, 19, 15]"'
    )
    (tmp_path / "one.extxyz").write_text(f"1\n{header}\nAr 0 0 0\n")
    ((origin, atoms),) = read_atoms(tmp_path / "one.extxyz")
    name, (_, cells) = kappa._crystal(origin, atoms)
    assert name == "mp-1" and cells["mesh"] == [19, 19, 15]
    assert cells["fc3_supercell"].tolist() == [[1, 1, 0], [-1, 1, 0], [0, 0, 2]]
    assert cells["fc2_supercell"].tolist() == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]


def test_crystals_without_a_supercell_are_refused(tmp_path):
    write(tmp_path / "plain.xyz", bulk("Ar", "hcp", a=3.7, c=6.1), format="extxyz")
    with pytest.raises(ValueError, match="plain.xyz, frame 0 lacks fc2_supercell; it has"):
        run_kappa(tmp_path / "plain.xyz", argon(), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="displacement must be positive, got 0"):
        run_kappa(tmp_path / "plain.xyz", argon(), tmp_path / "run", displacement=0, progress=False)
