"""Physics of a potential with random weights, without any reference: invariance, exact forces, smoothness, limits."""

import numpy as np
import pytest
import torch
from ase import Atoms

from dpa4.graph import build_graph, collate
from dpa4.model import Bridging
from helpers import assert_close, crystal, graph_of, molecule, random_potential

GENERATION_2 = {"ffn_on": "so3", "ffn_grid": 1, "message_node_so3": True, "so3_readout": "mlp"}
VARIANTS = {
    "paper": {"edge_norm": True, "lmax": 3},
    "released": GENERATION_2,
    "generation 3": {
        "edge_norm": (False, True, True),
        "sandwich_norm": (True, False, True, False),
        "env_exp": 5,
        "basis": "gaussian/fix",
        "n_focus": 2,
    },
    "two foci, rank 2": {"n_focus": 2, "radial_so2_rank": 2, "n_atten_head": 2, "lmax": 3},
    "no attention": {"n_atten_head": 0, "mlp_bias": True, "radial_so2_mode": "degree"},
    "high orders": {"lmax": 3, "mmax": 3, "radial_so2_mode": "none", "kmax": 2, "ffn_on": "so3"},
    "pyramid": {"l_schedule": (3, 2, 1), "readout_layers": 2, "ffn_blocks": 2},
    "bridging": {"bridging": Bridging(r_inner=0.8, r_outer=1.4), "lmax": 2},
    "degree six": {"lmax": 6, "n_blocks": 1, "channels": 4, "mixing_layers": 1},
    "scalars": {"lmax": 0, "kmax": 0, "mmax": 0},
}


@pytest.fixture(params=list(VARIANTS))
def potential(request):
    return random_potential(**VARIANTS[request.param])


def rotation(seed: int = 3) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def test_rotation(potential):
    # float64 rounding through about a hundred layers; observed below 1e-12
    for atoms in (molecule(), crystal()):
        turn = torch.from_numpy(rotation())
        turned = atoms.copy()
        turned.positions = atoms.positions @ turn.numpy().T
        turned.set_cell(atoms.cell.array @ turn.numpy().T)
        one, two = potential(graph_of(atoms)), potential(graph_of(turned))
        assert_close(two.energy, one.energy)
        assert_close(two.forces, one.forces @ turn.T, 1e-11)
        assert_close(two.virial, turn @ one.virial @ turn.T, 1e-11)


def test_translation_permutation_and_lattice_shift(potential):
    atoms = crystal()
    one = potential(graph_of(atoms))
    order = np.random.default_rng(0).permutation(len(atoms))
    moved = atoms[order]
    moved.positions += [11.3, -7.1, 2.9]
    moved.positions += np.random.default_rng(1).integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array
    two = potential(graph_of(moved))
    assert_close(two.energy, one.energy)
    assert_close(two.forces, one.forces[order], 1e-11)
    assert_close(two.virial, one.virial, 1e-11)


def test_forces_are_the_gradient(potential):
    # central differences of float64 energies: error h^2 f''' + 1e-16 E / h, about 1e-8 at h = 1e-5
    atoms, h = crystal(), 1e-5
    forces = potential(graph_of(atoms)).forces
    for atom, axis in [(0, 0), (2, 1), (5, 2)]:
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * h
            energies.append(float(potential(graph_of(moved)).energy))
        numeric = -(energies[0] - energies[1]) / (2 * h)
        assert float(forces[atom, axis]) == pytest.approx(
            numeric, abs=1e-6 * max(1, float(forces.abs().max()))
        )


def test_virial_is_minus_the_strain_derivative(potential):
    atoms, h = crystal(), 1e-5
    virial = potential(graph_of(atoms)).virial[0]
    for a, b in [(0, 0), (1, 2), (2, 1)]:
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * h
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            energies.append(float(potential(graph_of(moved)).energy))
        numeric = -(energies[0] - energies[1]) / (2 * h)
        assert float(virial[a, b]) == pytest.approx(numeric, abs=1e-6 * max(1, float(virial.abs().max())))


def test_batch_equals_single_and_structures_do_not_see_each_other(potential):
    frames = [molecule(1, 5), crystal(2), Atoms("C", positions=[[0.3, 0, 0]]), molecule(4, 3)]
    graphs = [graph_of(f) for f in frames]
    batch = potential(collate(graphs))
    start = 0
    for k, graph in enumerate(graphs):
        single = potential(graph)
        atoms = slice(start, start + graph.num_atoms)
        assert_close(batch.energy[k], single.energy[0])
        assert_close(batch.forces[atoms], single.forces, 1e-11)
        assert_close(batch.virial[k], single.virial[0], 1e-11)
        start = atoms.stop


