"""The data set in examples/organic: counts, units, splits, and labels that its method reproduces."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

ROOT = Path(__file__).resolve().parents[1]
COUNTS = {"train": (46, 60, 0, 4), "valid": (8, 6, 0, 0), "test": (16, 12, 50, 0)}


@pytest.fixture(scope="module")
def splits():
    return {name: read(ROOT / "examples" / "organic" / f"{name}.xyz", ":") for name in COUNTS}


def groups(frames) -> Counter:
    return Counter(atoms.info["config_type"] for atoms in frames)


def test_counts(splits):
    for name, (molecules, crystals, held_out, isolated) in COUNTS.items():
        found = groups(splits[name])
        assert found.pop("solid-CO2") == crystals
        assert found.pop("acetamide", 0) == held_out
        assert found.pop("IsolatedAtom", 0) == isolated
        assert set(found.values()) == {molecules} and len(found) == 14
    assert sum((ROOT / "examples" / "organic" / f"{n}.xyz").stat().st_size for n in COUNTS) < 3e6


def test_readme_tells_the_counts(splits):
    text = (ROOT / "examples" / "organic" / "README.md").read_text()
    for name, frames in splits.items():
        assert f"| `{name}.xyz` | {len(frames)} | {sum(map(len, frames))} |" in text
    for group in groups(splits["test"]):
        assert group in text


def test_every_frame_is_labelled_within_the_stated_limits(splits):
    for frames in splits.values():
        for atoms in frames:
            assert set(atoms.symbols) <= set("HCNO")
            forces = atoms.get_forces()
            assert np.isfinite(atoms.get_potential_energy()) and np.isfinite(forces).all()
            assert np.abs(forces).max() <= 20
            np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-6)
            periodic = atoms.info["config_type"] == "solid-CO2"
            assert atoms.pbc.tolist() == [periodic] * 3
            assert ("stress" in atoms.calc.results) == periodic
            assert np.array_equal(atoms.positions, np.round(atoms.positions, 6))


def test_splits_share_no_frame(splits):
    seen = [atoms.positions.tobytes() for frames in splits.values() for atoms in frames if len(atoms) > 1]
    assert len(seen) == len(set(seen))


def test_isolated_atoms_give_binding_energies(splits):
    """GFN2-xTB binds these molecules by about 3 to 8 eV per atom."""
    energies = {str(a.symbols): a.get_potential_energy() for a in splits["train"][:4]}
    assert set(energies) == set("HCNO")
    for atoms in splits["train"][4:]:
        binding = sum(energies[s] for s in atoms.symbols) - atoms.get_potential_energy()
        assert 2 < binding / len(atoms) < 9


def test_energies_and_forces_agree(splits):
    """In dynamics of one molecule, energy and forces are lower at 300 K than at 1200 K."""
    for group in ("ethane", "benzene"):
        kinds = {
            kind: [a for a in splits["train"] if (a.info["config_type"], a.info.get("kind")) == (group, kind)]
            for kind in ("md-300K", "md-1200K")
        }
        energies = [np.mean([a.get_potential_energy() for a in frames]) for frames in kinds.values()]
        forces = [np.mean([np.abs(a.get_forces()).mean() for a in frames]) for frames in kinds.values()]
        assert energies[1] - energies[0] > 0.3
        assert forces[1] > 1.3 * forces[0]


@pytest.mark.parametrize("group", ["acetamide", "water-trimer", "solid-CO2"])
def test_labels_are_reproduced(splits, group):
    if importlib.util.find_spec("tblite") is None:
        pytest.skip("needs tblite: pip install tblite")
    spec = importlib.util.spec_from_file_location("make_dataset", ROOT / "scripts" / "make_dataset.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    atoms = next(a for a in splits["test"] if a.info["config_type"] == group)
    again = script.label(atoms)
    # forces are written with 8 decimals; the charges converge to about 1e-8
    assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-5)
    if atoms.pbc.all():
        np.testing.assert_allclose(again.get_stress(), atoms.get_stress(), atol=1e-6)
        assert np.abs(again.get_stress()).max() > 1e-3
