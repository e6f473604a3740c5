"""Relaxation of many structures in one TorchSim batch, whose finished members are replaced at once.

A structure passes through four states:

* waiting: in the queue of ``_Supply``, largest first.
* ready: its first forces are known (``Flight._started``), but it does not fit into the batch yet.
* in flight: a member of the batch. All members advance together by a few steps of FIRE.
* ended: converged, unconverged, exploded or failed. It has left the batch, and its ``Outcome`` is handed out.

A structure whose first evaluation fails goes from waiting to ended at once.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dpa4.graph import Graph, build_graph
from dpa4.simulation.relax import CELLS
from dpa4.system import require

if TYPE_CHECKING:
    from dpa4.simulation.torchsim import DPA4Model

STEPS_BETWEEN_CHECKS = 5  # a check waits for the GPU
EXPLODED = 4.0  # a volume that changes by more than this factor


@dataclass
class Job:
    """A structure to relax, and its progress."""

    number: int  # in the order of the input
    source: str  # file and frame
    atoms: Atoms  # as read
    load: int = 0  # edges and atoms at the start, the measure of memory
    fragments: int = 1  # at the start
    steps: int = 0  # so far
    initial_energy: float | None = None  # eV

    @property
    def orientation(self) -> int:
        """-1 for a left-handed cell, else 1: TorchSim takes the signed volume, so it gets minus the cell vectors."""
        return -1 if self.atoms.pbc.all() and np.linalg.det(self.atoms.cell.array) < 0 else 1


@dataclass(frozen=True)
class Outcome:
    """End of one relaxation."""

    job: Job
    status: str  # converged, unconverged, exploded or failed
    reason: str  # empty if converged
    relaxed: Atoms | None = None  # with energy, forces and stress; None if exploded or failed
    max_force: float | None = None  # eV/Angstrom


def count_fragments(graph: Graph, structure: int = 0) -> int:
    """Count the fragments of one structure of a graph: groups of atoms with no edge to the others."""
    first, last = _slice(graph.structure, structure, structure + 1)  # of its atoms
    own = slice(*_slice(graph.destination, first, last))  # of its edges
    ends = [atom[own].cpu().numpy() - first for atom in (graph.source, graph.destination)]
    edges = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(last - first, last - first))
    return int(connected_components(edges, directed=False)[0])


def _slice(ascending: Tensor, low: int, high: int) -> list[int]:
    """First and last (exclusive) index of the values from low to high (exclusive) in an ascending tensor."""
    return torch.searchsorted(ascending, ascending.new_tensor([low, high])).tolist()


def one_line(error: Exception) -> str:
    """Message of an error on one line, at most 500 characters; the type as well unless it is a ValueError."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


class _Supply:
    """Iterator over states of single structures, ready for the batch.

    TorchSim's batcher pulls states from it until ``StopIteration``. That is raised not only at the end, but also
    while the next structure does not fit beside those in flight. The batcher asks again after it has removed
    members, and the iteration then goes on.

    Args:
        jobs: Structures to relax.
        limit: Largest total load in flight. A structure with a larger load flies alone.
        start: Computes the first forces of several structures; returns the states of those that do not fail.

    Attributes:
        handed_out: Structures so far, in the order in which the batcher numbers them.
    """

    def __init__(self, jobs: list[Job], limit: int, start: Callable[[list[Job]], list[tuple[Job, Any]]]):
        # Largest first: a large structure that came last would fly alone at the end.
        self._waiting = deque(sorted(jobs, key=lambda job: -job.load))
        self._limit, self._start = limit, start
        self._ready: deque[tuple[Job, Any]] = deque()
        self._in_flight, self._load = 0, 0
        self.handed_out: list[Job] = []

    def __bool__(self) -> bool:
        """Return whether a structure is left that can be relaxed."""
        # Waiting -> ready, as many together as a batch may hold. A loop, because all of them may fail.
        while self._waiting and not self._ready:
            chunk = [self._waiting.popleft()]
            while self._waiting and sum(job.load for job in chunk) + self._waiting[0].load <= self._limit:
                chunk.append(self._waiting.popleft())
            self._ready.extend(self._start(chunk))
        return bool(self._ready)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # Ready -> in flight. With nothing in flight the next one fits, however large it is.
        if not self or (self._in_flight and self._load + self._ready[0][0].load > self._limit):
            raise StopIteration
        job, state = self._ready.popleft()
        self.handed_out.append(job)
        self._in_flight += 1
        self._load += job.load
        return state

    def release(self, job: Job) -> None:
        """Free the place of a structure that is in flight no more."""
        self._in_flight -= 1
        self._load -= job.load


