"""Models without some of their elements give the same numbers."""

import pytest
import torch

from dpa4.data import Coverage
from dpa4.model.short_range import pair_bridging
from dpa4.potential.checkpoint import potential_of, read_checkpoint, save_potential
from dpa4.potential.elements import TABLES, with_elements
from helpers import graph_of, molecule, random_potential
from parity_files import FOLDER, read_parity_file

ELEMENTS = ("O", "H", "Si", "C")


def windows() -> dict:
    return {"bridging": pair_bridging({("C", "H"): 0.95, ("H", "Si"): 1.4}, ELEMENTS, 4.0)}


@pytest.mark.parametrize(
    "options",
    [
        windows(),
        {"charge_spin": True, "default_charge_spin": (0, 1)},
        {"use_env_seed": False, "excluded_pairs": [("H", "H"), ("C", "Si")]},
        {"bridging": {"r_inner": 0.6, "r_outer": 1.1}, "symmetry": "O3"},
    ],
    ids=["windows", "charge and spin", "excluded pairs", "zones"],
)
def test_the_same_numbers_bit_for_bit(tmp_path, options):
    whole = random_potential(elements=ELEMENTS, **options)
    whole.coverage = Coverage(4.0, ("H", "C", "Si"), {("H", "C"): 0.9, ("H", "Si"): 1.4})
    save_potential(whole, tmp_path / "whole.safetensors")
    stored = read_checkpoint(tmp_path / "whole.safetensors")
    smaller = with_elements(stored, ["H", "O", "C"])
    assert smaller.config.elements == ("O", "H", "C")  # in the order of the model
    assert smaller.coverage.elements == ("H", "C") and smaller.coverage.shortest == {("H", "C"): 0.9}
    potential = potential_of(smaller, torch.float64)
    save_potential(potential, tmp_path / "smaller.safetensors")
    potential = potential_of(read_checkpoint(tmp_path / "smaller.safetensors"), torch.float64)
    graph = graph_of(molecule(3), 4.0)
    expected, found = whole(graph), potential(graph)
    for name in ("energy", "atomic_energies", "forces", "virial"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "smaller")]
    assert sizes[1] < sizes[0]
    changed = {name for name, tensor in smaller.weights.items() if tensor.shape != stored.weights[name].shape}
    assert changed == {name for name in TABLES if name in stored.weights}


def test_a_published_layout_of_118_elements(tmp_path):
    torch.save({"model": read_parity_file(FOLDER / "C_mini.safetensors").state}, tmp_path / "model.pt")
    stored = read_checkpoint(tmp_path / "model.pt")
    smaller = with_elements(stored, ["H", "C", "O"])
    assert len(stored.config.elements) == 118 and smaller.config.elements == ("H", "C", "O")
    graph = graph_of(molecule(1), stored.config.cutoff)
    both = [potential_of(one, torch.float64)(graph) for one in (stored, smaller)]
    assert torch.equal(both[0].energy, both[1].energy) and torch.equal(both[0].forces, both[1].forces)


def test_all_elements_and_unknown_ones(tmp_path):
    save_potential(random_potential(), tmp_path / "m.safetensors")
    stored = read_checkpoint(tmp_path / "m.safetensors")
    assert with_elements(stored, ["O", "H", "C"]) is stored
    with pytest.raises(ValueError, match="no element N, Si; it knows H, C, O"):
        with_elements(stored, ["H", "N", "Si"])
