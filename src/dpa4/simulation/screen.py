"""Screening: relaxation of many structures in batches, with a table of the outcomes."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ase import Atoms

from dpa4.data import read_atoms
from dpa4.data.charge_spin import unused_names, warn_of_unused
from dpa4.data.writers import without_labels
from dpa4.graph import build_graph
from dpa4.interfaces.loading import charge_spin_of
from dpa4.potential.committee import fingerprint_of_committee
from dpa4.progress import ProgressBar
from dpa4.simulation.flight import Flight, Job, Outcome, count_fragments, one_line
from dpa4.simulation.relax import check_periodicity, check_relaxation
from dpa4.simulation.runs.shards import Shard, join_shards
from dpa4.system import stop_requests, user_path

if TYPE_CHECKING:
    from dpa4.interfaces.torchsim import DPA4Model

ScreenedCell = Literal["fixed", "full", "volume", "shape"]
"""Choices of ``cell``: those of ``relax`` except the ones with a mask, which TorchSim's filter does not support."""

COLUMNS = (
    "structure", "source", "material_id", "formula", "atoms", "status", "reason", "steps", "initial_energy", "energy",
    "max_force", "volume",
)  # fmt: skip
Groups = dict[tuple[tuple[bool, ...], tuple[int, int]], list[Job]]
"""Structures by periodicity, and charge and spin multiplicity: a batch has one of each."""


@dataclass(frozen=True)
class Screening:
    """Outcome of a screening, including earlier calls that this one resumed.

    Attributes:
        counts: Number of structures of this process by status: "converged"; "unconverged" (not below fmax after
            ``steps``); "exploded" (numbers not finite, a volume changed by more than a factor of 4, or fragments that
            no longer interact); "failed" (an evaluation raised an error); or "refused" (not supported by the model or
            the method).
        total: Number of structures of all processes; 0 after an interruption.
        finished: True if this process has finished its structures.
        joined: True if all processes have finished, so that screen.csv and relaxed.xyz exist.
    """

    counts: dict[str, int]
    total: int
    finished: bool
    joined: bool


@dataclass(frozen=True)
class _Options:
    """Arguments of ``screen`` that concern the relaxations."""

    fmax: float
    steps: int
    cell: str
    pressure: float
    max_edges: int

    def __post_init__(self) -> None:
        check_relaxation(self.fmax, self.steps, self.cell, self.pressure, get_args(ScreenedCell))
        if self.max_edges < 1:
            raise ValueError(f"max_edges must be at least 1, got {self.max_edges}")