class Flight:
    """Relaxes groups of structures by FIRE and hands out how each ended.

    Args:
        model: The model.
        landed: Called with each outcome.
        stopped: Not empty once the run is to stop; structures in flight are then abandoned.
        watch: Called after every check with the number of structures in flight.
        fmax: Largest force of a converged structure, in eV/Angstrom.
        steps: Largest number of steps per structure.
        cell: Degrees of freedom of the cell, a key of ``relax.CELLS``.
        pressure: External pressure, in GPa.
        max_edges: Largest number of edges in flight.

    Raises:
        ImportError: If TorchSim is not installed.
    """

    def __init__(
        self,
        model: "DPA4Model",
        landed: Callable[[Outcome], None],
        stopped: list[int],
        watch: Callable[[int], None],
        *,
        fmax: float,
        steps: int,
        cell: str,
        pressure: float,
        max_edges: int,
    ):
        self._torchsim: Any = require("torch_sim", "torchsim")
        self._model, self._landed, self._stopped, self._watch = model, landed, stopped, watch
        self._steps, self._max_edges, self._cell_relaxes = steps, max_edges, cell != "fixed"
        self._begin, self._step = self._fire(cell, pressure)
        self._converged = self._torchsim.generate_force_convergence_fn(
            fmax, include_cell_forces=self._cell_relaxes
        )

    def relax(self, jobs: list[Job], charge_spin: tuple[int, int]) -> None:
        """Relax structures of one periodicity, charge and spin multiplicity.

        Raises:
            torch.AcceleratorError: If the GPU is in a state in which nothing works any more.
        """
        self._model.charge_spin = charge_spin
        self._supply = _Supply(jobs, self._max_edges, self._started)
        if not self._supply:  # all failed at once, and the batcher needs a first structure
            return
        # TorchSim's own limit is lifted: the supply decides by the edges how many are in flight.
        batcher = self._torchsim.InFlightAutoBatcher(
            self._model, memory_scales_with="n_atoms", max_memory_scaler=np.inf
        )
        batcher.load_states(self._supply)
        state, _ = batcher.next_batch(None, None)
        failed: dict[int, str] = {}
        # Each turn checks the batch, then either replaces the members that have ended or advances the batch. It
        # never does both: a member that has just come in may have converged already. A member that fails while the
        # batch advances ends in the check of the next turn; the batch is as it was before, and advances without it.
        while state is not None and not self._stopped:
            batch = [self._supply.handed_out[index] for index in batcher.current_idx]
            ended = self._check(state, batch, failed)
            failed = {}
            if any(ended):
                state, _ = batcher.next_batch(state, torch.tensor(ended, device=state.device))
            else:
                state, failed = self._advance(state, batch)
            self._watch(len(batch))

    def _started(self, jobs: Sequence[Job]) -> list[tuple[Job, Any]]:
        """States with their first forces; structures that fail end here."""
        state, failed = self._isolated(self._begin, self._state(jobs))
        for index, reason in failed.items():
            self._landed(Outcome(jobs[index], "failed", reason))
        alive = [job for index, job in enumerate(jobs) if index not in failed]
        return list(zip(alive, state.split(), strict=True)) if alive else []

    def _advance(self, state: Any, batch: Sequence[Job]) -> tuple[Any, dict[int, str]]:
        """State some steps later; if members fail, the unchanged state and the reason of each by index."""
        # No member exceeds its steps, so some advance in shorter strides than they could.
        count = min(STEPS_BETWEEN_CHECKS, *(self._steps - job.steps for job in batch))

        def advance(start: Any) -> Any:
            for _ in range(count):
                start = self._step(start)
            return start

        later, failed = self._isolated(advance, state)
        if failed:
            return state, failed
        for job in batch:
            job.steps += count
        return later, {}

    def _check(self, state: Any, batch: Sequence[Job], failed: dict[int, str]) -> list[bool]:
        """Return which members of the batch have ended, after handing out their outcomes."""
        norms = state.forces.norm(dim=1)
        largest = norms.new_zeros(len(batch)).scatter_reduce(0, state.system_idx, norms, "amax")
        volumes = torch.linalg.det(state.cell)
        columns = [state.energy, largest, volumes, self._converged(state, None).double()]
        numbers = torch.stack([c.double() for c in columns], dim=1).tolist()  # the GPU is waited for once
        ended = []
        for index, (job, (energy, force, volume, converged)) in enumerate(zip(batch, numbers, strict=True)):
            if job.steps == 0:
                job.initial_energy = energy
            growth = volume / job.atoms.get_volume() if self._cell_relaxes else 1.0
            # A number that is not finite counts as an explosion even where it would compare as converged, and a
            # structure that converges with its last step is converged.
            status, reason = "", ""
            if index in failed:
                status, reason = "failed", failed[index]
            elif not (np.isfinite(energy) and np.isfinite(force)):
                status, reason = "exploded", f"energy {energy} eV and largest force {force} eV/Angstrom"
            elif not 1 / EXPLODED < growth < EXPLODED:
                status, reason = "exploded", f"its volume changed by a factor of {growth:.3g}"
            elif converged:
                status = "converged"
            elif job.steps >= self._steps:
                status = "unconverged"
                reason = f"largest force {force:.3g} eV/Angstrom after {job.steps} steps"
            relaxed = None
            if status in ("converged", "unconverged"):
                fragments = self._fragments(state, index, job)
                if fragments > job.fragments:
                    status = "exploded"
                    reason = (
                        f"it broke into {fragments} fragments, from {job.fragments}, that no longer interact"
                    )
                else:
                    relaxed = self._relaxed(state, index, job, energy)
            ended.append(status != "")
            if status:
                self._supply.release(job)
                self._landed(Outcome(job, status, reason, relaxed, None if relaxed is None else force))
        return ended

    def _fragments(self, state: Any, index: int, job: Job) -> int:
        """Number of fragments of a member of the batch."""
        if job.steps == 0:
            return job.fragments
        graph = self._model.last_graph
        # The last step ended with an evaluation of this state, so that its edges are known, unless memory did not
        # suffice and the batch was evaluated in halves.
        if (
            graph is not None
            and torch.equal(graph.positions, state.positions.double())
            and torch.equal(graph.cell, state.row_vector_cell.double())
        ):
            return count_fragments(graph, index)
        atoms = self._atoms(state, index, job)
        return count_fragments(
            build_graph(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, self._model.cutoff)
        )

    def _atoms(self, state: Any, index: int, job: Job) -> Atoms:
        """Present structure of a member of the batch, in the orientation of its start."""
        positions = state.positions[state.system_idx == index].double().cpu().numpy()
        atoms = Atoms(job.atoms.numbers, positions, cell=job.atoms.cell, pbc=job.atoms.pbc)
        if self._cell_relaxes:
            atoms.cell[:] = job.orientation * state.row_vector_cell[index].double().cpu().numpy()
        return atoms

    def _relaxed(self, state: Any, index: int, job: Job, energy: float) -> Atoms:
        """Present structure of a member of the batch, with energy, forces and, if periodic, stress."""
        atoms = self._atoms(state, index, job)
        forces = state.forces[state.system_idx == index]
        results = {"energy": energy, "forces": forces.double().cpu().numpy()}
        if atoms.pbc.all() and hasattr(state, "stress"):
            stress = state.stress[index].double().cpu().numpy()
            results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]  # xx, yy, zz, yz, xz, xy
        atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    def _fire(self, cell: str, pressure: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """TorchSim's functions that begin and continue FIRE, with its Frechet filter where the cell relaxes."""
        ts, model = self._torchsim, self._model
        options: dict[str, Any] = CELLS[cell] | (
            {"scalar_pressure": pressure * units.GPa} if pressure else {}
        )
        if not hasattr(ts, "fire_init"):  # TorchSim 0.3
            make = ts.optimizers.fire if cell == "fixed" else ts.optimizers.frechet_cell_fire
            return make(model=model, **options)
        if cell != "fixed":
            options["cell_filter"] = ts.CellFilter.frechet
        return partial(ts.fire_init, model=model, **options), partial(ts.fire_step, model=model)

    def _state(self, jobs: Sequence[Job]) -> Any:
        """TorchSim's state of structures of one periodicity."""
        device, dtype = self._model.device, self._model.dtype
        tensor = partial(torch.tensor, device=device)
        atoms = [job.atoms for job in jobs]
        pbc = atoms[0].pbc.tolist()
        cells = np.stack([job.orientation * job.atoms.cell.array.T for job in jobs])  # vectors as columns
        return self._torchsim.SimState(
            positions=tensor(np.concatenate([a.positions for a in atoms]), dtype=dtype),
            masses=tensor(np.concatenate([a.get_masses() for a in atoms]), dtype=dtype),
            cell=tensor(cells, dtype=dtype),
            pbc=pbc[0] if len(set(pbc)) == 1 else pbc,  # TorchSim 0.3 knows one value for all axes only
            atomic_numbers=tensor(np.concatenate([a.numbers for a in atoms]), dtype=torch.int),
            system_idx=torch.repeat_interleave(
                torch.arange(len(atoms), device=device), tensor([len(a) for a in atoms])
            ),
        )

    def _isolated(self, function: Callable[[Any], Any], state: Any) -> tuple[Any, dict[int, str]]:
        """Apply a function to a copy of a state; if it raises, to either half, down to single systems.

        A system that makes the function raise thus fails alone. Halves may also fit into memory where the whole
        does not.

        Returns:
            New state of the systems that do not fail (None if there is none), and the reasons of the others by index.

        Raises:
            torch.AcceleratorError: If the GPU is in a state in which nothing works any more.
        """
        try:
            return function(state.clone()), {}
        except torch.AcceleratorError:
            raise
        except Exception as error:
            reason, no_memory = one_line(error), isinstance(error, torch.OutOfMemoryError)
        # Outside of the except block, which would hold the traceback and with it the tensors of the failed attempt.
        if state.n_systems == 1:
            return None, {0: reason}
        if no_memory:
            torch.cuda.empty_cache()
            warnings.warn(
                f"a batch of {state.n_atoms} atoms did not fit into memory and is tried in halves; "
                "lower max_edges to avoid this",
                RuntimeWarning,
                stacklevel=2,
            )
        middle = state.n_systems // 2
        first, failed = self._isolated(function, state[list(range(middle))])
        second, others = self._isolated(function, state[list(range(middle, state.n_systems))])
        alive = [part for part in (first, second) if part is not None]
        return (
            self._torchsim.concatenate_states(alive) if alive else None,
            failed | {middle + index: reason for index, reason in others.items()},
        )
