"""Relaxation of many structures at once by TorchSim, in batches whose finished members are replaced in flight."""

import re
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from rich.progress import Progress
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dpa4.data import read_atoms
from dpa4.data.labels import ENERGY, STRESS
from dpa4.graph import build_graph
from dpa4.interfaces.ase import charge_spin_of
from dpa4.interfaces.torchsim import DPA4Model
from dpa4.potential import identify
from dpa4.simulation.relax import CELLS, check_periodicity, check_relaxation
from dpa4.simulation.runs.progress import progress_bar
from dpa4.simulation.runs.shards import Shard, join
from dpa4.system import require, stop_requests

ts = require("torch_sim", "torchsim")

ScreenedCell = Literal["fixed", "full", "volume", "shape"]
"""TorchSim's filter has the options of ASE's, but no mask."""

COLUMNS = (
    "structure", "source", "material_id", "formula", "atoms", "status", "reason", "steps", "initial_energy", "energy",
    "max_force", "volume",
)  # fmt: skip
STEPS_BETWEEN_CHECKS = 5
EXPLODED = 4.0  # a volume that changes by more than this factor
# Entries of info that are not those of a relaxed structure, or mean something else in an extended XYZ file.
DROPPED = {
    "Lattice",
    "Properties",
    "pbc",
    *all_properties,
    *(n.partition(".")[2] for n in (*ENERGY, *STRESS)),
}


@dataclass(frozen=True)
class Screening:
    """Outcome of a screening, calls before this one included."""

    counts: dict[str, int]  # structures of this shard by status
    total: int  # structures of all shards; 0 after an interruption
    finished: bool  # this shard
    joined: bool  # whether all shards have finished, so that screen.csv and relaxed.xyz are there


@dataclass(frozen=True)
class _Options:
    """Arguments of ``screen`` about the relaxations."""

    fmax: float
    steps: int
    cell: str
    pressure: float
    max_edges: int

    def __post_init__(self) -> None:
        check_relaxation(self.fmax, self.steps, self.cell, self.pressure, get_args(ScreenedCell))
        if self.max_edges < 1:
            raise ValueError(f"max_edges must be at least 1, got {self.max_edges}")


@dataclass
class _Job:
    """A structure to relax."""

    number: int
    source: str
    atoms: Atoms
    load: int = 0  # edges and atoms
    pieces: int = 1  # that do not interact
    steps: int = 0
    initial_energy: float | None = None

    @property
    def orientation(self) -> int:
        """-1 for a left-handed cell, whose volume TorchSim takes for negative: it gets minus the cell vectors."""
        return -1 if self.atoms.pbc.all() and np.linalg.det(self.atoms.cell.array) < 0 else 1


def screen(
    sources: Sequence[str | Path],
    model: DPA4Model,
    output: str | Path,
    *,
    fmax: float = 0.02,
    steps: int = 500,
    cell: ScreenedCell = "fixed",
    pressure: float = 0.0,
    max_edges: int = 200_000,
    rank: int = 0,
    world_size: int = 1,
    resume: bool = False,
    progress: bool = True,
) -> Screening:
    """Relax every structure of many files by FIRE, many at a time; list what happened to each.

    Writes into the folder ``output``: shards/, what each process has done so far, and when all shards have finished
    screen.csv, a row per structure, and relaxed.xyz, the relaxed structures with energies and forces, both in the
    order of the input. A structure that cannot be evaluated fails alone. Ctrl-C stops after a few steps; structures
    that were not finished are begun anew by the next call.

    Args:
        sources: Files with structures, in any format ASE reads.
        model: The model.
        output: Folder, made if absent.
        fmax: Converged when no atom feels a larger force, in eV/Angstrom. With a cell that changes, the rows of the
            virial per atom (eV), less that of the pressure, must be below it too.
        steps: Most steps per structure.
        cell: What of the cell is relaxed: nothing ("fixed"), all lengths and angles ("full"), the "volume" at
            constant shape, or the "shape" at constant volume.
        pressure: External pressure in GPa; needs a cell whose volume changes.
        max_edges: Edges of a batch, at the start of its structures. One with more is relaxed by itself.
        rank: Which of several processes this is; each takes every ``world_size``-th structure.
        world_size: How many processes there are.
        resume: Go on where an earlier call with the same files and settings ended, if there was one.
        progress: Show a progress bar on a terminal.

    Raises:
        FileNotFoundError: If a file does not exist.
        FileExistsError: If the folder holds such a run and ``resume`` is not set.
        RuntimeError: If another process is working on the same shard.
        ValueError: If an argument is not allowed, there is no structure, or files or settings are not those of the
            call to resume.
    """
    options = _Options(fmax, steps, cell, pressure, max_edges)
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no such file or directory: {path}")
    model.compute_forces = model.compute_stress = True
    folder = Path(output)
    settings = {
        **identify(model.potential),
        "files": [[str(path), path.stat().st_size] for path in paths],
        **asdict(options),
    }
    del settings["max_edges"]  # changes nothing but the use of memory
    shard = Shard(folder, COLUMNS, settings, rank, world_size, resume)
    total = 0
    try:
        with stop_requests() as stopped, progress_bar("structure", 0, show=progress) as bar:
            groups: dict[tuple[Any, ...], list[_Job]] = defaultdict(list)
            todo = len(shard.done)
            for total, (source, found) in enumerate(_structures(paths), start=1):
                if stopped:
                    break
                number = total - 1
                if number % world_size != rank or number in shard.done:
                    continue
                todo += 1
                _prepare(number, source, found, model, cell, shard, groups)
                bar.update(bar.task_ids[0], total=todo, completed=len(shard.done), status="reading")
            flight = _Flight(model, shard, options, stopped, bar)
            for key in sorted(groups):
                if not stopped:
                    flight.relax(groups.pop(key), key[1])
        if total == 0 and not stopped:
            raise ValueError(f"there is no structure in {', '.join(map(str, paths))}")
        if not stopped:
            shard.finish(total)
    finally:
        shard.close()
    joined = not stopped and join(folder, world_size)
    return Screening(dict(shard.counts), 0 if stopped else total, not stopped, joined)


