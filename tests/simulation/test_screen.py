"""Screening: minima of ASE, every structure listed once despite failures, kills and interruptions."""

import csv
import importlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import read, write
from typer.testing import CliRunner

from dpa4.cli import app
from dpa4.graph import build_graph
from dpa4.potential import save_potential
from dpa4.simulation import DPA4Calculator, relax
from helpers import crystal, molecule, random_potential

ts = pytest.importorskip("torch_sim")
from dpa4.interfaces.torchsim import DPA4Model  # noqa: E402
from dpa4.simulation.runs.shards import Shard, join_shards  # noqa: E402
from dpa4.simulation.screen import COLUMNS, screen  # noqa: E402

POTENTIAL = random_potential(n_blocks=1, lmax=1)


class Watched(DPA4Model):
    """Model that counts calls and the systems of each; a test may disturb its results."""

    def __init__(self, disturb=lambda state, results: results, **options):
        super().__init__(POTENTIAL, device="cpu", dtype="float64", **options)
        self.disturb, self.sizes = disturb, []

    def forward(self, state, **kwargs):
        self.sizes.append(state.n_systems)
        return self.disturb(state, super().forward(state))


def run(sources, model, folder, **options):
    options = {"fmax": 0.01, "steps": 500, "progress": False} | options
    return screen([sources] if not isinstance(sources, list) else sources, model, folder, **options)


def rows(folder):
    with (folder / "screen.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def clusters(folder, count, name="start.xyz"):
    """Molecules of four to six atoms, named in their info."""
    frames = [molecule(seed, 4 + seed % 3) for seed in range(count)]
    for seed, atoms in enumerate(frames):
        atoms.info |= {"name": f"cluster {seed}", "REF_energy": -1.0}
    write(folder / name, frames)
    return folder / name


def check(folder, count, statuses=("converged",)):
    """Check that every structure is listed once, and that frames agree with the table."""
    table = rows(folder)
    assert [int(row["structure"]) for row in table] == list(range(count))
    assert {row["status"] for row in table} <= set(statuses)
    frames = read(folder / "relaxed.xyz", ":")
    shown = [row for row in table if row["frame"] == "True"]
    assert [atoms.info["screen_structure"] for atoms in frames] == [int(row["structure"]) for row in shown]
    for atoms, row in zip(frames, shown, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(float(row["energy"]))
        assert atoms.get_chemical_formula() == row["formula"]
    return table, frames


class Copper(DPA4Model):
    """Model with energies of ASE's EMT, whose minima are steep and known."""

    def __init__(self):
        super().__init__(
            random_potential(elements=("H", "C", "Cu"), n_blocks=1, lmax=1), device="cpu", dtype="float64"
        )
        self.sizes = []

    def forward(self, state, **kwargs):
        self.sizes.append(state.n_systems)
        parts = state.positions.split(state.n_atoms_per_system.tolist())
        results = []
        for positions, cell in zip(parts, state.row_vector_cell, strict=True):
            atoms = Atoms(
                ["Cu"] * len(positions), positions.numpy(), cell=cell.numpy(), pbc=True, calculator=EMT()
            )
            results.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)))
        energy, forces, stress = zip(*results, strict=True)
        return {
            "energy": torch.tensor(energy, dtype=torch.float64),
            "forces": torch.from_numpy(np.concatenate(forces)),
            "stress": torch.from_numpy(np.stack(stress)),
        }


