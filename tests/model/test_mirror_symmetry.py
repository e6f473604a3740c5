"""Mirror symmetry: energies and all derivatives of mirror images, for models of symmetry O3 in float64."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from dpa4.model import ModelConfig
from dpa4.model.config import Bridging
from dpa4.model.presets import PRESETS, preset
from dpa4.model.shapes import shapes_of
from dpa4.potential import Potential
from dpa4.potential.deepmd.writer import parameter_of_so3
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
    "SO(3) grids": {"kmax": 1, "ffn_on": "so3", "message_node_so3": True, "so3_readout": "glu"},
    "SO(3) grids, mlp": {
        "lmax": 3,
        "kmax": 2,
        "ffn_on": "so3",
        "ffn_grid": "mlp",
        "message_node_so3": True,
        "message_grid": "mlp",
        "so3_readout": "mlp",
        "readout_layers": 2,
        "mlp_bias": True,
    },
    "SO(3) grids, branches": {"ffn_on": "so3", "ffn_grid": 3, "message_node_so3": True, "message_grid": 2},
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


GRIDS = {
    "feed-forward": {"ffn_on": "so3"},
    "message-node product": {"message_node_so3": True, "message_grid": "mlp"},
    "read-out": {"so3_readout": "mlp", "readout_layers": 2},
}
"""Options of models with a single kind of SO(3) grid each."""


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS)
def test_odd_frames_tell_mirror_images_apart(options):
    """With V = 0, all frames of an SO(3) grid break mirror symmetry. Zeros in odd frames have the energies of O3."""
    own = random_potential(symmetry="O3", **options)
    energy, image = (graph_of(a) for a in (molecule(), mirrored(molecule())))
    with_zeros = Potential(ModelConfig(**own.config.model_dump() | {"symmetry": "SO3"})).double().eval()
    weights = {key: parameter_of_so3(key, w, own.config) for key, w in own.model.state_dict().items()}
    with_zeros.model.load_state_dict(weights)
    with_zeros.reference_energies.copy_(own.reference_energies)
    assert_close(with_zeros(energy).energy, own(energy).energy)
    assert_close(with_zeros(image).energy, own(energy).energy)
    all_frames = random_potential(symmetry="SO3", **options)
    with torch.no_grad():
        for name, weight in all_frames.model.state_dict().items():
            if ".weight_m." in name:
                weight.unflatten(1, (own.config.n_focus, 2, -1))[:, :, 1].zero_()
    assert float((all_frames(image).energy - all_frames(energy).energy).abs()) > 1e-9


def test_published_models_have_the_symmetry_of_rotations():
    assert {preset(name, ("H",)).symmetry for name in PRESETS} == {"SO3"}
