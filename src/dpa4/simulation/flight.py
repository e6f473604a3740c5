"""Relaxation of many structures in one TorchSim batch, in which finished structures are replaced at once.

A structure passes through four states:

* waiting: in the queue of ``_Supply``, largest first.
* ready: evaluated once (``Flight._start``), because FIRE begins with forces, but not in the batch, which may be full.
  A state of its own, so that many structures are evaluated together although TorchSim requests them one by one.
* in flight: a member of the batch. All members advance together by a few steps of FIRE, and are then checked.
* ended: converged, unconverged, exploded or failed. The structure has left the batch, and ``Flight`` has reported its
  ``Outcome``. A structure whose first evaluation fails ends without having been in flight.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms, units
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dpa4.data import with_results
from dpa4.graph import Graph, build_graph
from dpa4.messages import warn
from dpa4.potential.committee import add_deviations
from dpa4.simulation.relax import CELLS
from dpa4.system import own_settings, require

if TYPE_CHECKING:
    from dpa4.interfaces.torchsim import DPA4Model

STEPS_BETWEEN_CHECKS = 5  # a check makes the CPU wait for the GPU
EXPLODED = 4.0  # a volume that changes by more than this factor
VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])  # rows and columns of xx, yy, zz, yz, xz, xy


@dataclass
class Job:
    """Structure to relax, and its progress."""

    number: int  # in the order of the input
    source: str  # file and frame
    atoms: Atoms  # as read
    load: int = 0  # edges and atoms at the start, the measure of memory
    fragments: int = 1  # at the start
    steps: int = 0  # so far
    initial_energy: float | None = None  # eV

    @property
    def orientation(self) -> int:
        """Factor for the cell vectors: -1 for a left-handed cell, whose volume is negative for TorchSim, else 1."""
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
    first, last = _range(graph.structure, structure, structure + 1)  # of the atoms
    own = slice(*_range(graph.destination, first, last))  # of the edges, which are sorted by destination
    ends = [atom[own].cpu().numpy() - first for atom in (graph.source, graph.destination)]
    edges = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(last - first, last - first))
    return int(connected_components(edges, directed=False)[0])


def _range(ascending: Tensor, low: int, high: int) -> list[int]:
    """Range of indices, end exclusive, of the values low <= x < high in an ascending tensor."""
    return torch.searchsorted(ascending, ascending.new_tensor([low, high])).tolist()


def one_line(error: Exception) -> str:
    """Message of an error on one line, of at most 500 characters; preceded by the type, except for ValueError."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


class _Supply:
    """Iterator that supplies TorchSim's batcher with states of single structures.

    ``StopIteration`` is raised at the end, but also while the next structure does not fit into the batch. The batcher
    iterates again whenever it has removed members of the batch, and then receives the next structures.

    Args:
        jobs: Structures to relax.
        limit: Maximum total load in flight. A structure with a larger load is relaxed alone.
        start: Evaluates several structures together; returns the states of the structures that do not fail.

    Attributes:
        handed_out: Structures that have entered the batch, in the order in which the batcher numbers them.
    """

    def __init__(self, jobs: list[Job], limit: int, start: Callable[[list[Job]], list[tuple[Job, Any]]]):
        # Largest first: if a large structure came last, the GPU would relax it alone at the end.
        self._waiting = deque(sorted(jobs, key=lambda job: -job.load))
        self._limit, self._start = limit, start
        self._ready: deque[tuple[Job, Any]] = deque()
        self._in_flight, self._load = 0, 0
        self.handed_out: list[Job] = []

    def __bool__(self) -> bool:
        """Return whether a structure is left that can be relaxed."""
        # Waiting -> ready: as many structures as a batch may hold. A loop, because all of them may fail.
        while self._waiting and not self._ready:
            chunk = [self._waiting.popleft()]
            while self._waiting and sum(job.load for job in chunk) + self._waiting[0].load <= self._limit:
                chunk.append(self._waiting.popleft())
            self._ready.extend(self._start(chunk))
        return bool(self._ready)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # Ready -> in flight. If the batch is empty, the next structure fits, however large it is.
        if not self or (self._in_flight and self._load + self._ready[0][0].load > self._limit):
            raise StopIteration
        job, state = self._ready.popleft()
        self.handed_out.append(job)
        self._in_flight += 1
        self._load += job.load
        return state

    def release(self, job: Job) -> None:
        """Free the place of a structure that leaves the batch."""
        self._in_flight -= 1
        self._load -= job.load


