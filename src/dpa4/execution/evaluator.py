"""Energies and forces as fast as the device allows."""

import logging
import time
from collections.abc import Callable

from dpa4.execution import limits
from dpa4.execution.padding import replayed_size
from dpa4.graph import Graph, first_atoms
from dpa4.potential.potential import Potential, Prediction
from dpa4.system import keep_freed_memory

_log = logging.getLogger(__name__)


class Evaluator:
    """A potential in evaluation mode, compiled when first needed and replayed as a CUDA graph where it is small.

    There are three variants of the code. For small systems it keeps results of the forward pass for the derivatives,
    for larger ones only results of the last block, and for large ones none. The first call of each variant compares
    it with eager mode, on large systems for the first atoms. If compiled code deviates from eager mode, the variant
    that stores no intermediates is tried: it consists of different kernels, so the same compiler bug is unlikely to
    affect both. If that fails as well, a warning says why, and calculations stay in eager mode. Graphs of several
    structures are compiled but not replayed as CUDA graphs: their sizes keep changing, and together they keep the
    device busy.

    Args:
        potential: The potential, on its device and in its precision.
        compile: True to compile, False not to; None compiles on a GPU in float32.
    """

    def __init__(self, potential: Potential, compile: bool | None):
        self.potential = potential.eval()
        keep_freed_memory(potential.device)
        if compile is None:
            compile = limits.compiles_by_default(potential.device, potential.dtype)
        self._compile = compile
        self._keeps_results = True  # until results of code that keeps them deviate
        self._compared: set[int] = set()  # indices of the keep policies that were compared
        self._call: Callable[[Graph], Prediction] = potential.__call__

    def __call__(self, graph: Graph) -> Prediction:
        """Compute the prediction for a graph on the device."""
        if self._compile and limits.can_be_compiled(graph):
            self._prepare(graph)
        return self._call(graph) if graph.num_structures == 1 else self.potential(graph)

    def _prepare(self, graph: Graph) -> None:
        """Compile the code for the size of a graph and compare it with eager mode, unless that is done."""
        # Imports of the compiler take a second.
        from dpa4.execution import cuda_graph, regions
        from dpa4.execution.trial import DeviationError, attempt

        atoms = graph.num_atoms
        if graph.positions.is_cuda and graph.num_structures == 1:
            atoms = replayed_size(atoms) or atoms
        policy = limits.keep_policy(atoms) if self._keeps_results else limits.KEEP_NOTHING
        if policy in self._compared:
            return
        start = time.monotonic()

        def work() -> dict[str, float]:
            nonlocal policy
            if not self._compared:
                regions.compile_potential(self.potential)
            try:
                return self._made(graph, policy)
            except DeviationError as error:
                if policy == limits.KEEP_NOTHING:
                    raise
                _log.info("code that keeps results: %s", error)
            policy, self._keeps_results = limits.KEEP_NOTHING, False
            return self._made(graph, policy)

        found = attempt(self.potential, work, self._give_up)
        if found is None:
            return
        regions.keep_results(
            self.potential, limits.KEEP_POLICIES[0 if self._keeps_results else limits.KEEP_NOTHING]
        )
        self._compared.add(policy)
        _log.info(
            "compiled and compared in %.0f s; relative deviations from eager mode: %s",
            time.monotonic() - start,
            found,
        )
        if graph.positions.is_cuda and not isinstance(self._call, cuda_graph.Replay):
            self._call = cuda_graph.Replay(self.potential)

    def _made(self, graph: Graph, policy: int) -> dict[str, float]:
        """Have the code of a policy compiled, and compare it with eager mode; return the deviations."""
        from dpa4.execution import regions
        from dpa4.execution.precompile import Mode, precompile
        from dpa4.execution.trial import compared

        regions.keep_results(self.potential, limits.KEEP_POLICIES[policy])
        precompile(self.potential, [Mode(False, self.potential.precision)], graph)
        self.potential(graph)  # so that code is made for these sizes
        return compared(self.potential, first_atoms(graph, limits.MAX_COMPARED_ATOMS))

    def _give_up(self, error: Exception) -> None:
        from dpa4.execution.trial import warn_of_eager_mode

        self._compile = False
        self._call = self.potential.__call__
        warn_of_eager_mode(error)
