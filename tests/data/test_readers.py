"""Readers: every format, every convention of labels, signs, and messages."""

import zipfile
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from dpa4.data import Frame, LabelKeys, frame_from_atoms, read_frames
from helpers import SHARED

DATA = SHARED / "data"
STRESS = np.array([[0.01, 0.04, 0.05], [0.04, 0.02, 0.06], [0.05, 0.06, 0.03]])


def labelled(structure: Atoms, seed: int = 0, stress: bool = True) -> Atoms:
    """Structure with energy, forces and stress in a single-point calculator."""
    rng = np.random.default_rng(seed)
    labels = {"energy": -3.25 - seed, "forces": rng.normal(size=(len(structure), 3))}
    if stress:
        labels["stress"] = full_3x3_to_voigt_6_stress(STRESS + seed)
    structure.calc = SinglePointCalculator(structure, **labels)
    return structure


def copper(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return labelled(atoms, seed)


def water(seed: int = 0) -> Atoms:
    return labelled(molecule("H2O"), seed, stress=False)


def assert_frame(frame: Frame, atoms: Atoms, tolerance: float = 1e-7) -> None:
    """Check that the frame holds the structure and the labels of its calculator."""
    assert frame.atomic_numbers.tolist() == atoms.numbers.tolist()
    np.testing.assert_allclose(frame.positions, atoms.positions, rtol=0, atol=tolerance)
    np.testing.assert_allclose(frame.cell, atoms.cell.array, rtol=0, atol=tolerance)
    assert frame.pbc.tolist() == atoms.pbc.tolist()
    assert frame.energy == pytest.approx(atoms.calc.results["energy"], abs=tolerance)
    np.testing.assert_allclose(frame.forces, atoms.calc.results["forces"], rtol=0, atol=tolerance)
    if "stress" in atoms.calc.results:
        np.testing.assert_allclose(
            frame.virial, -atoms.get_volume() * atoms.get_stress(voigt=False), rtol=0, atol=20 * tolerance
        )
    else:
        assert frame.virial is None


# Formats


def test_extxyz(tmp_path):
    images = [water(), copper(1), copper(2)]
    images[1].info |= {"config_type": "bulk", "config_weight": 2.5, "charge": 1, "spin": 2}
    ase.io.write(tmp_path / "train.xyz", images)
    frames = read_frames(tmp_path / "train.xyz")
    for frame, atoms in zip(frames, images, strict=True):
        assert_frame(frame, atoms)
    assert [f.group for f in frames] == ["train", "bulk", "train"]
    assert [f.weight for f in frames] == [1.0, 2.5, 1.0]
    assert [f.charge_spin for f in frames] == [{}, {"charge": 1, "spin": 2}, {}]
    assert frames[2].origin == f"{tmp_path / 'train.xyz'}, frame 2"


@pytest.mark.parametrize("name", ["set.traj", "set.db", "set.json", "set.aselmdb"])
def test_ase_files(tmp_path, name):
    images = [water(), copper(1), copper(2)]
    if name == "set.traj":
        ase.io.write(tmp_path / name, images)
    else:
        options = {"type": "aselmdb"} if name.endswith("lmdb") else {}
        if options:
            pytest.importorskip("ase_db_backends", reason="needs ase-db-backends")
        with ase.db.connect(tmp_path / name, **options) as database:
            for atoms in images:
                database.write(atoms, config_type="known", data={"charge": 2, "spin": 3})
    frames = read_frames(tmp_path / name)
    for frame, atoms in zip(frames, images, strict=True):
        assert_frame(frame, atoms)
        assert frame.group == ("set" if name == "set.traj" else "known")
        assert frame.charge_spin == ({} if name == "set.traj" else {"charge": 2, "spin": 3})


def test_aselmdb_shards(tmp_path):
    pytest.importorskip("ase_db_backends", reason="needs ase-db-backends")
    for k in range(2):
        with ase.db.connect(tmp_path / f"data.000{k}.aselmdb", type="aselmdb") as database:
            database.write(copper(k))
    frames = read_frames(tmp_path)
    for k in range(2):
        assert_frame(frames[k], copper(k))


def test_archive_of_extended_xyz_files(tmp_path):
    ase.io.write(tmp_path / "a.xyz", [water(), copper(1)], format="extxyz")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "a.xyz", "set/a.extxyz")
        archive.write(tmp_path / "a.xyz", "b.xyz")
        archive.writestr("readme.txt", "no structure")
    frames = read_frames(tmp_path / "all.zip")
    assert [len(f) for f in frames] == [3, 4, 3, 4]
    assert frames[1].origin == f"{tmp_path / 'all.zip'}, set/a.extxyz, frame 1"
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="broken.zip cannot be read as a zip archive: BadZipFile"):
        read_frames(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="empty.zip has no structure"):
        read_frames(tmp_path / "empty.zip")