@pytest.mark.parametrize(
    "cell", ["fixed", "full", *(pytest.param(c, marks=pytest.mark.slow) for c in ("volume", "shape"))]
)
def test_crystals_reach_the_minima_of_ase_while_batches_change_in_flight(tmp_path, cell):
    starts = []
    for seed in range(3):
        atoms = bulk("Cu", a=3.5, cubic=True)
        atoms.rattle(0.03 * (1 + seed), seed=seed)
        atoms.set_cell(atoms.cell.array @ np.diag([1.0, 1.03, 0.98]), scale_atoms=True)
        if seed % 2:  # left-handed: its volume is negative for TorchSim
            atoms.set_cell(-atoms.cell.array)
        starts.append(atoms)
    write(tmp_path / "start.xyz", starts)
    model = Copper()
    result = run(
        tmp_path / "start.xyz", model, tmp_path / "out", fmax=1e-3, steps=300, cell=cell, max_edges=180
    )
    assert result.counts == {"converged": 3}
    assert (result.total, result.finished, result.joined) == (3, True, True)
    assert max(model.sizes) == 2  # the third waited for one of them to end
    for row, relaxed, start in zip(*check(tmp_path / "out", 3), starts, strict=True):
        expected = relax(start, EMT(), fmax=1e-3, cell=cell)
        # fmax^2 / curvature of a few eV/Angstrom^2, for each of 21 coordinates
        assert float(row["energy"]) == pytest.approx(expected.energy, abs=2e-5)
        assert float(row["volume"]) == pytest.approx(expected.volume, rel=1e-3)
        np.testing.assert_allclose(relaxed.cell.array, start.cell.array, atol=5e-3)
        assert 0 < int(row["steps"]) < 300 and float(row["initial_energy"]) > float(row["energy"])
        largest = np.linalg.norm(relaxed.get_forces(), axis=1).max()  # eight decimals
        assert largest == pytest.approx(float(row["max_force"]), abs=1e-7) and largest < 1e-3
        relaxed.calc = EMT()
        assert relaxed.get_potential_energy() == pytest.approx(float(row["energy"]), abs=1e-6)


def test_molecules_reach_the_minima_of_ase(tmp_path):
    source = clusters(tmp_path, 2)
    calculator = DPA4Calculator(POTENTIAL, device="cpu", dtype="float64")
    assert run(source, Watched(), tmp_path / "out", fmax=2e-3).counts == {"converged": 2}
    for row, frame, start in zip(*check(tmp_path / "out", 2), read(source, ":"), strict=True):
        expected = relax(start, calculator, fmax=2e-3, steps=1000)
        assert float(row["energy"]) == pytest.approx(
            expected.energy, abs=2e-3
        )  # both within fmax of the minimum
        frame.calc = calculator
        # positions have eight decimals
        assert frame.get_potential_energy() == pytest.approx(float(row["energy"]), abs=1e-7)


def test_pressure_is_that_of_ase(tmp_path):
    atoms = bulk("Cu", a=3.6)
    write(tmp_path / "start.xyz", atoms)
    run(tmp_path / "start.xyz", Copper(), tmp_path / "out", cell="full", pressure=10.0, fmax=1e-3)
    expected = relax(atoms, EMT(), cell="full", pressure=10.0, fmax=1e-3)
    assert float(check(tmp_path / "out", 1)[0][0]["volume"]) == pytest.approx(expected.volume, rel=1e-3)
    assert expected.volume < 0.97 * 3.6**3 / 4  # 10 GPa, and a bulk modulus of 140 GPa


def test_every_structure_is_listed_with_what_happened_to_it(tmp_path):
    good, bad = clusters(tmp_path, 3), molecule(9, 4)
    bad.positions[1] = bad.positions[0]
    fixed = molecule(8, 4)
    fixed.set_constraint(FixAtoms([0]))
    write(tmp_path / "bad.xyz", [bad, Atoms("XeH", [(0, 0, 0), (0, 0, 1)])])
    with connect(tmp_path / "some.db") as database:
        database.write(fixed)
        labelled = molecule(7, 4)
        labelled.calc = SinglePointCalculator(labelled, energy=-3.0)
        database.write(labelled, key_value_pairs={"project": "x"}, data={"energy": 1.0, "list": [1, 2]})
    (tmp_path / "broken.cif").write_text("nothing")
    write(tmp_path / "one.cif", crystal())
    sources = [good, *(tmp_path / name for name in ("bad.xyz", "some.db", "broken.cif", "one.cif"))]
    result = run(sources, Watched(), tmp_path / "out", steps=3, fmax=1e-4)
    assert result.counts == {"unconverged": 5, "refused": 4} and result.total == 9
    table, frames = check(tmp_path / "out", 9, ("unconverged", "refused"))
    reasons = {int(row["structure"]): row["reason"] for row in table if row["status"] == "refused"}
    assert "atoms 0 and 1 coincide" in reasons[3]
    assert "element Xe (54) is not in the model" in reasons[4]
    assert "constraints are not supported in batches; use dpa4 relax" in reasons[5]
    assert "broken.cif, frame 0 cannot be read by ASE" in reasons[7]
    assert "after 3 steps" in table[0]["reason"] and table[0]["steps"] == "3"
    assert table[6]["source"].endswith("some.db, row 2")
    assert frames[0].info["name"] == "cluster 0" and frames[3].info["project"] == "x"
    assert "REF_energy" not in frames[0].info  # it belonged to the start


