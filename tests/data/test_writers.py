"""Structure files can be read again, whatever entries the structures have, and carry no labels of their start."""

import io
import warnings
from datetime import date

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms, FixCartesian
from ase.spacegroup import crystal

from dpa4.data.writers import with_results, write_structures

LETTERS = [
    *"aZ0 _=\"'{}[]\\,:;#%-\t\n\r\0\x0b\x1c\x85\u2028Åß漢🙂\ud800",
    "_JSON ",
    "T",
    "true",
    "1e5",
    "nan",
    "step",
]


def three(**arrays) -> Atoms:
    atoms = Atoms("CO2", positions=np.arange(9.0).reshape(3, 3))
    for name, array in arrays.items():
        atoms.arrays[name] = np.asarray(array)
    return atoms


def again(*images: Atoms) -> list[Atoms]:
    """Structures after writing and reading, which end with a structure whose entry must survive."""
    last = three()
    last.info["step"] = 4
    text = io.StringIO()
    write_structures(text, [*images, last])
    assert text.getvalue().isascii()
    found = ase.io.read(io.StringIO(text.getvalue()), ":", format="extxyz")
    assert len(found) == len(images) + 1
    assert found[-1].info == {"step": 4}
    return found[:-1]


TEXTS = [
    "", " ", "plain", "two words", "first\nsecond", "carriage\rreturn", "tab\t", "12", "007", "T", "F T", "1 2 3",
    "C:\\new\\table", 'a "quoted" one', "it's", "{[(", "=", "a=b", "_JSON [1]", "_JSON", "Å", "漢字", "🙂", "\ud800",
    "\0", "\u2028", "\x85", "\\", '\\"', "None", "nan", "1e400", "#", "Lattice=\"1\"",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text):
    atoms = three()
    atoms.info = {"note": text, "step": 7}
    (found,) = again(atoms)
    assert str(found.info["note"]) == text
    assert found.info["step"] == 7


VALUES = [
    None, True, np.True_, 5, 10**30, 0.1, np.float32(0.1), np.nan, -np.inf, np.array([1.0, 2.5]), np.array([1.5]),
    np.array(2), np.zeros(0), np.eye(2), np.zeros((2, 3, 3)), np.array([True, False]),
    np.array([1, 2], dtype=np.uint8),
    np.array(["a b", "c\nd", "\\"]), [1, "a", None], {"a": {"b": [1, 2.5, "Å\n"]}}, {}, [], [[]], {"a": np.nan},
]  # fmt: skip


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


@pytest.mark.parametrize("value", VALUES)
def test_values(value):
    atoms = three()
    atoms.info = {"value": value, "step": 7}
    (found,) = again(atoms)
    np.testing.assert_equal(plain(found.info["value"]), plain(value))
    assert found.info["step"] == 7


def test_keys():
    atoms = three()
    atoms.info = {
        "": 1, 5: 2, "two words": 3, "a=b": 4, 'q"': 5, "Å": 6, "line\nbreak": 7, ("a", 1): 8, None: 9, "uid": "x",
        "Lattice": "no", "Properties": "pos:R:3", "pbc": "F", "stress": "text", "dipole": "text",
    }  # fmt: skip
    (found,) = again(atoms)
    assert found.calc is None
    assert sorted(map(str, found.info.values())) == ["1", "2", "3", "4", "5", "6", "7", "8", "9", "x"]
    assert found.info["two words"] == 3 and found.info["a_b"] == 4 and found.info["5"] == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1 + 2j, object(), {1, 2}, date(2026, 1, 1), np.array([1j]), b"bytes"])
def test_values_without_a_form_are_told(value):
    atoms = three()
    atoms.info = {"value": value, "step": 7}
    with pytest.warns(UserWarning, match="the entry 'value' of atoms.info .* is left out"):
        (found,) = again(atoms)
    assert found.info == {"step": 7}


def test_space_groups_of_ase():
    atoms = crystal("Cu", [(0, 0, 0)], spacegroup=225, cellpar=[3.6] * 3 + [90] * 3)
    (found,) = again(atoms)
    assert found.info["spacegroup"] == "F m -3 m"


