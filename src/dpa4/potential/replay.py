"""Energy and forces as a CUDA graph: in small systems it takes longer to launch the kernels than to run them."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from dpa4.graph import Graph, collate
from dpa4.kernels.region import versions
from dpa4.potential.potential import Potential, Prediction

T = TypeVar("T")

MAX_ATOMS = 4224
"""Atoms of the largest recording, padding included: 4096 become as many. Larger systems keep the device busy, and a
CUDA graph never gives memory back."""

DIGITS = 6
"""Binary digits of the sizes of recordings, see `rounded_up`."""


class _Recording(NamedTuple):
    graph: "torch.cuda.CUDAGraph"
    room: "Room"
    prediction: Prediction
    constants: list[Any]  # of compiled regions: the kernels read them, so their memory must stay


class Replay:
    """Calls a potential on one structure at a time, by replaying recorded kernels.

    Sizes are rounded up with atoms far from everything, by at most 1/32, so one recording serves many structures.
    Recordings are given up when weights change, since they do not compute what depends on weights alone.

    Args:
        potential: In evaluation mode, on a GPU; its parameters and buffers must not be replaced by others.
        max_recordings: Of different sizes, that are held at a time.
    """

    def __init__(self, potential: Potential, max_recordings: int = 4):
        self.potential, self.max_recordings = potential, max_recordings
        self.recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self.weights = [*potential.parameters(), *potential.buffers()]
        self.recorded = versions(self.weights)

    def __call__(self, graph: Graph) -> Prediction:
        """Prediction for a graph of one structure, on the device."""
        graph = self.potential.without_excluded(graph)
        n, e = graph.num_atoms, graph.num_edges
        atoms, edges = replayed_size(n), rounded_up(e)
        if atoms is None or e < 2 or is_in_parts(self.potential, edges):
            return self.potential.of_edges(graph)
        size = atoms, edges
        while True:
            if size not in self.recordings:
                self.recordings[size] = self._record(Room(graph, self.potential.config.cutoff))
                while len(self.recordings) > self.max_recordings:
                    self.recordings.popitem(last=False)
            self.recordings.move_to_end(size)
            recording = self.recordings[size]
            recording.room.take(graph)
            recording.graph.replay()
            if (now := versions(self.weights)) == self.recorded:  # looked up while the device is busy
                break
            self.recordings.clear()
            del recording  # its memory is for the next one
            self.recorded = now
        energy, atomic, forces, virial = recording.prediction
        return Prediction(energy[:1].clone(), atomic[:n].clone(), forces[:n].clone(), virial[:1].clone())

    def _record(self, room: "Room") -> _Recording:
        from dpa4.potential.compiled import regions  # imports this module

        stream = torch.cuda.Stream(room.graph.positions.device)
        graph, prediction = record(lambda: self.potential.of_edges(room.graph), stream)
        constants = [region.constants.copy() for region in regions(self.potential)]
        return _Recording(graph, room, prediction, constants)


def replayed_size(atoms: int) -> int | None:
    """Atoms of the recording for so many, padding included; None if there is none."""
    size = rounded_up(atoms + 1)
    return size if size <= MAX_ATOMS else None


def record(work: Callable[[], T], stream: "torch.cuda.Stream", pool: Any = None) -> tuple[Any, T]:
    """Record the kernels of some work, which is done twice before.

    Args:
        work: Nothing in it may wait for the device; its inputs stay where they are.
        stream: What the work is done on while it is recorded.
        pool: Handle of the memory that it takes. Recordings may share it if none is replayed before the results of
            another have been used, since it may overwrite them.

    Returns:
        The ``torch.cuda.CUDAGraph``, and the results, which each replay overwrites.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills caches that must not be filled while recording
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer block brings the former stream back even if the recording cannot be ended. Other threads may go on
    # to allocate memory (of batches to come): "thread_local".
    try:
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            results = work()
    except BaseException:
        # Random numbers would go on to be recorded; a copy of their state does not know that they were.
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph, results


