"""Extended XYZ: frames, faults named with file, frame and atom, isotopes, tensors of six numbers, file names."""

import codecs
import time

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule

from dpa4.data import read_frames, read_images
from dpa4.data.readers import read_atoms

TWO = '2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="F F F"\nH 0 0 0 0.1 0 0\nH 0 0 0.74 -0.1 0 0\n'


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("symbols", ["D T", "d t"])
def test_isotopes_are_hydrogen_with_their_masses(tmp_path, symbols):
    first, second = symbols.split()
    text = f"4\n\n{first} 0 0 0\nO 0 0 1\n{second} 0 0 2\nH 0 0 3\n"
    (frame,) = read_frames(write(tmp_path / "hdo.xyz", text))
    assert frame.atomic_numbers.tolist() == [1, 8, 1, 1]
    (atoms,) = read_images(tmp_path / "hdo.xyz")
    np.testing.assert_allclose(atoms.get_masses(), [2.014101778, 15.999, 3.016049281, 1.008])
    ase.io.write(tmp_path / "again.xyz", atoms)
    (again,) = read_images(tmp_path / "again.xyz")
    np.testing.assert_allclose(again.get_masses(), atoms.get_masses(), atol=1e-8)


def test_a_column_of_masses_is_preferred_to_those_of_isotopes(tmp_path):
    text = "2\nProperties=pos:R:3:species:S:1:masses:R:1\n0 0 0 D 2.5\n0 0 1 O 18\n"
    (atoms,) = read_images(write(tmp_path / "a.xyz", text))
    assert atoms.get_masses().tolist() == [2.5, 18.0]


@pytest.mark.parametrize("key", ["stress", "virial", "REF_stress", "REF_virial"])
@pytest.mark.parametrize("form", ['"{}"', "{{{}}}", "[{}]", "'{}'"])
def test_tensors_of_six_numbers(tmp_path, key, form):
    value = form.format("0.1 0.2 0.3 0.4 0.5 0.6")
    energy = "REF_energy" if key.startswith("REF") else "energy"
    text = f'1\nLattice="5 0 0 0 5 0 0 0 5" {key}={value} {energy}=-1\nH 0 0 0\n'
    (frame,) = read_frames(write(tmp_path / "a.xyz", text))
    full = np.array([[0.1, 0.6, 0.5], [0.6, 0.2, 0.4], [0.5, 0.4, 0.3]])
    np.testing.assert_allclose(frame.virial, full * (-125 if "stress" in key else 1), rtol=1e-15)
    assert frame.energy == -1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.xyz", "a", "POSCAR"])
def test_byte_order_marks(tmp_path, encoding, name):
    text = TWO
    if name == "POSCAR":
        ase.io.write(tmp_path / "plain", bulk("Cu"), format="vasp")
        text = (tmp_path / "plain").read_text()
    (tmp_path / name).write_text(text, encoding=encoding)
    assert [len(f) for f in read_frames(tmp_path / name)] == [1 if name == "POSCAR" else 2]


def test_byte_order_mark_of_big_endian_text(tmp_path):
    (tmp_path / "a.xyz").write_bytes(codecs.BOM_UTF16_BE + TWO.encode("utf-16-be"))
    assert len(read_frames(tmp_path / "a.xyz")) == 1


def test_blank_lines_hide_no_frame(tmp_path):
    frames = read_frames(write(tmp_path / "a.xyz", f"\n{TWO}\n \n{TWO}{TWO}\n\n"))
    assert [f.origin for f in frames] == [f"{tmp_path / 'a.xyz'}, frame {k}" for k in range(3)]


def test_cell_vectors_after_the_atoms(tmp_path):
    (atoms, _) = read_images(
        write(tmp_path / "a.xyz", "1\ncomment\nH 0 0 0\nVEC1 3 0 0\nVEC2 0 4 0\n1\n\nH 0 0 0\n")
    )
    assert atoms.pbc.tolist() == [True, True, False]
    assert atoms.cell.lengths().tolist() == [3, 4, 0]


