"""Properties beside energy and forces: atomic stresses, Hessians, embeddings, dispersion."""

import sys
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.build import molecule as known_molecule
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.lj import LennardJones
from ase.io import read, write
from ase.units import Bohr, Hartree
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.graph import collate
from dpa4.model.config import Bridging, PairBridging, pair_names
from dpa4.potential import (
    embeddings,
    expand_energy,
    hessian,
    hessian_vector_product,
    save_potential,
    write_embeddings,
)
from dpa4.simulation import DPA4Calculator, with_dispersion
from helpers import assert_close, crystal, graph_of, molecule, random_potential


def attach(atoms: Atoms, model=None, **options) -> Atoms:
    atoms = atoms.copy()
    model = random_potential() if model is None else model
    atoms.calc = DPA4Calculator(model, device="cpu", dtype="float64", **options)
    return atoms


# --- stresses of atoms


def test_stresses_add_up_to_the_stress():
    atoms = attach(crystal(), [random_potential(0), random_potential(1, cutoff=3.5)])
    stresses = atoms.get_stresses()
    assert stresses.shape == (6, 6)
    np.testing.assert_allclose(stresses.sum(axis=0), atoms.get_stress(), atol=1e-15)
    assert np.abs(stresses).max() > 1e-4


def test_stresses_of_a_pair_are_shared_half_and_half():
    """Each of two atoms that only interact with each other has half of the stress, which follows from the force."""
    atoms = attach(Atoms("CO", [(1, 1, 1), (2.2, 1.7, 1)], cell=[20] * 3, pbc=True))
    arm, force = atoms.positions[1] - atoms.positions[0], atoms.get_forces()[1]
    whole = -np.outer(force, arm) / atoms.get_volume()  # dE/dstrain = -F (x) r
    for own in atoms.get_stresses(voigt=False):
        np.testing.assert_allclose(own, whole / 2, atol=1e-14)


def test_stresses_cost_nothing_unless_asked_for():
    atoms = attach(crystal())
    calls = []
    potential = atoms.calc.potentials[0]
    original = potential.atomic_virials
    potential.atomic_virials = lambda graph: calls.append(1) or original(graph)
    atoms.get_forces(), atoms.get_stress()
    assert calls == [] and "stresses" not in atoms.calc.results
    atoms.get_stresses(), atoms.get_stresses()
    assert calls == [1]
    with pytest.raises(PropertyNotImplementedError):
        attach(molecule()).get_stresses()


def test_atomic_virials_of_a_batch():
    potential = random_potential(excluded_pairs=(("H", "O"),))
    graphs = [graph_of(crystal()), graph_of(molecule()), graph_of(Atoms("C"))]
    virials = potential.atomic_virials(collate(graphs))
    assert_close(virials, torch.cat([potential.atomic_virials(g) for g in graphs]))
    total = potential(collate(graphs)).virial
    assert_close(virials[:6].sum(0), total[0])
    assert_close(virials[6:15].sum(0), total[1])
    assert not virials[15].any()


# --- second derivatives


SO3 = {"message_node_so3": True, "ffn_on": "so3", "ffn_grid": 1, "so3_readout": "mlp", "lmax": 1}
ZBL = {"bridging": Bridging(r_inner=0.95, r_outer=1.4), "excluded_pairs": (("C", "O"),)}
PAIRS = pair_names(("H", "C", "O"))
WINDOWS = {
    "bridging": PairBridging(outer=dict.fromkeys(PAIRS, 1.5), frozen=0.7, full=dict.fromkeys(PAIRS, 0.8))
}


@cache
def known_hessian(structure) -> torch.Tensor:
    """Hessian by `random_potential`; a column takes as long as a step of training."""
    return hessian(random_potential(), graph_of(structure()))