def test_several_paths_are_read_in_order(tmp_path):
    ase.io.write(tmp_path / "b.xyz", copper(1))
    ase.io.write(tmp_path / "a.xyz", [water(), water()])
    frames = read_frames([tmp_path / "b.xyz", str(tmp_path / "a.xyz")])
    assert [len(f) for f in frames] == [4, 3, 3]
    assert [f.group for f in frames] == ["b", "a", "a"]


# deepmd npy


def write_set(folder: Path, images: list[Atoms], dtype: str = "float64", **extra) -> None:
    """Write one set of a deepmd system."""
    folder.mkdir(parents=True)
    n = len(images)
    arrays = {
        "coord": [a.positions for a in images],
        "energy": [a.calc.results["energy"] for a in images],
        "force": [a.calc.results["forces"] for a in images],
    }
    if images[0].pbc.any():
        arrays["box"] = [a.cell.array for a in images]
        arrays["virial"] = [-a.get_volume() * a.get_stress(voigt=False) for a in images]
    for name, values in (arrays | extra).items():
        np.save(folder / f"{name}.npy", np.asarray(values, dtype=dtype).reshape(n, -1))


def write_system(system: Path, sets: list[list[Atoms]], **extra) -> None:
    """Write a standard deepmd system; its type map is not in the order of atomic numbers."""
    for k, images in enumerate(sets):
        write_set(system / f"set.{k:03}", images, **extra)
    types = {"O": 0, "H": 1, "Cu": 2}
    (system / "type.raw").write_text("\n".join(str(types[s]) for s in sets[0][0].symbols))
    (system / "type_map.raw").write_text("O\nH\nCu\n")


def test_deepmd_standard(tmp_path):
    write_system(tmp_path / "cu", [[copper(0), copper(1)], [copper(2)]])
    frames = read_frames(tmp_path / "cu")
    for k, frame in enumerate(frames):
        assert_frame(frame, copper(k), 1e-12)
    assert {f.group for f in frames} == {"cu"}
    assert frames[2].origin == f"{tmp_path / 'cu' / 'set.001'}, frame 0"


def test_deepmd_parent_nopbc_and_charge(tmp_path):
    write_system(tmp_path / "all/b/water", [[water(0), water(1)]], charge_spin=[[0, 1], [-1, 2]])
    (tmp_path / "all/b/water/nopbc").touch()
    write_system(tmp_path / "all/a", [[copper(5)]], dtype="float32")
    frames = read_frames(tmp_path / "all")
    assert [f.group for f in frames] == ["a", "water", "water"]
    assert_frame(frames[0], copper(5), 1e-5)
    assert_frame(frames[1], water(0), 1e-12)
    assert_frame(frames[2], water(1), 1e-12)
    assert [f.charge_spin for f in frames] == [{}, {"charge": 0, "spin": 1}, {"charge": -1, "spin": 2}]


