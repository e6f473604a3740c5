"""Import of models whose isolated atoms have exactly their bias (``vacuum_ref``)."""

import copy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols, ground_state_magnetic_moments

from deepmd_files import energies_of
from dpa4.potential.checkpoint import convert, load_potential, read_checkpoint
from dpa4.potential.deepmd.options import config_from_deepmd
from dpa4.potential.deepmd.vacuum import multiplicity
from dpa4.potential.deepmd.writer import deepmd_state
from helpers import graph_of, molecule, random_potential

BIAS = {"H": -13.25, "C": -1030.5, "O": -2041.75}


def with_reference(state, preset=None, **fitting):
    """Copy of a state with ``vacuum_ref``, and the biases ``BIAS``."""
    changed = copy.deepcopy(state)
    bias = torch.tensor(list(BIAS.values()), dtype=torch.float64)
    changed["model.Default.atomic_model.out_bias"] = bias.reshape(1, 3, 1)
    params = changed["_extra_state"]["model_params"]
    params["preset_out_bias"] = {"energy": list(BIAS.values())} if preset is None else preset
    params["fitting_net"] |= {"vacuum_ref": True} | fitting
    return changed


def energy_of(potential, element, charge_spin=(0, 1)):
    return potential(graph_of(Atoms(element), charge_spin=charge_spin)).energy.item()


@pytest.mark.parametrize("preset", [None, {"energy": [-13.25, None, None]}, "a-table", {"energy": "a-table"}])
def test_isolated_atoms_have_their_bias_and_forces_do_not_change(potential, state, load, preset):
    imported = load(with_reference(state, preset))
    for element, bias in BIAS.items():
        assert abs(energy_of(potential, element) - potential.reference_energies[0].item()) > 1e-3
        assert energy_of(imported, element) == pytest.approx(bias, rel=1e-14)
    before, after = (p(graph_of(molecule())) for p in (potential, imported))
    torch.testing.assert_close(after.forces, before.forces, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.virial, before.virial, rtol=0, atol=1e-12)
    shift = after.atomic_energies - before.atomic_energies  # one constant per element
    expected = {
        element: bias - energy_of(potential, element)
        for element, bias in BIAS.items()
    }  # fmt: skip
    symbols = molecule().get_chemical_symbols()
    np.testing.assert_allclose(shift.numpy(), [expected[symbol] for symbol in symbols], rtol=0, atol=1e-10)


@pytest.mark.parametrize("preset", [{}, {"energy": None}, {"energy": [None, None, None]}, {"dipole": [1.0]}])
def test_the_option_has_no_effect_unless_the_bias_is_fixed(state, load, preset):
    with_option, without = with_reference(state, preset), with_reference(state, preset)
    without["_extra_state"]["model_params"]["fitting_net"]["vacuum_ref"] = False
    assert torch.equal(energies_of(load(with_option)), energies_of(load(without)))


def test_a_float32_model_is_folded_in_float64(load):
    potential = random_potential().float()
    imported = load(with_reference(deepmd_state(potential)), dtype=torch.float64)
    assert imported.reference_energies.dtype == torch.float64
    for element, bias in BIAS.items():
        assert energy_of(imported, element) == pytest.approx(bias, rel=1e-14)


def test_a_conditioned_model_is_folded_at_charge_0_and_the_multiplicity_of_the_atom(load):
    imported = load(with_reference(deepmd_state(random_potential(charge_spin=True))))
    for element, spin in (("H", 2), ("C", 3), ("O", 3)):
        assert energy_of(imported, element, (0, spin)) == pytest.approx(BIAS[element], rel=1e-14)
        assert abs(energy_of(imported, element, (1, spin)) - BIAS[element]) > 1e-4
        assert abs(energy_of(imported, element, (0, spin + 1)) - BIAS[element]) > 1e-4


def test_the_task_embedding_cancels(load):
    state = deepmd_state(random_potential(fitting=()))
    name = "model.Default.atomic_model.fitting_net.filter_layers.networks.0.output_layer.matrix"
    state[name] = torch.cat([state[name], torch.tensor([[5.0]], dtype=torch.float64)])
    state["model.Default.atomic_model.fitting_net.case_embd"] = torch.ones(1, dtype=torch.float64)
    imported = load(with_reference(state, dim_case_embd=1))
    assert energy_of(imported, "O") == pytest.approx(BIAS["O"], rel=1e-14)


def test_export_writes_the_energies_as_plain_biases(state, load, tmp_path):
    expected = energies_of(load(with_reference(state)))
    convert(tmp_path / "model.pt", tmp_path / "exported.pt")
    params = torch.load(tmp_path / "exported.pt", weights_only=True)["model"]["_extra_state"]["model_params"]
    assert "vacuum_ref" not in params["fitting_net"] and params["preset_out_bias"] is None
    assert torch.equal(energies_of(load_potential(tmp_path / "exported.pt")), expected)


def test_the_card_says_so(state, load, tmp_path):
    load(with_reference(state))
    assert "vacuum_ref" in read_checkpoint(tmp_path / "model.pt").provenance["isolated atoms"]


@pytest.mark.parametrize(
    ("fitting", "preset", "message"),
    [
        ({"numb_fparam": 1}, None, "fitting_net.numb_fparam = 1 is not supported"),
        ({"numb_aparam": 2}, None, "fitting_net.numb_aparam = 2 is not supported"),
        ({"atom_ener": [1.0, None, None]}, None, "atom_ener = .* is not supported; supported: null together w"),
        ({"vacuum_ref": 1}, None, "fitting_net.vacuum_ref = 1 is not supported; supported: true and false"),
        ({"vacuum_ref": []}, None, r"fitting_net.vacuum_ref = \[\] is not supported; supported: true and false"),
        ({}, {"energy": {"H": 1.0}}, "preset_out_bias.energy = {'H': 1.0} is not supported; supported: a list"),
        ({}, 3, "preset_out_bias = 3 is not supported; supported: a map of outputs, the name of a table, or"),
    ],
)  # fmt: skip
def test_combinations_that_are_not_supported_are_named(state, load, fitting, preset, message):
    with pytest.raises(ValueError, match=message):
        load(with_reference(state, preset, **fitting))


def test_multiplicities_of_free_atoms():
    known = {"H": 2, "He": 1, "N": 4, "O": 3, "Fe": 5, "Cr": 7, "Cu": 2, "Gd": 9, "Pd": 1, "U": 5, "Og": 1}
    assert {element: multiplicity(element) for element in known} == known
    others = {"Ce", "Es"}  # the table of ASE has the measured level of Ce and another configuration of Es
    for number in range(1, 103):
        element = chemical_symbols[number]
        if element not in others:
            assert multiplicity(element) == 1 + ground_state_magnetic_moments[number], element
    assert all(1 <= multiplicity(element) <= 9 for element in atomic_numbers if element != "X")


def test_the_option_alone_changes_no_configuration():
    section = {"type": "dpa4", "type_map": ["H"], "descriptor": {}, "fitting_net": {"vacuum_ref": True}}
    plain = section | {"fitting_net": {}}
    assert config_from_deepmd(section) == config_from_deepmd(plain)