@pytest.mark.parametrize("options", [{}, SO3, ZBL, WINDOWS])
@pytest.mark.parametrize("structure", [molecule, crystal])
def test_hessian_is_the_derivative_of_the_forces(structure, options):
    potential, atoms, h = random_potential(**options), structure(), 1e-4
    matrix = hessian(potential, graph_of(atoms)) if options else known_hessian(structure)
    # central differences of float64 forces: error about h^2 times fourth derivatives, about 1e-8
    for column in (0, 4, 17):
        forces = []
        for sign in (1, -2):
            atoms.positions.ravel()[column] += sign * h
            forces.append(potential(graph_of(atoms)).forces.flatten())
        atoms.positions.ravel()[column] += h
        np.testing.assert_allclose(matrix[:, column], -(forces[0] - forces[1]) / (2 * h), atol=1e-7)
    assert matrix.abs().max() > 0.05


def test_hessian_is_symmetric_and_blind_to_translations_and_rotations():
    potential, atoms = random_potential(), molecule()
    matrix = known_hessian(molecule)
    assert_close(matrix, matrix.T, 1e-14)
    assert_close(matrix.view(9, 3, 9, 3).sum(2), torch.zeros(9, 3, 3), 1e-13)
    # A rotation turns the forces: H (w x r) = -(w x F).
    axis, forces = np.array([0.3, -0.5, 0.9]), potential(graph_of(atoms)).forces.numpy()
    turned = torch.from_numpy(np.cross(axis, atoms.positions).ravel())
    np.testing.assert_allclose(matrix @ turned, -np.cross(axis, forces).ravel(), atol=1e-12)


def test_products_are_those_of_the_hessian():
    potential, structures = random_potential(), (crystal, molecule)
    graphs = [graph_of(structure()) for structure in structures]
    vector = torch.from_numpy(np.random.default_rng(0).normal(size=(15, 3)))
    product = hessian_vector_product(potential, collate(graphs), vector)
    for structure, own, v in zip(structures, product.split([6, 9]), vector.split([6, 9]), strict=True):
        assert_close(own.flatten(), known_hessian(structure) @ v.flatten(), 1e-13)
    trained = random_potential().train()
    assert_close(hessian_vector_product(trained, collate(graphs), vector), product)
    assert all(p.grad is None for p in trained.parameters())


def test_energy_and_forces_come_with_the_product():
    potential, graph = random_potential(), collate([graph_of(crystal()), graph_of(molecule())])
    vector = torch.ones(15, 3)
    found, expected = expand_energy(potential, graph, vector), potential(graph)
    assert_close(found.energy, expected.energy)
    assert_close(found.forces, expected.forces)
    assert not any(part.requires_grad for part in found)


def test_hessian_of_single_precision_and_of_atoms_alone():
    graph = graph_of(molecule())
    double, single = known_hessian(molecule), hessian(random_potential().float(), graph)
    assert single.dtype == torch.float64
    assert 0 < (double - single).abs().max() < 1e-4 * double.abs().max()
    assert not hessian(random_potential(), graph_of(Atoms("CC", [(0, 0, 0), (9, 0, 0)]))).any()


def test_hessian_refusals():
    potential, graph = random_potential(), graph_of(molecule())
    with pytest.raises(
        ValueError, match=r"vector has shape \(3, 3\); a displacement of 9 atoms has \(9, 3\)"
    ):
        hessian_vector_product(potential, graph, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="Hessian needs a graph of one structure, got 2"):
        hessian(potential, collate([graph, graph]))
    with pytest.raises(ValueError, match=r"element Pu \(94\) is not in the model"):
        hessian(potential, graph_of(Atoms("Pu2", [(0, 0, 0), (0, 0, 2)])))
    from dpa4.execution.regions import compile_potential

    compile_potential(potential)
    with pytest.raises(ValueError, match="compiled potential does not support second derivatives"):
        hessian(potential, graph)


# --- embeddings


def test_embeddings_are_invariant_and_tell_environments_apart():
    potential, atoms = random_potential(), molecule()
    moved = atoms.copy()
    moved.rotate(70, (1, 2, 3))
    moved.positions += (3.0, -20.0, 1.0)
    swapped = atoms[[3, 1, 2, 0, 4, 5, 6, 7, 8]]  # two H
    one, two, three = embeddings(potential, [atoms, moved, swapped], max_atoms=20)
    assert one.shape == (9, 8)
    np.testing.assert_allclose(two, one, atol=1e-12)
    np.testing.assert_allclose(three, one[[3, 1, 2, 0, 4, 5, 6, 7, 8]], atol=1e-12)
    assert np.abs(one[0] - one[3]).max() > 1e-3
    wrapped = crystal()
    wrapped.wrap()
    inside, outside = embeddings(potential, [wrapped, crystal()])
    np.testing.assert_allclose(inside, outside, atol=1e-12)


