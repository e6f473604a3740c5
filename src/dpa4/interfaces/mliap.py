"""Potential for the ML-IAP interface of LAMMPS, on any number of MPI ranks.

The atoms of a rank are followed by ghosts: copies, within the cutoff, of atoms of this or another rank. Ghosts have
no edges on this rank. The rank that owns an atom therefore computes the features that messages need, and copies them
to the ghosts of the atom (``forward_exchange``). Derivatives are sent back to the owner and summed
(``reverse_exchange``). Ghosts within one cutoff thus suffice, whatever the number of blocks.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor

from dpa4.data.charge_spin import unused_names, warn_of_unused
from dpa4.execution.limits import KEEP_NOTHING, KEEP_POLICIES, MAX_COMPARED_ATOMS, can_be_compiled
from dpa4.graph import Graph, build_graph, first_atoms
from dpa4.interfaces.loading import Model, charge_spin_of, load_model
from dpa4.model.ghosts import Domain
from dpa4.ops.incidence import Incidence
from dpa4.system import keep_freed_memory, own_settings


class DPA4MLIAP:
    """Potential for ``pair_style mliap unified EXISTS`` of LAMMPS, passed to ``lammps.mliap.load_unified_kokkos``.

    The class has the methods and attributes of ``lammps.mliap.mliap_unified_abc.MLIAPUnified``. The computation runs
    on the device that holds the data of LAMMPS: the GPU of the rank, or the CPU. Energies and pair forces are in
    float64.

    Attributes:
        element_types: Elements of the model. In the input script, ``pair_coeff * *`` is followed by the element of
            each atom type.

    Example:
        One MPI rank of a run, with ``pair_style mliap unified EXISTS 0`` in the input script:

            lmp = lammps.lammps(cmdargs="-k on g 1 -sf kk -pk kokkos newton on neigh half".split())
            lammps.mliap.activate_mliappy_kokkos(lmp)
            lammps.mliap.load_unified_kokkos(DPA4MLIAP("run/best.safetensors"))
            lmp.file("in.lmp")
    """

    @own_settings
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
            model: Model file (of dpa4 or deepmd-kit) or a ``Potential``, which is copied.
            dtype: Precision of the network and of the features that ranks exchange.
            branch: Branch of a multitask deepmd-kit checkpoint.
            info: "charge" (e) and "spin" (multiplicity 2S + 1) of the whole system, for models conditioned on them.
            compile: Compile the potential in the first step, which takes up to a minute once per machine, and compare
                it with eager mode on atoms of this rank. If compilation fails or its results deviate, a warning is
                issued and eager mode is used.

        Raises:
            FileNotFoundError: If the model file does not exist.
            ValueError: If an argument is not allowed, charge or spin is not supported by the model, or the file
                cannot be read.
        """
        self.potential = load_model(model, torch.device("cpu"), dtype, "high", branch)
        self.element_types = list(self.potential.elements)
        self.rcutfac = self.potential.config.cutoff / 2  # LAMMPS multiplies it by the sum of two radii of 1
        self.ndescriptors = self.nparams = 1  # unused, but LAMMPS does not expect 0
        self.interface: Any = None  # set by LAMMPS
        self._compile = compile
        self._numbers = torch.tensor([atomic_numbers[e] for e in self.element_types])
        pair = charge_spin_of(self.potential, Atoms(info=info))
        if self.potential.config.charge_spin and (unused := unused_names(info or {})):
            warn_of_unused(unused, "info")
        self._charge_spin = torch.tensor([pair])
        atom = build_graph(self._numbers[:1], [[0.0] * 3], torch.eye(3), [False] * 3, 1.0, pair)
        self.potential.check(atom)

    def compute_descriptors(self, data: Any) -> None:
        """Do nothing; LAMMPS needs no descriptors of this potential."""

    def compute_gradients(self, data: Any) -> None:
        """Do nothing; `compute_forces` computes energies and forces together."""

    @own_settings
    def compute_forces(self, data: Any) -> None:
        """Pass energies and pair forces to LAMMPS, which calls this method in every step.

        Sets the atomic energies of this rank, their sum, and the derivatives of the energy with respect to the pair
        vectors of LAMMPS. All ranks must call the method, even those without atoms.

        Args:
            data: ML-IAP data of LAMMPS for this rank.

        Raises:
            RuntimeError: If this LAMMPS cannot exchange features, for example because it runs without Kokkos.
        """
        if not hasattr(data, "forward_exchange"):
            raise RuntimeError(
                "this LAMMPS cannot exchange features of ghost atoms; use a version of July 2025 or later with "
                "ML-IAP and Kokkos, run with '-k on -sf kk'. On one rank, 'dpa4 lammps' needs neither"
            )
        with (
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),
        ):  # backward passes call MPI
            self._compute(data)

    def _compute(self, data: Any) -> None:
        if data.ntotal:  # without atoms the device is unknown and irrelevant
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
        """Compile the potential and compare it with eager mode, if this rank has atoms to compare on.

        The comparison uses atoms of this rank and the edges between them, so it needs no exchange with other ranks.
        Eager mode is restored, with a warning, if compilation fails or its results deviate.
        """
        from dpa4.execution import regions, trial  # takes a second to import

        keep = source < len(numbers)
        # All positions are zero and the cell is the identity, so shifts are edge vectors.
        graph = Graph(
            atomic_numbers=numbers,
            positions=vectors.new_zeros(len(numbers), 3),
            cell=torch.eye(3, dtype=torch.float64, device=vectors.device)[None],
            structure=torch.zeros_like(numbers),
            source=source[keep],
            destination=destination[keep],
            shift=vectors[keep],
            charge_spin=self._charge_spin,
        )
        graph = first_atoms(graph, MAX_COMPARED_ATOMS)
        if not can_be_compiled(graph):
            return
        self._compile = False

        def work() -> dict[str, float]:
            # The last policy saves nothing for the backward pass. It is the code for graphs whose centres are only
            # part of the nodes, as on a rank with ghosts.
            regions.compile_potential(self.potential, kept=KEEP_POLICIES[KEEP_NOTHING])
            return trial.require_agreement(self.potential, graph)

        trial.attempt(self.potential, work, trial.warn_of_eager_mode)

    def _edges(self, data: Any, elements: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Edges among the pairs of LAMMPS, sorted by their centres.

        Returns:
            Index of the pair, source and centre of each edge, (E,) each.
        """
        centers = _tensor(data.pair_i, data.npairs, elements.device, torch.int64)
        neighbors = _tensor(data.pair_j, data.npairs, elements.device, torch.int64)
        order = torch.argsort(centers, stable=True)
        centers, neighbors = centers[order], neighbors[order]
        if self.potential.config.excluded_pairs:
            keep = ~self.potential.excluded[elements[centers], elements[neighbors]]
            order, centers, neighbors = order[keep], centers[keep], neighbors[keep]
        return order, neighbors, centers


class _Rank(Domain):
    """Atoms of one rank, followed by its ghosts."""

    def __init__(self, data: Any):
        self._data = data

    def own(self, x: Tensor) -> Tensor:
        """See `Domain`."""
        return x[: self._data.nlocal]

    def with_ghosts(self, x: Tensor) -> Tensor:
        """See `Domain`; all ranks must call this method."""
        return _Exchange.apply(x, self._data)


class _Exchange(torch.autograd.Function):
    """Copy of atoms to their ghosts; the backward pass adds the gradients of the ghosts to those of their atoms."""

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
    """Call an exchange function of LAMMPS, which reads and writes contiguous rows in memory."""
    rows = x.reshape(len(x), math.prod(x.shape[1:])).contiguous()
    result = torch.empty_like(rows)
    _wait(x.device)
    exchange(rows, result, rows.shape[1])
    _wait(x.device)
    return result.view(x.shape)


def _tensor(array: Any, length: int, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Copy an array of LAMMPS, which is on the device; arrays of length zero may be None."""
    if length == 0:
        return torch.zeros(0, *shape, dtype=dtype, device=device)
    return torch.as_tensor(array)[:length].to(dtype, copy=True)


def _wait(device: torch.device) -> None:
    """Wait for a GPU: LAMMPS and PyTorch do not order their work there with respect to each other."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
