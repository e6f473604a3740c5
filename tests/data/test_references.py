"""Atomic reference energies, the data table and the checks before a run."""

import dataclasses
import io
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.data import chemical_symbols
from rich.console import Console

from dpa4.data import (
    Frame,
    check_elements,
    check_labels,
    check_trained,
    frame_from_atoms,
    is_isolated_atom,
    label_counts,
    read_frames,
    reference_energies,
    refitted_reference_energies,
    summarize,
    undetermined_elements,
    undetermined_text,
    without_isolated_atoms,
)
from helpers import SHARED

DATA = SHARED / "data"
ENERGIES = {"H": -13.5, "C": -1027.0, "O": -2038.25}


def frame(symbols: str, energy: float | None = None, origin: str = "a.xyz, frame 0", **info) -> Frame:
    atoms = Atoms(symbols, positions=np.arange(len(Atoms(symbols)))[:, None] * [1.0, 0, 0])
    atoms.info |= info if energy is None else info | {"energy": energy}
    return frame_from_atoms(atoms, origin=origin)


def total(symbols: str, binding: float = 0.0) -> Frame:
    return frame(symbols, sum(ENERGIES[s] for s in Atoms(symbols).symbols) + binding)


FREE_ATOMS = [frame(e, value, config_type="IsolatedAtom") for e, value in ENERGIES.items()]
MOLECULES = [total("H2O"), total("CH4"), total("CO2"), total("CH3OH")]


def test_isolated_atoms_are_recognised():
    boxed = Atoms("H", cell=[20, 20, 20], pbc=True)
    assert not is_isolated_atom(frame_from_atoms(boxed))  # a crystal of one atom per cell
    for name in ("IsolatedAtom", "isolated_atom", "isolated_atoms"):
        boxed.info["config_type"] = name
        assert is_isolated_atom(frame_from_atoms(boxed))
    assert is_isolated_atom(frame("H"))
    assert not is_isolated_atom(frame("H2"))
    assert not is_isolated_atom(frame("H2", config_type="IsolatedAtom"))
    assert without_isolated_atoms([*FREE_ATOMS, *MOLECULES]) == MOLECULES


def test_given():
    assert reference_energies(ENERGIES | {"N": 1.0}, [], ["O", "H"]) == {"O": -2038.25, "H": -13.5}
    with pytest.raises(ValueError, match=r"reference_energies has no value for \['N'\]; every element"):
        reference_energies(ENERGIES, [], ["H", "N"])
    with pytest.raises(ValueError, match=r"reference_energies of \['H'\] are not finite"):
        reference_energies({"H": np.nan}, [], ["H"])


def test_isolated():
    frames = [*FREE_ATOMS, total("H2O", binding=-9.0)]
    assert reference_energies("isolated", frames, ["C", "H"]) == {"C": -1027.0, "H": -13.5}
    with pytest.raises(ValueError, match=r"isolated, but no frame is a free atom of \['N'\] with an energy"):
        reference_energies("isolated", frames, ["C", "N"])
    unlabelled = frame("N", config_type="IsolatedAtom")
    with pytest.raises(ValueError, match=r"no frame is a free atom of \['N'\]"):
        reference_energies("isolated", [*frames, unlabelled], ["N"])


def test_contradicting_free_atoms():
    frames = [frame("H", -13.5, "a.xyz, frame 0"), frame("H", -13.6, "b.xyz, frame 3")]
    with pytest.raises(
        ValueError, match="free atoms of H have different .*-13.5 eV in a.xyz, frame 0, -13.6 eV"
    ):
        reference_energies("isolated", frames, ["H"])
    assert reference_energies("isolated", [frames[0], frames[0]], ["H"]) == {"H": -13.5}


def test_least_squares_recovers_a_composition_model():
    found = reference_energies("least_squares", MOLECULES, ["O", "N", "H", "C"])
    assert list(found) == ["O", "N", "H", "C"]
    assert found == pytest.approx(ENERGIES | {"N": 0.0}, abs=1e-9)


def test_least_squares_of_one_composition_is_the_minimum_norm():
    """Energies proportional to the counts, like in a trajectory of water."""
    frames = [frame("H2O", -467.0), frame("H2O", -469.0)]
    found = reference_energies("least_squares", frames, ["O", "H"])
    assert found == pytest.approx({"O": -93.6, "H": -187.2}, abs=1e-9)


