"""DPA4 model for NVIDIA's ALCHEMI Toolkit (nvalchemi), which simulates batches of structures on a GPU."""

from collections import OrderedDict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpa4.data.charge_spin import whole_numbers
from dpa4.execution.evaluator import Evaluator
from dpa4.graph import Graph
from dpa4.interfaces.batches import BatchGraphs
from dpa4.interfaces.loading import Model, load_model
from dpa4.potential.precision import Precision
from dpa4.system import Lock, choose_device, own_settings, require

require("nvalchemi", "nvalchemi")
from nvalchemi.data import AtomicData, Batch  # noqa: E402
from nvalchemi.models.base import BaseModelMixin, ModelConfig  # noqa: E402


class DPA4Wrapper(nn.Module, BaseModelMixin):
    """Model of the ALCHEMI Toolkit with energies, forces and stresses of a DPA4 potential.

    The wrapper searches the neighbours itself, so that no neighbour-list hook is needed. Use data in float64: the
    toolkit converts all results to the precision of the positions. In a batch that holds molecules and crystals, give
    the molecules a cell of zeros: the toolkit leaves out the cells of all structures if the first has none.

    Models conditioned on charge and spin read ``charge`` (e) and ``spin`` (the multiplicity 2S + 1) of the data.

    Attributes:
        potential: The potential.
        model_config: Capabilities of the model, and the outputs to compute.

    Example:
        Energies and forces of several structures:

            model = DPA4Wrapper("run/best.safetensors")
            data = [AtomicData.from_atoms(atoms, dtype=torch.float64) for atoms in structures]
            results = model(Batch.from_data_list(data, device=model.device))
    """

    @own_settings
    def __init__(
        self,
        model: Model,
        device: str | torch.device = "auto",
        dtype: Literal["float32", "float64"] = "float32",
        branch: str | None = None,
        precision: Precision = "high",
        compile: bool | None = None,
    ):
        """Load the model.

        Args:
            model: Model file (of dpa4 or deepmd-kit) or a ``Potential``, which is copied.
            device: Device for the computation, such as "cpu" or "cuda". "auto" selects a GPU if one is available.
            dtype: Precision of the network.
            branch: Branch of a multitask deepmd-kit checkpoint.
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
        self.potential = load_model(model, choose_device(device), dtype, precision, branch)
        outputs = frozenset({"energy", "forces", "stress"})
        # Forces and stresses are computed inside of `forward`, so the toolkit has to differentiate nothing.
        self.model_config = ModelConfig(
            outputs=outputs,
            optional_inputs=frozenset({"cell", "pbc", "charge", "spin"}),
            supports_pbc=True,
        )
        self._evaluator = Evaluator(self.potential, compile)
        self._graphs = BatchGraphs([self.potential])

    @property
    def device(self) -> torch.device:
        """Device of the potential."""
        return self.potential.device

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the embeddings: the invariant features of each atom."""
        return {"node_embeddings": (self.potential.config.channels,)}

    def direct_derivative_keys(self) -> set[str]:
        """Outputs that pipelines need not differentiate for."""
        return {"forces", "stress"}

    @own_settings
    def forward(self, data: AtomicData | Batch, **kwargs: Any) -> "OrderedDict[str, Tensor | None]":
        """Evaluate all structures at once.

        Args:
            data: Batch of B structures with N atoms, or one structure; not modified.
            **kwargs: Not used.

        Returns:
            The active outputs among ``energy`` (B, 1) in eV, ``forces`` (N, 3) in eV/Angstrom, and ``stress``
            (B, 3, 3) in eV/Angstrom^3, positive under tension. The stress is NaN for structures that are not periodic
            along all three axes. All tensors are detached and have device and dtype of the positions.

        Raises:
            ValueError: If an element, a charge or a spin is not supported by the model; if a position is not finite
                or atoms coincide; or if a periodic axis has no cell vector.
        """
        batch = _as_batch(data)
        with self._lock:  # checks are stored between calls
            graph, periodic = self._graph(batch)
            prediction = self._evaluator(graph)
        volume = torch.linalg.det(graph.cell).abs().masked_fill(~periodic, torch.nan).reshape(-1, 1, 1)
        results = {
            "energy": prediction.energy.reshape(-1, 1),
            "forces": prediction.forces,
            "stress": -prediction.virial / volume,
        }
        active = sorted(BaseModelMixin.output_data(self))
        return OrderedDict((name, results[name].detach().to(batch.positions)) for name in active)

    @own_settings
    def compute_embeddings(self, data: AtomicData | Batch, **kwargs: Any) -> AtomicData | Batch:
        """Attach the invariant features of every atom, (N, C), as ``node_embeddings``."""
        batch = _as_batch(data)
        with self._lock, torch.no_grad():
            graph, _ = self._graph(batch)
            features = self.potential.descriptor(graph).to(batch.positions)
        if isinstance(data, Batch):
            data.add_key("node_embeddings", list(features.split(data.num_nodes_list)), overwrite=True)
        else:
            data.add_node_property("node_embeddings", features)
        return data

    def _graph(self, batch: Batch) -> tuple[Graph, Tensor]:
        """Graph of a batch, and whether each structure is periodic along all three axes (B,)."""
        count, device = batch.num_graphs, self.device
        # A batch of molecules has neither of the two.
        cell, pbc = getattr(batch, "cell", None), getattr(batch, "pbc", None)
        cell = torch.zeros(count, 3, 3) if cell is None else cell.detach()
        pbc = (torch.zeros(count, 3, dtype=torch.bool) if pbc is None else pbc).to(device)
        graph = self._graphs.build(
            batch.atomic_numbers.to(device).long(),
            batch.positions.detach().to(device).double(),
            cell.to(device).double().contiguous(),
            pbc,
            batch.batch_idx.to(device).long(),
            self._charges_and_spins(batch),
        )
        return graph, pbc.all(dim=-1)

    def _charges_and_spins(self, batch: Batch) -> Tensor:
        """Charge and multiplicity of each structure, (B, 2) int64."""
        config = self.potential.config
        default = config.default_charge_spin if config.charge_spin else (0, 1)
        columns = []
        for index, name in enumerate(("charge", "spin")):
            values = getattr(batch, name, None) if config.charge_spin else None
            if values is not None:
                found = whole_numbers(values.detach().cpu().numpy().reshape(-1), name)
                columns.append(torch.from_numpy(found))
            elif default is not None:
                columns.append(torch.full((batch.num_graphs,), default[index]))
            else:
                raise ValueError(
                    f"the model is conditioned on charge and spin without a default; give each structure a {name}"
                )
        return torch.stack(columns, dim=1).to(self.device)


def _as_batch(data: AtomicData | Batch) -> Batch:
    return data if isinstance(data, Batch) else Batch.from_data_list([data])