def test_embeddings_feed_the_energy():
    potential, atoms = random_potential(), molecule()
    (found,) = embeddings(potential, [atoms])
    energies = potential.model.energy(torch.from_numpy(found))
    expected = potential(graph_of(atoms)).atomic_energies - potential.reference_energies[[0, 1, 2] * 3]
    assert_close(energies, expected)


def test_embeddings_see_charge_but_no_labels():
    potential = random_potential(charge_spin=True)
    charged = molecule()
    charged.info = {"charge": 1, "spin": 2, "REF_energy": "unreadable"}
    neutral = molecule()
    neutral.info = {"charge": 0, "spin": 1}
    one, two = embeddings(potential, [charged, neutral])
    assert np.abs(one - two).max() > 1e-4
    with pytest.raises(ValueError, match="structure 0: the model is conditioned on charge and spin without"):
        embeddings(potential, [molecule()])
    for atoms in (charged, neutral):
        atoms.info["net_charge"] = 1
    with pytest.warns(UserWarning, match="^not used, .*: net_charge;") as caught:
        embeddings(potential, [charged, neutral])
    assert len(caught) == 1


def test_embeddings_refusals(tmp_path):
    with pytest.raises(ValueError, match="there are no structures to embed"):
        embeddings(random_potential(), [])
    with pytest.raises(ValueError, match=r"element Pu \(94\) of structure 1 is not in model.elements"):
        embeddings(random_potential(), [molecule(), Atoms("Pu")])
    with pytest.raises(ValueError, match="written to .npz, .xyz or .extxyz, got 'x.csv'"):
        write_embeddings(random_potential(), [molecule()], tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_embeddings(random_potential(), [molecule()], tmp_path / "absent" / "x.npz")


def test_embed_command(tmp_path):
    save_potential(random_potential(), tmp_path / "m.safetensors")
    structures = [molecule(0), crystal(1)]
    write(tmp_path / "in.xyz", structures)
    expected = embeddings(random_potential(), read(tmp_path / "in.xyz", ":"))

    def embed(name: str, *options: str) -> str:
        arguments = [tmp_path / "m.safetensors", tmp_path / "in.xyz", "-o", tmp_path / name, *options]
        command = ["embed", *map(str, arguments), "--dtype", "float64", "--device", "cpu"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return result.output

    assert "8 features of 15 atoms" in embed("all.npz")
    with np.load(tmp_path / "all.npz") as file:
        np.testing.assert_array_equal(file["embeddings"], np.concatenate(expected))
        np.testing.assert_array_equal(file["structure"], [0] * 9 + [1] * 6)
        np.testing.assert_array_equal(
            file["atomic_numbers"], [*structures[0].numbers, *structures[1].numbers]
        )
    assert "8 features of 2 structures" in embed("mean.npz", "--mean")
    with np.load(tmp_path / "mean.npz") as file:
        np.testing.assert_array_equal(file["embeddings"], [one.mean(axis=0) for one in expected])
    embed("all.xyz")
    embed("mean.xyz", "--mean")
    again, means = read(tmp_path / "all.xyz", ":"), read(tmp_path / "mean.xyz", ":")
    for atoms, averaged, one in zip(again, means, expected, strict=True):  # written with eight decimals
        np.testing.assert_allclose(atoms.arrays["embedding"], one, atol=1e-7)
        np.testing.assert_allclose(averaged.info["embedding"], one.mean(axis=0), atol=1e-7)


# --- dispersion


class Nothing(Calculator):
    """Stub for a potential without interaction, so that a sum shows the other term alone."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results = {
            "energy": 0.0,
            "free_energy": 0.0,
            "forces": np.zeros((len(atoms), 3)),
            "stress": np.zeros(6),
        }


def argon(distance: float) -> Atoms:
    atoms = Atoms("Ar2", [(0, 0, 0), (0, 0, distance)])
    atoms.calc = with_dispersion(Nothing())
    return atoms


def test_dispersion_of_argon():
    # Far apart -C6/r^6 is left; D3 has C6 = 64.6 Hartree Bohr^6 for two argon atoms (Grimme et al. 2010), and the
    # r^-8 term adds 0.3 % at 48 Angstrom.
    far = argon(48.0).get_potential_energy() / Hartree * (48.0 / Bohr) ** 6
    assert far == pytest.approx(-64.6, rel=0.01)
    # At the minimum of the real dimer, which is 12.3 meV deep, PBE alone is nearly unbound.
    near = argon(3.76)
    assert -0.02 < near.get_potential_energy() < -0.005
    assert near.get_forces()[0, 2] > 0  # towards the other atom
    assert near.get_potential_energy(force_consistent=True) == near.get_potential_energy()
    energies = [argon(3.76 + shift).get_potential_energy() for shift in (1e-3, -1e-3)]
    assert near.get_forces()[1, 2] == pytest.approx(-(energies[0] - energies[1]) / 2e-3, rel=1e-5)


def test_dispersion_of_stacked_benzene():
    one = known_molecule("C6H6")
    two = one.copy()
    two.positions += (0, 0, 3.5)
    pair = one + two
    energies = []
    for atoms in (pair, one):
        atoms.calc = with_dispersion(Nothing(), "pbe", "bj")
        energies.append(atoms.get_potential_energy())
    # The bond of about -0.1 eV is the sum of this and of the repulsion in PBE.
    assert -0.35 < energies[0] - 2 * energies[1] < -0.1


def test_dispersion_is_added_to_energy_forces_and_stress():
    potential = random_potential(elements=("H", "C", "Ar"))
    atoms = bulk("Ar", a=5.2, cubic=True)
    atoms.rattle(0.1, seed=1)
    results = []
    for calculator in (
        DPA4Calculator(potential, device="cpu", dtype="float64"),
        with_dispersion(Nothing(), cutoff=12.0),
        with_dispersion(DPA4Calculator(potential, device="cpu", dtype="float64"), cutoff=12.0),
    ):
        atoms.calc = calculator
        results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    for own, d3, both in zip(*results, strict=True):
        np.testing.assert_allclose(both, own + d3, atol=1e-12)
        assert np.abs(own).max() > 1e-7 and np.abs(d3).max() > 1e-7
    pressure = -results[1][2][:3].mean()
    energies = []
    for scale in (1 + 1e-4, 1 - 1e-4):
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell * scale, scale_atoms=True)
        scaled.calc = with_dispersion(Nothing(), cutoff=12.0)
        energies.append(scaled.get_potential_energy())
    # -dE/dV from the energies; pairs that cross the cutoff of 12 Angstrom make steps of some 1e-5 eV
    assert pressure == pytest.approx(-(energies[0] - energies[1]) / (6e-4 * atoms.get_volume()), rel=0.05)


def test_dispersion_notices_a_change_of_charge():
    model = random_potential(charge_spin=True, default_charge_spin=(0, 1))
    atoms = molecule()
    atoms.calc = with_dispersion(DPA4Calculator(model, device="cpu", dtype="float64"))
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    assert atoms.get_potential_energy() != neutral


def test_dispersion_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"no D3\(bj\) parameters for functional 'lda'"):
        with_dispersion(LennardJones(), "lda")
    with pytest.raises(ValueError, match="damping must be one of bj, zero, bjm, zerom, got 'tt'"):
        with_dispersion(LennardJones(), damping="tt")
    with pytest.raises(ValueError, match="cutoff must be a positive distance in Angstrom, got 0"):
        with_dispersion(LennardJones(), cutoff=0)
    monkeypatch.setitem(sys.modules, "torch_dftd.torch_dftd3_calculator", None)
    with pytest.raises(ImportError, match=r"torch_dftd is not installed; pip install .*\[d3\]'"):
        with_dispersion(LennardJones())