class Flight:
    """Relaxes groups of structures by FIRE and reports how each relaxation ended.

    Args:
        model: The model.
        record: Called with each outcome.
        stopped: List that becomes non-empty when the run is to stop; structures in flight are then abandoned.
        watch: Called after every check with the number of structures in flight.
        fmax: Largest force of a converged structure, in eV/Angstrom.
        steps: Maximum number of steps per structure.
        cell: Degrees of freedom of the cell, a key of ``relax.CELLS``.
        pressure: External pressure, in GPa.
        max_edges: Maximum load in flight, see ``Job.load``.

    Raises:
        ImportError: If TorchSim is not installed.
    """

    def __init__(
        self,
        model: "DPA4Model",
        record: Callable[[Outcome], None],
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
        self._model, self._record, self._stopped, self._watch = model, record, stopped, watch
        self._steps, self._max_edges, self._cell_relaxes = steps, max_edges, cell != "fixed"
        self._begin, self._step = self._fire(cell, pressure)
        self._converged = self._torchsim.generate_force_convergence_fn(
            fmax, include_cell_forces=self._cell_relaxes
        )

    @own_settings
    def relax(self, jobs: list[Job], charge_spin: tuple[int, int]) -> None:
        """Relax structures of one periodicity, charge and spin multiplicity.

        Raises:
            torch.AcceleratorError: If the GPU is in a state in which every further call fails.
        """
        self._model.charge_spin = charge_spin
        self._supply = _Supply(jobs, self._max_edges, self._start)
        if not self._supply:  # all have failed, and the batcher needs at least one structure
            return
        # No limit in TorchSim: the supply limits the batch, by edges.
        batcher = self._torchsim.InFlightAutoBatcher(
            self._model, memory_scales_with="n_atoms", max_memory_scaler=np.inf
        )
        batcher.load_states(self._supply)
        state, _ = batcher.next_batch(None, None)
        failed: dict[int, str] = {}
        # Each turn checks the batch and then either replaces the members that have ended or advances the batch, never
        # both: a new member must be checked before its first step, because it may have converged already. If members
        # fail while the batch advances, no member has moved. The next turn removes those that failed, and a later one
        # repeats the steps without them.
        while state is not None and not self._stopped:
            batch = [self._supply.handed_out[index] for index in batcher.current_idx]
            ended = self._check(state, batch, failed)
            failed = {}
            if any(ended):
                state, _ = batcher.next_batch(state, torch.tensor(ended, device=state.device))
            else:
                state, failed = self._advance(state, batch)
            self._watch(len(batch))

    def _start(self, jobs: Sequence[Job]) -> list[tuple[Job, Any]]:
        """Evaluate structures for the first time; report those that fail, return the states of the others."""
        state, failed = self._isolate_failures(self._begin, self._state(jobs))
        for index, reason in failed.items():
            self._record(Outcome(jobs[index], "failed", reason))
        alive = [job for index, job in enumerate(jobs) if index not in failed]
        return list(zip(alive, state.split(), strict=True)) if alive else []

    def _advance(self, state: Any, batch: Sequence[Job]) -> tuple[Any, dict[int, str]]:
        """Advance the batch by a few steps.

        Returns:
            New state; or, if members fail, the unchanged state and the reason of each failure by index.
        """
        # All members take the same number of steps, so the one with the fewest steps left limits it.
        count = min(STEPS_BETWEEN_CHECKS, *(self._steps - job.steps for job in batch))

        def advance(start: Any) -> Any:
            for _ in range(count):
                start = self._step(start)
            return start

        later, failed = self._isolate_failures(advance, state)
        if failed:
            return state, failed
        for job in batch:
            job.steps += count
        return later, {}

    def _check(self, state: Any, batch: Sequence[Job], failed: dict[int, str]) -> list[bool]:
        """Report the outcomes of the members that have ended; return for each member whether it has."""
        norms = state.forces.norm(dim=1)
        largest = norms.new_zeros(len(batch)).scatter_reduce(0, state.system_idx, norms, "amax")
        volumes = torch.linalg.det(state.cell)
        columns = [state.energy, largest, volumes, self._converged(state, None).double()]
        numbers = torch.stack([c.double() for c in columns], dim=1).tolist()  # one wait for the GPU
        ended = []
        for index, (job, (energy, force, volume, converged)) in enumerate(zip(batch, numbers, strict=True)):
            if job.steps == 0:
                job.initial_energy = energy
            growth = volume / job.atoms.get_volume() if self._cell_relaxes else 1.0
            # The order matters: a structure whose energy is not finite may have converged forces, and a structure
            # that converges in its last step is converged.
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
                self._record(Outcome(job, status, reason, relaxed, None if relaxed is None else force))
        return ended

    def _fragments(self, state: Any, index: int, job: Job) -> int:
        """Number of fragments of a member of the batch."""
        if job.steps == 0:
            return job.fragments
        graph = self._model.last_graph
        # A step of FIRE ends with an evaluation of the new state, so the model usually has its graph. It has another
        # graph if the batch did not fit into memory and was evaluated in halves.
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
        """Current structure of a member of the batch, its cell vectors with their original sign."""
        positions = state.positions[state.system_idx == index].double().cpu().numpy()
        atoms = Atoms(job.atoms.numbers, positions, cell=job.atoms.cell, pbc=job.atoms.pbc)
        if self._cell_relaxes:
            atoms.cell[:] = job.orientation * state.row_vector_cell[index].double().cpu().numpy()
        return atoms

    def _relaxed(self, state: Any, index: int, job: Job, energy: float) -> Atoms:
        """Current structure of a member of the batch, with energy, forces and, if periodic, stress."""
        atoms = self._atoms(state, index, job)
        forces = state.forces[state.system_idx == index]
        results = {"energy": energy, "forces": forces.double().cpu().numpy()}
        if atoms.pbc.all() and hasattr(state, "stress"):
            stress = state.stress[index].double().cpu().numpy()
            results["stress"] = stress[VOIGT]
        frame = with_results(atoms, **results)
        if len(self._model.potentials) > 1:
            add_deviations(frame, **self._deviations(state[[index]], bool(atoms.pbc.all())))
        return frame

    def _deviations(self, state: Any, periodic: bool) -> dict[str, Any]:
        """Standard deviations of a committee for the single structure of a state, by the names of the calculator."""
        found = self._model(state)
        arrays = {name: values.cpu().numpy() for name, values in found.items() if name.endswith("_std")}
        deviations: dict[str, Any] = {
            "energy_std": float(arrays["energy_std"][0]),
            "forces_std": arrays["forces_std"],
        }
        if periodic:
            deviations["stress_std"] = arrays["stress_std"][0][VOIGT]
        return deviations

    def _fire(self, cell: str, pressure: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """TorchSim's functions that initialise and advance FIRE, with its Frechet filter if the cell relaxes."""
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
        """TorchSim state of structures with one periodicity."""
        device, dtype = self._model.device, self._model.dtype
        tensor = partial(torch.tensor, device=device)
        atoms = [job.atoms for job in jobs]
        pbc = atoms[0].pbc.tolist()
        cells = np.stack([job.orientation * job.atoms.cell.array.T for job in jobs])  # vectors as columns
        return self._torchsim.SimState(
            positions=tensor(np.concatenate([a.positions for a in atoms]), dtype=dtype),
            masses=tensor(np.concatenate([a.get_masses() for a in atoms]), dtype=dtype),
            cell=tensor(cells, dtype=dtype),
            pbc=pbc[0] if len(set(pbc)) == 1 else pbc,  # TorchSim 0.3 has one value for all axes
            atomic_numbers=tensor(np.concatenate([a.numbers for a in atoms]), dtype=torch.int),
            system_idx=torch.repeat_interleave(
                torch.arange(len(atoms), device=device), tensor([len(a) for a in atoms])
            ),
        )

    def _isolate_failures(self, function: Callable[[Any], Any], state: Any) -> tuple[Any, dict[int, str]]:
        """Apply a function to a copy of a state; if it raises, to each half separately, down to single systems.

        A system for which the function raises thus fails alone. Halves may also fit into memory if the whole does
        not.

        Returns:
            New state of the systems that do not fail (None if all fail), and the reasons of the failures by index.

        Raises:
            torch.AcceleratorError: If the GPU is in a state in which every further call fails.
        """
        try:
            return function(state.clone()), {}
        except torch.AcceleratorError:
            raise
        except Exception as error:
            reason, no_memory = one_line(error), isinstance(error, torch.OutOfMemoryError)
        # Outside the except block, in which the traceback keeps the tensors of the failed attempt alive.
        if state.n_systems == 1:
            return None, {0: reason}
        if no_memory:
            torch.cuda.empty_cache()
            warn(
                f"a batch of {state.n_atoms} atoms did not fit into memory and is tried in halves; "
                "lower max_edges to avoid this",
                RuntimeWarning,
            )
        middle = state.n_systems // 2
        first, failed = self._isolate_failures(function, state[list(range(middle))])
        second, others = self._isolate_failures(function, state[list(range(middle, state.n_systems))])
        alive = [part for part in (first, second) if part is not None]
        return (
            self._torchsim.concatenate_states(alive) if alive else None,
            failed | {middle + index: reason for index, reason in others.items()},
        )