def test_deepmd_single_frame_arrays_may_be_flat(tmp_path):
    write_system(tmp_path / "cu", [[copper(3)]])
    for file in (tmp_path / "cu" / "set.000").glob("*.npy"):
        np.save(file, np.load(file).ravel())
    assert_frame(read_frames(tmp_path / "cu")[0], copper(3), 1e-12)


def test_deepmd_mixed_type_removes_padding(tmp_path):
    small, large = water(0), labelled(molecule("CH3OH"), 1, stress=False)
    padded = small.copy() + Atoms("X3")
    forces = np.vstack([small.calc.results["forces"], np.zeros((3, 3))])
    padded.calc = SinglePointCalculator(padded, energy=small.calc.results["energy"], forces=forces)
    system = tmp_path / "6"
    write_set(system / "set.000", [padded, large])
    index = {"C": 0, "O": 1, "H": 2, "X": -1}
    np.save(system / "set.000/real_atom_types.npy", [[index[s] for s in a.symbols] for a in (padded, large)])
    (system / "type.raw").write_text("0 0 0 0 0 0")
    (system / "type_map.raw").write_text("C O H")
    (system / "nopbc").touch()
    frames = read_frames(system)
    assert_frame(frames[0], small, 1e-12)
    assert_frame(frames[1], large, 1e-12)


def test_deepmd_without_labels(tmp_path):
    write_system(tmp_path / "cu", [[copper()]])
    for name in ("energy", "force", "virial"):
        (tmp_path / f"cu/set.000/{name}.npy").unlink()
    frame = read_frames(tmp_path / "cu")[0]
    assert frame.energy is frame.forces is frame.virial is None


def _no_type_map(system: Path) -> None:
    (system / "type_map.raw").unlink()


def _unknown_element(system: Path) -> None:
    (system / "type_map.raw").write_text("O H Qq")


def _few_names(system: Path) -> None:
    (system / "type_map.raw").write_text("O H")


def _no_box(system: Path) -> None:
    (system / "set.000/box.npy").unlink()


def _no_coordinates(system: Path) -> None:
    (system / "set.000/coord.npy").unlink()


def _no_set(system: Path) -> None:
    (system / "set.000").rename(system / "other")


def _wrong_shape(system: Path) -> None:
    np.save(system / "set.000/force.npy", np.zeros((1, 9)))


def _not_finite(system: Path) -> None:
    np.save(system / "set.000/energy.npy", [np.inf])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_type_map, "cu has no type_map.raw; add it"),
        (_unknown_element, r"type_map.raw names \['Qq'\]; use chemical symbols"),
        (
            _few_names,
            "type.raw: the type of atom 0 in frame 0 is 2; allowed are .* as type_map.raw has 2 names",
        ),
        (_no_box, "set.000 has no box.npy; add it, or an empty file nopbc"),
        (_no_coordinates, "set.000 has no coord.npy"),
        (_no_set, "cu has type.raw but no set"),
        (_wrong_shape, r"force.npy has shape \(1, 9\), which does not match \(1, 4, 3\)"),
        (_not_finite, "set.000, frame 0: energy not finite"),
    ],
)
def test_deepmd_errors(tmp_path, damage, message):
    write_system(tmp_path / "cu", [[copper()]])
    damage(tmp_path / "cu")
    with pytest.raises(ValueError, match=message):
        read_frames(tmp_path / "cu")


# Labels


def test_energy_before_free_energy():
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, free_energy=-2.0)
    assert frame_from_atoms(atoms).energy == -2.0
    atoms.info["energy"] = -1.0
    assert frame_from_atoms(atoms).energy == -1.0


def test_force_is_an_accepted_name():
    atoms = molecule("H2O")
    atoms.arrays["force"] = np.ones((3, 3))
    assert frame_from_atoms(atoms).forces.tolist() == np.ones((3, 3)).tolist()