def test_gradients_across_structures_are_exactly_zero(potential):
    graph = collate([graph_of(molecule(1, 5)), graph_of(crystal(2))])
    vectors = graph.edge_vectors().requires_grad_()
    atomic = potential.atomic_energies(graph, vectors)
    (gradient,) = torch.autograd.grad(atomic[graph.structure == 0].sum(), vectors)
    other = graph.structure[graph.destination] == 1
    assert gradient[~other].abs().max() > 0
    assert gradient[other].abs().max() == 0


def test_isolated_atoms_and_empty_graphs(potential):
    lone = potential(graph_of(Atoms("C", positions=[[1.0, 2, 3]])))
    assert lone.forces.abs().max() == 0 and lone.virial.abs().max() == 0
    far = potential(graph_of(Atoms("CO", positions=[[0, 0, 0], [0, 0, 50.0]])))
    assert_close(far.atomic_energies[0], lone.atomic_energies[0])
    empty = potential(build_graph(np.zeros(0, int), np.zeros((0, 3)), np.zeros((3, 3)), [False] * 3, 4.0))
    assert empty.energy.tolist() == [0.0] and empty.forces.shape == (0, 3)


def test_one_atom_cell_smaller_than_the_cutoff(potential):
    cell = np.array([[0, 1.3, 1.3], [1.3, 0, 1.3], [1.3, 1.3, 0.0]])
    one = Atoms("C", cell=cell, pbc=True)
    result, large = potential(graph_of(one)), potential(graph_of(one.repeat((2, 1, 3))))
    assert result.forces.abs().max() < 1e-11 * max(
        1, float(result.virial.abs().max())
    )  # every site is a centre of inversion
    assert_close(6 * result.energy, large.energy)
    assert_close(6 * result.virial, large.virial, 1e-11)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_bonds_along_axes(potential, axis):
    """Energy and forces equal those of a rotated copy where the edge frame is singular or switches."""
    atoms = Atoms("COH", positions=[[0, 0, 0], 1.2 * np.array(axis), -1.0 * np.array(axis)])
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation().T
    one, two = potential(graph_of(atoms)), potential(graph_of(turned))
    assert_close(two.energy, one.energy)
    assert_close(two.forces, one.forces @ torch.from_numpy(rotation()).T, 1e-11)


def pair_curve(potential, distances):
    """Energy, slope and curvature along the distance of an atom from a C-H pair, (n, 3)."""
    frames = [Atoms("CHO", positions=[[0, 0, 0], [-0.7, 0.8, 0.1], [d, 0, 0]]) for d in distances]
    graph = collate([graph_of(atoms) for atoms in frames])
    graph = graph._replace(positions=graph.positions.requires_grad_())
    energy = potential.atomic_energies(graph, graph.edge_vectors()).unflatten(0, (-1, 3)).sum(1)
    (gradient,) = torch.autograd.grad(energy.sum(), graph.positions, create_graph=True)
    slope = gradient[2::3, 0]
    (second,) = torch.autograd.grad(slope.sum(), graph.positions)
    return torch.stack([energy, slope, second[2::3, 0]], dim=1).detach().numpy()


def test_energy_force_and_curvature_vanish_at_the_cutoff(potential):
    """The third atom stays in place, so the far atom enters its neighbourhoods at 4 Angstrom."""
    eps = np.array([1e-1, 1e-2, 1e-3])
    *inside, at_cutoff, beyond = pair_curve(potential, [*(4.0 - eps), 4.0, 4.0 + 1e-9])
    np.testing.assert_allclose(at_cutoff, beyond, rtol=0, atol=1e-9 * np.abs(beyond).max())
    change = np.abs(np.array(inside) - beyond)
    scale = np.abs(pair_curve(potential, np.linspace(1.5, 3.5, 9))).max(0)
    # the envelope is a fourth power of the distance to the cutoff: curvature falls at least as its square
    for order, power in enumerate((4, 3, 2)):
        assert (
            change[1:, order] <= 1e4 * scale[order] * (eps[1:] / 4) ** power + 1e-9 * scale[order]
        ).all(), change


def test_curve_is_continuous_everywhere(potential):
    """No jump of energy, slope or curvature on a fine scan: halving the step halves the largest change."""
    curve = pair_curve(potential, np.linspace(0.6, 4.1, 401))
    fine, coarse = (np.abs(np.diff(points, axis=0)).max(0) for points in (curve, curve[::2]))
    assert (fine < 0.75 * coarse).all(), f"coarse {coarse}, fine {fine}"


