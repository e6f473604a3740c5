"""A potential for LAMMPS's ML-IAP on several MPI ranks.

The atoms of a rank are followed by ghosts, copies of atoms of this or another rank within the cutoff. They have no
edges of their own here, so what messages need of them is computed by their owner and copied (``forward_exchange``),
and derivatives go back the same way and are added up (``reverse_exchange``). A rank thus needs ghosts within one
cutoff, whatever the number of blocks.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor

from dpa4.execution.limits import KEEP_NOTHING, KEEP_POLICIES, MAX_COMPARED_ATOMS, can_be_compiled
from dpa4.graph import Graph, build_graph, first_atoms
from dpa4.interfaces.ase import Model, charge_spin_of, load_model
from dpa4.model.ghosts import Domain
from dpa4.ops.incidence import Incidence
from dpa4.system import keep_freed_memory


class DPA4MLIAP:
    """What ``lammps.mliap.load_unified_kokkos`` takes, for ``pair_style mliap unified EXISTS``.

    Has the methods and attributes of ``lammps.mliap.mliap_unified_abc.MLIAPUnified``. It computes where LAMMPS's data
    are: on the GPU of its rank, or on the CPU. Energies and pair forces are float64.

    Attributes:
        element_types: Elements of the model; ``pair_coeff * *`` is followed by those of the atom types.
    """

    def __init__(
        self,
        model: Model,
        dtype: Literal["float32", "float64"] = "float32",
        branch: str | None = None,
        info: Mapping[str, Any] | None = None,
        compile: bool = False,
    ):
        """Load the model.

        Args:
            model: Checkpoint (native or of deepmd-kit), or potential (copied).
            dtype: Precision of the network.
            branch: Branch of a multitask checkpoint of deepmd-kit.
            info: "charge" and "spin" (2S + 1) of the whole system, for models that look at them.
            compile: Compile in the first step, which takes up to a minute once per machine, and compare with eager
                mode on atoms of this rank. Eager mode stays, with a warning, if that deviates or fails.

        Raises:
            FileNotFoundError: If a checkpoint does not exist.
            ValueError: If an argument is not allowed, charge or spin is outside the model, or a checkpoint cannot be
                read.
        """
        self.potential = load_model(model, torch.device("cpu"), dtype, "high", branch)
        self.element_types = list(self.potential.elements)
        self.rcutfac = self.potential.config.cutoff / 2  # of the sum of two radii that are one
        self.ndescriptors = self.nparams = 1  # there are none, but 0 is not expected
        self.interface: Any = None  # LAMMPS puts itself here
        self._compile = compile
        self._numbers = torch.tensor([atomic_numbers[e] for e in self.element_types])
        pair = charge_spin_of(self.potential, Atoms(info=info))
        self._charge_spin = torch.tensor([pair])
        atom = build_graph(self._numbers[:1], [[0.0] * 3], torch.eye(3), [False] * 3, 1.0, pair)
        self.potential.check(atom)

    def compute_descriptors(self, data: Any) -> None:
        """Nothing; there are none."""

    def compute_gradients(self, data: Any) -> None:
        """Nothing; forces are computed at once."""

    def compute_forces(self, data: Any) -> None:
        """Give LAMMPS the energies of the atoms of this rank, their sum, and the derivatives by its pair vectors.

        All ranks must call it, also those without atoms.

        Raises:
            RuntimeError: If LAMMPS does not exchange features, as without Kokkos.
        """
        if not hasattr(data, "forward_exchange"):
            raise RuntimeError(
                "this LAMMPS cannot exchange features of ghost atoms; it takes a version of July 2025 or later with "
                "ML-IAP and Kokkos, run with '-k on -sf kk'. On one rank, 'dpa4 lammps' needs neither"
            )
        with torch.autograd.set_multithreading_enabled(False):  # MPI is called in derivatives, too
            self._compute(data)

    def _compute(self, data: Any) -> None:
        if data.ntotal:  # else the device is unknown and does not matter
            self._move(torch.as_tensor(data.elems).device)
        device = self._numbers.device
        _wait(device)
        elements = _tensor(data.elems, data.ntotal, device, torch.int64)
        order, source, destination = self._edges(data, elements)
        rij = _tensor(data.rij, data.npairs, device, torch.float64, 3)
        if self._compile:
            self._prepare(self._numbers[elements[: data.nlocal]], rij[order], source, destination)
        vectors = rij[order].requires_grad_()
        energies = self.potential.domain_energies(
            self._numbers[elements],
            vectors,
            Incidence.of(source, data.ntotal),
            Incidence.of_sorted(destination, data.nlocal),
            self._charge_spin.expand(data.ntotal, 2),
            _Rank(data),
        )
        (gradient,) = torch.autograd.grad(energies.sum(), vectors)
        pair_forces = torch.zeros_like(rij)
        pair_forces[order] = gradient
        energies = energies.detach()
        data.energy = float(energies.sum())
        _wait(device)
        if data.nlocal:
            torch.as_tensor(data.eatoms)[: data.nlocal].copy_(energies)
        if data.npairs:
            data.update_pair_forces(pair_forces)
        _wait(device)

    def _move(self, device: torch.device) -> None:
        keep_freed_memory(device)
        if device != self._numbers.device:
            self.potential.to(device)
            self._numbers, self._charge_spin = self._numbers.to(device), self._charge_spin.to(device)

    def _prepare(self, numbers: Tensor, vectors: Tensor, source: Tensor, destination: Tensor) -> None:
        """Compile if there are atoms to compare with eager mode on: own ones and the edges between them."""
        from dpa4.execution import regions, trial  # takes a second to import

        keep = source < len(numbers)
        graph = Graph(
            atomic_numbers=numbers,
            positions=vectors.new_zeros(len(numbers), 3),
            cell=torch.eye(3, dtype=torch.float64, device=vectors.device)[None],
            structure=torch.zeros_like(numbers),
            source=source[keep],
            destination=destination[keep],
            shift=vectors[keep],  # in a cell of length one, around atoms in one place
            charge_spin=self._charge_spin,
        )
        graph = first_atoms(graph, MAX_COMPARED_ATOMS)
        if not can_be_compiled(graph):
            return
        self._compile = False

        def work() -> dict[str, float]:
            # The code that keeps nothing for the derivatives is the code for centres that are not all nodes.
            regions.compile_potential(self.potential, kept=KEEP_POLICIES[KEEP_NOTHING])
            return trial.compared(self.potential, graph)

        trial.attempt(self.potential, work, _warn)

    def _edges(self, data: Any, elements: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs that are edges, in the order of their centres, and their sources and centres."""
        centers = _tensor(data.pair_i, data.npairs, elements.device, torch.int64)
        neighbors = _tensor(data.pair_j, data.npairs, elements.device, torch.int64)
        order = torch.argsort(centers, stable=True)
        centers, neighbors = centers[order], neighbors[order]
        if self.potential.config.excluded_pairs:
            keep = ~self.potential.excluded[elements[centers], elements[neighbors]]
            order, centers, neighbors = order[keep], centers[keep], neighbors[keep]
        return order, neighbors, centers