VOIGT = full_3x3_to_voigt_6_stress(STRESS)
SHAPES = {"voigt": VOIGT, "nine": STRESS.ravel(), "matrix": STRESS, "list": VOIGT.tolist()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key", ["REF_stress", "stress"])
def test_stress_becomes_virial(key, shape):
    atoms = bulk("Cu", cubic=True)
    atoms.info[key] = SHAPES[shape]
    np.testing.assert_allclose(
        frame_from_atoms(atoms).virial, -atoms.get_volume() * STRESS, rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key", ["REF_virial", "REF_virials", "virial", "virials"])
def test_virial_is_taken_as_it_is(key, shape):
    atoms = bulk("Cu", cubic=True)
    atoms.info[key] = SHAPES[shape]
    np.testing.assert_array_equal(frame_from_atoms(atoms).virial, STRESS)


def test_virial_is_minus_the_derivative_along_strain():
    """Compressed copper of a real calculator pushes outwards."""
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell * 0.95, scale_atoms=True)
    atoms.calc = EMT()
    atoms.get_stress()
    virial = frame_from_atoms(atoms).virial
    energies = []
    for strain in (1e-5, -1e-5):
        strained = atoms.copy()
        strained.set_cell(atoms.cell * [1 + strain, 1, 1], scale_atoms=True)
        strained.calc = EMT()
        energies.append(strained.get_potential_energy())
    assert virial[0, 0] == pytest.approx(-(energies[0] - energies[1]) / 2e-5, rel=1e-5)
    assert virial[0, 0] > 0


def test_zero_stress_of_a_molecule_is_no_label():
    atoms = molecule("H2O")
    atoms.info["stress"] = np.zeros(6)
    assert frame_from_atoms(atoms).virial is None
    atoms.info["virial"] = np.zeros(9)
    del atoms.info["stress"]
    assert frame_from_atoms(atoms).virial.tolist() == np.zeros((3, 3)).tolist()


def test_named_keys_are_the_only_source():
    atoms = copper()
    atoms.info |= {"dft_energy": -7.0, "dft_virial": STRESS, "w": STRESS}
    atoms.arrays["dft_forces"] = np.full((4, 3), 7.0)
    frame = frame_from_atoms(atoms, LabelKeys("dft_energy", "dft_forces", virial="w"))
    assert (frame.energy, frame.forces[0, 0]) == (-7.0, 7.0)
    np.testing.assert_array_equal(frame.virial, STRESS)
    frame = frame_from_atoms(atoms, LabelKeys(stress="dft_virial"))  # the user declares its kind
    np.testing.assert_allclose(frame.virial, -atoms.get_volume() * STRESS)
    bare = frame_from_atoms(copper(), LabelKeys("dft_energy", "dft_forces", "dft_stress"))
    assert bare.energy is bare.forces is bare.virial is None


def test_named_keys_survive_the_file(tmp_path):
    atoms = copper()
    atoms.info["dft_energy"] = -7.0
    ase.io.write(tmp_path / "a.xyz", atoms)
    ase.io.write(tmp_path / "b.xyz", water())
    frames = read_frames([tmp_path / "a.xyz", tmp_path / "b.xyz"], LabelKeys(energy="dft_energy"))
    assert [f.energy for f in frames] == [-7.0, None]
    with pytest.raises(
        ValueError, match=r"data.keys.energy = 'dft_energy' is in no .*b.xyz.*'energy', 'forces'"
    ):
        read_frames(tmp_path / "b.xyz", LabelKeys(energy="dft_energy"))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"energy": np.nan}, "train.xyz, frame 12: energy not finite; correct or remove"),
        ({"energy": "low"}, "energy of train.xyz, frame 12 must be a number, got 'low'"),
        ({"energy": [1.0, 2.0]}, "energy of train.xyz, frame 12 must be a number"),
        ({"virial": np.full(9, np.inf)}, "train.xyz, frame 12: virial not finite"),
        (
            {"stress": np.zeros(5)},
            r"stress of train.xyz, frame 12 must have 6 or 9 numbers, got shape \(5,\)",
        ),
        ({"stress": np.ones(6)}, "stress of train.xyz, frame 12 needs a cell with a volume"),
        ({"config_weight": -1}, "config_weight of train.xyz, frame 12 must be a finite number >= 0, got -1"),
        (
            {"config_weight": np.nan},
            "config_weight of train.xyz, frame 12 must be a finite number >= 0, got nan",
        ),
        (
            {"config_weight": np.inf},
            "config_weight of train.xyz, frame 12 must be a finite number >= 0, got inf",
        ),
    ],
)
def test_label_errors(info, message):
    atoms = molecule("H2O")
    atoms.info |= info
    with pytest.raises(ValueError, match=message):
        frame_from_atoms(atoms, origin="train.xyz, frame 12")