def test_training_mode_differentiates_forces(potential):
    potential.train()
    result = potential(graph_of(molecule()))
    (result.forces.square().sum() + result.virial.square().sum()).backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_precision_changes_do_not_lose_the_constants(potential):
    graph = graph_of(molecule())
    expected = potential(graph).energy
    weights = {k: v.clone() for k, v in potential.state_dict().items()}
    potential.float()
    assert potential.reference_energies.dtype == torch.float64
    assert potential(graph).energy.dtype == torch.float64
    potential.double().load_state_dict(weights)
    torch.testing.assert_close(potential(graph).energy, expected, rtol=0, atol=0)


def test_mixed_precision_in_the_blocks(potential):
    """bfloat16 has 8 bits: results within a few per cent, everything outside the blocks in full precision."""
    potential.float().train()
    exact = potential(graph_of(molecule()))
    potential.precision = "fast"
    mixed = potential(graph_of(molecule()))
    assert mixed.energy.dtype == mixed.forces.dtype == torch.float64
    assert not torch.equal(mixed.forces, exact.forces)
    assert_close(mixed.forces, exact.forces, 0.1)
    mixed.forces.square().sum().backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_excluded_pairs_do_not_interact():
    potential = random_potential(excluded_pairs=(("C", "O"),))
    near, far = (
        potential(graph_of(Atoms("CO", positions=[[0, 0, 0], [d, 0, 0]]))).energy for d in (1.2, 3.0)
    )  # fmt: skip
    torch.testing.assert_close(near, far, rtol=0, atol=0)
    bonded = potential(graph_of(Atoms("CH", positions=[[0, 0, 0], [1.2, 0, 0]])))
    assert bonded.forces.abs().max() > 1e-6


def test_charge_and_spin_change_the_energy_and_are_checked():
    potential = random_potential(charge_spin=True)
    neutral, charged = (potential(graph_of(molecule(), charge_spin=q)).energy for q in ((0, 1), (1, 2)))
    assert (neutral - charged).abs() > 1e-6
    with pytest.raises(ValueError, match="charge must be in"):
        potential.check(graph_of(molecule(), charge_spin=(250, 1)))


def test_unknown_element_is_named():
    with pytest.raises(ValueError, match=r"element Pu \(94\) is not in the model, which knows H, C, O"):
        random_potential().check(graph_of(Atoms("PuO", positions=[[0, 0, 0], [2, 0, 0]])))


def test_reference_energies_must_belong_to_the_model():
    from dpa4.model import ModelConfig
    from dpa4.potential import Potential

    with pytest.raises(ValueError, match=r"given for \['Pu'\]"):
        Potential(ModelConfig(elements=("H",)), {"Pu": 1.0})


def test_below_the_inner_radius_only_nuclear_repulsion_acts():
    from dpa4.model.short_range import zbl_pair_energy

    potential = random_potential(bridging=Bridging(r_inner=0.8, r_outer=1.4, smooth_cutoff=False))
    alone = sum(float(potential(graph_of(Atoms(e))).energy) for e in ("C", "O"))
    for distance in (0.3, 0.79):
        pair = float(potential(graph_of(Atoms("CO", positions=[[0, 0, 0], [distance, 0, 0]]))).energy)
        repulsion = zbl_pair_energy(
            torch.tensor(distance, dtype=torch.float64), torch.tensor(6), torch.tensor(8)
        )
        assert pair - alone == pytest.approx(float(repulsion), rel=1e-12)


def test_zbl_against_published_screening():
    """Universal screening at x = r/a = 1: 0.18175 e^-3.1998 + 0.50986 e^-0.94229 + ... = 0.4164."""
    from dpa4.model.short_range import zbl_pair_energy

    a = 0.88534 * 0.5291772109 / (2 * 14**0.23)
    energy = float(zbl_pair_energy(torch.tensor(a, dtype=torch.float64), torch.tensor(14), torch.tensor(14)))
    assert energy * a / (14.3996 * 14**2) == pytest.approx(0.41644, abs=1e-4)


def test_parts_of_the_edges_change_nothing(potential):
    """Processing a few centres at a time gives the same results and derivatives as all at once."""
    graph = collate([graph_of(molecule()), graph_of(crystal()), graph_of(molecule(1, 1))])

    def results(max_edges):
        potential.model.max_edges = {"cpu": max_edges}
        prediction = potential.train()(graph)
        loss = prediction.energy.sum() + prediction.forces.square().sum()
        trained = [p for p in potential.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return [prediction.energy, prediction.forces, *(g for g in gradients if g is not None)]

    # float64, sums over atoms in another order in parameter gradients
    for part, whole in zip(results(40), results(10**6), strict=True):
        assert_close(part, whole, 1e-10)
