"""DPA4 for TorchSim: many structures relaxed or simulated at once, in one evaluation per step.

Written for TorchSim 0.6, which needs Python 3.12, and for 0.3, the last for Python 3.11.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dpa4.data import CoverageMonitor
from dpa4.graph import Graph, build_graph, collate, neighbor_list_torch
from dpa4.potential.evaluator import Evaluator
from dpa4.simulation.calculator import Model, Precision, load_model
from dpa4.system import choose_device, require

require("torch_sim", "torchsim")
from torch_sim.models.interface import ModelInterface  # noqa: E402
from torch_sim.state import SimState  # noqa: E402
from torch_sim.typing import MemoryScaling  # noqa: E402

COUNTS_EDGES = "n_edges" in get_args(MemoryScaling)  # TorchSim 0.3 does not
NAMES = {"charge": ("total_charge", "charge"), "spin": ("total_spin", "spin")}  # of extras of a state


class DPA4Model(ModelInterface):
    """Energies, forces and stresses of a DPA4 potential for TorchSim.

    States are in float64, whatever the precision of the network: positions and energies of large structures need
    it, and it costs little.

    Models conditioned on charge and spin read the system extras ``total_charge`` (or ``charge``) in e and
    ``total_spin`` (or ``spin``), the multiplicity 2S + 1, of TorchSim 0.6. A state without them takes
    ``charge_spin``.

    A model that knows its training data warns, once, of elements that were not in them and of atoms closer than
    they were there.

    Attributes:
        potential: The potential.
        cutoff: Its cutoff, in Angstrom.
        charge_spin: Charge and multiplicity of structures whose state does not tell; None refuses them.
    """

    def __init__(
        self,
        model: Model,
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
            model: Checkpoint (native or of deepmd-kit) or potential (copied).
            device: Where to compute; "auto" takes CUDA when there is one.
            dtype: Precision of the network.
            branch: Branch of a multitask checkpoint of deepmd-kit.
            compute_forces: Hand out forces.
            compute_stress: Hand out stresses.
            precision: "high" is the accuracy of the dtype. "fast" multiplies in bfloat16 within the interaction
                blocks, for screening.
            compile: Compile at the first calculation; None does so on a GPU in float32. A failure is a warning, and
                eager mode goes on.

        Raises:
            FileNotFoundError: If a checkpoint does not exist.
            ValueError: If an argument is not allowed or a checkpoint cannot be read.
        """
        super().__init__()
        self._device = choose_device(device)
        self._dtype = torch.float64
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        self._memory_scales_with = "n_edges" if COUNTS_EDGES else "n_atoms_x_density"
        self.potential = load_model(model, self._device, dtype, precision, branch)
        self.cutoff = self.potential.config.cutoff
        self.charge_spin = self.potential.config.default_charge_spin
        self._evaluator = Evaluator(self.potential, compile)
        self.last_graph: Graph | None = None  # of the latest call; saves a neighbour search after it
        self._monitor = CoverageMonitor([self.potential.coverage], self._device)
        self._checked: tuple[Tensor, Tensor] | None = None  # atomic numbers, charges and spins

    @ModelInterface.compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        """Whether forces are handed out."""
        self._compute_forces = value

    @ModelInterface.compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        """Whether stresses are handed out."""
        self._compute_stress = value

    def autobatching(self, max_edges: float) -> dict[str, Any]:
        """Arguments that limit TorchSim's autobatchers to so many edges per batch, without trying what fits.

        TorchSim 0.3 does not count edges; there the limit is that of a homogeneous structure with so many.
        """
        if COUNTS_EDGES:
            return {
                "memory_scales_with": "n_edges",
                "cutoff": self.cutoff,
                "max_memory_scaler": float(max_edges),
            }
        neighbors = 4 / 3 * math.pi * self.cutoff**3 / 1000  # of an atom, at one atom per cubic nanometre
        return {"memory_scales_with": "n_atoms_x_density", "max_memory_scaler": max_edges / neighbors}

    def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Evaluate all systems of a state at once.

        Args:
            state: ``SimState``; not changed.
            **kwargs: Not used.

        Returns:
            ``energy`` (B,) and ``energies`` of the atoms (N,) in eV, ``forces`` (N, 3) in eV/Angstrom, and
            ``stress`` (B, 3, 3) in eV/Angstrom^3, positive under tension, not a number unless the systems are
            periodic along all three axes. All detached, in the precision of the positions.

        Raises:
            ValueError: If an element, a charge or a spin is outside the model, a position is not finite, atoms
                coincide, or a periodic axis has no cell vector.
        """
        if isinstance(state, dict):  # TorchSim 0.3 allows it
            state = SimState(**state)
        periodic = torch.as_tensor(state.pbc, dtype=torch.bool).cpu().expand(3)
        graph = self._graph(state, periodic)
        prediction = self._evaluator(graph)
        results = {"energy": prediction.energy, "energies": prediction.atomic_energies}
        if self._compute_forces:
            results["forces"] = prediction.forces
        if self._compute_stress:
            volume = torch.linalg.det(graph.cell).abs() if periodic.all() else graph.cell.new_tensor(math.nan)
            results["stress"] = -prediction.virial / volume.reshape(-1, 1, 1)
        return {name: values.detach().to(state.positions.dtype) for name, values in results.items()}

    def _graph(self, state: Any, periodic: Tensor) -> Graph:
        """Graph of all systems, on the device; refuses what the model does not know."""
        numbers, structure = state.atomic_numbers.long(), state.system_idx.long()
        positions, cell = state.positions.double(), state.row_vector_cell.double().contiguous()
        charge_spin = self._charges_and_spins(state, len(cell))
        if positions.is_cuda:
            pbc = periodic.expand(len(cell), 3)
            edges = neighbor_list_torch(positions, cell, pbc, self.cutoff, structure)
            graph = Graph(numbers, positions, cell, structure, *edges, charge_spin)
        else:
            sizes = structure.bincount(minlength=len(cell)).tolist()
            systems = zip(numbers.split(sizes), positions.split(sizes), cell, strict=True)
            graphs = [build_graph(z, r, rows, periodic, self.cutoff) for z, r, rows in systems]
            graph = collate(graphs)._replace(charge_spin=charge_spin)
        self.last_graph = graph
        known = self._checked
        if known is None or not (torch.equal(numbers, known[0]) and torch.equal(charge_spin, known[1])):
            self.potential.check(graph)
            self._monitor.elements(numbers)
            self._checked = numbers.clone(), charge_spin
        self._monitor.look(graph)
        self._monitor.report()  # at once: results stay on the device, which nothing below waits for
        return graph

    def _charges_and_spins(self, state: Any, systems: int) -> Tensor:
        """Charge and multiplicity of each system (B, 2) int64."""
        if not self.potential.config.charge_spin:
            return torch.tensor([[0, 1]], device=self._device).expand(systems, 2)
        columns = []
        for index, (what, names) in enumerate(NAMES.items()):
            found = [v for name in names if (v := getattr(state, name, None)) is not None]
            if found:
                values = found[0].reshape(-1).double()
            elif self.charge_spin is not None:
                values = torch.full((systems,), float(self.charge_spin[index]), device=self._device)
            else:
                raise ValueError(
                    f"the model is conditioned on charge and spin without a default; give each system a {what} as "
                    f"the extra {names[0]!r} of the state (TorchSim 0.6), or set charge_spin of the model"
                )
            if not torch.equal(values, values.round()):
                raise ValueError(
                    f"charge and spin (2S + 1) must be whole numbers, got {what} {values.tolist()}"
                )
            columns.append(values.long())
        return torch.stack(columns, dim=1)