def test_columns():
    atoms = three(
        label=["a b", "", "c\nd"],
        born=np.arange(27.0).reshape(3, 3, 3),
        big=[2**40, 0, -(2**40)],
        small=np.array([1, 2, 3], dtype=np.uint8),
        single=np.ones((3, 1)),
        mixed=np.array([None, 1, "x"], dtype=object),
        flags=[True, False, True],
        x=np.arange(6.0).reshape(3, 2),
        x0=[7, 8, 9],
        unicode=["Å", "漢", "b"],
        raw=np.array([b"a", b"b c", b""]),
        half=np.array([0.5, 1, 2], dtype=np.float16),
    )
    atoms.arrays |= {
        "odd name: 1": np.arange(3), "charge": np.arange(3) * 1.5, "Z": np.arange(3), "move_mask": np.arange(3),
        "forces0": np.arange(3), "magmoms": np.ones(3), "": np.arange(3), "Å": np.arange(3),
    }  # fmt: skip
    atoms.calc = with_results(atoms, energy=-1.0, forces=np.ones((3, 3))).calc
    (found,) = again(atoms)
    assert found.arrays["label"].tolist() == ["a_b", "_", "c_d"]
    assert found.arrays["born"].tolist() == np.arange(27.0).reshape(3, 9).tolist()
    assert found.arrays["big"].tolist() == [2**40, 0, -(2**40)]
    assert found.arrays["x"].shape == (3, 2) and found.arrays["x0_"].tolist() == [7, 8, 9]
    assert found.arrays["mixed"].tolist() == ["None", "1", "x"]
    assert found.arrays["charge_"].tolist() == [0, 1.5, 3] and found.arrays["odd_name__1"].tolist() == [
        0,
        1,
        2,
    ]
    assert found.arrays["flags"].tolist() == [True, False, True]
    assert found.numbers.tolist() == [6, 8, 8] and not found.constraints
    assert found.get_forces().tolist() == np.ones((3, 3)).tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "array", [np.ones(3) * 1j, np.zeros((3, 0)), np.zeros(3, "M8[s]"), np.zeros(3, [("a", "f8")])]
)
def test_columns_without_a_form_are_told(array):
    with pytest.warns(UserWarning, match="the array 'odd' .* is left out"):
        (found,) = again(three(odd=array))
    assert "odd" not in found.arrays


def test_structure_and_constraints_survive():
    atoms = bulk("Cu", cubic=True)
    atoms.set_constraint([FixAtoms([0]), FixCartesian([1], [True, False, False])])
    atoms.set_momenta(np.full((4, 3), 0.5), apply_constraint=False)
    atoms.set_initial_magnetic_moments([1.0] * 4)
    (found,) = again(atoms)
    assert found.pbc.all() and np.allclose(found.cell, atoms.cell)
    assert found.get_momenta()[2].tolist() == [0.5] * 3
    assert found.get_initial_magnetic_moments().tolist() == [1.0] * 4
    assert len(found.constraints) == 4
    (single,) = again(Atoms("H", cell=[3, 3, 3], pbc=[True, False, True]))
    assert single.pbc.tolist() == [True, False, True]


def test_random_entries():
    """Names and texts of random characters, many of which mean something in the format."""
    rng = np.random.default_rng(0)

    def word() -> str:
        return "".join(rng.choice(LETTERS, size=rng.integers(0, 6)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(50):
            atoms = three(**{word(): [word() for _ in range(3)] for _ in range(3)})
            atoms.info = {word(): word() for _ in range(4)} | {word(): {word(): [word()]}}
            texts = [v for v in atoms.info.values() if isinstance(v, str)]
            (found,) = again(atoms)
            read = [str(v) for v in found.info.values()]
            assert all(text in read for text in texts)


def test_results_replace_all_labels():
    atoms = three(
        REF_forces=np.ones((3, 3)), forces=np.ones((3, 3)), dft_forces=np.ones((3, 3)), tags=[1, 2, 3]
    )
    labels = (
        "energy",
        "REF_energy",
        "dft_energy",
        "free_energy",
        "REF_virial",
        "stress",
        "energy_per_atom",
        "dipole",
    )
    atoms.info = dict.fromkeys(labels, 1.0) | {
        "config_type": "gas",
        "charge": 1,
        "spin": 2,
        "DPA4_energy": 1.0,
    }
    frame = with_results(atoms, energy=-3.0)
    assert frame.info == {"config_type": "gas", "charge": 1, "spin": 2}
    assert set(frame.arrays) == {"numbers", "positions", "tags"}
    assert frame.calc.results == {"energy": -3.0}
    assert "REF_energy" in atoms.info and "forces" in atoms.arrays  # the structure itself is unchanged


def test_files_are_replaced_or_extended(tmp_path):
    path = tmp_path / "a.xyz"
    for append in (False, True, False, True):
        write_structures(path, three(), append=append)
    assert len(ase.io.read(path, ":")) == 2


@pytest.mark.filterwarnings("ignore:the entry")
@pytest.mark.parametrize("value", [5, 0.1, "text", np.eye(3), [1.0] * 9])
def test_names_with_rules_of_their_own(value):
    """ASE reads "virial" as a matrix and "uid" as a text."""
    atoms = three()
    atoms.info = {"virial": value, "uid": value, "step": 7}
    (found,) = again(atoms)
    assert found.info["step"] == 7
    assert "virial" not in found.info or np.shape(found.info["virial"]) == (3, 3)
