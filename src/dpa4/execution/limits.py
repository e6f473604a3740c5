"""Limits of execution, each with its source.

Sizes are numbers of atoms or edges unless stated otherwise. Measurements are in benchmarks/LOG.md and in docs/adr.
Some limits belong to lower layers: the edges processed at once, which are limited in eager mode as well
(`dpa4.model.network.max_edges`), and the sizes of traced code (`dpa4.tracing.sizes`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dpa4.graph import Graph
from dpa4.model import ModelConfig
from dpa4.model.network import EDGE_WIDTH
from dpa4.potential.potential import Potential
from dpa4.tracing.sizes import MIN_SIZE

MAX_REPLAYED_ATOMS = 4224
"""Largest number of atoms of a CUDA graph, padding included: 4,096 atoms are padded to 4,224. Larger systems keep the
device busy without a CUDA graph, and a CUDA graph never returns its memory (one H200, docs/adr/0010 and 0011)."""

SIZE_DIGITS = 6
"""Significant binary digits of padded sizes in MD: at most 1/32 is added (one H200; earlier 5 digits, or 1/16)."""

BATCH_SIZE_DIGITS = 5
"""Significant binary digits of padded training batches, whose sizes vary more than in MD: at most 1/16 is added."""

MAX_COMPARED_ATOMS = 512
"""Largest number of atoms in a comparison with eager mode, which may lack the memory for a large system."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Largest deviation of compiled results relative to the largest entry: rounding, amplified by sums that cancel."""

FAST_TOLERANCE = 0.1
"""Largest relative deviation at precision "fast": the rounding of bfloat16 (0.4 %) depends on operator fusion."""

MAX_WORKERS = 8
"""Largest number of compile workers. With more, the longest stage sets the time; on a GPU the CUDA context of each
takes half a GiB."""

MIN_PROCESSORS = 4
"""Smallest number of processors for which workers are started."""

WORKER_MEMORY = 2**30
"""Bytes of GPU memory that must be free for the CUDA context of each worker."""


class KeepPolicy(NamedTuple):
    """Largest numbers of atoms for which intermediate results of the forward pass are kept for the derivatives.

    Attributes:
        last: Limit for the last block and the parts outside of the blocks. The derivative of the last block comes
            first, so its intermediates are freed early.
        everywhere: Limit for all other blocks.
    """

    last: int
    everywhere: int


KEEP_POLICIES = (
    KeepPolicy(MAX_REPLAYED_ATOMS, 2048),
    KeepPolicy(MAX_REPLAYED_ATOMS, 0),
    KeepPolicy(0, 0),
)
"""Policies for small, larger and large systems. Keeping intermediates everywhere takes 3 MiB per atom of paper-air
and saves a sixth of the time (43.6 and 37.0 ms for 4,096 atoms on one H200)."""

KEEP_NOTHING = len(KEEP_POLICIES) - 1
"""Index of the policy that keeps no intermediates."""

_BLOCKS = 4
"""Largest number of blocks of width EDGE_WIDTH for which KEEP_POLICIES apply: 11 GiB for the preset plus."""


def keep_policies(config: ModelConfig) -> list[KeepPolicy]:
    """Return KEEP_POLICIES for a model: wider and deeper models keep the intermediate results of fewer atoms."""
    widths = config.edge_widths
    last = min(1.0, EDGE_WIDTH / widths[-1])
    everywhere = min(last, EDGE_WIDTH * _BLOCKS / sum(widths))
    return [KeepPolicy(int(p.last * last), int(p.everywhere * everywhere)) for p in KEEP_POLICIES]


def keep_policy(atoms: int, policies: Sequence[KeepPolicy]) -> int:
    """Index of the policy for a number of atoms."""
    small = policies[0]
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


def is_in_parts(potential: Potential, num_edges: int) -> bool:
    """Return whether edges are processed in parts; a CUDA graph cannot do that, as cutting waits for the device."""
    return num_edges > potential.model.max_edges[potential.device.type]