def test_cells_of_molecules_are_refused_one_by_one(tmp_path):
    write(tmp_path / "start.xyz", [crystal(), molecule()])
    result = run(tmp_path / "start.xyz", Watched(), tmp_path / "out", cell="full", steps=1)
    assert result.counts == {"unconverged": 1, "refused": 1}
    assert "cell = full needs a cell periodic along all three axes" in rows(tmp_path / "out")[1]["reason"]


def test_a_structure_that_makes_the_model_raise_fails_alone(tmp_path):
    """One structure fails at once, one after some steps; the results of the others do not depend on it."""
    source, calls = clusters(tmp_path, 9), []
    frames = read(source, ":")
    frames[4].numbers[:], frames[5].numbers[:] = 8, 6
    write(source, frames)

    def raising(state, results):
        calls.append(state.n_systems)
        for numbers in state.atomic_numbers.split(state.n_atoms_per_system.tolist()):
            if (numbers == 8).all():
                raise KeyError("not\nnice")
            if (numbers == 6).all() and len(calls) > 20:
                raise ArithmeticError("too bad")
        return results

    result = run(source, Watched(raising), tmp_path / "out")
    assert result.counts == {"converged": 7, "failed": 2}
    table, _ = check(tmp_path / "out", 9, ("converged", "failed"))
    assert table[4]["reason"] == r"KeyError: 'not\nnice'" and table[4]["steps"] == "0"
    assert table[5]["reason"] == "ArithmeticError: too bad" and int(table[5]["steps"]) > 0
    run(source, Watched(), tmp_path / "quiet")
    for row, other in zip(table, rows(tmp_path / "quiet"), strict=True):
        if row["status"] == "converged":  # both within fmax of the minimum
            assert float(row["energy"]) == pytest.approx(float(other["energy"]), abs=2e-3)


def test_what_does_not_fit_into_memory_is_tried_in_halves(tmp_path):
    def small_memory(state, results):
        if state.n_systems > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return results

    with pytest.warns(
        RuntimeWarning, match="atoms did not fit into memory and is tried in halves; lower max_edges"
    ):
        result = run(clusters(tmp_path, 5), Watched(small_memory), tmp_path / "out", steps=10, fmax=0.05)
    assert set(result.counts) <= {"converged", "unconverged"} and sum(result.counts.values()) == 5


def test_a_broken_gpu_ends_the_run_instead_of_failing_every_structure(tmp_path):
    def broken(state, results):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    source = clusters(tmp_path, 3)
    with pytest.raises(torch.AcceleratorError):
        run(source, Watched(broken), tmp_path / "out")
    assert run(source, Watched(), tmp_path / "out", resume=True).counts == {"converged": 3}


def test_explosions(tmp_path):
    def pushing(state, results):
        """Push diatomics apart, remove the energy of triatomics, expand cells."""
        sizes = state.n_atoms_per_system.tolist()
        for index, (r, forces) in enumerate(
            zip(state.positions.split(sizes), results["forces"].split(sizes), strict=True)
        ):
            if sizes[index] == 2:
                away = torch.nn.functional.normalize(r[1] - r[0], dim=0)
                forces[0], forces[1] = -away, away
            elif sizes[index] == 3:
                results["energy"][index] = torch.nan
        if "stress" in results:
            results["stress"][:] = -torch.eye(3, dtype=torch.float64)
        return results

    write(tmp_path / "a.xyz", [molecule(1, 2), molecule(1, 3), molecule(1, 4)])
    run(tmp_path / "a.xyz", Watched(pushing), tmp_path / "a", steps=60)
    table, frames = check(tmp_path / "a", 3, ("converged", "exploded"))
    assert table[0]["reason"] == "it broke into 2 fragments, from 1, that no longer interact"
    assert table[1]["reason"].startswith("energy nan eV and largest force")
    assert table[2]["status"] == "converged" and len(frames) == 1
    write(tmp_path / "b.xyz", crystal())
    run(tmp_path / "b.xyz", Watched(pushing), tmp_path / "b", steps=200, cell="volume")
    assert "its volume changed by a factor of 4" in rows(tmp_path / "b")[0]["reason"]


