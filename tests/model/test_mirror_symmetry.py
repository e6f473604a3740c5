"""Mirror symmetry: energies and all derivatives of mirror images, for models of symmetry O3 in float64."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from ase import Atoms
from pydantic import ValidationError
from torch import Tensor

from dpa4.model import ModelConfig
from dpa4.model.config import Bridging
from dpa4.model.presets import PRESETS, preset
from dpa4.model.shapes import shapes_of
from dpa4.potential import Potential
from dpa4.potential.hessian import expand_energy
from helpers import assert_close, crystal, graph_of, molecule, random_potential

NORMAL = np.array([1, 2, -2]) / 3
MIRROR = torch.from_numpy(np.eye(3) - 2 * np.outer(NORMAL, NORMAL))  # at a plane in general position

ALLOWED = {
    "S2 grid": {},
    "S2 grid, branches": {"ffn_grid": 2},
    "S2 grid, mlp": {"ffn_grid": "mlp", "mlp_bias": True, "layer_scale": True},
    "gates": {"ffn_on": "degrees", "sandwich_norm": (True, False, True, False)},
    "SO(3) grid of one frame": {"kmax": 0, "ffn_on": "so3", "message_node_so3": True, "so3_readout": "mlp"},
    "elementwise product": {"radial_so2_mode": "none", "n_atten_head": 0},
    "product of degrees": {"radial_so2_mode": "degree", "use_env_seed": False, "mmax": 0},
    "higher orders and two foci": {
        "lmax": 3,
        "mmax": 2,
        "n_focus": 2,
        "radial_so2_rank": 2,
        "edge_norm": True,
    },
    "charge, spin and repulsion": {"charge_spin": True, "bridging": Bridging(), "l_schedule": (2, 1)},
    "no SO(2) layers": {"mixing_layers": 0},
}
"""Options of models in which modules of every kind occur."""


class Results(NamedTuple):
    """Energy of a structure and its derivatives."""

    energy: Tensor  # (1,)
    forces: Tensor  # (N, 3)
    virial: Tensor  # (3, 3)
    product: Tensor  # Hessian times a displacement, (N, 3)
    gradients: list[Tensor]  # of a loss of energy, forces and virial, with respect to the parameters


def results(potential: Potential, atoms: Atoms, displacement: Tensor) -> Results:
    graph = graph_of(atoms, charge_spin=(1, 2))
    product = expand_energy(potential.eval(), graph, displacement).product
    prediction = potential.train()(graph)
    loss = sum(t.square().sum() for t in (prediction.energy, prediction.forces, prediction.virial))
    gradients = torch.autograd.grad(loss, list(potential.parameters()), materialize_grads=True)
    return Results(prediction.energy, prediction.forces, prediction.virial[0], product, list(gradients))


def mirrored(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ MIRROR.numpy())
    copy.positions = atoms.positions @ MIRROR.numpy()
    return copy


@pytest.mark.parametrize("atoms", [molecule(), crystal()], ids=["molecule", "crystal"])
@pytest.mark.parametrize("options", ALLOWED.values(), ids=ALLOWED)
def test_mirror_images_have_equal_energies_and_mirrored_derivatives(options, atoms):
    potential = random_potential(symmetry="O3", **options)
    displacement = torch.from_numpy(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    here, there = (
        results(potential, atoms, displacement),
        results(potential, mirrored(atoms), displacement @ MIRROR),
    )
    assert_close(there.energy, here.energy)
    assert_close(there.forces, here.forces @ MIRROR)
    assert_close(there.virial, MIRROR @ here.virial @ MIRROR)
    assert_close(there.product, here.product @ MIRROR)
    for one, other in zip(there.gradients, here.gradients, strict=True):
        assert_close(one, other, 1e-11)  # sums of many edges


def test_blocks_v_tell_mirror_images_apart():
    """With V = 0 a network of symmetry SO3 has the energies of O3; with V, those of mirror images differ."""
    own, other = (random_potential(symmetry=s).double() for s in ("O3", "SO3"))
    with torch.no_grad():
        for name, weight in other.model.state_dict().items():
            of_own = own.model.state_dict()[name]
            if ".weight_m." not in name:
                weight.copy_(of_own)
                continue
            u, v = weight.chunk(2, dim=1)
            u.copy_(of_own), v.zero_()
    image, energy = (graph_of(a) for a in (mirrored(molecule()), molecule()))
    assert_close(other(energy).energy, own(energy).energy)
    assert_close(other(image).energy, own(energy).energy)
    assert float((random_potential()(image).energy - random_potential()(energy).energy).abs()) > 1e-5


def test_weights_of_orders_above_zero_are_half_as_many():
    of_so3, of_o3 = (shapes_of(preset("paper-air", ("H",), symmetry=s)) for s in ("SO3", "O3"))
    assert of_so3.keys() == of_o3.keys()
    changed = {name for name in of_o3 if of_o3[name] != of_so3[name]}
    assert changed == {name for name in of_o3 if ".weight_m." in name}
    assert {(of_so3[name].numel(), of_o3[name].numel()) for name in changed} == {(2 * 192**2, 192**2)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"message_node_so3": True}, "model.message_node_so3 = True"),
        ({"ffn_on": "so3", "so3_readout": "glu"}, "model.ffn_on = so3 and model.so3_readout = glu"),
    ],
)
def test_grids_with_several_frames_are_refused_by_name(options, named):
    with pytest.raises(
        ValidationError, match=f"model.symmetry = O3 is not possible with {named}: .*ffn_on to s2"
    ):
        ModelConfig(elements=("H",), symmetry="O3", **options)


def test_published_models_have_the_symmetry_of_rotations():
    assert {preset(name, ("H",)).symmetry for name in PRESETS} == {"SO3"}
