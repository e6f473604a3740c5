"""Data for starter potentials, made by scripts/make_starter_data.py."""

import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase.build import molecule as ase_molecule
from ase.neighborlist import build_neighbor_list, natural_cutoffs
from scipy.spatial.distance import pdist, squareform
from scipy.spatial.transform import Rotation

from dpa4.data import read_frames

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from starter_data import card, storage, structures, systems  # noqa: E402

sys.path.remove(str(SCRIPTS))

needs_rdkit = pytest.mark.skipif(
    importlib.util.find_spec("rdkit") is None, reason="needs rdkit: pip install rdkit"
)
needs_tblite = pytest.mark.skipif(
    importlib.util.find_spec("tblite") is None, reason="needs tblite: pip install tblite"
)


@pytest.fixture
def scripts(monkeypatch):
    """Folder of the scripts on the search path, for modules that need RDKit or tblite."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def stored(name, smiles, split="train", family="small"):
    """Molecule of ASE's collection in the form of the file of molecules."""
    atoms = ase_molecule(name)
    neighbours = build_neighbor_list(atoms, natural_cutoffs(atoms), self_interaction=False)
    bonds = [[int(i), int(j), 1.0] for i, j in sorted(neighbours.get_connectivity_matrix().keys())]
    return storage.Molecule(
        smiles, family, split, atoms.numbers.tolist(), bonds, [atoms.positions.round(3).tolist()]
    )


ETHANOL = stored("CH3CH2OH", "CCO")
WATER = stored("H2O", "O")


def arrays(molecule):
    return np.array(molecule.numbers), np.array(molecule.conformers[0])


# --- enumeration ---


@needs_rdkit
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OCC", "CCO"),
        ("C[N+](=O)[O-]", "C[N+](=O)[O-]"),
        ("[NH4+]", None),  # charged
        ("[CH3]", None),  # radical
        ("[He]", None),  # one atom
        ("CCCCCCCCCC", None),  # 32 atoms
        ("C.C", None),
        ("C(C)(C)(C)(C)C", None),  # five bonds
    ],
)
def test_only_neutral_closed_shells_of_2_to_30_atoms_are_molecules(scripts, text, expected):
    enumeration = scripts("starter_data.enumeration")
    enumeration.quiet()
    assert enumeration.canonical(text) == expected


@needs_rdkit
def test_small_graphs_are_complete_and_stable(scripts):
    small_graphs = scripts("starter_data.enumeration").small_graphs
    assert small_graphs(["C", "O"], 2) == {"CC", "C=C", "C#C", "CO", "C=O", "OO"}  # O2 is a triplet
    three = small_graphs(["C"], 3) - small_graphs(["C"], 2)
    assert three == {"CCC", "C=CC", "C#CC", "C=C=C", "C1CC1"}  # cyclopropene: [r3]=[r3]
    assert len(small_graphs(["C"], 7, [1])) == 1 + 1 + 2 + 3 + 5 + 9  # isomers of the alkanes


@needs_rdkit
@pytest.mark.parametrize(
    ("smiles", "stable"),
    [
        ("CS(=O)(=O)N", True),
        ("c1nnn[nH]1", True),
        ("NNN", False),
        ("o1ss1", False),
        ("CN(F)C", False),
        ("C1=CC1", False),
    ],
)
def test_unstable_patterns(scripts, smiles, stable):
    assert scripts("starter_data.enumeration").is_stable(smiles) is stable


@needs_rdkit
def test_enumeration_is_deterministic_and_without_repetition(scripts):
    enumeration = scripts("starter_data.enumeration")
    few = enumeration.enumerate_molecules({"diatomic": 20, "inorganic": 20, "hydrocarbon": 30})
    more = enumeration.enumerate_molecules({"diatomic": 20, "inorganic": 20, "hydrocarbon": 60})
    assert list(few) == list(more)[: len(few)] and len(more) == len(few) + 30
    assert all(enumeration.canonical(smiles) == smiles for smiles in few)


@needs_rdkit
def test_tautomers_are_in_the_same_split(scripts):
    skeleton = scripts("starter_data.enumeration").skeleton
    assert skeleton("CC(C)=O") == skeleton("C=C(C)O") == skeleton("CC(C)O")
    assert skeleton("CC(C)=O") != skeleton("CCC=O")