def test_fragments_are_counted_in_the_graph_of_the_last_step(tmp_path, monkeypatch):
    """The search that counts them anew, for batches evaluated in halves, finds the same."""

    def pushing(state, results):
        results["forces"][0] += 1.0  # the first atom of the batch
        return results

    def search(*args, **options):
        searches.append(args)
        return build_graph(*args, **options)

    write(tmp_path / "start.xyz", [molecule(1, 4), molecule(3, 3)])
    searches: list[object] = []
    monkeypatch.setattr("dpa4.simulation.flight.build_graph", search)
    run(tmp_path / "start.xyz", Watched(pushing), tmp_path / "known", steps=100)
    assert not searches
    monkeypatch.setattr(Watched, "last_graph", property(lambda _: None, lambda *_: None), raising=False)
    run(tmp_path / "start.xyz", Watched(pushing), tmp_path / "searched", steps=100)
    assert len(searches) == 2
    known, searched = rows(tmp_path / "known"), rows(tmp_path / "searched")
    assert (
        known == searched
        and known[0]["reason"] == "it broke into 2 fragments, from 1, that no longer interact"
    )


def test_without_torchsim_the_module_can_be_imported_and_the_error_says_what_to_install(
    tmp_path, monkeypatch
):
    for name in ("dpa4.simulation.screen", "dpa4.simulation.flight", "dpa4.interfaces.torchsim"):
        package, _, last = name.rpartition(".")
        monkeypatch.setattr(sys.modules[package], last, importlib.import_module(name))  # put back afterwards
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    module = importlib.import_module("dpa4.simulation.screen")
    with pytest.raises(ImportError, match=r"torch_sim is not installed; pip install .*\[torchsim\]'"):
        module.screen([clusters(tmp_path, 1)], Watched(), tmp_path / "out")


def test_large_structures_are_relaxed_by_themselves(tmp_path):
    model = Watched()
    result = run(clusters(tmp_path, 4), model, tmp_path / "out", max_edges=1)
    assert result.counts == {"converged": 4} and set(model.sizes) == {1}


def test_charges_and_periodicities_are_those_of_each_structure(tmp_path):
    potential = random_potential(n_blocks=1, lmax=1, charge_spin=True)
    frames = [molecule(1, 5) for _ in range(3)] + [crystal(), crystal()]
    pairs = [(0, 1), (1, 2), (0, 1), (-1, 2), (0, 1)]
    for atoms, (charge, spin) in zip(frames, pairs, strict=True):
        atoms.info |= {"charge": charge, "spin": spin}
    frames[4].pbc = [True, False, True]
    frames.append(molecule(1, 5))
    write(tmp_path / "start.xyz", frames)
    model = DPA4Model(potential, device="cpu", dtype="float64")
    result = run(tmp_path / "start.xyz", model, tmp_path / "out", steps=0, fmax=1e-9)
    assert result.counts == {"unconverged": 5, "refused": 1}
    table, _ = check(tmp_path / "out", 6, ("unconverged", "refused"))
    assert "conditioned on charge and spin without a default" in table[5]["reason"]
    calculator = DPA4Calculator(potential, device="cpu", dtype="float64")
    for atoms, row in zip(frames[:5], table[:5], strict=True):
        atoms.calc = calculator
        # positions have eight decimals
        assert float(row["energy"]) == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
    energies = [float(row["energy"]) for row in table[:3]]
    assert energies[0] == pytest.approx(energies[2], abs=1e-12) and abs(energies[0] - energies[1]) > 1e-5


@pytest.mark.parametrize("cell", ["fixed", "full"])
def test_isolated_atoms_are_relaxed_and_no_atoms_refused(tmp_path, cell):
    box = {"cell": [20] * 3, "pbc": True} if cell == "full" else {}
    with connect(tmp_path / "start.db") as database:
        for atoms in (Atoms("C", **box), Atoms(**box), Atoms("HO", [(0, 0, 0), (9, 0, 0)], **box)):
            database.write(atoms)
    result = run(tmp_path / "start.db", Watched(), tmp_path / "out", cell=cell)
    assert result.counts == {"converged": 2, "refused": 1}
    table, frames = check(tmp_path / "out", 3, ("converged", "refused"))
    assert table[1]["reason"] == "it has no atoms"
    for row, atoms in zip((table[0], table[2]), frames, strict=True):
        assert (row["steps"], float(row["max_force"])) == ("0", 0.0)
        atoms.calc = DPA4Calculator(POTENTIAL, device="cpu", dtype="float64")
        assert float(row["energy"]) == pytest.approx(atoms.get_potential_energy(), abs=1e-12)


