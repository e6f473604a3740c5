"""Labels of one structure come from one calculation, and predictions are never taken for labels."""

import warnings

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from dpa4.data import LabelKeys, frame_from_atoms, read_frames

STRESS = np.array([[0.01, 0.04, 0.05], [0.04, 0.02, 0.06], [0.05, 0.06, 0.03]])


def water(**results) -> Atoms:
    atoms = molecule("H2O")
    if results:
        values = {k: np.full((3, 3), v) if k == "forces" else v for k, v in results.items()}
        atoms.calc = SinglePointCalculator(atoms, **values)
    return atoms


def values(atoms: Atoms, **keys) -> tuple[float | None, float | None]:
    frame = frame_from_atoms(atoms, LabelKeys(**keys), origin="a.xyz, frame 7")
    return frame.energy, None if frame.forces is None else float(frame.forces[0, 0])


def test_reference_labels_replace_results_of_a_calculator():
    atoms = water(energy=3.0, forces=3.0)
    assert values(atoms) == (3.0, 3.0)
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 2.0, np.full((3, 3), 2.0)
    assert values(atoms) == (2.0, 2.0)
    assert values(atoms, energy="energy", forces="forces") == (3.0, 3.0)


def test_predictions_do_not_complete_the_reference_labels():
    atoms = water(energy=3.0, forces=3.0)
    atoms.info["REF_energy"] = 2.0
    assert values(atoms) == values(atoms, energy="REF_energy") == (2.0, None)
    atoms.info["REF_energy"] = 3.0  # the same calculation under two names
    assert values(atoms) == values(atoms, energy="REF_energy") == (3.0, 3.0)


def test_labels_that_may_belong_to_two_calculations_are_refused():
    atoms = water(forces=3.0)
    atoms.info["REF_energy"] = 2.0
    message = (
        "a.xyz, frame 7 has labels under REF_energy and forces, which may belong to different calculations"
    )
    with pytest.raises(ValueError, match=message):
        values(atoms)
    with pytest.raises(ValueError, match=message):
        values(atoms, energy="REF_energy")
    assert values(atoms, energy="REF_energy", forces="forces") == (2.0, 3.0)
    atoms.arrays["REF_forces"] = np.full((3, 3), 2.0)
    atoms.info["energy"] = 5.0
    with pytest.raises(ValueError, match="labels under energy and REF_forces"):
        values(atoms, energy="energy")


@pytest.mark.parametrize(("key", "value"), [("energy", 1.0), ("forces", np.ones((3, 3)))])
def test_results_and_entries_that_disagree_are_refused(key, value):
    atoms = water(energy=3.0, forces=3.0)
    (atoms.info if key == "energy" else atoms.arrays)[key] = value
    with pytest.raises(
        ValueError, match=rf"frame 7 has two labels for {key} that disagree: results.{key} and"
    ):
        values(atoms)


def test_entries_that_agree_are_one_label():
    atoms = water(energy=-3000.0, forces=3.0)
    atoms.info["energy"] = np.float32(-3000.0001)
    atoms.arrays["force"] = np.full((3, 3), 3.0001)
    assert values(atoms) == (-3000.0, 3.0)


def test_stress_and_virial_that_disagree_are_refused():
    atoms = bulk("Cu", cubic=True)
    virial = -atoms.get_volume() * STRESS
    for prefix in ("", "REF_"):
        atoms.info = {f"{prefix}stress": STRESS, f"{prefix}virial": virial}
        np.testing.assert_allclose(frame_from_atoms(atoms).virial, virial)
        atoms.info[f"{prefix}virial"] = -virial  # the wrong sign
        with pytest.raises(ValueError, match=rf"info.{prefix}stress and info.{prefix}virial"):
            frame_from_atoms(atoms)
        frame = frame_from_atoms(atoms, LabelKeys(virial=f"{prefix}virial"))
        np.testing.assert_allclose(frame.virial, -virial)


@pytest.mark.parametrize("key", ["REF_stress", "REF_virial", "REF_virials"])
def test_reference_stress_replaces_that_of_a_calculator(key):
    atoms = bulk("Cu", cubic=True)
    atoms.calc = SinglePointCalculator(atoms, stress=np.full(6, 9.0))
    atoms.info[key] = np.full(6, 2.0)
    expected = -2 * atoms.get_volume() if "stress" in key else 2
    assert frame_from_atoms(atoms).virial[0, 0] == pytest.approx(expected)


def test_marked_predictions_are_no_labels():
    atoms = water(energy=3.0, forces=3.0)
    atoms.info["DPA4_energy"] = 3.0
    assert values(atoms) == (None, None)
    assert values(atoms, energy="energy", forces="forces") == (3.0, 3.0)
    atoms.info["DPA4_energy"] = 3.1  # another calculation has replaced the predictions
    assert values(atoms) == (3.0, 3.0)


def test_a_file_with_two_kinds_of_names_is_told(tmp_path):
    """Structures without labels in a file of predictions are read as labelled, which nothing else shows."""
    reference, plain = water(energy=3.0, forces=3.0), water(energy=3.0, forces=3.0)
    reference.info["REF_energy"], reference.arrays["REF_forces"] = 2.0, np.full((3, 3), 2.0)
    ase.io.write(tmp_path / "a.xyz", [reference, plain, molecule("H2O")], format="extxyz")
    message = (
        "a.xyz: 1 structures have labels under REF_., but 1 under plain names, such as .*frame 1; if these"
    )
    with pytest.warns(UserWarning, match=message):
        read_frames(tmp_path / "a.xyz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_frames(tmp_path / "a.xyz", LabelKeys(energy="REF_energy", forces="REF_forces"))
        for number, atoms in enumerate((reference, plain)):
            ase.io.write(tmp_path / f"{number}.xyz", [atoms, molecule("H2O")], format="extxyz")
        read_frames([tmp_path / "0.xyz", tmp_path / "1.xyz"])  # each file is of one kind