@needs_rdkit
def test_embedded_molecules_have_bonds_of_usual_length(scripts):
    embed = scripts("starter_data.enumeration").embed
    first, again = embed("CC(=O)NC", "carbonyl", 2), embed("CC(=O)NC", "carbonyl", 2)
    assert first == again
    assert len(first.numbers) == 12 and len(first.bonds) == 11 and 1 <= len(first.conformers) <= 2
    for shape in first.conformers:
        lengths = [np.linalg.norm(np.subtract(shape[int(i)], shape[int(j)])) for i, j, _ in first.bonds]
        assert 0.9 < min(lengths) and max(lengths) < 1.6
    hydrogen = embed("[H][H]", "diatomic", 2)
    assert hydrogen.split == "train" and len(hydrogen.conformers) == 1


# --- split ---


def test_split_depends_on_the_group_only_and_has_the_shares():
    splits = [storage.split_of(f"group {k}") for k in range(4000)]
    assert splits == [storage.split_of(f"group {k}") for k in range(4000)]
    for split, share in storage.SPLITS.items():
        assert splits.count(split) / 4000 == pytest.approx(share, abs=0.015)


def test_clusters_consist_of_molecules_of_their_own_split():
    names = {"train": ["CH4", "CH3OH", "H2CO", "NH3"], "valid": ["C2H4", "C2H2"], "test": ["CH3SH", "H3CNH2"]}
    found = [WATER] + [stored(name, name, split) for split, group in names.items() for name in group]
    chosen = systems.systems(found, dimers=150, clusters=100, water=40)
    assert chosen == systems.systems(found, dimers=150, clusters=100, water=40)
    assert len({system.name for system in chosen}) == len(found) + 290
    clusters = [system for system in chosen if system.family in ("dimer", "cluster")]
    assert {system.split for system in clusters} == set(storage.SPLITS)
    assert {len(system.members) for system in clusters} == {2, 3, 4, 5, 6}
    for system in clusters:
        assert sum(len(found[k].numbers) for k in system.members) <= systems.LARGEST_CLUSTER
        assert any(found[k].split == system.split for k in system.members)
        assert all(found[k].split == system.split or found[k].smiles == "O" for k in system.members)
    assert {len(s.members) for s in chosen if s.family == "water"} == set(systems.WATER_SIZES)


# --- distortions ---


def test_stretching_changes_one_bond_and_no_other():
    _, positions = arrays(ETHANOL)
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(50):
        moved = structures.stretched(positions, ETHANOL.bonds, rng)
        ends = [[int(i), int(j)] for i, j, _ in ETHANOL.bonds]
        ratio = np.array(
            [
                np.linalg.norm(moved[i] - moved[j]) / np.linalg.norm(positions[i] - positions[j])
                for i, j in ends
            ]
        )
        assert (np.abs(ratio - 1) > 1e-9).sum() == 1
        ratios.append(ratio[np.abs(ratio - 1).argmax()])
    assert 0.7 <= min(ratios) < 0.8 and 1.6 < max(ratios) <= 1.8


def test_ring_bonds_scale_the_molecule():
    benzene = stored("C6H6", "c1ccccc1")
    _, positions = arrays(benzene)
    ring = [bond for bond in benzene.bonds if bond[0] < 6 and bond[1] < 6]
    moved = structures.stretched(positions, ring, np.random.default_rng(0))
    assert np.ptp(pdist(moved) / pdist(positions)) < 1e-9


def test_torsions_keep_bonds_and_angles():
    numbers, positions = arrays(ETHANOL)
    axes = structures.rotatable(numbers, ETHANOL.bonds)
    assert {frozenset(numbers[list(axis)].tolist()) for axis in axes} == {frozenset({6}), frozenset({6, 8})}
    for axis in axes:
        moved = structures.twisted(positions, ETHANOL.bonds, axis, 1.0)
        full = structures.twisted(positions, ETHANOL.bonds, axis, 2 * np.pi)
        near = squareform(pdist(positions)) < 2.3  # bonds and distances across an angle
        assert np.abs(squareform(pdist(moved)) - squareform(pdist(positions)))[near].max() < 1e-9
        assert np.abs(moved - positions).max() > 0.3
        np.testing.assert_allclose(full, positions, atol=1e-9)
    assert structures.rotatable(*(np.array(WATER.numbers), WATER.bonds)) == []


