"""DPA4 model for TorchSim, which relaxes or simulates many structures with one evaluation per step.

Supports TorchSim 0.6, which needs Python 3.12, and TorchSim 0.3, the last version for Python 3.11.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dpa4.data.charge_spin import (
    CHARGE_NAMES,
    SPIN_NAMES,
    is_look_alike,
    warn_of_unused,
    whole_numbers,
)
from dpa4.execution.evaluator import Evaluator
from dpa4.graph import Graph, within_cutoff
from dpa4.interfaces.batches import BatchGraphs
from dpa4.interfaces.loading import Model, load_model, members_of
from dpa4.potential import Prediction
from dpa4.potential.committee import check_one_charge_spin
from dpa4.potential.precision import Precision
from dpa4.system import Lock, choose_device, own_settings, require

require("torch_sim", "torchsim")
from torch_sim.models.interface import ModelInterface  # noqa: E402
from torch_sim.state import SimState  # noqa: E402
from torch_sim.typing import MemoryScaling  # noqa: E402

COUNTS_EDGES = "n_edges" in get_args(MemoryScaling)  # false for TorchSim 0.3
EXTRAS = {"total_charge": CHARGE_NAMES, "total_spin": SPIN_NAMES}  # usual and all names of extras of a state


class DPA4Model(ModelInterface):
    """TorchSim model with the energies, forces and stresses of a DPA4 potential, or their means over a committee.

    States are in float64, whatever the precision of the network. Positions and energies of large structures need
    this precision, and it costs little.

    Models conditioned on charge and spin read two system extras of the state, which need TorchSim 0.6:
    ``total_charge`` (or ``charge``), in e, and ``total_spin`` (or ``spin``), the multiplicity 2S + 1;
    docs/conventions.md lists further names. The attribute ``charge_spin`` replaces missing extras.

    If the model file describes its training data, the model warns once about elements absent from these data, and
    once about atoms closer together than in these data.

    Attributes:
        potential: The potential, or the first member of a committee.
        potentials: All members.
        cutoff: Cutoff of the potential, in Angstrom; the largest one of a committee.
        charge_spin: Charge and multiplicity of structures without these extras; None raises an error for them.

    Example:
        Energies and forces of several structures:

            model = DPA4Model("run/best.safetensors")
            state = torch_sim.initialize_state(ase.io.read("start.xyz", ":"), model.device, model.dtype)
            results = model(state)
    """

    @own_settings
    def __init__(
        self,
        model: Model | Sequence[Model],
        device: str | torch.device = "auto",
        dtype: Literal["float32", "float64"] = "float32",
        branch: str | None = None,
        compute_forces: bool = True,
        compute_stress: bool = True,
        precision: Precision = "high",
        compile: bool | None = None,
    ):
        """Load the model.

        Args:
            model: Model file (of dpa4 or deepmd-kit) or a ``Potential``, which is copied. For a committee: a list
                of these, or the output folder of ``dpa4 train --committee``.
            device: Device for the computation, such as "cpu" or "cuda". "auto" selects a GPU if one is available.
            dtype: Precision of the network.
            branch: Branch of a multitask deepmd-kit checkpoint.
            compute_forces: Include forces in the results.
            compute_stress: Include stresses in the results.
            precision: "high" has the accuracy of ``dtype``. "fast" uses bfloat16 matrix products in the interaction
                blocks, for screening.
            compile: Compile the potential at the first calculation. None compiles on a GPU in float32 only. If
                compilation fails, a warning is issued and eager mode is used.

        Raises:
            FileNotFoundError: If the model file does not exist.
            RuntimeError: If ``device`` is a GPU and none is available.
            ValueError: If an argument is not allowed or the model cannot be read.
        """
        super().__init__()
        self._lock = Lock()
        self._device = choose_device(device)
        self._dtype = torch.float64
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        self._memory_scales_with = "n_edges" if COUNTS_EDGES else "n_atoms_x_density"
        self.potentials = [load_model(m, self._device, dtype, precision, branch) for m in members_of(model)]
        check_one_charge_spin(self.potentials)
        # Modules of this module, so that all weights are found where PyTorch looks for them.
        self.potential, self._others = self.potentials[0], torch.nn.ModuleList(self.potentials[1:])
        self.cutoff = max(p.config.cutoff for p in self.potentials)
        self.charge_spin = self.potential.config.default_charge_spin
        self._evaluators = [Evaluator(potential, compile) for potential in self.potentials]
        self.last_graph: Graph | None = None  # of the latest call; saves a neighbour search after it
        self._graphs = BatchGraphs(self.potentials)
        self._unused: set[str] = set()  # extras of states that were warned of

    @ModelInterface.compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        """Include forces in the results."""
        self._compute_forces = value

    @ModelInterface.compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        """Include stresses in the results."""
        self._compute_stress = value

    def autobatching(self, max_edges: float) -> dict[str, Any]:
        """Return arguments that limit TorchSim's autobatchers to a number of edges per batch.

        With a fixed limit, an autobatcher need not find the largest batch by running out of memory. TorchSim 0.3 does
        not count edges. Its limit is atoms times density, set to the value of a homogeneous structure with
        ``max_edges`` edges.

        Args:
            max_edges: Maximum number of edges in a batch.

        Returns:
            Keyword arguments for ``InFlightAutoBatcher`` and ``BinningAutoBatcher``.
        """
        if COUNTS_EDGES:
            return {
                "memory_scales_with": "n_edges",
                "cutoff": self.cutoff,
                "max_memory_scaler": float(max_edges),
            }
        # Neighbours of an atom at TorchSim's unit of density, one atom per cubic nanometre.
        neighbors = 4 / 3 * math.pi * self.cutoff**3 / 1000
        return {"memory_scales_with": "n_atoms_x_density", "max_memory_scaler": max_edges / neighbors}

    @own_settings
    def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Evaluate all systems of a state at once.

        Args:
            state: ``SimState`` with B systems and N atoms; not modified.
            **kwargs: Not used.

        Returns:
            ``energy`` (B,) in eV, ``energies`` of the atoms (N,) in eV, ``forces`` (N, 3) in eV/Angstrom, and
            ``stress`` (B, 3, 3) in eV/Angstrom^3, positive under tension. The stress is NaN unless the systems are
            periodic along all three axes. All tensors are detached and have the dtype of the positions. A committee
            has the standard deviations ``energy_std``, ``forces_std`` and ``stress_std`` as well.

        Raises:
            ValueError: If an element, a charge or a spin is not supported by the model; if a position is not finite
                or atoms coincide; or if a periodic axis has no cell vector.
        """
        if isinstance(state, dict):  # allowed by TorchSim 0.3
            state = SimState(**state)
        periodic = torch.as_tensor(state.pbc, dtype=torch.bool).cpu().expand(3)
        with self._lock:  # graph and checks are stored between calls
            graph = self._graph(state, periodic)
            volume = torch.linalg.det(graph.cell).abs() if periodic.all() else graph.cell.new_tensor(math.nan)
            cutoffs = [potential.config.cutoff for potential in self.potentials]
            graphs = [graph if c == self.cutoff else within_cutoff(graph, c) for c in cutoffs]
            members = [
                self._results(evaluate(own), volume)
                for evaluate, own in zip(self._evaluators, graphs, strict=True)
            ]
        results = members[0]
        if len(members) > 1:
            stacked = {name: torch.stack([member[name] for member in members]) for name in results}
            results = {name: values.mean(0) for name, values in stacked.items()}
            results |= {f"{n}_std": v.std(0, correction=0) for n, v in stacked.items() if n != "energies"}
        return {name: values.to(state.positions.dtype) for name, values in results.items()}

    def _results(self, prediction: Prediction, volume: Tensor) -> dict[str, Tensor]:
        """Results of one member; ``volume`` (B,) in cubic Angstrom, NaN unless periodic."""
        results = {"energy": prediction.energy, "energies": prediction.atomic_energies}
        if self._compute_forces:
            results["forces"] = prediction.forces
        if self._compute_stress:
            results["stress"] = -prediction.virial / volume.reshape(-1, 1, 1)
        return {name: values.detach() for name, values in results.items()}

    def _graph(self, state: Any, periodic: Tensor) -> Graph:
        """Build the graph of all systems on the device, and check the structures."""
        numbers, structure = state.atomic_numbers.long(), state.system_idx.long()
        positions, cell = state.positions.double(), state.row_vector_cell.double().contiguous()
        charge_spin = self._charges_and_spins(state, len(cell))
        pbc = periodic.expand(len(cell), 3)
        graph = self._graphs.build(numbers, positions, cell, pbc, structure, charge_spin)
        self.last_graph = graph
        return graph

    def _charges_and_spins(self, state: Any, systems: int) -> Tensor:
        """Charge and multiplicity of each system, (B, 2) int64."""
        if not self.potential.config.charge_spin:
            return torch.tensor([[0, 1]], device=self._device).expand(systems, 2)
        columns = []
        for index, (usual, names) in enumerate(EXTRAS.items()):
            found = {
                name: whole_numbers(values.detach().cpu().numpy().reshape(-1), name)
                for name in names
                if (values := getattr(state, name, None)) is not None
            }
            if not found:
                columns.append(self._default(index, usual, systems))
                continue
            first, *others = found
            if any(not np.array_equal(found[name], found[first]) for name in others):
                raise ValueError(
                    f"the extras {', '.join(found)} of the state disagree; remove all but one of them"
                )
            columns.append(torch.from_numpy(found[first]))
        self._warn_of_unused(state)
        return torch.stack(columns, dim=1).to(self._device)

    def _warn_of_unused(self, state: Any) -> None:
        """Warn once of extras that look like a charge or a spin, but are not read."""
        extras = {*vars(state), *(getattr(state, "system_extras", None) or {})}
        unused = {name for name in extras if is_look_alike(name)} - self._unused
        self._unused |= unused
        if unused:
            warn_of_unused(unused, "extras of the state")

    def _default(self, index: int, extra: str, systems: int) -> Tensor:
        """Charge (0) or multiplicity (1) of systems without the extra, (B,) int64."""
        if self.charge_spin is None:
            raise ValueError(
                f"the model is conditioned on charge and spin without a default; give each system a "
                f"{('charge', 'spin')[index]} as the extra {extra!r} of the state (TorchSim 0.6), or set "
                "model.charge_spin"
            )
        return torch.full((systems,), self.charge_spin[index])
