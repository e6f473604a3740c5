"""Parts of deepmd-kit models that are folded into weights and energies; branches of multitask models."""

import copy

import pytest
import torch
from torch.nn import functional

from deepmd_files import energies_of
from dpa4.potential.deepmd.writer import deepmd_state
from helpers import graph_of, molecule, random_potential

DESCRIPTOR = "model.Default.atomic_model.descriptor."
FITTING = "model.Default.atomic_model.fitting_net."
NETWORK = f"{FITTING}filter_layers.networks.0."


# LoRA


def test_lora_deltas_are_folded(potential, state, load):
    generator = torch.Generator().manual_seed(3)
    key = f"{DESCRIPTOR}blocks.0.so2_conv."
    rank, scaling = 2, 0.75

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    expected = copy.deepcopy(state)
    degrees, inputs, outputs = state[f"{key}pre_focus_mix.weight"].shape
    a, b = random(degrees, rank, inputs), random(degrees, outputs, rank)
    state |= {f"{key}pre_focus_mix.A_by_l": a, f"{key}pre_focus_mix.B_by_l": b}
    state[f"{key}pre_focus_mix.lora_scaling"] = torch.tensor(scaling)
    for degree in range(degrees):
        expected[f"{key}pre_focus_mix.weight"][degree] += scaling * (b[degree] @ a[degree]).T
    for weight in ("m0", "m.0"):
        inputs, outputs = state[f"{key}so2_linears.1.weight_{weight}"].shape
        a, b = random(rank, inputs), random(outputs, rank)
        state |= {
            f"{key}so2_linears.1.A_{weight}": a,
            f"{key}so2_linears.1.B_{weight}": b,
        }  # scaling 1 if absent
        expected[f"{key}so2_linears.1.weight_{weight}"] += (b @ a).T
    state["_extra_state"]["model_params"]["lora"] = {"rank": rank, "alpha": 1.5}
    folded, direct = load(state), load(expected)
    assert not torch.allclose(energies_of(folded), energies_of(potential))
    torch.testing.assert_close(energies_of(folded), energies_of(direct), rtol=1e-12, atol=1e-12)


def test_lora_entries_without_their_partner_are_refused(state, load):
    state[f"{DESCRIPTOR}blocks.0.so2_conv.pre_focus_mix.A_by_l"] = torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match="has the LoRA entry .*A_by_l but lacks .*pre_focus_mix.B_by_l"):
        load(state)


# Multitask models


def energy_network(state, descriptor, film=None):
    """Output of the energy network of a state; film is (scale, shift) of every layer's input."""
    layers = [f"{NETWORK}hidden_layers.{k}.linear." for k in range(2)]
    x = descriptor
    for k, layer in enumerate(layers):
        x = x if film is None else x * film[k][0] + film[k][1]
        value, gate = (x @ state[f"{layer}matrix"] + state[f"{layer}bias"]).chunk(2, dim=-1)
        x = value * functional.silu(gate)
    x = x if film is None else x * film[-1][0] + film[-1][1]
    return (x @ state[f"{NETWORK}output_layer.matrix"])[:, 0]


def reference_of(potential, atoms):
    return potential.reference_energies[[potential.elements.index(symbol) for symbol in atoms.symbols]]