def _warn(error: Exception) -> None:
    from dpa4.execution.trial import reason

    warnings.warn(
        f"compilation failed, so calculations go on in eager mode, right but slower ({reason(error)}); "
        "compile=False leaves it out",
        RuntimeWarning,
        stacklevel=5,
    )


class _Rank(Domain):
    """The atoms of one rank, followed by its ghosts."""

    def __init__(self, data: Any):
        self._data = data

    def own(self, x: Tensor) -> Tensor:
        """See `Domain`."""
        return x[: self._data.nlocal]

    def with_ghosts(self, x: Tensor) -> Tensor:
        """See `Domain`; all ranks must call it."""
        return _Exchange.apply(x, self._data)


class _Exchange(torch.autograd.Function):
    """Copies atoms to their ghosts; the derivative adds those of the ghosts to that of their atom."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, data: Any) -> Tensor:
        ctx.data = data
        padded = own.new_zeros(data.ntotal, *own.shape[1:])
        padded[: data.nlocal] = own
        return _exchanged(data.forward_exchange, padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(ctx.data.reverse_exchange, gradient)[: ctx.data.nlocal], None


def _exchanged(exchange: Any, x: Tensor) -> Tensor:
    """Result of an exchange of LAMMPS, which takes rows of numbers by their addresses."""
    rows = x.reshape(len(x), math.prod(x.shape[1:])).contiguous()
    result = torch.empty_like(rows)
    _wait(x.device)
    exchange(rows, result, rows.shape[1])
    _wait(x.device)
    return result.view(x.shape)


def _tensor(array: Any, length: int, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """A copy of an array of LAMMPS, which lies on the device; arrays of length zero may be absent."""
    if length == 0:
        return torch.zeros(0, *shape, dtype=dtype, device=device)
    return torch.as_tensor(array)[:length].to(dtype, copy=True)


def _wait(device: torch.device) -> None:
    """LAMMPS and PyTorch do not order their work on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