def test_proton_transfer_moves_one_hydrogen_towards_an_acceptor():
    acid = stored("HCOOH", "O=CO")
    numbers, positions = arrays(acid)
    moved = structures.proton_transferred(numbers, positions, acid.bonds, np.random.default_rng(2))
    (changed,) = np.flatnonzero(np.linalg.norm(moved - positions, axis=1) > 1e-9)
    assert numbers[changed] == 1
    ethane = stored("C2H6", "CC")
    assert structures.proton_transferred(*arrays(ethane), ethane.bonds, np.random.default_rng(2)) is None


def test_arranged_molecules_touch_as_told_and_keep_their_shape():
    rng = np.random.default_rng(3)
    parts = [arrays(ETHANOL), arrays(WATER), arrays(WATER)]
    for closest in (0.5, 0.8, 1.6):
        numbers, positions = structures.arranged(parts, closest, rng)
        assert numbers.tolist() == ETHANOL.numbers + 2 * WATER.numbers
        np.testing.assert_allclose(pdist(positions[:9]), pdist(parts[0][1]), atol=1e-9)
        blocks = [(numbers[a:b], positions[a:b]) for a, b in ((0, 9), (9, 12), (12, 15))]
        assert structures.contact(blocks[0], blocks[1]) == pytest.approx(closest, abs=1e-3)
        joined = (numbers[:12], positions[:12])
        assert structures.contact(joined, blocks[2]) == pytest.approx(closest, abs=1e-3)


def test_hydrogen_bonds_point_at_the_acceptor():
    rng = np.random.default_rng(4)
    numbers, positions = structures.hydrogen_bonded(arrays(WATER), arrays(ETHANOL), rng)
    acceptor = 3 + ETHANOL.numbers.index(8)
    assert 2.4 <= np.linalg.norm(positions[acceptor] - positions[0]) <= 3.0
    hydrogens = [k for k in (1, 2) if np.linalg.norm(positions[k] - positions[acceptor]) < 2.2]
    assert len(hydrogens) == 1 and numbers[acceptor] == 8
    ethane = stored("C2H6", "CC")
    assert structures.hydrogen_bonded(arrays(ethane), arrays(ethane), rng) is None


def test_droplets_have_the_density_of_water():
    numbers, positions = structures.droplet(arrays(WATER), 10, np.random.default_rng(5))
    assert numbers.tolist() == 10 * WATER.numbers
    oxygens = positions[numbers == 8]
    assert np.linalg.norm(oxygens - oxygens.mean(axis=0), axis=1).max() < 6.0
    assert pdist(positions).min() > 0.75


def test_duplicates_are_found_after_rotation_reflection_and_renumbering():
    numbers, positions = arrays(ETHANOL)
    own = structures.fingerprint(numbers, positions)
    order = np.random.default_rng(6).permutation(9)
    same = -Rotation.random(random_state=1).apply(positions)[order] + 2.0
    assert structures.is_duplicate(structures.fingerprint(numbers[order], same), [own])
    other = positions.copy()
    other[0] += 0.1
    assert not structures.is_duplicate(structures.fingerprint(numbers, other), [own])
    assert not structures.is_duplicate(own, [])


# --- storage and card ---


def some_frames(molecule, count=3):
    numbers, positions = arrays(molecule)
    rng = np.random.default_rng(7)
    return storage.Frames(
        numbers,
        positions + 0.1 * rng.normal(size=(count, len(numbers), 3)).round(3),
        -100.0 - rng.random(count).round(6),
        rng.normal(size=(count, len(numbers), 3)).round(4),
        np.full(count, 5.0, np.float32),
        ["dynamics"] * count,
    )