def test_task_embedding_as_film_is_folded_exactly(potential, state, load):
    generator = torch.Generator().manual_seed(8)
    channels, widths = 8, (24, 40)
    film, strength = {}, torch.tensor([-0.3, -0.1, -0.2], dtype=torch.float64)
    for key, shape in {
        "case_layer1.matrix": (3, 32),
        "case_layer2.matrix": (32, 4 * channels),
        "projectors.0": (32, 2 * channels),
        "projectors.1": (32, 2 * widths[0]),
        "projectors.2": (32, 2 * widths[1]),
    }.items():
        film[key] = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    state |= {f"{NETWORK}case_film.{key}": value for key, value in film.items()}
    state[f"{NETWORK}case_film.adam_case_film_scale_strength_log"] = strength
    state[f"{NETWORK}case_film.adam_case_film_shift_strength_log"] = 2 * strength
    state[f"{FITTING}case_embd"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    fitting = state["_extra_state"]["model_params"]["fitting_net"]
    fitting |= {"dim_case_embd": 3, "case_film_embd": True}

    code = functional.silu(film["case_layer1.matrix"][1]) @ film["case_layer2.matrix"]
    scales_and_shifts = []
    for t in range(3):
        gamma, beta = (code @ film[f"projectors.{t}"]).tanh().chunk(2)
        scales_and_shifts.append((1 + strength[t].exp() * gamma, (2 * strength[t]).exp() * beta))
    descriptor = potential.descriptor(graph_of(molecule())).detach()
    expected = energy_network(state, descriptor, scales_and_shifts) + reference_of(potential, molecule())
    assert not torch.allclose(expected, energies_of(potential))
    torch.testing.assert_close(energies_of(load(state)), expected, rtol=1e-12, atol=1e-12)


def test_task_embedding_as_input_is_folded_exactly(potential, state, load):
    name = f"{NETWORK}hidden_layers.0.linear.matrix"
    rows = torch.linspace(-1, 1, 2 * state[name].shape[1], dtype=torch.float64).reshape(2, -1)
    descriptor = potential.descriptor(graph_of(molecule())).detach()
    state[name] = torch.cat([state[name], rows])
    state[f"{FITTING}case_embd"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    state["_extra_state"]["model_params"]["fitting_net"] |= {"dim_case_embd": 2, "neuron": [24, 40]}
    code = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(len(descriptor), -1)
    expected = energy_network(state, torch.cat([descriptor, code], dim=1)) + reference_of(
        potential, molecule()
    )
    imported = load(state)
    assert not torch.allclose(expected, energies_of(potential))
    torch.testing.assert_close(energies_of(imported), expected, rtol=1e-12, atol=1e-12)
    assert imported.config.fitting == (24, 40)


def test_task_embedding_of_a_linear_energy_network_is_an_energy_per_atom(load):
    potential = random_potential(fitting=())
    state = copy.deepcopy(deepmd_state(potential))
    name = f"{NETWORK}output_layer.matrix"
    state[name] = torch.cat([state[name], torch.tensor([[5.0], [0.25]], dtype=torch.float64)])
    state[f"{FITTING}case_embd"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    state["_extra_state"]["model_params"]["fitting_net"]["dim_case_embd"] = 2
    torch.testing.assert_close(energies_of(load(state)), energies_of(potential) + 0.25)


@pytest.fixture
def multitask(state):
    """Two branches that differ in their reference energies."""
    section = state.pop("_extra_state")["model_params"]
    branches = {}
    for shift, name in enumerate(("molecules", "crystals")):
        branches |= {
            key.replace("model.Default.", f"model.{name}."): value.clone() for key, value in state.items()
        }
        branches[f"model.{name}.atomic_model.out_bias"] += shift
    sections = {name: copy.deepcopy(section) for name in ("molecules", "crystals")}
    sections["crystals"]["model_branch_alias"] = ["materials"]
    branches["_extra_state"] = {"model_params": {"model_dict": sections}}
    return branches


def test_a_branch_is_chosen_by_name_or_alias(multitask, load, potential):
    first, second = (energies_of(load(multitask, branch=name)) for name in ("molecules", "materials"))
    torch.testing.assert_close(first, energies_of(potential))
    torch.testing.assert_close(second, energies_of(potential) + 1)


def test_the_branch_must_be_chosen_among_those_that_exist(multitask, load):
    with pytest.raises(ValueError, match="it holds several models; choose .* crystals, materials, molecules"):
        load(multitask)
    with pytest.raises(ValueError, match="it has no branch 'water'; choose one of the branches crystals"):
        load(multitask, branch="water")


def test_default_branch_and_single_branch_need_no_choice(multitask, load, potential):
    sections = multitask["_extra_state"]["model_params"]["model_dict"]
    sections["crystals"]["model_branch_alias"] = ["Default"]
    torch.testing.assert_close(energies_of(load(multitask)), energies_of(potential) + 1)
    del sections["crystals"]
    torch.testing.assert_close(energies_of(load(multitask)), energies_of(potential))


def test_single_models_have_no_branches(state, load):
    with pytest.raises(ValueError, match="it holds a single model, so there is no branch 'water'"):
        load(state, branch="water")


# Energies


def test_atom_ener_makes_the_energy_of_an_empty_descriptor_zero(potential, state, load):
    state["_extra_state"]["model_params"]["fitting_net"]["atom_ener"] = [None, -1.0, None]
    zero = energy_network(state, torch.zeros(1, 8, dtype=torch.float64))
    assert abs(zero.item()) > 1e-3
    torch.testing.assert_close(energies_of(load(state)), energies_of(potential) - zero)
    state["_extra_state"]["model_params"]["fitting_net"]["atom_ener"] = [None, None, None]
    torch.testing.assert_close(energies_of(load(state)), energies_of(potential))


def test_both_energy_biases_are_reference_energies(potential, state, load):
    state[f"{FITTING}bias_atom_e"] = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    expected = potential.reference_energies + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.equal(load(state).reference_energies, expected)