def _structures(paths: Sequence[Path]) -> Iterator[tuple[str, Atoms | str]]:
    """Structures with their origin; for a file that cannot be read, the reason."""
    for path in paths:
        try:
            yield from read_atoms(path)
        except ValueError as error:
            yield str(path), _one_line(error)


def _prepare(
    number: int,
    source: str,
    found: Atoms | str,
    model: DPA4Model,
    cell: str,
    shard: Shard,
    groups: dict[tuple[Any, ...], list[_Job]],
) -> None:
    """Put a structure into the group it is relaxed in: of its periodicity, charge and spin.

    One that the model or the method cannot take is recorded at once.
    """
    if isinstance(found, str):
        shard.record({"structure": number, "source": source, "status": "refused", "reason": found})
        return
    job = _Job(number, source, found)
    try:
        if len(found) == 0:
            raise ValueError("it has no atoms")
        if found.constraints:
            raise ValueError("constraints are not kept in batches; use dpa4 relax")
        check_periodicity(found, cell)
        pair = charge_spin_of(model.potential, found)
        graph = build_graph(found.numbers, found.positions, found.cell.array, found.pbc, model.cutoff, pair)
        model.potential.check(graph)
    except Exception as error:  # what is wrong with one structure must not end the others
        shard.record(_row(job, "refused", _one_line(error)))
        return
    job.load = graph.num_edges + graph.num_atoms
    job.pieces = _pieces(graph.source, graph.destination, len(found))
    groups[tuple(found.pbc.tolist()), pair].append(job)


def _pieces(source: Tensor, destination: Tensor, atoms: int) -> int:
    """Number of parts of a structure without an edge between them."""
    ones = np.ones(len(source), dtype=np.int8)
    edges = coo_array((ones, (source.numpy(), destination.numpy())), shape=(atoms, atoms))
    return int(connected_components(edges, directed=False)[0])


def _row(job: _Job, status: str, reason: str = "", **results: float | None) -> dict[str, Any]:
    return {
        "structure": job.number,
        "source": job.source,
        "material_id": job.atoms.info.get("material_id"),
        "formula": job.atoms.get_chemical_formula(),
        "atoms": len(job.atoms),
        "status": status,
        "reason": reason,
        "steps": job.steps,
        "initial_energy": job.initial_energy,
        **results,
    }


