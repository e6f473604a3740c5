"""Evaluation of energies and forces: compiled and replayed as a CUDA graph where that is faster."""

import logging
import time
from collections.abc import Callable

import torch

from dpa4.execution import limits
from dpa4.execution.padding import replayed_size
from dpa4.graph import Graph, first_atoms
from dpa4.potential.potential import Potential, Prediction
from dpa4.system import Lock, keep_freed_memory, naming_lack_of_memory, own_settings

_log = logging.getLogger(__name__)

_ONE = "compute a smaller structure, use a GPU with more memory or one that is free, or the CPU (device cpu)"
_SEVERAL = "compute fewer structures at once, or use a GPU with more memory or one that is free"


class Evaluator:
    """A potential in evaluation mode, compiled at first use, and replayed as a CUDA graph for small systems.

    There are three variants of the code. For small systems, intermediate results of the forward pass are stored for
    the derivatives; for larger systems only those of the last block; for large systems none. The first call of each
    variant is compared with eager mode, for large systems on the first atoms only. If compiled code deviates from
    eager mode, the variant that stores no intermediates is tried: it consists of different kernels, so the same
    compiler bug is unlikely to affect both. If that fails as well, a warning gives the reason, and calculations stay
    in eager mode. Graphs of several structures are compiled but not replayed as CUDA graphs: their sizes vary, and
    together they keep the device busy.

    Args:
        potential: The potential, on its device and in its precision.
        compile: True to compile, False not to; None compiles on a GPU in float32.
    """

    @own_settings
    def __init__(self, potential: Potential, compile: bool | None):
        self.potential = potential.eval()
        keep_freed_memory(potential.device)
        if compile is None:
            compile = limits.compiles_by_default(potential.device, potential.dtype)
        self._compile = compile
        self._lock = Lock()
        self._policies = limits.keep_policies(potential.config)
        self._keeps_results = True  # false once a variant that stores intermediates has deviated
        self._compared: set[int] = set()  # indices of the policies that were compared with eager mode
        self._call: Callable[[Graph], Prediction] = potential.__call__

    @property
    def device(self) -> torch.device:
        """Device of the potential."""
        return self.potential.device

    @own_settings
    def __call__(self, graph: Graph) -> Prediction:
        """Compute the prediction for a graph on the device; other threads wait."""
        advice = _ONE if graph.num_structures == 1 else _SEVERAL
        with (
            self._lock,
            naming_lack_of_memory(lambda: f"energy and forces of {graph.size}", self.device, advice),
        ):
            if self._compile and limits.can_be_compiled(graph):
                self._prepare(graph)
            return self._call(graph) if graph.num_structures == 1 else self.potential(graph)

    def _prepare(self, graph: Graph) -> None:
        """Compile the variant for the size of a graph and compare it with eager mode, unless done before."""
        # Imported here, since importing the compiler takes a second.
        from dpa4.execution import cuda_graph, regions
        from dpa4.execution.trial import DeviationError, attempt

        atoms = graph.num_atoms
        if graph.positions.is_cuda and graph.num_structures == 1:
            atoms = replayed_size(atoms) or atoms
        policy = limits.keep_policy(atoms, self._policies) if self._keeps_results else limits.KEEP_NOTHING
        if policy in self._compared:
            return
        start = time.monotonic()

        def work() -> dict[str, float]:
            nonlocal policy
            if not self._compared:
                regions.compile_potential(self.potential)
            try:
                return self._compile_and_compare(graph, policy)
            except DeviationError as error:
                if policy == limits.KEEP_NOTHING:
                    raise
                _log.info("compiled code that stores intermediate results is not used: %s", error)
            policy, self._keeps_results = limits.KEEP_NOTHING, False
            return self._compile_and_compare(graph, policy)

        found = attempt(self.potential, work, self._give_up)
        if found is None:
            return
        regions.keep_results(
            self.potential, self._policies[0 if self._keeps_results else limits.KEEP_NOTHING]
        )
        self._compared.add(policy)
        _log.info(
            "compiled and compared in %.0f s; relative deviations from eager mode: %s",
            time.monotonic() - start,
            found,
        )
        if graph.positions.is_cuda and not isinstance(self._call, cuda_graph.Replay):
            self._call = cuda_graph.Replay(self.potential)

    def _compile_and_compare(self, graph: Graph, policy: int) -> dict[str, float]:
        """Compile the variant of a policy and compare it with eager mode; return the deviations."""
        from dpa4.execution import regions
        from dpa4.execution.precompile import Mode, precompile
        from dpa4.execution.trial import require_agreement

        regions.keep_results(self.potential, self._policies[policy])
        precompile(self.potential, [Mode(False, self.potential.precision)], graph)
        self.potential(graph)  # compiles whatever this graph needs
        return require_agreement(self.potential, first_atoms(graph, limits.MAX_COMPARED_ATOMS))

    def _give_up(self, error: Exception) -> None:
        from dpa4.execution.trial import warn_of_eager_mode

        self._compile = False
        self._call = self.potential.__call__
        warn_of_eager_mode(error)