def test_the_last_frame_alone(tmp_path):
    path = write(tmp_path / "a.xyz", TWO + TWO.replace("-1.0", "-2.0"))
    ((origin, atoms),) = read_atoms(path, last=True)
    assert atoms.get_potential_energy() == -2 and origin.endswith("frame 1")
    assert [a.get_potential_energy() for a in read_images(path)] == [-1, -2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO + "2\n\nH 0 0 0\n", "frame 1: 2 atoms are declared, but the file ends after 1"),
        ("3\n", "frame 0: 3 atoms are declared, but the file ends after 0"),
        (f"3\n\nH 0 0 0\nH 0 0 1\n{TWO}", "frame 0: atom 2 has 1 columns, but 4 are declared .*: '2'; correct"),
        (f"{TWO}H 0 0 0\n", "frame 1: its first line must be the number of atoms, got 'H 0 0 0'; if the"),
        (TWO + "-1\n\n", "frame 1: its first line must be the number of atoms, got '-1'"),
        (TWO + TWO.replace("0.74", "o.74"), "frame 1: atom 1: 'o.74' is not a number; columns are species:S:1"),
        (TWO.replace("H 0 0 0 ", "Qq 0 0 0 "), "frame 0: atom 0: 'Qq' is no chemical symbol; write H, C, Si"),
        (TWO.replace("H 0 0 0 ", "X 0 0 0 "), r"frame 0: atom 0 is a ghost or dummy atom \(X\).*; remove or replace"),
        (TWO.replace("0.74", "1e306"), r"frame 0: the position of atom 1 is beyond 1e\+08 Angstrom: .* 1e\+306"),
        ('1\nLattice="1e9 0 0 0 5 0 0 0 5"\nH 0 0 0\n', r"frame 0: a cell vector has the component 1e\+09"),
        ('1\nLattice="5 0 0 0 5 0"\nH 0 0 0\n', "frame 0: it cannot be read: .*Lattice"),
        ("1\nstress=5 energy=2\nH 0 0 0\n", "frame 0: it cannot be read: .*stress"),
        (f"1\n{'x' * 10**7}\nH 0 0 0\n", "frame 0: it cannot be read: its second line has 10,000,000 characters"),
        (TWO.replace("R:3", f"R:{10**9}"), "frame 0: it cannot be read: .* declares more than 100,000 columns"),
        (TWO + TWO.replace("Properties=species:S:1", "Properties=species:Q:1"), "frame 1: it cannot be read: .*: Q"),
    ],
)  # fmt: skip
def test_faults_are_named_with_file_and_frame(tmp_path, text, message):
    path = write(tmp_path / "a.xyz", text)
    for read in (read_frames, read_images):
        with pytest.raises(ValueError, match=rf"^{path}, {message}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_huge_number_of_atoms_ends_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(
        ValueError, match="frame 0: 1,000,000,000 atoms are declared, but the file ends after 1"
    ):
        read_frames(write(tmp_path / "a.xyz", "1000000000\n\nH 0 0 0\n"))
    with pytest.raises(ValueError, match="must be the number of atoms, got '9999"):
        read_frames(write(tmp_path / "b.xyz", f"{'9' * 5000}\n\nH 0 0 0\n"))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "name",
    [
        "run@300K.xyz",
        "run.xyz@0",
        "a b.xyz",
        "c:run.xyz",
        "postgres_run.xyz",
        "mysql.xyz",
        "http:x.xyz",
        "*.xyz",
    ],
)
def test_names_of_files_are_taken_as_they_are(tmp_path, monkeypatch, name):
    """ASE takes the text behind @ for an index, and some names for addresses of databases."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.xyz").write_text(TWO + TWO, encoding="utf-8")
    (tmp_path / "run").write_text(TWO + TWO, encoding="utf-8")
    (tmp_path / name).write_text(TWO.replace("-1.0", "-7.0"), encoding="utf-8")
    assert [f.energy for f in read_frames(name)] == [-7.0]


def test_names_of_databases_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("postgres x?mode=rw#.db", "a@1.db", "mysql:b.json"):
        with ase.db.connect(tmp_path / name) as database:
            database.write(molecule("H2O"))
        assert [len(f) for f in read_frames(name)] == [3]


def test_other_formats_name_the_frame_and_the_isotope(tmp_path):
    ase.io.write(tmp_path / "a.vasp", bulk("Cu"))
    text = (tmp_path / "a.vasp").read_text().replace("Cu", "D ")
    with pytest.raises(ValueError, match="a.vasp: this format has no symbol D; write H, or convert"):
        read_frames(write(tmp_path / "a.vasp", text))
    (tmp_path / "latin.xyz").write_bytes(TWO.replace("energy", "T=300°C energy").encode("latin-1"))
    with pytest.raises(
        ValueError, match="latin.xyz, frame 0 is not a text in UTF-8; convert it, for example with iconv"
    ):
        read_frames(tmp_path / "latin.xyz")
