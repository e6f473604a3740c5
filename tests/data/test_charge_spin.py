import warnings

import numpy as np
import pytest
from ase.build import molecule

from dpa4.data import charges_and_spins, frame_from_atoms
from dpa4.data.charge_spin import (
    CHARGE_NAMES,
    SPIN_NAMES,
    charge_and_spin,
    charge_spin_entries,
    same_charge_spin,
    unused_names,
    whole_numbers,
)


def water(**info):
    atoms = molecule("H2O")
    atoms.info |= info
    return atoms


@pytest.mark.parametrize("charge", CHARGE_NAMES)
@pytest.mark.parametrize("spin", SPIN_NAMES)
def test_every_name_is_read(charge, spin):
    assert charge_and_spin({charge: -1, spin: 2}, None) == (-1, 2)


def test_names_may_agree_but_not_disagree():
    assert charge_and_spin({"charge": 1, "total_charge": 1.0, "spin": 2, "multiplicity": 2}, None) == (1, 2)
    with pytest.raises(
        ValueError, match=r"a.xyz, frame 3: spin = 1, multiplicity = 2 disagree; remove all but"
    ):
        charge_and_spin({"charge": 1, "spin": 1, "multiplicity": 2}, None, "a.xyz, frame 3")


def test_missing_values_are_those_of_the_default():
    assert charge_and_spin({"total_charge": 2}, (0, 3)) == (2, 3)
    assert charge_and_spin({"mult": 4}, (-1, 1)) == (-1, 4)
    assert charge_and_spin({}, (-1, 1)) == charge_and_spin({"charge": None}, (-1, 1)) == (-1, 1)
    with pytest.raises(ValueError, match=r"a.xyz, frame 0: the model is .* set atoms.info\['spin'\]"):
        charge_and_spin({"charge": 1}, None, "a.xyz, frame 0")


@pytest.mark.parametrize(
    "value",
    [-1, -1.0, "-1", np.array(-1), np.array([-1]), [-1.0], np.float32(-1), -1.0000000002, -0.99999999],
)
def test_numbers_arrays_and_rounded_values_are_alike(value):
    assert charge_and_spin({"charge": value, "spin": 1}, None) == (-1, 1)


@pytest.mark.parametrize("value", [2.013, 0.5, np.nan, np.inf, 1e300, "doublet", [1, 2], {}, 1j])
def test_values_that_are_no_whole_number(value):
    for name in ("charge", "spin"):
        with pytest.raises(ValueError, match=rf"^a.xyz, frame 1: {name} must be "):
            charge_and_spin({name: value}, (0, 1), "a.xyz, frame 1")


def test_a_spin_of_another_convention():
    with pytest.raises(ValueError, match=r"2S \+ 1, 1 or more; a singlet is 1, a doublet 2; got 0"):
        charge_and_spin({"spin": 0}, (0, 1))
    assert whole_numbers([0.0, 1.00000001, -2], "total_charge").tolist() == [0, 1, -2]


def test_look_alikes():
    info = {
        "net_charge": 1, "Charge": 2, "n_unpaired": np.int64(1), "spin_state": 3, "Multiplicity": 2, "qtot": -1.0,
        "charges": [0.1, 0.2], "spin_polarized": True, "charge_model": "DDEC", "energy": -1.0, 7: 1,
    }  # fmt: skip
    assert unused_names(info) == {"net_charge", "Charge", "n_unpaired", "spin_state", "Multiplicity", "qtot"}
    assert set(charge_spin_entries(info | {"spin": "x", "charge": None})) == unused_names(info) | {"spin"}


def test_frames_are_checked_only_for_a_model_that_reads_charge_and_spin():
    frames = [
        frame_from_atoms(atoms, origin=f"b.xyz, frame {k}")
        for k, atoms in enumerate([water(spin=2.013), water(charge=1, spin=0), water(spin=1, multiplicity=2)])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert charges_and_spins(frames, False, None) is None
    with pytest.raises(ValueError, match=r"^b.xyz, frame 0: spin must be a whole number, .* got 2.013$"):
        charges_and_spins(frames, True, (0, 1))


def test_unused_names_are_warned_of_once_per_file():
    frames = [
        frame_from_atoms(water(net_charge=1, uhf=1), origin=f"{file}, frame {k}")
        for file in ("b.xyz", "c.xyz")
        for k in range(3)
    ]
    with pytest.warns(UserWarning) as caught:
        assert charges_and_spins(frames, True, (0, 1)) == [(0, 1)] * 6
    texts = [str(w.message) for w in caught]
    assert [text[:5] for text in texts] == ["b.xyz", "c.xyz"]
    assert "net_charge, uhf; a total charge (e) is read from charge or total_charge, a multi" in texts[0]


def test_comparison_of_structures():
    assert same_charge_spin(water(charge=1), water(charge=np.array([1])))
    assert same_charge_spin(water(mult=2, other=1), water(mult=2))
    assert not same_charge_spin(water(mult=2), water(mult=1))
    assert not same_charge_spin(water(total_charge=np.array([1, 2])), water(total_charge=1))
    assert not same_charge_spin(water(), water(charge=0))