def test_molecules_survive_their_file(tmp_path):
    chosen = systems.systems([WATER, ETHANOL], 2, 1, 1)
    storage.write_molecules(tmp_path / "a.json.gz", [WATER, ETHANOL], chosen)
    storage.write_molecules(tmp_path / "b.json.gz", [WATER, ETHANOL], chosen)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert storage.read_molecules(tmp_path / "a.json.gz") == ([WATER, ETHANOL], chosen)


def test_database_continues_and_refuses_another_file_of_molecules(tmp_path):
    frames = some_frames(WATER)
    database = storage.Database(tmp_path / "labels.db", "digest")
    database.add("molecule O", frames, {"dynamics": 1.5}, {"duplicate": 2})
    database.add("molecule CCO", None, {}, {"charges not converged": 1})
    database.close()
    again = storage.Database(tmp_path / "labels.db", "digest")
    assert again.names() == {"molecule O", "molecule CCO"}
    (_, nothing, *_), (name, found, seconds, dropped) = again.results()
    assert (
        nothing is None
        and name == "molecule O"
        and seconds == {"dynamics": 1.5}
        and dropped == {"duplicate": 2}
    )
    np.testing.assert_allclose(found.positions, frames.positions, atol=0.0006)
    np.testing.assert_allclose(found.forces, frames.forces, atol=1e-9)
    np.testing.assert_array_equal(found.energies, frames.energies)
    with pytest.raises(ValueError, match="another file of molecules"):
        storage.Database(tmp_path / "labels.db", "other")


def test_splits_and_card_contain_what_was_labelled(tmp_path):
    molecules = [WATER, stored("CH3CH2OH", "CCO", "test", "chain"), stored("HF", "F")]
    chosen = systems.systems(molecules, 0, 0, 1)
    database = storage.Database(tmp_path / "labels.db", "digest")
    water = next(s for s in chosen if s.family == "water")
    database.add("molecule O", some_frames(WATER), {"dynamics": 0.3}, {"duplicate": 4})
    database.add("molecule CCO", some_frames(molecules[1], 2), {"dynamics": 0.2}, {})
    database.add("molecule F", some_frames(molecules[2], 1), {"dynamics": 0.1}, {})
    text = card.write_splits(
        tmp_path / "data",
        molecules,
        chosen,
        database,
        {"H": -10.7, "O": -102.5, "C": -48.8, "F": -125.7},
        "tblite 1.0",
    )
    assert "6 structures of 3 systems; 4 systems are planned" in text
    assert "| duplicate | 4 |" in text and "| chain | 1 | 0 | 0 | 2 | 2 | 9 | 100 |" in text
    assert text == (tmp_path / "data" / "DATA_CARD.md").read_text() and water.name not in text
    train = read_frames(tmp_path / "data" / "train.xyz.xz")
    test = read_frames(tmp_path / "data" / "test.xyz.xz")
    assert [len(frame.atomic_numbers) for frame in train] == [1, 1, 1, 1, 2, 3, 3, 3] and len(test) == 2
    expected = some_frames(WATER)
    assert train[5].energy == pytest.approx(expected.energies[0], abs=1e-6)
    np.testing.assert_allclose(train[5].forces, expected.forces[0], atol=1e-6)


def test_results_stop_at_the_deadline_and_finish_what_is_under_way(scripts):
    script = scripts("make_starter_data")
    names = [SimpleNamespace(name=str(k)) for k in range(50)]

    def run(seconds):
        started = []
        script._sample = lambda system: (started.append(system.name), time.sleep(0.01))
        with ThreadPoolExecutor(2) as pool:
            done = [system.name for system, _ in script._results(pool, names, 2, time.monotonic() + seconds)]
        assert sorted(done) == sorted(started)
        return len(done)

    original = script._sample
    try:
        assert run(-1) == 0 and 0 < run(0.05) < 50 and run(60) == 50
    finally:
        script._sample = original


def test_systems_that_fail_are_counted(scripts, monkeypatch):
    script = scripts("make_starter_data")
    module = SimpleNamespace(sample=lambda system, molecules: molecules[system])
    monkeypatch.setitem(sys.modules, "starter_data.sampling", module)
    assert script._sample(5) == (None, {}, {"system failed (IndexError)": 1})


