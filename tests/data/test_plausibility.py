"""Warnings of labels that look wrong: units, signs and exploded frames; none for labels that are right."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from dpa4.data import Frame, frame_from_atoms, implausible_labels, read_frames, warn_of_implausible_labels
from dpa4.data.plausibility import HUGE_FORCE
from helpers import SHARED

ROOT = Path(__file__).resolve().parents[2]

HARTREE, BOHR, KCAL, GPA = 27.211386, 0.5291772, 0.04336411, 160.21766


def labelled(images: list[Atoms], file: str = "train.xyz") -> list[Frame]:
    frames = []
    for k, atoms in enumerate(images):
        atoms.calc = EMT()
        atoms.get_potential_energy()
        if atoms.pbc.all():
            atoms.get_stress()
        frames.append(frame_from_atoms(atoms, origin=f"{file}, frame {k}"))
    return frames


def trajectory(start: Atoms, count: int = 16, step: float = 0.02, seed: int = 0) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    images = [start.copy()]
    for _ in range(count - 1):
        atoms = images[-1].copy()
        atoms.rattle(step, rng=rng)
        images.append(atoms)
    return images


def methanol(turned: bool = False) -> list[Frame]:
    start = molecule("CH3OH")
    start.rattle(0.05, seed=1)
    images = trajectory(start)
    rng = np.random.default_rng(2)
    if turned:
        for atoms in images:
            atoms.rotate(360 * rng.random(), rng.normal(size=3))
            atoms.translate(rng.normal(size=3))
        rng.shuffle(images)
    return labelled(images)


def strained_copper() -> list[Frame]:
    """Cells with strains of up to a few percent, turned in part, with displaced atoms."""
    rng = np.random.default_rng(0)
    images = []
    for k in range(16):
        atoms = bulk("Cu", cubic=True, a=3.5 + 0.01 * k)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.005 * rng.normal(size=(3, 3))), scale_atoms=True)
        atoms.rattle(0.005, rng=rng)
        if k % 2:
            atoms.rotate(20, (1, 2, 3), rotate_cell=True)
        images.append(atoms)
    return labelled(images)


def scaled(frames: list[Frame], energy: float = 1, forces: float = 1, stress: float = 1) -> list[Frame]:
    return [
        dataclasses.replace(
            f,
            energy=f.energy * energy,
            forces=f.forces * forces,
            virial=None if f.virial is None else f.virial * stress,
        )
        for f in frames
    ]


def periodic_copper() -> list[Frame]:
    """A trajectory in one cell; atoms leave the cell and are wrapped."""
    images = trajectory(bulk("Cu", cubic=True, a=3.8) * (2, 1, 1), step=0.03)
    for atoms in images[::2]:
        atoms.wrap()
    return labelled(images)


@pytest.mark.parametrize("make", [methanol, lambda: methanol(turned=True), periodic_copper, strained_copper])
def test_right_labels_are_not_warned_of(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_of_implausible_labels(make()) is None


UNITS = [
    ({"energy": 1 / HARTREE}, 1 / HARTREE, "energies in Hartree"),
    ({"energy": 2 / HARTREE}, 2 / HARTREE, "energies in Rydberg"),
    ({"energy": 1 / KCAL}, 1 / KCAL, "energies in kcal/mol"),
    ({"energy": 96.485}, 96.485, "energies in kJ/mol"),
    ({"energy": 1 / HARTREE, "forces": BOHR / HARTREE}, 1 / BOHR, "energies and forces in atomic units"),
    ({"forces": 1 / KCAL}, KCAL, "forces in kcal/mol/Å"),
    ({"forces": BOHR / HARTREE}, HARTREE / BOHR, "forces in Hartree/bohr"),
    ({"forces": -1}, -1, "the forces have the wrong sign"),
    (
        {"energy": 1 / HARTREE, "forces": -1},
        -1 / HARTREE,
        "energies in Hartree; also, the forces have the wrong",
    ),
]


@pytest.mark.parametrize(("factors", "factor", "cause"), UNITS, ids=str)
def test_units_of_energies_and_forces(factors, factor, cause):
    for frames in (methanol(), methanol(turned=True), periodic_copper()):
        (found,) = implausible_labels(scaled(frames, **factors))
        assert found.label == "energy" and found.structures == 16 and cause in found.text
        assert " or " not in found.text or frames[0].pbc.any()
        assert float(found.size.removeprefix("factor ")) == pytest.approx(factor, rel=0.05)
        assert found.example.startswith("train.xyz, frame ")


BOTH = [
    (1 / HARTREE, "energies and forces in Hartree"),
    (1 / KCAL, "energies and forces in kcal/mol"),
    (96.485, "energies and forces in kJ/mol"),
]


@pytest.mark.parametrize(("scale", "cause"), BOTH)
def test_energies_and_forces_in_the_same_wrong_unit(scale, cause):
    """The stiffness of bonds of hydrogen gives the unit of the forces, since the energies agree with them."""
    molecules = [f for f in read_frames(ROOT / "examples/organic/valid.xyz") if not f.pbc.any()]
    (found,) = implausible_labels(scaled(molecules, scale, scale))
    assert found.label == "forces" and found.structures == len(molecules)
    assert f"the factor of {cause}" in found.text
    bare = [dataclasses.replace(f, energy=None) for f in scaled(molecules, scale, scale)]
    assert f"the factor of {cause.removeprefix('energies and ')}" in implausible_labels(bare)[0].text
    assert implausible_labels(scaled(periodic_copper(), scale, scale)) == []  # no such bonds


STRESSES = [
    (GPA, GPA, "the factor of stress in GPa"),
    (10 * GPA, 10 * GPA, "the factor of stress in kB"),
    (-1, -1, "the stress has the wrong sign (ASE: positive under tension)"),
    (-10 * GPA, -10 * GPA, "stress in kB; also, the stress has the wrong sign"),
]


@pytest.mark.parametrize(("scale", "factor", "cause"), STRESSES, ids=str)
def test_unit_and_sign_of_the_stress_by_finite_differences(scale, factor, cause):
    (found,) = implausible_labels(scaled(strained_copper(), stress=scale))
    assert found.label == "stress" and cause in found.text
    assert float(found.size.removeprefix("factor ")) == pytest.approx(factor, rel=0.05)


NPT = [
    ({}, []),
    ({"stress": 10 * GPA}, ["the factor of stress in kB"]),
    ({"stress": -1}, ["the stress has the wrong sign (ASE: positive under tension)"]),
    ({"energy": 1 / HARTREE}, ["the factor of energies in Hartree"]),
]


@pytest.mark.parametrize(("factors", "causes"), NPT, ids=str)
def test_a_trajectory_in_a_cell_that_fluctuates(factors, causes):
    rng = np.random.default_rng(0)
    images = trajectory(bulk("Cu", cubic=True, a=3.7) * (2, 1, 1), 24)
    for atoms in images:
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.005 * rng.normal(size=(3, 3))), scale_atoms=True)
    found = implausible_labels(scaled(labelled(images), **factors))
    assert [f.text.split("; ")[1].removeprefix("this is ") for f in found] == causes


def test_a_virial_under_the_name_of_a_stress():
    frames = strained_copper()
    wrong = [dataclasses.replace(f, virial=-abs(np.linalg.det(f.cell)) * f.virial) for f in frames]
    (found,) = implausible_labels(wrong)
    assert "a virial under the name of a stress" in found.text


def test_stress_by_its_size_where_cells_are_equal():
    (found,) = implausible_labels(scaled(periodic_copper(), stress=10 * GPA))
    assert found.label == "stress" and found.structures == 16
    assert (
        "eV/atom in the median of the file, which is implausible; the stress must be in eV/Å³" in found.text
    )


def test_an_exploded_frame():
    frames = methanol()
    forces = frames[7].forces.copy()
    forces[2, 1] = -1e5
    frames[7] = dataclasses.replace(frames[7], energy=frames[7].energy + 1e4, forces=forces)
    with pytest.warns(UserWarning) as caught:
        table = warn_of_implausible_labels(frames)
    texts = [str(w.message) for w in caught]
    assert len(texts) == table.row_count == 2 and all(t.startswith("train.xyz, frame 7: ") for t in texts)
    assert "the energy is +1667 eV/atom away from those of other structures with this composition" in texts[0]
    assert "a force of 1e+05 eV/Å, " in texts[1]
    strained = strained_copper()
    strained[3] = dataclasses.replace(strained[3], virial=np.full((3, 3), 1e4))
    (found,) = implausible_labels(strained)
    assert (found.label, found.structures, found.example) == ("stress", 1, "train.xyz, frame 3")


def test_forces_that_vary_over_decades_have_a_limit():
    frames = methanol()
    spread = [scaled([f], forces=10.0 ** (k % 6 - 5))[0] for k, f in enumerate(frames)]
    loud = dataclasses.replace(spread[0], forces=np.full((6, 3), 1.1 * HUGE_FORCE))
    found = implausible_labels([*spread, loud])
    assert [f.structures for f in found if f.label == "forces"] == [1]


def test_each_file_is_judged_alone():
    good, bad = methanol(), scaled(methanol(), energy=1.0, forces=-1)
    bad = [dataclasses.replace(f, origin=f.origin.replace("train", "other")) for f in bad]
    (found,) = implausible_labels([*good, *bad])
    assert found.example.startswith("other.xyz, frame ")


def test_a_file_in_hartree_among_others():
    bad = [dataclasses.replace(f, origin=f.origin.replace("train", "other")) for f in methanol()]
    shifted = [dataclasses.replace(f, energy=(f.energy - 6e3) / HARTREE) for f in bad]
    good = [dataclasses.replace(f, energy=f.energy - 6e3) for f in methanol() * 5]
    far, unit = implausible_labels([*good, *shifted])
    assert "away from those of other structures" in far.text and far.structures == 16
    assert unit.example.startswith("other.xyz") and "the factor of energies in Hartree" in unit.text


def test_frames_without_labels_or_neighbours():
    bare = [frame_from_atoms(molecule("H2O"), origin="a.xyz, frame 0")] * 9
    assert implausible_labels(bare) == implausible_labels([]) == implausible_labels(methanol()[:1]) == []
    same = [dataclasses.replace(methanol()[0])] * 20
    assert implausible_labels(same) == []


FILES = ["acac/train_300K.xyz", "inorganic/mpf-alkali-TP.xyz", "mlearn/Si_train.xyz"]
MORE = ["acac/train_600K.xyz", "acac/test_MD_300K.xyz", "acac/test_MD_600K.xyz", "3bpa/train_300K.xyz",
        "rmd17/aspirin_train.xyz", "rmd17/aspirin_test.xyz", "rmd17/ethanol_train.xyz", "rmd17/ethanol_test.xyz",
        "inorganic/mpf-TP.xyz", "inorganic/mptrj-random-1k.xyz", "mlearn/Mo_train.xyz", "mlearn/Mo_test.xyz",
        "mlearn/Si_test.xyz"]  # fmt: skip


@pytest.mark.parametrize("file", [*FILES, *(pytest.param(f, marks=pytest.mark.slow) for f in MORE)])
def test_published_data_are_not_warned_of(file):
    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip("needs the shared data")
    assert implausible_labels(read_frames(path)) == []


def test_bundled_data_are_not_warned_of():
    frames = read_frames([ROOT / f"examples/organic/{name}.xyz" for name in ("valid", "test")])
    assert implausible_labels(frames) == []
