"""Comparison of a potential with results of deepmd-kit, for the large collection and for the shipped files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpa4.graph import Graph, build_graph, collate
from dpa4.potential import Potential, load_potential
from dpa4.potential.deepmd.names import deepmd_name
from helpers import SHARED

Arrays = Mapping[str, np.ndarray]
FIXTURES = (SHARED / "reference" / "fixtures", SHARED / "reference" / "fixtures-gen3")
"""Folders of the large reference collection."""


def collection() -> dict[str, Any]:
    """Description of every model of the large reference collection, empty where the collection is absent."""
    indices = [folder / "index.json" for folder in FIXTURES]
    return {name: entry for i in indices if i.exists() for name, entry in json.loads(i.read_text()).items()}


def folder_of(name: str) -> Path:
    """Folder of a model of the large reference collection."""
    return next(folder / name for folder in FIXTURES if (folder / name).exists())


@dataclass(frozen=True)
class ParityCase:
    """A checkpoint of deepmd-kit and the results of deepmd-kit, per structure and quantity."""

    name: str
    checkpoint: Path
    structures: Mapping[str, Arrays]
    charge_spin: tuple[float, float] | None = None  # None: the default of the model
    tolerance: float = 1e-9  # in float64, relative to the largest value, or to 1 where all are smaller

    def load(self, dtype: torch.dtype | None = None) -> Potential:
        return load_potential(self.checkpoint, dtype=dtype)

    def graph(self, structure: str, potential: Potential) -> Graph:
        reference = self.structures[structure]
        charge, spin = self.charge_spin or potential.config.default_charge_spin or (0, 1)
        pbc = np.broadcast_to(reference["pbc"], 3).astype(bool)
        return build_graph(
            reference["Z"], reference["pos"], reference["cell"].reshape(3, 3), pbc, potential.config.cutoff,
            (int(charge), int(spin)),
        )  # fmt: skip


def case_of(name: str) -> ParityCase:
    """A model of the large reference collection."""
    found: dict[str, dict[str, np.ndarray]] = {}
    folder = folder_of(name)
    with np.load(folder / "ref.npz") as file:
        for key in file.files:
            structure, quantity = key.split("/")
            found.setdefault(structure, {})[quantity] = file[key]
    entry = collection()[name]
    tolerance = entry.get("absolute_tolerance_f64", 1e-9)
    return ParityCase(name, folder / "model_f32.pt", found, entry.get("charge_spin"), tolerance)


@dataclass(frozen=True)
class Deviation:
    """Difference from the reference of one quantity of one structure."""

    quantity: str
    structure: str
    difference: float  # largest absolute one
    largest: float  # largest absolute reference value
    atoms: int

    def assert_at_most(self, tolerance: float) -> None:
        assert self.difference <= tolerance, f"{self.quantity} of {self.structure}: {self.difference:.2e}"


def results(potential: Potential, graphs: Sequence[Graph]) -> list[dict[str, torch.Tensor]]:
    """Results of every structure, by quantity, from one batch of all structures."""
    batch = collate(graphs)
    prediction = potential(batch)
    with torch.no_grad():
        descriptor = potential.descriptor(batch)
    counts = [graph.num_atoms for graph in graphs]
    of_atoms = {
        "atom_energy": prediction.atomic_energies,
        "forces": prediction.forces,
        "descriptor": descriptor,
    }
    found = [
        {"energy": energy, "virial": virial}
        for energy, virial in zip(prediction.energy, prediction.virial, strict=True)
    ]
    for quantity, values in of_atoms.items():
        for result, own in zip(found, values.split(counts), strict=True):
            result[quantity] = own
    return found


def unchanged(potential: Potential) -> None:
    """Leave a potential as it was loaded."""


def deviations(
    case: ParityCase,
    dtype: torch.dtype,
    in_a_batch: bool,
    prepare: Callable[[Potential], object] = unchanged,
) -> list[Deviation]:
    """Deviations of all quantities of all structures, computed in a batch or one by one.

    Args:
        case: The model.
        dtype: Floating-point type of the network.
        in_a_batch: True to evaluate all structures at once.
        prepare: Function that compiles or moves the potential.
    """
    potential = case.load(dtype)
    prepare(potential)
    graphs = [case.graph(structure, potential).to(potential.device) for structure in case.structures]
    batches = [graphs] if in_a_batch else [[graph] for graph in graphs]
    ours = [result for batch in batches for result in results(potential, batch)]
    found = []
    for (structure, reference), result in zip(case.structures.items(), ours, strict=True):
        for quantity, value in result.items():
            expected = np.asarray(reference[quantity], dtype=float).ravel()
            got = value.double().cpu().numpy().ravel()
            difference = float(np.abs(got - expected).max(initial=0))
            largest = float(np.abs(expected).max(initial=0))
            found.append(Deviation(quantity, structure, difference, largest, len(reference["Z"])))
    return found


def assert_float64(
    case: ParityCase, in_a_batch: bool = False, prepare: Callable[[Potential], object] = unchanged
) -> None:
    """Allow 1e-9 of the largest value, or of 1 (eV, eV/Angstrom) where all are smaller; observed: below 1e-11.

    A few models of the reference contain rounded constants, and have a larger tolerance of their own.
    """
    for deviation in deviations(case, torch.float64, in_a_batch, prepare):
        deviation.assert_at_most(case.tolerance * max(deviation.largest, 1.0))


def assert_float32(case: ParityCase, in_a_batch: bool = False) -> None:
    """Allow the rounding of a float32 network, which the random weights of the D series amplify.

    deepmd-kit 3.2.0 in float32 differs from its own float64 by up to 5e-7 eV in single atoms of the published
    sizes and by up to 1.6e-6 eV/atom in the D series (measured: D_fit_24_40). The order of operations differs
    here, and in a cell of one atom all edges are rounded alike (1.1e-6 eV). Forces of two atoms at 0.4 Angstrom
    differ by 3.2e-5 eV/Angstrom on an Intel processor with AVX-512, by less than 3e-5 on an AMD processor.

    In the E series, atoms have energies of up to 24 eV of both signs. Weights that are changed by as much as rounding
    to float32 changes energies by up to 4e-5 eV in float64 (measured: E_v0901_neo), hence the factor there.
    """
    per_atom = 5e-6 if case.name.startswith(("D_", "E_")) else 5e-7
    for deviation in deviations(case, torch.float32, in_a_batch):
        if deviation.quantity == "energy":
            scale = max(deviation.largest, 1.0) if case.name.startswith("E_") else 1.0
            deviation.assert_at_most(per_atom * deviation.atoms * scale + 1e-6)
        elif deviation.quantity == "forces":
            deviation.assert_at_most(5e-5 * max(deviation.largest / 10, 1.0))


def assert_parameter_gradients(
    case: ParityCase,
    structure: str,
    expected: Arrays,
    reduce: Callable[[np.ndarray], np.ndarray] = np.ravel,
) -> None:
    """Compare the gradients of ``L = E + sum(c * F)`` with respect to every parameter.

    Args:
        case: The model.
        structure: Name of one of its structures.
        expected: ``c``, ``L`` and, by the name of deepmd-kit, ``reduce`` of the gradient of every parameter.
        reduce: Function of the gradients that ``expected`` holds.
    """
    potential = case.load(torch.float64).train()
    result = potential(case.graph(structure, potential))
    coefficients = torch.from_numpy(expected["c"]).view_as(result.forces)
    loss = result.energy.sum() + (coefficients * result.forces).sum()
    assert loss.item() == pytest.approx(float(expected["L"]), rel=1e-10)
    loss.backward()
    scale = max(np.abs(value).max() for key, value in expected.items() if key not in ("c", "L"))
    for key, parameter in potential.model.named_parameters():
        reference = expected["model.Default.atomic_model." + deepmd_name(key, potential.config)]
        gradient = parameter.grad.numpy() if parameter.grad is not None else np.zeros(parameter.shape)
        difference = np.abs(reduce(gradient) - reference.ravel()).max()
        assert difference <= 1e-10 * scale, f"{key}: {difference:.2e}"