@pytest.mark.parametrize(("exists", "fault"), [(False, "does not exist"), (True, "no structures yet")])
def test_nothing_is_written_without_labels(scripts, tmp_path, exists, fault):
    pytest.importorskip("tblite", reason="needs tblite: pip install tblite")
    script = scripts("make_starter_data")
    storage.write_molecules(tmp_path / "a.json.gz", [WATER], [])
    if exists:
        storage.Database(
            tmp_path / "labels.db", script.sha256((tmp_path / "a.json.gz").read_bytes()).hexdigest()
        )
    with pytest.raises(ValueError, match=fault):
        script.write(tmp_path / "a.json.gz", tmp_path / "labels.db", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --- labels ---


@needs_tblite
def test_forces_are_derivatives_of_the_energy(scripts):
    label = scripts("starter_data.sampling").label
    numbers, positions = arrays(ETHANOL)
    energy, forces, gap = label(numbers, positions)
    assert gap > 5 and np.abs(forces.sum(axis=0)).max() < 1e-6
    shift = np.zeros_like(positions)
    shift[2, 0] = 1e-3
    slope = (label(numbers, positions + shift)[0] - label(numbers, positions - shift)[0]) / 2e-3
    assert forces[2, 0] == pytest.approx(-slope, abs=1e-4)


@needs_tblite
def test_free_atoms_agree_with_the_bundled_data(scripts):
    bundled = read_frames(SCRIPTS.parent / "examples" / "organic" / "train.xyz")[:4]
    sampling = scripts("starter_data.sampling")
    energies = {
        symbol: sampling.label([number], np.zeros((1, 3)), sampling.MULTIPLICITY[symbol] - 1)[0]
        for symbol, number in {"H": 1, "C": 6, "N": 7, "O": 8}.items()
    }
    assert sorted(energies.values()) == pytest.approx(sorted(f.energy for f in bundled), abs=1e-5)


@needs_tblite
@pytest.mark.parametrize(
    ("members", "kinds"),
    [
        ([0], {"conformer", "dynamics", "dynamics-hot", "bond"}),
        ([0, 0], {"collision", "contact", "apart", "proton", "conformer", "dynamics"}),
        ([1], {"conformer", "bond"}),
    ],
)
def test_samples_are_reproducible_and_physical(scripts, members, kinds):
    sampling = scripts("starter_data.sampling")
    molecules = [WATER, stored("HF", "F")]
    system = storage.System(f"test {members}", "small", "train", members)
    frames, seconds, dropped = sampling.sample(system, molecules)
    again, _, _ = sampling.sample(system, molecules)
    np.testing.assert_array_equal(frames.positions, again.positions)
    np.testing.assert_array_equal(frames.energies, again.energies)
    assert set(frames.kinds) == kinds == set(seconds)
    assert np.linalg.norm(frames.forces, axis=-1).max() <= sampling.MAX_FORCE
    assert np.ptp(frames.energies) <= sampling.MAX_ENERGY[0] + sampling.MAX_ENERGY[1] * len(frames.numbers)
    np.testing.assert_array_equal(frames.positions, frames.positions.round(storage.POSITION_DECIMALS))
    energy, forces, _ = sampling.label(frames.numbers, frames.positions[-1])
    assert energy == pytest.approx(frames.energies[-1], abs=1e-8)


@needs_tblite
def test_absurd_structures_are_dropped_and_counted(scripts):
    sampling = scripts("starter_data.sampling")
    numbers, positions = arrays(WATER)
    sampler = sampling.Sampler(numbers, WATER.bonds, np.random.default_rng(0))

    def reason(shape):
        return sampler.add("bond", shape)

    squeezed, merged = positions.copy(), positions.copy()
    squeezed[1] = positions[0] + 0.6 * (positions[1] - positions[0])
    merged[1] = positions[0] + 0.3 * (positions[1] - positions[0])
    assert reason(positions) is None
    assert reason(positions + 1.0) == "duplicate"
    assert reason(squeezed) == "force too large"
    assert reason(merged) == "atoms closer than 0.4 Angstrom"
    assert reason(positions * np.nan) == "dynamics or relaxation failed"
    assert len(sampler.kept) == 1 and len(sampler.frames().energies) == 1
