"""ML-IAP: several ranks give the results of the whole system; threads that exchange ghosts replace LAMMPS."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase import Atoms

from dpa4.graph import build_graph
from dpa4.model.config import Bridging, PairBridging, pair_names
from dpa4.potential import Potential
from dpa4.simulation import DPA4MLIAP
from helpers import assert_close, molecule, random_potential
from settings import SETTINGS

CUTOFF = 3.0


class Ranks:
    """Stub for the communication of LAMMPS: ranks, each in a thread, exchange rows of numbers."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=60)
        self.published: list[torch.Tensor | None] = [None] * count
        self.data: list[Data] = []
        self.exchanges = 0

    def publish(self, rank: int, rows: torch.Tensor) -> list[torch.Tensor]:
        """Publish the rows of a rank; return those of all ranks."""
        self.published[rank] = rows.clone()
        self.barrier.wait()
        found = list(self.published)
        self.barrier.wait()
        assert len({(t.shape[1], t.dtype) for t in found}) == 1, "ranks exchange different things"
        self.exchanges += rank == 0
        return found


class Data:
    """Stub for the data object of LAMMPS's Kokkos coupling for one rank, on the CPU.

    Own atoms are followed by ghosts: copies of atoms of any rank, including images of own atoms, within reach of the
    own atoms. Pairs are directed, each in both directions where both atoms are on the rank; they are grouped by their
    own atom i, with rij = rj - ri.
    """

    def __init__(
        self, ranks: Ranks, rank: int, atoms: Atoms, owner: np.ndarray, elements: list[str], skin: float
    ):
        self.ranks, self.rank = ranks, rank
        self.own = np.flatnonzero(owner == rank)
        cell, reach = atoms.cell.array, CUTOFF + skin
        shifts = itertools.product(*((-2, -1, 0, 1, 2) if periodic else (0,) for periodic in atoms.pbc))
        ghosts, places = [], []
        for shift in shifts:
            for atom, position in enumerate(atoms.positions + np.array(shift) @ cell):
                if any(shift) or owner[atom] != rank:
                    near = np.linalg.norm(atoms.positions[self.own] - position, axis=1) < reach
                    if near.any():
                        ghosts.append(atom)
                        places.append(position)
        mixed = np.random.default_rng(rank).permutation(len(ghosts))
        self.ghosts = np.array(ghosts, dtype=int)[mixed]  # the atom that each copies
        self.nlocal, self.ntotal = len(self.own), len(self.own) + len(ghosts)
        self.nodes = np.concatenate([self.own, self.ghosts])
        positions = np.concatenate([atoms.positions[self.own], np.array(places).reshape(-1, 3)[mixed]])
        self.elems = np.array([elements.index(atoms[int(i)].symbol) for i in self.nodes], dtype=np.int32)
        self.owner, self.index = owner, np.empty(len(atoms), dtype=int)
        for r in set(owner.tolist()):
            self.index[owner == r] = np.arange((owner == r).sum())
        pairs = []
        for i in np.random.default_rng(7).permutation(self.nlocal):  # LAMMPS's list need not be ascending
            distances = np.linalg.norm(positions - positions[i], axis=1)
            pairs += [(i, j) for j in np.flatnonzero(distances < CUTOFF) if j != i]
        ends = np.array(pairs, dtype=np.int32).reshape(-1, 2)
        self.pair_i, self.pair_j = np.ascontiguousarray(ends[:, 0]), np.ascontiguousarray(ends[:, 1])
        self.rij = positions[self.pair_j] - positions[self.pair_i]
        self.npairs = len(ends)
        self.eatoms = np.full(self.nlocal, np.nan)
        self.energy = np.nan
        self.forces = np.zeros((self.ntotal, 3))
        self.strain = np.zeros((3, 3))  # derivative of the energy
        if self.npairs == 0:
            self.pair_i = self.pair_j = self.rij = None  # like null pointers

    def update_pair_forces(self, fij: torch.Tensor) -> None:
        assert fij.dtype == torch.float64 and fij.shape == (self.npairs, 3) and fij.is_contiguous()
        np.add.at(self.forces, self.pair_i, fij.numpy())
        np.subtract.at(self.forces, self.pair_j, fij.numpy())
        self.strain += self.rij.T @ fij.numpy()

    def check(self, copy_from: torch.Tensor, copy_to: torch.Tensor, vec_len: int) -> None:
        """Check the assumptions of the real object, which sees addresses only."""
        assert copy_from.dtype == copy_to.dtype and copy_from.dtype in (torch.float32, torch.float64)
        for tensor in (copy_from, copy_to):
            assert tensor.is_contiguous() and tensor.numel() == self.ntotal * vec_len

    def forward_exchange(self, copy_from: torch.Tensor, copy_to: torch.Tensor, vec_len: int) -> None:
        self.check(copy_from, copy_to, vec_len)
        found = self.ranks.publish(self.rank, copy_from)
        copy_to.copy_(copy_from)
        for k, atom in enumerate(self.ghosts):
            copy_to[self.nlocal + k] = found[self.owner[atom]][self.index[atom]]

    def reverse_exchange(self, copy_from: torch.Tensor, copy_to: torch.Tensor, vec_len: int) -> None:
        self.check(copy_from, copy_to, vec_len)
        found = self.ranks.publish(self.rank, copy_from)
        copy_to.copy_(copy_from)
        for data, rows in zip(self.ranks.data, found, strict=True):
            for k, atom in enumerate(data.ghosts):
                if self.owner[atom] == self.rank:
                    copy_to[self.index[atom]] += rows[data.nlocal + k]
        copy_to[self.nlocal :] = 0


