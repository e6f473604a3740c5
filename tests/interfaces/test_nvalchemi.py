"""ALCHEMI Toolkit: the wrapper gives the calculator's results for batches, and dynamics conserve energy."""

import sys

import numpy as np
import pytest
import torch

from dpa4.simulation import DPA4Calculator
from helpers import crystal, molecule, random_potential


def small_potential(**options):
    return random_potential(**({"n_blocks": 1, "lmax": 1} | options))


def test_the_package_is_named_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvalchemi", None)
    monkeypatch.delitem(sys.modules, "dpa4.interfaces.nvalchemi", raising=False)
    with pytest.raises(ImportError, match=r"nvalchemi is not installed; pip install .*\[nvalchemi\]'"):
        import dpa4.interfaces.nvalchemi  # noqa: F401


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def toolkit(self):
        pytest.importorskip("nvalchemi")
        from nvalchemi.data import AtomicData, Batch

        from dpa4.interfaces.nvalchemi import DPA4Wrapper

        self.data = lambda atoms: AtomicData.from_atoms(atoms, dtype=torch.float64)
        self.batch = lambda structures: Batch.from_data_list([self.data(atoms) for atoms in structures])
        self.wrapper = lambda potential, **options: DPA4Wrapper(
            potential, device="cpu", dtype="float64", **options
        )

    @pytest.mark.parametrize("kind", [molecule, crystal])
    def test_a_batch_is_the_calculator_for_each_structure(self, kind):
        potential = small_potential()
        structures = [kind(seed) for seed in range(3)] + [kind(7)[:4]]
        results = self.wrapper(potential)(self.batch(structures))
        forces = results["forces"].split([len(atoms) for atoms in structures])
        for index, atoms in enumerate(structures):
            atoms.calc = DPA4Calculator(potential, device="cpu", dtype="float64")
            # float64, sums in another order
            assert results["energy"][index].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
            np.testing.assert_allclose(forces[index], atoms.get_forces(), atol=1e-12)
            if kind is crystal:
                stress = results["stress"][index]
                np.testing.assert_allclose(stress, atoms.get_stress(voigt=False), atol=1e-14)
        assert kind is crystal or results["stress"].isnan().all()
        assert not any(values.requires_grad for values in results.values())

    def test_molecules_with_a_cell_mix_with_crystals(self):
        """Without a cell, the toolkit would leave out the cells of the crystals, too."""
        from nvalchemi.data import Batch

        potential, alone = small_potential(), molecule()
        data = [self.data(alone), self.data(crystal())]
        data[0].cell, data[0].pbc = torch.zeros(1, 3, 3).double(), torch.zeros(1, 3, dtype=torch.bool)
        results = self.wrapper(potential)(Batch.from_data_list(data))
        for index, atoms in enumerate((alone, crystal())):
            atoms.calc = DPA4Calculator(potential, device="cpu", dtype="float64")
            assert results["energy"][index].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        assert results["stress"][0].isnan().all() and results["stress"][1].isfinite().all()

    def test_only_active_outputs_are_returned(self):
        wrapper = self.wrapper(small_potential())
        wrapper.set_config("active_outputs", {"energy"})
        assert list(wrapper(self.data(molecule()))) == ["energy"]

    def test_charge_and_spin(self):
        potential = small_potential(charge_spin=True, default_charge_spin=(0, 1))
        atoms, wrapper = molecule(), self.wrapper(potential)
        for charge, spin in ((0, 1), (1, 2)):
            data = self.data(atoms)
            data.charge, data.spin = (torch.tensor([[float(value)]]) for value in (charge, spin))
            atoms.info = {"charge": charge, "spin": spin}
            atoms.calc = DPA4Calculator(potential, device="cpu", dtype="float64")
            energy = wrapper(data)["energy"].item()
            assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-12)

    def test_embeddings(self):
        potential = small_potential()
        wrapper, data = self.wrapper(potential), self.data(molecule())
        batch = self.batch([molecule(), molecule(1)])
        wrapper.compute_embeddings(data)
        wrapper.compute_embeddings(batch)
        (width,) = wrapper.embedding_shapes["node_embeddings"]
        assert data.node_embeddings.shape == (len(molecule()), width)
        torch.testing.assert_close(batch.node_embeddings[: len(molecule())], data.node_embeddings)

    def test_dynamics_conserve_energy(self):
        from nvalchemi.dynamics import NVE

        wrapper, batch = self.wrapper(small_potential()), self.batch([molecule(), molecule(1)])
        results = wrapper(batch)
        batch.add_key("forces", list(results["forces"].split(batch.num_nodes_list)), overwrite=True)
        batch.add_key("energy", list(results["energy"].split(1)), level="system", overwrite=True)
        start = results["energy"].clone()
        NVE(wrapper, dt=0.2).run(batch, n_steps=20)
        speed = batch.velocities.square().sum(dim=1) * batch.atomic_masses
        kinetic = 0.5 * torch.zeros(2).double().index_add(0, batch.batch_idx.long(), speed)
        final = wrapper(batch)["energy"]
        assert (final < start - 1e-6).all()  # it moved
        # velocities of the toolkit are in units in which m v^2 is an energy in eV
        torch.testing.assert_close(final.reshape(-1) + kinetic, start.reshape(-1), atol=2e-4, rtol=0)