def is_in_parts(potential: Potential, num_edges: int) -> bool:
    """Whether the network works on so many edges in parts: cutting them waits for the device, so is not recorded."""
    return num_edges > potential.model.max_edges[potential.reference_energies.device.type]


class Room:
    """Place for one structure after the other, with sizes rounded up; ``graph`` is `pad` of the last one.

    Args:
        graph: The first structure; others have sizes that are rounded up to the same.
        cutoff: Of the model, in Angstrom.
    """

    def __init__(self, graph: Graph, cutoff: float):
        self.cutoff = cutoff
        self.sizes = graph.num_atoms, graph.num_edges
        self.graph = pad(graph, cutoff)

    def take(self, graph: Graph) -> None:
        """Put another structure there; of as many atoms, as in dynamics, by few launches."""
        own, (n, e), (atoms, edges) = self.graph, (graph.num_atoms, graph.num_edges), self.sizes
        self.sizes = n, e
        if n != atoms:
            for to, whole in zip(own, pad(graph, self.cutoff), strict=True):
                to.copy_(whole)
            return
        # One launch for each type: in small systems launches take longer than copies.
        for fields in (
            ("positions", "cell", "shift"),
            ("atomic_numbers", "source", "destination", "charge_spin"),
        ):
            new = [getattr(graph, field) for field in fields]
            torch._foreach_copy_(
                [getattr(own, field)[: len(t)] for field, t in zip(fields, new, strict=True)], new
            )
        own.atomic_numbers[n:], own.charge_spin[1:] = graph.atomic_numbers[0], graph.charge_spin[0]
        if e < edges:  # what the structure before has left
            ends = n + _added_ends(e, edges, own.num_edges, own.num_atoms - n, DIGITS, own.source.device)
            own.source[e:edges], own.destination[e:edges], own.shift[e:edges] = ends, ends, 1.0


def pad(graph: Graph, cutoff: float, structures: int = 1, digits: int = DIGITS) -> Graph:
    """Add structures so that the numbers of atoms and edges are among few.

    The first one has atoms of the first element met; each edge joins an atom to an image of itself beyond the cutoff,
    so that it has no energy. Further ones are empty. Nothing of them touches the other structures.

    Args:
        graph: The graph.
        cutoff: Of the model, in Angstrom.
        structures: How many are added.
        digits: See `rounded_up`.
    """
    atoms, size = (
        rounded_up(graph.num_atoms + 1, digits) - graph.num_atoms,
        rounded_up(graph.num_edges, digits),
    )
    edges, device = size - graph.num_edges, graph.positions.device
    own = _added_ends(graph.num_edges, size, size, atoms, digits, device)
    extra = Graph(
        atomic_numbers=graph.atomic_numbers[:1].expand(atoms),
        positions=torch.zeros(atoms, 3, dtype=torch.float64, device=device),
        cell=(cutoff + 1) * torch.eye(3, dtype=torch.float64, device=device).expand(structures, 3, 3),
        structure=torch.zeros(atoms, dtype=torch.int64, device=device),
        source=own,
        destination=own,
        shift=torch.ones(edges, 3, dtype=torch.float64, device=device),
        charge_spin=graph.charge_spin[:1].expand(structures, 2),
    )
    return collate([graph, extra])


def _added_ends(
    first: int, last: int, size: int, atoms: int, digits: int, device: torch.device
) -> torch.Tensor:
    """Which of the added atoms the edges from ``first`` (as many are not added) to ``last`` belong to.

    Ascending, and spread evenly over the atoms where most edges are added. The place of an edge decides, not how many
    there are, so that one structure can take the place of another.
    """
    unit = _unit(first, digits)
    return (torch.arange(first, last, device=device) - (size - unit)) * atoms // unit


def rounded_up(n: int, digits: int = DIGITS) -> int:
    """The next number with so many binary digits and zeros after them; with six larger by at most 1/32."""
    unit = _unit(n, digits)
    return -(-n // unit) * unit


def _unit(n: int, digits: int) -> int:
    return 1 << max(n.bit_length() - digits, 0)