def test_shards_are_joined_by_the_last_one(tmp_path):
    source = clusters(tmp_path, 7)
    for rank in (2, 0, 1):
        result = run(source, Watched(), tmp_path / "out", rank=rank, world_size=3)
        assert (result.finished, result.joined) == (True, rank == 1)
        assert sum(result.counts.values()) == (3 if rank == 0 else 2)
        assert (tmp_path / "out" / "screen.csv").exists() == (rank == 1)
    run(source, Watched(), tmp_path / "single")
    table, _ = check(tmp_path / "out", 7)
    for row, other in zip(table, check(tmp_path / "single", 7)[0], strict=True):
        assert row["source"] == other["source"]
        assert float(row["energy"]) == pytest.approx(float(other["energy"]), abs=2e-3)  # another batch
    with pytest.raises(ValueError, match="world_size = 2, but .* holds results with world_size = 3; choose"):
        run(source, Watched(), tmp_path / "out", rank=0, world_size=2, resume=True)


def test_more_processes_than_structures(tmp_path):
    source = clusters(tmp_path, 1)
    assert run(source, Watched(), tmp_path / "out", rank=1, world_size=2).counts == {}
    assert run(source, Watched(), tmp_path / "out", rank=0, world_size=2).joined
    check(tmp_path / "out", 1)


