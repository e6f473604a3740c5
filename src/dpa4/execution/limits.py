"""Every threshold of execution, with its source. Sizes are numbers of atoms or edges unless said otherwise.

Measurements are in benchmarks/LOG.md under the dates given here.
"""

import math
from typing import NamedTuple

import torch

from dpa4.graph import Graph
from dpa4.model.network import (
    MAX_EDGES as MAX_EDGES,  # edges processed at once; the network needs it in eager mode, too
)
from dpa4.potential.potential import Potential
from dpa4.tracing.sizes import MIN_SIZE

MAX_REPLAYED_ATOMS = 4224
"""Atoms of the largest CUDA graph, padding included: 4096 are padded to 4224. Larger systems keep the device busy
without one, and a CUDA graph never returns its memory (one H200, docs/adr/0010 and 0011)."""

SIZE_DIGITS = 6
"""Binary digits of the padded sizes in dynamics: padding adds at most 1/32 (one H200; before, 5 digits and 1/16)."""

BATCH_SIZE_DIGITS = 5
"""Binary digits of the padded sizes of training batches, which vary more than the sizes of MD steps: at most 1/16."""

MAX_COMPARED_ATOMS = 512
"""Atoms compared with eager mode, which may lack the memory for a whole large system."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Largest deviation of compiled results relative to the largest entry: rounding, amplified by sums that cancel."""

FAST_TOLERANCE = 0.1
"""The same at precision "fast", where the rounding of bfloat16 (0.4 %) depends on how operations are fused."""

MAX_WORKERS = 8
"""Processes that compile. With more, the longest stage decides; on a GPU each process takes half a GiB of context."""

MIN_PROCESSORS = 4
"""Processors below which all stages are compiled in one process."""

WORKER_MEMORY = 2**30
"""Bytes of the GPU that are reserved for the context of each worker."""


class KeepPolicy(NamedTuple):
    """Largest numbers of atoms for which energies and forces keep results of the forward pass for the derivatives."""

    # Outside of the blocks, and in the last block: its derivative comes first, so its results are freed early.
    last: int
    everywhere: int


KEEP_POLICIES = (
    KeepPolicy(MAX_REPLAYED_ATOMS, 2048),
    KeepPolicy(MAX_REPLAYED_ATOMS, 0),
    KeepPolicy(0, 0),
)
"""Policies for small, larger and large systems. Keeping results everywhere takes 3 MiB per atom of paper-air and
saves a sixth of the time (43.6 and 37.0 ms for 4,096 atoms on one H200)."""

KEEP_NOTHING = len(KEEP_POLICIES) - 1
"""Index of the policy that keeps nothing."""


def keep_policy(atoms: int) -> int:
    """Index of the policy for a number of atoms."""
    small = KEEP_POLICIES[0]
    return (atoms > small.everywhere) + (atoms > small.last)


def can_be_compiled(graph: Graph) -> bool:
    """Return whether a graph is large enough for compiled code; smaller graphs run eagerly."""
    return min(graph.num_atoms, graph.num_edges) >= MIN_SIZE


def compiles_by_default(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether compilation is on unless the user says otherwise: on a GPU in float32."""
    return device.type == "cuda" and dtype == torch.float32


def tolerance(potential: Potential) -> float:
    """Largest relative deviation of a compiled potential from its eager form that rounding explains."""
    return FAST_TOLERANCE if potential.precision == "fast" else TOLERANCES[potential.dtype]


def exceeded(deviations: dict[str, float], allowed: float) -> dict[str, float]:
    """Deviations that are larger than allowed, or not a number."""
    return {name: d for name, d in deviations.items() if math.isnan(d) or d > allowed}


def is_in_parts(potential: Potential, num_edges: int) -> bool:
    """Return whether edges are processed in parts; a CUDA graph cannot do that, as cutting waits for the device."""
    return num_edges > potential.model.max_edges[potential.device.type]