def _one_line(error: Exception) -> str:
    """What an error says."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


class _Supply:
    """Iterator over states of single structures that pauses while so many are in flight that no other fits.

    A pause is a ``StopIteration``; after ``take_back`` it may go on.

    Attributes:
        handed_out: Structures so far, in order.
    """

    def __init__(self, jobs: list[_Job], limit: int, begin: Callable[[list[_Job]], list[tuple[_Job, Any]]]):
        # largest first, so that the last batches do not wait for one of them
        self._jobs = deque(sorted(jobs, key=lambda job: -job.load))
        self._limit, self._begin = limit, begin
        self._ready: deque[tuple[_Job, Any]] = deque()
        self._in_flight, self._load = 0, 0
        self.handed_out: list[_Job] = []

    def __bool__(self) -> bool:
        """Whether there is more."""
        while self._jobs and not self._ready:
            chunk = [self._jobs.popleft()]
            while self._jobs and sum(job.load for job in chunk) + self._jobs[0].load <= self._limit:
                chunk.append(self._jobs.popleft())
            self._ready.extend(self._begin(chunk))
        return bool(self._ready)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self or (self._in_flight and self._load + self._ready[0][0].load > self._limit):
            raise StopIteration
        job, state = self._ready.popleft()
        self.handed_out.append(job)
        self._in_flight += 1
        self._load += job.load
        return state

    def take_back(self, job: _Job) -> None:
        """A structure is in flight no more."""
        self._in_flight -= 1
        self._load -= job.load


class _Flight:
    """Relaxes groups of structures and records what becomes of each."""

    def __init__(self, model: DPA4Model, shard: Shard, options: _Options, stopped: list[int], bar: Progress):
        self.model, self.shard, self.options = model, shard, options
        self.stopped, self.bar = stopped, bar
        self.cell_relaxes = options.cell != "fixed"
        self.begin, self.step = _fire(model, options.cell, options.pressure)
        self.converged = ts.generate_force_convergence_fn(options.fmax, include_cell_forces=self.cell_relaxes)

    def relax(self, jobs: list[_Job], charge_spin: tuple[int, int]) -> None:
        """Relax structures of one periodicity, charge and spin."""
        self.model.charge_spin = charge_spin
        self.supply = _Supply(jobs, self.options.max_edges, self._begun)
        # The supply decides how many there are at a time, by their edges.
        batcher = ts.InFlightAutoBatcher(self.model, memory_scales_with="n_atoms", max_memory_scaler=np.inf)
        if not self.supply:
            return
        batcher.load_states(self.supply)
        state, _ = batcher.next_batch(None, None)
        failed: dict[int, str] = {}
        while state is not None and not self.stopped:
            batch = [self.supply.handed_out[index] for index in batcher.current_idx]
            finished = self._finished(state, batch, failed)
            failed = {}
            if any(finished):
                state, _ = batcher.next_batch(state, torch.tensor(finished, device=state.device))
            else:
                state, failed = self._advanced(state, batch)
            status = f"{len(batch)} in flight  {self.shard.counts['converged']} converged"
            self.bar.update(self.bar.task_ids[0], completed=len(self.shard.done), status=status)

    def _begun(self, jobs: Sequence[_Job]) -> list[tuple[_Job, Any]]:
        """States with their first forces; structures that fail are recorded."""
        state, failed = _isolated(self.begin, _sim_state(jobs, self.model))
        for index, reason in failed.items():
            self.shard.record(_row(jobs[index], "failed", reason))
        alive = [job for index, job in enumerate(jobs) if index not in failed]
        return list(zip(alive, state.split(), strict=True)) if alive else []

    def _advanced(self, state: Any, batch: Sequence[_Job]) -> tuple[Any, dict[int, str]]:
        """The state some steps later; or as it was, and which systems fail."""
        count = min(STEPS_BETWEEN_CHECKS, *(self.options.steps - job.steps for job in batch))

        def advance(start: Any) -> Any:
            for _ in range(count):
                start = self.step(start)
            return start

        later, failed = _isolated(advance, state)
        if failed:
            return state, failed
        for job in batch:
            job.steps += count
        return later, {}

    def _finished(self, state: Any, batch: Sequence[_Job], failed: dict[int, str]) -> list[bool]:
        """Which systems are done, after recording them."""
        norms = state.forces.norm(dim=1)
        largest = norms.new_zeros(len(batch)).scatter_reduce(0, state.system_idx, norms, "amax")
        volumes = torch.linalg.det(state.cell)
        columns = [state.energy, largest, volumes, self.converged(state, None).double()]
        numbers = torch.stack([c.double() for c in columns], dim=1).tolist()
        finished = []
        for index, (job, (energy, force, volume, converged)) in enumerate(zip(batch, numbers, strict=True)):
            if job.steps == 0:
                job.initial_energy = energy
            growth = volume / job.atoms.get_volume() if self.cell_relaxes else 1.0
            status, reason = "", ""
            if index in failed:
                status, reason = "failed", failed[index]
            elif not (np.isfinite(energy) and np.isfinite(force)):
                status, reason = "exploded", f"energy {energy} eV and largest force {force} eV/Angstrom"
            elif not 1 / EXPLODED < growth < EXPLODED:
                status, reason = "exploded", f"its volume changed by a factor of {growth:.3g}"
            elif converged:
                status = "converged"
            elif job.steps >= self.options.steps:
                status, reason = "unconverged", f"largest force {force:.3g} eV/Angstrom after all steps"
            finished.append(status != "")
            if status:
                self.supply.take_back(job)
            if status in ("converged", "unconverged"):
                self._record(state, index, job, status, reason, energy, force)
            elif status:
                self.shard.record(_row(job, status, reason))
        return finished

    def _record(
        self, state: Any, index: int, job: _Job, status: str, reason: str, energy: float, force: float
    ) -> None:
        """Record a relaxed structure, unless it has fallen apart."""
        own = state.system_idx == index
        start = job.atoms
        positions = state.positions[own].double().cpu().numpy()
        frame = Atoms(start.numbers, positions, cell=start.cell, pbc=start.pbc, info=_described(start.info))
        if self.cell_relaxes:
            frame.cell[:] = job.orientation * state.row_vector_cell[index].double().cpu().numpy()
        graph = build_graph(frame.numbers, frame.positions, frame.cell.array, frame.pbc, self.model.cutoff)
        pieces = _pieces(graph.source, graph.destination, len(frame))
        if pieces > job.pieces:
            reason = f"it fell into {pieces} pieces, from {job.pieces}, that no longer interact"
            self.shard.record(_row(job, "exploded", reason))
            return
        results = {"energy": energy, "forces": state.forces[own].double().cpu().numpy()}
        volume = None
        if frame.pbc.all():
            volume = float(frame.get_volume())
            if hasattr(state, "stress"):
                stress = state.stress[index].double().cpu().numpy()
                results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        frame.calc = SinglePointCalculator(frame, **results)
        frame.info["screen_status"] = status
        row = _row(job, status, reason, energy=energy, max_force=force, volume=volume)
        self.shard.record(row, frame)


def _described(info: Mapping[Any, Any]) -> dict[str, Any]:
    """Names, identifiers and numbers of a structure, in one line each; no labels, which were those of the start."""
    kept: dict[str, Any] = {}
    for key, value in info.items():
        if isinstance(value, str):
            value = " ".join(value.split())
        elif not isinstance(value, Real):
            continue
        if re.fullmatch(r"[^\s=\"]+", str(key)) and key not in DROPPED and value != "":
            kept[key] = value
    return kept


def _fire(model: DPA4Model, cell: str, pressure: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """TorchSim's functions that begin and continue FIRE, with its Frechet filter where the cell relaxes."""
    options: dict[str, Any] = CELLS[cell] | ({"scalar_pressure": pressure * units.GPa} if pressure else {})
    if not hasattr(ts, "fire_init"):  # TorchSim 0.3
        make = ts.optimizers.fire if cell == "fixed" else ts.optimizers.frechet_cell_fire
        return make(model=model, **options)
    if cell != "fixed":
        options["cell_filter"] = ts.CellFilter.frechet
    return partial(ts.fire_init, model=model, **options), partial(ts.fire_step, model=model)