def test_energies_that_the_data_do_not_determine():
    """The counts of acetylacetone determine one sum, those of water and hydrogen both elements."""
    elements = ["H", "C", "O"]
    acac = [frame("C5H8O2", -9000.0), frame("C5H8O2", -9001.0)]
    assert undetermined_elements("auto", acac, elements) == elements
    assert undetermined_elements("least_squares", MOLECULES, elements) == []
    assert undetermined_elements("auto", [total("H2O"), total("H2")], ["H", "O"]) == []
    assert undetermined_elements("auto", [total("H2O"), total("CO2"), total("H4O2")], elements) == elements
    assert undetermined_elements("auto", [total("H2"), frame("CO", -1.0)], elements) == ["C", "O"]
    assert undetermined_elements("auto", MOLECULES, [*elements, "N"]) == ["N"]
    assert undetermined_elements("auto", [frame("CO")], ["C", "O"]) == ["C", "O"]  # no energy at all
    # Known energies of free atoms, or a map, leave nothing open.
    assert undetermined_elements("auto", [*FREE_ATOMS, *acac], elements) == []
    assert undetermined_elements("isolated", [*FREE_ATOMS, *acac], elements) == []
    assert undetermined_elements(ENERGIES, acac, elements) == []
    # Free atoms of some elements do not enter a fit.
    assert undetermined_elements("auto", [*FREE_ATOMS[:2], *acac], elements) == elements
    text = undetermined_text(["H", "C"])
    assert text.startswith("the reference energies of H, C are arbitrary") and "IsolatedAtom" in text


def test_least_squares_ignores_free_atoms_and_missing_energies():
    frames = [frame("H", 1e6), frame("O2"), *MOLECULES]
    assert reference_energies("least_squares", frames, ["H", "C", "O"]) == pytest.approx(ENERGIES, abs=1e-9)
    with pytest.raises(ValueError, match="cannot be fitted, because no frame has an energy; give them"):
        reference_energies("least_squares", [frame("O2")], ["O"])
    with pytest.raises(ValueError, match=r"element C \(6\) of a.xyz, frame 0 is not in model.elements"):
        reference_energies("least_squares", MOLECULES, ["H", "O"])


