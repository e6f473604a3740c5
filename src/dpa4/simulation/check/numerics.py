"""Checks of numbers: finite, the same in every precision, compiled, on a GPU, alone and in a batch."""

import warnings
from collections.abc import Callable, Iterable, Mapping

import torch

from dpa4.execution import limits
from dpa4.execution.evaluator import Evaluator
from dpa4.graph import Graph, collate
from dpa4.potential import Potential, Prediction
from dpa4.simulation.check.result import CheckResult, Figure

Graphs = Mapping[str, Graph]
Reference = Mapping[str, Prediction]
Method = Callable[[Graph], Prediction]

BATCH_TOLERANCE = 1e-10
GPU_TOLERANCE = 1e-9
FLOAT32_ENERGY, FLOAT32_FORCE = 1e-5, 1e-4
FAST_ENERGY = 0.02


def predict(potential: Method, graphs: Graphs, device: torch.device | None = None) -> dict[str, Prediction]:
    """Compute every structure alone; results on the CPU."""
    found = {}
    for name, graph in graphs.items():
        prediction = potential(graph if device is None else graph.to(device))
        found[name] = Prediction(*(part.detach().cpu() for part in prediction))
    return found


def check_finite(potential: Potential, graphs: Graphs) -> tuple[CheckResult, dict[str, Prediction]]:
    """Check that all numbers are finite and that nothing acts on an isolated atom; return the float64 reference."""
    reference = predict(potential, graphs)
    broken = [
        name
        for name, found in reference.items()
        if not all(bool(torch.isfinite(part).all()) for part in found)
    ]
    alone = [name for name, graph in graphs.items() if graph.num_atoms == 1]
    force = max((_largest(reference[name].forces) for name in alone), default=0.0)
    result = CheckResult(
        "finite numbers",
        f"{len(graphs)} structures in float64: {', '.join(graphs)}",
        (
            Figure("structures with NaN or infinity", len(broken), "", 0),
            Figure("force on a free atom", force, "eV/Å", 0),
        ),
        "a free atom has no force",
        ", ".join(broken),
    )
    return result, reference


def check_against(
    name: str,
    potential: Potential,
    method: Method,
    graphs: Graphs,
    reference: Reference,
    tolerances: tuple[float, float],
    reason: str,
    *,
    severe: bool = True,
) -> CheckResult:
    """Compare energies and forces of single structures with a reference.

    Args:
        name: Name of the check.
        potential: Source of reference energies and device.
        method: Function that predicts a graph on the device of the potential.
        graphs: Structures.
        reference: Their predictions.
        tolerances: Largest deviation of energies per atom and of forces, each relative to the
            larger of 1 and the largest value.
        reason: Reason for the tolerances.
        severe: Exceeding the tolerances is a failure, otherwise a warning.
    """
    found = predict(method, graphs, potential.device)
    return _compared(
        name, f"{len(graphs)} structures", potential, graphs, found, reference, tolerances, reason, severe
    )


def check_batch(potential: Potential, graphs: Graphs, reference: Reference) -> CheckResult:
    """Compare every structure alone with the same structure in one batch of all, in float64."""
    together = potential(collate(list(graphs.values())))
    sizes = [graph.num_atoms for graph in graphs.values()]
    atomic, forces = together.atomic_energies.detach().split(sizes), together.forces.detach().split(sizes)
    found = {
        name: Prediction(
            together.energy[k : k + 1].detach(), atomic[k], forces[k], together.virial[k : k + 1].detach()
        )
        for k, name in enumerate(graphs)
    }
    return _compared(
        "batch and single",
        f"{len(graphs)} structures alone and in one batch, float64",
        potential,
        graphs,
        found,
        reference,
        (BATCH_TOLERANCE, BATCH_TOLERANCE),
        "structures of a batch do not see each other; float64 rounds at 1e-16, sums amplify it",
        True,
    )


def check_compiled(potential: Potential, graphs: Graphs, reference: Reference) -> CheckResult:
    """Compare compiled code with eager mode, both in float32; the potential stays compiled."""
    allowed = limits.TOLERANCES[torch.float32]
    reason = "rounding of float32, fused in another order"
    evaluator = Evaluator(potential, compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = predict(evaluator, graphs, potential.device)
    result = _compared(
        "compiled",
        f"{len(graphs)} structures, compiled against eager mode, float32",
        potential,
        graphs,
        found,
        reference,
        (FLOAT32_ENERGY, allowed),
        reason,
        True,
    )
    if potential.is_compiled:
        return result
    failures = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)] or [
        "no structure is large enough"
    ]
    return CheckResult(result.name, result.tested, (), reason, warning=f"not compiled: {failures[0]}")


def bound_energies(potential: Potential, graph: Graph, prediction: Prediction) -> torch.Tensor:
    """Energies of structures without those of free atoms, (B,) float64 in eV, on the CPU.

    The difference is taken atom by atom, so large reference energies cost no digits.
    """
    free = potential.reference_energies.cpu()[potential.species_of.cpu()[graph.atomic_numbers.cpu()]]
    atomic = prediction.atomic_energies.detach().cpu() - free
    return torch.zeros(graph.num_structures, dtype=torch.float64).index_add(0, graph.structure.cpu(), atomic)


def _compared(
    name: str,
    tested: str,
    potential: Potential,
    graphs: Graphs,
    found: Reference,
    expected: Reference,
    tolerances: tuple[float, float],
    reason: str,
    severe: bool,
) -> CheckResult:
    energies, forces = {}, {}
    for structure, graph in graphs.items():
        e, reference = (
            bound_energies(potential, graph, p[structure]) / graph.num_atoms for p in (found, expected)
        )
        energies[structure] = _relative(e, reference)
        forces[structure] = _relative(found[structure].forces, expected[structure].forces)
    return CheckResult(
        name,
        tested,
        (
            Figure("energies differ by", _worst(energies.values()), "eV/atom", tolerances[0], severe),
            Figure("forces differ by", _worst(forces.values()), "eV/Å", tolerances[1], severe),
        ),
        reason,
        f"largest force error: {max(forces, key=forces.__getitem__)}",
    )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return _largest(found - expected) / max(1.0, _largest(expected))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _worst(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).max())  # unlike Python's max, propagates NaN