def test_interruption_and_resume(tmp_path):
    source, handler = clusters(tmp_path, 6), signal.getsignal(signal.SIGINT)

    def interrupting(state, results):
        if not sent and len(table.read_bytes().splitlines()) >= 3:
            sent.append(signal.raise_signal(signal.SIGINT))
        return results

    sent: list[None] = []
    model, table = Watched(interrupting), tmp_path / "out" / "shards" / "0-of-1.csv"
    result = run(source, model, tmp_path / "out", max_edges=50)
    assert (result.finished, result.joined) == (False, False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert 2 <= result.counts["converged"] < 6 and not (tmp_path / "out" / "screen.csv").exists()
    with pytest.raises(FileExistsError, match="already holds a run .*; continue it with --resume"):
        run(source, Watched(), tmp_path / "out")
    model = Watched()
    assert run(source, model, tmp_path / "out", max_edges=50, resume=True).counts == {"converged": 6}
    check(tmp_path / "out", 6)
    calls = len(model.sizes)
    assert run(source, model, tmp_path / "out", resume=True).joined and len(model.sizes) == calls


def test_resume_refuses_other_settings_files_and_weights(tmp_path):
    source = clusters(tmp_path, 1)
    run(source, Watched(), tmp_path / "out")
    with pytest.raises(ValueError, match="fmax = 0.3, but .* holds results with fmax = 0.01; choose"):
        run(source, Watched(), tmp_path / "out", fmax=0.3, resume=True)
    other = DPA4Model(random_potential(1, n_blocks=1, lmax=1), device="cpu", dtype="float64")
    with pytest.raises(ValueError, match=r"model = '\w+', but .* holds results with model = '\w+'; choose"):
        run(source, other, tmp_path / "out", resume=True)
    clusters(tmp_path, 2)
    with pytest.raises(ValueError, match="files = .*, but .* holds results with files = "):
        run(source, Watched(), tmp_path / "out", resume=True)
    marker = tmp_path / "out" / "shards" / "0-of-1.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 9}))
    with pytest.raises(ValueError, match="has format 9; this version reads format 1"):
        run(source, Watched(), tmp_path / "out", resume=True)


def test_arguments(tmp_path):
    source = clusters(tmp_path, 1)
    for options, message in (
        ({"fmax": 0}, "fmax must be a positive force in eV/Angstrom, got 0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"cell": "xy"}, "cell must be one of fixed, full, volume, shape, got 'xy'"),
        ({"pressure": 1.0}, "pressure = 1.0 GPa has no effect with cell = fixed"),
        ({"max_edges": 0}, "max_edges must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run(source, Watched(), tmp_path / "out", **options)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        run(tmp_path / "absent.xyz", Watched(), tmp_path / "out")
    with connect(tmp_path / "empty.db") as database:
        database.delete([database.write(Atoms("H"))])
    with pytest.raises(ValueError, match="there is no structure in"):
        run(tmp_path / "empty.db", Watched(), tmp_path / "none")


def record(shard: Shard, number: int) -> None:
    atoms = molecule(number, 3)
    atoms.calc = SinglePointCalculator(atoms, energy=float(number), forces=np.zeros((3, 3)))
    values = {"structure": number, "source": "a, b", "formula": atoms.get_chemical_formula()}
    if number % 3:
        shard.record(values | {"status": "converged", "energy": float(number)}, atoms)
    else:
        shard.record(values | {"status": "refused", "reason": 'says "no", twice'})


def test_files_cut_anywhere_lose_only_what_was_being_written(tmp_path):
    """A kill leaves files that end anywhere, the structures at least as far as the table."""
    shard = Shard(tmp_path / "whole", COLUMNS, {})
    ends = [(0, 0)]
    for number in range(5):
        record(shard, number)
        ends.append((shard.frames.stat().st_size, shard.table.stat().st_size))
    shard.close()
    table, frames = shard.table.read_bytes(), shard.frames.read_bytes()
    folder = tmp_path / "cut"
    moments = [(f, ends[k][1]) for k in range(5) for f in range(ends[k][0], ends[k + 1][0] + 1, 7)]
    moments += [(ends[k + 1][0], t) for k in range(5) for t in range(ends[k][1], ends[k + 1][1] + 1, 7)]
    for frame_bytes, table_bytes in moments:
        whole = sum(end[1] <= table_bytes for end in ends[1:])
        shard = Shard(folder, COLUMNS, {}, resume=True)
        shard.close()
        shard.frames.write_bytes(frames[:frame_bytes])
        shard.table.write_bytes(table[:table_bytes])
        shard = Shard(folder, COLUMNS, {}, resume=True)
        assert shard.done == set(range(whole))
        for number in range(whole, 5):
            record(shard, number)
        shard.finish(5)
        shard.close()
        assert shard.table.read_bytes() == table and shard.frames.read_bytes() == frames
        assert join_shards(folder, 1)
    check(folder, 5, ("converged", "refused"))
    for size in range(0, len(frames), 50):  # a crash of the machine may also leave the table ahead
        shard.frames.write_bytes(frames[:size])
        again = Shard(folder, COLUMNS, {}, resume=True)
        assert again.done == {0, 3} | {n for n in (1, 2, 4) if ends[n + 1][0] <= size}
        again.close()
        shard.table.write_bytes(table)


def test_shards_that_do_not_add_up_and_a_shard_in_use(tmp_path):
    shards = [Shard(tmp_path, COLUMNS, {}, rank, 2) for rank in range(2)]
    with pytest.raises(BlockingIOError, match="another process is working on .*/shards/1-of-2"):
        Shard(tmp_path, COLUMNS, {}, 1, 2, resume=True)
    record(shards[0], 0)
    for shard in shards:
        shard.finish(2)
        shard.close()
    with pytest.raises(ValueError, match="do not add up: 1 rows for 1 of 2 structures"):
        join_shards(tmp_path, 2)


@pytest.mark.parametrize(
    "wait", [2, pytest.param(9, marks=pytest.mark.slow), pytest.param(15, marks=pytest.mark.slow)]
)
def test_kill_and_resume_on_the_command_line(tmp_path, wait):
    """The process is killed after some structures; the next one continues, and lists each structure once."""
    save_potential(POTENTIAL, tmp_path / "model.safetensors")
    count = wait + 8
    source = clusters(tmp_path, count)
    arguments = ["screen", tmp_path / "model.safetensors", source, "-o", tmp_path / "out", "--fmax", "0.01"]
    arguments += ["--device", "cpu", "--dtype", "float64", "--max-edges", "60"]
    command = [sys.executable, "-m", "dpa4", *map(str, arguments)]
    table = tmp_path / "out" / "shards" / "0-of-1.csv"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while not table.exists() or table.read_bytes().count(b"\n") < 1 + wait:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "out" / "screen.csv").exists()
    done = table.read_bytes()
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1 and "resume it, overwrite it" in result.output
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--resume"]])
    assert result.exit_code == 0, result.output
    assert f"{count} converged" in result.output
    assert f"screen.csv and relaxed.xyz of {count} structures are in" in result.output.replace("\n", " ")
    check(tmp_path / "out", count)
    assert table.read_bytes().startswith(done[: done.rfind(b"\n") + 1])  # no structure was computed twice