def test_auto():
    bound = [*MOLECULES, total("CO", binding=-11.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference_energies("auto", [*FREE_ATOMS, *bound], ["H", "C", "O"]) == ENERGIES
        fitted = reference_energies("auto", bound, ["H", "C", "O"])
        assert fitted == reference_energies("least_squares", bound, ["H", "C", "O"]) != ENERGIES
        assert reference_energies("auto", [frame("O2")], ["O"]) == {"O": 0.0}
    with pytest.warns(
        UserWarning, match=r"fitted by least squares, because no frame is a free atom of \['O'\]"
    ):
        assert reference_energies("auto", [*FREE_ATOMS[:2], *bound], ["H", "C", "O"]) == fitted


def test_unknown_source():
    with pytest.raises(ValueError, match="must be auto, isolated, least_squares or a map .*, got 'lstsq'"):
        reference_energies("lstsq", MOLECULES, ["H"])


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the reference data in {DATA}")
def test_real_isolated_atoms():
    frames = read_frames([DATA / "acac/isolated_atoms.xyz", DATA / "acac/train_300K.xyz"])
    assert len(without_isolated_atoms(frames)) == 500
    energies = reference_energies("auto", frames, ["H", "C", "O"])
    assert energies == pytest.approx({"H": -13.5684, "C": -1026.8539, "O": -2037.7969}, abs=1e-3)
    binding = [f.energy - sum(energies["XH....CXO"[z]] for z in f.atomic_numbers) for f in frames[3:]]
    assert -80 < min(binding) < max(binding) < -55  # C5H8O2: 14 bonds and a C=C and C=O


def labelled_frames() -> list[Frame]:
    plain = [frame("H2O", -1.0), frame("CH4", -2.0), frame("O2")]
    return [dataclasses.replace(plain[0], forces=np.zeros((3, 3))), *plain[1:]]


def test_summary_table():
    frames = labelled_frames()
    assert label_counts(frames) == {"energy": 2, "forces": 1, "virial": 0}
    console = Console(file=io.StringIO(), width=100)
    console.print(summarize({"training": frames, "validation": []}))
    text = console.file.getvalue()
    for part in ("training", "3", "2/3.3/5", "H C O", "energy 2/3", "forces 1/3", "virial 0/3", "energy 0/0"):
        assert part in text


def test_check_labels():
    frames = labelled_frames()
    check_labels(frames, {"energy": 1.0, "forces": 20.0, "virial": 0.0})
    message = (
        r"training.virial_weight = 5, but no training structure has a label for virial "
        r"\(found energy 2/3, forces 1/3"
    )
    with pytest.raises(ValueError, match=message):
        check_labels(frames, {"energy": 1.0, "forces": 20.0, "virial": 5.0})
    with pytest.raises(
        ValueError, match="forces_weight = 2, but no validation structure has a label for forces"
    ):
        check_labels(frames[1:], {"energy": 1.0, "forces": 2.0, "virial": 0.0}, "validation")
    hidden = [dataclasses.replace(frames[0], weight=0.0), *frames[1:]]
    check_labels(hidden, {"forces": 20.0}, "validation")
    with pytest.raises(
        ValueError, match=r"no training .* forces \(found .*forces 0/2.*, 1 with config_weight = 0\)"
    ):
        check_labels(hidden, {"forces": 20.0})


def test_elements_of_the_validation_data_must_be_trained():
    check_trained([total("CO2")], MOLECULES)
    message = "element N of val.xyz, frame 3 is in the validation data, but in no structure to train on"
    with pytest.raises(ValueError, match=message):
        check_trained([total("CO2"), frame("NH3", origin="val.xyz, frame 3")], MOLECULES)


def test_check_elements():
    check_elements(MOLECULES, ["O", "C", "H"])
    strange = frame("OPu", origin="train.xyz, frame 12")
    message = r"element Pu \(94\) of train.xyz, frame 12 is not in model.elements \['H', 'O'\]; retrain"
    with pytest.raises(ValueError, match=message):
        check_elements([MOLECULES[0], strange], ["H", "O"])


# --- new reference energies of a trained model


def refitted(frames: list[Frame], errors: list[float], **old: float) -> dict[str, float]:
    """Fit to a model with other reference energies whose errors, in eV/atom, remain after the fit."""
    known = ENERGIES | old
    predicted = [
        frame.energy - error * len(frame) - sum(ENERGIES[s] - known[s] for s in symbols_of(frame))
        for frame, error in zip(frames, errors, strict=True)
    ]
    return refitted_reference_energies(known, frames, predicted)


def symbols_of(frame: Frame) -> list[str]:
    return [chemical_symbols[z] for z in frame.atomic_numbers]


def test_the_change_of_reference_energies_is_found():
    found = refitted(MOLECULES, [0.0] * 4, H=0.0, C=500.0, N=7.0)
    assert found == pytest.approx(ENERGIES | {"N": 7.0}, abs=1e-8)  # rounding of 1e3 eV
    assert list(found) == ["H", "C", "O", "N"]  # in the order of the model


def test_errors_of_a_model_are_fitted_per_atom():
    """A large structure counts as much as a small one: with one element the change is the mean error per atom."""
    frames = [frame("H" * n, -13.5 * n) for n in (1, 2, 40)]
    assert refitted(frames, [0.3, 0.6, 0.0])["H"] == pytest.approx(-13.5 + 0.3)


def test_changes_that_the_data_leave_open_are_the_smallest():
    found = refitted([total("H2O")] * 3, [0.0] * 3, H=0.0, O=0.0)
    change = np.array([found["H"], found["O"]])
    counts = np.array([2.0, 1.0])
    energy = counts @ [ENERGIES["H"], ENERGIES["O"]]
    assert change == pytest.approx(energy * counts / (counts @ counts))
    assert found["C"] == ENERGIES["C"]


def test_a_wrong_energy_does_not_move_the_reference_energies():
    """Errors of 0.5 eV/atom, as of stretched bonds, are fitted; one of 30 eV/atom is left out with a warning."""
    frames = MOLECULES * 3
    errors = [0.01, -0.01, 0.02, -0.5] * 3
    clean = refitted(frames, errors, H=0.0)
    with pytest.warns(UserWarning, match=r"leaves out 1 of 13 energies .*\+30\.\d* eV/atom"):
        found = refitted([*frames, total("H2O")], [*errors, 30.0], H=0.0)
    assert found == pytest.approx(clean, abs=1e-9)


def test_without_energies_the_reference_energies_stay():
    frames = [frame("H2O"), frame("CO2")]
    assert refitted_reference_energies(ENERGIES, frames, [0.0, 0.0]) == ENERGIES
    labelled = [*MOLECULES, frame("H2O")]  # one without an energy
    predicted = [f.energy - 2.0 * len(f) if f.energy is not None else 0.0 for f in labelled]
    assert refitted_reference_energies(ENERGIES, labelled, predicted) == pytest.approx(
        {e: v + 2.0 for e, v in ENERGIES.items()}
    )