def run(atoms: Atoms, owner: np.ndarray, count: int, potential: Potential, skin: float = 0.5, **options):
    """Energy, atomic energies, forces and virial, assembled from all ranks, and the ranks."""
    ranks = Ranks(count)
    # one model per rank, as there is one process
    models = [DPA4MLIAP(potential, **({"dtype": "float64"} | options)) for _ in range(count)]
    ranks.data = [Data(ranks, r, atoms, owner, models[r].element_types, skin) for r in range(count)]

    def compute(model, data):
        try:
            model.compute_forces(data)
        except BaseException:
            ranks.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(compute, *both) for both in zip(models, ranks.data, strict=True)]
        errors = [e for call in calls if (e := call.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    energies, forces = np.full(len(atoms), np.nan), np.zeros((len(atoms), 3))
    for data in ranks.data:
        energies[data.own] = data.eatoms
        np.add.at(forces, data.nodes, data.forces)
    virial = -sum(data.strain for data in ranks.data)
    return sum(data.energy for data in ranks.data), energies, forces, virial, ranks


def cell(seed: int = 0, count: int = 14) -> Atoms:
    """Skewed cell that is slightly wider than one cutoff."""
    atoms = Atoms("HCO" * count)[:count]
    rng = np.random.default_rng(seed)
    atoms.set_cell([[6.4, 0, 0], [0.7, 3.6, 0], [-0.5, 0.4, 3.9]])
    atoms.pbc = True
    places: list[np.ndarray] = []
    while len(places) < count:
        trial = rng.uniform(size=3) @ atoms.cell.array
        images = [trial + np.array(s) @ atoms.cell.array for s in itertools.product((-1, 0, 1), repeat=3)]
        if all(np.linalg.norm(image - p) > 0.95 for image in images for p in places):
            places.append(trial)
    atoms.positions = places
    return atoms


def halves(atoms: Atoms, count: int) -> np.ndarray:
    """Owners of the atoms: slabs along x, like LAMMPS's processors."""
    return np.minimum((atoms.get_scaled_positions()[:, 0] * count).astype(int), count - 1)


def expected(atoms: Atoms, potential: Potential, charge_spin: tuple[int, int] = (0, 1)):
    return potential(
        build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF, charge_spin)
    )


def assert_equal(found, prediction, tolerance: float = 1e-12) -> None:
    energy, energies, forces, virial, _ = found
    for actual, expected in (
        (torch.tensor([energy], dtype=torch.float64), prediction.energy),
        (torch.from_numpy(energies), prediction.atomic_energies),
        (torch.from_numpy(forces), prediction.forces),
        (torch.from_numpy(virial), prediction.virial[0]),
    ):
        assert_close(actual, expected, tolerance)


PAIRS = pair_names(("H", "C", "O"))
WINDOWS = PairBridging(outer=dict.fromkeys(PAIRS, 1.6), frozen=0.7, full=dict.fromkeys(PAIRS, 0.8))
BRIDGED = {"bridging": Bridging(r_inner=0.9, r_outer=1.5)}
MODELS = {
    "default": {},
    "bridging": BRIDGED,
    "windows per pair": {"bridging": WINDOWS},
    "elements as seed": {"use_env_seed": False},
    "elements as seed, bridging": {"use_env_seed": False, **BRIDGED},
    "falling degrees": {"l_schedule": (2, 1, 0), "n_blocks": 3},
    "excluded pairs": {"excluded_pairs": (("H", "C"),)},
    "no attention": {"n_atten_head": 0},
    "generation 2": {"message_node_so3": True, "n_focus": 2},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_two_ranks_are_the_whole(options):
    atoms, potential = cell(), random_potential(cutoff=CUTOFF, **options)
    found = run(atoms, halves(atoms, 2), 2, potential)
    assert all(data.nlocal and data.ntotal > data.nlocal for data in found[-1].data)
    prediction = expected(atoms, potential)
    assert prediction.forces.abs().max() > 1e-3
    assert_equal(found, prediction)


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_ranks(count):
    """With one rank, all ghosts are images of own atoms."""
    atoms, potential = cell(1), random_potential(cutoff=CUTOFF, n_blocks=3, **BRIDGED)
    found = run(atoms, halves(atoms, count), count, potential)
    assert_equal(found, expected(atoms, potential))
    # one exchange per layer and one for the gates, forward and backward; no exchange is repeated
    assert found[-1].exchanges == 2 * (3 + 1)


def test_gates_of_ghosts_depend_on_atoms_out_of_reach():
    """The neighbour that closes a ghost's gate is farther than the cutoff from all atoms of the rank."""
    atoms = Atoms("HCO", positions=[[0, 0, 0], [2.0, 0, 0], [3.1, 0, 0]])
    potential = random_potential(cutoff=CUTOFF, **BRIDGED)
    found = run(atoms, np.array([0, 1, 1]), 2, potential, skin=0.05)
    assert found[-1].data[0].ghosts.tolist() == [1]
    prediction = expected(atoms, potential)
    assert_equal(found, prediction)
    atoms.positions[2, 0] += 1.0
    moved = expected(atoms, potential)
    assert abs(moved.atomic_energies[0] - prediction.atomic_energies[0]) > 1e-5


@pytest.mark.parametrize("options", [{}, {"use_env_seed": False}, BRIDGED], ids=str)
def test_ranks_without_atoms_or_pairs(options):
    """One rank has a single atom, one has none; both take part in every exchange."""
    atoms = molecule(0, 7)
    atoms += Atoms("C", positions=[[30, 0, 0]])
    owner = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    potential = random_potential(cutoff=CUTOFF, **options)
    found = run(atoms, owner, 4, potential)
    assert [data.npairs > 0 for data in found[-1].data] == [True, True, False, False]
    assert found[-1].data[3].ntotal == 0
    assert_equal(found, expected(atoms, potential))


def test_charge_and_spin():
    atoms, potential = cell(), random_potential(cutoff=CUTOFF, charge_spin=True)
    found = run(atoms, halves(atoms, 2), 2, potential, info={"charge": 1, "spin": 2})
    prediction = expected(atoms, potential, (1, 2))
    assert_equal(found, prediction)
    assert abs(prediction.energy - expected(atoms, potential).energy) > 1e-3
    with pytest.raises(ValueError, match="conditioned on charge and spin without a default"):
        DPA4MLIAP(potential)
    with pytest.raises(ValueError, match="charge must be in .* got charge .*300"):
        DPA4MLIAP(potential, info={"charge": 300, "spin": 1})


def test_single_precision():
    """Rows are exchanged in single precision; energies are summed in double."""
    atoms, potential = cell(), random_potential(cutoff=CUTOFF)
    found = run(atoms, halves(atoms, 2), 2, potential, dtype="float32")
    prediction = expected(atoms, potential)
    assert_equal(found, prediction, 1e-5)
    assert np.abs(found[2] - prediction.forces.numpy()).max() > 1e-12


def compute_under(context):
    """Method `compute_forces` that is called under a setting of PyTorch."""
    compute = DPA4MLIAP.compute_forces

    def wrapped(self, data):
        with context():
            compute(self, data)

    return wrapped


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_pytorch_do_not_change_results(setting, monkeypatch):
    atoms, potential = cell(), random_potential(cutoff=CUTOFF, channels=16, n_blocks=1).float()
    before = run(atoms, halves(atoms, 1), 1, potential, dtype="float32")
    monkeypatch.setattr(DPA4MLIAP, "compute_forces", compute_under(SETTINGS[setting]))
    found = run(atoms, halves(atoms, 1), 1, potential, dtype="float32")
    assert all(np.array_equal(one, other) for one, other in zip(before[:4], found[:4], strict=True))


@pytest.mark.slow
def test_compiled_code_for_one_of_several_ranks(compilations):
    atoms, potential = cell(), random_potential(cutoff=CUTOFF, n_blocks=1, lmax=1, **BRIDGED)
    ranks = Ranks(1)  # tracing does not support several threads at once
    model = DPA4MLIAP(potential, dtype="float64", compile=True)
    prediction = expected(atoms, potential)
    for step in range(2):
        data = Data(ranks, 0, atoms, halves(atoms, 1), model.element_types, 0.5)
        ranks.data = [data]
        model.compute_forces(data)
        if step == 0:
            count = len(compilations)
    assert len(compilations) == count > 0
    forces = np.zeros((len(atoms), 3))
    np.add.at(forces, data.nodes, data.forces)
    assert_close(torch.from_numpy(data.eatoms), prediction.atomic_energies)
    assert_close(torch.from_numpy(forces), prediction.forces)


def test_wrong_code_is_not_used(compile_as):
    compile_as(lambda graph: lambda *flat: [1.1 * r for r in graph(*flat)])
    atoms, potential = cell(), random_potential(cutoff=CUTOFF, n_blocks=1, lmax=1, **BRIDGED)
    with pytest.warns(
        RuntimeWarning, match="continue in eager mode.*relative deviations from eager mode in evaluation"
    ):
        found = run(atoms, halves(atoms, 1), 1, potential, compile=True)
    assert_equal(found, expected(atoms, potential))


def test_the_interface_is_that_of_lammps():
    base = pytest.importorskip("lammps.mliap.mliap_unified_abc").MLIAPUnified
    potential = random_potential(cutoff=CUTOFF)
    model = DPA4MLIAP(potential)
    assert base.__abstractmethods__ <= set(dir(model))

    class Empty(base):
        compute_forces = compute_descriptors = compute_gradients = None

    assert set(vars(Empty())) <= set(vars(model))
    assert 2 * model.rcutfac == CUTOFF and model.element_types == ["H", "C", "O"]
    assert model.compute_descriptors(None) is None and model.compute_gradients(None) is None


def test_a_coupling_without_exchange_is_refused():
    class Plain:
        """Stub for the data object of LAMMPS without Kokkos."""

        ntotal = 3

    with pytest.raises(RuntimeError, match="this LAMMPS cannot exchange features of ghost atoms"):
        DPA4MLIAP(random_potential()).compute_forces(Plain())