def test_array_errors():
    atoms = molecule("H2O")
    atoms.arrays["forces"] = np.array([[0, 0, 0], [0, np.nan, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="a.xyz: forces of atom 1 not finite"):
        frame_from_atoms(atoms, origin="a.xyz")
    atoms.arrays["forces"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"forces of a.xyz must be numbers of shape \(3, 3\)"):
        frame_from_atoms(atoms, origin="a.xyz")
    atoms = molecule("H2O")
    atoms.positions[2, 0] = np.inf
    with pytest.raises(ValueError, match="a.xyz: positions of atom 2 not finite"):
        frame_from_atoms(atoms, origin="a.xyz")
    with pytest.raises(ValueError, match="a.xyz has no atoms; remove it"):
        frame_from_atoms(Atoms(), origin="a.xyz")


def test_path_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory: .*absent.xyz"):
        read_frames(tmp_path / "absent.xyz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a directory with neither deepmd systems \(type.raw\)"):
        read_frames(tmp_path / "empty")
    (tmp_path / "broken.xyz").write_text("3\n\nH 0 0 0\n")
    with pytest.raises(
        ValueError, match="broken.xyz, frame 0: 3 atoms are declared, but the file ends after 1"
    ):
        read_frames(tmp_path / "broken.xyz")
    (tmp_path / "broken.db").write_bytes(b"not a database, whatever its name says" * 9)
    with pytest.raises(ValueError, match="broken.db cannot be read as an ASE database: "):
        read_frames(tmp_path / "broken.db")
    with ase.db.connect(tmp_path / "none.db") as database:
        database.delete([database.write(water())])
    with pytest.raises(ValueError, match="none.db has no structure"):
        read_frames(tmp_path / "none.db")


# Real files


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the reference data in {DATA}")
@pytest.mark.parametrize(
    ("file", "count", "atoms", "virial"),
    [
        ("acac/train_300K.xyz", 500, 15, False),
        ("rmd17/ethanol_test.xyz", 1000, 9, False),
        ("mlearn/Mo_test.xyz", 23, None, True),
        ("inorganic/mpf-alkali-TP.xyz", 460, None, True),
    ],
)
def test_real_files(file, count, atoms, virial):
    frames = read_frames(DATA / file)
    assert len(frames) == count
    for frame in frames:
        assert frame.energy is not None
        assert frame.forces.shape == frame.positions.shape
        assert atoms in (None, len(frame))
        assert (frame.virial is not None) == virial
        # Unshifted forces of real calculations: no net force beyond their convergence.
        assert np.abs(frame.forces.sum(0)).max() < 0.05 * len(frame)


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the reference data in {DATA}")
def test_groups_and_signs_of_real_stress():
    frames = read_frames(DATA / "mlearn/Mo_test.xyz")
    assert {f.group for f in frames} == {"Vacancy", "AIMD-NVT", "Elastic", "Surface"}
    first = ase.io.read(DATA / "mlearn/Mo_test.xyz", index=0)
    np.testing.assert_allclose(
        frames[0].virial, -first.get_volume() * first.get_stress(voigt=False), rtol=1e-12, atol=1e-12
    )