def _sim_state(jobs: Sequence[_Job], model: DPA4Model) -> Any:
    """TorchSim's state of structures of one periodicity."""
    atoms = [job.atoms for job in jobs]
    pbc = atoms[0].pbc.tolist()
    cells = np.stack([job.orientation * job.atoms.cell.array.T for job in jobs])
    sizes = torch.tensor([len(a) for a in atoms], device=model.device)
    tensor = partial(torch.tensor, device=model.device)
    return ts.SimState(
        positions=tensor(np.concatenate([a.positions for a in atoms]), dtype=model.dtype),
        masses=tensor(np.concatenate([a.get_masses() for a in atoms]), dtype=model.dtype),
        cell=tensor(cells, dtype=model.dtype),
        pbc=pbc[0] if len(set(pbc)) == 1 else pbc,
        atomic_numbers=tensor(np.concatenate([a.numbers for a in atoms]), dtype=torch.int),
        system_idx=torch.repeat_interleave(torch.arange(len(atoms), device=model.device), sizes),
    )


def _isolated(function: Callable[[Any], Any], state: Any) -> tuple[Any, dict[int, str]]:
    """Apply a function to a copy of a state; if it raises, to either half, so that single systems fail by themselves.

    Halves are also what fits into memory where the whole does not.

    Returns:
        The new state of the systems that do not fail, if any, and the reasons of the others.

    Raises:
        torch.AcceleratorError: If the GPU is in a state in which nothing works any more.
    """
    try:
        return function(state.clone()), {}
    except torch.AcceleratorError:
        raise
    except Exception as error:
        reason, no_memory = _one_line(error), isinstance(error, torch.OutOfMemoryError)
    if state.n_systems == 1:
        return None, {0: reason}
    if no_memory:
        torch.cuda.empty_cache()
        warnings.warn(
            f"{state.n_atoms} atoms did not fit into memory at once; half of them are tried. Lower max_edges",
            RuntimeWarning,
            stacklevel=2,
        )
    middle = state.n_systems // 2
    first, failed = _isolated(function, state[list(range(middle))])
    second, others = _isolated(function, state[list(range(middle, state.n_systems))])
    alive = [part for part in (first, second) if part is not None]
    return (
        ts.concatenate_states(alive) if alive else None,
        failed | {middle + index: reason for index, reason in others.items()},
    )