def screen(
    sources: Sequence[str | Path],
    model: "DPA4Model",
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
    overwrite: bool = False,
    progress: bool = True,
) -> Screening:
    """Relax the structures of many files with FIRE, in batches, and record the outcome of each structure.

    Files written to ``output``:

    * shards/: results of each process so far.
    * screen.csv: one row per structure, in the order of the input; written once all processes have finished.
    * relaxed.xyz: relaxed structures with energies and forces, in the same order; written at the same time.

    A structure that cannot be evaluated does not affect the others. Ctrl-C stops the screening after a few steps. A
    later call with ``resume`` starts the unfinished structures again.

    Args:
        sources: Files with structures, in any format that ASE reads.
        model: TorchSim model; its forces and stresses are switched on.
        output: Output folder, created if absent.
        fmax: Convergence threshold for the largest force on an atom, in eV/Angstrom. If the cell changes, the rows of
            the virial per atom (in eV), minus the contribution of the pressure, must be below fmax as well.
        steps: Maximum number of steps per structure.
        cell: Cell degrees of freedom to relax: none ("fixed"), all lengths and angles ("full"), the volume at
            constant shape ("volume"), or the shape at constant volume ("shape").
        pressure: External pressure, in GPa. Needs a choice of ``cell`` that changes the volume.
        max_edges: Maximum number of edges in a batch, counted in the initial structures. A structure with more edges
            is relaxed alone.
        rank: Index of this process, from 0. Each process relaxes every ``world_size``-th structure.
        world_size: Number of processes that share ``output``.
        resume: Continue an earlier call with the same files and settings, if there is one.
        overwrite: Replace the screening in ``output``. Only for ``world_size`` 1.
        progress: Show the progress.

    Returns:
        Number of structures by status, and whether the screening is finished.

    Raises:
        FileNotFoundError: If a file does not exist.
        FileExistsError: If ``output`` already holds a screening and neither ``resume`` nor ``overwrite`` is set.
        ImportError: If TorchSim is not installed.
        BlockingIOError: If another process is working on the same shard.
        ValueError: If an argument is not allowed, there is no structure, or the files or settings differ from those
            of the call to resume.

    Example:
        Relaxation of positions and cells of many crystals:

            model = DPA4Model("run/best.safetensors")
            result = screen(["crystals.xyz"], model, "screen", fmax=0.02, cell="full")
            print(result.counts)  # for example {"converged": 981, "unconverged": 19}
    """
    options = _Options(fmax, steps, cell, pressure, max_edges)
    paths = [user_path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no such file or directory: {path}")
    model.compute_forces = model.compute_stress = True
    folder = user_path(output)
    settings = {
        **fingerprint_of_committee(model.potentials),
        "files": [[str(path), path.stat().st_size] for path in paths],
        **asdict(options),
    }
    del settings["max_edges"]  # affects only the use of memory
    shard = Shard(folder, COLUMNS, settings, rank, world_size, resume, overwrite)
    total = 0
    try:
        with stop_requests() as stopped, ProgressBar("structure", 0, show=progress) as bar:

            def record(outcome: Outcome) -> None:
                shard.record(*_recorded(outcome))

            def watch(in_flight: int) -> None:
                status = f"{in_flight} in flight  {shard.counts['converged']} converged"
                bar.update(bar.task_ids[0], completed=len(shard.done), status=status)

            flight = Flight(model, record, stopped, watch, **asdict(options))
            groups: Groups = defaultdict(list)
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
            for key in sorted(groups):
                if not stopped:
                    flight.relax(groups.pop(key), key[1])
        if total == 0 and not stopped:
            raise ValueError(f"there is no structure in {', '.join(map(str, paths))}")
        if not stopped:
            shard.finish(total)
    finally:
        shard.close()
    joined = not stopped and join_shards(folder, world_size)
    return Screening(dict(shard.counts), 0 if stopped else total, not stopped, joined)


def _structures(paths: Sequence[Path]) -> Iterator[tuple[str, Atoms | str]]:
    """Yield each structure with its source; for a file that cannot be read, the reason replaces the structure."""
    for path in paths:
        try:
            yield from read_atoms(path)
        except ValueError as error:
            yield str(path), one_line(error)


def _prepare(
    number: int,
    source: str,
    found: Atoms | str,
    model: "DPA4Model",
    cell: str,
    shard: Shard,
    groups: Groups,
) -> None:
    """Add a structure to its group, or record it at once if the model or the method does not support it."""
    if isinstance(found, str):
        shard.record({"structure": number, "source": source, "status": "refused", "reason": found})
        return
    job = Job(number, source, found)
    try:
        if len(found) == 0:
            raise ValueError("it has no atoms")
        if found.constraints:
            raise ValueError("constraints are not supported in batches; use dpa4 relax")
        check_periodicity(found, cell)
        charge_spin = charge_spin_of(model.potential, found)
        if model.potential.config.charge_spin and (unused := unused_names(found.info)):
            warn_of_unused(unused, source)  # Python shows the same warning once
        # Batches are planned by edges before anything is evaluated, and a structure with coincident atoms must not
        # reach one. The first evaluation searches again: the graphs of all waiting structures would fill the memory.
        graph = build_graph(
            found.numbers, found.positions, found.cell.array, found.pbc, model.cutoff, charge_spin
        )
        for potential in model.potentials:
            potential.check(graph)
    except Exception as error:  # a fault of one structure must not end the others
        shard.record(_row(job, "refused", one_line(error)))
        return
    job.load = graph.num_edges + graph.num_atoms
    job.fragments = count_fragments(graph)
    groups[tuple(found.pbc.tolist()), charge_spin].append(job)


def _recorded(outcome: Outcome) -> tuple[dict[str, Any], Atoms | None]:
    """Row of the table and, if there is one, the relaxed structure to write."""
    job, frame = outcome.job, outcome.relaxed
    if frame is None:
        return _row(job, outcome.status, outcome.reason), None
    frame.info = without_labels(job.atoms.info) | frame.info | {"screen_status": outcome.status}
    row = _row(job, outcome.status, outcome.reason) | {
        "energy": frame.get_potential_energy(),
        "max_force": outcome.max_force,
        "volume": float(frame.get_volume()) if frame.pbc.all() else None,
    }
    return row, frame


def _row(job: Job, status: str, reason: str) -> dict[str, Any]:
    """Row of the table without results."""
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
    }
